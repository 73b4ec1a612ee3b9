"""The recipe of a recorded trial: its config as it is. A sweep starts each run with it, and so can you.

python -m lm.main --config=lm/study/recorded.py:runs/NAME/HASH/trial.json --workdir=runs/NAME/HASH
"""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from lm.config import ConfigError, schema
from lm.study import runs


def get_config(arg: str | None = None) -> Any:
    """The config of a trial; `arg` is its trial.json."""
    if not arg:
        raise ConfigError("expected the file of a trial: --config=lm/study/recorded.py:RUN/trial.json")
    return ConfigDict(schema.to_dict(runs.read_record(Path(arg)).config))
