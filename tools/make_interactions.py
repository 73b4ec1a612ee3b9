"""Writes a synthetic table of user-item interactions, to try next-item recommendation on.

    python tools/make_interactions.py OUT.csv [--users=2000] [--items=500] [--seed=0]

The next item depends on the previous one: with probability 3/4 it is one of the five followers of that item, otherwise
any item. Items and followers are drawn from a Zipf distribution (popularity 1 / rank), so that recommending popular
items is sometimes right. A user has 5 to 60 interactions, with a skewed distribution of lengths. The rows are shuffled.
"""

import csv
from pathlib import Path

import numpy as np
from absl import flags

from lm import command_line
from lm.terminal import say

_USERS = flags.DEFINE_integer("users", 2000, "Number of users.", lower_bound=1)
_ITEMS = flags.DEFINE_integer("items", 500, "Number of items.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the table.")

FOLLOWERS, FOLLOWS = 5, 0.75
FEWEST, MOST, MEAN_EXTRA = 5, 60, 12.0
MEAN_GAP = 3600.0  # seconds


def make(users: int, items: int, seed: int) -> list[tuple[str, str, int]]:
    """(user, item, time in seconds) of each interaction, in random order; a function of the arguments alone."""
    rng = np.random.default_rng(seed)
    popularity = 1 / np.arange(1, items + 1)
    popularity /= popularity.sum()
    width = min(FOLLOWERS, items)
    followers = [rng.choice(items, width, replace=False, p=popularity) for _ in range(items)]
    rows = []
    for user in range(users):
        length = min(MOST, FEWEST + int(rng.exponential(MEAN_EXTRA)))
        time, item = 1_600_000_000.0 + rng.exponential(30 * MEAN_GAP), int(rng.choice(items, p=popularity))
        for _ in range(length):
            rows.append((f"u{user}", f"i{item}", int(time)))
            time += 1 + rng.exponential(MEAN_GAP)
            follows = rng.random() < FOLLOWS
            item = int(rng.choice(followers[item]) if follows else rng.choice(items, p=popularity))
    return [rows[i] for i in rng.permutation(len(rows))]


def write(path: Path, rows: list[tuple[str, str, int]]) -> None:
    """Writes rows under the header user,item,time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("user", "item", "time"))
        table.writerows(rows)


def main(argv: list[str]) -> None:
    """Writes the table."""
    (out,) = command_line.arguments(argv, "OUT.csv")
    rows = make(_USERS.value, _ITEMS.value, _SEED.value)
    write(Path(out), rows)
    say(f"{len(rows):,} synthetic interactions of {_USERS.value:,} users written to {out}")


if __name__ == "__main__":
    command_line.run(main)
