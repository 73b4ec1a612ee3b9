"""From rows to batches. The training stream is a pure function: global example index -> row of a source."""

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import grain
import numpy as np

from lm.data import sampler
from lm.data.example import Columns, Row, Rows
from lm.data.prefetch import PrefetchIterator

HostBatch = dict[str, np.ndarray]  # lm.types.Batch, in numpy: the rows that one host needs
Finish = Callable[[Row, np.random.Generator], Row]

REPLAY = "replay"  # the source that is another run's data
_EVAL_SEED = 0  # evaluations draw the same whatever the seed of the run
_ENDLESS = sys.maxsize  # the length that Grain gives a data set repeated without end


class Part(NamedTuple):
    """The rows of one half of a source, packed.

    Attributes:
      size: number of rows.
      take: row numbers, int64 [B] -> the stored columns of those rows, in memory or on disk.
      meta: what scoring needs of each row, see `examples.Example`; empty where no task needs any.
      stored: the columns that `take` gives, as they were before they were made compact: key -> (shape of a row, dtype).
      columns: the columns of a batch.
      finish: (row, rng) -> row of a batch: what is drawn anew for each global example; None = nothing is.
    """

    size: int
    take: Callable[[np.ndarray], Rows]
    meta: list[Any]
    stored: Columns
    columns: Columns
    finish: Finish | None = None

    def __len__(self) -> int:
        return self.size

    @property
    def rows(self) -> Rows:
        """All rows at once; for data that fits in memory."""
        return self.take(np.arange(self.size))


def in_memory(rows: Rows) -> tuple[int, Callable[[np.ndarray], Rows]]:
    """`size` and `take` of rows held as arrays [R, ...]."""
    return len(next(iter(rows.values()))), lambda row_ids: {key: x[row_ids] for key, x in rows.items()}


class Source(NamedTuple):
    """Where examples come from: rows to train on, rows that choose a checkpoint, and rows that test the chosen one."""

    train: Part
    valid: Part
    test: Part | None = None


class Data(NamedTuple):
    """All rows of a run.

    Attributes:
      sources: name -> rows; a run without a mixture has one, ''. The last one is `REPLAY` where `data.replay` is set.
      stages: (share of the run from which it holds, weight of each source) of the mixture, the first from 0.
      fingerprint: sha256 over all that decides which row is which example of the stream: records, tokenizer, settings,
        seed and the training rows as packed.
      report: 'train' and 'valid' (of a source with a name: 'NAME_train') -> counts: documents, examples, what was cut
        or dropped (see `examples.make`), rows and, of tokens: tokens (positions filled), targets (positions trained
        on), bytes (UTF-8, of the targets), fill.
      easy_first: this many examples of the one source come from the short rows first; 0 = none.
      about: what the fingerprint is over, for a person who looks for what changed.
    """

    sources: dict[str, Source]
    stages: tuple[tuple[float, tuple[Fraction, ...]], ...]
    fingerprint: str
    report: dict[str, dict[str, float]]
    easy_first: int = 0
    about: Mapping[str, str | int] = {}

    @property
    def train(self) -> Part:
        """Training rows of the first source."""
        return next(iter(self.sources.values())).train

    @property
    def valid(self) -> Part:
        """Held-out rows of the first source."""
        return next(iter(self.sources.values())).valid

    @property
    def epoch_examples(self) -> int:
        """Examples in which each row of each source that the run starts with, but for `REPLAY`, has its turn."""
        weights = dict(zip(self.sources, self.stages[0][1], strict=True))
        total = sum(weights.values())
        own = {name: weight / total for name, weight in weights.items() if weight and name != REPLAY}
        return max(math.ceil(len(self.sources[name].train) / share) for name, share in own.items())

    @property
    def held_out(self) -> dict[str, Part]:
        """What an evaluation measures: prefix of its metrics -> rows."""
        return {f"{name}_" if name else "": source.valid for name, source in self.sources.items()}

    def mixture(self, total_examples: int) -> sampler.Mixture:
        """Of a run of so many examples; 0 = its first stage, without end."""
        stages = self.stages if total_examples else self.stages[:1]
        starts = tuple(round(share * total_examples) for share, _ in stages)
        return sampler.Mixture(starts, tuple(weights for _, weights in stages))


def train_row_ids(num_rows: int, seed: int, start: int, count: int) -> np.ndarray:
    """Rows of the examples start ... start + count - 1 of a run with one source, int64 [count].

    Epoch e is a permutation of the rows, decided by (seed, e).
    """
    return sampler.epochs(num_rows, seed)(np.arange(start, start + count))


