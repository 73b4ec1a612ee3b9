"""Examples to rows of one length: padded, best fit, or concatenated and split."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import grain
import numpy as np
from grain import experimental

from lm.config import DataConfig
from lm.data.examples import Example

# tokens, targets, loss_weights, segment_ids, positions: [R, seq_len] each, in the smallest dtype that holds the values.
Rows = dict[str, np.ndarray]

DTYPES = {
    "tokens": np.int32,
    "targets": np.int32,
    "loss_weights": np.float32,
    "segment_ids": np.int32,
    "positions": np.int32,
}
_FEATURES = ("tokens", "targets", "loss_weights")
# Best fit packs this many examples (or positions) at a time, longest first: Grain closes all open rows when one example
# fits nowhere, so each window gets as many rows as examples and none is closed early.
_WINDOW_EXAMPLES, _WINDOW_POSITIONS = 1024, 2**22
_CHUNK = 1024  # rows made compact at a time, so that wide ones are never all held


def pack(examples: Iterable[Example], cfg: DataConfig) -> Rows:
    """Puts every (token, target) pair of every example in exactly one row, by `cfg.packing`.

    Worked, seq_len 4, best_fit, examples of tokens [a b c], [d], [e f]:

        tokens       a b c d    e f 0 0
        segment_ids  1 1 1 2    1 1 0 0
        positions    0 1 2 0    0 1 0 0

    and with mask_documents=False the first row has segment_ids 1 1 1 1 and positions 0 1 2 3. Padding is 0 everywhere.

    Raises:
      ValueError: an example is longer than seq_len, and packing is not `concat`.
    """
    chunks: list[Rows] = []
    rows: list[dict[str, np.ndarray]] = []
    for row in _rows(examples, cfg):
        if not cfg.mask_documents:
            row["segment_ids"] = np.minimum(row["segment_ids"], 1)
            row["positions"] = np.arange(cfg.seq_len) * row["segment_ids"]
        rows.append(row)
        if len(rows) == _CHUNK:
            chunks.append(_stack(rows))
            rows = []
    if rows:
        chunks.append(_stack(rows))
    if not chunks:
        return {key: np.zeros((0, cfg.seq_len), dtype) for key, dtype in DTYPES.items()}
    return {key: np.concatenate([chunk[key] for chunk in chunks]) for key in DTYPES}


def _rows(examples: Iterable[Example], cfg: DataConfig) -> Iterator[dict[str, np.ndarray]]:
    if cfg.packing == "pad":
        yield from (_padded(example, cfg.seq_len) for example in examples)
        return
    for packed in _packers(examples, cfg):
        for row in packed:
            yield {name: row[name] for name in _FEATURES} | {
                "segment_ids": row["tokens_segment_ids"],
                "positions": row["tokens_positions"],
            }


def _packers(examples: Iterable[Example], cfg: DataConfig) -> Iterator[grain.IterDataset[Any]]:
    lengths = dict.fromkeys(_FEATURES, cfg.seq_len)
    if cfg.packing == "concat":
        yield experimental.ConcatThenSplitIterDataset(_Stream(examples), length_struct=lengths)
        return
    examples = iter(examples)
    size = max(1, min(_WINDOW_EXAMPLES, _WINDOW_POSITIONS // cfg.seq_len))
    while window := list(itertools.islice(examples, size)):
        window.sort(key=lambda example: -len(example.tokens))
        yield experimental.BestFitPackIterDataset(
            _Stream(window), length_struct=lengths, num_packing_bins=len(window), shuffle_bins=False
        )


def _padded(example: Example, seq_len: int) -> dict[str, np.ndarray]:
    length = len(example.tokens)
    if length > seq_len:
        raise ValueError(f"an example of {length} tokens does not fit in a row of data.seq_len={seq_len}")
    columns = vars(example) | {"segment_ids": np.ones(length, np.int32), "positions": np.arange(length, dtype=np.int32)}
    return {name: np.pad(column, (0, seq_len - length)) for name, column in columns.items()}


def _stack(rows: list[dict[str, np.ndarray]]) -> Rows:
    return {key: _compact(np.stack([row[key] for row in rows])) for key in DTYPES}


def _compact(array: np.ndarray) -> np.ndarray:
    """The same values (not negative) in the smallest unsigned dtype, or as they are if they are not whole numbers."""
    small = array.astype(np.min_scalar_type(int(array.max())))
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
        return vars(next(self._examples))

    def get_state(self) -> dict[str, Any]:
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        raise NotImplementedError
