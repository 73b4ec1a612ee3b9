"""Raw records to model examples: one function a task, each counting what it cut or left out."""

import collections
import concurrent.futures
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lm.config import Config, DataConfig, TokenizerConfig
from lm.config.schema import ConfigError
from lm.data import tokenizer as sentencepiece
from lm.data.record import Record
from lm.data.tokenizer import Tokenizer

_CHUNK_RECORDS = 32  # that a thread takes at a time


class Example(NamedTuple):
    """What one record, or a part of it, becomes.

    Attributes:
      columns: batch key -> array. One that is shorter than its row is filled up with 0 at its end.
      meta: what scoring needs of it on the host (texts, character offsets); never goes to a device.
    """

    columns: dict[str, np.ndarray]
    meta: Any = None


Row = dict[str, np.ndarray]  # one row of a batch
Rows = dict[str, np.ndarray]  # batch key -> [R, ...], in the smallest dtype that holds the values
Columns = dict[str, tuple[tuple[int, ...], Any]]  # batch key -> (shape of a row, dtype)


class Words(NamedTuple):
    """What ids stand for, and where that is kept.

    Attributes:
      file: its name in a run's folder.
      train: (what `Task.texts` gives of the training records, config) -> a `Tokenizer` or what stands in for one.
      load: path -> the same, saved.
    """

    file: str
    train: Callable[[Iterable[str], TokenizerConfig], Any]
    load: Callable[[Any], Any]


SENTENCEPIECE = Words(
    "tokenizer.model",
    lambda texts, cfg: sentencepiece.train(texts, cfg.vocab_size, cfg.train_bytes),
    sentencepiece.load,
)


class Task(NamedTuple):
    """How records become rows.

    Attributes:
      fields: what a record must have.
      make: (record, tokenizer, config, counts) -> its examples.
      columns: config -> the columns that `make` and packing give.
      texts: record -> the texts in it, to train a tokenizer on; None = the task reads no text and has no tokenizer.
      corrupt: (row, rng, tokenizer, config) -> row: what is drawn anew each time that a row is used.
      batch: config -> the columns after `corrupt`; None = the same.
      draws_other: `corrupt` finds the columns of a random row beside those of its own, as 'other_...'.
      prompt: (text, tokenizer) -> the ids that generation starts from; None = the task does not generate text.
      augments: whether `corrupt` itself applies `data.augment`, so that nobody else does.
      words: how its tokenizer is trained, saved and loaded.
      held_out: (training records, held-out records, config) -> held-out records: what they get of the training ones.
      lacks: (packed rows of a part, config) -> what the task needs and they do not have (a second document, a second
        label), as a sentence; '' = nothing. Training rows that lack it are refused, held-out ones counted.
    """

    fields: tuple[str, ...]
    make: Callable[[Record, Any, Config, Counter[str]], list[Example]]
    columns: Callable[[Config], Columns]
    texts: Callable[[Record], Iterator[str]] | None
    corrupt: Callable[[Row, np.random.Generator, Any, Config], Row] | None = None
    batch: Callable[[Config], Columns] | None = None
    draws_other: bool = False
    prompt: Callable[[str, Any], list[int]] | None = None
    augments: bool = False
    words: Words = SENTENCEPIECE
    held_out: Callable[[Sequence[Record], Sequence[Record], Config], list[Record]] | None = None
    lacks: Callable[[Rows, Config], str] | None = None


def make(
    task: Task,
    records: Iterable[Record],
    tokenizer: Tokenizer | None,
    cfg: Config,
    counts: Counter[str],
    threads: int = 1,
) -> Iterator[Example]:
    """Yields the examples of `records` in their order, adding to `counts` what became of them.

    SentencePiece works while other threads run Python: `threads` of them tokenize, a few records ahead.

    Counted: documents, examples; cut_in_pieces (text longer than seq_len); dropped_empty, dropped_no_target (nothing in
    it to train on); and what a task adds.

    Raises:
      DataError: a record has a role or a label that is not known.
    """

    def of_records(chunk: list[Record]) -> tuple[list[Example], Counter[str]]:
        own = Counter({"documents": len(chunk)})
        return [example for record in chunk for example in task.make(record, tokenizer, cfg, own)], own

    for found, own in _ahead(of_records, _chunks(records), threads):
        counts.update(own)
        for example in found:
            if "loss_weights" in example.columns and not example.columns["loss_weights"].any():
                counts["dropped_no_target"] += 1
                continue
            counts["examples"] += 1
            yield example


def _chunks(records: Iterable[Record]) -> Iterator[list[Record]]:
    records = iter(records)
    while chunk := list(itertools.islice(records, _CHUNK_RECORDS)):
        yield chunk


