"""The label of a record as its task reads it: a class or a number; what is neither is a fault of that record alone."""

import math

import numpy as np

from lm.data.record import Fault, NotRead, Record, Wanted

_LARGEST = float(np.finfo(np.float32).max)
_BOOLEANS = ("true", "false")
_NULLS = ("nan", "null", "none", "na", "n/a", "<na>")  # what tables of text have in place of an empty cell


def number(label: str) -> float:
    """The number that a label stands for; NaN where it is none, or not finite in float32.

    What Python alone reads as one, '1_000' or the digits of other scripts, is none.
    """
    try:
        value = float(label) if label.isascii() and "_" not in label else math.nan
    except ValueError:
        return math.nan
    return value if abs(value) <= _LARGEST else math.nan


def checked(record: Record | Fault | NotRead, wanted: Wanted) -> Record | Fault | NotRead:
    """The record with its label as text, or a fault where the task cannot use it; what is no record passes through.

    A task that reads no label drops one that is no text. A boolean is the label of `task.labels` that is spelled like
    it in any case, so that true in JSON and True in a table are one class. A class that `task.labels` lacks passes,
    unless it is a boolean or spells a missing value: it means that `task.labels` is wrong, which the task refuses.

    Args:
      record: whose 'label', if it has one, is a text, a boolean, or None where the data have none for it.
      wanted: whose label and classes count.
    """
    if isinstance(record, Fault | NotRead) or not {"label", "text", "image"} & set(record):
        return record
    label = record.get("label")
    if not wanted.label:
        return record if isinstance(label, str) else {key: value for key, value in record.items() if key != "label"}
    if label is None:
        found = "no label" if "label" in record else f"the fields {', '.join(sorted(set(record) - {'source'}))}"
        expected = f"'label', which task.name={wanted.task} reads (data.rename maps another name to it)"
        return Fault("no label", str(record["source"]), f"found {found}; expected {expected}")
    task, own = "", str(label)
    if wanted.label == "mixed" and "/" in own:
        task, own = own.split("/", 1)
        task += "/"
    if wanted.label == "number" or task in wanted.classes:
        return _wrong(record, "a finite number") if math.isnan(number(own)) else record
    if task + own in wanted.classes:
        return record | {"label": task + own}
    if own.lower() in _BOOLEANS:
        alike = [known for known in wanted.classes if known.lower() == (task + own).lower()]
        return (
            record | {"label": alike[0]}
            if alike
            else _wrong(record, f"one of task.labels: {', '.join(wanted.classes)}")
        )
    return _wrong(record, "a label") if own.lower() in _NULLS else record


def _wrong(record: Record, expected: str) -> Fault:
    return Fault("wrong label", str(record["source"]), f"found the label {record['label']!r}; expected {expected}")
