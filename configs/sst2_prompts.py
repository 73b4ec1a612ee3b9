"""Fine-tune the decoder of configs/reviews_clm.py on SST-2's sentiment by prompting.

    python -m lm.main --config=configs/reviews_clm.py --workdir=runs/reviews_clm
    python -m lm.main --config=configs/sst2_prompts.py --workdir=runs/sst2_prompts

Two CPU cores, minutes; not run in full.
Reads ../shared/data/sst2 (LM_SHARED_DATA names another place).
"""

from typing import Any

from configs import sst2
from lm.tasks import task_config


def get_config(arg: str | None = None) -> Any:
    """Fine-tuning by prompts, with four examples before each held-out one; `arg` is not used."""
    del arg
    c = sst2.get_config("clm")
    c.task = task_config("prompting", labels=c.task.labels, templates=("{text} It was {label:bad|good}.",), shots=4)
    c.init_rules = ((".*", "keep"),)  # there is no head
    c.data.seq_len = 256
    return c
