"""Preemption: a signal stops the run after the current step, with everything saved, so that it can be resumed."""

import signal
import threading
from typing import Any

import jax


class Preempted(RuntimeError):
    """The run was asked to stop. Its state has been saved; the same command resumes it."""

    exit_status = 75  # EX_TEMPFAIL of sysexits.h: try again


class Interrupt:
    """Turns the first SIGTERM or SIGINT into a request to stop after the current step; a second SIGINT stops at once.

    With several processes JAX's preemption service makes all of them stop after the same step.
    """

    def __enter__(self) -> "Interrupt":
        self._asked = False
        self._old: dict[int, Any] = {}
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        self._asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def requested(self, step: int) -> bool:
        """Whether to stop after step `step`; with several processes, the same answer on all of them."""
        if jax.process_count() == 1:
            return self._asked
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)
