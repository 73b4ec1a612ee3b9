"""Scores of all held-out rows together, by well-kept libraries. Arrays of numpy in, name -> value out."""

import warnings

import numpy as np


def classification(labels_R: np.ndarray, predictions_R: np.ndarray, num_classes: int) -> dict[str, float]:
    """'f1' (of class 1 where there are two, else the mean over classes) and 'matthews', both 0 where undefined.

    Args:
      labels_R, predictions_R: int [R], in [0, num_classes).
      num_classes: of the head.
    """
    confusion = np.zeros((num_classes, num_classes))
    np.add.at(confusion, (labels_R, predictions_R), 1)
    hits, actual, said = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    f1_C = 2 * hits / np.maximum(actual + said, 1)
    total = confusion.sum()
    # Gorodkin (2004): the correlation of one-hot labels and predictions.
    spread = np.sqrt((total**2 - (actual**2).sum()) * (total**2 - (said**2).sum()))
    matthews = (hits.sum() * total - actual @ said) / spread if spread else 0.0
    return {"f1": float(f1_C[1] if num_classes == 2 else f1_C.mean()), "matthews": float(matthews)}


def regression(labels_R: np.ndarray, predictions_R: np.ndarray) -> dict[str, float]:
    """'pearson' and 'spearman' correlation, 0 where one side is constant."""
    from scipy import stats

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        found = {
            "pearson": stats.pearsonr(labels_R, predictions_R),
            "spearman": stats.spearmanr(labels_R, predictions_R),
        }
    return {name: float(np.nan_to_num(result.statistic)) for name, result in found.items()}
