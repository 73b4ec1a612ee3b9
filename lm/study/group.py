"""Trains trials that differ in numbers alone side by side in one process, with one compiled step.

    python -m lm.study.group --at_once=N --keys=KEY,... < FOLDERS     (tools/sweep.py starts this)

Each trial is an ordinary run in its folder, with its own data order, evaluations, metrics, checkpoints and lease, as if
it had run alone: the loop of `lm.train` runs in a thread of its own. What is shared is the start of the process, the
packed rows, and what is compiled, which takes the keys of `lm.program.NUMBERS` as arguments.

On accelerators the states of the trials on a device are stacked, and a step of all of them is one program: `jax.vmap`
of the step. No trial spans devices, so none waits for another device. On CPUs, where a stacked step is no faster, the
threads call the step of one trial.

A trial that ends, diverges or fails frees its place, which the next one takes.
"""

import argparse
import contextlib
import functools
import math
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lm import command_line, lease, program, terminal, train
from lm import run as run_lib
from lm.config import Config, ConfigError
from lm.preemption import Interrupt, Preempted, Stopped, StopRequest
from lm.run import Plan, Run
from lm.step import Metrics
from lm.study import runs
from lm.study.definition import hash_of
from lm.tracking import run_state
from lm.types import TrainState

# Of an accelerator's memory, what trials may take together.
MEMORY_SHARE = 0.9
DOES_NOT_FIT, DOES_NOT_FIT_STATUS = "a trial does not fit on one device: each has a process and all devices", 78


class DoesNotFit(ConfigError):
    """One trial needs more memory than a device has."""


class DeviceFailed(RuntimeError):
    """The step of all trials on a device failed, such as for want of memory; none of them is to blame alone."""


def key_of(config: Config) -> str:
    """What trials of one group have in common; '' for one that runs alone, as its mesh needs several devices or it uses
    JAX's profiler, of which a process has one."""
    mesh = config.mesh
    if config.monitor.profile.num_steps:
        return ""
    if mesh.data > 1 or any(getattr(mesh, axis) > 1 for axis in ("dcn_data", "fsdp", "expert", "context", "tensor")):
        return ""
    usual = Config()
    numbers = {key: number(usual, key) for key in program.NUMBERS}
    return hash_of(program.with_numbers(config, numbers))


def number(config: Config, key: str) -> float:
    """The value of a key of `lm.program.NUMBERS`."""
    section, _, name = key.rpartition(".")
    value: float = getattr(getattr(config, section) if section else config, name)
    return value


class Shared:
    """What the trials of a group share: packed rows, and for each device the compiled steps.

    Attributes:
      keys: the keys of the config that differ between the trials.
      stacked: trials whose states are stacked on one device, 1 = none are.
    """

    def __init__(self, keys: Sequence[str], stacked: int = 1):
        self.keys, self.stacked = tuple(keys), stacked
        self._lock = threading.Lock()
        self._prepared: list[tuple[bool, Run]] = []  # (whether it had begun before, run)
        self._compiled: dict[Mesh, Any] = {}

    def prepare(self, planned: Plan, mesh: Mesh, say: train.Say, begun: Mapping[str, Any] | None) -> Run:
        """As `lm.run.prepare`; the data is read once. Raises ConfigError for a run with another tokenizer."""
        is_resumed, hash_of_own = begun is not None, planned.tokenizer.hash if planned.tokenizer else ""
        with self._lock:
            # A new run must not take the tokenizer that another began with, perhaps on data that has changed since.
            usable = [
                run
                for other_is_resumed, run in self._prepared
                if is_resumed == other_is_resumed and hash_of_own in ("", _tokenizer_of(run))
            ]
            like = next((run for run in usable if run.mesh == mesh), None) or next(iter(usable), None)
            run = run_lib.prepare(planned, mesh, say, begun, like)
            mine, theirs = _tokenizer_of(run), _tokenizer_of(self._prepared[0][1] if self._prepared else run)
            if mine != theirs:
                raise ConfigError(
                    f"this run's tokenizer is {mine[:12]}, that of the trials beside it {theirs[:12]}: the data has "
                    "changed since a run began; run it alone, with --at_once=1 and --only"
                )
            self._prepared.append((is_resumed, run))
            return run

    def step(self, run: Run, batch_size: int) -> Any:
        """(numbers, state, batch) -> (state, metrics), compiled; of `stacked` trials on a leading axis, if above 1."""
        with self._lock:
            if run.mesh not in self._compiled:
                shapes = program.abstract_batch(run.cfg, run.mesh, batch_size)
                arguments = (values_of(run.cfg, self.keys), run.program.abstract_state, shapes)
                step = run.program.step_with
                if self.stacked > 1:
                    step, arguments = jax.vmap(step), jax.tree.map(self._stacked, arguments)
                self._compiled[run.mesh] = jax.jit(step, donate_argnums=1).lower(*arguments).compile()
            return self._compiled[run.mesh]

    def _stacked(self, leaf: Any) -> jax.ShapeDtypeStruct:
        where = getattr(leaf, "sharding", None)
        where = where.update(spec=jax.P()) if where else None
        return jax.ShapeDtypeStruct((self.stacked, *leaf.shape), leaf.dtype, sharding=where)


