"""lm/command_line.py and the command lines of all tools."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lm import command_line
from lm.config.schema import ConfigError

ROOT = Path(__file__).resolve().parents[1]
TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py"))


def test_every_tool_explains_its_flags_run_as_a_module_and_as_a_file(tmp_path):
    """As a file also from another folder. The variable stands for an editable install, which finds `lm` anywhere."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    commands = [(["-m", f"tools.{name}"], ROOT) for name in TOOLS]
    commands += [([str(ROOT / "tools" / f"{name}.py")], tmp_path) for name in ("plan", "chat")]
    started = []
    for command, folder in commands:
        process = subprocess.Popen(
            [sys.executable, *command, "--help"],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append((command, process))
    for command, process in started:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 1 and "Traceback" not in output, (command, output)  # absl's status of --help
        assert "python tools/" in output and "flags" in output, (command, output)


def test_commands_are_imported_without_jax():
    """But for the plan, of which --help is answered as well; a worker that prepares data imports its main file."""
    names = [f"tools.{name}" for name in TOOLS if name != "plan"]
    program = "import importlib, sys\n" + "".join(
        f"importlib.import_module({name!r}); assert 'jax' not in sys.modules, {name!r}\nimport absl.flags as f\n"
        "for flag in list(f.FLAGS):\n    delattr(f.FLAGS, flag)\n"
        for name in names
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_file_changes_the_import_path():
    paths = [path for folder in ("lm", "configs", "experiments", "tools") for path in (ROOT / folder).rglob("*.py")]
    assert not [path for path in paths if "sys.path." in path.read_text(encoding="utf-8")]


def test_positional_arguments_are_counted():
    assert command_line.arguments(["x", "a", "b"], "RUN", "OUT") == ["a", "b"]
    assert command_line.arguments(["x", "a", "b", "c"], "OUT", "RECIPE...") == ["a", "b", "c"]
    assert command_line.arguments(["x"]) == []
    for argv, names in ((["x", "a"], ("RUN", "OUT")), (["x", "a"], ("OUT", "RECIPE...")), (["x", "a"], ())):
        with pytest.raises(SystemExit, match=r"^error: arguments: found a, expected "):
            command_line.arguments(argv, *names)


def test_errors_of_the_project_are_one_line_and_others_keep_their_traceback():
    with pytest.raises(SystemExit, match=r"^error: a key is wrong$"), command_line.one_line_errors():
        raise ConfigError("a key is wrong")
    with pytest.raises(ValueError, match="a bug"), command_line.one_line_errors():
        raise ValueError("a bug")


def test_tracebacks_that_orbax_logs_are_left_out_as_the_save_raises_the_error():
    def is_logged(path, exc_info):
        record = logging.LogRecord("absl", logging.ERROR, path, 1, "message", None, exc_info)
        return command_line._is_no_traceback_of_orbax(record)

    error = (OSError, OSError("full"), None)
    assert not is_logged("/site-packages/orbax/checkpoint/future.py", error)
    assert is_logged("/site-packages/orbax/checkpoint/future.py", None) and is_logged("/lm/train.py", error)
    assert is_logged("/home/orbax/lm/train.py", error)


@pytest.mark.skipif(sys.platform != "linux", reason="the C library of Linux")
@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("", "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.arena_max=2", "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
    ],
)
def test_a_program_is_re_executed_once_with_huge_pages_and_its_arguments(given, found):
    program = "import os, sys; from lm import command_line; print('began'); sys.stdout.flush(); "
    program += "command_line.use_huge_pages(); "
    program += "print(os.environ['GLIBC_TUNABLES'], sys.argv[1:])"
    environment = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
    environment |= {"GLIBC_TUNABLES": given} if given else {}
    command = [sys.executable, "-c", program, "--a=b c", ""]
    output = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    began = 1 if given == found else 2
    assert output.splitlines() == ["began"] * began + [f"{found} ['--a=b c', '']"]
