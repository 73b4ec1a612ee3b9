"""Interactions of users with items: tables of user, item and time to one sequence of items a user."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from etils import epath

from lm.data.readers import tables
from lm.data.readers.text import AS_IS, Opening
from lm.data.record import Fault, Record

MIN_ITEMS = 3  # one to train on, one to validate, one to test


class Sequences(NamedTuple):
    """What `leave_one_out` makes, and how many users and interactions it left out."""

    train: list[Record]
    valid: list[Record]
    test: list[Record]
    users_left_out: int
    interactions_left_out: int


def read_interactions(
    path: epath.Path, rename: Mapping[str, str], opening: Opening = AS_IS
) -> Iterator[Record | Fault]:
    """Rows of a table, see `lm.data.readers.tables.read_table`.

    Args:
      path: .csv or .tsv; its name may end in .gz or .zst.
      rename: column -> 'user', 'item' or 'time', for those that have another name in the file. Other columns are
        ignored.
      opening: how the file is opened.

    Yields:
      {"user": str, "item": str, "time": int or float}.
    """
    for row in tables.read_table(path, rename, opening):
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
    """Each user's items in the order of time (of the rows, where that is equal); the last two are not trained on.

    The second-last item validates and the last one tests, each after all items before it (Kang and McAuley 2018,
    section IV-A). Worked: u chose a at 3, b at 1, c at 2, d at 4:

        train  {"items": [b, c], "user": u}
        valid  {"items": [b, c], "user": u, "target": a}
        test   {"items": [b, c, a], "user": u, "target": d}

    Users of fewer than `MIN_ITEMS` interactions are left out. An item chosen twice is in the sequence twice.

    Args:
      rows: as `read_interactions` gives them, of all files.
    """
    chosen: dict[str, list[tuple[Any, str, str]]] = {}
    for row in rows:
        chosen.setdefault(row["user"], []).append((row["time"], row["item"], row["source"]))
    train, valid, test = list[Record](), list[Record](), list[Record]()
    short: list[int] = []
    for user, found in chosen.items():
        if len(found) < MIN_ITEMS:
            short.append(len(found))
            continue
        _, items, places = zip(*sorted(found, key=lambda one: one[0]), strict=True)
        train.append({"items": list(items[:-2]), "user": user, "source": places[0]})
        for held_out, last in ((valid, -2), (test, -1)):
            target = {"target": items[last], "source": places[last]}
            held_out.append({"items": list(items[:last]), "user": user, **target})
    return Sequences(train, valid, test, len(short), sum(short))
