"""Evaluation during a run: validation of the current parameters, samples, and the test of the chosen checkpoint."""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lm import checkpoint, eval_sets, program
from lm import run as run_lib
from lm.checkpoint import CheckpointError
from lm.config import Config
from lm.data.loader import REPLAY
from lm.decoding import sampling
from lm.eval_sets import TEST, VALID
from lm.evaluation import evaluate, metrics, uncertainty
from lm.parallel import sharding
from lm.run import Run
from lm.step import eval_params
from lm.tasks import base, multitask, task_of
from lm.tracking import report
from lm.tracking.tracker import Tracker
from lm.types import Outputs, Params, TrainState


class Evaluator:
    """Evaluates a run on its held-out rows and logs the metrics. Its evaluation steps, one for each task that it
    evaluates, are compiled once, when it is made.

    Where the run keeps an average of its parameters, the average is evaluated.

    Attributes:
      confusion: task of a mixture, or '' -> 'labels' of its classes and 'confusion', their confusion matrix, of the
        latest validation; of tasks with few enough classes for the report.
    """

    def __init__(self, run: Run, tracker: Tracker):
        self._run, self._tracker = run, tracker
        self.confusion: dict[str, dict[str, Any]] = {}
        self._place = run_lib.placer(run.mesh, program.eval_batch_size(run.cfg))
        named = eval_sets.to_read(run.cfg)
        self._configs = {VALID: run.cfg, TEST: run.cfg} | {name: eval_sets.config_of(run.cfg, name) for name in named}
        self._steps = {run.cfg.task: self._compiled(run.cfg, run.program.eval_step)}
        for cfg in self._configs.values():
            if cfg.task not in self._steps:
                model = program.make_model(cfg, program.compute_dtype(cfg.model.dtype, run.mesh))
                step = program.make_eval_step(cfg, run.mesh, model, run.plan.tokenizer)
                self._steps[cfg.task] = self._compiled(cfg, step)

    def _compiled(self, cfg: Config, eval_step: Any) -> Any:
        batch = program.abstract_batch(cfg, self._run.mesh, program.eval_batch_size(cfg))
        state = self._run.program.abstract_state
        return eval_step.lower(state.params, batch, start=state.start).compile()

    def validate(self, state: TrainState, step: int) -> dict[str, float]:
        """Metrics of all sets after `step` steps, by their names of `eval_sets.named`.

        Logs them, and a sample for each of `generate.prompts`.
        """
        tracker, values = self._tracker, dict[str, float]()
        with tracker.bucket("eval"):
            params = eval_params(state)
            for name in eval_sets.to_evaluate(self._run.cfg):
                began = time.perf_counter()
                of_set = self._evaluate(params, state.start, name)
                values |= eval_sets.named(name, of_set)
                title, seconds = "validation" if name == VALID else name, time.perf_counter() - began
                shown = with_units(of_set, self._configs[name])
                tracker.note(f"[step {step:,}] {title}: {shown} · {seconds:.1f} s")
            tracker.log(step, "eval", values)
            for prompt, text in samples(self._run, params, step).items():
                tracker.text(step, prompt, text)
        return values

    def test(self, state: TrainState, step: int, workdir: Path) -> dict[str, Any]:
        """Metrics of the test rows, and 'step': those of the checkpoint that validation chose. {} without test rows.

        Args:
          state: the last one of the run.
          step: its step.
          workdir: the run's folder, whose checkpoints are all written.
        """
        run, tracker = self._run, self._tracker
        if not run.data.rows_of(TEST):
            return {}
        with tracker.bucket("eval"):
            step, state = best_state(run, workdir, step, state, tracker.note)
            values = self._evaluate(eval_params(state), state.start, TEST)
            tracker.log(step, "test", values)
            tracker.note(f"test, with the checkpoint of step {step:,}: {with_units(values, run.cfg)}")
        return {"step": step, **values}

    def _evaluate(self, params: Params, start: Params | None, of_set: str) -> dict[str, float]:
        """Metrics over the rows of the run's own sources together and, where sources have names, of each by its name.

        The rows of `data.replay` are a source by themselves and do not count among the run's own.
        """
        run, cfg = self._run, self._configs[of_set]
        eval_step = functools.partial(self._steps[cfg.task], start=start)
        own_sums: metrics.Sums = {}
        own_outputs: list[Outputs] = []
        own_meta: list[Any] = []
        by_source: dict[str, float] = {}
        for name, rows in run.data.rows_of(of_set).items():
            row_ids, batches = run_lib.eval_rows(run, rows)
            sums, outputs = evaluate.evaluate(eval_step, params, self._place, batches, len(row_ids))
            meta = [rows.meta[i] for i in row_ids] if task_of(cfg).scores else []
            if name:
                by_source |= {f"{name}_{key}": value for key, value in values_of(cfg, sums, outputs, meta).items()}
            if name != REPLAY:
                own_sums = metrics.add(own_sums, sums)
                own_outputs.append(outputs)
                own_meta += meta
        joined = {key: np.concatenate([outputs[key] for outputs in own_outputs]) for key in own_outputs[0]}
        if of_set == VALID:
            self.confusion = {
                name: {
                    "labels": list(names),
                    "confusion": uncertainty.class_table(labels, predicted, names)["confusion"],
                }
                for name, (labels, predicted, names) in classes(cfg, joined).items()
                if len(names) <= report.WIDEST
            }
        return values_of(cfg, own_sums, joined, own_meta) | by_source


