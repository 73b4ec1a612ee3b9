"""Items of a sequence made ahead by threads, in order, with an error where a thread hangs."""

import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

# A thread that takes no CPU time for so long waits for something that does not come, such as a file of a dead mount.
HUNG_SECONDS = 25.0
_LOOK_SECONDS = 1.0


class InputError(RuntimeError):
    """The input stopped. The message names the thread, the item and where the thread is."""


class _Shared:
    """What the threads and the iterator have in common; the threads do not hold the iterator, so that it can go."""

    def __init__(self, make: Callable[[int], Any], room: int):
        self.make, self.todo = make, itertools.count()
        self.room, self.changed = threading.Semaphore(room), threading.Condition()
        self.made: dict[int, tuple[Any, BaseException | None]] = {}
        self.working: dict[int, threading.Thread] = {}
        self.threads: list[threading.Thread] = []
        self.closed = False

    def close(self) -> None:
        """Also called before Python ends: a thread that it stops inside of C++ takes the process with it."""
        self.closed = True
        self.room.release()  # one thread wakes and wakes the next
        until = time.monotonic() + _LOOK_SECONDS  # a hung one is left
        for thread in self.threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, until - time.monotonic()))


class Ahead(Iterator[Any]):
    """make(0), make(1), ... without end; an error of `make` is raised in its turn."""

    def __init__(self, make: Callable[[int], Any], threads: int):
        """`threads` of them make up to two items each ahead; 0 = each is made when it is asked for."""
        self._shared, self._next = _Shared(make, 2 * threads), 0
        self.close = weakref.finalize(self, self._shared.close)
        for number in range(threads):
            # A daemon: a hung one must not keep the process from its end.
            thread = threading.Thread(target=_work, args=(self._shared,), daemon=True, name=f"input-{number}")
            self._shared.threads.append(thread)
            thread.start()

    def ready(self) -> bool:
        """Whether the next item is there already."""
        return self._next in self._shared.made

    def __next__(self) -> Any:
        shared, number = self._shared, self._next
        if shared.closed:
            raise StopIteration
        if not shared.threads:
            self._next += 1
            return shared.make(number)
        since, spent = time.monotonic(), None
        with shared.changed:
            while number not in shared.made:
                shared.changed.wait(_LOOK_SECONDS)
                thread = shared.working.get(number)
                if (now := _cpu_seconds(thread)) != spent:
                    since, spent = time.monotonic(), now
                if number not in shared.made and time.monotonic() - since >= HUNG_SECONDS:
                    self.close()
                    raise InputError(_where(thread, number))
            item, error = shared.made.pop(number)
        if error is not None:
            self.close()
            raise error
        self._next += 1
        shared.room.release()
        return item


def _work(shared: _Shared) -> None:
    while True:
        shared.room.acquire()
        if shared.closed:
            shared.room.release()
            return
        with shared.changed:
            number = next(shared.todo)
            shared.working[number] = threading.current_thread()
        try:
            found: tuple[Any, BaseException | None] = shared.make(number), None
        except BaseException as error:  # raised where the item is asked for
            found = None, error
        with shared.changed:
            del shared.working[number]
            shared.made[number] = found
            shared.changed.notify_all()


def _cpu_seconds(thread: threading.Thread | None) -> float:
    """Of a thread, where the platform tells; 0 otherwise."""
    if thread is None or thread.ident is None or not thread.is_alive() or not hasattr(time, "pthread_getcpuclockid"):
        return 0.0
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))


def _where(thread: threading.Thread | None, number: int) -> str:
    """The message about a thread that hangs, with the innermost lines of Python it is in."""
    import sys
    import traceback

    frame = sys._current_frames().get(thread.ident or 0) if thread else None
    lines = "".join(traceback.format_stack(frame)[-3:]) if frame else ""
    name = thread.name if thread else "no thread"
    return (
        f"input thread '{name}' hangs: no CPU time in {HUNG_SECONDS:.0f} s at batch {number} since the start; look at "
        f"the disk or the mount that it reads, then start the same command again. It is in\n{lines}"
    )
