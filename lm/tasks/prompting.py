"""Labelled sentences as text to go on with: a template asks, and the words for the labels are the answers compared.

A template such as '{text} It was {label:bad|good}.' has the record's fields, and at the place of '{label}' one word for
each of `data.labels`, in their order; a plain '{label}' stands for the labels themselves.
"""

import hashlib
import itertools
import string
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lm.config import Config
from lm.config.schema import ConfigError, nearest
from lm.data.example import Columns, Example, Task, field_texts, one_label
from lm.data.record import DataError, Record
from lm.data.tokenizer import Tokenizer
from lm.tasks.classification import label_index

_FIELDS = ("text", "text_pair", "label")
_BETWEEN_SHOTS = "\n\n"


class Template(NamedTuple):
    """A template in parts.

    Attributes:
      before: (literal text, field behind it or '') pairs, up to the label.
      words: of the labels, in their order.
      after: literal text behind the label, which only a shot has.
    """

    before: tuple[tuple[str, str], ...]
    words: tuple[str, ...]
    after: str


def check(cfg: Config) -> None:
    """Refuses templates that could not be filled in. Raises ConfigError, naming the key."""
    data = cfg.data
    if data.task != "prompted":
        for key, value in (("templates", data.templates), ("shots", data.shots)):
            if value:
                raise ConfigError(f"'data.{key}' is read by data.task=prompted only; 'data.task' is {data.task}")
        return
    if not data.templates:
        raise ConfigError("'data.templates' is empty; data.task=prompted needs one, such as '{text} It was {label}.'")
    if len(data.labels) < 2:
        raise ConfigError(f"'data.labels' is {data.labels}; data.task=prompted chooses between two or more")
    for i, template in enumerate(data.templates):
        parse(template, f"'data.templates[{i}]'", data.labels)


def parse(template: str, key: str, labels: tuple[str, ...]) -> Template:
    """A template in its parts. Raises ConfigError, naming `key`, unless '{label}' is its one last field."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"{key}: {template!r}: {error}; '{{{{' and '}}}}' write braces") from None
    fields = [field for _, field, _, _ in parts if field is not None]
    if any(conversion or (spec and field != "label") for _, field, spec, conversion in parts):
        raise ConfigError(f"{key}: {template!r}: only {{label:...}} may have anything behind its name: the words")
    for field in fields:
        if field not in _FIELDS:
            known = ", ".join(f"{{{name}}}" for name in _FIELDS)
            hint = nearest(field, _FIELDS)
            raise ConfigError(f"{key}: {template!r} has the field {{{field}}}{hint}; known are {known}")
    if fields.count("label") != 1 or fields[-1] != "label" or "text" not in fields:
        raise ConfigError(f"{key}: {template!r} must have {{text}}, and {{label}} once, behind the other fields")
    at = next(i for i, part in enumerate(parts) if part[1] == "label")
    spec = parts[at][2] or ""
    words = tuple(spec.split("|")) if spec else labels
    if len(words) != len(labels) or len(set(words)) != len(words) or not all(words):
        raise ConfigError(
            f"{key}: {template!r} has the words {', '.join(words)}; expected one for each of data.labels, all different"
        )
    before = tuple((literal, field or "") for literal, field, _, _ in [*parts[:at], (parts[at][0], "", "", None)])
    return Template(before, words, "".join(literal for literal, _, _, _ in parts[at + 1 :]))


def with_shots(train: Sequence[Record], held_out: Sequence[Record], cfg: Config) -> list[Record]:
    """The held-out records with the same `data.shots` training records each, as field 'shots'.

    Of each label, in turn, those of the smallest hashes: as many of one as of another, or one more.
    """
    by_label: dict[str, list[Record]] = {label: [] for label in cfg.data.labels}
    for record in sorted(train, key=_digest):
        by_label.setdefault(record["label"], []).append(record)
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*by_label.values()))
    shots = list(itertools.islice((record for record in in_turn if record is not None), cfg.data.shots))
    return [record | {"shots": shots} for record in held_out]


def prompted(record: Record, tokenizer: Tokenizer, cfg: Config, counts: Counter[str]) -> list[Example]:
    """The filled-in template once for each label, of which only the word of that label counts for the loss.

    BOS, the shots of a held-out record, the prompt, the word. A space before the word is part of it. Longer than
    seq_len: the left end goes, BOS stays, counted 'prompt_cut'. The record's own content decides which template; its
    shots have the same one.

    Returns:
      One example of tokens, targets and loss_weights [C, L], with segment_ids and positions, and the label's index.

    Raises:
      DataError: a label is not known, a field is missing, or a word alone is too long.
    """
    templates = cfg.data.templates
    number = zlib.crc32(repr([record.get(field) for field in ("text", "text_pair")]).encode()) % len(templates)
    template = parse(templates[number], f"'data.templates[{number}]'", cfg.data.labels)
    shots = [
        _prompt(shot, template) + template.words[label_index(shot["label"], shot, cfg)] + template.after
        for shot in record.get("shots", ())
    ]
    prompt = _BETWEEN_SHOTS.join([*shots, _prompt(record, template)])
    stem = prompt.rstrip(" ")
    space = prompt[len(stem) :]
    prompt_ids, seq_len = tokenizer.encode(stem), cfg.data.seq_len
    shape = (len(cfg.data.labels), seq_len)
    columns = {name: np.zeros(shape, dtype) for name, (_, dtype) in _columns(cfg).items() if name != "labels"}
    words = [tokenizer.encode(space + word) for word in template.words]
    room = seq_len - max(map(len, words))  # the same for all, so that all words follow the same prompt
    if room < 0:
        raise DataError(f"{record['source']}: a word of {template.words} is longer than data.seq_len={seq_len}")
    if len(prompt_ids) > room:
        counts["prompt_cut"] += 1
    for c, word_ids in enumerate(words):
        ids = [tokenizer.bos_id, *prompt_ids[max(0, len(prompt_ids) - room) :], *word_ids]
        n = len(ids) - 1
        columns["tokens"][c, :n], columns["targets"][c, :n] = ids[:-1], ids[1:]
        columns["loss_weights"][c, n - len(word_ids) : n] = 1.0
        columns["segment_ids"][c, :n], columns["positions"][c, :n] = 1, np.arange(n)
    return [Example(columns | {"labels": np.array(label_index(record["label"], record, cfg), np.int32)})]


def _prompt(record: Record, template: Template) -> str:
    for _, field in template.before:
        if field and field not in record:
            raise DataError(f"{record['source']}: a template of data.templates has {{{field}}}, which the record lacks")
    return "".join(literal + (record[field] if field else "") for literal, field in template.before)


def _digest(record: Record) -> bytes:
    return hashlib.sha256(repr([record.get(field) for field in _FIELDS]).encode()).digest()


def _columns(cfg: Config) -> Columns:
    shape = (len(cfg.data.labels), cfg.data.seq_len)
    of_label: dict[str, Any] = {name: (shape, np.int32) for name in ("tokens", "targets", "segment_ids", "positions")}
    return of_label | {"loss_weights": (shape, np.float32), "labels": ((), np.int32)}


PROMPTED = Task(
    ("text", "label"), prompted, _columns, field_texts("text", "text_pair"), held_out=with_shots, lacks=one_label
)
