"""The run, from config to summary, in the order it happens.

Everything it needs is made in `lm.build`; what it does to a batch is in `lm.step`. Starting the same command again
resumes: state, position in the data and written curves continue as if nothing had happened.
"""

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lm import build, checkpoint, checks, config, program, step
from lm.checkpoint import CheckpointError, init_from, resume
from lm.config import Config, schema
from lm.data.loader import REPLAY
from lm.decoding import sampling
from lm.evaluation import evaluate, flops, metrics
from lm.optim import mup, trainable
from lm.parallel import mesh as mesh_lib
from lm.parallel import sharding
from lm.preemption import Interrupt, Preempted
from lm.tasks import base, build_saved_config, task_of
from lm.tracking import report, tracker
from lm.types import TrainState

Say = Callable[[str], None]


class Diverged(RuntimeError):
    """The loss or the gradient is not finite. The message names the step, the examples and the last good checkpoint."""


def train(cfg: Config, workdir: str | Path, accept_changed_data: bool = False) -> dict[str, Any]:
    """Trains as `cfg` says, or goes on where the run in `workdir` stopped.

    Args:
      cfg: from `lm.config.build`.
      workdir: the run's folder; all that is written goes there.
      accept_changed_data: go on although the data, or the seed, is not what the run began with: each source from the
        example at which it stopped.

    Returns:
      What summary.json holds.

    Raises:
      ConfigError, DataError, CheckpointError: the run cannot start, or go on; nothing already computed is lost.
      Diverged: the loss or gradient became NaN or infinite.
      Preempted: SIGTERM or SIGINT came; the state was saved first.
    """
    workdir = Path(workdir)

    # What is asked for, checked before data is read or a device is touched.
    planned = build.plan(cfg, workdir)
    cfg = planned.cfg

    # Devices, data, and the functions of a step.
    saved = checkpoint.list_saved(workdir)
    is_primary = jax.process_index() == 0
    say: Say = functools.partial(print, flush=True) if is_primary else lambda _: None
    if readable := [candidate for candidate in saved if "unreadable" not in candidate.info]:
        resume.refuse_changes(build_saved_config(readable[-1].info["config"]), cfg, workdir, accept_changed_data, say)
    mesh = mesh_lib.make_mesh(cfg.mesh)
    say(f"devices: {mesh.size} of kind {mesh.devices.flat[0].device_kind}, as {mesh_lib.in_words(mesh)}")
    run = build.run(planned, workdir, mesh, say)

    with jax.set_mesh(mesh):
        # The state: this run's newest readable checkpoint, else `init_from`, else scratch.
        state, position, origin = restore(run, planned, saved, say, accept_changed_data)
        start = int(state.step)
        say(parameter_table(planned, run.optimizer, origin))
        is_over = start >= run.total_steps or position.waiting.is_over(cfg.train)
        if is_over and (workdir / "summary.json").exists():
            say(f"already done: step {start:,} of {run.total_steps:,}; see {workdir}/summary.json")
            return json.loads((workdir / "summary.json").read_text())
        if is_primary:
            tracker.write_atomic(workdir / "config.json", config.to_json(cfg))
        with (
            tracker.Monitor(workdir, run.total_steps, start, is_primary, cfg.monitor) as watch,
            checkpoint.Checkpoints(workdir, cfg.checkpoint, saved, start) as saves,
            Interrupt() as interrupt,
        ):
            summary = loop(run, workdir, state, position, watch, saves, interrupt)
        if is_primary:
            summary |= (told := history(workdir, cfg))
            if cfg.train.patience[0]:  # such a run is its best checkpoint, see `checkpoint.choose`
                summary |= {key: value for key, value in told["best"].items() if key in summary and key != "seconds"}
                summary |= {"answer_loss": summary["nll"]} if "answer_loss" in summary else {}
            report.write_summary(workdir, summary)
            say(f"summary: {workdir}/summary.json, curves: {report.write_report(workdir)}")
        return summary


