"""Runners of the units of a stage: this process, several processes of this machine, or Apache Beam."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lm.config.schema import ConfigError

# (function of a unit, units) -> CPU seconds of each unit, as they finish, in any order
Runner = Callable[[Callable[[Any], None], Sequence[Any]], Iterator[float]]


HUNG_SECONDS = 25.0  # a worker that uses no CPU time for so long is taken to hang
_POLL_SECONDS = 1.0
_UNITS_PER_PROCESS = 8  # then the process is replaced: its memory fragments and grows a little with each unit


class JobError(RuntimeError):
    """A job stopped for a reason other than its data; the same command resumes it."""


def in_process(work: Callable[[Any], None], units: Sequence[Any]) -> Iterator[float]:
    """Runs the units in this process, one after the other."""
    return (_timed(work, unit) for unit in units)


class _Worker:
    """A process of this machine that runs one unit at a time."""

    def __init__(self) -> None:
        # Spawn, not fork: imported libraries may have threads, which do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self.pipe, child_pipe = context.Pipe()
        self.process = context.Process(target=_serve, args=(child_pipe,), daemon=True)
        self.process.start()
        child_pipe.close()
        self.unit: Any = None
        self.done = 0

    def start(self, work: Callable[[Any], None], unit: Any) -> None:
        self.unit, self.since = unit, time.monotonic()
        self.spent: float | None = -1.0
        with contextlib.suppress(OSError):  # the process has ended; `finish` reports it
            self.pipe.send((work, unit))

    def finish(self) -> float:
        """CPU seconds of the unit. Raises the unit's exception, or JobError if the process has ended."""
        try:
            seconds, error = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(_POLL_SECONDS)
            code = self.process.exitcode
            raise self._lost(
                f"ended without a result, exit code {code}: killed, or out of memory (fewer --workers need less)"
            ) from None
        if error is not None:
            raise error
        self.unit, self.done = None, self.done + 1
        return seconds

    def check(self) -> None:
        """Raises JobError if the worker has a unit and uses no CPU time: it is stopped, or blocked on a dead mount."""
        if (now := _cpu_seconds(self.process.pid or 0)) != self.spent:
            self.since, self.spent = time.monotonic(), now
        if self.unit is not None and now is not None and time.monotonic() - self.since >= HUNG_SECONDS:
            raise self._lost(f"hangs: no CPU time in {HUNG_SECONDS:.0f} s; it is stopped, or its disk does not respond")

    def stop(self) -> None:
        self.pipe.close()
        self.process.kill()  # an unfinished unit leaves no output
        self.process.join()

    def _lost(self, why: str) -> JobError:
        return JobError(
            f"worker process {self.process.pid}, at {_name(self.unit)}, {why}. Finished units are kept; run the same "
            "command to resume"
        )


@contextlib.contextmanager
def processes(count: int) -> Iterator[Runner]:
    """A runner of `count` processes of this machine. They end with this process, even if it is killed."""
    if count == 1:
        yield in_process
        return
    workers: list[_Worker] = []

    def run(work: Callable[[Any], None], units: Sequence[Any]) -> Iterator[float]:
        pending = list(reversed(units))
        while pending or any(worker.unit is not None for worker in workers):
            for i, worker in enumerate(workers):
                if worker.unit is None and worker.done >= _UNITS_PER_PROCESS and pending:
                    worker.stop()
                    workers[i] = _Worker()
            workers.extend(_Worker() for _ in range(min(count, len(pending)) - len(workers)))
            for worker in workers:
                if worker.unit is None and pending:
                    worker.start(work, pending.pop())
            busy: dict[Any, _Worker] = {worker.pipe: worker for worker in workers if worker.unit is not None}
            for pipe in multiprocessing.connection.wait(list(busy), _POLL_SECONDS):
                yield busy[pipe].finish()
            for worker in busy.values():
                worker.check()

    try:
        yield run
    finally:
        for worker in workers:
            worker.stop()


def _serve(pipe: Any) -> None:
    """Main function of a worker: runs units until the pipe is closed, at the latest when the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all; the parent ends this process
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
    """CPU seconds of a process; None if the platform does not report them."""
    try:
        return float(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9
    except (OSError, ValueError, IndexError):
        return None


def _name(unit: Any) -> str:
    """Name of a unit, for messages."""
    return re.sub(r"\s+", " ", str(unit))[:200]


@contextlib.contextmanager
def beam(runner: str, options: Sequence[str]) -> Iterator[Runner]:
    """A runner on Apache Beam, with one pipeline for each stage. All workers must share the job's folder.

    Args:
      runner: name of the Beam runner, such as DirectRunner or DataflowRunner.
      options: further flags for it, such as --project=NAME.

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
            # Without the Reshuffle a runner may fuse all units into one bundle.
            _ = created | apache_beam.Reshuffle() | "a unit" >> apache_beam.Map(work)
        # Beam does not report single units.
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
