"""Training: `train` prepares, restores and finishes a run; `loop` steps, logs, evaluates, saves and stops.

The objects of a run are made in `lm.run`; what a step does to a batch is in `lm.step`. The same command started again
resumes the run: parameters, position in the data and metrics continue as if it had never stopped.
"""

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lm import checkpoint, config, lease, program
from lm import run as run_lib
from lm.checkpoint import CheckpointError, Checkpoints, init_from, resume
from lm.config import Config, schema
from lm.evaluation import metrics
from lm.evaluation.early_stopping import EarlyStopping
from lm.evaluator import Evaluator
from lm.optim import mup, trainable
from lm.optim.trainable import Selection
from lm.parallel import mesh as mesh_lib
from lm.preemption import Interrupt, Preempted
from lm.run import Plan, Run, Stream
from lm.tasks import build_saved_config, task_of
from lm.tracking import report
from lm.tracking.throughput import Throughput
from lm.tracking.tracker import Tracker, read_rows, write_atomic
from lm.types import TrainState

Say = Callable[[str], None]


class Diverged(RuntimeError):
    """The loss or the gradient is not finite. The message names the step, the examples and the last good checkpoint."""


def train(cfg: Config, workdir: str | Path, accept_changed_data: bool = False) -> dict[str, Any]:
    """Trains as `cfg` says, or resumes the run in `workdir`.

    Args:
      cfg: from `lm.config.build`.
      workdir: the run's folder; everything is written there.
      accept_changed_data: resume although the data or the seed has changed since the run began: each source continues
        from the example at which it stopped.

    Returns:
      The contents of summary.json.

    Raises:
      ConfigError, DataError, CheckpointError: the run cannot start or resume; its saved state is not touched.
      Diverged: the loss or the gradient became NaN or infinite.
      Preempted: SIGTERM or SIGINT came; the state was saved first.
      lm.lease.Held, lm.lease.Lost: another process writes into `workdir`, from the start on, or since it took it over.
    """
    workdir = Path(workdir)
    run_lib.check_workdir(workdir)
    with Interrupt() as interrupt, lease.hold_for_run(workdir) as check_lease:
        return start_or_resume(cfg, workdir, accept_changed_data, check_lease, interrupt)


def start_or_resume(
    cfg: Config, workdir: Path, accept_changed_data: bool, check_lease: Callable[[], None], interrupt: Interrupt
) -> dict[str, Any]:
    """As `train`, of a folder that this process owns; `check_lease` is called before each write."""
    # The config is checked before data is read or a device is touched.
    planned = run_lib.plan(cfg, workdir)
    cfg = planned.cfg

    # Devices, data, and the step functions.
    saved = checkpoint.list_saved(workdir)
    is_primary = jax.process_index() == 0
    say: Say = functools.partial(print, flush=True) if is_primary else lambda _: None
    if readable := [candidate for candidate in saved if "unreadable" not in candidate.info]:
        resume.refuse_changes(build_saved_config(readable[-1].info["config"]), cfg, workdir, accept_changed_data, say)
    mesh = mesh_lib.make_mesh(cfg.mesh)
    say(f"devices: {mesh.size} of kind {mesh.devices.flat[0].device_kind}, as {mesh_lib.in_words(mesh)}")
    run = run_lib.prepare(planned, mesh, say)

    with jax.set_mesh(mesh):
        # The state: from this run's newest readable checkpoint, else from `init_from`, else from scratch.
        state, position, origin = restore(run, saved, say, accept_changed_data)
        start, total_steps = int(state.step), run.program.total_steps
        say(parameter_table(run.plan, run.program.optimizer.selection, origin))
        is_over = start >= total_steps or position.early_stopping.should_stop(cfg.train)
        if is_over and (workdir / "summary.json").exists():
            say(f"already done: step {start:,} of {total_steps:,}; see {workdir}/summary.json")
            return json.loads((workdir / "summary.json").read_text())
        if is_primary:
            check_lease()
            if run.plan.tokenizer:
                run.plan.tokenizer.save(workdir / run_lib.tokenizer_file(cfg))
            write_atomic(workdir / "config.json", config.to_json(cfg))
        with (
            Tracker(workdir, total_steps, start, is_primary, cfg.monitor, check_lease) as tracker,
            Checkpoints(workdir, cfg.checkpoint, saved, start, check_lease) as checkpoints,
        ):
            interrupt.kept = lambda: what_is_kept(checkpoints.last_good)
            summary = loop(run, workdir, state, position, tracker, checkpoints, interrupt)
        if is_primary:
            summary |= (evaluations := first_and_best(workdir, cfg.checkpoint.best_metric))
            if cfg.train.early_stopping.patience:  # with early stopping the run stands for its best checkpoint
                best = {key: value for key, value in evaluations["best"].items() if key in summary and key != "seconds"}
                summary |= best
                summary |= {"answer_loss": summary["nll"]} if "answer_loss" in summary else {}
            check_lease()
            report.write_summary(workdir, summary)
            say(f"summary: {workdir}/summary.json, curves: {report.write_report(workdir)}")
        return summary


