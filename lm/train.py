"""Training: `train` prepares, restores and finishes a run; `loop` steps, logs, evaluates, saves and stops.

The objects of a run are made in `lm.run`; what a step does to a batch is in `lm.step`. The same command started again
resumes the run: parameters, position in the data and metrics continue as if it had never stopped.
"""

import contextlib
import functools
import math
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from lm import checkpoint, compilation_cache, config, lease, program, terminal
from lm import run as run_lib
from lm.checkpoint import Checkpoints, Diverged, init_from, resume
from lm.config import Config, schema
from lm.evaluation import metrics
from lm.evaluation.early_stopping import EarlyStopping
from lm.evaluator import Evaluator
from lm.optim import mup, trainable
from lm.optim.trainable import Selection
from lm.parallel import mesh as mesh_lib
from lm.preemption import Interrupt, Preempted, StopRequest
from lm.run import Plan, Run, Stream
from lm.step import Metrics
from lm.tasks import build_config, build_saved_config, default_config, task_of
from lm.tracking import environment, files, relay, report, run_state, saved_step
from lm.tracking.files import RunFileError
from lm.tracking.service import RunFacts
from lm.tracking.throughput import Throughput
from lm.tracking.tracker import Tracker
from lm.types import TrainState

Say = Callable[[str], None]


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
      RunFileError: a file of the run is damaged or cannot be written.
      Diverged: the loss, the gradient or the state became NaN or infinite.
      Preempted: SIGTERM or SIGINT came; the state was saved first.
      lm.lease.Held, lm.lease.Lost: another process writes into `workdir`, from the start on, or since it took it over.
    """
    workdir = Path(workdir)
    run_lib.check_workdir(workdir)
    with Interrupt() as interrupt, lease.hold_for_run(workdir) as check_lease:
        return start_or_resume(cfg, workdir, accept_changed_data, check_lease, interrupt, Alone())


class Place(Protocol):
    """Where a run takes its steps: `Alone`, or beside others (`lm.study.group`).

    Attributes:
      trials_at_once: how many runs share the devices, this one included.
    """

    trials_at_once: int

    def devices(self) -> list[Any]:
        """Those of the run's mesh."""

    def prepare(self, planned: Plan, mesh: Mesh, say: Say, begun: Mapping[str, Any] | None) -> Run:
        """As `lm.run.prepare`."""

    def stepper(self, run: Run, state: TrainState, batch_size: int) -> "Steps":
        """What takes the run's steps from a state; compiled when this returns."""


class Steps(Protocol):
    """The state of a run, and its training step."""

    @property
    def state(self) -> TrainState:
        """After the steps so far; its buffers may be gone after the next one."""

    def step(self, batch: dict[str, np.ndarray]) -> Metrics:
        """Takes a step on this process's rows of a batch; returns its metrics, as `lm.step.train_step` does."""


class Alone:
    """All devices, with data and programs of the run's own."""

    trials_at_once = 1

    def devices(self) -> list[Any]:
        return jax.devices()

    def prepare(self, planned: Plan, mesh: Mesh, say: Say, begun: Mapping[str, Any] | None) -> Run:
        return run_lib.prepare(planned, mesh, say, begun)

    def stepper(self, run: Run, state: TrainState, batch_size: int) -> Steps:
        return Stepper(run, state, batch_size)


class Stepper:
    """A compiled training step of a run, and the state that it moves on; the steps of a run that trains alone."""

    def __init__(self, run: Run, state: TrainState, batch_size: int):
        # Ahead of time: a batch of another shape is an error, not a silent recompilation.
        shapes = program.abstract_batch(run.cfg, run.mesh, batch_size)
        self._step = run.program.train_step.lower(run.program.abstract_state, shapes).compile()
        self._place, self.state = run_lib.placer(run.mesh, batch_size), state

    def step(self, batch: dict[str, np.ndarray]) -> Metrics:
        """As `Steps.step`."""
        self.state, step_metrics = self._step(self.state, self._place(batch))
        return step_metrics


