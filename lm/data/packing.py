"""Packs examples into rows of one length: padded, best-fit, or concatenated and split."""

import bisect
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from lm.config import DataConfig
from lm.data.example import Columns, Example, Row, Rows

# Best-fit packing takes this many examples (or positions) at a time, longest first.
_WINDOW_EXAMPLES, _WINDOW_POSITIONS = 1024, 2**22
_CHUNK = 1024  # rows converted to small dtypes at a time, so that not all are held in wide ones


def pack(examples: Iterable[Example], columns: Columns, cfg: DataConfig) -> tuple[Rows, list[Any]]:
    """Packs examples into rows by `cfg.packing`; every position of every example is in exactly one row.

    Worked, seq_len 4, best_fit, examples of tokens [a b c], [d], [e f]:

        tokens       a b c d    e f 0 0
        segment_ids  1 1 1 2    1 1 0 0
        positions    0 1 2 0    0 1 0 0

    and with mask_documents=False the first row has segment_ids 1 1 1 1 and positions 0 1 2 3. Padding is 0 everywhere.

    Args:
      examples: each has all columns except segment_ids and positions, which are made here.
      columns: batch key -> (shape of a row, dtype).
      cfg: gives packing, seq_len and mask_documents.

    Returns:
      The rows, and the `Example.meta` of each; None for packed rows, which may hold several examples.

    Raises:
      ValueError: an example is longer than a row, and packing is not `concat`.
    """
    chunks: list[Rows] = []
    metas: list[Any] = []
    for chunk, of_rows in _chunks(examples, columns, cfg):
        if not cfg.mask_documents and cfg.packing != "pad":
            is_used_RxL = chunk["segment_ids"] > 0
            chunk["segment_ids"] = is_used_RxL.astype(np.int32)
            chunk["positions"] = np.arange(is_used_RxL.shape[1], dtype=np.int32) * is_used_RxL
        chunks.append({key: _compact(chunk[key]) for key in columns})
        metas += of_rows
    if not chunks:
        return {key: np.zeros((0, *shape), dtype) for key, (shape, dtype) in columns.items()}, []
    # Popped from the chunks, so that only one key at a time is held twice.
    return {key: np.concatenate([chunk.pop(key) for chunk in chunks]) for key in columns}, metas


def _chunks(examples: Iterable[Example], columns: Columns, cfg: DataConfig) -> Iterator[tuple[Rows, list[Any]]]:
    examples = iter(examples)
    if cfg.packing == "best_fit":
        size = max(1, min(_WINDOW_EXAMPLES, _WINDOW_POSITIONS // cfg.seq_len))
        while window := list(itertools.islice(examples, size)):
            packed = _best_fit([example.columns for example in window], columns)
            yield packed, [None] * len(packed["segment_ids"])
        return
    if cfg.packing == "concat":
        examples = _concatenated(examples, columns)
    while some := list(itertools.islice(examples, _CHUNK)):
        rows = [_padded(example.columns, columns) for example in some]
        yield {key: np.stack([row[key] for row in rows]) for key in columns}, [example.meta for example in some]


def _best_fit(examples: list[Row], columns: Columns) -> Rows:
    """Best-fit decreasing: longest example first, each into the fullest row that has room; ties go to the first row."""
    length = columns["tokens"][0][0]
    examples = sorted(examples, key=lambda example: -len(example["tokens"]))
    places: list[tuple[int, int, int]] = []  # of each example: row, start, segment
    segments: list[int] = []  # of each row
    free: list[tuple[int, int]] = []  # (positions, row), in order
    for example in examples:
        size = len(example["tokens"])
        if size > length:
            raise ValueError(f"an example of {size} positions does not fit in a row of {length}")
        if (best := bisect.bisect_left(free, (size, 0))) < len(free):
            left, row = free.pop(best)
        else:
            left, row = length, len(segments)
            segments.append(0)
        segments[row] += 1
        places.append((row, length - left, segments[row]))
        if left > size:
            bisect.insort(free, (left - size, row))
    packed = {name: np.zeros((len(segments), *shape), dtype) for name, (shape, dtype) in columns.items()}
    position_L = np.arange(length, dtype=np.int32)
    for example, (row, start, segment) in zip(examples, places, strict=True):
        size = len(example["tokens"])
        for name, array in example.items():
            packed[name][row, start : start + size] = array
        packed["segment_ids"][row, start : start + size] = segment
        packed["positions"][row, start : start + size] = position_L[:size]
    return packed


def _concatenated(examples: Iterable[Example], columns: Columns) -> Iterator[Example]:
    """Concatenates the examples and splits them into full rows, with Grain."""
    from grain import experimental

    names = [name for name in columns if name not in ("segment_ids", "positions")]
    lengths = {name: columns[name][0][0] for name in names}
    for row in experimental.ConcatThenSplitIterDataset(_stream(examples), length_struct=lengths):
        about = {"segment_ids": row["tokens_segment_ids"], "positions": row["tokens_positions"]}
        yield Example({name: row[name] for name in names} | about)


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


def _compact(array: np.ndarray) -> np.ndarray:
    """The same values in the smallest unsigned dtype; unchanged unless all are non-negative integers."""
    if array.dtype.itemsize == 1:
        return array
    small = array.astype(np.min_scalar_type(int(max(0, array.max()))))
    return small if np.array_equal(small, array) else array


def _stream(examples: Iterable[Example]) -> Any:
    """Examples as a Grain data set that is read once. It has no state, since all packed rows are held in memory."""
    import grain

    class Stream(grain.IterDataset[Any]):
        def __iter__(self) -> grain.DatasetIterator[Any]:
            return StreamIterator(iter(examples))

    class StreamIterator(grain.DatasetIterator[Any]):
        def __init__(self, examples: Iterator[Example]):
            super().__init__()
            self._examples = examples

        def __next__(self) -> dict[str, np.ndarray]:
            return next(self._examples).columns

        def get_state(self) -> dict[str, Any]:
            return {}

        def set_state(self, state: dict[str, Any]) -> None:
            raise NotImplementedError

    return Stream()
