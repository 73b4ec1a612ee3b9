"""Throughput of the input pipeline (`tools/bench.py --input`): from prepared shards, and from tokenizing and packing.

The prepared rows have 1,024 positions of synthetic ids, in documents of random lengths, and come from a mixture of
three sources. The upper bounds (copying the same rows) are measured in alternating rounds of the same run.
"""

import itertools
import os
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lm import config, input_pipeline
from lm.data import loader, packing, shards, tokenizer
from lm.data.example import Rows
from lm.data.readers import registry
from lm.tasks.registry import TASKS
from lm.terminal import say

LENGTH, BATCH = 1024, 128
WEIGHTS = {"web": 0.6, "books": 0.3, "code": 0.1}  # also the share of the bytes of each source
_SHARD_ROWS = 32_768  # 64 MB
_LATE_EXAMPLE = 10**9


def measure(folder: Path, megabytes: list[int], seconds: float) -> dict[str, Any]:
    """Measures everything.

    Args:
      folder: an empty folder for the synthetic rows; the caller deletes it.
      megabytes: sizes of the prepared data.
      seconds: approximate length of each measurement at each size.
    """
    sizes = {str(size): prepared(folder / str(size), size, seconds) for size in megabytes}
    largest = sizes[str(max(megabytes))]
    wall, per_cpu = on_the_fly(seconds)
    return {
        **{name: largest[name] for name in ("prepared_tokens_per_second", "prepared_tokens_per_cpu_second")},
        **{name: largest[name] for name in ("ratio_to_copy", "ratio_to_copy_of_tokens", "restore_seconds")},
        "on_the_fly_tokens_per_second": wall,
        "on_the_fly_tokens_per_cpu_second": per_cpu,
        "cores": os.cpu_count(),
        "megabytes": sizes,
    }


def prepared(folder: Path, megabytes: int, seconds: float) -> dict[str, float]:
    """Measures prepared data of one size: medians of rounds that alternate with the upper bounds."""
    for number, (name, share) in enumerate(WEIGHTS.items()):
        write(folder / name, max(BATCH, round(megabytes * share * 1e6 / (2 * LENGTH))), number)
    mixture = tuple((0.0, str(folder / name), weight) for name, weight in WEIGHTS.items())
    cfg = config.Config(data=config.DataConfig(format="prepared", mixture=mixture, seq_len=LENGTH, batch_size=BATCH))
    data = input_pipeline.build(cfg, None, *input_pipeline.load(cfg.data))
    began = time.perf_counter()
    next(batches := batches_of(data, _LATE_EXAMPLE))
    restore = time.perf_counter() - began
    batches.close()
    folders = [folder / name for name in WEIGHTS]
    # A batch has five arrays of one size; the shards store little more than the tokens.
    sources = {"own": batches_of(data, 0), "batch": copied(folders, 5), "tokens": copied(folders, 1)}
    for batches in sources.values():
        next(batches)
    before, rounds = anonymous_megabytes(), list[dict[str, tuple[float, float]]]()
    for _ in range(10):
        rounds.append({name: rate(batches, seconds / 10) for name, batches in sources.items()})
    figures = {
        "prepared_tokens_per_second": statistics.median(each["own"][0] for each in rounds),
        "prepared_tokens_per_cpu_second": statistics.median(each["own"][1] for each in rounds),
        # CPU time, which other processes of the machine affect less.
        "ratio_to_copy": statistics.median(each["own"][1] / each["batch"][1] for each in rounds),
        "ratio_to_copy_of_tokens": statistics.median(each["own"][1] / each["tokens"][1] for each in rounds),
        "restore_seconds": restore,
        "rows": sum(len(source.train) for source in data.sources.values()),
        "memory_growth_megabytes": max(0, anonymous_megabytes() - before),
    }
    sources["own"].close()
    return figures


def batches_of(data: loader.Data, start: int) -> Any:
    """The batches of a run, from example `start` on."""
    local = np.arange(BATCH)
    return loader.train_batches(data, batch_size=BATCH, start_example=start, local_rows=local, seed=0)


def copied(folders: list[Path], columns: int) -> Iterator[dict[str, np.ndarray]]:
    """An upper bound: batches of `columns` arrays, copied row by row out of the memory maps, without computation."""
    maps = [np.load(path, mmap_mode="r") for folder in folders for path in sorted(folder.glob("train*.npy"))]
    rng = np.random.default_rng(0)
    chosen = [(maps[i], int(rng.integers(len(maps[i])))) for i in rng.integers(len(maps), size=64 * BATCH)]
    for start in itertools.cycle(range(0, len(chosen), BATCH)):
        batch = [np.empty((BATCH, LENGTH), np.int32) for _ in range(columns)]
        for i, (rows, row) in enumerate(chosen[start : start + BATCH]):
            for column in batch:
                column[i] = rows[row, :LENGTH]
        yield {"tokens": batch[0]}