def start_or_resume(
    cfg: Config,
    workdir: Path,
    accept_changed_data: bool,
    check_lease: Callable[[], None],
    interrupt: StopRequest,
    where: Place,
) -> dict[str, Any]:
    """As `train`, of a folder that this process owns; `check_lease` is called before each write."""
    compilation_cache.use(cfg.train.compilation_cache)
    # The config is checked before data is read or a device is touched.
    relay.check_installed(cfg.monitor.trackers)
    planned = run_lib.plan(cfg, workdir)
    cfg = planned.cfg

    # Devices, data, and the step functions.
    saved = checkpoint.list_saved(workdir)
    is_primary = jax.process_index() == 0
    say: Say = terminal.say if is_primary else lambda _: None
    saved_step.check(workdir, [candidate.step for candidate in saved], say)
    summary_path = workdir / "summary.json"
    if is_primary:
        checkpoint.sweep(workdir, say)
    if readable := [candidate for candidate in saved if "unreadable" not in candidate.info]:
        resume.check_tokenizer(readable[-1], planned.tokenizer)
        resume.refuse_changes(build_saved_config(readable[-1].info["config"]), cfg, workdir, accept_changed_data, say)
    elif saved:
        raise checkpoint.none_readable(saved)
    mesh = mesh_lib.make_mesh(cfg.mesh, where.devices())
    say(f"devices: {mesh.size} of kind {mesh.devices.flat[0].device_kind}, as {mesh_lib.in_words(mesh)}")
    run = where.prepare(planned, mesh, say, readable[-1].info if readable else None)

    with jax.set_mesh(mesh):
        # The state: from this run's newest readable checkpoint, else from `init_from`, else from scratch.
        tell = say if is_primary else checkpoint.warn  # each process says why it went back
        state, position, origin = restore(run, saved, tell, accept_changed_data)
        start, total_steps = int(state.step), run.program.total_steps
        say(parameter_table(run.plan, run.program.optimizer.selection, origin))
        is_over = start >= total_steps or position.early_stopping.should_stop(cfg.train)
        if is_over and (done := finished_summary(summary_path, say)):
            if is_primary and not (workdir / "report.html").exists():  # ended after it had written its summary
                with run_state.recorded_failure(workdir, check_lease):
                    report.write_report(workdir)
            say(f"already done: step {start:,} of {total_steps:,}; see {summary_path}")
            return done
        if is_primary:
            check_lease()
            if start and not is_over:  # it goes on, so that the figures of an end are no longer its own
                with files.access(summary_path, "removing"):
                    summary_path.unlink(missing_ok=True)
            if run.plan.tokenizer:
                run.plan.tokenizer.save(workdir / run.plan.tokenizer.file)
            files.write_atomic(workdir / "config.json", config.to_json(cfg))
            started = environment.record(workdir, start, say)
        else:
            started = {}
        names, told = cfg.monitor.trackers if is_primary else (), facts(cfg, workdir, start, started)
        with (
            relay.opened(names, told, say) as others,
            run_state.recorded_failure(workdir, check_lease) if is_primary else contextlib.nullcontext(),
        ):
            with (
                Tracker(workdir, total_steps, start, is_primary, cfg.monitor, is_over, check_lease, others) as tracker,
                Checkpoints(workdir, cfg.checkpoint, saved, start, check_lease) as checkpoints,
            ):
                interrupt.kept = lambda: what_is_kept(checkpoints.last_good)
                summary = loop(run, workdir, state, position, tracker, checkpoints, interrupt, where)
            if is_primary:
                # Of metrics.jsonl, which has the evaluations before the run was resumed too.
                rows = (row for row in files.read_rows(workdir / "metrics.jsonl") if row["split"] == "eval")
                summary |= (evaluations := files.first_and_best(rows, cfg.checkpoint.best_metric))
                with tracker.writing():
                    if cfg.train.early_stopping.patience:  # with early stopping the run stands for its best checkpoint
                        best = {k: value for k, value in evaluations["best"].items() if k in summary and k != "seconds"}
                        summary |= best
                        summary |= {"answer_loss": summary["nll"]} if "answer_loss" in summary else {}
                    report.write_summary(workdir, summary)
                    say(f"summary: {summary_path}, curves: {report.write_report(workdir)}")
                others.figures = {
                    key: float(value) for key, value in schema.flatten(summary) if isinstance(value, int | float)
                }
        return summary


