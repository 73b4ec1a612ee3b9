"""What records become: examples, rows, and their columns."""

from typing import Any, NamedTuple

import numpy as np


class Example(NamedTuple):
    """What one record, or a part of it, becomes.

    Attributes:
      columns: batch key -> array. One that is shorter than its row is filled up with 0 at its end.
      meta: what scoring needs of it on the host (texts, character offsets); never goes to a device.
    """

    columns: dict[str, np.ndarray]
    meta: Any = None


Row = dict[str, np.ndarray]  # one row of a batch
Rows = dict[str, np.ndarray]  # batch key -> [R, ...], in the smallest dtype that holds the values
Columns = dict[str, tuple[tuple[int, ...], Any]]  # batch key -> (shape of a row, dtype)
