"""How sure scores are, and what is behind them: bootstrap intervals, McNemar's test, per-class tables, calibration."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

LEVEL = 0.95  # of intervals
BINS = 15  # of the calibration error, as in Guo et al. 2017


def resampled(
    scorer: Callable[[np.ndarray], dict[str, float]], number: int, draws: Iterable[int], seed: int
) -> dict[str, np.ndarray]:
    """Scores of bootstrap resamples (Efron 1979): `number` examples drawn with replacement, once for each of `draws`.

    Two models that are scored with the same seed on the same number of examples are scored on the same resamples.

    Args:
      scorer: examples, int64 [n] -> name -> score.
      number: of examples.
      draws: one item for each resample.
      seed: of the draws.

    Returns:
      Name -> float64 [resamples]; NaN where a resample has no such score.
    """
    rng = np.random.default_rng(seed)
    found = [scorer(rng.integers(number, size=number)) for _ in draws]
    names = dict.fromkeys(name for scores in found for name in scores)
    return {name: np.array([scores.get(name, np.nan) for scores in found], np.float64) for name in names}


def interval(values_S: np.ndarray) -> tuple[float, float]:
    """The percentile interval of `LEVEL` of resampled scores; NaN is left out."""
    finite_S = values_S[~np.isnan(values_S)]
    if not finite_S.size:
        return float("nan"), float("nan")
    low, high = np.quantile(finite_S, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def mcnemar(first_E: np.ndarray, second_E: np.ndarray) -> dict[str, float]:
    """McNemar's exact test (1947) that two models are right equally often, by the examples on which they differ.

    Args:
      first_E, second_E: bool, whether each model is right.

    Returns:
      'only_first' and 'only_second': the numbers of examples on which only one is right; 'p_value', two-sided.
    """
    from scipy import stats

    only_first, only_second = int((first_E & ~second_E).sum()), int((second_E & ~first_E).sum())
    differ = only_first + only_second
    p_value = float(stats.binomtest(only_first, differ, 0.5).pvalue) if differ else 1.0
    return {"only_first": only_first, "only_second": only_second, "p_value": p_value}


def class_table(labels_R: np.ndarray, predictions_R: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Precision, recall and F1 of each class (0 where undefined) with its 'support', and the confusion matrix.

    Args:
      labels_R, predictions_R: int, in [0, len(names)).
      names: of the classes.

    Returns:
      'classes': name -> its scores; 'confusion': counts, a row for each right class, a column for each predicted one.
    """
    confusion = np.zeros((len(names), len(names)), np.int64)
    np.add.at(confusion, (labels_R.astype(np.int64), predictions_R.astype(np.int64)), 1)
    hits, actual, said = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    precision, recall = hits / np.maximum(said, 1), hits / np.maximum(actual, 1)
    f1 = 2 * hits / np.maximum(actual + said, 1)
    columns = zip(names, precision.tolist(), recall.tolist(), f1.tolist(), actual.tolist(), strict=True)
    classes = {name: {"precision": p, "recall": r, "f1": f, "support": n} for name, p, r, f, n in columns}
    return {"classes": classes, "confusion": confusion.tolist()}


def calibration(confidence_R: np.ndarray, is_right_R: np.ndarray) -> dict[str, Any]:
    """Expected calibration error of the predicted class (Guo et al. 2017), over `BINS` bins of equal width.

    Args:
      confidence_R: probability of the predicted class, in (0, 1]; a bin includes its upper edge.
      is_right_R: bool.

    Returns:
      'ece': the mean over examples of |confidence - accuracy| of their bin; 'bins': for each that is not empty, its
      'from' and 'to', 'count', mean 'confidence' and 'accuracy'.
    """
    bin_R = np.clip(np.ceil(confidence_R * BINS).astype(np.int64) - 1, 0, BINS - 1)
    bins, ece = [], 0.0
    for i in np.unique(bin_R).tolist():
        inside = bin_R == i
        confidence, accuracy = float(confidence_R[inside].mean()), float(is_right_R[inside].mean())
        ece += inside.sum() / len(bin_R) * abs(confidence - accuracy)
        edges = {"from": i / BINS, "to": (i + 1) / BINS}
        bins.append(edges | {"count": int(inside.sum()), "confidence": confidence, "accuracy": accuracy})
    return {"ece": float(ece), "bins": bins}
