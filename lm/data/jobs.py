"""Who runs the units of a stage: this process, several of this machine, or an Apache Beam runner."""

import concurrent.futures
import contextlib
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lm.schema import ConfigError

# (function of a unit, units) -> CPU seconds that each took, as they are done, in any order
Runner = Callable[[Callable[[Any], None], Sequence[Any]], Iterator[float]]


class JobError(RuntimeError):
    """A job stopped for a reason that is not in its data; the same command goes on where it stopped."""


def here(work: Callable[[Any], None], units: Sequence[Any]) -> Iterator[float]:
    """Runs units one after the other."""
    return (_timed(work, unit) for unit in units)


@contextlib.contextmanager
def processes(count: int) -> Iterator[Runner]:
    """Runs units in `count` processes of this machine. They end with this one, however it ends."""
    if count == 1:
        yield here
        return
    # Spawned: what this process has imported may have threads, which a fork would not survive.
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(count, mp_context=context, initializer=_end_with_parent)

    def run(work: Callable[[Any], None], units: Sequence[Any]) -> Iterator[float]:
        running = {pool.submit(_timed, work, unit): unit for unit in units}
        try:
            for done in concurrent.futures.as_completed(running):
                yield done.result()
        except concurrent.futures.BrokenExecutor:
            raise JobError(
                "a worker process ended without a word: killed, or out of memory (fewer --workers need less). What is "
                "done is kept: start the same command again"
            ) from None

    try:
        yield run
    finally:
        pool.shutdown(cancel_futures=True)


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
        raise ConfigError(f"--runner={runner} needs Apache Beam: pip install 'lm[beam]'") from None
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
