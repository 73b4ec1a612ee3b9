"""lm/corpus/workers.py: errors, kills and hangs of worker processes."""

import multiprocessing
import os
import signal
import threading

import pytest

from lm.corpus import workers
from tests import busy


def test_a_worker_that_exits_is_an_error_with_its_unit_and_exit_code(tmp_path):
    with (
        pytest.raises(workers.JobError, match=r"worker process \d+, at 9, ended without a result, exit code 9"),
        workers.processes(2) as runner,
    ):
        list(runner(os._exit, [9]))


@pytest.mark.parametrize(
    ("sent", "message"),
    [(signal.SIGKILL, "ended without a result, exit code -9"), (signal.SIGSTOP, "hangs: no CPU time")],
)
def test_a_killed_or_stopped_worker_is_an_error_with_its_process_and_unit(sent, message, monkeypatch):
    """Within 30 s; the other worker ends too."""
    assert workers.HUNG_SECONDS + workers._POLL_SECONDS < 30
    monkeypatch.setattr(workers, "HUNG_SECONDS", 4.0)
    with workers.processes(2) as runner:
        running = runner(busy.spin, [0.0, 3600.0, 3601.0])
        next(running)
        processes = multiprocessing.active_children()
        threading.Timer(1.0, os.kill, (processes[0].pid, sent)).start()
        with pytest.raises(
            workers.JobError, match=rf"process {processes[0].pid}, at 360[01]\.0, {message}.*same command to resume"
        ):
            next(running)
    assert not any(process.is_alive() for process in processes)


def test_exceptions_in_workers_are_raised_and_worker_processes_are_replaced(monkeypatch):
    monkeypatch.setattr(workers, "_UNITS_PER_PROCESS", 2)
    with workers.processes(2) as runner:
        assert len(list(runner(abs, range(9)))) == 9
        assert list(runner(abs, [])) == []
        with pytest.raises(TypeError, match="bad operand"):
            list(runner(abs, [1, "text", 2]))