def facts(cfg: Config, workdir: Path, start_step: int, started: Mapping[str, Any]) -> RunFacts:
    """What the trackers of a run are told at its start; `started` is from `lm.tracking.environment.record`."""
    values = dict(schema.flatten(schema.to_dict(cfg)))
    usual = dict(schema.flatten(default_config(cfg.task.name).to_dict()))
    return RunFacts(
        workdir=workdir,
        name=cfg.monitor.run_name or workdir.resolve().name,
        project=cfg.monitor.project,
        start_step=start_step,
        config=values,
        changed={key: value for key, value in values.items() if value != usual.get(key)},
        environment=started,
    )


def loop(
    run: Run,
    workdir: Path,
    state: TrainState,
    position: resume.Position,
    tracker: Tracker,
    checkpoints: Checkpoints,
    interrupt: StopRequest,
    where: Place,
) -> dict[str, Any]:
    """Trains from `state` to the last step, evaluating and saving on the way. Returns the summary.

    Raises:
      Diverged, Preempted: as `train`.
    """
    cfg, start, last_step = run.cfg, int(state.step), run.program.total_steps
    stream, early_stopping = run_lib.training_stream(run, start, position), position.early_stopping
    with tracker.bucket("compile"):
        stepper = where.stepper(run, state, stream.batch_size)
        evaluator = Evaluator(run, tracker)
    throughput = measure_throughput(run, tracker, start)
    step_log = StepLog(run, tracker, throughput, checkpoints)
    save = functools.partial(save_state, run, stream, tracker, checkpoints)

    if start == 0 and cfg.eval.at_start:
        evaluator.validate(stepper.state, 0)
    del state
    values: dict[str, float] | None = None
    # A run that had stopped early, but was killed before its summary was written, has no step left.
    steps = range(0) if early_stopping.should_stop(cfg.train) else range(start + 1, last_step + 1)
    batches = run_lib.train_batches(run, stream)
    for step in steps:
        interrupt.working(f"finishing step {step:,}, then saving")
        tracker.profile(step - 1)
        if not batches.ready():
            step_log.wait()  # while the device is busy nothing waits for input
        with tracker.bucket("input"):
            batch = next(batches)
        with tracker.bucket("step"):
            step_metrics = stepper.step(batch)
            step_log.add(step, step_metrics, batch["example_index"])
        checkpoints.poll()
        tracker.saved(checkpoints.last_good)

        is_last = step == last_step
        eval_due = is_last or is_due(step, run.every["eval"])
        save_due = is_last or interrupt.requested(step) or is_due(step, run.every["checkpoint"])
        if not eval_due and not save_due:
            continue
        interrupt.working(f"finishing the evaluation and save of step {step:,}")
        step_log.flush()  # a state that is not finite is neither evaluated nor saved
        state = stepper.state
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
        del state
        if is_last:
            break
    interrupt.working("all steps are done, finishing the summary")
    tracker.profile(last_step)
    wait_for_saves(checkpoints, tracker)
    batches.close()
    state = stepper.state
    step = int(state.step)
    values = values or evaluator.validate(state, step)
    summary = summarise(run, state, values, tracker, throughput, stream)
    if where.trials_at_once > 1:  # its seconds and tokens per second are not those of a run alone
        summary["trials_at_once"] = where.trials_at_once
    if evaluator.confusion:
        summary["confusion"] = {"step": step, "tables": evaluator.confusion}
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
        tracker.sync()
        info: dict[str, Any] = {
            "config": schema.to_dict(run.cfg),
            "tokenizer_hash": tokenizer.hash if tokenizer else "",
            "published_vocab": run.plan.published_vocab,
            "published_adapter": run.plan.published_adapter,
            "data": resume.data_info(run.data, stream.consumed_by(step), run_lib.consumed(run, stream, step)),
            "replay": schema.to_dict(replay) if replay else None,
            "waiting": early_stopping._asdict(),
        }
        checkpoints.save(step, state, info, values, tokenizer.saved_files if tokenizer else {})