def train_dataset(
    data: Data,
    *,
    batch_size: int,
    start_example: int,
    local_rows: np.ndarray,
    seed: int,
    total_examples: int = 0,
    offsets: Sequence[int] = (),
) -> grain.MapDataset[HostBatch]:
    """The training stream as a Grain data set of endless length; element k is batch k from `start_example` on.

    Batch k has the global examples start_example + k * batch_size + (0 ... batch_size - 1), of which a host gets those
    at `local_rows`: the rows of all hosts together are the same batch, however many hosts there are. An element is a
    whole batch because its rows are read and decoded together, 20 times as fast as one by one (docs/log.md).

    Args:
      data: from `lm.input_pipeline.build`.
      batch_size: rows of a batch over all hosts.
      start_example: how many examples the run has consumed. It is the whole state of the stream: a checkpoint holds it,
        and a run continues from it with any batch size and any number of hosts.
      local_rows: int [b], which rows of the batch this host needs, in the order in which it needs them.
      seed: of the shuffle and of random transforms.
      total_examples: examples of the whole run, which decides where the later stages of a mixture begin; 0 = never.
      offsets: for each source, as the function `offsets` returns them; empty = 0 each.

    Elements:
      The columns of the task as [b, ...], row_weights float32 [b] and example_index int32 [b] (modulo 2^31).
    """
    source = _StoredBatches(
        _streams(data, seed),
        data.mixture(total_examples),
        batch_size,
        start_example,
        np.asarray(local_rows, np.int64),
        np.array(offsets or [0] * len(data.sources), np.int64),
    )
    return grain.MapDataset.source(source).map(functools.partial(_transformed, seed=seed)).map(_joined)


def train_batches(
    data: Data,
    *,
    batch_size: int,
    start_example: int,
    local_rows: np.ndarray,
    seed: int,
    total_examples: int = 0,
    offsets: Sequence[int] = (),
    threads: int = 1,
) -> PrefetchIterator:
    """Iterates over `train_dataset`, whose batches threads make ahead. To stop early, call the iterator's `close()`.

    Args:
      threads: how many threads; 0 = a batch is made when it is asked for. The batches are the same for any number.
      (others): as for `train_dataset`.

    Raises (the iterator):
      InputError: a thread hangs; the message names the examples that it was reading.
    """
    dataset = train_dataset(
        data,
        batch_size=batch_size,
        start_example=start_example,
        local_rows=local_rows,
        seed=seed,
        total_examples=total_examples,
        offsets=offsets,
    )

    def describe(k: int) -> str:
        first = start_example + k * batch_size
        return f"the batch of examples {first:,} to {first + batch_size - 1:,}"

    return PrefetchIterator(dataset, threads, describe)


def eval_batches(
    part: Part, *, batch_size: int, local_rows: np.ndarray, max_tokens: int, seq_len: int
) -> Iterator[HostBatch]:
    """Each row once, in batches of one shape: the last one is filled up with rows of zeros, which have no weight.

    What `Part.finish` draws is the same in every evaluation, whatever the seed of the run.

    Args:
      part: held-out rows.
      batch_size: rows of a batch over all hosts.
      local_rows: int [b], as in `train_batches`.
      max_tokens: see `eval_row_ids`.
      seq_len: see `eval_row_ids`.

    Yields:
      As `train_batches`; example_index counts on over the rows of zeros.
    """
    row_ids = eval_row_ids(part, max_tokens, seq_len)
    for start in range(0, len(row_ids), batch_size):
        index = start + np.asarray(local_rows, np.int64)
        is_row = index < len(row_ids)
        stored = part.take(row_ids[np.where(is_row, index, 0)])
        batch = _finished(part, stored, index, _EVAL_SEED)
        yield {
            key: x
            if key == "example_index"
            else np.where(is_row.reshape(-1, *[1] * (x.ndim - 1)), x, 0).astype(x.dtype)
            for key, x in batch.items()
        }


def eval_row_ids(part: Part, max_tokens: int, seq_len: int) -> np.ndarray:
    """The rows that an evaluation reads, in order: int64 [n].

    Args:
      part: held-out rows.
      max_tokens: at most this many positions, rounded up to whole rows, evenly spaced over all of them; 0 = all rows.
      seq_len: positions in a row.
    """
    count = min(len(part), math.ceil(max_tokens / seq_len)) if max_tokens else len(part)
    return np.arange(count, dtype=np.int64) * len(part) // max(1, count)


class _Piece(NamedTuple):
    """The examples of one batch that come from one source.

    Attributes:
      part: the rows of the source.
      place_B: their places in the batch, int64.
      index_B: their global indices, int64.
      stored: their columns as they are stored.
    """

    part: Part
    place_B: np.ndarray
    index_B: np.ndarray
    stored: Rows


