"""Prepares the text of a recipe for training: filters, deduplicates, decontaminates, tokenizes and packs it.

    python tools/prepare_data.py --config=configs/NAME.py --out=FOLDER [--config.data.path=FILES] [--workers=2] \
        [--evaluation=FILE,...] [--ngram=13] [--near=0.75] [--filters=NAME,...] [--shard_megabytes=16] \
        [--runner=DirectRunner [--runner_option=--project=X ...]]

A run reads the result with --config.data.format=prepared --config.data.path=FOLDER. If the command is killed, the same
command resumes it and writes the same bytes. See docs/data.md.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from absl import flags

from lm import command_line
from lm.corpus import filters, pipeline, workers
from lm.terminal import say, stop

_CONFIG = command_line.define_recipe()
_OUT = flags.DEFINE_string("out", "", "Folder to write to. The same command resumes a job that was stopped.")
_WORKERS = flags.DEFINE_integer("workers", os.cpu_count() or 1, "Worker processes on this machine.", lower_bound=1)
_RUNNER = flags.DEFINE_string(
    "runner", "", "Run on Apache Beam, with this runner, such as DirectRunner; needs the extra 'beam'."
)
_OPTIONS = flags.DEFINE_multi_string("runner_option", [], "Flag for the Beam runner, such as --project=NAME.")
_EVALUATION = flags.DEFINE_list(
    "evaluation", [], "Evaluation files, folders or globs; drop documents that contain their text."
)
_NGRAM = flags.DEFINE_integer(
    "ngram", 13, "Length in words of the n-grams that a document may not share with them.", lower_bound=1
)
_NEAR = flags.DEFINE_float(
    "near",
    0.75,
    "Jaccard similarity from which a document is a near duplicate; 0 = keep all.",
    lower_bound=0,
    upper_bound=1,
)
_FILTERS = flags.DEFINE_list("filters", list(filters.DEFAULT), f"Of {', '.join(filters.FILTERS)}; '' = none.")
_SHARD = flags.DEFINE_float("shard_megabytes", 16.0, "Megabytes of text in a shard.", lower_bound=0.001)


def main(argv: list[str]) -> None:
    """Prepares the data, with a progress bar for each stage, and prints what was kept."""
    if len(argv) > 1 or _CONFIG.value is None or not _OUT.value:
        stop("error: --config=configs/NAME.py and --out=FOLDER are needed, as --flag=value; --help explains them")
    try:
        with command_line.one_line_errors():
            index, seconds = prepare()
    except KeyboardInterrupt:
        stop("stopped; the same command resumes it")
    show(index, seconds)
    say(f"written to {_OUT.value}" if seconds else f"{_OUT.value} was prepared already")


def prepare() -> tuple[dict[str, Any], dict[str, float]]:
    """(index of the prepared folder, CPU seconds of each stage); the seconds are empty if it was prepared already."""
    from lm.tasks import build_config

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
        say(planned.note, file=sys.stderr)
    runner = workers.beam(_RUNNER.value, _OPTIONS.value) if _RUNNER.value else workers.processes(_WORKERS.value)
    with runner as run, bars() as (update, seconds):
        return pipeline.run(planned, run, update), seconds


@contextlib.contextmanager
def bars() -> Iterator[tuple[Callable[[str, int, int, float], None], dict[str, float]]]:
    """(progress callback for `lm.corpus.pipeline.run`, CPU seconds of each stage so far)."""
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
    """Prints what was kept and what was dropped, and the throughput of each stage."""
    from rich.console import Console
    from rich.table import Table

    statistics = index["statistics"]
    table = Table("", "records", "MB", title="dropped and kept documents")
    for kind, count in statistics["faults"].items():
        table.add_row(f"bad record: {kind}", f"{count:,}", "")
    table.add_row("documents", f"{statistics['documents']:,}", f"{statistics['bytes'] / 1e6:,.1f}")
    for why, (count, size) in statistics["dropped"].items():
        table.add_row(f"  {why}", f"{count:,}", f"{size / 1e6:,.1f}")
    for part, kept in statistics["kept"].items():
        tokens = f"{kept['tokens']:,} tokens in {kept['rows']:,} rows"
        table.add_row(f"{part}: {tokens}", f"{kept['documents']:,}", f"{kept['bytes'] / 1e6:,.1f}")
    Console(width=120).print(table)
    for stage, spent in seconds.items():
        if spent:
            say(f"{stage}: {spent:.1f} s of CPU, {statistics['bytes'] / 1e6 / spent:,.1f} MB/s of the text read")


if __name__ == "__main__":
    command_line.run(main)
