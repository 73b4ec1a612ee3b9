"""Prepares the text of a recipe for training: cleaned, without duplicates and evaluation data, tokenized, packed.

    python tools/prepare_data.py --config=configs/NAME.py --out=FOLDER [--config.data.path=FILES] [--workers=2] \
        [--evaluation=FILE,...] [--ngram=13] [--near=0.75] [--filters=NAME,...] [--shard_megabytes=16] \
        [--runner=DirectRunner [--runner_option=--project=X ...]]

A run then reads it with --config.data.format=prepared --config.data.path=FOLDER. Killed, the same command goes on where
it stopped, and the bytes are the same. See docs/data.md.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import config_flags

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # recipes import `configs`, which is not installed

from lm.corpus import filters, pipeline, workers
from lm.parallel import xla_flags as lm_flags
from lm.tasks import build_config

_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe: configs/NAME.py, or configs/NAME.py:argument.")
_OUT = flags.DEFINE_string("out", "", "Folder to write to. The same command again goes on.")
_WORKERS = flags.DEFINE_integer("workers", os.cpu_count() or 1, "Processes of this machine.", lower_bound=1)
_RUNNER = flags.DEFINE_string("runner", "", "Apache Beam runner instead, such as DirectRunner; needs the extra 'beam'.")
_OPTIONS = flags.DEFINE_multi_string("runner_option", [], "A flag of the runner, such as --project=NAME.")
_EVALUATION = flags.DEFINE_list("evaluation", [], "Files, folders or globs whose text no document may hold.")
_NGRAM = flags.DEFINE_integer("ngram", 13, "Words in a row that make a document hold it.", lower_bound=1)
_NEAR = flags.DEFINE_float(
    "near", 0.75, "Least similarity of near duplicates; 0 = keep them.", lower_bound=0, upper_bound=1
)
_FILTERS = flags.DEFINE_list("filters", list(filters.DEFAULT), f"Of {', '.join(filters.FILTERS)}; '' = none.")
_SHARD = flags.DEFINE_float("shard_megabytes", 16.0, "Text of a shard.", lower_bound=0.001)


def main(argv: list[str]) -> None:
    """Turns flags into prepared data, and an expected error into one clear message and exit status 1."""
    if len(argv) > 1 or _CONFIG.value is None or not _OUT.value:
        sys.exit("error: --config=configs/NAME.py and --out=FOLDER are needed, as --flag=value; --help explains them")
    try:
        planned = pipeline.plan(
            build_config(_CONFIG.value),
            Path(_OUT.value),
            evaluation=_EVALUATION.value,
            ngram=_NGRAM.value,
            filters=_FILTERS.value,
            near=_NEAR.value,
            shard_bytes=round(_SHARD.value * 2**20),
        )
        if planned.note:
            print(planned.note, file=sys.stderr)
        runner = workers.beam(_RUNNER.value, _OPTIONS.value) if _RUNNER.value else workers.processes(_WORKERS.value)
        with runner as run, bars() as (update, seconds):
            index = pipeline.run(planned, run, update)
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on where it stopped")
    except (ValueError, RuntimeError, OSError) as error:
        if not type(error).__module__.startswith("lm."):
            raise
        sys.exit(f"error: {error}")
    show(index, seconds)
    print(f"written to {_OUT.value}" if seconds else f"{_OUT.value} was prepared already")


@contextlib.contextmanager
def bars() -> Iterator[tuple[Callable[[str, int, int, float], None], dict[str, float]]]:
    """(what `lm.corpus.pipeline.run` calls with its progress, seconds that the units of each stage took so far)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:>9}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    tasks: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    with Progress(*columns, console=Console(stderr=True)) as shown:

        def update(stage: str, done: int, total: int, spent: float) -> None:
            if stage not in tasks:
                tasks[stage] = shown.add_task(stage, total=total)
            shown.update(tasks[stage], completed=done)
            seconds[stage] = seconds.get(stage, 0.0) + spent

        yield update, seconds


def show(index: dict[str, Any], seconds: dict[str, float]) -> None:
    """What was kept and what went, as a table; and the pace of each stage."""
    from rich.console import Console
    from rich.table import Table

    found = index["statistics"]
    table = Table("", "records", "MB", title="what went, and what is kept")
    for kind, count in found["faults"].items():
        table.add_row(f"bad record: {kind}", f"{count:,}", "")
    table.add_row("documents", f"{found['documents']:,}", f"{found['bytes'] / 1e6:,.1f}")
    for why, (count, size) in found["dropped"].items():
        table.add_row(f"  {why}", f"{count:,}", f"{size / 1e6:,.1f}")
    for part, kept in found["kept"].items():
        tokens = f"{kept['tokens']:,} tokens in {kept['rows']:,} rows"
        table.add_row(f"{part}: {tokens}", f"{kept['documents']:,}", f"{kept['bytes'] / 1e6:,.1f}")
    Console(width=120).print(table)
    for stage, spent in seconds.items():
        if spent:
            print(f"{stage}: {spent:.1f} s of CPU, {found['bytes'] / 1e6 / spent:,.1f} MB/s of the text read")


if __name__ == "__main__":
    app.run(main, flags_parser=lm_flags.parse)
