"""Hands the rows of a run to its trackers, none of which can slow or stop it.

Each tracker has a thread of its own and a bounded queue. One that fails, hangs or does not keep up loses rows, which is
said once when it is noticed and counted at the end; metrics.jsonl, which the run itself writes, has them all.
"""

import contextlib
import importlib.util
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lm import lease, preemption
from lm.config.schema import ConfigError
from lm.tracking import mlflow, tensorboard, wandb
from lm.tracking.service import RunFacts, Service, Status

OPENERS: dict[str, Callable[[RunFacts], Service]] = {
    "tensorboard": tensorboard.open_service,
    "wandb": wandb.open_service,
    "mlflow": mlflow.open_service,
}
NEEDED = {"wandb": ("wandb",), "mlflow": ("mlflow", "sqlalchemy", "alembic")}  # packages of the extra of that name
QUEUE_ROWS = 1000  # that wait for a tracker
FINISH_SECONDS = 10.0  # that the end of a run waits for all its trackers together

Say = Callable[[str], None]


def check_installed(names: Sequence[str]) -> None:
    """Raises ConfigError for a tracker of `monitor.trackers` whose packages are not installed."""
    for name in names:
        # A folder of that name in the working directory is found too, but has no origin.
        found = {package: importlib.util.find_spec(package) for package in NEEDED.get(name, ())}
        if missing := [package for package, spec in found.items() if spec is None or spec.origin is None]:
            verb = "is" if len(missing) == 1 else "are"
            raise ConfigError(
                f"'monitor.trackers' names {name}, but {' and '.join(missing)} {verb} not installed: "
                f"pip install -e '.[{name}]'"
            )


class Trackers:
    """The trackers of a run, to be called by its own thread.

    Attributes:
      figures: of summary.json, handed to them at the end.
    """

    def __init__(self, relays: Sequence["_Relay"] = ()):
        self._relays, self.figures = relays, dict[str, float]()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Hands on the values of a row, 'SPLIT/METRIC' -> value."""
        for relay in self._relays:
            relay.send("scalars", step, values)

    def text(self, step: int, name: str, text: str) -> None:
        """Hands on a text that the model has generated."""
        for relay in self._relays:
            relay.send("text", step, name, text)


@contextlib.contextmanager
def opened(names: Sequence[str], facts: RunFacts, say: Say) -> Iterator[Trackers]:
    """The trackers of a run for its block; at the end waits up to FINISH_SECONDS until they have what is queued.

    Ctrl-C does not wait. Nor does a run that has lost its folder to another process: what is queued is dropped.

    Args:
      names: keys of OPENERS.
      facts: what each is told first.
      say: prints a line of the console.
    """
    trackers = Trackers(relays := [_Relay(name, facts, say) for name in dict.fromkeys(names)])
    try:
        yield trackers
    except preemption.Preempted:
        _finish(relays, {}, "interrupted")
        raise
    except lease.Lost:
        _abandon(relays)
        raise
    except Exception:
        _finish(relays, {}, "failed")
        raise
    except BaseException:
        _abandon(relays)
        raise
    _finish(relays, trackers.figures, "done")


def _finish(relays: Sequence["_Relay"], figures: Mapping[str, float], status: Status) -> None:
    deadline = time.monotonic() + FINISH_SECONDS
    for relay in relays:
        relay.finish(figures, status)
    for relay in relays:
        relay.wait(deadline)


def _abandon(relays: Sequence["_Relay"]) -> None:
    for relay in relays:
        relay.abandoned = True
        relay.finish({}, "interrupted")  # wakes its thread


class _Relay:
    """One tracker: its thread, and what waits for it. Prints in the thread of the run alone."""

    def __init__(self, name: str, facts: RunFacts, say: Say):
        self._name, self._say, self.abandoned = name, say, False
        self._sent = self._recorded = 0  # each is written by one thread alone
        self._trouble, self._is_told = "", False
        self._waiting: queue.SimpleQueue[tuple[str, tuple[Any, ...]]] = queue.SimpleQueue()
        work = (OPENERS[name], facts)
        self._thread = threading.Thread(target=self._work, args=work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def send(self, method: str, *args: Any) -> None:
        """Queues a call of the tracker; returns at once."""
        self._sent += 1
        if self._waiting.qsize() < QUEUE_ROWS:
            self._waiting.put((method, args))
        else:
            self._trouble = self._trouble or f"does not keep up: {QUEUE_ROWS:,} rows wait for it, further ones are lost"
        self._tell()

    def finish(self, figures: Mapping[str, float], status: Status) -> None:
        """Queues the end; returns at once."""
        self._waiting.put(("finish", (figures, status)))

    def wait(self, deadline: float) -> None:
        """Waits for the end until `deadline`, of `time.monotonic`, then says what was lost."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._trouble = self._trouble or f"has not finished within {FINISH_SECONDS:g} s, and is left alone"
        self._tell()
        if lost := self._sent - self._recorded:
            self._print(f"{lost:,} of {self._sent:,} rows and texts were not recorded; metrics.jsonl has all rows")

    def _work(self, open_service: Callable[[RunFacts], Service], facts: RunFacts) -> None:
        service: Service | None = None
        try:
            service = open_service(facts)
        except BaseException as error:  # whatever it is, the run goes on
            self._failed(error)
        while True:
            method, args = self._waiting.get()
            try:
                if service and not self.abandoned:
                    getattr(service, method)(*args)
                    self._recorded += method != "finish"
            except BaseException as error:
                self._failed(error)
            if method == "finish":
                return

    def _failed(self, error: BaseException) -> None:
        self._trouble = self._trouble or f"failed, the run goes on: {type(error).__name__}: {error}"

    def _tell(self) -> None:
        if self._trouble and not self._is_told:
            self._is_told = True
            self._print(" ".join(self._trouble.split())[:400])

    def _print(self, message: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # a console that cannot be written
            self._say(f"tracker {self._name}: {message}")
