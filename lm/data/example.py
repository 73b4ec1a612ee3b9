"""Types of training examples: one example of a record, rows of a batch, and their columns."""

from typing import Any, NamedTuple

import numpy as np


class Example(NamedTuple):
    """A training example made from one record or a part of it.

    Attributes:
      columns: batch key -> array; padded with 0 at its end to the length of the row.
      meta: what `Task.scores` needs on the host (texts, character offsets); never sent to a device.
    """

    columns: dict[str, np.ndarray]
    meta: Any = None


Row = dict[str, np.ndarray]  # one row of a batch
Rows = dict[str, np.ndarray]  # batch key -> [R, ...], in the smallest dtype that holds the values
Columns = dict[str, tuple[tuple[int, ...], Any]]  # batch key -> (shape of a row, dtype)
