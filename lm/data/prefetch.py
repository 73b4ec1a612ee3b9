"""Prefetches a Grain data set with threads that are watched, so that a read that hangs is reported as an error.

Grain's own `MapDataset.to_iter_dataset` does the same at the same speed, but waits without limit for a thread that
hangs, and its threads then keep the process from exiting; docs/log.md has the measurements.
"""

import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from typing import Any

import grain

# A thread that has used no CPU time for this long is taken to hang, for example in a file of a mount that is gone.
HUNG_SECONDS = 25.0
_POLL_SECONDS = 1.0
_AHEAD = 2  # elements that each thread may be ahead


class InputError(RuntimeError):
    """The input has stopped. The message names the thread, what it was making, and the lines of code it is in."""


class PrefetchIterator(grain.DatasetIterator[Any]):
    """Iterates over a Grain data set whose elements are made ahead of their use by threads; the order stays the same.

    The state is that of Grain's own iterator, {"next_index": n}. An error raised by element n is raised by the call of
    `next` that asks for it, and closes the iterator. Threads end when the iterator is closed or garbage collected.
    """

    def __init__(
        self, dataset: grain.MapDataset[Any], threads: int, describe: Callable[[int], str] = "element {}".format
    ):
        """Starts the threads.

        Args:
          dataset: what to iterate over; reading it must be thread-safe.
          threads: how many threads; each is up to two elements ahead. 0 = an element is made when it is asked for.
          describe: index of an element -> what to call it in an error.
        """
        super().__init__()
        self._dataset, self._num_threads, self._describe = dataset, threads, describe
        self._start(0)

    def _start(self, index: int) -> None:
        self._next = index
        self._pool = _Pool(self._dataset, index, self._num_threads)
        self._stop = weakref.finalize(self, self._pool.close)  # also runs before the interpreter exits

    def ready(self) -> bool:
        """Whether the next element has been made, so that `next` returns at once."""
        return self._next in self._pool.made

    def __next__(self) -> Any:
        """The next element.

        Raises:
          StopIteration: the data set is at its end.
          ValueError: the iterator is closed.
          InputError: the thread that makes the element hangs.
        """
        if self._pool.closed:
            raise ValueError("the input iterator is closed: an error or close() has ended it; make a new one")
        if self._next >= len(self._dataset):
            raise StopIteration
        if self._num_threads:
            element, error = self._wait()
            if error is not None:
                self.close()
                raise error
            self._pool.room.release()
        else:
            element = self._dataset[self._next]
        self._next += 1
        return element

    def _wait(self) -> tuple[Any, BaseException | None]:
        """(next element, None) or (None, its error), once a thread has made it; InputError where that thread hangs."""
        pool, since, spent = self._pool, time.monotonic(), None
        with pool.changed:
            while self._next not in pool.made:
                pool.changed.wait(_POLL_SECONDS)
                thread = pool.working.get(self._next)
                if (now := _cpu_seconds(thread)) != spent:
                    since, spent = time.monotonic(), now
                if self._next not in pool.made and time.monotonic() - since >= HUNG_SECONDS:
                    return None, InputError(_hung(thread, self._describe(self._next)))
            return pool.made.pop(self._next)

    def get_state(self) -> dict[str, Any]:
        """{"next_index": index of the element that `next` returns}."""
        return {"next_index": self._next}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues at `state`, as given by `get_state`; what was made ahead is dropped."""
        self._stop()
        self._start(state["next_index"])

    def close(self) -> None:
        """Stops the threads. Waits for what they are making, but not for one that hangs."""
        self._stop()


class _Pool:
    """The threads of an iterator and what they have made. It holds no reference to the iterator, which can therefore be
    garbage collected while the threads run.

    Attributes:
      room: counts the elements that may still be started.
      changed: notified when an element has been made; guards `made`, `working` and the next index.
      made: index -> (element, None) or (None, its error).
      working: index -> the thread that is making it.
    """

    def __init__(self, dataset: grain.MapDataset[Any], start: int, num_threads: int):
        self.dataset, self.indices = dataset, iter(range(start, len(dataset)))
        self.room, self.changed = threading.Semaphore(_AHEAD * num_threads), threading.Condition()
        self.made: dict[int, tuple[Any, BaseException | None]] = {}
        self.working: dict[int, threading.Thread] = {}
        self.closed = False
        # Daemon threads: one that hangs must not keep the process from ending.
        self.threads = [
            threading.Thread(target=self.work, daemon=True, name=f"input-{number}") for number in range(num_threads)
        ]
        for thread in self.threads:
            thread.start()

    def work(self) -> None:
        """Makes elements until the pool is closed or the data set is at its end."""
        while True:
            self.room.acquire()
            with self.changed:
                index = None if self.closed else next(self.indices, None)
                if index is None:
                    self.room.release()  # wakes the next thread, which then ends too
                    return
                self.working[index] = threading.current_thread()
            try:
                found: tuple[Any, BaseException | None] = self.dataset[index], None
            except BaseException as error:  # raised again where the element is asked for
                found = None, error
            with self.changed:
                del self.working[index]
                self.made[index] = found
                self.changed.notify_all()

    def close(self) -> None:
        """Ends the threads, and waits a moment for them: when the interpreter exits, a daemon thread that is inside
        C++ code would abort the process. One that hangs is left behind."""
        self.closed = True
        self.room.release()
        deadline = time.monotonic() + _POLL_SECONDS
        for thread in self.threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))


def _cpu_seconds(thread: threading.Thread | None) -> float:
    """CPU time that a thread has used; 0 where it has ended or the platform does not tell."""
    if thread is None or thread.ident is None or not thread.is_alive() or not hasattr(time, "pthread_getcpuclockid"):
        return 0.0
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))


def _hung(thread: threading.Thread | None, element: str) -> str:
    """The message about a thread that hangs, with the innermost lines of Python that it is in."""
    frame = sys._current_frames().get(thread.ident or 0) if thread else None
    lines = "".join(traceback.format_stack(frame)[-3:]) if frame else ""
    name = f"thread '{thread.name}'" if thread else "no thread"
    return (
        f"the input hangs: {name} has used no CPU time for {HUNG_SECONDS:.0f} s while making {element}; check the disk "
        f"or mount that it reads, then run the same command again. It is at\n{lines}"
    )
