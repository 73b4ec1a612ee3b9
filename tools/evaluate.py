"""Scores a trained run on a test set: the task's metrics with intervals, tables of classes, the worst examples.

    python tools/evaluate.py --run=runs/sst2@best --path=test.tsv [--compare=runs/other@best]

The scores are computed as in training. Prints a report, and writes scores.json, scores.txt and predictions.jsonl.
docs/use.md explains each figure.
"""

import sys
from pathlib import Path

from absl import flags

from lm import command_line
from lm.terminal import say, stop

_RUN = flags.DEFINE_string("run", None, "The run's folder; RUN@best or RUN@STEP for another checkpoint.")
_PATH = flags.DEFINE_string("path", None, "The test set: a file, a folder or a glob; with --format=tfds, a data set.")
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
    if not (_RUN.value and _PATH.value):
        stop("error: --run=RUN and --path=FILE are needed; --help explains them")
    with command_line.one_line_errors():
        evaluate(_RUN.value, _PATH.value)


def evaluate(run: str, path: str) -> None:
    """Prints and writes the scores."""
    from lm import predict, scoring

    changes = command_line.data_changes(_FORMAT.value, _RENAME.value, _SPLIT.value)
    models = [predict.load(name, batch_size=_BATCH_SIZE.value) for name in (run, _COMPARE.value) if name]
    out = Path(_OUT.value) if _OUT.value else default_folder(models[0].name, path)
    scoring.check_folder(out)
    found = [
        scoring.evaluate(
            model,
            predict.data_at(model.config, path, **changes),
            resamples=_RESAMPLES.value,
            seed=_SEED.value,
            beams=_BEAMS.value,
            note=lambda text: say(text, file=sys.stderr),
        )
        for model in models
    ]
    comparison = scoring.compare(*found) if len(found) == 2 else None
    scoring.write(found[0], out, comparison)
    say((out / "scores.txt").read_text(encoding="utf-8"), end="")
    say(f"\nwritten: {out}/scores.json, scores.txt" + (", predictions.jsonl" if found[0].predictions else ""))


def default_folder(model: str, path: str) -> Path:
    """RUN/evaluations/NAME@STEP for the model RUN@STEP; NAME is of the file, and of the split of a data set."""
    folder, _, step = model.rpartition("@")
    name = Path(path.rstrip("/")).name.replace("{", "").replace("}", "").replace("*", "all")
    return Path(folder) / "evaluations" / f"{'-'.join(filter(None, (name, _SPLIT.value)))}@{step}"


if __name__ == "__main__":
    command_line.run(main)