def loop(
    run: build.Run,
    workdir: Path,
    state: TrainState,
    position: resume.Position,
    watch: tracker.Monitor,
    saves: checkpoint.Checkpoints,
    interrupt: Interrupt,
) -> dict[str, Any]:
    """Steps from `state` to the last one, evaluating and saving on the way. Returns the summary."""
    cfg, total, start = run.cfg, run.total_steps, int(state.step)
    example, _, waiting = position
    batch_size, eval_rows = cfg.data.batch_size, checks.eval_batch_size(cfg)
    stream = build.stream(run, start, position)

    # Compiled once, ahead of time: a batch of another shape would be an error, never a silent recompilation.
    with watch.bucket("compile"):
        batch_shape, eval_shape = (program.abstract_batch(cfg, run.mesh, rows) for rows in (batch_size, eval_rows))
        train_step = run.train_step.lower(run.abstract_state, batch_shape).compile()
        eval_step = run.eval_step.lower(run.abstract_state.params, eval_shape).compile()
    place, place_eval = build.placer(run.mesh, batch_size), build.placer(run.mesh, eval_rows)

    def evaluate_now(done: int) -> dict[str, float]:
        with watch.bucket("eval"):
            params = step.eval_params(state)
            values = evaluate_all(run, "valid", functools.partial(evaluate.evaluate, eval_step, params, place_eval))
            watch.log(done, "eval", values)
            watch.note(f"[step {done:,}] held out: {in_words(values, cfg)}")
            for prompt, text in samples(run, params, done).items():
                watch.text(done, prompt, text)
        return values

    def test_now(done: int) -> dict[str, Any]:
        """{'test': metrics and step} of the checkpoint that validation chose; {} where there is no test data."""
        if not any(source.test for source in run.data.sources.values()):
            return {}
        with watch.bucket("eval"):
            at, chosen = best_state(run, workdir, done, state, watch.note)
            params = step.eval_params(chosen)
            values = evaluate_all(run, "test", functools.partial(evaluate.evaluate, eval_step, params, place_eval))
            watch.log(at, "test", values)
            watch.note(f"test, by the checkpoint of step {at:,}: {in_words(values, cfg)}")
        return {"test": {"step": at, **values}}

    def save_now(done: int, values: dict[str, float] | None) -> None:
        with watch.bucket("checkpoint"):
            info: dict[str, Any] = {"config": schema.to_dict(cfg), "tokenizer_hash": build.tokenizer_hash(run)}
            info["data"] = resume.about_data(run.data, example, build.consumed(run, example, stream))
            info["replay"] = schema.to_dict(run.replay) if run.replay else None
            info["waiting"] = waiting._asdict()
            saves.save(done, state, info, values)

    if start == 0 and cfg.eval.at_start:
        evaluate_now(0)
    values: dict[str, float] | None = None
    pending: tuple[int, Any, np.ndarray] | None = None  # figures of the last step, fetched while the next one runs
    rate = Throughput(run, start, watch)
    batches = build.data_iterator(run, example, stream)
    for done in range(start + 1, 1 + (start if waiting.is_over(cfg.train) else total)):
        watch.profile(done - 1)
        if pending and not batches.ready():
            with watch.bucket("step"):  # the device is at work: only what comes after is a wait for the input
                jax.block_until_ready(pending[1])
        with watch.bucket("input"):
            batch = next(batches)
        with watch.bucket("step"):
            state, figures = train_step(state, place(batch))
            example += batch_size
            if pending:
                observe(run, pending, watch, rate, saves.last_good)
            pending = (done, figures, batch["example_index"])
        saves.poll()

        is_last, stopping = done == total, interrupt.requested(done)
        eval_due = is_last or is_due(done, run.every["eval"])
        save_due = is_last or stopping or is_due(done, run.every["checkpoint"])
        if not eval_due and not save_due:
            continue
        with watch.bucket("step"):
            observe(run, pending, watch, rate, saves.last_good)  # what is not finite is neither evaluated nor kept
            pending = None
        try:
            values = evaluate_now(done) if eval_due else None
        except Exception:  # out of memory in evaluation only, say: the steps are not lost with it
            save_now(done, None)
            raise
        if values:
            waiting = evaluate.wait(waiting, values, cfg)
            is_last |= waiting.is_over(cfg.train)
        if is_last or save_due or (values and saves.is_best(values)):
            save_now(done, values)
        if stopping and not is_last:
            with watch.bucket("checkpoint"):
                saves.wait()
            raise Preempted(f"stopped at step {done:,} of {total:,}; saved in {workdir}, the same command goes on")
        if is_last:
            break
    watch.profile(total)
    with watch.bucket("checkpoint"):
        saves.wait()
    batches.close()
    summary = summarise(run, state, values or evaluate_now(int(state.step)), watch, rate, example, stream)
    return summary | test_now(int(state.step))


