"""Classification and regression on several tasks at once; labels begin with their task: 'sst2/1', 'stsb/3.8'."""

import dataclasses
import itertools
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm import losses
from lm.config import Config, schema
from lm.config.schema import ConfigError, nearest
from lm.data.example import Columns, Example, Rows
from lm.data.labels import number
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
    probabilities,
    sequence_columns,
)
from lm.tasks.classification import (
    LEAST_LEN,
    class_score_names,
    encode_pair,
    number_score_names,
    sentence_columns,
    sentences,
)
from lm.types import Apply, Batch, Head, LossFn, LossTerms, Outputs, Params


@dataclasses.dataclass(frozen=True)
class MultitaskOptions:
    """Options of a mixture of tasks."""

    name: str = "multitask"
    # 'TASK/LABEL' for each label of each task, 'TASK/' for a regression task
    labels: tuple[str, ...] = schema.about_data(())


class Part(NamedTuple):
    """One of the tasks.

    Attributes:
      name: prefix of its labels.
      classes: its labels without the prefix; () = regression.
      first: index of its first column in the head; it has one for each class, or a single one for regression.
    """

    name: str
    classes: tuple[str, ...]
    first: int


def parts(labels: tuple[str, ...]) -> list[Part]:
    """The tasks that `task.labels` lists: 'NAME/CLASS' for each class, 'NAME/' for a regression task.

    Worked: ('sst2/0', 'sst2/1', 'stsb/') -> Part('sst2', ('0', '1'), 0), Part('stsb', (), 2).

    Raises:
      ConfigError: a label has another form, or the labels of a task are not adjacent.
    """
    found: list[Part] = []
    first = 0
    for name, own in itertools.groupby(labels, lambda label: label.partition("/")[0]):
        classes = tuple(label.partition("/")[2] for label in own)
        is_number = classes == ("",) and f"{name}/" in labels
        if not name or not (is_number or (len(classes) > 1 and all(classes))):
            raise ConfigError(
                f"'task.labels': task '{name}' has the labels {classes}; expected two or more of the form "
                f"'{name or 'NAME'}/CLASS', or '{name or 'NAME'}/' alone for a regression task"
            )
        if name in {part.name for part in found}:
            raise ConfigError(f"'task.labels': the labels of task '{name}' must be adjacent")
        found.append(Part(name, () if is_number else classes, first))
        first += len(classes)
    return found


def mixed_sentences(record: Record, tokenizer: Tokenizer, cfg: Config, counts: Counter[str]) -> list[Example]:
    """A sentence or a pair with its task and its label: the index of a class within its task, or a number.

    Counts the examples of each task, under the task's name.


    Raises:
      DataError: the task or the label is unknown; the message names the record.
    """
    known = parts(cfg.task.labels)
    name, _, label = record["label"].partition("/")
    place = next((i for i, part in enumerate(known) if part.name == name), None)
    if place is None:
        names = [part.name for part in known]
        hint = nearest(name, names)
        raise DataError(f"{record['source']}: label {record['label']!r} is of no task among {', '.join(names)}{hint}")
    value = _value(label, known[place])
    if not np.isfinite(value):
        expected = f"one of {', '.join(known[place].classes)}" if known[place].classes else "a finite number"
        raise DataError(f"{record['source']}: label {record['label']!r}; expected {expected} after '{name}/'")
    counts[name] += 1
    columns = encode_pair(record["text"], record.get("text_pair"), tokenizer, cfg.data.seq_len, counts)
    return [Example(columns | {"labels": np.array(value, np.float32), "part": np.array(place, np.int32)})]


def _value(label: str, part: Part) -> float:
    if part.classes:
        return part.classes.index(label) if label in part.classes else np.nan
    return number(label)


