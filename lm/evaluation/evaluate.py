"""Evaluation: one compiled step over every held-out batch, summed exactly, divided once."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from lm.config import Config, TrainConfig
from lm.evaluation import metrics
from lm.types import Batch, Outputs, Params

EvalStep = Callable[[Params, Batch], Any]


class Waiting(NamedTuple):
    """The state of early stopping, kept in checkpoints.

    Attributes:
      best: value of `checkpoint.best_metric` that counted as better than all before it; None = no evaluation yet.
      evaluations: how many there were since.
    """

    best: float | None = None
    evaluations: int = 0

    def is_over(self, cfg: TrainConfig) -> bool:
        """Whether to stop: `train.patience[0]` evaluations brought nothing better; never, where it is 0."""
        return 0 < cfg.patience[0] <= self.evaluations


def wait(waiting: Waiting, values: dict[str, float], cfg: Config) -> Waiting:
    """The state after an evaluation. Better = better by more than `train.patience[1]`; NaN never is.

    Example, patience (2, 0.1), losses 3.0 2.0 2.1 1.99: stops after the fourth, 1.99 being no better.
    """
    name = cfg.checkpoint.best_metric
    value = values.get(name, math.nan)  # a metric of weight 0 is left out
    if math.isnan(value):
        return waiting._replace(evaluations=waiting.evaluations + 1)
    if waiting.best is None or metrics.gain(name, value - waiting.best) > cfg.train.patience[1]:
        return Waiting(value, 0)
    return Waiting(waiting.best, waiting.evaluations + 1)


def evaluate(
    eval_step: EvalStep,
    params: Params,
    place: Callable[[dict[str, np.ndarray]], Batch],
    batches: Iterable[dict[str, np.ndarray]],
    num_rows: int,
) -> tuple[metrics.Sums, Outputs]:
    """Metric name -> (sum, weight) over all batches, and the objective's outputs of each row once, in order.

    Args:
      eval_step: (params, batch) -> (name -> (sum, weight), name -> [B, ...]), compiled.
      params: what to evaluate.
      place: makes global arrays of a batch.
      batches: this process's rows of each batch; rows of weight 0 fill up the last one and count nothing.
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
    return total, {name: np.concatenate([o[name] for o in outputs])[:num_rows] for name in names}
