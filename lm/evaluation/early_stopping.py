"""Early stopping: a run ends when a number of evaluations in a row brought no improvement."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from lm.config import TrainConfig
from lm.evaluation import metrics


class EarlyStopping(NamedTuple):
    """The state of early stopping, kept in checkpoints.

    Attributes:
      best: the best value of the metric so far; None before the first evaluation.
      evaluations: how many evaluations there were since, none of which improved on it.
    """

    best: float | None = None
    evaluations: int = 0

    def should_stop(self, cfg: TrainConfig) -> bool:
        """Whether `train.early_stopping.patience` evaluations in a row brought no improvement; never where it is 0."""
        return 0 < cfg.early_stopping.patience <= self.evaluations

    def update(self, values: Mapping[str, float], metric: str, cfg: TrainConfig) -> "EarlyStopping":
        """The state after an evaluation.

        An improvement is one by more than `train.early_stopping.min_delta`; NaN is none, nor is a missing value.
        Example, patience 2, min_delta 0.1, losses 3.0 2.0 2.1 1.99: stops after the fourth, as 1.99 is not better
        than 2.0 by 0.1.

        Args:
          values: metrics of the evaluation; one that was measured on nothing is missing.
          metric: `checkpoint.best_metric`.
          cfg: the section `train`.
        """
        value = values.get(metric, math.nan)
        if math.isnan(value):
            return self._replace(evaluations=self.evaluations + 1)
        if self.best is None or metrics.gain(metric, value - self.best) > cfg.early_stopping.min_delta:
            return EarlyStopping(value, 0)
        return EarlyStopping(self.best, self.evaluations + 1)
