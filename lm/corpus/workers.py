"""Who runs the units of a stage: this process, several of this machine, or an Apache Beam runner."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lm.config.schema import ConfigError

# (function of a unit, units) -> CPU seconds that each took, as they are done, in any order
Runner = Callable[[Callable[[Any], None], Sequence[Any]], Iterator[float]]


HUNG_SECONDS = 25.0  # without CPU time, in a unit
_LOOK_SECONDS = 1.0
_UNITS_A_PROCESS = 8  # then a fresh one: what a process frees it keeps, in pieces, so that its memory grows a little


class JobError(RuntimeError):
    """A job stopped for a reason that is not in its data; the same command goes on where it stopped."""


def here(work: Callable[[Any], None], units: Sequence[Any]) -> Iterator[float]:
    """Runs units one after the other."""
    return (_timed(work, unit) for unit in units)


class _Worker:
    """A process of this machine that runs one unit after the other."""

    def __init__(self) -> None:
        # Spawned: what this process has imported may have threads, which a fork would not survive.
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.unit: Any = None
        self.done = 0

    def start(self, work: Callable[[Any], None], unit: Any) -> None:
        self.unit, self.since = unit, time.monotonic()
        self.spent: float | None = -1.0
        with contextlib.suppress(OSError):  # it ended; `check` tells
            self.pipe.send((work, unit))

    def finish(self) -> float:
        """CPU seconds of the unit. Raises what it raised, or JobError where the process ended."""
        try:
            seconds, error = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(_LOOK_SECONDS)
            code = self.process.exitcode
            raise self._lost(
                f"ended without a word, exit code {code}: killed, or out of memory (fewer --workers need less)"
            ) from None
        if error is not None:
            raise error
        self.unit, self.done = None, self.done + 1
        return seconds

    def check(self) -> None:
        """Raises JobError where it has a unit and takes no CPU time: stopped, or at a file of a dead mount."""
        if (now := _cpu_seconds(self.process.pid or 0)) != self.spent:
            self.since, self.spent = time.monotonic(), now
        if self.unit is not None and now is not None and time.monotonic() - self.since >= HUNG_SECONDS:
            raise self._lost(f"hangs: no CPU time in {HUNG_SECONDS:.0f} s: stopped, or its disk does not answer")

    def stop(self) -> None:
        self.pipe.close()
        self.process.kill()  # what it has not finished leaves nothing
        self.process.join()

    def _lost(self, why: str) -> JobError:
        return JobError(
            f"worker process {self.process.pid}, at {_name(self.unit)}, {why}. What is done is kept: start the same "
            "command again"
        )


@contextlib.contextmanager
def processes(count: int) -> Iterator[Runner]:
    """Runs units in `count` processes of this machine. They end with this one, however it ends."""
    if count == 1:
        yield here
        return
    workers: list[_Worker] = []

    def run(work: Callable[[Any], None], units: Sequence[Any]) -> Iterator[float]:
        left = list(reversed(units))
        while left or any(worker.unit is not None for worker in workers):
            for at, worker in enumerate(workers):
                if worker.unit is None and worker.done >= _UNITS_A_PROCESS and left:
                    worker.stop()
                    workers[at] = _Worker()
            workers.extend(_Worker() for _ in range(min(count, len(left)) - len(workers)))
            for worker in workers:
                if worker.unit is None and left:
                    worker.start(work, left.pop())
            at_work: dict[Any, _Worker] = {worker.pipe: worker for worker in workers if worker.unit is not None}
            for pipe in multiprocessing.connection.wait(list(at_work), _LOOK_SECONDS):
                yield at_work[pipe].finish()
            for worker in at_work.values():
                worker.check()

    try:
        yield run
    finally:
        for worker in workers:
            worker.stop()


def _serve(pipe: Any) -> None:
    """A worker's life: units until the pipe ends, as it does with the process that holds its other end."""
    _end_with_parent()
    while True:
        try:
            work, unit = pipe.recv()
        except EOFError:
            return
        try:
            answer: tuple[float, BaseException | None] = _timed(work, unit), None
        except Exception as error:
            answer = 0.0, error
        pipe.send(answer)


def _cpu_seconds(pid: int) -> float | None:
    """Of a process; None where the platform does not tell."""
    try:
        return float(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9
    except (OSError, ValueError, IndexError):
        return None


def _name(unit: Any) -> str:
    """Of a unit, or of the first of its files."""
    return re.sub(r"\s+", " ", str(unit))[:200]


@contextlib.contextmanager
def beam(runner: str, options: Sequence[str]) -> Iterator[Runner]:
    """Runs units on Apache Beam: a pipeline a stage, whose workers must all see the job's folder.

    Args:
      runner: its name, such as DirectRunner or DataflowRunner.
      options: further flags of it, such as --project=NAME.

    Raises:
      ConfigError: Apache Beam is not installed.
    """
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise ConfigError(f"--runner={runner} needs Apache Beam: pip install -e '.[beam]'") from None
    flags = PipelineOptions([f"--runner={runner}", *options])

    def run(work: Callable[[Any], None], units: Sequence[Any]) -> Iterator[float]:
        if not units:
            return
        start = time.process_time()
        with apache_beam.Pipeline(options=flags) as pipeline:
            created = pipeline | apache_beam.Create(list(units))
            # Without it, a runner may fuse all units into one piece of work.
            _ = created | apache_beam.Reshuffle() | "a unit" >> apache_beam.Map(work)
        # Beam does not tell of single units.
        yield from [(time.process_time() - start) / len(units)] * len(units)

    yield run


def _timed(work: Callable[[Any], None], unit: Any) -> float:
    start = time.process_time()
    work(unit)
    return time.process_time() - start


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