def _ahead(function: Callable[[Any], Any], items: Iterable[Any], threads: int) -> Iterator[Any]:
    """function(item) of each item in its order, by so many threads."""
    if threads == 1:
        yield from map(function, items)
        return
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        waiting: collections.deque[Any] = collections.deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def sequence_columns(names: tuple[str, ...], length: int) -> Columns:
    """Columns of `length` positions, with the segment ids and positions that packing adds."""
    dtypes = {"loss_weights": np.float32}
    return {name: ((length,), dtypes.get(name, np.int32)) for name in (*names, "segment_ids", "positions")}


def shifted_columns(cfg: Config) -> Columns:
    """Columns of a task that predicts the next token."""
    return sequence_columns(("tokens", "targets", "loss_weights"), cfg.data.seq_len)


def text(record: Record, tokenizer: Tokenizer, cfg: Config, counts: Counter[str]) -> list[Example]:
    """BOS, the text, EOS, all trained on. Worked: ids a b -> tokens [BOS a b], targets [a b EOS].

    Longer than seq_len: pieces that go on where the last one stopped, so that no target is lost. Packing `concat`
    splits by itself, at the ends of rows.
    """
    whole = whole_ids(record["text"], tokenizer)
    if len(whole) == 2:
        counts["dropped_empty"] += 1
        return []
    columns = {"tokens": whole[:-1], "targets": whole[1:], "loss_weights": _ones(len(whole) - 1)}
    return _pieces(columns, cfg, counts)


def whole_text(record: Record, tokenizer: Tokenizer, cfg: Config, counts: Counter[str]) -> list[Example]:
    """BOS, the text, EOS, with nothing to predict yet: what a task that hides tokens starts from. Cut as in `text`."""
    whole = whole_ids(record["text"], tokenizer)
    if len(whole) == 2:
        counts["dropped_empty"] += 1
        return []
    return _pieces({"tokens": whole}, cfg, counts)


def whole_ids(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """BOS, the ids of a text, EOS: int32."""
    ids = itertools.chain((tokenizer.bos_id,), tokenizer.ids(text), (tokenizer.eos_id,))
    return np.fromiter(ids, np.int32)


def _ones(length: int) -> np.ndarray:
    """float32 of 1, that takes the memory of one."""
    return np.broadcast_to(np.float32(1), length)


def _pieces(columns: dict[str, np.ndarray], cfg: Config, counts: Counter[str]) -> list[Example]:
    length, limit = len(columns["tokens"]), cfg.data.seq_len
    if length <= limit or cfg.data.packing == "concat":
        return [Example(columns)]
    counts["cut_in_pieces"] += 1
    starts = range(0, length, limit)
    return [Example({name: array[start : start + limit] for name, array in columns.items()}) for start in starts]


def text_prompt(text: str, tokenizer: Tokenizer) -> list[int]:
    """The start of a document."""
    return [tokenizer.bos_id, *tokenizer.encode(text)]


def one_label(rows: Rows, cfg: Config) -> str:
    """For `Task.lacks`: rows whose 'labels' are all the same teach nothing, and no score of them means anything."""
    found = np.unique(rows["labels"])
    if len(found) != 1:
        return ""
    names = cfg.data.labels
    shown = repr(names[int(found[0])]) if names and np.issubdtype(found.dtype, np.integer) else f"{found[0]:g}"
    return f"all {len(rows['labels']):,} rows have the label {shown}; expected two or more"


def field_texts(*names: str) -> Callable[[Record], Iterator[str]]:
    """The texts in those fields of a record that it has."""
    return lambda record: (record[name] for name in names if name in record)


def check_fields(task: Task, records: Iterable[Record], cfg: DataConfig, known: Mapping[str, Task]) -> None:
    """Raises ConfigError, naming the first record that `data.task` cannot read."""
    for record in records:
        if missing := [name for name in task.fields if name not in record]:
            fits = [name for name, other in known.items() if all(field in record for field in other.fields)]
            raise ConfigError(
                f"{record['source']}: 'data.task' is {cfg.task}, which reads '{missing[0]}', but the record has "
                f"{', '.join(sorted(set(record) - {'source'}))}; set data.task={' or '.join(fits)}, or other data"
            )


def shifted(ids: list[int], trained: list[bool]) -> dict[str, np.ndarray]:
    """Columns that predict each id from those before it; `trained` says of each id whether it is trained on."""
    return {
        "tokens": np.array(ids[:-1], np.int32),
        "targets": np.array(ids[1:], np.int32),
        "loss_weights": np.array(trained[1:], np.float32),
    }


TEXT = Task(("text",), text, shifted_columns, field_texts("text"), prompt=text_prompt)
