"""Builds the data of a run: loads records or prepared shards, turns records into examples and packs them into rows."""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import PurePath
from typing import Any

import numpy as np

from lm import eval_sets
from lm.config import Config, DataConfig, schema
from lm.config.schema import NEVER, ConfigError
from lm.data import augment, loader, packing, sampler, shards
from lm.data.example import Columns, Example, Row, Rows
from lm.data.loader import REPLAY, Data, Finish, Part, Source
from lm.data.readers import registry
from lm.data.readers.registry import Split
from lm.data.record import NOTHING, DataError, Record, Wanted
from lm.data.shards import Prepared
from lm.data.tokenizer import Tokenizer
from lm.data.tokenizer_protocol import target_bytes
from lm.tasks import Task, columns_of_batch, task_of

# Keys of DataConfig that affect how records are turned into rows.
_SHAPES_ROWS = (
    *("augment", "mixture", "replay"),
    *("seq_len", "target_len", "packing", "mask_documents", "overlong"),
)
_UNREAD_BY_PREPARED = ("eval_path", "rename", "encoding", "max_records")
Found = Split | Prepared  # a source as loaded: records, or packed rows on disk
_CHUNK_RECORDS = 32  # records that a thread processes at a time
_QUIET_SECONDS = 5.0  # a progress bar is shown if making the rows takes longer


def by_source(cfg: DataConfig) -> dict[str, DataConfig]:
    """Source name -> its config. Names are the last parts of the paths in `data.mixture`; without a mixture, '' alone.

    Raises:
      ConfigError: two paths of the mixture end in the same name, or one ends in a reserved name.
    """
    if not cfg.mixture:
        return {"": cfg}
    paths = list(dict.fromkeys(path for _, path, _ in cfg.mixture))
    names = [PurePath(path).name.split(".")[0] for path in paths]
    for name in names:
        if names.count(name) > 1 or name in ("", REPLAY):
            raise ConfigError(
                f"'data.mixture': its paths must end in different names, none of them '{REPLAY}', got {names}"
            )
    return {name: dataclasses.replace(cfg, path=path, mixture=()) for name, path in zip(names, paths, strict=True)}


def load(cfg: DataConfig, wanted: Wanted = NOTHING) -> list[Found]:
    """Loads each source: its records, or its prepared rows.

    Raises:
      DataError: the data cannot be used, see `registry.load` and `shards.open_folder`.
      ConfigError: a key is set that prepared data does not read.
    """
    each = by_source(cfg).values()
    if cfg.format != "prepared":
        return [registry.load(one, wanted) for one in each]
    for key in _UNREAD_BY_PREPARED:
        if (value := getattr(cfg, key)) != getattr(DataConfig, key):
            raise ConfigError(
                f"'data.{key}' is {value!r}, but prepared data does not read it; prepare the data with it"
            )
    return [shards.open_folder(one.path) for one in each]


def _stages(cfg: DataConfig) -> tuple[tuple[float, tuple[Fraction, ...]], ...]:
    """`Data.stages` from `data.mixture`; if `data.replay` is set, it is the share of an additional source."""
    names, replay = by_source(cfg), Fraction(str(cfg.replay))
    paths = [one.path for one in names.values()]
    starts = sorted({start for start, _, _ in cfg.mixture}) or [0.0]
    stages = []
    for start in starts:
        holds = {path: Fraction(str(weight)) for at, path, weight in cfg.mixture if at == start}
        given = holds or {cfg.path: Fraction(1)}
        total = sum(given.values())
        own = [given.get(path, Fraction(0)) / total * (1 - replay) for path in paths]
        stages.append((start, (*own, replay) if cfg.replay else tuple(own)))
    return tuple(stages)


