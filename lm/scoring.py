"""Scores of a trained run on a test set, with their uncertainty and what is behind them; comparison of two runs.

The scores are those of training: the loss and `Task.scores`, of one row at a time.
"""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lm import evaluator, input_pipeline, predict
from lm.config import Config, DataConfig
from lm.config.schema import ConfigError
from lm.data import splits
from lm.data.readers import paths, registry
from lm.data.record import DataError, Record
from lm.evaluation import metrics, scores, uncertainty
from lm.files import write_atomic
from lm.predict import LoadedModel
from lm.tasks import base, task_of
from lm.tasks.base import Scorer
from lm.tracking.files import access, finite
from lm.types import Outputs

_WORST = 20  # examples in the JSON
_WORST_SHOWN = 5
_WIDEST = 12  # classes of a confusion matrix that is printed
_INTERVAL = f"{100 * uncertainty.LEVEL:.0f} % interval"
_TEXT_SHOWN = 100  # characters of an example that is printed


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a run scores on a test set of E examples: the records that make a row.

    Attributes:
      loaded: the model.
      data: what was read.
      values: metric -> its value over all examples.
      samples: metric -> its values over bootstrap resamples, [S]; empty if the loss of a row depends on other rows.
      losses_E: mean loss of each example; empty if the loss of a row depends on other rows.
      tables: task of a mixture, or '' -> names, per-class scores and confusion matrix of its classes.
      right_E: whether the class of each example is right; None if examples have no class.
      calibration: see `uncertainty.calibration`; None if examples have no class.
      records: the examples.
      numbers: of each example, the number of its record in the file.
      predictions: of all records, see `predict.predictions`; empty for tasks whose predictions are their losses.
      counts: of records, and of what was cut.
    """

    loaded: LoadedModel
    data: DataConfig
    values: dict[str, float]
    samples: dict[str, np.ndarray]
    losses_E: np.ndarray
    tables: dict[str, dict[str, Any]]
    right_E: np.ndarray | None
    calibration: dict[str, Any] | None
    records: list[Record]
    numbers: list[int]
    predictions: list[dict[str, Any]]
    counts: Counter[str]


def evaluate(
    loaded: LoadedModel,
    data: DataConfig,
    *,
    resamples: int = 1000,
    seed: int = 0,
    beams: int = 4,
    note: Callable[[str], None] = lambda _: None,
) -> Scores:
    """Scores a run on all records of a file.

    Args:
      loaded: the model.
      data: from `eval_sets.data_at`, or `predict.on_set`.
      resamples: of the bootstrap.
      seed: of the bootstrap.
      beams: of translations.
      note: called with messages for the console.

    Raises:
      DataError: a record cannot be read, or none makes a row.
      ConfigError: a record lacks a field, or a score needs a package that is not installed.
    """
    cfg, task = loaded.config, task_of(loaded.config)
    if task.draws_other:
        raise ConfigError(
            f"task.name={task.name} draws a random other record beside each one, which a test set of single records "
            "does not do; its scores are those of the run's own evaluations"
        )
    predict.check_search(loaded, beams)
    records = list(registry.stream(data, task.wanted(cfg), note))
    splits.identify(records)
    note(f"{len(records):,} records in {data.path}")
    bleu_tokenizer = _bleu_tokenizer(cfg, data, records) if task.answers_with_text else ""
    shown = input_pipeline.progress(records, "scoring", len(records))
    numbers, sums, outputs, meta, counts = list[int](), list[metrics.Sums](), list[Outputs](), [], Counter[str]()
    for number, (_, examples, found, own) in enumerate(predict.measured(loaded, shown)):
        counts.update(own)
        if examples:
            numbers.append(number)
            sums.append(predict.sums_of(found))
            outputs.append({name: x for name, x in found.items() if not predict.is_sum(name)})
            meta += [example.meta for example in examples]
    if not numbers:
        raise DataError(f"data path '{data.path}': no record makes a row ({dict(counts)}); expected at least one")
    kept = [records[number] for number in numbers]
    counts["without_row"] = len(records) - len(kept)
    joined = {name: np.concatenate([own[name] for own in outputs]) for name in outputs[0]}

    predictions: list[dict[str, Any]] = []
    if task.predictor or task.answers_with_text:
        shown = input_pipeline.progress(records, "predicting", len(records))
        predictions = list(predict.predictions(loaded, shown, beams=beams))
    said = [predictions[number] for number in numbers] if predictions else []
    scorer = _scorer(cfg, sums, joined, meta, kept, said, bleu_tokenizer)
    whole = np.arange(len(kept))
    samples: dict[str, np.ndarray] = {}
    if not task.couples_rows:
        draws = input_pipeline.progress(range(resamples), "resampling", resamples)
        samples = uncertainty.resampled(scorer, len(kept), draws, seed)
    classes = evaluator.classes(cfg, joined)
    tables = {
        name: {"labels": list(names)} | uncertainty.class_table(labels, predicted, names)
        for name, (labels, predicted, names) in classes.items()
    }
    right, calibrated = None, None
    if "" in classes and said and isinstance(said[0].get("probabilities"), dict):
        labels, predicted, _ = classes[""]
        right = labels == predicted
        confidence = np.array([max(one["probabilities"].values()) for one in said])
        calibrated = uncertainty.calibration(confidence, right)
    losses_E = np.array([own["loss"][0] / own["loss"][1] if own["loss"][1] else math.nan for own in sums])
    return Scores(
        loaded=loaded,
        data=data,
        values=scorer(whole),
        samples=samples,
        losses_E=np.zeros(0) if task.couples_rows else losses_E,
        tables=tables,
        right_E=right,
        calibration=calibrated,
        records=kept,
        numbers=numbers,
        predictions=predictions,
        counts=counts,
    )


def _bleu_tokenizer(cfg: Config, data: DataConfig, records: list[Record]) -> str:
    """The tokenizer of BLEU; raises ConfigError now, and not after the translation, if scores cannot be computed."""
    references = [record[task_of(cfg).answers_with_text] for record in records]
    tokenizer = scores.bleu_tokenizer(cfg.task.bleu_tokenizer, paths.target_side(data.path), references)
    scores.translation_signatures(tokenizer)
    return tokenizer


def _scorer(
    cfg: Config,
    sums: list[metrics.Sums],
    outputs: Outputs,
    meta: list[Any],
    records: list[Record],
    said: list[dict[str, Any]],
    bleu_tokenizer: str,
) -> Scorer:
    """Chosen examples -> all metrics over these, as an evaluation during training reports them."""
    task = task_of(cfg)
    names = [] if task.couples_rows else list(sums[0])
    pair_of = {name: np.array([own[name] for own in sums], np.float64) for name in names}
    number, of_task = len(records), None
    if task.scorer:
        number, of_task = task.scorer(outputs, meta, cfg)
    elif task.scores:
        number, of_task = len(meta), _of_rows(cfg, outputs, meta)
    if number != len(records):
        raise DataError(
            f"task.name={task.name} scores {number:,} examples of {len(records):,} records: expected the same"
        )
    of_texts = None
    if field := task.answers_with_text:
        references = [record[field] for record in records]
        of_texts = scores.translation_scorer([one["prediction"] for one in said], references, bleu_tokenizer)

    def score(chosen: np.ndarray) -> dict[str, float]:
        totals = {name: tuple(pairs_Ex2[chosen].sum(axis=0)) for name, pairs_Ex2 in pair_of.items()}
        found = metrics.finalize(totals, task.has_perplexity)  # type: ignore[arg-type]
        return found | (of_task(chosen) if of_task else {}) | (of_texts(chosen) if of_texts else {})

    return score


def _of_rows(cfg: Config, outputs: Outputs, meta: list[Any]) -> Scorer:
    """`Task.scores` of chosen rows."""
    score = task_of(cfg).scores
    assert score is not None
    return lambda chosen: score({name: x[chosen] for name, x in outputs.items()}, [meta[i] for i in chosen], cfg)


# Reports --------------------------------------------------------------------------------------------------------------


def as_json(found: Scores) -> dict[str, Any]:
    """All of it but the predictions, as JSON; an interval is [low, high]."""
    cfg, task = found.loaded.config, task_of(found.loaded.config)
    return {
        "run": found.loaded.name,
        "data": found.data.path,
        "task": task.name,
        "records": found.counts["documents"],
        "counts": {name: count for name, count in found.counts.items() if count},
        "metrics": {
            name: {"value": value, "unit": base.about(task, cfg, name).unit}
            | ({"interval": list(uncertainty.interval(found.samples[name]))} if name in found.samples else {})
            for name, value in found.values.items()
        },
        "resamples": len(next(iter(found.samples.values()), ())),
        "interval": f"{uncertainty.LEVEL:.0%} percentile bootstrap over records",
        "tables": found.tables,
        "calibration": found.calibration,
        "worst": [_example(found, i) for i in worst(found)[:_WORST]],
    }


def worst(found: Scores) -> list[int]:
    """The examples by falling loss."""
    return np.argsort(-found.losses_E, kind="stable").tolist()


def _example(found: Scores, at: int) -> dict[str, Any]:
    said = found.predictions[found.numbers[at]]["prediction"] if found.predictions else None
    return {"loss": float(found.losses_E[at])} | predict.asked(found.records[at]) | {"prediction": said}


def in_words(found: Scores) -> str:
    """A report for a person to read."""
    content = as_json(found)
    lines = [f"{content['run']} on {content['data']}: {content['records']:,} records"]
    if others := {name: n for name, n in content["counts"].items() if name not in ("documents", "examples")}:
        lines.append("counted: " + ", ".join(f"{name} {count:,}" for name, count in others.items()))
    rows = [["metric", "value", _INTERVAL, "unit"]]
    for name, about in content["metrics"].items():
        between = " to ".join(f"{edge:.4f}" for edge in about.get("interval", ()))
        rows.append([name, f"{about['value']:.4f}", between, about["unit"]])
    lines += ["", *_aligned(rows)]
    if found.samples:
        lines.append(f"intervals: bootstrap over records, {content['resamples']:,} resamples")
    for name, table in found.tables.items():
        rows = [[f"{name} class".strip(), "precision", "recall", "f1", "support"]]
        for label, own in table["classes"].items():
            rows.append([label, *(f"{own[key]:.4f}" for key in ("precision", "recall", "f1")), f"{own['support']:,}"])
        lines += ["", *_aligned(rows)]
        if len(table["labels"]) <= _WIDEST:
            rows = [["right \\ predicted", *table["labels"]]]
            rows += [[label, *map(str, row)] for label, row in zip(table["labels"], table["confusion"], strict=True)]
            lines += ["", *_aligned(rows)]
    if found.calibration:
        lines += ["", f"calibration error (ECE, {uncertainty.BINS} bins): {found.calibration['ece']:.4f}"]
    if shown := content["worst"][:_WORST_SHOWN]:
        lines += ["", "largest losses:"]
        for one in shown:
            text = json.dumps(one["record"], ensure_ascii=False)
            cut = text[:_TEXT_SHOWN] + "..." * (len(text) > _TEXT_SHOWN)
            lines.append(f"  {one['loss']:.4f}  {one['source']}  {cut}  ->  {str(one['prediction'])[:_TEXT_SHOWN]}")
    return "\n".join(lines)


def _aligned(rows: list[list[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = [[cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)] for row in rows]
    return ["  ".join([row[0].ljust(widths[0]), *cells]).rstrip() for row, cells in zip(rows, right, strict=True)]


def compare(first: Scores, second: Scores) -> dict[str, Any]:
    """Differences, first minus second, on the same records: of each metric with its interval by a paired bootstrap, and
    McNemar's test of the classes.

    Raises:
      ConfigError: the two were not scored on the same records.
    """
    if [one["identity"] for one in first.records] != [one["identity"] for one in second.records]:
        raise ConfigError(
            f"{first.loaded.name} and {second.loaded.name} are not scored on the same records: the one has "
            f"{len(first.records):,}, the other {len(second.records):,} that make a row; compare runs of one task"
        )
    both = [name for name in first.samples if name in second.samples]
    found: dict[str, Any] = {
        "first": first.loaded.name,
        "second": second.loaded.name,
        "differences": {
            name: {
                "value": first.values[name] - second.values[name],
                "interval": list(uncertainty.interval(first.samples[name] - second.samples[name])),
            }
            for name in both
            if name in first.values and name in second.values
        },
    }
    if first.right_E is not None and second.right_E is not None:
        found["mcnemar"] = uncertainty.mcnemar(first.right_E, second.right_E)
    return found


def comparison_in_words(found: dict[str, Any]) -> str:
    """A comparison for a person to read."""
    rows = [["difference", "value", _INTERVAL, ""]]
    for name, about in found["differences"].items():
        low, high = about["interval"]
        rows.append([name, f"{about['value']:+.4f}", f"{low:+.4f} to {high:+.4f}", "" if low <= 0 <= high else "*"])
    lines = [f"{found['first']} minus {found['second']}, on the same records", "", *_aligned(rows)]
    lines.append("* = the interval of the paired bootstrap does not contain 0")
    if test := found.get("mcnemar"):
        lines.append(
            f"McNemar: right alone {test['only_first']:,} and {test['only_second']:,} times, p = {test['p_value']:.4g}"
        )
    return "\n".join(lines)


def check_folder(folder: Path) -> None:
    """Makes the folder of the results. Raises ConfigError if that fails, or if there are results in it already."""
    if (folder / "scores.json").exists():
        raise ConfigError(f"{folder} has the scores of an earlier evaluation: remove it, or give another --out")
    with access(folder, "writing to"):
        folder.mkdir(parents=True, exist_ok=True)


def write(found: Scores, folder: Path, comparison: dict[str, Any] | None = None) -> None:
    """Writes scores.json, scores.txt and, if there are predictions, predictions.jsonl to a folder (`check_folder`)."""
    content = as_json(found) | ({"comparison": comparison} if comparison else {})
    write_atomic(folder / "scores.json", json.dumps(finite(content), indent=1, ensure_ascii=False) + "\n")
    text = in_words(found) + (f"\n\n{comparison_in_words(comparison)}" if comparison else "")
    write_atomic(folder / "scores.txt", text + "\n")
    if found.predictions:
        write_atomic(folder / "predictions.jsonl", "".join(map(predict.as_line, found.predictions)))