def rate(batches: Iterator[dict[str, np.ndarray]], seconds: float) -> tuple[float, float]:
    """(tokens per second, tokens per CPU second of all threads), over about `seconds` seconds."""
    began, cpu, tokens = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - began < seconds:
        for _ in range(8):
            tokens += next(batches)["tokens"].size
    return tokens / (time.perf_counter() - began), tokens / (time.process_time() - cpu)


def write(folder: Path, num_rows: int, seed: int) -> None:
    """Writes a prepared folder in which all shards have the same synthetic rows.

    The index has the sha256 of the first shard for all of them; a run does not check it.
    """
    folder.mkdir(parents=True)
    first = min(num_rows, _SHARD_ROWS)
    entry = shards.write(folder, "train-00000", synthetic(first, seed), {})
    cells, entries = np.load(folder / "train-00000.npy"), [entry]
    for number in range(1, num_rows // first):
        name = f"train-{number:05}"
        np.save(folder / f"{name}.npy", shards.stamp(cells, LENGTH, name))
        entries.append(entry | {"name": name})
    valid = [shards.write(folder, "valid-00000", synthetic(2, seed), {})]
    description = {"layout": {"length": LENGTH, "shifted": True}, "settings": {"packing": "best_fit"}}
    shards.write_index(folder, {"parts": {"train": entries, "valid": valid}, **description})


def synthetic(num_rows: int, seed: int) -> Rows:
    """Full rows of random ids, in documents of about 350 tokens."""
    rng = np.random.default_rng(seed)
    tokens_RxL = rng.integers(3, 32_000, (num_rows, LENGTH), dtype=np.int32)
    is_start_RxL = rng.random((num_rows, LENGTH)) < 1 / 350
    is_start_RxL[:, 0] = True
    segments_RxL = np.cumsum(is_start_RxL, axis=1, dtype=np.int32)
    place_L = np.arange(LENGTH, dtype=np.int32)
    starts_RxL = np.maximum.accumulate(np.where(is_start_RxL, place_L, 0), axis=1)
    ends_RxL = np.pad(is_start_RxL[:, 1:], ((0, 0), (0, 1)), constant_values=True)
    return {
        "tokens": tokens_RxL,
        "targets": np.where(ends_RxL, 2, np.roll(tokens_RxL, -1, axis=1)),
        "loss_weights": np.ones((num_rows, LENGTH), np.float32),
        "segment_ids": segments_RxL,
        "positions": place_L - starts_RxL,
    }


def on_the_fly(seconds: float) -> tuple[float, float]:
    """(tokens per second, tokens per CPU second) of tokenizing and packing the built-in text on all cores."""
    cfg = config.Config(data=config.DataConfig(seq_len=LENGTH))
    split = registry.load(cfg.data)
    vocabulary = tokenizer.train([record["text"] for record in split.train], 8192, 2_000_000)
    task, tokens, began, cpu = TASKS["causal_lm"], 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - began < seconds:
        examples = input_pipeline.make_examples(task, split.train, vocabulary, cfg, Counter(), os.cpu_count() or 1)
        rows, _ = packing.pack(examples, task.columns(cfg), cfg.data)
        tokens += int(np.count_nonzero(rows["segment_ids"]))
    return tokens / (time.perf_counter() - began), tokens / (time.process_time() - cpu)


def anonymous_megabytes() -> float:
    """Anonymous memory of this process, without memory-mapped files (Linux; elsewhere 0)."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1e3


def show(figures: dict[str, Any]) -> None:
    """Prints the figures as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "prepared",
        "tokens/s",
        "tokens/CPU s",
        "share of copying",
        "share of copying tokens",
        "start at example 10^9",
        "memory growth",
    )
    for size, row in figures["megabytes"].items():
        table.add_row(
            f"{int(size):,} MB",
            f"{row['prepared_tokens_per_second'] / 1e6:,.0f} M",
            f"{row['prepared_tokens_per_cpu_second'] / 1e6:,.0f} M",
            f"{row['ratio_to_copy']:.2f}",
            f"{row['ratio_to_copy_of_tokens']:.2f}",
            f"{row['restore_seconds']:.3f} s",
            f"{row['memory_growth_megabytes']:,.1f} MB",
        )
    Console().print(table)
    wall, per_cpu = (figures[f"on_the_fly_tokens_per_{unit}second"] / 1e6 for unit in ("", "cpu_"))
    say(f"on the fly, {figures['cores']} cores: {wall:.2f} M tokens/s, {per_cpu:.2f} M tokens/CPU s")
