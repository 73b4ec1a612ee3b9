"""Who chose what, and when: tables of interactions to one sequence of items a user."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from etils import epath

from lm.data import tables
from lm.data.records import AS_IS, Fault, Opening, Record

FIELDS = ("user", "item", "time")
MIN_ITEMS = 3  # one to predict from, one to train on, one held out


class Sequences(NamedTuple):
    """The halves of `leave_one_out`, and how many users and interactions it left out."""

    train: list[Record]
    valid: list[Record]
    users_left_out: int
    interactions_left_out: int


def read_interactions(
    path: epath.Path, rename: Mapping[str, str], opening: Opening = AS_IS
) -> Iterator[Record | Fault]:
    """Rows of a table, see `lm.data.tables.read_table`.

    Args:
      path: .csv or .tsv; its name may end in .gz or .zst.
      rename: column -> 'user', 'item' or 'time', for those that have another name in the file. Other columns are
        ignored.
      opening: how the file is opened.

    Yields:
      {"user": str, "item": str, "time": int or float}.
    """
    columns = {name: name for name in FIELDS if name not in rename.values()} | dict(rename)
    for row in tables.read_table(path, columns, opening):
        time = row if isinstance(row, Fault) else _number(row["time"])
        if isinstance(row, Fault):
            yield row
        elif time is None:
            found = f"'time' is {row['time']!r}; expected a finite number, such as seconds since 1970"
            yield Fault("wrong type", row["source"], found)
        else:
            yield row | {"time": time}


def _number(text: str) -> Any:
    """Whole numbers exactly: as floats two times of nanoseconds could be one. None where it is no finite number."""
    for parse in (int, float):
        try:
            value = parse(text)
        except ValueError:
            continue
        return value if math.isfinite(value) else None
    return None


def leave_one_out(rows: Iterable[Record]) -> Sequences:
    """Each user's items in the order of time (of the rows, where that is equal), the last one held out.

    Worked: u chose a at 3, b at 1, c at 2, d at 4:

        train  {"items": [b, c, a], "user": u}
        valid  {"items": [b, c, a], "user": u, "target": d}

    Users of fewer than `MIN_ITEMS` interactions are left out. An item chosen twice is in the sequence twice.

    Args:
      rows: as `read_interactions` gives them, of all files.
    """
    chosen: dict[str, list[tuple[Any, str, str]]] = {}
    for row in rows:
        chosen.setdefault(row["user"], []).append((row["time"], row["item"], row["source"]))
    train, valid, short = [], [], []
    for user, found in chosen.items():
        if len(found) < MIN_ITEMS:
            short.append(len(found))
            continue
        *history, (_, target, target_source) = sorted(found, key=lambda one: one[0])
        sequence = {"items": [item for _, item, _ in history], "user": user, "source": history[0][2]}
        train.append(sequence)
        valid.append(sequence | {"target": target, "source": target_source})
    return Sequences(train, valid, len(short), sum(short))
