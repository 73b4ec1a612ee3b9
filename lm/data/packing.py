"""Examples to rows of one length: padded, best fit, or concatenated and split."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import grain
import numpy as np
from grain import experimental

from lm.config import DataConfig
from lm.data.examples import Columns, Example, Row, Rows

# Best fit packs this many examples (or positions) at a time, longest first: Grain closes all open rows when one example
# fits nowhere, so each window gets as many rows as examples and none is closed early.
_WINDOW_EXAMPLES, _WINDOW_POSITIONS = 1024, 2**22
_CHUNK = 1024  # rows made compact at a time, so that wide ones are never all held


def pack(examples: Iterable[Example], columns: Columns, cfg: DataConfig) -> tuple[Rows, list[Any]]:
    """Puts every position of every example in exactly one row, by `cfg.packing`.

    Worked, seq_len 4, best_fit, examples of tokens [a b c], [d], [e f]:

        tokens       a b c d    e f 0 0
        segment_ids  1 1 1 2    1 1 0 0
        positions    0 1 2 0    0 1 0 0

    and with mask_documents=False the first row has segment_ids 1 1 1 1 and positions 0 1 2 3. Padding is 0 everywhere.

    Args:
      examples: each has the columns but segment_ids and positions, which are made here.
      columns: batch key -> (shape of a row, dtype).
      cfg: how.

    Returns:
      The rows, and each row's `Example.meta`; packed rows, which may hold several examples, have none.

    Raises:
      ValueError: an example is longer than its row, and packing is not `concat`.
    """
    chunks: list[Rows] = []
    rows: list[Row] = []
    metas: list[Any] = []
    for row, meta in _rows(examples, columns, cfg):
        if not cfg.mask_documents and cfg.packing != "pad":
            row["segment_ids"] = np.minimum(row["segment_ids"], 1)
            row["positions"] = np.arange(len(row["segment_ids"])) * row["segment_ids"]
        rows.append(row)
        metas.append(meta)
        if len(rows) == _CHUNK:
            chunks.append(_stack(rows, columns))
            rows = []
    if rows:
        chunks.append(_stack(rows, columns))
    if not chunks:
        return {key: np.zeros((0, *shape), dtype) for key, (shape, dtype) in columns.items()}, []
    return {key: np.concatenate([chunk[key] for chunk in chunks]) for key in columns}, metas


def _rows(examples: Iterable[Example], columns: Columns, cfg: DataConfig) -> Iterator[tuple[Row, Any]]:
    if cfg.packing == "pad":
        yield from ((_padded(example.columns, columns), example.meta) for example in examples)
        return
    names = [name for name in columns if name not in ("segment_ids", "positions")]
    for packed in _packers(examples, {name: columns[name][0][0] for name in names}, cfg):
        for row in packed:
            yield (
                {name: row[name] for name in names}
                | {"segment_ids": row["tokens_segment_ids"], "positions": row["tokens_positions"]},
                None,
            )


def _packers(examples: Iterable[Example], lengths: dict[str, int], cfg: DataConfig) -> Iterator[grain.IterDataset[Any]]:
    if cfg.packing == "concat":
        yield experimental.ConcatThenSplitIterDataset(_Stream(examples), length_struct=lengths)
        return
    examples = iter(examples)
    size = max(1, min(_WINDOW_EXAMPLES, _WINDOW_POSITIONS // cfg.seq_len))
    while window := list(itertools.islice(examples, size)):
        window.sort(key=lambda example: -len(example.columns["tokens"]))
        yield experimental.BestFitPackIterDataset(
            _Stream(window), length_struct=lengths, num_packing_bins=len(window), shuffle_bins=False
        )


def _padded(given: Row, columns: Columns) -> Row:
    if "segment_ids" in columns and "segment_ids" not in given:
        length = given["tokens"].shape[-1]
        given = given | {"segment_ids": np.ones(length, np.int32), "positions": np.arange(length, dtype=np.int32)}
    row = {}
    for name, (shape, _) in columns.items():
        missing = [full - found for full, found in zip(shape, given[name].shape, strict=True)]
        if min(missing, default=0) < 0:
            raise ValueError(f"an example's '{name}' of shape {given[name].shape} does not fit in a row of {shape}")
        row[name] = np.pad(given[name], [(0, n) for n in missing]) if any(missing) else given[name]
    return row


def _stack(rows: list[Row], columns: Columns) -> Rows:
    return {key: _compact(np.stack([row[key] for row in rows])) for key in columns}


def _compact(array: np.ndarray) -> np.ndarray:
    """The same values in the smallest unsigned dtype, or as they are if they are not whole numbers from 0 on."""
    if array.dtype.itemsize == 1:
        return array
    small = array.astype(np.min_scalar_type(int(max(0, array.max()))))
    return small if np.array_equal(small, array) else array


class _Stream(grain.IterDataset[Any]):
    """Examples as a Grain dataset, read once; it needs no state, since the packed rows are held whole."""

    def __init__(self, examples: Iterable[Example]):
        super().__init__()
        self._examples = examples

    def __iter__(self) -> grain.DatasetIterator[Any]:
        return _StreamIterator(iter(self._examples))


class _StreamIterator(grain.DatasetIterator[Any]):
    def __init__(self, examples: Iterator[Example]):
        super().__init__()
        self._examples = examples

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._examples).columns

    def get_state(self) -> dict[str, Any]:
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        raise NotImplementedError
