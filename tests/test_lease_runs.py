"""lm/lease.py in whole runs: two starts on one folder, runs that are stopped or displaced, several processes."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lm import checkpoint, lease
from tests import tool_modules, toys
from tests.test_train import ROOT, arrays, command, environment, rows, wait_for_step

launch = tool_modules.load("launch")
STEPS = 20
# lm.main on a machine of that name, which waits 3 s for signs of life of others.
ON_MACHINE = """
import sys
from lm import command_line, lease, main
machine, lease.DEAD_SECONDS, lease.BEAT_SECONDS, lease._FRESH_SECONDS = sys.argv.pop(1), 3.0, 0.3, 0.6
lease._machine = lambda: machine
command_line.run(main.main)
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A config, and the folder of its run that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    texts = toys.write_texts(folder / "texts")
    cfg = toys.recipe(texts, train__total_steps=STEPS, eval__every_steps=10, checkpoint__every_steps=3)
    subprocess.run(command(cfg, folder / "run"), cwd=ROOT, env=environment(2), check=True, capture_output=True)
    return cfg, folder / "run"


@pytest.fixture
def start():
    """Starts processes; kills those that are left at the end."""
    started = []

    def popen(arguments, devices=2):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(arguments, cwd=ROOT, env=environment(devices), **pipes))
        return started[-1]

    yield popen
    for process in started:
        process.kill()
        process.communicate()


def on(machine: str, arguments: list[str]) -> list[str]:
    return [sys.executable, "-c", ON_MACHINE, machine, *arguments[3:]]


def undisturbed(found: Path, unbroken: Path) -> None:
    """Every row once, with the same values, the same final state, and nothing left over."""
    keys = ("loss", "weight", "grad_norm", "learning_rate")
    assert rows(found, *keys) == rows(unbroken, *keys) and len(rows(found)) == STEPS
    assert arrays(found, STEPS) == arrays(unbroken, STEPS)
    saved = [[each.step for each in checkpoint.list_saved(folder)] for folder in (found, unbroken)]
    assert saved[0] == saved[1]
    names = [sorted(path.name for path in folder.iterdir()) for folder in (found, unbroken)]
    assert names[0] == names[1]


@pytest.mark.slow
def test_of_two_starts_at_once_one_runs_and_the_other_is_refused_in_one_line(whole, start, tmp_path):
    cfg, unbroken = whole
    both = [start(command(cfg, tmp_path / "run")) for _ in range(2)]
    ends = [(*process.communicate(timeout=300), process.returncode, process.pid) for process in both]
    (owner,), (refused,) = ([end for end in ends if end[2] == status] for status in (0, lease.Held.exit_status))
    assert refused[0] == "" and refused[1].count("\n") == 1
    assert refused[1].startswith(f"error: {tmp_path / 'run'} is in use by process {owner[3]} on ")
    undisturbed(tmp_path / "run", unbroken)


@pytest.mark.slow
def test_a_run_that_is_stopped_keeps_its_folder_and_goes_on(whole, start, tmp_path):
    cfg, unbroken = whole
    first = start(command(cfg, tmp_path / "run"))
    wait_for_step(first, tmp_path / "run", 7)
    first.send_signal(signal.SIGSTOP)
    second = start(command(cfg, tmp_path / "run"))
    output, errors = second.communicate(timeout=120)
    assert (second.returncode, output, errors.count("\n")) == (lease.Held.exit_status, "", 1)
    assert f"process {first.pid} on " in errors and "is stopped; continue it" in errors
    first.send_signal(signal.SIGCONT)
    _, errors = first.communicate(timeout=300)
    assert first.returncode == 0, errors
    undisturbed(tmp_path / "run", unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 8, 10])
def test_a_run_that_was_suspended_while_another_machine_took_over_writes_nothing_more(whole, start, tmp_path, step):
    cfg, unbroken = whole
    first = start(on("a", command(cfg, tmp_path / "run")))
    wait_for_step(first, tmp_path / "run", step)
    first.send_signal(signal.SIGSTOP)
    second = start(on("b", command(cfg, tmp_path / "run")))
    wait_for_step(second, tmp_path / "run", 14)
    first.send_signal(signal.SIGCONT)
    _, errors = first.communicate(timeout=60)
    assert first.returncode == lease.Lost.exit_status
    said = errors.splitlines()[-1]
    assert said.startswith(
        f"error: stopped before writing more: this process no longer owns {tmp_path / 'run'}: lease.1"
    )
    _, errors = second.communicate(timeout=300)
    assert second.returncode == 0 and "taken over from process" in errors, errors
    undisturbed(tmp_path / "run", unbroken)


def pair(cfg, workdir: Path, start) -> list[subprocess.Popen]:
    """Two processes of one run, a device each."""
    port = toys.free_port()
    flags = [f"--coordinator=127.0.0.1:{port}", "--num_processes=2"]
    return [start(command(cfg, workdir, *flags, f"--process_id={i}"), devices=1) for i in range(2)]


@pytest.mark.slow
def test_all_processes_of_a_run_learn_that_its_folder_is_held(whole, start, tmp_path):
    cfg, _ = whole
    with lease.hold(tmp_path / "run"):
        for process in pair(cfg, tmp_path / "run", start):
            _, errors = process.communicate(timeout=120)
            assert process.returncode == lease.Held.exit_status, errors
            assert errors.splitlines()[-1].startswith(f"error: {tmp_path / 'run'} is in use by process ")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_process_is_lost_the_other_ends_with_a_status_that_is_restarted_and_the_run_resumes(
    whole, start, tmp_path, victim
):
    cfg, unbroken = whole
    both = pair(cfg, tmp_path / "run", start)
    wait_for_step(both[victim], tmp_path / "run", 5)
    both[victim].kill()
    both[victim].wait()
    _, errors = both[1 - victim].communicate(timeout=400)
    status = both[1 - victim].returncode
    shell = status if status >= 0 else 128 - status
    assert shell in launch.RESTARTED, errors[-2000:]
    resumed = start(command(cfg, tmp_path / "run"))
    _, errors = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, errors[-2000:]
    assert [step for step, *_ in rows(tmp_path / "run")] == [step for step, *_ in rows(unbroken)]
