"""Scores a trained run on a test set: the task's metrics with intervals, tables of classes, the worst examples.

    python tools/evaluate.py --run=runs/sst2@best --path=test.tsv [--compare=runs/other@best]
    python tools/evaluate.py --run=runs/sst2@best --set=test

The scores are computed as in training. Prints a report, and writes scores.json, scores.txt and predictions.jsonl.
docs/use.md explains each figure.
"""

import sys
from pathlib import Path
from typing import Any

from absl import flags

from lm import command_line
from lm.terminal import say, stop

_RUN = flags.DEFINE_string("run", None, "The run's folder; RUN@best or RUN@STEP for another checkpoint.")
_PATH = flags.DEFINE_string("path", None, "The test set: a file, a folder or a glob; with --format=tfds, a data set.")
_SET = flags.DEFINE_string("set", "", "Instead of --path: a set of the run's eval.sets, such as test.")
_OUT = flags.DEFINE_string("out", "", "Folder for the results; '' = evaluations/NAME@STEP in the run's folder.")
_COMPARE = flags.DEFINE_string("compare", "", "Another run, scored on the same records: a paired comparison.")
_FORMAT = flags.DEFINE_string("format", "", "Format of the records, see docs/formats.md; '' = that of the run's data.")
_RENAME = flags.DEFINE_list("rename", [], "Fields as in data.rename, 'FIELD:EXPECTED,...' (default: the run's).")
_SPLIT = flags.DEFINE_string("split", "", "With --format=tfds: the split, such as test.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 0, "Rows computed together; 0 = as in the run's evaluation.")
_BEAMS = flags.DEFINE_integer("beams", 4, "Beam size of translations; 1 = greedy.", lower_bound=1)
_RESAMPLES = flags.DEFINE_integer("resamples", 1000, "Of the bootstrap, for the intervals.", lower_bound=2)
_SEED = flags.DEFINE_integer("seed", 0, "Of the bootstrap.", lower_bound=0)


def main(argv: list[str]) -> None:
    """Scores --run and, if it is given, --compare."""
    command_line.arguments(argv)
    if not _RUN.value or bool(_PATH.value) == bool(_SET.value):
        stop("error: --run=RUN and either --path=FILE or --set=NAME are needed; --help explains them")
    changes = command_line.data_changes(_FORMAT.value, _RENAME.value, _SPLIT.value)
    if _SET.value and changes:
        stop("error: --format, --rename and --split are of --path; a set of the run's eval.sets has its own")
    with command_line.one_line_errors():
        evaluate(_RUN.value, _PATH.value or "", _SET.value, changes)


def evaluate(run: str, path: str, name: str, changes: dict[str, Any]) -> None:
    """Prints and writes the scores on a file or, where `name` is given, on that set of the run."""
    from lm import eval_sets, predict, scoring

    loaded = [predict.load(each, batch_size=_BATCH_SIZE.value) for each in (run, _COMPARE.value) if each]
    if name:
        scored = [predict.on_set(model, loaded[0].config, name) for model in loaded]
    else:
        scored = [(model, eval_sets.data_at(model.config, path, **changes)) for model in loaded]
    out = Path(_OUT.value) if _OUT.value else default_folder(loaded[0].name, name or path)
    scoring.check_folder(out)
    found = [
        scoring.evaluate(
            model,
            data,
            resamples=_RESAMPLES.value,
            seed=_SEED.value,
            beams=_BEAMS.value,
            note=lambda text: say(text, file=sys.stderr),
        )
        for model, data in scored
    ]
    comparison = scoring.compare(*found) if len(found) == 2 else None
    scoring.write(found[0], out, comparison)
    say((out / "scores.txt").read_text(encoding="utf-8"), end="")
    say(f"\nwritten: {out}/scores.json, scores.txt" + (", predictions.jsonl" if found[0].predictions else ""))


def default_folder(model: str, path: str) -> Path:
    """RUN/evaluations/NAME@STEP for the model RUN@STEP; NAME is of the set, or of the file and the split."""
    folder, _, step = model.rpartition("@")
    name = Path(path.rstrip("/")).name.replace("{", "").replace("}", "").replace("*", "all")
    return Path(folder) / "evaluations" / f"{'-'.join(filter(None, (name, _SPLIT.value)))}@{step}"


if __name__ == "__main__":
    command_line.run(main)
