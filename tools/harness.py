"""Scores a trained run on tasks of EleutherAI's lm-evaluation-harness.

    python tools/harness.py --run=runs/tinystories@best --tasks=lambada_openai,piqa [--out=FILE]
    python tools/harness.py --run=runs/tinystories@best --tasks=my_task --include_path=my_tasks

The harness (pip install -e '.[harness]') loads the data sets of its tasks from the Hugging Face hub, and executes code
that a task names. docs/evaluation.md says how texts are scored.
"""

import sys
from pathlib import Path

from absl import flags

from lm import command_line
from lm.terminal import say, stop

_RUN = flags.DEFINE_string("run", None, "The run's folder; RUN@best or RUN@STEP for another checkpoint.")
_TASKS = flags.DEFINE_list("tasks", [], "Names of tasks, separated by commas.")
_INCLUDE_PATH = flags.DEFINE_string("include_path", "", "Folder of further tasks, as YAML.")
_SHOTS = flags.DEFINE_integer("num_fewshot", None, "Examples in a prompt (default: as the tasks say).", lower_bound=0)
_LIMIT = flags.DEFINE_integer("limit", 0, "Examples of each task, for a trial; 0 = all.", lower_bound=0)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 0, "Rows computed together; 0 = as in the run's evaluation.")
_OUT = flags.DEFINE_string("out", "", "Write the scores and the tasks' settings to this JSON file.")


def main(argv: list[str]) -> None:
    """Prints the table of the harness, and what was cut."""
    command_line.arguments(argv)
    if not _RUN.value or not _TASKS.value:
        stop("error: --run=RUN and --tasks=NAME,... are needed; --help explains them")
    command_line.check_output("out", _OUT.value)
    with command_line.one_line_errors():
        from lm import harness, predict

        loaded = predict.load(_RUN.value, batch_size=_BATCH_SIZE.value)
        shots, limit = _SHOTS.value, _LIMIT.value
        found, table = harness.evaluate(
            loaded, _TASKS.value, include_path=_INCLUDE_PATH.value, shots=shots, limit=limit
        )
        if _OUT.value:
            harness.write(found, Path(_OUT.value))
    say(table)
    if cut := found["counts"]["context_cut"]:
        say(f"contexts cut at their start, as the model has fewer positions: {cut:,}", file=sys.stderr)


if __name__ == "__main__":
    command_line.run(main)
