"""Labelled sentences of several tasks in one stream: each label says whose it is, 'sst2/1' or 'stsb/3.8'."""

import itertools
from collections import Counter
from typing import NamedTuple

import numpy as np

from lm.config import Config
from lm.config.schema import ConfigError, nearest
from lm.data.example import Columns, Example, Rows, Task, field_texts, sequence_columns
from lm.data.labels import number
from lm.data.record import DataError, Record
from lm.data.tokenizer import Tokenizer
from lm.tasks.classification import encode_pair


class Part(NamedTuple):
    """One of the tasks.

    Attributes:
      name: what its labels begin with.
      classes: its labels; none = it has numbers.
      first: its first column of the head, of as many as it has classes, or of one.
    """

    name: str
    classes: tuple[str, ...]
    first: int


def parts(labels: tuple[str, ...]) -> list[Part]:
    """The tasks that `data.labels` lists: 'NAME/CLASS' for each class, 'NAME/' where it has numbers.

    Worked: ('sst2/0', 'sst2/1', 'stsb/') -> Part('sst2', ('0', '1'), 0), Part('stsb', (), 2).

    Raises:
      ConfigError: a label is of no such form, or a task's labels do not stand together.
    """
    found: list[Part] = []
    first = 0
    for name, own in itertools.groupby(labels, lambda label: label.partition("/")[0]):
        classes = tuple(label.partition("/")[2] for label in own)
        is_number = classes == ("",) and f"{name}/" in labels
        if not name or not (is_number or (len(classes) > 1 and all(classes))):
            raise ConfigError(
                f"'data.labels': task '{name}' has the labels {classes}; expected two or more of the form "
                f"'{name or 'NAME'}/CLASS', or '{name or 'NAME'}/' alone where it has numbers"
            )
        if name in {part.name for part in found}:
            raise ConfigError(f"'data.labels': the labels of task '{name}' must stand together")
        found.append(Part(name, () if is_number else classes, first))
        first += len(classes)
    return found


def mixed(record: Record, tokenizer: Tokenizer, cfg: Config, counts: Counter[str]) -> list[Example]:
    """A sentence or a pair with its task and its label: the place of a class among its task's, or a number.

    Counted: the examples of each task, by its name.

    Raises:
      DataError: the task or the label is not known; the message names the record.
    """
    known = parts(cfg.data.labels)
    name, _, label = record["label"].partition("/")
    place = next((i for i, part in enumerate(known) if part.name == name), None)
    if place is None:
        names = [part.name for part in known]
        hint = nearest(name, names)
        raise DataError(f"{record['source']}: label {record['label']!r} is of none of {', '.join(names)}{hint}")
    value = _value(label, known[place])
    if not np.isfinite(value):
        expected = f"one of {', '.join(known[place].classes)}" if known[place].classes else "a finite number"
        raise DataError(f"{record['source']}: label {record['label']!r}; expected {expected} after '{name}/'")
    counts[name] += 1
    columns = encode_pair(record["text"], record.get("text_pair"), tokenizer, cfg.data.seq_len, counts)
    return [Example(columns | {"labels": np.array(value, np.float32), "part": np.array(place, np.int32)})]


def _value(label: str, part: Part) -> float:
    if part.classes:
        return part.classes.index(label) if label in part.classes else np.nan
    return number(label)


def _columns(cfg: Config) -> Columns:
    columns = sequence_columns(("tokens", "type_ids"), cfg.data.seq_len)
    return columns | {"labels": ((), np.float32), "part": ((), np.int32)}


def _lacks(rows: Rows, cfg: Config) -> str:
    for place, part in enumerate(parts(cfg.data.labels)):
        labels = rows["labels"][rows["part"] == place]
        if len(labels) and (labels == labels[0]).all():
            return f"all {len(labels):,} rows of task '{part.name}' have one label; expected two or more"
    return ""


MIXED = Task(("text", "label"), mixed, _columns, field_texts("text", "text_pair"), lacks=_lacks)
