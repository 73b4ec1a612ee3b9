"""How much of the input pipeline Grain can do: speed of each way to make the same batches, and effect of a hung read.

    python experiments/grain_input/study.py [--megabytes=1000] [--seconds=20] [--hang_seconds=60]

Speed is measured on prepared rows, as `tools/bench.py --input` writes them, from a mixture of three sources, with all
ways timed alternately in the same run. For the hung read, each way runs in a process of its own, in which the fourth
element never comes: does it report an error within the limit, does Ctrl-C then stop it, and does the process exit after
that? Writes results.md.
"""

import argparse
import multiprocessing.connection
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np
from absl import flags

from lm import config, input_pipeline
from lm.benchmark import input as bench
from lm.data import loader, prefetch

HERE = Path(__file__).resolve().parent

THREAD = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
ON_DEMAND = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
ROUNDS = 12

# Ways to iterate over a data set.
ITERATORS: dict[str, Callable[[grain.MapDataset], Iterator[Any]]] = {
    "ours, a thread (lm/data/prefetch.py)": lambda dataset: prefetch.PrefetchIterator(dataset, 1),
    "Grain, a thread (`to_iter_dataset`)": lambda dataset: iter(dataset.to_iter_dataset(THREAD)),
    "Grain, a thread (`ThreadPrefetchIterDataset`)": lambda dataset: iter(
        grain.experimental.ThreadPrefetchIterDataset(dataset.to_iter_dataset(ON_DEMAND), prefetch_buffer_size=2)
    ),
    "Grain, a process (`mp_prefetch`)": lambda dataset: iter(
        dataset.to_iter_dataset(ON_DEMAND).mp_prefetch(grain.MultiprocessingOptions(num_workers=1))
    ),
}


class Rows:
    """A Grain source of single rows."""

    def __init__(self, part: loader.Part):
        self.part = part

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        return {name: x[0] for name, x in self.part.take(np.array([row])).items()}


class Held:
    """A Grain source that costs nothing to read: always the same decoded row."""

    def __init__(self, part: loader.Part):
        self.size, self.row = len(part), Rows(part)[0]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        return self.row


def by_example(data: loader.Data, rows: Callable[[loader.Part], Any]) -> Iterator[Any]:
    """Batches with shuffling, mixing and batching by Grain; an element of the sources is one example."""
    parts = [source.train for source in data.sources.values()]
    shuffled = [grain.MapDataset.source(rows(part)).seed(0).shuffle().repeat() for part in parts]
    mixed = grain.MapDataset.mix(shuffled, list(bench.WEIGHTS.values()))
    return iter(mixed.batch(bench.BATCH).to_iter_dataset(THREAD))


def speeds(folder: Path, megabytes: int, seconds: float) -> dict[str, tuple[float, float]]:
    """Way -> million tokens per second of wall time and of this process's CPU time, medians over the rounds."""
    for number, (name, share) in enumerate(bench.WEIGHTS.items()):
        rows = max(bench.BATCH, round(megabytes * share * 1e6 / (2 * bench.LENGTH)))
        bench.write(folder / name, rows, number)
    mixture = tuple((0.0, str(folder / name), weight) for name, weight in bench.WEIGHTS.items())
    cfg = config.Config(data=config.DataConfig(format="prepared", mixture=mixture, seq_len=bench.LENGTH))
    data = input_pipeline.build(cfg, None, *input_pipeline.load(cfg.data))
    dataset = loader.train_dataset(
        data, batch_size=bench.BATCH, start_example=0, local_rows=np.arange(bench.BATCH), seed=0
    )
    ways = {name: iterate(dataset) for name, iterate in ITERATORS.items()}
    firsts = [next(batches) for batches in ways.values()]
    assert all(np.array_equal(first[name], x) for first in firsts for name, x in firsts[0].items())
    ways["Grain, an element an example: `shuffle`, `mix`, `batch`"] = by_example(data, Rows)
    ways["the same, of rows that cost nothing to read"] = by_example(data, Held)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for turn in range(ROUNDS):
        order = list(ways.items())
        for name, batches in order[turn % len(order) :] + order[: turn % len(order)]:
            for _ in range(4):  # discards batches prefetched during the other ways' turns
                next(batches)
            found[name].append(bench.rate(batches, seconds / ROUNDS))
    for batches in ways.values():
        batches.close()
    return {
        name: tuple(statistics.median(values) / 1e6 for values in zip(*rates, strict=True))
        for name, rates in found.items()
    }


class Hangs:
    """A Grain source whose element 3 never comes."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, k: int) -> int:
        if k == 3:
            threading.Event().wait()  # like a read from a mount that is gone, it uses no CPU time
        return k


def hang(name: str) -> None:
    """Body of the watched process: reads four elements, and prints the error that the fourth one raises."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started this with Ctrl-C ignored
    elements = ITERATORS[name](grain.MapDataset.source(Hangs()))
    print(*(next(elements) for _ in range(3)), flush=True)
    try:
        next(elements)
    except BaseException as error:
        print(type(error).__name__, flush=True)
        raise SystemExit(1) from None


def hung_read(name: str, limit: float) -> tuple[str, str, str]:
    """(error within the limit, effect of Ctrl-C if there was none, whether the process then exited in 10 seconds)."""
    command = [sys.executable, __file__, f"--hang={name}"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    assert process.stdout and process.stdout.readline() == "0 1 2\n"
    raised, stopped = _line(process, limit), "not needed"
    if not raised:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: its workers get it too
        stopped = _line(process, 10) or "nothing"
    try:
        process.wait(10)
        exited = "yes"
    except subprocess.TimeoutExpired:
        exited = "no"
        os.killpg(process.pid, signal.SIGKILL)
    return raised or f"none in {limit:.0f} s", stopped, exited


def _line(process: Any, limit: float) -> str:
    """The next line that the process prints within the limit; '' = none."""
    is_there = multiprocessing.connection.wait([process.stdout], limit)
    return process.stdout.readline().strip() if is_there else ""


def main() -> None:
    """Prints both tables and writes them to results.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each way")
    parser.add_argument("--hang_seconds", type=float, default=60.0)
    parser.add_argument("--hang", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    flags.FLAGS.mark_as_parsed()  # Grain's worker processes read absl flags
    if args.hang:
        hang(args.hang)
        return
    lines = ["# Results", "", f"Written by `{' '.join(['python', *sys.argv])}`: {os.cpu_count()} cores, Grain"]
    lines[-1] += f" {grain.__version__}."
    lines += ["", "| way to make batches | M tokens/s | M tokens/s of CPU time |", "|---|---:|---:|"]
    with tempfile.TemporaryDirectory() as folder:
        for name, (wall, cpu) in speeds(Path(folder), args.megabytes, args.seconds).items():
            lines.append(f"| {name} | {wall:.1f} | {'of another process' if 'process' in name else f'{cpu:.1f}'} |")
    lines += ["", "| way | a read hangs: error | Ctrl-C | the process exits |", "|---|---|---|---|"]
    lines += [f"| {name} | {' | '.join(hung_read(name, args.hang_seconds))} |" for name in ITERATORS]
    text = "\n".join(lines) + "\n"
    (HERE / "results.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