def build(
    cfg: Config,
    tokenizer: Tokenizer | None,
    *found: Found,
    replayed: Found | None = None,
    begun: Mapping[str, Any] | None = None,
    sets: Mapping[str, eval_sets.Found] | None = None,
) -> Data:
    """Turns all splits of each source (and `replayed`, if `data.replay` is set) and all sets of `eval.sets` into
    examples and packs them into rows.

    Args:
      cfg: config of the run.
      tokenizer: the run's tokenizer; None if the task reads no text.
      found: sources from `load`, in its order.
      replayed: training data of the run that `init_from` names.
      begun: what a checkpoint of this run says of it (`Saved.info`), if the run has begun: its curriculum keeps its
        length in examples, whatever the batch size is now.
      sets: from `eval_sets.load`, if `eval.sets` has any.

    Raises:
      DataError: a split has nothing to train on or evaluate; the message gives the counts.
      ConfigError: `data.curriculum_*` is set, but rows have no length; or rows were prepared with other settings.
    """
    if (replayed is None) != (cfg.data.replay == 0):
        raise ValueError(f"data.replay is {cfg.data.replay}; pass `replayed` if and only if it is above 0")
    sets = sets or {}
    if [*sets] != (names := eval_sets.to_read(cfg)):
        raise ValueError(f"eval.sets has {names} to read, but `sets` has {[*sets]}; pass what `eval_sets.load` returns")
    made: dict[str, Source] = {}
    report: dict[str, dict[str, float]] = {}
    content: list[Any] = []
    for name, one in zip(by_source(cfg.data), found, strict=True):
        made[name], counts, checksums = _source(one, cfg, tokenizer, eval_sets.VALID not in sets)
        prefix = f"{name}_" if name else ""
        report |= {f"{prefix}{half}": values for half, values in counts.items()}
        content.append([one.fingerprint, checksums])
    if replayed:
        plain = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, replay=0.0, curriculum=NEVER))
        has_valid = isinstance(replayed, Prepared) or bool(replayed.valid)  # its run may have held nothing out
        try:
            made[REPLAY], counts, checksums = _source(replayed, plain, tokenizer, has_valid)
        except DataError as error:
            raise DataError(f"'data.replay': {error}") from None
        report |= {f"{REPLAY}_{half}": values for half, values in counts.items()}
        content.append([replayed.fingerprint, checksums])
    own_rows: dict[str, Part] = {}
    for name, (records, _) in sets.items():
        own_rows[name], report[f"eval.sets.{name}"] = _named_set(name, records, cfg, tokenizer, found)
    prints = {name: one.fingerprint for name, one in sets.items()}
    about_sets: dict[str, Any] = {"sets": own_rows, "set_fingerprints": prints}
    data = Data(made, _stages(cfg.data), "", report, content=tuple(content), **about_sets)
    return with_fingerprint(data, cfg, tokenizer, begun)


def with_fingerprint(
    data: Data, cfg: Config, tokenizer: Tokenizer | None, begun: Mapping[str, Any] | None = None
) -> Data:
    """Data of a run whose rows were made for this config, or for one that differs in `lm.program.NUMBERS` alone.

    Args:
      data: its `easy_first`, `fingerprint` and `about` are not read.
      cfg, tokenizer, begun: as in `build`.
    """
    data = data._replace(easy_first=_easy_first(cfg, data, begun))
    settings = {name: getattr(cfg.data, name) for name in _SHAPES_ROWS} | {"seed": cfg.seed}
    unread = schema.fields_that_change(cfg.task, "scores")
    options = {key: value for key, value in schema.to_dict(cfg.task).items() if key not in unread}
    settings |= {"task": options, "synonyms": augment.read_synonyms(cfg.data.synonyms)}
    settings |= {"easy_first": data.easy_first}
    valid = data.set_fingerprints.get(eval_sets.VALID)  # the other sets decide nothing
    parts = [[*data.content, *([valid] if valid else [])], _hash_of(tokenizer), settings]
    about: dict[str, str | int] = {"tokenizer": _sha256(parts[1])[:12], "settings": _sha256(settings)[:12]}
    for (name, source), each in zip(data.sources.items(), data.content, strict=True):
        prefix = f"{name}: " if name else ""
        about |= {f"{prefix}content": _sha256(each)[:12], f"{prefix}training rows": len(source.train)}
    about |= {"eval.sets.valid": valid[:12]} if valid else {}
    return data._replace(fingerprint=_sha256(parts), about=about)


