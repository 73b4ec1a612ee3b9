"""From records to batches. The training stream is a pure function: global example index -> row."""

import dataclasses
import hashlib
import json
import math
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from lm.config import Config
from lm.data import examples, packing, sources
from lm.data.packing import Rows
from lm.data.records import DataError, Record
from lm.data.tokenizer import Tokenizer

HostBatch = dict[str, np.ndarray]  # lm.types.Batch, in numpy: the rows that one host needs

_SHAPES_ROWS = ("task", "seq_len", "packing", "mask_documents", "overlong")  # keys of DataConfig
_QUIET_SECONDS = 5.0  # a progress bar appears when making the rows takes longer


class Data(NamedTuple):
    """All rows of a run, packed and in memory.

    Attributes:
      train: training rows.
      valid: held-out rows.
      fingerprint: sha256 over all that decides which row is which example of the stream: records, tokenizer, settings,
        seed and the training tokens as packed.
      report: 'train' and 'valid' -> counts: documents, examples, what was cut or dropped (see `examples.make`),
        rows, tokens (positions filled), targets (positions trained on), bytes (UTF-8, of the targets), fill.
    """

    train: Rows
    valid: Rows
    fingerprint: str
    report: dict[str, dict[str, float]]


def build(cfg: Config, tokenizer: Tokenizer, split: sources.Split) -> Data:
    """Makes and packs the examples of both halves of `split`.

    Raises:
      DataError: a half has nothing to train on or to evaluate; the message gives the counts.
    """
    train, train_report = _rows(split.train, "train", cfg, tokenizer)
    valid, valid_report = _rows(split.valid, "valid", cfg, tokenizer)
    settings = {name: getattr(cfg.data, name) for name in _SHAPES_ROWS} | {"seed": cfg.seed}
    parts = [split.fingerprint, tokenizer.hash, settings, zlib.crc32(train["tokens"].tobytes())]
    fingerprint = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return Data(train, valid, fingerprint, {"train": train_report, "valid": valid_report})


def train_row_ids(num_rows: int, seed: int, start: int, count: int) -> np.ndarray:
    """Rows of the global examples start ... start + count - 1, int64 [count]; epoch e, of `num_rows` examples, is a
    permutation of the rows that (seed, e) decides."""
    order = _order(num_rows, seed)
    return np.array([order[g] for g in range(start, start + count)], np.int64)


def train_batches(
    data: Data, *, batch_size: int, start_example: int, local_rows: np.ndarray, seed: int
) -> Iterator[HostBatch]:
    """Batches without end, made ahead by a background thread; stop it early with the iterator's `close()`.

    Batch k is the global examples start_example + k * batch_size + (0 ... batch_size - 1), of which a host gets those
    at `local_rows`: all hosts' rows together are the same batch however many hosts there are.

    Args:
      data: from `build`.
      batch_size: rows of a batch over all hosts.
      start_example: the state of the stream: examples consumed so far.
      local_rows: int [b], offsets in the batch of the rows that this host needs, in the order it needs them.
      seed: of the shuffle.

    Yields:
      The keys of `lm.types.Batch`: int32 and float32 [b, seq_len], example_index int32 [b] (modulo 2^31).
    """
    order = _order(len(data.train["tokens"]), seed)
    source = _Batches(data.train, order, batch_size, start_example, np.asarray(local_rows, np.int64))
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(grain.MapDataset.source(source).to_iter_dataset(options))


def eval_batches(rows: Rows, *, batch_size: int, local_rows: np.ndarray, max_tokens: int) -> Iterator[HostBatch]:
    """Each row once, in batches of one shape: the last one is filled up with rows of zeros, which have no weight.

    Args:
      rows: held-out rows.
      batch_size: rows of a batch over all hosts.
      local_rows: int [b], as in `train_batches`.
      max_tokens: at most this many positions, rounded up to whole rows, evenly spaced over all of them; 0 = all rows.

    Yields:
      As `train_batches`; example_index counts on over the rows of zeros.
    """
    num_rows, seq_len = rows["tokens"].shape
    count = min(num_rows, math.ceil(max_tokens / seq_len)) if max_tokens else num_rows
    for start in range(0, count, batch_size):
        index = start + np.asarray(local_rows, np.int64)
        is_row = index < count
        batch = _gather(rows, np.where(is_row, index, 0) * num_rows // count, index)
        yield {key: np.where(is_row[:, None], x, 0).astype(x.dtype) if x.ndim == 2 else x for key, x in batch.items()}


@dataclasses.dataclass(frozen=True)
class _Batches:
    """Random access to the batches of the training stream: what Grain calls a data source."""

    rows: Rows
    order: "grain.MapDataset[int]"
    batch_size: int
    start: int
    local_rows: np.ndarray

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, k: int) -> HostBatch:
        index = self.start + int(k) * self.batch_size + self.local_rows
        return _gather(self.rows, [self.order[int(g)] for g in index], index)


def _order(num_rows: int, seed: int) -> "grain.MapDataset[int]":
    # Grain shuffles epoch e by (seed + e): hashed first, so that the epochs of neighbouring seeds differ.
    hashed = int(np.random.SeedSequence(seed % 2**64).generate_state(1)[0])
    return grain.MapDataset.range(num_rows).shuffle(hashed).repeat(None)


def _gather(rows: Rows, row_ids: Sequence[int] | np.ndarray, index: np.ndarray) -> HostBatch:
    batch = {key: rows[key][row_ids].astype(dtype) for key, dtype in packing.DTYPES.items()}
    return batch | {"example_index": (index % 2**31).astype(np.int32)}


def _rows(records: Sequence[Record], name: str, cfg: Config, tokenizer: Tokenizer) -> tuple[Rows, dict[str, float]]:
    counts: Counter[str] = Counter()
    made = examples.make(_progress(records, f"packing {name} rows"), tokenizer, cfg.data, counts)
    rows = packing.pack(made, cfg.data)
    is_target = rows["loss_weights"] > 0
    filled = int(np.count_nonzero(rows["segment_ids"]))
    report: dict[str, float] = dict(counts) | {
        "rows": len(rows["tokens"]),
        "tokens": filled,
        "targets": int(np.count_nonzero(is_target)),
        "bytes": int(tokenizer.token_bytes()[rows["targets"][is_target]].sum()),
        "fill": filled / max(1, rows["tokens"].size),
    }
    if not report["targets"]:
        found = ", ".join(f"{key} {value:,}" for key, value in counts.items()) or "no documents"
        keys = "data.path" if name == "train" else "data.eval_path, data.eval_fraction"
        raise DataError(
            f"the {name} data has no target: nothing in it counts for the loss ({found}); "
            f"check {keys}, data.task, data.overlong and data.seq_len ({cfg.data.seq_len})"
        )
    return rows, report


def _progress(records: Sequence[Record], what: str) -> Iterator[Record]:
    """The records, with a progress bar once they have taken `_QUIET_SECONDS`."""
    start, bar = time.monotonic(), None
    try:
        for done, record in enumerate(records):
            yield record
            if bar is None and time.monotonic() - start > _QUIET_SECONDS:
                bar = _start_bar(what, len(records))
            if bar is not None:
                bar.update(bar.task_ids[0], completed=done + 1)
    finally:
        if bar is not None:
            bar.stop()


def _start_bar(what: str, total: int) -> Any:
    from rich import progress
    from rich.console import Console

    bar = progress.Progress(*progress.Progress.get_default_columns(), console=Console(stderr=True))
    bar.add_task(what, total=total)
    bar.start()
    return bar
