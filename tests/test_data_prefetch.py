"""lm/data/prefetch.py: elements in order from any number of threads, and an error that names a thread that hangs."""

import gc
import itertools
import os
import signal
import subprocess
import sys
import threading
import time

import grain
import pytest

from lm.data import prefetch

ENDLESS = sys.maxsize


def dataset(make, size=ENDLESS):
    return grain.MapDataset.range(size).map(make)


def iterate(make, threads, size=ENDLESS, **more):
    return prefetch.PrefetchIterator(dataset(make, size), threads, **more)


@pytest.fixture
def short_waits(monkeypatch):
    monkeypatch.setattr(prefetch, "HUNG_SECONDS", 0.5)
    monkeypatch.setattr(prefetch, "_POLL_SECONDS", 0.1)


@pytest.mark.parametrize("threads", [0, 1, 2, 5])
def test_elements_come_in_order_and_at_most_two_a_thread_are_made_ahead(threads):
    made = []
    elements = iterate(lambda k: (made.append(k), time.sleep(0.001 * (k % 3)))[0] or k, threads)
    assert list(itertools.islice(elements, 40)) == list(range(40))
    time.sleep(0.1)
    assert sorted(made) == list(range(40 + 2 * threads))
    assert elements.ready() == (threads > 0)
    elements.close()
    with pytest.raises(ValueError, match="input iterator is closed"):
        next(elements)


@pytest.mark.parametrize("threads", [0, 1, 2, 5])
@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_finite_data_set_ends(threads, size):
    elements = iterate(lambda k: k, threads, size)
    assert list(elements) == list(range(size)) and list(elements) == []
    for thread in elements._pool.threads:
        thread.join(5)
        assert not thread.is_alive()


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_its_state_is_the_state_of_grains_iterator(threads):
    """Each of the two continues from the state of the other, wherever it was, with the same elements."""
    squares = dataset(lambda k: k * k)
    ours = prefetch.PrefetchIterator(squares, threads)
    grains = iter(squares.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))
    for position in (0, 3, 50, 7):
        for source, target in ((ours, grains), (grains, ours)):
            source.set_state({"next_index": position})
            assert next(source) == position**2 and source.get_state() == {"next_index": position + 1}
            target.set_state(source.get_state())
            assert [next(target) for _ in range(9)] == [k * k for k in range(position + 1, position + 10)]
    for iterator in (ours, grains):
        iterator.close()


@pytest.mark.parametrize("threads", [0, 1, 2])
def test_an_error_is_raised_when_its_element_is_asked_for(threads):
    elements = iterate(lambda k: 1 // (3 - k), threads)
    assert list(itertools.islice(elements, 3)) == [0, 0, 1]
    with pytest.raises(ZeroDivisionError):
        next(elements)


def test_an_error_of_any_kind_reaches_the_caller():
    """One that only a thread saw would leave the run waiting for it."""
    for error in (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):

        def fail(k, error=error):
            raise error

        with pytest.raises(error):
            next(iterate(fail, 1))


def test_threads_end_when_the_iterator_is_garbage_collected():
    elements = iterate(lambda k: k, 3)
    next(elements)
    threads = elements._pool.threads
    del elements
    gc.collect()
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()


def test_closing_waits_for_what_is_being_made_but_not_for_what_hangs(monkeypatch):
    """When the interpreter exits it stops daemon threads where they are; inside C++ that aborts the process."""
    elements = iterate(lambda k: time.sleep(0.2), 3)
    elements.close()
    assert not any(thread.is_alive() for thread in elements._pool.threads)
    monkeypatch.setattr(prefetch, "_POLL_SECONDS", 0.1)
    never, began = threading.Event(), time.monotonic()
    iterate(lambda k: never.wait(), 2).close()
    assert 0.1 <= time.monotonic() - began < 1
    never.set()


def test_a_hung_thread_is_named_within_30_seconds(short_waits, monkeypatch):
    never = threading.Event()

    def read_a_dead_mount(k):
        if k == 3:
            never.wait()
        return k

    elements = iterate(read_a_dead_mount, 2, describe="batch {}".format)
    assert [next(elements) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(prefetch.InputError, match=r"(?s)thread 'input-\d' .* making batch 3; .*read_a_dead_mount"):
        next(elements)
    never.set()
    monkeypatch.undo()
    assert prefetch.HUNG_SECONDS + prefetch._POLL_SECONDS < 30


def test_a_slow_thread_that_is_working_is_waited_for(short_waits, monkeypatch):
    seconds = itertools.count()
    monkeypatch.setattr(prefetch, "_cpu_seconds", lambda _: next(seconds))
    assert next(iterate(lambda k: (time.sleep(1.0), k)[1], 1)) == 0


def test_cpu_time_is_measured_of_one_thread_alone():
    never = threading.Event()
    busy = threading.Thread(target=lambda: (sum(range(10**6)), never.wait()), daemon=True)
    idle = threading.Thread(target=never.wait, daemon=True)
    for thread in (busy, idle):
        thread.start()
    while (spent := prefetch._cpu_seconds(busy)) < 0.005:
        time.sleep(0.01)
    assert prefetch._cpu_seconds(idle) < 0.005 < spent
    never.set()


PROGRAM = """
import signal, sys, threading
import grain
signal.signal(signal.SIGINT, signal.default_int_handler)  # which what started the tests may have ignored
from lm.data import prefetch
prefetch.HUNG_SECONDS, prefetch._POLL_SECONDS = {hung}, 0.2
hang = lambda k: threading.Event().wait() if k else k
elements = prefetch.PrefetchIterator(grain.MapDataset.range(9).map(hang), 1)
print(next(elements), flush=True)
try:
    next(elements)
except BaseException as error:
    sys.exit(f"raised {{type(error).__name__}}")
"""


def test_a_process_with_a_hung_thread_stops_at_ctrl_c_and_exits_by_itself_after_the_error():
    for hung, signals, raised in ((60, [signal.SIGINT], "KeyboardInterrupt"), (0.5, [], "InputError")):
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM.format(hung=hung)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert process.stdout.readline() == "0\n"
        time.sleep(0.3)
        for number in signals:
            process.send_signal(number)
        try:
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == 1 and f"raised {raised}" in errors