def best_state(
    run: build.Run, workdir: Path, done: int, state: TrainState, note: Callable[[str], None]
) -> tuple[int, TrainState]:
    """(step, state) of the best checkpoint by `checkpoint.best_metric`; of the last one where none can be read."""
    if not run.cfg.checkpoint.keep_best:
        return done, state
    try:
        best = checkpoint.choose(f"{workdir}@best")
        return best.step, state if best.step == done else checkpoint.load(best, run.abstract_state)
    except CheckpointError as error:
        note(f"{error}\ntesting the last state instead of the best one")
        return done, state


def evaluate_all(run: build.Run, part: str, evaluate_rows: Callable[[Any, int], Any]) -> dict[str, float]:
    """Metrics of all rows of a part ('valid' or 'test') of the run's own data and, where it has several sources, of
    each by its name."""
    finalize = functools.partial(metrics.finalize, has_perplexity=task_of(run.cfg).has_perplexity)
    total: metrics.Sums = {}
    outputs: list[Any] = []
    meta: list[Any] = []
    by_source: dict[str, float] = {}
    for name, source in run.data.sources.items():
        rows = getattr(source, part)
        if rows is None:
            continue
        row_ids, batches = build.eval_rows(run, rows)
        sums, found = evaluate_rows(batches, len(row_ids))
        about = [rows.meta[i] for i in row_ids] if run.score else []
        if name:
            values = finalize(sums) | (run.score(found, about, run.cfg) if run.score else {})
            by_source |= {f"{name}_{key}": value for key, value in values.items()}
        if name != REPLAY:
            total, meta = metrics.add(total, sums), meta + about
            outputs.append(found)
    joined = {key: np.concatenate([found[key] for found in outputs]) for key in outputs[0]}
    return finalize(total) | (run.score(joined, meta, run.cfg) if run.score else {}) | by_source


def restore(
    run: build.Run, planned: build.Plan, saved: list[checkpoint.Saved], say: Say, accept_changed_data: bool = False
) -> tuple[TrainState, resume.Position, dict[str, str]]:
    """The state to start from, where in the run that is, and where each parameter came from.

    Raises:
      CheckpointError: there are checkpoints, but none can be read; or the data is no longer what the run was on.
    """
    for candidate in reversed(saved):
        try:
            state = checkpoint.load(candidate, run.abstract_state)
        except CheckpointError as error:
            say(f"{error}\ngoing back to the checkpoint before it")
            continue
        resume.same_data(candidate, run.data, accept_changed_data, say)
        say(f"resuming from {candidate.path}")
        return (
            state,
            resume.position(candidate),
            dict.fromkeys(run.optimizer.selection.trained, f"this run, step {candidate.step:,}"),
        )
    if saved:
        raise CheckpointError(f"none of the {len(saved)} checkpoints in {saved[0].path.parent} can be read")
    if planned.init:
        say(init_from.describe(planned.origin_of, planned.unused, planned.init, run.cfg.model))
    params, origin = init_from.initialize(
        run.model, run.abstract_state.params, run.cfg.seed, planned.init, planned.origin_of
    )
    state = jax.jit(run.init_state, out_shardings=run.state_shardings)(params)
    return state, resume.Position(0, None, evaluate.Waiting()), origin