def _tokenizer_of(run: Run) -> str:
    return run.plan.tokenizer.hash if run.plan.tokenizer else ""


def values_of(config: Config, keys: Sequence[str]) -> dict[str, np.ndarray]:
    """Key -> value, int32 or float32 []."""
    return {key: np.asarray(number(config, key), np.int32 if key == "seed" else np.float32) for key in keys}


class SharedPlace:
    """A trial's place (`lm.train.Place`): a device, whose stack the trial's state is in, if there is one."""

    def __init__(self, shared: Shared, device: Any, stack: "Stack | None", index: int, trials_at_once: int = 1):
        self._shared, self._device, self._stack, self._index = shared, device, stack, index
        self.trials_at_once = trials_at_once

    def devices(self) -> list[Any]:
        """The one device."""
        return [self._device]

    def prepare(self, planned: Plan, mesh: Mesh, say: train.Say, begun: Mapping[str, Any] | None) -> Run:
        """As `Shared.prepare`."""
        return self._shared.prepare(planned, mesh, say, begun)

    def stepper(self, run: Run, state: TrainState, batch_size: int) -> train.Steps:
        """What takes the trial's steps."""
        step, numbers = self._shared.step(run, batch_size), values_of(run.cfg, self._shared.keys)
        if self._stack is None:
            return OwnStepper(run, state, batch_size, step, numbers)
        self._stack.put(self._index, state, numbers, step)
        return StackedStepper(self._stack, self._index)

    @contextlib.contextmanager
    def occupied(self) -> Any:
        """While a trial is in the place, the others on the device wait for its steps."""
        if self._stack is None:
            yield
            return
        self._stack.enter(self._index)
        try:
            yield
        finally:
            self._stack.leave(self._index)


class OwnStepper:
    """As `lm.train.Stepper`, with a step that other trials use too."""

    def __init__(self, run: Run, state: TrainState, batch_size: int, step: Any, numbers: Mapping[str, np.ndarray]):
        self._place, self._step, self._numbers = run_lib.placer(run.mesh, batch_size), step, numbers
        self.state = state

    def step(self, batch: dict[str, np.ndarray]) -> Metrics:
        """As `lm.train.Steps.step`."""
        self.state, metrics = self._step(self._numbers, self.state, self._place(batch))
        return metrics


class StackedStepper:
    """As `lm.train.Stepper`, of a state in a stack."""

    def __init__(self, stack: "Stack", index: int):
        self._stack, self._index = stack, index

    @property
    def state(self) -> TrainState:
        """A copy of the trial's state."""
        return self._stack.take(self._index)

    def step(self, batch: dict[str, np.ndarray]) -> Metrics:
        """As `lm.train.Steps.step`; waits for the batches of the other trials."""
        return self._stack.step(self._index, batch)


_put = jax.jit(lambda stack, one, i: jax.tree.map(lambda s, x: s.at[i].set(x), stack, one), donate_argnums=0)
_take = jax.jit(lambda stack, i: jax.tree.map(lambda s: s[i], stack))