def what_is_kept(last_good: int | None) -> str:
    """What is true of a run that ends now, if its newest complete checkpoint is that of step `last_good`."""
    if last_good is None:
        return "no checkpoint is complete, the same command starts from the beginning"
    return f"step {last_good:,} is saved, the same command resumes from there, or from a save that was just completed"


def wait_for_saves(checkpoints: Checkpoints, tracker: Tracker) -> None:
    """Waits until all checkpoints are on disk."""
    with tracker.bucket("checkpoint"):
        checkpoints.wait()
        tracker.saved(checkpoints.last_good)


def restore(
    run: Run, saved: list[checkpoint.Saved], say: Say, accept_changed_data: bool = False
) -> tuple[TrainState, resume.Position, dict[str, str]]:
    """The state to start from, the position it stands for, and parameter path -> where its value came from.

    Raises:
      CheckpointError: there are checkpoints but none can be read, or they were trained on other data.
    """
    if saved:
        abstract = run.program.abstract_state
        used, state = checkpoint.first_readable(saved[::-1], lambda each: checkpoint.load(each, abstract), say)
        resume.check_data(used, run.data, accept_changed_data, say)
        say(f"resuming from {used.path}")
        trained = run.program.optimizer.selection.trained
        return state, resume.position(used), dict.fromkeys(trained, f"this run, step {used.step:,}")
    init, origin_of = run.plan.init, run.plan.origin_of
    if init:
        is_run = isinstance(init, checkpoint.Saved)
        there = build_saved_config(init.info["config"]).model if is_run else run.cfg.model
        say(init_from.describe(origin_of, run.plan.unused, init, there, run.cfg.model))
    model, abstract_params = run.program.model, run.program.abstract_state.params
    seed, words = run.cfg.seed, run.plan.words
    params, origin = init_from.initialize(model, abstract_params, seed, init, origin_of, words, say)
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
    speed: dict[str, Any] = {}
    if tokens_per_second := throughput.overall(step):  # 0 where only the end of a run was done again
        speed = {"tokens_per_second": tokens_per_second, "input_bound": throughput.overall_input_bound()}
        speed |= throughput.utilisation(tokens_per_second)
    return {
        **values,
        **answer,
        "steps": step,
        "skipped_steps": int(state.skipped),
        "tokens": stream.consumed_by(step) * cfg.data.seq_len,
        "seconds": tracker.seconds(),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "trained_parameters": sum(leaf.size for leaf in jax.tree.leaves(trained)),
        "devices": run.mesh.devices.size,
        "device_kind": run.mesh.devices.flat[0].device_kind,
        "goodput": tracker.goodput(),
        "records": run.data.report,
        **speed,
        **({"sources": run_lib.consumed(run, stream, step)} if len(run.data.sources) > 1 else {}),
    }


def finished_summary(path: Path, say: Say) -> dict[str, Any]:
    """The summary of a run that is over; {} where it has to be written, as it is missing or damaged."""
    try:
        return files.read_document(path)
    except RunFileError as error:
        say(f"{error}; evaluating again to write it")
        return {}


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


class _Callable(types.ModuleType):
    """This module, as the function `lm.train(config, workdir)` of the Python interface."""

    def __call__(self, config: Config | Mapping[str, Any], workdir: str | Path) -> dict[str, Any]:
        """`train`; the config may be that of a recipe, a `ConfigDict`."""
        return train(config if isinstance(config, Config) else build_config(config), workdir)


sys.modules[__name__].__class__ = _Callable