def multitask_loss(apply: Apply, cfg: Config, tokenizer: Any) -> LossFn:
    """Cross-entropy or squared error by the task of each row; each task has its own columns of the head (MT-DNN, Liu
    et al. 2019).

    The losses of all rows of a batch are summed, whichever tasks they belong to.

    Metrics:
      TASK_loss, and TASK_accuracy for a classification task: over the rows of that task.
    """
    del tokenizer
    known = parts(cfg.task.labels)

    def loss_fn(params: Params, batch: Batch, rng: jax.Array | None) -> LossTerms:
        logits_BxC = apply(params, batch, rng=rng).head
        labels_B, part_B, weights_B = batch["labels"], batch["part"], batch["row_weights"]
        total, found, said_B = jnp.zeros(()), {}, jnp.zeros_like(labels_B)
        for i, part in enumerate(known):
            own_B = jnp.where(part_B == i, weights_B, 0)
            if part.classes:
                columns = slice(part.first, part.first + len(part.classes))
                classes_B, smoothing = labels_B.astype(jnp.int32), cfg.loss.label_smoothing
                terms = losses.class_cross_entropy(logits_BxC[:, columns], classes_B, own_B, label_smoothing=smoothing)
                found[f"{part.name}_accuracy"] = terms.metrics["accuracy"]
            else:
                terms = losses.squared_error(logits_BxC[:, part.first], labels_B, own_B)
            found[f"{part.name}_loss"] = (terms.sum, terms.weight)
            total += terms.sum
            said_B = jnp.where(part_B == i, terms.outputs["prediction"].astype(jnp.float32), said_B)
        outputs = {"prediction": said_B, "label": labels_B, "part": part_B}
        return LossTerms(total, weights_B.sum(), found, outputs)

    return loss_fn


def part_scores(outputs: Outputs, meta: list[Any], cfg: Config) -> dict[str, float]:
    """The scores of each task, under 'TASK_...', and 'mean_score': the mean over tasks of the accuracy (classification)
    or Pearson correlation (regression). A task without rows has no scores and is not in the mean."""
    del meta
    values: dict[str, float] = {}
    main: list[float] = []
    for i, part in enumerate(parts(cfg.task.labels)):
        labels, said = (outputs[name][outputs["part"] == i] for name in ("label", "prediction"))
        if not labels.size:
            continue
        if part.classes:
            found = scores.classification(labels.astype(int), said.astype(int), len(part.classes))
            main.append(scores.accuracy(labels, said))
        else:
            found = scores.regression(labels, said)
            main.append(found["pearson"])
        values |= {f"{part.name}_{name}": value for name, value in found.items()}
    return values | {"mean_score": float(np.mean(main))}


def part_score_names(cfg: Config) -> tuple[str, ...]:
    """The names of `part_scores`."""
    own = [
        f"{part.name}_{name}"
        for part in parts(cfg.task.labels)
        for name in (class_score_names(cfg) if part.classes else number_score_names(cfg))
    ]
    return (*own, "mean_score")


def _of_each_task(outputs: Outputs, meta: list[Any], record: Record, cfg: Config, tokenizer: Any) -> dict[str, Any]:
    """What each of the tasks says of the sentence: name -> class or number; name -> probabilities of the classes."""
    said, shares = {}, {}
    for part in parts(cfg.task.labels):
        own_C = outputs["head"][0, part.first : part.first + max(1, len(part.classes))]
        if part.classes:
            found = probabilities(own_C, part.classes)
            said[part.name], shares[part.name] = found["prediction"], found["probabilities"]
        else:
            said[part.name] = float(own_C[0])
    return {"prediction": said, "probabilities": shares}


def _columns(cfg: Config) -> Columns:
    columns = sequence_columns(("tokens", "type_ids"), cfg.data.seq_len)
    return columns | {"labels": ((), np.float32), "part": ((), np.int32)}


def _lacks(rows: Rows, cfg: Config) -> str:
    for place, part in enumerate(parts(cfg.task.labels)):
        labels = rows["labels"][rows["part"] == place]
        if len(labels) and (labels == labels[0]).all():
            return f"all {len(labels):,} rows of task '{part.name}' have one label; expected two or more"
    return ""


def _check(cfg: Config) -> None:
    check_labels(cfg)
    parts(cfg.task.labels)


def _unit(cfg: Config, prefix: str) -> str:
    return "squared error per example" if f"{prefix}/" in cfg.task.labels else "nats per example"


MULTITASK = Task(
    name="multitask",
    models=TEXT_MODELS,
    fields=("text", "label"),
    examples=mixed_sentences,
    columns=_columns,
    texts=field_texts("text", "text_pair"),
    loss=multitask_loss,
    loss_unit="nats or squared error per example",
    legend="The model learns from each row as a whole.",
    options=MultitaskOptions,
    least_len=LEAST_LEN,
    check=_check,
    wanted=lambda cfg: Wanted(cfg.task.name, "mixed", cfg.task.labels),
    lacks=_lacks,
    head=lambda cfg: Head("pooled", sum(len(part.classes) or 1 for part in parts(cfg.task.labels))),
    scores=part_scores,
    score_names=part_score_names,
    predictor=Predictor(("label",), sentences, sentence_columns, head_outputs, _of_each_task),
    loss_options=("label_smoothing",),
    unit_of=_unit,
)
