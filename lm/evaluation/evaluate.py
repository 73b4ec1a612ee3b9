"""Evaluation: one compiled step over every held-out batch; metrics are summed, and divided once at the end."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from lm.evaluation import metrics
from lm.types import Batch, Outputs, Params

EvalStep = Callable[[Params, Batch], Any]


def evaluate(
    eval_step: EvalStep,
    params: Params,
    place: Callable[[dict[str, np.ndarray]], Batch],
    batches: Iterable[dict[str, np.ndarray]],
    num_rows: int,
) -> tuple[metrics.Sums, Outputs]:
    """Runs an evaluation step over all batches.

    Args:
      eval_step: (params, batch) -> (name -> (sum, weight), name -> [B, ...]), compiled.
      params: what to evaluate.
      place: makes global arrays of a batch.
      batches: this process's rows of each batch; the last one is padded with rows of weight 0, which count for nothing.
      num_rows: number of rows that are not padding.

    Returns:
      Metric name -> (sum, weight) over all batches, and the task's outputs, name -> [num_rows, ...], in the order
      of the rows.
    """
    total: metrics.Sums = {}
    outputs: list[Outputs] = []

    def collect(result: Any) -> None:
        nonlocal total
        sums, out = jax.device_get(result)
        total = metrics.add(total, sums)
        outputs.append(out)

    in_flight: Any = None  # fetched while the next batch computes
    for batch in batches:
        result = eval_step(params, place(batch))
        if in_flight is not None:
            collect(in_flight)
        in_flight = result
    if in_flight is not None:
        collect(in_flight)
    names = outputs[0] if outputs else {}
    return total, {name: np.concatenate([o[name] for o in outputs])[:num_rows] for name in names}
