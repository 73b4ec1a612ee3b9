"""lm/data/prefetch.py: items in order from any number of threads, and an error that names a thread that hangs."""

import gc
import itertools
import threading
import time

import pytest

from lm.data import prefetch


@pytest.mark.parametrize("threads", [0, 1, 2, 5])
def test_items_come_in_order_and_no_more_than_two_a_thread_are_made_ahead(threads):
    made = []
    items = prefetch.Ahead(lambda k: (made.append(k), time.sleep(0.001 * (k % 3)))[0] or k, threads)
    assert list(itertools.islice(items, 40)) == list(range(40))
    time.sleep(0.1)
    assert sorted(made) == list(range(40 + 2 * threads))
    assert items.ready() == (threads > 0)
    items.close()
    with pytest.raises(StopIteration):
        next(items)


@pytest.mark.parametrize("threads", [0, 1, 2])
def test_an_error_is_raised_in_its_turn(threads):
    items = prefetch.Ahead(lambda k: 1 // (3 - k), threads)
    assert list(itertools.islice(items, 3)) == [0, 0, 1]
    with pytest.raises(ZeroDivisionError):
        next(items)


def test_threads_end_with_the_iterator():
    items = prefetch.Ahead(lambda k: k, 3)
    next(items)
    threads = items._shared.threads
    del items
    gc.collect()
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()


def test_closing_waits_for_what_is_being_made_but_not_for_what_hangs(monkeypatch):
    """At its end Python stops threads where they are, and inside of C++ that aborts the process."""
    items = prefetch.Ahead(lambda k: time.sleep(0.2), 3)
    items.close()
    assert not any(thread.is_alive() for thread in items._shared.threads)
    monkeypatch.setattr(prefetch, "_LOOK_SECONDS", 0.1)
    never, began = threading.Event(), time.monotonic()
    prefetch.Ahead(lambda k: never.wait(), 2).close()
    assert 0.1 <= time.monotonic() - began < 1
    never.set()


def test_a_thread_that_hangs_is_named_within_30_seconds(monkeypatch):
    assert prefetch.HUNG_SECONDS + prefetch._LOOK_SECONDS < 30
    monkeypatch.setattr(prefetch, "HUNG_SECONDS", 0.5)
    monkeypatch.setattr(prefetch, "_LOOK_SECONDS", 0.1)
    never = threading.Event()

    def read_a_dead_mount(k):
        if k == 3:
            never.wait()
        return k

    items = prefetch.Ahead(read_a_dead_mount, 2)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(prefetch.InputError, match=r"(?s)thread 'input-\d' hangs: .* at batch 3 .*read_a_dead_mount"):
        next(items)
    never.set()


def test_a_thread_that_is_slow_but_at_work_is_waited_for(monkeypatch):
    monkeypatch.setattr(prefetch, "HUNG_SECONDS", 0.3)
    monkeypatch.setattr(prefetch, "_LOOK_SECONDS", 0.1)
    seconds = itertools.count()
    monkeypatch.setattr(prefetch, "_cpu_seconds", lambda _: next(seconds))
    assert next(prefetch.Ahead(lambda k: (time.sleep(1.0), k)[1], 1)) == 0


def test_the_time_of_a_thread_is_its_own():
    never = threading.Event()
    busy = threading.Thread(target=lambda: (sum(range(10**6)), never.wait()), daemon=True)
    idle = threading.Thread(target=never.wait, daemon=True)
    for thread in (busy, idle):
        thread.start()
    while (spent := prefetch._cpu_seconds(busy)) < 0.005:
        time.sleep(0.01)
    assert prefetch._cpu_seconds(idle) < 0.005 < spent
    never.set()
