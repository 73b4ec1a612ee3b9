"""Reads interactions of users with items: tables of user, item and time become one sequence of items per user."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from etils import epath

from lm.data.readers import tables
from lm.data.readers.text import AS_IS, Opening
from lm.data.record import Fault, Record

MIN_ITEMS = 3  # one to train on, one to validate, one to test


class Sequences(NamedTuple):
    """Result of `leave_one_out`: records of each split, and how many users and interactions were left out."""

    train: list[Record]
    valid: list[Record]
    test: list[Record]
    users_left_out: int
    interactions_left_out: int


def read_interactions(
    path: epath.Path, rename: Mapping[str, str], opening: Opening = AS_IS
) -> Iterator[Record | Fault]:
    """Reads rows of a table, see `lm.data.readers.tables.read_table`.

    Args:
      path: .csv or .tsv; its name may end in .gz or .zst.
      rename: column -> 'user', 'item' or 'time', for columns with other names. Other columns are ignored.
      opening: options for opening the file.

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
    """Parses a number; None if it is not finite. Integers stay exact: as floats, two times in ns could be equal."""
    for parse in (int, float):
        try:
            value = parse(text)
        except ValueError:
            continue
        return value if math.isfinite(value) else None
    return None


def _by_user(rows: Iterable[Record]) -> Iterator[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    """(user, items, their sources) of each user, by time (ties: by row)."""
    chosen: dict[str, list[tuple[Any, str, str]]] = {}
    for row in rows:
        chosen.setdefault(row["user"], []).append((row["time"], row["item"], row["source"]))
    for user, found in chosen.items():
        _, items, places = zip(*sorted(found, key=lambda one: one[0]), strict=True)
        yield user, items, places


def histories(rows: Iterable[Record]) -> list[Record]:
    """{"items": [...], "user": ...} of each user, of all items; rows as for `leave_one_out`."""
    return [{"items": list(items), "user": user, "source": places[0]} for user, items, places in _by_user(rows)]


def leave_one_out(rows: Iterable[Record]) -> Sequences:
    """Sorts each user's items by time (ties: by row) and holds out the last two.

    The second-last item is the target of validation and the last that of testing, each predicted from all items before
    it (Kang and McAuley 2018, section IV-A). Worked: u chose a at time 3, b at 1, c at 2 and d at 4:

        train  {"items": [b, c], "user": u}
        valid  {"items": [b, c], "user": u, "target": a}
        test   {"items": [b, c, a], "user": u, "target": d}

    Users with fewer than `MIN_ITEMS` interactions are left out. An item chosen twice is in the sequence twice.

    Args:
      rows: rows of all files, from `read_interactions`.
    """
    train, valid, test = list[Record](), list[Record](), list[Record]()
    short: list[int] = []
    for user, items, places in _by_user(rows):
        if len(items) < MIN_ITEMS:
            short.append(len(items))
            continue
        train.append({"items": list(items[:-2]), "user": user, "source": places[0]})
        for held_out, last in ((valid, -2), (test, -1)):
            target = {"target": items[last], "source": places[last]}
            held_out.append({"items": list(items[:last]), "user": user, **target})
    return Sequences(train, valid, test, len(short), sum(short))
