"""Measures the speed of training on this machine, also against PyTorch's transformers, or of a part of it alone.

    python tools/bench.py --config=configs/bench/cpu_gpt2.py [--peer=transformers] [--rounds=10] [--seconds=5] \
        [--json=FILE]
    python tools/bench.py --input [--megabytes=100,1000] [--seconds=5] [--json=FILE]
    python tools/bench.py --config=configs/bench/cpu_gpt2.py --generate [--peer=transformers] [--rounds=10] \
        [--json=FILE]
    python tools/bench.py --checkpoint [--megabytes=500] [--rounds=10] [--json=FILE]

What is timed is the project's own training: its data, batches and compiled step, and the metrics that a run fetches
after each step; evaluation and checkpoints are left out. The peer (pip install -e '.[peer]') starts from the same
weights and reads the same batches. The two alternate round by round, and nothing is timed unless their losses agree.
--generate decodes 128 ids greedily after 64, for 1 and for 16 prompts, and the peer has to give the same ids.
--input is the input pipeline. --checkpoint saves and loads a state, and alternates with Orbax alone.
"""

import json
import re
import tempfile
from pathlib import Path

from lm.benchmark import training  # isort: skip  (first: the clock of the time to the first step starts in it)

from absl import flags

from lm import command_line
from lm.parallel import xla_flags
from lm.terminal import stop

_CONFIG = command_line.define_recipe()
_PEER = flags.DEFINE_enum(
    "peer", "", ["", "transformers"], "Also train the same model with this library, in alternating rounds."
)
_ACTIVATION = flags.DEFINE_string(
    "peer_activation", "gelu_new", "GELU of the peer: gelu_new (GPT-2's) or gelu_pytorch_tanh."
)
_ROUNDS = flags.DEFINE_integer("rounds", 10, "Timed rounds of training, generating or of checkpoints.", lower_bound=1)
_SECONDS = flags.DEFINE_float(
    "seconds", 5.0, "Approximate length of a round; with --input, of each measurement.", lower_bound=0.0
)
_INPUT = flags.DEFINE_bool("input", False, "Measure only the input pipeline.")
_GENERATE = flags.DEFINE_bool(
    "generate", False, "Measure generating text with the model of --config, not its training."
)
_CHECKPOINT = flags.DEFINE_bool("checkpoint", False, "Measure only saving and loading checkpoints.")
_MEGABYTES = flags.DEFINE_list(
    "megabytes", None, "With --input: sizes of the prepared data (100,1000). With --checkpoint: of the state (500)."
)
_JSON = flags.DEFINE_string("json", "", "Write all figures to this file.")


def main(argv: list[str]) -> None:
    """Measures what the flags ask for and prints the figures."""
    if len(argv) > 1 or [_CONFIG.value is not None, _INPUT.value, _CHECKPOINT.value].count(True) != 1:
        stop(
            "error: one of --config=configs/NAME.py, --input and --checkpoint, and all options are --flag=value; see "
            "--help"
        )
    if _GENERATE.value and _CONFIG.value is None:
        stop("error: --generate needs --config=configs/NAME.py")
    command_line.check_output("json", _JSON.value)
    given = _MEGABYTES.value or (["500"] if _CHECKPOINT.value else ["100", "1000"])
    if not all(re.fullmatch(r"[1-9]\d*", size) for size in given) or (_CHECKPOINT.value and len(given) > 1):
        expected = "a whole number, such as 500" if _CHECKPOINT.value else "whole numbers, such as 100,1000"
        stop(f"error: --megabytes={','.join(given)}: expected {expected}")
    megabytes = list(map(int, given))
    with command_line.one_line_errors(), tempfile.TemporaryDirectory() as folder:
        if _INPUT.value:
            from lm.benchmark import input as input_benchmark

            figures = input_benchmark.measure(Path(folder), megabytes, _SECONDS.value)
            input_benchmark.show(figures)
        elif _CHECKPOINT.value:
            from lm.benchmark import checkpoint as checkpoint_benchmark

            figures = checkpoint_benchmark.measure(Path(folder), megabytes[0], _ROUNDS.value)
            checkpoint_benchmark.show(figures)
        else:
            from lm.tasks import build_config

            cfg = build_config(_CONFIG.value)
            xla_flags.set_libtpu(cfg.model.embed_dim)
            peer, activation = bool(_PEER.value), _ACTIVATION.value
            if _GENERATE.value:
                from lm.benchmark import generation

                figures = generation.measure(cfg, _ROUNDS.value, peer=peer, activation=activation)
                generation.show(figures)
            else:
                figures = training.measure(cfg, _ROUNDS.value, _SECONDS.value, peer=peer, activation=activation)
                training.show(figures)
    if _JSON.value:
        Path(_JSON.value).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    command_line.use_huge_pages()
    command_line.run(main)
