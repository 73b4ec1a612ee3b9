"""Evaluation: one compiled step over every held-out batch, summed exactly, divided once."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from lm import metrics
from lm.types import Batch, Params

EvalStep = Callable[[Params, Batch], Any]


def evaluate(
    eval_step: EvalStep,
    params: Params,
    batches: Iterable[dict[str, np.ndarray]],
    place: Callable[[dict[str, np.ndarray]], Batch],
) -> dict[str, float]:
    """Metric name -> value over all batches.

    Args:
      eval_step: (params, batch) -> name -> (sum, weight), compiled.
      params: what to evaluate.
      batches: this process's rows of each batch; rows of weight 0 fill up the last one and count nothing.
      place: makes global arrays of a batch.
    """
    total: metrics.Sums = {}
    in_flight: Any = None  # fetched while the next batch computes
    for batch in batches:
        result = eval_step(params, place(batch))
        if in_flight is not None:
            total = metrics.add(total, jax.device_get(in_flight))
        in_flight = result
    if in_flight is not None:
        total = metrics.add(total, jax.device_get(in_flight))
    return metrics.finalize(total)
