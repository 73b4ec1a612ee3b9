"""Classification and regression of single sentences and sentence pairs."""

import dataclasses
from collections import Counter
from typing import Any

import jax
import numpy as np

from lm import losses
from lm.config import Config, schema
from lm.config.schema import ConfigError
from lm.data import labels
from lm.data.example import Columns, Example
from lm.data.record import DataError, Record, Wanted
from lm.data.tokenizer import Tokenizer
from lm.evaluation import scores
from lm.tasks.base import (
    TEXT_MODELS,
    Predictor,
    Task,
    check_labels,
    field_texts,
    head_outputs,
    label_index,
    one_label,
    probabilities,
    sequence_columns,
    two_views,
)
from lm.types import Apply, Batch, Head, LossFn, LossTerms, Outputs, Params


@dataclasses.dataclass(frozen=True)
class ClassificationOptions:
    """Options of classification."""

    name: str = "classification"
    labels: tuple[str, ...] = schema.about_data(())  # all labels; the index of a label is its position here
    r_drop: float = 0.0  # weight of the divergence between two dropout masks (R-Drop, Liang et al. 2021); 0 = off


LEAST_LEN = 3  # [CLS] x [SEP]


def encode_pair(
    first: str, second: str | None, tokenizer: Tokenizer, seq_len: int, counts: Counter[str]
) -> dict[str, np.ndarray]:
    """[CLS] first [SEP], or [CLS] first [SEP] second [SEP]; BOS stands for [CLS] and EOS for [SEP].

    Between the two are the tokenizer's `separator_ids`, of a RoBERTa's two [SEP].

    Longer than `seq_len`: ids are removed one at a time from the end of the longer sentence, counted as 'sentence_cut'.

    Returns:
      tokens and type_ids, int32 [n], n at most seq_len; type_ids are 1 from the second sentence on.

    Raises:
      ConfigError: a row does not hold a token of each.
    """
    after_first = [tokenizer.eos_id] if second is None else tokenizer.separator_ids
    marks = 1 + len(after_first) + (second is not None)
    if seq_len < (least := marks + 1 + (second is not None)):
        raise ConfigError(f"'data.seq_len' is {seq_len}; expected at least {least}, to hold text between its marks")
    a = tokenizer.encode(first)
    b = tokenizer.encode(second) if second is not None else []
    room = seq_len - marks
    excess = len(a) + len(b) - room
    if excess > 0:
        counts["sentence_cut"] += 1
        # The longer one is cut to the length of the other first, then both are cut equally.
        keep_a = min(len(a), max(room - len(b), (room + 1) // 2))
        a, b = a[:keep_a], b[: room - keep_a]
    ids = [tokenizer.bos_id, *a, *after_first]
    types = [0] * len(ids)
    if second is not None:
        ids += [*b, tokenizer.eos_id]
        types += [1] * (len(b) + 1)
    return {"tokens": np.array(ids, np.int32), "type_ids": np.array(types, np.int32)}


def sentences(record: Record, tokenizer: Tokenizer, cfg: Config, counts: Counter[str]) -> list[Example]:
    """A sentence or a pair, without a label."""
    return [Example(encode_pair(record["text"], record.get("text_pair"), tokenizer, cfg.data.seq_len, counts))]


def labelled_sentences(record: Record, tokenizer: Tokenizer, cfg: Config, counts: Counter[str]) -> list[Example]:
    """A sentence or a pair with the index of its label."""
    (example,) = sentences(record, tokenizer, cfg, counts)
    return [Example(example.columns | {"labels": np.array(label_index(record["label"], record, cfg), np.int32)})]


def scored_sentences(record: Record, tokenizer: Tokenizer, cfg: Config, counts: Counter[str]) -> list[Example]:
    """A sentence or a pair with a number. Raises DataError, naming the record, if it is not finite."""
    score = labels.number(record["label"])
    if np.isnan(score):
        raise DataError(f"{record['source']}: found the label {record['label']!r}; expected a finite number")
    (example,) = sentences(record, tokenizer, cfg, counts)
    return [Example(example.columns | {"labels": np.array(score, np.float32)})]


def sentence_columns(cfg: Config) -> Columns:
    """Columns of a sentence or a pair, without a label."""
    return sequence_columns(("tokens", "type_ids"), cfg.data.seq_len)


def _columns(cfg: Config, label: type) -> Columns:
    return sentence_columns(cfg) | {"labels": ((), label)}


def likely_label(outputs: Outputs, meta: list[Any], record: Record, cfg: Config, tokenizer: Any) -> dict[str, Any]:
    """The label with the largest logit, and the probabilities of all labels."""
    del meta, record, tokenizer
    return probabilities(outputs["head"][0], cfg.task.labels)


def _number(outputs: Outputs, meta: list[Any], record: Record, cfg: Config, tokenizer: Any) -> dict[str, Any]:
    return {"prediction": float(outputs["head"][0, 0])}


def classification_loss(apply: Apply, cfg: Config, tokenizer: Any) -> LossFn:
    """Cross-entropy over `task.labels`, one label a row; with `task.r_drop`, under two dropout masks while training."""
    del tokenizer

    def loss_fn(params: Params, batch: Batch, rng: jax.Array | None) -> LossTerms:
        twice = rng is not None and cfg.task.r_drop > 0
        if twice:
            batch = two_views(batch)
        logits_BxC = apply(params, batch, rng=rng).head
        labels_B, weights_B = batch["labels"], batch["row_weights"]
        terms = losses.class_cross_entropy(logits_BxC, labels_B, weights_B, label_smoothing=cfg.loss.label_smoothing)
        if twice:
            divergence = losses.symmetric_divergence(logits_BxC[::2], logits_BxC[1::2], weights_B[::2])
            # The two views of a row have weight 2 in all, so the divergence of the pair counts twice too.
            terms = terms._replace(sum=terms.sum + 2 * cfg.task.r_drop * divergence)
        return terms._replace(outputs=terms.outputs | {"label": labels_B})

    return loss_fn


def regression_loss(apply: Apply, cfg: Config, tokenizer: Any) -> LossFn:
    """Squared error, one number a row."""
    del cfg, tokenizer

    def loss_fn(params: Params, batch: Batch, rng: jax.Array | None) -> LossTerms:
        head_Bx1 = apply(params, batch, rng=rng).head
        terms = losses.squared_error(head_Bx1[:, 0], batch["labels"], batch["row_weights"])
        return terms._replace(outputs=terms.outputs | {"label": batch["labels"]})

    return loss_fn


def class_scores(outputs: Outputs, meta: list[Any], cfg: Config) -> dict[str, float]:
    """F1 and Matthews correlation, one label a row; see `scores.classification`."""
    del meta
    return scores.classification(outputs["label"], outputs["prediction"], len(cfg.task.labels))


def class_score_names(cfg: Config) -> tuple[str, ...]:
    """The names of `class_scores`."""
    del cfg
    return ("f1", "matthews")


def number_scores(outputs: Outputs, meta: list[Any], cfg: Config) -> dict[str, float]:
    """Pearson and Spearman correlation, one number a row."""
    del meta, cfg
    return scores.regression(outputs["label"], outputs["prediction"])


def number_score_names(cfg: Config) -> tuple[str, ...]:
    """The names of `number_scores`."""
    del cfg
    return ("pearson", "spearman")


def check_classes(cfg: Config) -> None:
    """Raises ConfigError if labels are missing or listed twice, or for R-Drop without dropout."""
    check_labels(cfg)
    if not cfg.task.r_drop >= 0:
        raise ConfigError(f"'task.r_drop' must not be negative, got {cfg.task.r_drop}")
    if cfg.task.r_drop and not cfg.model.dropout:
        raise ConfigError("'task.r_drop' compares two dropout masks, but 'model.dropout' is 0")


_TEXTS = field_texts("text", "text_pair")

CLASSIFICATION = Task(
    name="classification",
    models=TEXT_MODELS,
    fields=("text", "label"),
    examples=labelled_sentences,
    columns=lambda cfg: _columns(cfg, np.int32),
    texts=_TEXTS,
    loss=classification_loss,
    loss_unit="nats per example",
    legend="The model learns from each row as a whole.",
    options=ClassificationOptions,
    least_len=LEAST_LEN,
    check=check_classes,
    wanted=lambda cfg: Wanted(cfg.task.name, "class", cfg.task.labels),
    lacks=lambda rows, cfg: one_label(rows, cfg.task.labels),
    head=lambda cfg: Head("pooled", len(cfg.task.labels)),
    scores=class_scores,
    score_names=class_score_names,
    predictor=Predictor(("label",), sentences, sentence_columns, head_outputs, likely_label),
    loss_options=("label_smoothing",),
)
REGRESSION = Task(
    name="regression",
    models=TEXT_MODELS,
    fields=("text", "label"),
    examples=scored_sentences,
    columns=lambda cfg: _columns(cfg, np.float32),
    texts=_TEXTS,
    loss=regression_loss,
    loss_unit="squared error per example",
    legend="The model learns from each row as a whole.",
    least_len=LEAST_LEN,
    wanted=lambda cfg: Wanted(cfg.task.name, "number"),
    lacks=lambda rows, cfg: one_label(rows),
    head=lambda cfg: Head("pooled", 1),
    scores=number_scores,
    score_names=number_score_names,
    predictor=Predictor(("label",), sentences, sentence_columns, head_outputs, _number),
)