def loop(
    run: Run,
    workdir: Path,
    state: TrainState,
    position: resume.Position,
    tracker: Tracker,
    checkpoints: Checkpoints,
    interrupt: Interrupt,
) -> dict[str, Any]:
    """Trains from `state` to the last step, evaluating and saving on the way. Returns the summary.

    Raises:
      Diverged, Preempted: as `train`.
    """
    cfg, start, last_step = run.cfg, int(state.step), run.program.total_steps
    stream, early_stopping = run_lib.training_stream(run, start, position), position.early_stopping
    with tracker.bucket("compile"):  # ahead of time: a batch of another shape is an error, not a silent recompilation
        batch_shape = program.abstract_batch(cfg, run.mesh, stream.batch_size)
        train_step = run.program.train_step.lower(run.program.abstract_state, batch_shape).compile()
        evaluator = Evaluator(run, tracker)
    throughput = measure_throughput(run, tracker, start)
    step_log = StepLog(run, tracker, throughput, checkpoints)
    save = functools.partial(save_state, run, stream, tracker, checkpoints)

    if start == 0 and cfg.eval.at_start:
        evaluator.validate(state, 0)
    values: dict[str, float] | None = None
    # A run that had stopped early, but was killed before its summary was written, has no step left.
    steps = range(0) if early_stopping.should_stop(cfg.train) else range(start + 1, last_step + 1)
    batches, place = run_lib.train_batches(run, stream), run_lib.placer(run.mesh, stream.batch_size)
    for step in steps:
        interrupt.working(f"finishing step {step:,}, then saving")
        tracker.profile(step - 1)
        if not batches.ready():
            step_log.wait()  # while the device is busy nothing waits for input
        with tracker.bucket("input"):
            batch = next(batches)
        with tracker.bucket("step"):
            state, step_metrics = train_step(state, place(batch))
            step_log.add(step, step_metrics, batch["example_index"])
        checkpoints.poll()

        is_last = step == last_step
        eval_due = is_last or is_due(step, run.every["eval"])
        save_due = is_last or interrupt.requested(step) or is_due(step, run.every["checkpoint"])
        if not eval_due and not save_due:
            continue
        interrupt.working(f"finishing the evaluation and save of step {step:,}")
        step_log.flush()  # a state that is not finite is neither evaluated nor saved
        try:
            values = evaluator.validate(state, step) if eval_due else None
        except Exception:  # such as running out of memory in evaluation: the steps are not lost
            save(step, state, early_stopping, None)
            raise
        if values:
            early_stopping = early_stopping.update(values, cfg.checkpoint.best_metric, cfg.train)
            is_last |= early_stopping.should_stop(cfg.train)
        save_due |= is_last or interrupt.requested(step) or bool(values and checkpoints.is_best(values))
        if save_due:
            save(step, state, early_stopping, values)
        if save_due and interrupt.requested(step) and not is_last:
            wait_for_saves(checkpoints, tracker)
            raise Preempted(
                f"stopped at step {step:,} of {last_step:,} and saved in {workdir}; run the same command to resume"
            )
        if is_last:
            break
    interrupt.working("all steps are done, finishing the summary")
    tracker.profile(last_step)
    wait_for_saves(checkpoints, tracker)
    batches.close()
    step = int(state.step)
    values = values or evaluator.validate(state, step)
    summary = summarise(run, state, values, tracker, throughput, stream)
    test = evaluator.test(state, step, workdir)
    return summary | ({"test": test} if test else {})


