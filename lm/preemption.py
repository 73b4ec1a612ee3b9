"""Preemption and Ctrl-C: a run stops after the current step, with everything saved, so that it can be resumed."""

import os
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any, Protocol

UNWIND_SECONDS = 3.0  # for which an interrupted start may clean up before it is ended


class Preempted(RuntimeError):
    """The run was asked to stop. Its state has been saved; the same command resumes it."""

    exit_status = 75  # EX_TEMPFAIL of sysexits.h: try again


class Stopped(KeyboardInterrupt):
    """A signal came where there is nothing to save. The console has been told."""

    def __init__(self, exit_status: int):
        super().__init__()
        self.exit_status = exit_status


class StopRequest(Protocol):
    """What a run asks and tells of a request to stop: `Interrupt`, or a part of a group's (`lm.study.group`).

    Attributes:
      kept: returns what is true if the process ends now, for the user.
    """

    kept: Callable[[], str]

    def working(self, doing: str) -> None:
        """From now on the run can stop by itself; `doing` says what it does first, such as 'finishing step 3'."""

    def requested(self, step: int) -> bool:
        """Whether to stop after step `step`."""


class Interrupt:
    """SIGTERM and Ctrl-C (SIGINT) in a run; a context manager that restores the handlers there were before.

    Where the run can go on from a state (`working`), the first signal is a request to stop after the current step.
    Elsewhere, as in compilation before the first step, it raises `Stopped`. A second Ctrl-C ends the process at once.
    Each is answered on stderr when it comes: by a thread, as Python runs its signal handlers only between two of its
    own instructions, and a step or a compilation is one. SIGINT is obeyed also where it was ignored at the start, as in
    the background of a script.

    With several processes JAX's preemption service makes all of them stop after the same step; Ctrl-C in one of them is
    passed on to it.

    Attributes:
      kept: returns what is true if the process ends now, for the user.
    """

    kept: Callable[[], str]

    def __init__(self) -> None:
        self.kept = lambda: "no step was done"
        self._doing, self._asked, self._presses = "", False, 0
        self._answer = (0, False)  # of JAX's preemption service: step, whether to stop after it
        self._old: dict[int, Any] = {}
        self._over = threading.Event()

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread may handle signals
        import jax

        # With several processes SIGTERM belongs to JAX's preemption service.
        handled = [signal.SIGINT] if jax.distributed.is_initialized() else [signal.SIGINT, signal.SIGTERM]
        self._receiver, self._sender = socket.socketpair()
        self._sender.setblocking(False)
        self._old_wakeup = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        self._old = {number: signal.signal(number, self._handle) for number in handled}
        threading.Thread(target=self._answer_signals, daemon=True, name="interrupt").start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        if self._old:
            for number, handler in self._old.items():
                signal.signal(number, handler or signal.SIG_DFL)  # None: one that Python did not set
            signal.set_wakeup_fd(self._old_wakeup)
            self._sender.close()

    def working(self, doing: str) -> None:
        """From now on the run can stop by itself; `doing` says what it does first, such as 'finishing step 3'."""
        self._doing = doing

    def requested(self, step: int) -> bool:
        """Whether to stop after step `step`; with several processes, the same answer on all of them."""
        import jax

        if jax.process_count() == 1:
            return self._asked
        from jax.experimental import multihost_utils

        if self._answer[0] != step:
            self._answer = (step, multihost_utils.reached_preemption_sync_point(step))
        return self._answer[1]

    def _handle(self, number: int, frame: Any) -> None:
        """Runs in the main thread, when it can."""
        self._asked = True
        if not self._doing:
            raise Stopped(_status(number))

    def _answer_signals(self) -> None:
        """Runs in a thread: one byte is received for each signal, at once."""
        with self._receiver:
            while received := self._receiver.recv(1):
                if (number := received[0]) in self._old:
                    self._answer_signal(number)

    def _answer_signal(self, number: int) -> None:
        name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        self._presses += number == signal.SIGINT
        if self._presses > 1:
            _say(f"{name} again: stopped at once; {self.kept()}")
            os._exit(_status(number))
        self._asked = True
        again = "; Ctrl-C again stops at once" if self._presses else ""
        if self._doing:
            _say(f"{name}: {self._doing}{again}")
            if signal.SIGTERM not in self._old:
                os.kill(os.getpid(), signal.SIGTERM)
            return
        _say(f"{name}: stopping; {self.kept()}")
        threading.Thread(target=self._end, args=(_status(number),), daemon=True).start()

    def _end(self, status: int) -> None:
        """Ends the process where the main thread does not leave the run, such as in a long compilation."""
        if not self._over.wait(UNWIND_SECONDS):
            os._exit(status)


def _status(number: int) -> int:
    """SIGTERM before the first step is a preemption too; Ctrl-C ends as in a shell."""
    return Preempted.exit_status if number == signal.SIGTERM else 128 + number


def _say(message: str) -> None:
    """Writes to stderr without Python's buffers and locks, which the main thread may hold."""
    os.write(2, f"{os.linesep if os.isatty(2) else ''}{message}\n".encode(errors="replace"))