def _hash_of(tokenizer: Tokenizer | None) -> str:
    """Of all that decides the rows: the tokenizer, with its chat template if it has one."""
    if tokenizer is None or not tokenizer.chat_template:
        return tokenizer.hash if tokenizer else ""
    return _sha256([tokenizer.hash, tokenizer.chat_template])


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _easy_first(cfg: Config, data: Data, begun: Mapping[str, Any] | None) -> int:
    """`Data.easy_first`: number of examples of the first source that the curriculum sorts by length."""
    if begun and "easy_first" in begun["data"]:
        return begun["data"]["easy_first"]
    if cfg.data.curriculum == NEVER:
        return 0
    if not any(name.endswith("segment_ids") for name in data.train.stored):
        raise ConfigError(f"'data.curriculum_*' sorts by length, but rows of task.name={cfg.task.name} have none")
    # Checkpoints of older versions do not have the length, but the batch size that it was computed from.
    batch_size = begun["config"]["data"]["batch_size"] if begun else cfg.data.batch_size
    size = {"batch_size": batch_size, "seq_len": cfg.data.seq_len, "epoch_examples": data.epoch_examples}
    examples_in_all = cfg.data.curriculum.to_steps("data.curriculum", **size) * batch_size
    return sampler.counts(data.mixture(0), examples_in_all)[0]


def _source(
    found: Found, cfg: Config, tokenizer: Tokenizer | None, has_valid: bool
) -> tuple[Source, dict[str, dict[str, float]], dict[str, int]]:
    """(source, its part of the report, checksums of its training rows for the fingerprint).

    `has_valid`: whether records are held out of it for the set `valid`.
    """
    if isinstance(found, Prepared):
        parts = {name: _prepared(found, name, cfg, tokenizer) for name in ("train", *["valid"] * has_valid)}
        checksums: dict[str, int] = {}
    else:
        train, checksums, counts = _packed(found.train, "train", cfg, tokenizer)
        parts = {"train": (train, counts)}
        held_out = ({"valid": found.valid} if has_valid else {}) | ({"test": found.test} if found.test else {})
        more = fields_of_held_out([found], cfg)
        for name, records in held_out.items():
            part, _, counts = _packed([record | more for record in records], name, cfg, tokenizer)
            parts[name] = part, counts
    report = {name: counts for name, (_, counts) in parts.items()}
    rows = {name: part for name, (part, _) in parts.items()}
    return Source(rows["train"], rows.get("valid"), rows.get("test")), report, checksums


def fields_of_held_out(found: Sequence[Found], cfg: Config) -> dict[str, Any]:
    """The fields that the task gives to held-out records, such as few-shot examples, from the training records of
    sources together.

    Raises:
      ConfigError: `task.shots` is set, and there is no training record, as in prepared rows.
    """
    task = task_of(cfg)
    if not task.held_out:
        return {}
    train = [record for source in found if isinstance(source, Split) for record in source.train]
    if cfg.task.shots and not train:
        raise ConfigError(
            f"'task.shots' is {cfg.task.shots}, but the training data has no records to take them from; set it to 0"
        )
    return task.held_out(train, cfg)


def _named_set(
    name: str, records: Sequence[Record], cfg: Config, tokenizer: Tokenizer | None, found: Sequence[Found]
) -> tuple[Part, dict[str, float]]:
    """Rows of a set of `eval.sets`, made as held-out rows are, and counts for the report."""
    own = eval_sets.config_of(cfg, name)
    more = fields_of_held_out(found, own)  # the training records are of the same task, see `checks.sets_fit`
    part, _, counts = _packed([record | more for record in records], f"eval.sets.{name}", own, tokenizer)
    return part, counts


