"""Training and evaluation batches from packed rows, as a Grain data set.

The training stream is a pure function of the global example index: `lm.data.sampler` says which row of which source an
example is, and random transforms are seeded by (seed, index). The index of the next example is therefore the whole
state of the input pipeline.
"""

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

HostBatch = dict[str, np.ndarray]  # lm.types.Batch as numpy arrays, of the rows that one host needs
Finish = Callable[[Row, np.random.Generator], Row]

REPLAY = "replay"  # name of the source that holds the data of another run
_EVAL_SEED = 0  # evaluations draw the same whatever the seed of the run
_ENDLESS = sys.maxsize  # the length that Grain gives a data set repeated without end


class Part(NamedTuple):
    """The packed rows of one split of a source.

    Attributes:
      size: number of rows.
      take: row numbers, int64 [B] -> the stored columns of those rows, from memory or disk.
      meta: what scoring needs to know of each row, see `lm.data.example.Example`; empty if the task needs nothing.
      stored: columns that `take` returns: key -> (shape of a row, dtype before it was narrowed for storage).
      columns: columns of a batch.
      finish: random transform (row, rng) -> row of a batch, drawn anew for each example; None = no transform.
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
        """All rows at once, for data that fits in memory."""
        return self.take(np.arange(self.size))


def in_memory(rows: Rows) -> tuple[int, Callable[[np.ndarray], Rows]]:
    """`Part.size` and `Part.take` for rows held as arrays [R, ...]."""
    return len(next(iter(rows.values()))), lambda row_ids: {key: x[row_ids] for key, x in rows.items()}


class Source(NamedTuple):
    """A source of examples: rows to train on and, where records are held out of it, those to choose a checkpoint by and
    to test the chosen one with."""

    train: Part
    valid: Part | None
    test: Part | None = None


class Data(NamedTuple):
    """All data of a run.

    Attributes:
      sources: name -> rows. A run without a mixture has one source, named ''. `REPLAY` comes last, if `data.replay` is
        set.
      stages: of the mixture: (share of the run at which the stage begins, weight of each source); the first one is 0.
      fingerprint: sha256 of everything that decides the training stream: records, tokenizer, settings, seed and the
        packed training rows.
      report: split ('train', 'valid'; with a named source 'NAME_train') -> counts: documents, examples, what was cut or
        dropped (see `lm.input_pipeline.make_examples`), rows and, for text: tokens (positions filled), targets
        (positions trained on), bytes (UTF-8 bytes of the targets), fill.
      easy_first: length of the curriculum (short rows first) of the first source, in examples; 0 = no curriculum.
      about: what went into the fingerprint, in a form that shows what changed.
      content: of each source, fingerprints of its records and of its packed training rows.
      sets: name -> rows of the sets of `eval.sets` that the run evaluates.
      set_fingerprints: name -> sha256 (hex) of the records of each of them.
    """

    sources: dict[str, Source]
    stages: tuple[tuple[float, tuple[Fraction, ...]], ...]
    fingerprint: str
    report: dict[str, dict[str, float]]
    easy_first: int = 0
    about: Mapping[str, str | int] = {}
    content: tuple[Any, ...] = ()
    sets: Mapping[str, Part] = {}
    set_fingerprints: Mapping[str, str] = {}

    @property
    def train(self) -> Part:
        """Training rows of the first source."""
        return next(iter(self.sources.values())).train

    @property
    def valid(self) -> Part:
        """The rows of the set 'valid', of several sources those of the first one."""
        return next(iter(self.rows_of("valid").values()))

    @property
    def epoch_examples(self) -> int:
        """Examples until every row has been used once, in all sources of the first stage except `REPLAY`."""
        weights = dict(zip(self.sources, self.stages[0][1], strict=True))
        total = sum(weights.values())
        own = {name: weight / total for name, weight in weights.items() if weight and name != REPLAY}
        return max(math.ceil(len(self.sources[name].train) / share) for name, share in own.items())

    def rows_of(self, name: str) -> dict[str, Part]:
        """The rows of an evaluation set: '' = of a file of its own, or the source out of which they are held -> rows.

        Args:
          name: 'valid', another set of `eval.sets`, or 'test' = the rows that the sources hold out for a test.
        """
        own = {"": self.sets[name]} if name in self.sets else {}
        held = {key: {"valid": source.valid, "test": source.test}.get(name) for key, source in self.sources.items()}
        return own | {key: part for key, part in held.items() if part is not None}

    def mixture(self, total_examples: int) -> sampler.Mixture:
        """The mixture of a run of `total_examples`; 0 = the first stage without end."""
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
    whole batch because its rows are read and decoded together, about ten times as fast as one by one (docs/log.md).

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
    order = _Order(
        _streams(data, seed),
        data.mixture(total_examples),
        batch_size,
        start_example,
        np.asarray(local_rows, np.int64),
        np.array(offsets or [0] * len(data.sources), np.int64),
    )
    return grain.MapDataset.source(order).map(functools.partial(_read, seed=seed))


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
    """Each row once, in batches of one shape: the last batch is padded with rows of zeros, whose weight is 0.

    Random transforms (`Part.finish`) are drawn with a fixed seed, so that every evaluation sees the same rows.

    Args:
      part: held-out rows.
      batch_size: rows of a batch over all hosts.
      local_rows: int [b], as in `train_dataset`.
      max_tokens: see `eval_row_ids`.
      seq_len: see `eval_row_ids`.

    Yields:
      As `train_dataset`; example_index keeps counting over the padding rows.
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
    """The rows that an evaluation reads, in order, int64 [n].

    Args:
      part: held-out rows.
      max_tokens: limit in positions, rounded up to whole rows, which are evenly spaced over all rows; 0 = all rows.
      seq_len: positions in a row.
    """
    count = min(len(part), math.ceil(max_tokens / seq_len)) if max_tokens else len(part)
    return np.arange(count, dtype=np.int64) * len(part) // max(1, count)


