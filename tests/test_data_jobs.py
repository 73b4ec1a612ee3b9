"""lm/corpus/workers.py: work in processes that may be killed."""

import multiprocessing
import os
import signal
import threading

import pytest

from lm.corpus import workers as jobs
from tests import busy


def test_a_worker_that_is_killed_is_told(tmp_path):
    with (
        pytest.raises(jobs.JobError, match=r"worker process \d+, at 9, ended without a word, exit code 9"),
        jobs.processes(2) as runner,
    ):
        list(runner(os._exit, [9]))


@pytest.mark.parametrize(
    ("sent", "says"), [(signal.SIGKILL, "ended without a word, exit code -9"), (signal.SIGSTOP, "hangs: no CPU time")]
)
def test_a_worker_that_is_killed_or_stopped_is_named(sent, says, monkeypatch):
    """With the process and the unit it was at, within 30 s; the other worker ends too."""
    assert jobs.HUNG_SECONDS + jobs._LOOK_SECONDS < 30
    monkeypatch.setattr(jobs, "HUNG_SECONDS", 4.0)
    with jobs.processes(2) as runner:
        running = runner(busy.spin, [0.0, 3600.0, 3601.0])
        next(running)
        workers = multiprocessing.active_children()
        threading.Timer(1.0, os.kill, (workers[0].pid, sent)).start()
        with pytest.raises(
            jobs.JobError, match=rf"process {workers[0].pid}, at 360[01]\.0, {says}.*same command again"
        ):
            next(running)
    assert not any(worker.is_alive() for worker in workers)


def test_an_error_in_a_worker_is_the_jobs_and_processes_are_replaced(monkeypatch):
    monkeypatch.setattr(jobs, "_UNITS_A_PROCESS", 2)
    with jobs.processes(2) as runner:
        assert len(list(runner(abs, range(9)))) == 9
        assert list(runner(abs, [])) == []
        with pytest.raises(TypeError, match="bad operand"):
            list(runner(abs, [1, "text", 2]))
