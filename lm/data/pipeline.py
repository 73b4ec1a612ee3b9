"""From records to batches. The training stream is a pure function: global example index -> row."""

import dataclasses
import functools
import hashlib
import json
import math
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import grain
import numpy as np

from lm import schema
from lm.config import Config
from lm.data import augment, examples, order, packing, sources
from lm.data.examples import Columns, Row, Task
from lm.data.packing import Rows
from lm.data.records import DataError, Record
from lm.data.tasks import TASKS
from lm.data.tokenizer import Tokenizer
from lm.schema import NEVER, ConfigError

HostBatch = dict[str, np.ndarray]  # lm.types.Batch, in numpy: the rows that one host needs

# Keys of DataConfig that decide what the rows of given records are.
_SHAPES_ROWS = (
    *("task", "labels", "image_shape", "templates", "augment", "replay"),
    *("seq_len", "target_len", "packing", "mask_documents", "overlong"),
)
_EVAL_SEED = 0
_QUIET_SECONDS = 5.0  # a progress bar appears when making the rows takes longer


Finish = Callable[[Row, np.random.Generator], Row]


class Part(NamedTuple):
    """The rows of one half of the data, packed and in memory.

    Attributes:
      rows: as packed.
      meta: what scoring needs of each row, see `examples.Example`.
      stored: the columns of `rows` before they were made compact: batch key -> (shape of a row, dtype).
      columns: the columns of a batch.
      finish: (row, rng) -> row of a batch: what is drawn anew for each global example; None = nothing is.
    """

    rows: Rows
    meta: list[Any]
    stored: Columns
    columns: Columns
    finish: Finish | None = None

    def __len__(self) -> int:
        return len(next(iter(self.rows.values())))


class Data(NamedTuple):
    """All rows of a run.

    Attributes:
      train: training rows.
      valid: held-out rows.
      fingerprint: sha256 over all that decides which row is which example of the stream: records, tokenizer, settings,
        seed and the training rows as packed.
      report: 'train' and 'valid' -> counts: documents, examples, what was cut or dropped (see `examples.make`),
        rows and, of tokens: tokens (positions filled), targets (positions trained on), bytes (UTF-8, of the targets),
        fill; 'replay_train' and 'replay_valid' -> the same of what is replayed.
      easy_first: this many examples of `train` come from the short rows first; 0 = none.
      replay: the data of another run, as rows of this one, or None.
      share: of the training examples, those that `replay` gives.
    """

    train: Part
    valid: Part
    fingerprint: str
    report: dict[str, dict[str, float]]
    easy_first: int = 0
    replay: "Data | None" = None
    share: Fraction = Fraction(0)

    @property
    def epoch_examples(self) -> int:
        """Examples of the stream in which each row of `train` has its turn, once."""
        return math.ceil(len(self.train) / (1 - self.share))

    @property
    def held_out(self) -> dict[str, Part]:
        """What an evaluation measures: prefix of its metrics -> rows."""
        return {"": self.valid} | ({"replay_": self.replay.valid} if self.replay else {})


def build(
    cfg: Config, tokenizer: Tokenizer | None, split: sources.Split, replayed: sources.Split | None = None
) -> Data:
    """Makes and packs the examples of both halves of `split` and, where `data.replay` is set, of `replayed`.

    Raises:
      DataError: a half has nothing to train on or to evaluate; the message gives the counts.
      ConfigError: `data.curriculum_*` goes by a length that the rows do not have.
    """
    if (replayed is None) != (cfg.data.replay == 0):
        raise ValueError(f"data.replay is {cfg.data.replay}: the records to replay are given where it is above 0 only")
    train, train_report = _part(split.train, "train", cfg, tokenizer)
    held_out = TASKS[cfg.data.task].held_out
    valid_records = held_out(split.train, split.valid, cfg) if held_out else split.valid
    valid, valid_report = _part(valid_records, "valid", cfg, tokenizer)
    report, replay = {"train": train_report, "valid": valid_report}, None
    if replayed:
        plain = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, replay=0.0, curriculum=NEVER))
        try:
            replay = build(plain, tokenizer, replayed)
        except DataError as error:
            raise DataError(f"'data.replay': {error}") from None
        report |= {f"replay_{name}": counts for name, counts in replay.report.items()}
    data = Data(train, valid, "", report, replay=replay, share=Fraction(str(cfg.data.replay)))
    data = data._replace(easy_first=_easy_first(cfg, data))
    settings = {name: getattr(cfg.data, name) for name in _SHAPES_ROWS} | {"seed": cfg.seed}
    settings |= {"corrupt": schema.to_dict(cfg.corrupt), "synonyms": augment.read_synonyms(cfg.data.synonyms)}
    settings |= {"easy_first": data.easy_first, "replay_rows": replay.fingerprint if replay else ""}
    checksums = {name: zlib.crc32(np.ascontiguousarray(x).tobytes()) for name, x in sorted(train.rows.items())}
    parts = [split.fingerprint, tokenizer.hash if tokenizer else "", settings, checksums]
    return data._replace(fingerprint=hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest())