def values_of(cfg: Config, sums: metrics.Sums, outputs: Outputs, meta: list[Any]) -> dict[str, float]:
    """Metric -> value: the sums divided by their weights, and the task's scores of the outputs.

    Args:
      cfg: of the run, or of the set.
      sums: metric -> (sum, weight).
      outputs: name -> [R, ...], the model's outputs of each row.
      meta: [R], what scoring needs to know of each row.
    """
    task = task_of(cfg)
    values = metrics.finalize(sums, task.has_perplexity)
    return values | task.scores(outputs, meta, cfg) if task.scores else values


def classes(cfg: Config, outputs: Outputs) -> dict[str, tuple[np.ndarray, np.ndarray, tuple[str, ...]]]:
    """Name of a task ('' = the run's own) -> right classes, predicted classes and their names, of rows or words."""
    if not {"label", "prediction"} <= set(outputs) or not hasattr(cfg.task, "labels"):
        return {}
    labels, said = outputs["label"], outputs["prediction"]
    if "part" in outputs:
        return {
            part.name: (labels[outputs["part"] == i], said[outputs["part"] == i], part.classes)
            for i, part in enumerate(multitask.parts(cfg.task.labels))
            if part.classes
        }
    is_label = labels >= 0
    return {"": (labels[is_label], said[is_label], cfg.task.labels)}


def best_state(
    run: Run, workdir: Path, step: int, state: TrainState, note: Callable[[str], None]
) -> tuple[int, TrainState]:
    """(step, state) of the best checkpoint by `checkpoint.best_metric`; the given ones where none can be read."""
    if not run.cfg.checkpoint.keep_best:
        return step, state

    def read(saved: checkpoint.Saved) -> TrainState:
        return state if saved.step == step else checkpoint.load(saved, run.program.abstract_state)

    try:
        best = checkpoint.choose(f"{workdir}@best", note)
        used, its_state = checkpoint.first_readable([best, *best.fallbacks], read, note)
        return used.step, its_state
    except CheckpointError as error:
        note(f"{error}\ntesting the last state instead of the best one")
        return step, state


def samples(run: Run, params: Params, step: int) -> dict[str, str]:
    """Prompt -> the model's continuation, for each of `generate.prompts`; drawn anew at each step."""
    tokenizer = run.plan.tokenizer
    if not run.prompts or tokenizer is None:
        return {}
    key = jax.random.fold_in(jax.random.key(run.cfg.seed), step)
    shards = sharding.batch_shards(run.mesh)
    prompts = list(run.prompts.values())
    made = sampling.sample(run.program.model, params, prompts, key, run.cfg, tokenizer, rows_multiple=shards)
    return {
        prompt: sampling.text_of(each.ids, tokenizer, run.cfg) for prompt, each in zip(run.prompts, made, strict=True)
    }


def with_units(values: dict[str, float], cfg: Config) -> str:
    """The metrics of an evaluation on one line, each with its unit."""
    units = {name: base.about(task_of(cfg), cfg, name).unit for name in values}
    return " · ".join(f"{name} {value:.4f} {units[name]}".rstrip() for name, value in values.items())