class Stack:
    """The states of the trials on one device, stacked. A step is taken when each trial there has brought its batch.

    A place that is empty takes part with a copy of another's batch, and what it computes is not read.
    """

    def __init__(self, size: int):
        self._size = size
        self._state: Any = None
        self._numbers: list[Mapping[str, np.ndarray] | None] = [None] * size
        self._step: Any = None
        self._batches: dict[int, dict[str, np.ndarray]] = {}
        self._metrics: Any = None
        self._inside: set[int] = set()
        self._turn = 0
        self._error: Exception | None = None
        self._changed = threading.Condition()

    def enter(self, index: int) -> None:
        """A trial takes a place."""
        with self._changed:
            self._inside.add(index)

    def leave(self, index: int) -> None:
        """The trial of a place has ended."""
        with self._changed:
            self._inside.discard(index)
            self._batches.pop(index, None)
            self._step_if_complete()

    def put(self, index: int, state: TrainState, numbers: Mapping[str, np.ndarray], step: Any) -> None:
        """Puts a trial's state into its place; the given buffers are freed."""
        with self._changed:
            if self._error:
                raise DeviceFailed(f"the step of all trials on this device failed: {self._error}") from self._error
            if self._state is None:
                self._state = jax.tree.map(lambda x: jnp.stack([x] * self._size), state)
            self._numbers[index], self._step = numbers, step
            try:
                self._state = jax.block_until_ready(_put(self._state, state, index))
            except Exception as error:  # the state of the others was given away to it
                self._error = error
                raise DeviceFailed(f"a trial could not be put beside the others: {error}") from error
        jax.tree.map(lambda x: x.delete(), state)

    def take(self, index: int) -> TrainState:
        """A copy of the state in a place."""
        with self._changed:
            taken: TrainState = _take(self._state, index)
            return taken

    def step(self, index: int, batch: dict[str, np.ndarray]) -> Metrics:
        """Takes a step together with the other trials; returns the metrics of this one.

        Raises:
          DeviceFailed: the step of all of them has failed.
        """
        with self._changed:
            self._batches[index] = batch
            turn = self._turn
            self._step_if_complete()
            self._changed.wait_for(lambda: self._turn > turn or self._error)
            if self._error:
                raise DeviceFailed(f"the step of all trials on this device failed: {self._error}") from self._error
            metrics: Metrics = _take(self._metrics, index)
            return metrics

    def _step_if_complete(self) -> None:
        """Takes a step of all trials once each has brought its batch. The lock is held."""
        if not self._inside or self._batches.keys() < self._inside or self._error:
            return
        some = min(self._batches)
        batches = [self._batches.get(i, self._batches[some]) for i in range(self._size)]
        numbers = [each or self._numbers[some] for each in self._numbers]
        stack = functools.partial(jax.tree.map, lambda *each: np.stack(each))
        try:
            self._state, self._metrics = self._step(stack(*numbers), self._state, stack(*batches))
        except Exception as error:
            self._error = error
        self._batches, self._turn = {}, self._turn + 1
        self._changed.notify_all()


class OfOneTrial:
    """A request to stop the group, as one trial sees it: what the trial says of its own state is not the group's."""

    kept: Callable[[], str]

    def __init__(self, whole: StopRequest):
        self._whole = whole

    def working(self, doing: str) -> None:
        """Says nothing: the group's answer to a signal names no step of one trial."""

    def requested(self, step: int) -> bool:
        """As of the whole group."""
        return self._whole.requested(step)


class Trials:
    """The trials of a group that have yet to run, and how those ended that have."""

    def __init__(self, names: Mapping[Path, str], say: train.Say):
        """Takes the folder of each trial and what it is called."""
        self._left: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for folder in names:
            self._left.put(folder)
        self._names, self._total, self._say, self._lock = names, len(names), say, threading.Lock()
        self._failed = {folder: runs.failure_time(folder) for folder in names}
        self._began = time.monotonic()
        self.ended: dict[Path, str] = {}

    def next(self) -> Path | None:
        """The folder of the next trial; None = there is none."""
        try:
            return self._left.get_nowait()
        except queue.Empty:
            return None

    def taken(self, folder: Path) -> str:
        """How another process has ended a trial since this group began, or that it has it now; '' = neither."""
        if lease.holder(folder) == "alive":
            return runs.ELSEWHERE
        state = runs.look(folder).state
        is_new = state == "done" or runs.failure_time(folder) != self._failed[folder]
        return f"{state}, by another process" if state in ("done", "failed") and is_new else ""

    def end(self, folder: Path, how: str) -> None:
        """Notes how a trial ended."""
        with self._lock:
            self.ended[folder] = how
            left, each = self._total - len(self.ended), (time.monotonic() - self._began) / len(self.ended)
            rest = f"; {left} left, about {runs.duration(left * each)}" if left else ""
            self._say(f"[{len(self.ended)}/{self._total}] {self._names[folder]}: {how}{rest}")


def differing(configs: Sequence[Config]) -> list[str]:
    """The keys of `lm.program.NUMBERS` in which the configs of a group differ."""
    return [key for key in program.NUMBERS if len({number(config, key) for config in configs}) > 1]


