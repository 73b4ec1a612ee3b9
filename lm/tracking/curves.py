"""The curves of a run in bounded memory: one pass over metrics.jsonl, with neighbouring rows merged into one point."""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

MAX_POINTS = 1000  # of a curve; a panel of the report is about 500 pixels wide


class Curve:
    """The values of a metric over steps, or over another axis, as at most `max_points` points.

    Attributes:
      rows_per_point: how many rows of metrics.jsonl with this metric a point stands for, a power of two; the last point
        may stand for fewer.
    """

    def __init__(self, max_points: int = MAX_POINTS) -> None:
        self.rows_per_point = 1
        self._max_points = max_points
        self._rows = 0
        # Rows: number of the point's first row, rows, sum of steps, sum of values, least and greatest value.
        self._points = np.empty((6, 0))
        self.last = np.nan

    def extend(self, steps: np.ndarray, values: np.ndarray) -> None:
        """Adds rows in their order.

        Args:
          steps: float64 [n].
          values: float64 [n], finite, n >= 1.
        """
        numbers = np.arange(self._rows, self._rows + values.size, dtype=np.float64)
        self._points = np.concatenate(
            [self._points, np.stack([numbers, np.ones_like(values), steps, values, values, values])], axis=1
        )
        self._rows, self.last = self._rows + values.size, float(values[-1])
        self._merge()
        while self._points.shape[1] > self._max_points:
            self.rows_per_point *= 2
            self._merge()

    def _merge(self) -> None:
        """Merges the points of each group of `rows_per_point` rows."""
        first, rows, steps, values, low, high = self._points
        starts = np.flatnonzero(np.diff(first // self.rows_per_point, prepend=-1))
        sums = (np.add.reduceat(column, starts) for column in (rows, steps, values))
        self._points = np.stack(
            [first[starts], *sums, np.minimum.reduceat(low, starts), np.maximum.reduceat(high, starts)]
        )

    def points(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Mean step, mean value, least and greatest value of each point, float64 [points] each."""
        _, rows, steps, values, low, high = self._points
        return steps / rows, values / rows, low, high


class Curves(NamedTuple):
    """What a report needs of metrics.jsonl.

    Attributes:
      of: (split, metric) -> its curve.
      last: the last row; {} = there is none.
      last_eval: the last row of an evaluation; {} = there is none.
    """

    of: dict[tuple[str, str], Curve]
    last: Mapping[str, Any]
    last_eval: Mapping[str, Any]


def gather(rows: Iterable[dict[str, Any]], axis: str = "step", max_points: int = MAX_POINTS) -> Curves:
    """The curves of all metrics in rows of metrics.jsonl. Values that are null are left out.

    Args:
      rows: from `files.read_rows`.
      axis: over what: the column 'step' or 'seconds'.
      max_points: of a curve.
    """
    of: dict[tuple[str, str], Curve] = {}
    last: Mapping[str, Any] = {}
    last_eval: Mapping[str, Any] = {}
    rows = iter(rows)
    while chunk := list(itertools.islice(rows, 4096)):
        last = chunk[-1]
        for split in {row["split"] for row in chunk}:
            part = [row for row in chunk if row["split"] == split]
            last_eval = part[-1] if split == "eval" else last_eval
            steps = np.array([row[axis] for row in part], np.float64)
            for name in set().union(*part) - {"step", "split", "seconds"}:
                values = np.array([row.get(name) for row in part], np.float64)  # None becomes NaN
                is_there = np.isfinite(values)
                if is_there.any():
                    of.setdefault((split, name), Curve(max_points)).extend(steps[is_there], values[is_there])
    return Curves(of, last, last_eval)
