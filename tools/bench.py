"""Measures speed where it runs: the real training loop, another system beside it, or the input pipeline alone.

    python tools/bench.py --config=configs/bench/cpu_gpt2.py [--peer=transformers] [--rounds=10] [--seconds=5] \
        [--json=FILE]
    python tools/bench.py --input [--megabytes=100,1000] [--seconds=5] [--json=FILE]

Training is the project's own: its data, its batches, its compiled step, and what a run fetches of each step; without
evaluation and checkpoints. The peer (pip install -e '.[peer]') starts from the same weights and reads the same batches;
the two take turns, round by round, and their losses must agree before anything is timed. Start it as a program of its
own: the time to the first step counts from there.
"""

import json
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # recipes import `configs`, which is not installed

from tools import bench_training  # isort: skip  (first: its clock starts there)

from absl import app, flags
from ml_collections import config_flags

from lm.parallel import xla_flags as lm_flags
from lm.tasks import build_config

_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe: configs/NAME.py, or configs/NAME.py:argument.")
_PEER = flags.DEFINE_enum("peer", "", ["", "transformers"], "What trains the same model in the same run.")
_ACTIVATION = flags.DEFINE_string("peer_activation", "gelu_new", "Its GELU: gelu_new (GPT-2's) or gelu_pytorch_tanh.")
_ROUNDS = flags.DEFINE_integer("rounds", 10, "Rounds of training to time.", lower_bound=1)
_SECONDS = flags.DEFINE_float("seconds", 5.0, "Of a round, about; of each thing, with --input.", lower_bound=0.0)
_INPUT = flags.DEFINE_bool("input", False, "Measure the input pipeline alone.")
_MEGABYTES = flags.DEFINE_list("megabytes", ["100", "1000"], "With --input: sizes of prepared data.")
_JSON = flags.DEFINE_string("json", "", "Write all figures to this file.")


def main(argv: list[str]) -> None:
    """Turns flags into figures, and an expected error into one clear message and exit status 1."""
    if len(argv) > 1 or (_CONFIG.value is None) == (not _INPUT.value):
        sys.exit("error: either --config=configs/NAME.py or --input, and all options are --flag=value; see --help")
    lm_flags.check_output("json", _JSON.value)
    if not all(re.fullmatch(r"[1-9]\d*", size) for size in _MEGABYTES.value):
        sys.exit(f"error: --megabytes={','.join(_MEGABYTES.value)}: expected whole numbers, such as 100,1000")
    try:
        with tempfile.TemporaryDirectory() as folder:
            if _INPUT.value:
                from tools import bench_input

                found = bench_input.measure(Path(folder), list(map(int, _MEGABYTES.value)), _SECONDS.value)
                bench_input.show(found)
            else:
                cfg = build_config(_CONFIG.value)
                lm_flags.set_libtpu(cfg.model.embed_dim)
                found = bench_training.measure(
                    cfg,
                    Path(folder),
                    _ROUNDS.value,
                    _SECONDS.value,
                    peer=bool(_PEER.value),
                    activation=_ACTIVATION.value,
                )
                bench_training.show(found)
    except (ValueError, RuntimeError) as error:
        if type(error).__module__.startswith("lm.") or isinstance(error, bench_training.Disagree):
            sys.exit(f"error: {error}")
        raise
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    lm_flags.use_huge_pages()
    app.run(main, flags_parser=lm_flags.parse)
