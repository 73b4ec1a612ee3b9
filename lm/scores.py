"""Scores of all held-out rows together, by well-kept libraries. Arrays or texts in, name -> value out, never NaN."""

import importlib
import re
import string
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from lm.schema import ConfigError


def accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Share of equal entries of two arrays of one shape, 0 where there are none."""
    return float(np.mean(labels == predictions)) if labels.size else 0.0


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
    """'pearson' and 'spearman' correlation, 0 where one side is constant or of one row."""
    from scipy import stats

    if len(labels_R) < 2:
        return {"pearson": 0.0, "spearman": 0.0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        found = {
            "pearson": stats.pearsonr(labels_R, predictions_R),
            "spearman": stats.spearmanr(labels_R, predictions_R),
        }
    return {name: float(np.nan_to_num(result.statistic)) for name, result in found.items()}


def entities(expected: list[list[str]], predicted: list[list[str]]) -> dict[str, float]:
    """'entity_precision', 'entity_recall' and 'entity_f1' over all entities, by exact span and type; 0 where undefined.

    As conlleval counts (seqeval's default): an I- tag that continues no entity of its type begins one.

    Args:
      expected, predicted: BIO tags of each sentence.

    Raises:
      ConfigError: seqeval is not installed.
    """
    seqeval = _library("seqeval.metrics.sequence_labeling")
    values = seqeval.precision_recall_fscore_support(expected, predicted, average="micro", zero_division=0)
    return dict(zip(("entity_precision", "entity_recall", "entity_f1"), map(float, values), strict=False))


def ranking(ranks_R: np.ndarray, at: int = 10) -> dict[str, float]:
    """'hr_at_10', the share of rows whose one right answer is in the first ten places, and 'ndcg_at_10', which counts
    it 1 / log2(1 + place); 0 where there are no rows.

    Args:
      ranks_R: int [R], the place of the right answer, from 1.
      at: the ten.
    """
    hits_R = ranks_R <= at
    gains_R = np.where(hits_R, 1 / np.log2(1 + ranks_R.astype(np.float64)), 0)
    both = {f"hr_at_{at}": hits_R, f"ndcg_at_{at}": gains_R}
    return {name: float(values.mean()) if values.size else 0.0 for name, values in both.items()}


def answers(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """'exact_match' and 'f1' over words, of 0 to 1, as the evaluation of SQuAD v1.1 (Rajpurkar et al. 2016) has them.

    Args:
      predictions: one text a question.
      references: the accepted answers of each question, the best of which counts.
    """
    best = [
        np.max([(_normal(said) == _normal(text), _overlap_f1(said, text)) for text in texts], axis=0)
        for said, texts in zip(predictions, references, strict=True)
    ]
    exact_match, f1 = np.mean(best, axis=0) if best else (0.0, 0.0)
    return {"exact_match": float(exact_match), "f1": float(f1)}


def _normal(text: str) -> str:
    """Lower case, without punctuation (ASCII), English articles and surplus white space."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _overlap_f1(said: str, text: str) -> float:
    said_words, words = _normal(said).split(), _normal(text).split()
    common = sum((Counter(said_words) & Counter(words)).values())
    return 2 * common / (len(said_words) + len(words)) if common else 0.0


def translation(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """'bleu' and 'chrf' of a corpus, of 0 to 100, by sacrebleu with its defaults (Post 2018); 0 for no sentences.

    Raises:
      ConfigError: sacrebleu is not installed.
    """
    sacrebleu = _library("sacrebleu")
    if not predictions:
        return {"bleu": 0.0, "chrf": 0.0}
    both = list(predictions), [list(references)]
    return {"bleu": float(sacrebleu.corpus_bleu(*both).score), "chrf": float(sacrebleu.corpus_chrf(*both).score)}


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ConfigError(f"this score needs the package {package} ({error}): pip install 'lm[scores]'") from None


def views(first_RxP: np.ndarray, second_RxP: np.ndarray) -> dict[str, float]:
    """How near the two views of a row are, and how evenly all rows fill the sphere (Wang and Isola 2020, section 4.1).

    Args:
      first_RxP, second_RxP: a vector for each view; only its direction counts.

    Returns:
      'alignment': mean squared distance of a row's views; 'uniformity': logarithm of the mean of exp(-2 distance^2)
      over all pairs of rows, of their first views; 0 where there is one row. Less is better of both.
    """
    first_RxP, second_RxP = (
        x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-6) for x in (first_RxP, second_RxP)
    )
    rows, total = len(first_RxP), -float(_nearness(np.square(first_RxP).sum(axis=1)).sum(dtype=np.float64))
    for start in range(0, rows, 1024):  # so that not all pairs are held at once
        cosine = first_RxP[start : start + 1024] @ first_RxP.T
        total += float(_nearness(cosine).sum(dtype=np.float64))
    pairs = rows * (rows - 1)
    return {
        "alignment": float(np.square(first_RxP - second_RxP).sum(axis=1).mean()),
        "uniformity": float(np.log(total / pairs)) if pairs else 0.0,
    }


def _nearness(cosine: np.ndarray) -> np.ndarray:
    """exp(-2 distance^2) of two vectors of length 1."""
    return np.exp(4 * (cosine - 1))