def run_group(
    folders: Sequence[Path], keys: Sequence[str], at_once: int, say: train.Say, interrupt: StopRequest, stacked: int = 0
) -> dict[Path, str]:
    """Runs the recorded trials of one group to their ends; returns how each ended, in words.

    Args:
      folders: of the trials, whose configs have one `key_of`.
      keys: in which trials of the group differ, also those that are done.
      at_once: how many to train at once, at most; 0 = as many as a CPU has cores, or as accelerators have memory for.
      say: progress.
      interrupt: asks all trials to stop after a step.
      stacked: how many to stack on a device; 0 = none on a CPU, all that are left to it on an accelerator.
    """
    records = {folder: runs.read_record(folder / runs.RECORD) for folder in folders}
    configs = [record.config for record in records.values()]
    if len({key_of(config) for config in configs}) != 1 or set(differing(configs)) - set(keys):
        raise ValueError(f"these trials differ in more than {', '.join(keys)}; run them one by one")
    devices, wanted = jax.local_devices(), min(at_once or len(folders), len(folders))
    if not stacked and devices[0].platform == "cpu":
        stacked, devices = 1, devices[:1] * min(wanted, at_once or cores())
    else:
        if not (most := most_stacked(configs[0], devices[0])):
            raise DoesNotFit(DOES_NOT_FIT)
        stacked = stacked or min(math.ceil(wanted / len(devices)), most)
        devices = devices[: math.ceil(wanted / stacked)]
    at_once = min(wanted, stacked * len(devices))
    names = {folder: f"{record.arm}, seed {record.config.seed}" for folder, record in records.items()}
    shared, trials = Shared(keys, stacked), Trials(names, say)
    places: list[SharedPlace] = []
    for device in devices:
        stack = Stack(stacked) if stacked > 1 else None
        here = range(min(stacked, at_once - len(places)))
        places += [SharedPlace(shared, device, stack, index, at_once) for index in here]
    say(f"{len(folders)} trials that differ in {', '.join(keys)}: {len(places)} at once")
    interrupt.working("finishing a step of each trial, then saving")
    interrupt.kept = lambda: "each trial resumes from its newest checkpoint"
    threads = [threading.Thread(target=_work, args=(place, trials, interrupt), daemon=True) for place in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return trials.ended


def cores() -> int:
    """Number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def most_stacked(config: Config, device: Any) -> int:
    """How many trials fit on a device, by what the state of one takes; activations are taken to need as much again."""
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if not limit:
        return sys.maxsize
    planned = run_lib.plan(config, None)
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(planned.abstract_params)]
    return int(MEMORY_SHARE * limit / (8 * sum(sizes)))  # parameters, gradient, two moments; activations


def _work(place: SharedPlace, trials: Trials, interrupt: StopRequest) -> None:
    """Runs trials in a place until none is left."""
    while folder := trials.next():
        try:
            if interrupt.requested(0):
                how = "was not started"
            elif not (how := trials.taken(folder)):
                with (folder / runs.LOG).open("a", encoding="utf-8", errors="replace") as log:
                    terminal.output.set(log)
                    with place.occupied(), jax.default_device(place.devices()[0]):
                        how = run_trial(folder, place, interrupt)
        except DeviceFailed as error:  # the other places on the device end too, and leave the rest to other devices
            trials.end(folder, f"interrupted: {error}; the same command resumes it, with a smaller --at_once")
            return
        except Exception as error:  # its log or its failure.json cannot be written
            how = f"failed: {error}"
        finally:
            terminal.output.set(None)
        trials.end(folder, how)


def run_trial(folder: Path, place: SharedPlace, interrupt: StopRequest) -> str:
    """Runs one trial; what goes wrong with it is recorded in its folder, and does not end the others."""
    try:
        with lease.hold_for_run(folder) as check_lease:
            (folder / runs.FAILURE).unlink(missing_ok=True)
            config = runs.read_record(folder / runs.RECORD).config
            try:
                train.start_or_resume(config, folder, False, check_lease, OfOneTrial(interrupt), place)
            except (Preempted, lease.Lost):
                raise
            except DeviceFailed:
                (folder / runs.FAILURE).unlink(missing_ok=True)  # it is no fault of this trial
                raise
            except Exception as error:
                if command_line.is_expected(error):
                    terminal.say(f"error: {error}")
                else:
                    terminal.say("".join(traceback.format_exception(error)), end="")
                return runs.fail(folder, run_state.in_words(error))
    except Preempted as stopped:
        terminal.say(stopped)
        return runs.STOPPED
    except lease.Held as taken:
        terminal.say(f"error: {taken}")
        return runs.ELSEWHERE
    except lease.Lost as lost:
        terminal.say(f"error: {lost}")
        os._exit(lost.exit_status)  # at once: no thread may go on writing; the other trials resume
    return runs.DONE


def main() -> None:
    """Runs the trials whose folders are the lines of standard input; status 75 if it was asked to stop."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--at_once", type=int, default=0)
    parser.add_argument("--keys", default="")
    given = parser.parse_args()
    folders = [Path(line) for line in sys.stdin.read().splitlines()]
    with Interrupt() as interrupt:
        try:
            ended = run_group(folders, given.keys.split(","), given.at_once, terminal.say, interrupt)
        except Stopped as stopped:
            sys.exit(stopped.exit_status)
        except DoesNotFit:
            sys.exit(DOES_NOT_FIT_STATUS)
    if runs.STOPPED in ended.values():
        sys.exit(Preempted.exit_status)


if __name__ == "__main__":
    main()
