"""lm/preemption.py: Ctrl-C and SIGTERM are answered at once, in every phase of a run, and what they say is true."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lm import checkpoint, preemption
from tests import toys
from tests.test_train import arrays, command, rows

ROOT = Path(__file__).resolve().parents[1]
CTRL_C = 130

# One long instruction of Python, in which it runs no signal handler, as a step or a compilation is.
BLOCK = """
import hashlib, signal, sys, time
from lm import preemption
block = lambda: hashlib.pbkdf2_hmac("sha256", b"", b"", int(sys.argv[2]))
print("began", flush=True)
with preemption.Interrupt() as interrupt:
    interrupt.kept = lambda: "step 3 is saved"
    if sys.argv[1] == "steps":
        interrupt.working("finishing step 4")
    print("ready", flush=True)
    block()
    print("asked" if interrupt.requested(4) else "not asked", flush=True)
assert signal.getsignal(signal.SIGINT) is not interrupt._handle and signal.set_wakeup_fd(-1) == -1
"""
SHORT, LONG = 3_000_000, 1_000_000_000  # rounds: about a second, and minutes


CAUGHT = """
import os, signal, threading, time, jax
from lm import preemption
preemption.UNWIND_SECONDS = 0.3
threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGINT]).start()
try:
    with preemption.Interrupt():
        time.sleep(10)
except KeyboardInterrupt:
    time.sleep(1)
    print("still alive")
"""


def test_a_caller_that_catches_the_interrupt_of_a_run_goes_on():
    done = subprocess.run([sys.executable, "-c", CAUGHT], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "still alive\n"), done.stderr


def begin(phase: str, rounds: int, *before: str) -> subprocess.Popen:
    program = [*before, sys.executable, "-c", BLOCK, phase, str(rounds)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(program, cwd=ROOT, text=True, **pipes)
    while process.stdout.readline() != "ready\n":
        assert process.poll() is None, process.communicate()
    time.sleep(0.2)
    return process


def press(process: subprocess.Popen, number: int = signal.SIGINT) -> str:
    """Sends a signal; returns the line that answers it, which must come at once."""
    before = time.monotonic()
    process.send_signal(number)
    line = process.stderr.readline()
    assert time.monotonic() - before < 1
    return line


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_the_first_signal_is_answered_inside_a_step_which_is_finished(number, name):
    process = begin("steps", SHORT)
    again = "; Ctrl-C again stops at once" if name == "Ctrl-C" else ""
    assert press(process, number) == f"{name}: finishing step 4{again}\n"
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (0, "asked\n", "")


def test_a_second_ctrl_c_ends_the_process_inside_a_step_and_says_what_is_saved():
    process = begin("steps", LONG)
    press(process)
    assert press(process) == "Ctrl-C again: stopped at once; step 3 is saved\n"
    assert process.wait(10) == CTRL_C


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, CTRL_C), (signal.SIGTERM, preemption.Preempted.exit_status)]
)
def test_a_start_ends_soon_also_inside_a_long_compilation(number, status):
    process = begin("start", LONG)
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    assert press(process, number) == f"{name}: stopping; step 3 is saved\n"
    assert process.wait(preemption.UNWIND_SECONDS + 5) == status


def test_ctrl_c_is_obeyed_where_it_was_ignored_at_the_start():
    process = begin("start", LONG, "sh", "-c", 'trap "" INT; exec "$0" "$@"')
    assert press(process) == "Ctrl-C: stopping; step 3 is saved\n"
    assert process.wait(preemption.UNWIND_SECONDS + 5) == CTRL_C


def test_a_run_in_another_thread_leaves_the_handlers_alone():
    program = (
        "import threading\n" + "def run():\n    with preemption.Interrupt() as i:\n        print(i.requested(1))\n"
    )
    program = (
        f"from lm import preemption\n{program}thread = threading.Thread(target=run)\nthread.start()\nthread.join()"
    )
    output = subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, text=True)
    assert output == "False\n"


# lm.main with one function that first says so, and takes a second more.
PHASE = """
import importlib, sys, time
from lm import command_line, main
module, owner, name, call = sys.argv.pop(1).split(":")
found = importlib.import_module(module)
found = getattr(found, owner) if owner else found
real, calls = getattr(found, name), []
def slow(*args, **kwargs):
    calls.append(0)
    if len(calls) == int(call):
        print("PHASE", flush=True)
        end = time.monotonic() + 1
        while time.monotonic() < end:
            time.sleep(0.05)
    return real(*args, **kwargs)