class _Share(NamedTuple):
    """The examples of one batch that come from one source.

    Attributes:
      part: the rows of the source.
      row_B: their row numbers, int64.
      place_B: their places in the batch, int64.
      index_B: their global indices, int64.
    """

    part: Part
    row_B: np.ndarray
    place_B: np.ndarray
    index_B: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Order:
    """A random-access source for Grain: batch number -> which rows its examples are, a share for each source."""

    streams: list[tuple[Part, sampler.Order]]
    mixture: sampler.Mixture
    batch_size: int
    start: int
    local_rows: np.ndarray
    offset_S: np.ndarray

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, k: int) -> list[_Share]:
        index_B = self.start + int(k) * self.batch_size + self.local_rows
        if len(self.streams) == 1:
            stream_B, turn_B = np.zeros_like(index_B), index_B
        else:
            stream_B, turn_B = sampler.mixed(self.mixture, index_B)
        shares = []
        for number in np.unique(stream_B).tolist():
            part, order = self.streams[number]
            place_B = np.flatnonzero(stream_B == number)
            row_B = order(turn_B[place_B] + self.offset_S[number])
            shares.append(_Share(part, row_B, place_B, index_B[place_B]))
        return shares


def _read(shares: list[_Share], seed: int) -> HostBatch:
    """Reads the rows of a batch and applies the random transforms, one source after the other."""
    size = sum(len(share.row_B) for share in shares)
    batch: HostBatch = {}
    for share in shares:
        columns = _finished(share.part, share.part.take(share.row_B), share.index_B, seed)
        if len(shares) == 1:
            return columns
        for key, x in columns.items():
            if key not in batch:
                batch[key] = np.empty((size, *x.shape[1:]), x.dtype)
            batch[key][share.place_B] = x
    return batch


def _streams(data: Data, seed: int) -> list[tuple[Part, sampler.Order]]:
    """The training rows of each source, with their order."""
    parts = [source.train for source in data.sources.values()]
    orders = [sampler.epochs(len(part), seed, number) for number, part in enumerate(parts)]
    if data.easy_first:
        orders[0] = sampler.easy_first(_lengths(parts[0]), seed, data.easy_first, orders[0])
    return list(zip(parts, orders, strict=True))


def _lengths(part: Part) -> np.ndarray:
    """Number of positions of each row that are not padding, int64 [R]."""
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
    """How much of each source the first `examples` of a run used: in examples, and in epochs of its rows."""
    given = sampler.counts(data.mixture(total_examples), examples)
    sizes: Mapping[str, int] = {name: len(source.train) for name, source in data.sources.items()}
    return {
        name: {"examples": count + offset, "epochs": (count + offset) / size}
        for (name, size), count, offset in zip(sizes.items(), given, offsets or [0] * len(sizes), strict=True)
    }


def offsets(data: Data, taken: Mapping[str, float], examples: int, total_examples: int) -> tuple[int, ...]:
    """Offset to add to the index in each source, so that each source continues where it stopped.

    All are 0 unless the length of the run, its batch size or its mixture has changed since the first `examples`.

    Args:
      data: as it is now.
      taken: source -> examples used so far, from `consumed`; a source that is missing starts at its beginning.
      examples: total number of examples used so far.
      total_examples: as in `train_dataset`.
    """
    now = sampler.counts(data.mixture(total_examples), examples)
    return tuple(int(taken.get(name, 0)) - count for name, count in zip(data.sources, now, strict=True))
