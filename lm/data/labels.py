"""Checks labels against the task: a class or a number. A label that is neither makes its record a fault."""

import math

import numpy as np

from lm.data.record import Fault, NotRead, Record, Wanted

_LARGEST = float(np.finfo(np.float32).max)
_BOOLEANS = ("true", "false")
_NULLS = ("nan", "null", "none", "na", "n/a", "<na>")  # what text tables write for an empty cell


def number(label: str) -> float:
    """Parses a label as a number; NaN if it is not one, or not finite in float32.

    Forms that only Python accepts, such as '1_000' or digits of other scripts, are not numbers.
    """
    try:
        value = float(label) if label.isascii() and "_" not in label else math.nan
    except ValueError:
        return math.nan
    return value if abs(value) <= _LARGEST else math.nan


def checked(record: Record | Fault | NotRead, wanted: Wanted) -> Record | Fault | NotRead:
    """Returns the record with its label as text, or a fault if the task cannot use the label.

    If the task reads no label, a label that is not text is dropped; if a record may lack one, a missing value is too. A
    boolean stands for the entry of `task.labels` that is spelled like it in any case, so that true in JSON and True in
    a table are the same class. A class missing from `task.labels` passes, unless it is a boolean or a spelling of a
    missing value: it means that `task.labels` is wrong, and the task refuses that. Faults and `NotRead` are returned as
    they are.

    Args:
      record: its 'label', if present, is a text, a boolean, or None for a missing value.
      wanted: gives the kind of label and the classes.
    """
    if isinstance(record, Fault | NotRead) or not {"label", "text", "image"} & set(record):
        return record
    label = record.get("label")
    if "label" in wanted.may_lack:  # to be predicted; one that is given is only passed on
        is_missing = str(label).strip().lower() in ("", *_NULLS) and str(label) not in wanted.classes
        rest = {key: value for key, value in record.items() if key != "label"}
        return rest if is_missing else record | {"label": str(label)}
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