setattr(found, name, slow)
command_line.run(main.main)
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A config, and the folder of its run that nothing has stopped."""
    folder = tmp_path_factory.mktemp("whole")
    texts = toys.write_texts(folder / "texts")
    cfg = toys.recipe(texts, train__total_steps=4, eval__every_steps=2, checkpoint__every_steps=3)
    subprocess.run(command(cfg, folder / "run"), cwd=ROOT, check=True, capture_output=True)
    return cfg, folder / "run"


def start_in_phase(cfg, workdir: Path, phase: str) -> subprocess.Popen:
    """A run that has just entered a phase, named by the call of a function."""
    arguments = command(cfg, workdir)[3:]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", PHASE, phase, *arguments], cwd=ROOT, text=True, **pipes)
    while process.stdout.readline() != "PHASE\n":
        assert process.poll() is None, process.communicate()
    return process


def press_in_run(process: subprocess.Popen) -> str:
    """As `press`, past what the run itself says."""
    before = time.monotonic()
    process.send_signal(signal.SIGINT)
    while not (line := process.stderr.readline()).startswith("Ctrl-C"):
        assert line, process.communicate()
    assert time.monotonic() - before < 0.9, "while the phase lasts"
    return line


PHASES = {
    "lm.input_pipeline::load:1": (CTRL_C, "stopping; no step was done", None),
    "lm.train::Evaluator:1": (CTRL_C, "stopping; no checkpoint is complete, the same command starts from the", None),
    "lm.evaluator:Evaluator:validate:1": (CTRL_C, "stopping; no checkpoint is complete", None),
    "lm.train:StepLog:add:1": (75, "finishing step 1, then saving; Ctrl-C again stops at once", 1),
    "lm.checkpoint.store:Checkpoints:save:1": (75, "finishing the evaluation and save of step 2; Ctrl-C again", 2),
    "lm.evaluator:Evaluator:validate:3": (0, "finishing the evaluation and save of step 4; Ctrl-C again", 4),
    "lm.tracking.report::write_summary:1": (0, "all steps are done, finishing the summary; Ctrl-C again", 4),
}


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_ctrl_c_is_answered_at_once_in_every_phase_of_a_run_and_loses_nothing(whole, tmp_path, phase):
    status, answer, saved = PHASES[phase]
    cfg, unbroken = whole
    process = start_in_phase(cfg, tmp_path / "run", phase)
    assert press_in_run(process).startswith(f"Ctrl-C: {answer}")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == status and "Traceback" not in errors, errors
    if status == preemption.Preempted.exit_status:
        assert errors.splitlines()[-1].startswith(f"stopped at step {saved} of 4 and saved in ")
    steps = [found.step for found in checkpoint.list_saved(tmp_path / "run")]
    assert steps[-1:] == ([saved] if saved else [])
    assert not list(tmp_path.glob("run/lease.*")), "released"
    subprocess.run(command(cfg, tmp_path / "run"), cwd=ROOT, check=True, capture_output=True)
    assert rows(tmp_path / "run", "loss", "grad_norm") == rows(unbroken, "loss", "grad_norm")
    assert arrays(tmp_path / "run", 4) == arrays(unbroken, 4)


@pytest.mark.slow
def test_a_second_ctrl_c_stops_a_run_at_once_and_names_the_checkpoint_that_the_same_command_resumes_from(
    whole, tmp_path
):
    cfg, unbroken = whole
    process = start_in_phase(cfg, tmp_path / "run", "lm.evaluator:Evaluator:validate:3")
    press_in_run(process)
    said = re.fullmatch(r"Ctrl-C again: stopped at once; step (\d) is saved, .*\n", press_in_run(process))
    assert process.wait(10) == CTRL_C
    done = subprocess.run(command(cfg, tmp_path / "run"), cwd=ROOT, check=True, capture_output=True, text=True)
    resumed = re.search(r"resuming from .*/checkpoints/(\d)\n", done.stdout)
    assert 2 <= int(said[1]) <= int(resumed[1]) <= 3 and "taken over from process" in done.stderr
    assert arrays(tmp_path / "run", 4) == arrays(unbroken, 4)
