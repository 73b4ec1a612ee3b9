"""Evaluation: one compiled step over every held-out batch, summed exactly, divided once."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from lm import metrics
from lm.objectives import Outputs
from lm.types import Batch, Params

EvalStep = Callable[[Params, Batch], Any]


def evaluate(
    eval_step: EvalStep,
    params: Params,
    batches: Iterable[dict[str, np.ndarray]],
    place: Callable[[dict[str, np.ndarray]], Batch],
    num_rows: int,
) -> tuple[dict[str, float], Outputs]:
    """Metric name -> value over all batches, and the objective's outputs of each row once, in order.

    Args:
      eval_step: (params, batch) -> (name -> (sum, weight), name -> [B, ...]), compiled.
      params: what to evaluate.
      batches: this process's rows of each batch; rows of weight 0 fill up the last one and count nothing.
      place: makes global arrays of a batch.
      num_rows: how many rows of all batches are real.
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
    return metrics.finalize(total), {name: np.concatenate([o[name] for o in outputs])[:num_rows] for name in names}