def make_examples(
    task: Task,
    records: Iterable[Record],
    tokenizer: Tokenizer | None,
    cfg: Config,
    counts: Counter[str],
    threads: int = 1,
) -> Iterator[Example]:
    """Yields the examples of `records` in their order, and counts in `counts` what became of the records.

    `threads` threads tokenize a few records ahead; SentencePiece releases the GIL.

    Counts: documents, examples; cut_in_pieces (text longer than seq_len); dropped_empty, dropped_no_target (nothing to
    train on); and those of the task.

    Raises:
      DataError: a record has an unknown role or label.
    """

    def of_records(chunk: list[Record]) -> tuple[list[Example], Counter[str]]:
        own = Counter({"documents": len(chunk)})
        return [example for record in chunk for example in task.examples(record, tokenizer, cfg, own)], own

    for found, own in _in_order(of_records, _chunks(records), threads):
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


def _in_order(function: Callable[[Any], Any], items: Iterable[Any], threads: int) -> Iterator[Any]:
    """Yields function(item) for each item in order, computed by `threads` threads."""
    if threads == 1:
        yield from map(function, items)
        return
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        pending: collections.deque[Any] = collections.deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 2 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _packed(
    records: Sequence[Record], name: str, cfg: Config, tokenizer: Tokenizer | None
) -> tuple[Part, dict[str, int], dict[str, float]]:
    """Packs records into rows in memory: (part, checksum of each column, counts for the report)."""
    task, counts = task_of(cfg), Counter[str]()
    shown = progress(records, f"packing {name} rows", len(records))
    made = make_examples(task, shown, tokenizer, cfg, counts, os.cpu_count() or 1)
    stored = task.columns(cfg)
    rows, meta = packing.pack(made, stored, cfg.data)
    report: dict[str, float] = {**counts, "rows": len(next(iter(rows.values())))}
    if "segment_ids" in rows:
        filled = int(np.count_nonzero(rows["segment_ids"]))
        report |= {"tokens": filled, "fill": filled / max(1, rows["segment_ids"].size)}
    if "targets" in rows and tokenizer:
        is_target = rows["loss_weights"] > 0
        report["targets"] = int(np.count_nonzero(is_target))
        pairs = (rows[name][is_target] for name in ("tokens", "targets"))
        report["bytes"] = int(target_bytes(tokenizer, tokenizer.token_bytes(), *pairs).sum())
    if not report.get("targets", report["rows"]):
        found = ", ".join(f"{key} {value:,}" for key, value in counts.items()) or "no documents"
        keys = {"train": "data.path", "valid": "data.eval_path, data.eval_fraction"}.get(name, f"{name}.path")
        raise DataError(
            f"the {name} data has no target: no token or row has a loss weight above 0 ({found}); "
            f"check {keys}, task.name, data.overlong and data.seq_len ({cfg.data.seq_len})"
        )
    if lack := task.lacks(rows, cfg) if task.lacks else "":
        if name == "train":
            raise DataError(f"the train data cannot teach task.name={cfg.task.name}: {lack}; check data.path")
        report["nothing_to_tell_apart"] = report["rows"]
    checksums = {name: zlib.crc32(np.ascontiguousarray(x).tobytes()) for name, x in sorted(rows.items())}
    return _part(task, name, cfg, tokenizer, *loader.in_memory(rows), stored, meta), checksums, report