def _easy_first(cfg: Config, data: Data) -> int:
    """How many examples of `train` the curriculum orders."""
    if cfg.data.curriculum == NEVER:
        return 0
    if not any(name.endswith("segment_ids") for name in data.train.rows):
        raise ConfigError(f"'data.curriculum_*' goes by length, but rows of data.task={cfg.data.task} have none")
    size = {"batch_size": cfg.data.batch_size, "seq_len": cfg.data.seq_len, "epoch_examples": data.epoch_examples}
    examples_in_all = cfg.data.curriculum.to_steps(**size) * cfg.data.batch_size
    return examples_in_all - math.floor(examples_in_all * data.share)


def train_row_ids(num_rows: int, seed: int, start: int, count: int) -> np.ndarray:
    """Rows of the global examples start ... start + count - 1, int64 [count]; epoch e, of `num_rows` examples, is a
    permutation of the rows that (seed, e) decides."""
    row_of = order.epochs(num_rows, seed)
    return np.array([row_of(g) for g in range(start, start + count)], np.int64)


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
      The columns of the task as [b, ...], row_weights float32 [b] and example_index int32 [b] (modulo 2^31).
    """
    source = _Batches(
        _streams(data, seed), data.share, batch_size, start_example, np.asarray(local_rows, np.int64), seed
    )
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(grain.MapDataset.source(source).to_iter_dataset(options))


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
        batch = _gather(part, row_ids[np.where(is_row, index, 0)], index, seed=_EVAL_SEED)
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


@dataclasses.dataclass(frozen=True)
class _Batches:
    """Random access to the batches of the training stream: what Grain calls a data source."""

    streams: list[tuple[Part, order.Order]]
    share: Fraction
    batch_size: int
    start: int
    local_rows: np.ndarray
    seed: int

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, k: int) -> HostBatch:
        index_B = self.start + int(k) * self.batch_size + self.local_rows
        stream_B, place_B = np.array([order.mixed(int(g), self.share) for g in index_B], np.int64).reshape(-1, 2).T
        batch: HostBatch = {}
        for number, (part, row_of) in enumerate(self.streams):
            here = np.flatnonzero(stream_B == number)
            if not len(here):
                continue
            found = _gather(part, np.array([row_of(int(i)) for i in place_B[here]]), index_B[here], self.seed)
            for key, x in found.items():
                batch.setdefault(key, np.zeros((len(index_B), *x.shape[1:]), x.dtype))[here] = x
        return batch


def _streams(data: Data, seed: int) -> list[tuple[Part, order.Order]]:
    """The parts that training examples come from, each with the order of its rows."""
    own = order.epochs(len(data.train), seed)
    if data.easy_first:
        own = order.easy_first(_lengths(data.train), seed, data.easy_first, own)
    streams = [(data.train, own)]
    if data.replay:
        streams.append((data.replay.train, order.epochs(len(data.replay.train), seed, stream=1)))
    return streams


def _lengths(part: Part) -> np.ndarray:
    """Positions of each row that are no padding, int64 [R]."""
    segments = [x for name, x in part.rows.items() if name.endswith("segment_ids")]
    return sum((np.count_nonzero(x.reshape(len(x), -1), axis=1) for x in segments), np.zeros(len(part), np.int64))


def _gather(part: Part, row_ids: np.ndarray, index: np.ndarray, seed: int) -> HostBatch:
    """Rows `row_ids` as the global examples `index`: what is drawn for a row depends on (seed, its index) alone."""
    if part.finish is None:
        batch = {key: part.rows[key][row_ids] for key in part.columns}
    else:
        finished = []
        for row_id, g in zip(row_ids, index, strict=True):
            rng = np.random.default_rng([seed % 2**32, int(g)])
            row = {key: part.rows[key][row_id].astype(dtype) for key, (_, dtype) in part.stored.items()}
            finished.append(part.finish(row, rng))
        batch = {key: np.stack([row[key] for row in finished]) for key in part.columns}
    batch = {key: x.astype(part.columns[key][1]) for key, x in batch.items()}
    indices = {"example_index": (index % 2**31).astype(np.int32)}
    return batch | {"row_weights": np.ones(len(index), np.float32)} | indices


def _part(
    records: Sequence[Record], name: str, cfg: Config, tokenizer: Tokenizer | None
) -> tuple[Part, dict[str, float]]:
    task, counts = TASKS[cfg.data.task], Counter[str]()
    made = examples.make(task, _progress(records, f"packing {name} rows"), tokenizer, cfg, counts)
    stored = task.columns(cfg)
    rows, meta = packing.pack(made, stored, cfg.data)
    report: dict[str, float] = {**counts, "rows": len(next(iter(rows.values())))}
    if "segment_ids" in rows:
        filled = int(np.count_nonzero(rows["segment_ids"]))
        report |= {"tokens": filled, "fill": filled / max(1, rows["segment_ids"].size)}
    if "targets" in rows and tokenizer:
        is_target = rows["loss_weights"] > 0
        report["targets"] = int(np.count_nonzero(is_target))
        report["bytes"] = int(tokenizer.token_bytes()[rows["targets"][is_target]].sum())
    if not report.get("targets", report["rows"]):
        found = ", ".join(f"{key} {value:,}" for key, value in counts.items()) or "no documents"
        keys = "data.path" if name == "train" else "data.eval_path, data.eval_fraction"
        raise DataError(
            f"the {name} data has no target: nothing in it counts for the loss ({found}); "
            f"check {keys}, data.task, data.overlong and data.seq_len ({cfg.data.seq_len})"
        )
    finish = _finish(task, name == "train", cfg, tokenizer, rows, stored)
    return Part(rows, meta, stored, (task.batch or task.columns)(cfg), finish), report


def _finish(
    task: Task, is_train: bool, cfg: Config, tokenizer: Tokenizer | None, rows: Rows, stored: Columns
) -> Finish | None:
    """What is done to a row each time it is used: augmentation while training, then the task's corruption."""
    steps: list[Finish] = []
    if is_train and not task.augments:
        steps += [functools.partial(_augment, name, strength, cfg, tokenizer) for name, strength in cfg.data.augment]
    if task.draws_other:
        steps.append(functools.partial(_with_other, rows, stored))
    if task.corrupt is not None:
        corrupt = task.corrupt
        steps.append(lambda row, rng: corrupt(row, rng, tokenizer, cfg))
    if not steps:
        return None
    return lambda row, rng: functools.reduce(lambda row, step: step(row, rng), steps, row)


def _with_other(rows: Rows, stored: Columns, row: Row, rng: np.random.Generator) -> Row:
    """The row, and beside it a random one of all rows."""
    at = int(rng.integers(len(next(iter(rows.values())))))
    return row | {f"other_{key}": rows[key][at].astype(dtype) for key, (_, dtype) in stored.items()}


def _augment(
    name: str, strength: float, cfg: Config, tokenizer: Tokenizer | None, row: Row, rng: np.random.Generator
) -> Row:
    return augment.AUGMENTATIONS[name].change(row, rng, strength, tokenizer, cfg)


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