def observe(
    run: build.Run, pending: tuple[int, Any, np.ndarray], watch: tracker.Monitor, rate: "Throughput", good: int | None
) -> None:
    """Waits for the figures of a step; logs them; refuses to go on when they are not finite.

    Raises:
      Diverged: naming the step, this process's examples and the last good checkpoint.
    """
    done, figures, example_index = pending
    sums = jax.device_get(figures)
    values = {name: float(sums.pop(name)) for name in ("loss", "weight", "grad_norm", "learning_rate")}
    if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
        watch.log(done, "train", values)
        last = "there is no checkpoint yet" if good is None else f"the last good checkpoint is step {good:,}"
        raise Diverged(
            f"step {done:,}: loss {values['loss']}, gradient norm {values['grad_norm']}; example indices "
            f"{example_index.tolist()}; {last}. Nothing of this step was saved. Try a lower optim.learning_rate or "
            "optim.clip_norm, or look at the examples with tools/inspect_batch.py"
        )
    tokens_per_second = rate.update(done)
    utilisation, values["input_bound"] = rate.utilisation(tokens_per_second), rate.input_bound
    watch.progress(done, values["loss"], tokens_per_second, utilisation.get("mfu"), rate.input_bound)
    if is_due(done, run.cfg.monitor.log_every_steps) or done == run.total_steps:
        values["tokens_per_second"] = tokens_per_second
        watch.log(done, "train", values | utilisation | metrics.finalize(sums, task_of(run.cfg).has_perplexity))


def in_words(values: dict[str, float], cfg: Config) -> str:
    """The metrics of an evaluation in one line, each with its unit."""
    units = {name: base.about(task_of(cfg), cfg, name).unit for name in values}
    return " · ".join(f"{name} {value:.4f} {units[name]}".rstrip() for name, value in values.items())


def samples(run: build.Run, params: Any, done: int) -> dict[str, str]:
    """Prompt -> what the model makes of it, for each of `generate.prompts`."""
    if not run.prompts or run.tokenizer is None:
        return {}
    key = jax.random.fold_in(jax.random.key(run.cfg.seed), done)
    shards = sharding.batch_shards(run.mesh)
    made = sampling.generate(
        run.model, params, list(run.prompts.values()), key, run.cfg, run.tokenizer, rows_multiple=shards
    )
    return {prompt: run.tokenizer.decode(new) for prompt, new in zip(run.prompts, made, strict=True)}


def parameter_table(planned: build.Plan, optimizer: Any, origin: dict[str, str]) -> str:
    """Every parameter: shape, trained or frozen, decayed, learning rate, where its value came from."""
    return report.parameter_table(
        planned.abstract_params,
        selection=optimizer.selection,
        learning_rate=planned.cfg.optim.learning_rate,
        scales=mup.direction_scales(planned.cfg.optim.name, planned.logical_axes, mup.width_ratio(planned.cfg.model)),
        origin=origin,
    )


def describe(cfg: Config, workdir: str | Path) -> str:
    """The resolved config and the parameter table of a run that is not started."""
    planned = build.plan(cfg, Path(workdir))
    came_from = {path: name or "initialised" for path, name in planned.origin_of.items()}
    origin = came_from or dict.fromkeys(planned.logical_axes, "initialised")
    return config.to_json(planned.cfg) + "\n" + parameter_table(planned, planned.optimizer, origin)


def history(workdir: Path, cfg: Config) -> dict[str, Any]:
    """'before' = the evaluation at step 0, 'best' = the best one after it, by `checkpoint.best_metric`; also of resumed
    runs."""
    rows, _ = tracker.read_rows(workdir / "metrics.jsonl")
    evaluations = [row for row in rows if row.pop("split") == "eval"]
    name = cfg.checkpoint.best_metric
    measured = [row for row in evaluations if row.get(name) is not None and row["step"] > 0]
    best = max(measured, key=lambda row: metrics.gain(name, row[name]), default={})
    return {"before": next((row for row in evaluations if row["step"] == 0), {}), "best": best}


