"""Writes a made-up table of interactions, to try next-item recommendation on. The data is synthetic.

python tools/make_interactions.py OUT.csv [--users=2000] [--items=500] [--seed=0]

What is chosen next depends on what was chosen last: three times of four it is one of five followers that each item has,
else any item. Items are drawn by a popularity of 1 / place (Zipf), followers too, so that naming the popular ones is
right at times. A user makes 5 to 60 choices, the lengths being skewed as well; the rows are in no order.
"""

import argparse
import csv
from pathlib import Path

import numpy as np

FOLLOWERS, FOLLOWS = 5, 0.75
FEWEST, MOST, MEAN_EXTRA = 5, 60, 12.0
MEAN_GAP = 3600.0  # seconds


def make(users: int, items: int, seed: int) -> list[tuple[str, str, int]]:
    """(user, item, time in seconds) of each choice, in random order; a function of the arguments alone."""
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


def main() -> None:
    """Writes the table that the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT.csv")
    parser.add_argument("--users", type=int, default=2000)
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = make(args.users, args.items, args.seed)
    write(args.out, rows)
    print(f"{len(rows):,} synthetic interactions of {args.users:,} users written to {args.out}")


if __name__ == "__main__":
    main()