class StepLog:
    """Logs the metrics of training steps. Those of a step are fetched while the device computes the next one."""

    def __init__(self, run: Run, tracker: Tracker, throughput: Throughput, checkpoints: Checkpoints):
        self._run, self._tracker, self._throughput, self._checkpoints = run, tracker, throughput, checkpoints
        self._pending: tuple[int, Any, np.ndarray] | None = None

    def wait(self) -> None:
        """Waits until the device has done the last step; counts as time of training."""
        if self._pending:
            with self._tracker.bucket("step"):
                jax.block_until_ready(self._pending[1])

    def add(self, step: int, step_metrics: Any, example_index: np.ndarray) -> None:
        """Takes the metrics of a step that was just dispatched, and logs those of the step before it.

        Args:
          step: its number, from 1.
          step_metrics: as `lm.step.train_step` returns them, on the device.
          example_index: int32 [b], this process's examples in its batch.
        """
        self.flush()
        self._pending = (step, step_metrics, example_index)

    def flush(self) -> None:
        """Waits for the metrics of the last step and logs them.

        Raises:
          Diverged: they are not finite.
        """
        if self._pending:
            with self._tracker.bucket("step"):
                self._log(*self._pending)
            self._pending = None

    def _log(self, step: int, step_metrics: Any, example_index: np.ndarray) -> None:
        cfg, tracker, throughput = self._run.cfg, self._tracker, self._throughput
        sums = jax.device_get(step_metrics)
        values = {name: float(sums.pop(name)) for name in ("loss", "weight", "grad_norm", "learning_rate")}
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            tracker.log(step, "train", values)
            good = self._checkpoints.last_good
            last = "there is no checkpoint yet" if good is None else f"the last good checkpoint is step {good:,}"
            raise Diverged(
                f"step {step:,}: loss {values['loss']}, gradient norm {values['grad_norm']}; example indices "
                f"{example_index.tolist()}; {last}. This step was not saved. Try a lower optim.learning_rate or "
                "optim.clip_norm, or look at the examples with tools/inspect_batch.py"
            )
        tokens_per_second = throughput.update(step)
        utilisation, values["input_bound"] = throughput.utilisation(tokens_per_second), throughput.input_bound
        tracker.progress(step, values["loss"], tokens_per_second, utilisation.get("mfu"), throughput.input_bound)
        if is_due(step, cfg.monitor.log_every_steps) or step == self._run.program.total_steps:
            values["tokens_per_second"] = tokens_per_second
            tracker.log(step, "train", values | utilisation | metrics.finalize(sums, task_of(cfg).has_perplexity))


def is_due(step: int, every: int) -> bool:
    """Whether something done every `every` steps (0 = never) is due after step `step`."""
    return every > 0 and step % every == 0


def measure_throughput(run: Run, tracker: Tracker, start_step: int) -> Throughput:
    """The throughput of a run, from now on."""
    return Throughput(
        tracker,
        start_step,
        tokens_per_step=run.cfg.data.batch_size * run.cfg.data.seq_len,
        flops_per_token=run_lib.flops_per_token(run),
        device_kind=run.mesh.devices.flat[0].device_kind,
        num_devices=run.mesh.devices.size,
    )


def save_state(
    run: Run,
    stream: Stream,
    tracker: Tracker,
    checkpoints: Checkpoints,
    step: int,
    state: TrainState,
    early_stopping: EarlyStopping,
    values: dict[str, float] | None,
) -> None:
    """Starts saving a checkpoint, with the metrics of an evaluation of the same state, or None."""
    tokenizer, replay = run.plan.tokenizer, run.plan.replay
    with tracker.bucket("checkpoint"):
        info: dict[str, Any] = {
            "config": schema.to_dict(run.cfg),
            "tokenizer_hash": tokenizer.hash if tokenizer else "",
            "data": resume.data_info(run.data, stream.consumed_by(step), run_lib.consumed(run, stream, step)),
            "replay": schema.to_dict(replay) if replay else None,
            "waiting": early_stopping._asdict(),
        }
        checkpoints.save(step, state, info, values)


def what_is_kept(last_good: int | None) -> str:
    """What is true of a run that ends now, if its newest complete checkpoint is that of step `last_good`."""
    if last_good is None:
        return "no checkpoint is complete, the same command starts from the beginning"
    return f"step {last_good:,} is saved, the same command resumes from there, or from a save that was just completed"


def wait_for_saves(checkpoints: Checkpoints, tracker: Tracker) -> None:
    """Waits until all checkpoints are on disk."""
    with tracker.bucket("checkpoint"):
        checkpoints.wait()


