"""Predicts every record of a file with a trained run: classes, numbers, tags, answers, translations, items, ...

    python tools/predict.py --run=runs/sst2@best --path=new.jsonl --out=predictions.jsonl

One line a record, in the order of the file: what was asked, and 'prediction' with its probabilities or scores; a name
in .parquet makes a table. What is to be predicted may be missing in the file. The same command goes on after it was
stopped. docs/use.md lists what each task predicts.
"""

import sys
from pathlib import Path

from absl import flags

from lm import command_line
from lm.terminal import say, stop

_RUN = flags.DEFINE_string("run", None, "The run's folder; RUN@best or RUN@STEP for another checkpoint.")
_PATH = flags.DEFINE_string("path", None, "The records: a file, a folder or a glob; with --format=tfds, a data set.")
_OUT = flags.DEFINE_string("out", None, "File for the predictions: NAME.jsonl or NAME.parquet.")
_FORMAT = flags.DEFINE_string("format", "", "Format of the records, see docs/formats.md; '' = that of the run's data.")
_RENAME = flags.DEFINE_list("rename", [], "Fields as in data.rename, 'FIELD:EXPECTED,...' (default: the run's).")
_SPLIT = flags.DEFINE_string("split", "", "With --format=tfds: the split, such as test.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 0, "Rows computed together; 0 = as in the run's evaluation.")
_BEAMS = flags.DEFINE_integer("beams", 4, "Beam size of translations; 1 = greedy.", lower_bound=1)
_GENERATE = command_line.define_generate("max_new_tokens", "min_new_tokens", "stop", "repetition_penalty")


def main(argv: list[str]) -> None:
    """Loads the run and writes a prediction for each record."""
    command_line.arguments(argv)
    if not (_RUN.value and _PATH.value and _OUT.value):
        stop("error: --run=RUN, --path=FILE and --out=FILE are needed; --help explains them")
    command_line.check_output("out", _OUT.value)
    with command_line.one_line_errors():
        predict(_RUN.value, _PATH.value, Path(_OUT.value))


def predict(run: str, path: str, out: Path) -> None:
    """Writes the predictions, and says what was cut or has none."""
    import dataclasses

    from lm import eval_sets, tasks
    from lm import predict as predict_lib
    from lm.config.schema import ConfigError
    from lm.decoding import sampling

    changes = command_line.data_changes(_FORMAT.value, _RENAME.value, _SPLIT.value)
    loaded = predict_lib.load(run, batch_size=_BATCH_SIZE.value)
    if (generate := _GENERATE()) and not tasks.task_of(loaded.config).answers_with_text:
        name = loaded.config.task.name
        raise ConfigError(f"--{next(iter(generate))} is of translations, but this is a run of task.name={name}")
    loaded = dataclasses.replace(loaded, config=sampling.changed(loaded.config, generate))
    data = eval_sets.data_at(loaded.config, path, **changes)
    note = lambda text: say(text, file=sys.stderr)  # noqa: E731
    counts = predict_lib.write_predictions(loaded, data, out, beams=_BEAMS.value, note=note)
    others = ", ".join(f"{name} {count:,}" for name, count in counts.items() if count and name != "records")
    say(f"{out}: {counts['records']:,} predictions by {loaded.name}" + (f" ({others})" if others else ""))


if __name__ == "__main__":
    command_line.run(main)