def summarise(
    run: build.Run,
    state: TrainState,
    values: dict[str, float],
    watch: tracker.Monitor,
    rate: "Throughput",
    example: int,
    stream: build.Stream,
) -> dict[str, Any]:
    """The figures of a finished run, the final evaluation's among them."""
    cfg, done = run.cfg, int(state.step)
    whole = run.abstract_state.params
    trained = trainable.trained_part(run.optimizer.selection, whole)
    answer = {"answer_loss": values["nll"]} if cfg.task.name == "chat" else {}
    return {
        **values,
        **answer,
        "steps": done,
        "skipped_steps": int(state.skipped),
        "tokens": example * cfg.data.seq_len,
        "seconds": watch.seconds(),
        "tokens_per_second": rate.overall(done),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(whole)),
        "trained_parameters": sum(leaf.size for leaf in jax.tree.leaves(trained)),
        "devices": run.mesh.devices.size,
        "device_kind": run.mesh.devices.flat[0].device_kind,
        "goodput": watch.goodput(),
        "input_bound": rate.overall_input_bound(),
        **rate.utilisation(rate.overall(done)),
        **({"sources": build.consumed(run, example, stream)} if len(run.data.sources) > 1 else {}),
    }


def is_due(done: int, every: int) -> bool:
    """Whether something done every `every` steps (0 = never) is due after step `done`."""
    return every > 0 and done % every == 0


class Throughput:
    """Positions per second of training, compilation, evaluation and saving left out; and the share of that time in
    which the devices had no batch."""

    def __init__(self, run: build.Run, start: int, watch: tracker.Monitor):
        self.tokens_per_step, self.input_bound = run.cfg.data.batch_size * run.cfg.data.seq_len, 0.0
        self._flops: dict[str, float | None] = {}  # known where each position is computed once and predicts a token
        if run.tokenizer and build.predicts_tokens(run.cfg):
            size = run.tokenizer.vocab_size
            self._flops = {
                name: flops.train_flops_per_token(run.cfg.model, run.cfg.data.seq_len, size, causal_half=half)
                for name, half in (("mfu", False), ("mfu_causal", True))
            }
        self._run, self._start, self._watch = run, start, watch
        self._began = self._last = (start, *self._busy())

    def _busy(self) -> tuple[float, float]:
        """Seconds of training, and those of waiting for the input among them."""
        seconds = self._watch.goodput()
        return seconds["step"] + seconds["input"], seconds["input"]

    def _since(self, mark: tuple[int, float, float], done: int) -> tuple[float, float]:
        busy, waited = self._busy()
        seconds = max(busy - mark[1], 1e-9)
        return (done - mark[0]) * self.tokens_per_step / seconds, (waited - mark[2]) / seconds

    def update(self, done: int) -> float:
        """Tokens a second over the last steps: enough of them to fill 5 seconds, where there are."""
        value, self.input_bound = self._since(self._last, done)
        if self._busy()[0] - self._last[1] > 5:
            self._last = (done, *self._busy())
        return value

    def overall(self, done: int) -> float:
        """Tokens a second since this process began the loop; 0 when it did no step."""
        return self._since(self._began, done)[0] if done > self._start else 0.0

    def overall_input_bound(self) -> float:
        """In [0, 1], since this process began the loop."""
        return self._since(self._began, 0)[1]

    def utilisation(self, tokens_per_second: float) -> dict[str, float]:
        """Model FLOPs utilisation, attention counted in full ('mfu') and its causal half ('mfu_causal'), and tokens a
        second of a device; nothing where the device's peak is not known."""
        devices = self._run.mesh.devices
        kind, count = devices.flat[0].device_kind, devices.size
        found = {name: flops.mfu(tokens_per_second, per_token, kind, count) for name, per_token in self._flops.items()}
        known = {name: value for name, value in found.items() if value is not None}
        return known | ({"tokens_per_second_a_device": tokens_per_second / count} if known else {})