@dataclasses.dataclass(frozen=True)
class _StoredBatches:
    """A random-access source for Grain: batch number -> the stored rows of its examples, a piece for each source."""

    streams: list[tuple[Part, sampler.Order]]
    mixture: sampler.Mixture
    batch_size: int
    start: int
    local_rows: np.ndarray
    offset_S: np.ndarray

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, k: int) -> list[_Piece]:
        index_B = self.start + int(k) * self.batch_size + self.local_rows
        if len(self.streams) == 1:
            stream_B, turn_B = np.zeros_like(index_B), index_B
        else:
            stream_B, turn_B = sampler.mixed(self.mixture, index_B)
        pieces = []
        for number in np.unique(stream_B).tolist():
            part, order = self.streams[number]
            place_B = np.flatnonzero(stream_B == number)
            row_B = order(turn_B[place_B] + self.offset_S[number])
            pieces.append(_Piece(part, place_B, index_B[place_B], part.take(row_B)))
        return pieces


def _transformed(pieces: list[_Piece], seed: int) -> list[tuple[np.ndarray, HostBatch]]:
    """Applies `Part.finish` to every example: (places in the batch, columns of the batch) of each piece."""
    return [(piece.place_B, _finished(piece.part, piece.stored, piece.index_B, seed)) for piece in pieces]


def _joined(pieces: list[tuple[np.ndarray, HostBatch]]) -> HostBatch:
    """One batch of its pieces."""
    if len(pieces) == 1:
        return pieces[0][1]
    size = sum(len(place_B) for place_B, _ in pieces)
    batch = {key: np.empty((size, *x.shape[1:]), x.dtype) for key, x in pieces[0][1].items()}
    for place_B, columns in pieces:
        for key, x in columns.items():
            batch[key][place_B] = x
    return batch


def _streams(data: Data, seed: int) -> list[tuple[Part, sampler.Order]]:
    """The parts that training examples come from, each with the order of its rows."""
    parts = [source.train for source in data.sources.values()]
    orders = [sampler.epochs(len(part), seed, number) for number, part in enumerate(parts)]
    if data.easy_first:
        orders[0] = sampler.easy_first(_lengths(parts[0]), seed, data.easy_first, orders[0])
    return list(zip(parts, orders, strict=True))


def _lengths(part: Part) -> np.ndarray:
    """Positions of each row that are no padding, int64 [R]."""
    segments = [x for name, x in part.rows.items() if name.endswith("segment_ids")]
    return sum((np.count_nonzero(x.reshape(len(x), -1), axis=1) for x in segments), np.zeros(len(part), np.int64))


def _finished(part: Part, stored: Rows, index_B: np.ndarray, seed: int) -> HostBatch:
    """Columns of a batch from stored rows, which are the global examples `index_B`.

    What `Part.finish` draws for an example depends on (seed, its global index) alone.
    """
    if part.finish is None:
        batch = {key: stored[key] for key in part.columns}
    else:
        finished = []
        for at, g in enumerate(index_B.tolist()):
            rng = np.random.default_rng([seed % 2**32, g])
            row = {key: stored[key][at].astype(dtype) for key, (_, dtype) in part.stored.items()}
            finished.append(part.finish(row, rng))
        batch = {key: np.stack([row[key] for row in finished]) for key in part.columns}
    batch = {key: x.astype(part.columns[key][1], copy=False) for key, x in batch.items()}
    indices = {"example_index": (index_B % 2**31).astype(np.int32)}
    return batch | {"row_weights": np.ones(len(index_B), np.float32)} | indices


def consumed(
    data: Data, examples: int, total_examples: int, offsets: Sequence[int] = ()
) -> dict[str, dict[str, float]]:
    """What the first `examples` of a run took from each source: examples, and epochs of its rows."""
    given = sampler.counts(data.mixture(total_examples), examples)
    sizes: Mapping[str, int] = {name: len(source.train) for name, source in data.sources.items()}
    return {
        name: {"examples": count + offset, "epochs": (count + offset) / size}
        for (name, size), count, offset in zip(sizes.items(), given, offsets or [0] * len(sizes), strict=True)
    }


def offsets(data: Data, taken: Mapping[str, float], examples: int, total_examples: int) -> tuple[int, ...]:
    """What to add to the place in each source so that each one goes on where it stopped: 0, unless the run is of
    another length, batch size or mixture now than when it took the first `examples`.

    Args:
      data: as it is now.
      taken: source -> its examples so far, of `consumed`; one that is missing begins.
      examples: how many these are together.
      total_examples: as in `train_batches`.
    """
    now = sampler.counts(data.mixture(total_examples), examples)
    return tuple(int(taken.get(name, 0)) - count for name, count in zip(data.sources, now, strict=True))