def restore(
    run: Run, saved: list[checkpoint.Saved], say: Say, accept_changed_data: bool = False
) -> tuple[TrainState, resume.Position, dict[str, str]]:
    """The state to start from, the position it stands for, and parameter path -> where its value came from.

    Raises:
      CheckpointError: there are checkpoints but none can be read, or they were trained on other data.
    """
    for candidate in reversed(saved):
        try:
            state = checkpoint.load(candidate, run.program.abstract_state)
        except CheckpointError as error:
            say(f"{error}\ngoing back to the checkpoint before it")
            continue
        resume.check_data(candidate, run.data, accept_changed_data, say)
        say(f"resuming from {candidate.path}")
        trained = run.program.optimizer.selection.trained
        return state, resume.position(candidate), dict.fromkeys(trained, f"this run, step {candidate.step:,}")
    if saved:
        raise CheckpointError(
            f"none of the {len(saved)} checkpoints in {saved[0].path.parent} can be read: restore one, or start a new "
            "--workdir"
        )
    init, origin_of = run.plan.init, run.plan.origin_of
    if init:
        there = build_saved_config(init.info["config"]).model
        say(init_from.describe(origin_of, run.plan.unused, init, there, run.cfg.model))
    model, abstract_params = run.program.model, run.program.abstract_state.params
    params, origin = init_from.initialize(model, abstract_params, run.cfg.seed, init, origin_of)
    state = jax.jit(run.program.init_state, out_shardings=run.program.state_shardings)(params)
    return state, resume.START, origin


def summarise(
    run: Run,
    state: TrainState,
    values: dict[str, float],
    tracker: Tracker,
    throughput: Throughput,
    stream: Stream,
) -> dict[str, Any]:
    """The figures of a finished run, those of its last evaluation (`values`) among them."""
    cfg, step = run.cfg, int(state.step)
    params = run.program.abstract_state.params
    trained = trainable.trained_part(run.program.optimizer.selection, params)
    answer = {"answer_loss": values["nll"]} if cfg.task.name == "chat" else {}
    return {
        **values,
        **answer,
        "steps": step,
        "skipped_steps": int(state.skipped),
        "tokens": stream.consumed_by(step) * cfg.data.seq_len,
        "seconds": tracker.seconds(),
        "tokens_per_second": throughput.overall(step),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "trained_parameters": sum(leaf.size for leaf in jax.tree.leaves(trained)),
        "devices": run.mesh.devices.size,
        "device_kind": run.mesh.devices.flat[0].device_kind,
        "goodput": tracker.goodput(),
        "input_bound": throughput.overall_input_bound(),
        **throughput.utilisation(throughput.overall(step)),
        **({"sources": run_lib.consumed(run, stream, step)} if len(run.data.sources) > 1 else {}),
    }


def first_and_best(workdir: Path, metric: str) -> dict[str, Any]:
    """'before' -> the evaluation at step 0, 'best' -> the best of the later ones by `metric`; {} where there is none.

    Read from metrics.jsonl, so that they include the evaluations before the run was resumed.
    """
    rows, _ = read_rows(workdir / "metrics.jsonl")
    evaluations = [row for row in rows if row.pop("split") == "eval"]
    measured = [row for row in evaluations if row.get(metric) is not None and row["step"] > 0]
    best = max(measured, key=lambda row: metrics.gain(metric, row[metric]), default={})
    return {"before": next((row for row in evaluations if row["step"] == 0), {}), "best": best}


def parameter_table(planned: Plan, selection: Selection, origin: dict[str, str]) -> str:
    """A table of all parameters: shape, trained or frozen, decayed or not, learning rate, and origin of the value."""
    cfg = planned.cfg
    return report.parameter_table(
        planned.abstract_params,
        selection=selection,
        learning_rate=cfg.optim.learning_rate,
        scales=mup.direction_scales(cfg.optim.name, planned.logical_axes, mup.width_ratio(cfg.model)),
        origin=origin,
    )


def describe(cfg: Config, workdir: str | Path) -> str:
    """The resolved config and the parameter table of a run, without starting it."""
    planned = run_lib.plan(cfg, Path(workdir))
    origin = {path: name or "initialised" for path, name in planned.origin_of.items()}
    origin = origin or dict.fromkeys(planned.logical_axes, "initialised")
    return config.to_json(planned.cfg) + "\n" + parameter_table(planned, planned.selection, origin)