def _prepared(found: Prepared, half: str, cfg: Config, tokenizer: Tokenizer | None) -> tuple[Part, dict[str, float]]:
    """Prepared rows on disk, and the counts from their preparation.

    Raises:
      ConfigError: this run would turn the same documents into different rows.
      DataError: there are no rows.
    """
    task = task_of(cfg)
    stored = task.columns(cfg)
    table = found.table(half, mask_documents=cfg.data.mask_documents, skip=cfg.data.max_bad_records)
    if set(stored) != set(table.layout.names):
        raise ConfigError(
            f"{found.path}: its rows have the columns {', '.join(table.layout.names)}; expected {', '.join(stored)} "
            f"for task.name={cfg.task.name}; prepare the data for this task"
        )
    if tokenizer and (was := found.about.get("tokenizer_hash", tokenizer.hash)) != tokenizer.hash:
        raise ConfigError(
            f"{found.path}: its rows were made with tokenizer {was[:12]}, but this run has {tokenizer.hash[:12]}, in "
            "which the ids mean other text; restore the folder's tokenizer"
        )
    if (length := stored["tokens"][0][0]) != table.layout.length:
        raise ConfigError(
            f"{found.path}: its rows have {table.layout.length} positions, this run needs {length}; set "
            "data.seq_len, or prepare the data again"
        )
    if (was := found.about["settings"]["packing"]) != cfg.data.packing:
        raise ConfigError(f"{found.path}: 'data.packing' was {was} when it was prepared, and is {cfg.data.packing} now")
    if not len(table):
        raise DataError(f"{found.path}: no {half} rows; prepare it with more documents, or another held-out share")
    return _part(task, half, cfg, tokenizer, len(table), table.take, stored, []), found.counts(half)


def _part(
    task: Task,
    name: str,
    cfg: Config,
    tokenizer: Tokenizer | None,
    size: int,
    take: Callable[[np.ndarray], Rows],
    stored: Columns,
    meta: list[Any],
) -> Part:
    finish = _finish(task, name == "train", cfg, tokenizer, size, take, stored)
    return Part(size, take, meta, stored, columns_of_batch(task, cfg), finish)


def _finish(
    task: Task,
    is_train: bool,
    cfg: Config,
    tokenizer: Tokenizer | None,
    size: int,
    take: Callable[[np.ndarray], Rows],
    stored: Columns,
) -> Finish | None:
    """`Part.finish`: augmentation (training only), then the random transform of the task; None if there is neither."""
    steps: list[Finish] = []
    if is_train and not task.augments:
        steps += [functools.partial(_augment, name, strength, cfg, tokenizer) for name, strength in cfg.data.augment]
    if task.draws_other:
        steps.append(functools.partial(_with_other, size, take, stored))
    if task.transform is not None:
        transform = task.transform
        steps.append(lambda row, rng: transform(row, rng, tokenizer, cfg))
    if not steps:
        return None
    return lambda row, rng: functools.reduce(lambda row, step: step(row, rng), steps, row)


def _with_other(
    size: int, take: Callable[[np.ndarray], Rows], stored: Columns, row: Row, rng: np.random.Generator
) -> Row:
    """Adds the columns of a random row to `row`, as 'other_...'."""
    other = take(rng.integers(size, size=1))
    return row | {f"other_{key}": other[key][0].astype(dtype) for key, (_, dtype) in stored.items()}


def _augment(
    name: str, strength: float, cfg: Config, tokenizer: Tokenizer | None, row: Row, rng: np.random.Generator
) -> Row:
    return augment.AUGMENTATIONS[name].change(row, rng, strength, tokenizer, cfg)


def progress(records: Iterable[Any], what: str, total: int, done: int = 0) -> Iterator[Any]:
    """Yields the records, and shows a progress bar with the time that is left after `_QUIET_SECONDS`.

    Args:
      records: what is yielded.
      what: title of the bar.
      total: number of records, those that were done before included.
      done: those that were done before.
    """
    start, bar = time.monotonic(), None
    try:
        for number, record in enumerate(records, done + 1):
            yield record
            if bar is None and time.monotonic() - start > _QUIET_SECONDS:
                bar = _start_bar(what, total)
            if bar is not None:
                bar.update(bar.task_ids[0], completed=number)
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
