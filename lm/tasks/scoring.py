"""What an objective makes of its outputs: functions (outputs, meta of the rows, config) -> metric name -> value.

`outputs` are those of every held-out row, once and in order. Tagging and span questions, which need the texts, have
theirs beside what made the rows: `lm.tasks.tagging`, `lm.tasks.span_qa`.
"""

from typing import Any

import numpy as np

from lm.config import Config
from lm.evaluation import scores
from lm.tasks import multitask
from lm.types import Outputs


def classes(outputs: Outputs, meta: list[Any], cfg: Config) -> dict[str, float]:
    """Of one label for each row."""
    del meta
    return scores.classification(outputs["label"], outputs["prediction"], len(cfg.data.labels))


def numbers(outputs: Outputs, meta: list[Any], cfg: Config) -> dict[str, float]:
    """Of one number for each row."""
    del meta, cfg
    return scores.regression(outputs["label"], outputs["prediction"])


def parts(outputs: Outputs, meta: list[Any], cfg: Config) -> dict[str, float]:
    """What each task alone would report, under 'TASK_...', and 'mean_score': the mean over the tasks of their accuracy,
    or Pearson correlation where they have numbers. A task without a row scores nothing and is not in the mean."""
    del meta
    values: dict[str, float] = {}
    main: list[float] = []
    for i, part in enumerate(multitask.parts(cfg.data.labels)):
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


def views(outputs: Outputs, meta: list[Any], cfg: Config) -> dict[str, float]:
    """Of two vectors for each row that should be alike."""
    del meta, cfg
    return scores.views(outputs["first"], outputs["second"])


def ranks(outputs: Outputs, meta: list[Any], cfg: Config) -> dict[str, float]:
    """Of the model, and of who names the items that were chosen most often, whoever asks."""
    del cfg
    by_popularity = scores.ranking(np.array(meta))
    return scores.ranking(outputs["rank"]) | {f"popularity_{name}": value for name, value in by_popularity.items()}


# What each of them gives, known before a run: config -> names.


def class_names(cfg: Config) -> tuple[str, ...]:
    """Of `classes`."""
    return ("f1", "matthews")


def number_names(cfg: Config) -> tuple[str, ...]:
    """Of `numbers`."""
    return ("pearson", "spearman")


def view_names(cfg: Config) -> tuple[str, ...]:
    """Of `views`."""
    return ("alignment", "uniformity")


def rank_names(cfg: Config) -> tuple[str, ...]:
    """Of `ranks`."""
    return ("hr_at_10", "ndcg_at_10", "popularity_hr_at_10", "popularity_ndcg_at_10")


def part_names(cfg: Config) -> tuple[str, ...]:
    """Of `parts`."""
    own = [
        f"{part.name}_{name}"
        for part in multitask.parts(cfg.data.labels)
        for name in (class_names(cfg) if part.classes else number_names(cfg))
    ]
    return (*own, "mean_score")
