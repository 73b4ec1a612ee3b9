"""lm/terminal.py: what is printed cannot control the terminal, and everything is printed by it."""

import ast
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm import command_line, terminal
from lm.data.record import DataError
from tests.test_structure import ROOT, dotted, parse, python_files

IN_ROOT = os.environ | {"PYTHONPATH": str(ROOT)}
CONTROLS = "\x1b\x07\x9b\r\x7f\u202e\u2066\u200f\0"


def test_what_would_control_the_terminal_is_spelled_out():
    assert terminal.visible("a\x1b[2Jb\x07\tc\n\x9b1m\r\u202ed") == "a\\x1b[2Jb\\x07\tc\n\\x9b1m\\r\\u202ed"
    assert terminal.visible("he\u200dllo\u3000 Zürich 日本 🙂 [bold]") == "he\u200dllo\u3000 Zürich 日本 🙂 [bold]"


@given(st.text(st.characters()))
def test_visible_text_has_no_control_character_and_is_text_of_a_terminal_already(text):
    shown = terminal.visible(text)
    assert not [c for c in shown if c not in "\n\t" and (c < " " or "\x7f" <= c <= "\x9f" or c in CONTROLS)]
    assert terminal.visible(shown) == shown
    shown.encode()  # no lone surrogate, which a stream of UTF-8 refuses


def test_what_is_printed_and_the_last_words_of_a_program_are_visible(capsys):
    terminal.say("a\x1b]0;title\x07", 7, file=sys.stderr)
    terminal.say("50 %", end="\r")
    assert capsys.readouterr() == ("50 %\r", "a\\x1b]0;title\\x07 7\n")
    with pytest.raises(SystemExit, match=r"^error: \\x1b\[2J/file: no such file$"), command_line.one_line_errors():
        raise DataError("\x1b[2J/file: no such file")
    with pytest.raises(SystemExit, match=r"found \\x1b\[2J, expected"):
        command_line.arguments(["x", "\x1b[2J"])


def test_an_error_of_a_run_does_not_reach_the_terminal_as_commands(tmp_path):
    """Of lm.main, with a hostile name in the path of the data, which the message repeats."""
    command = [sys.executable, "-m", "lm.main", "--config=configs/quickstart_pretrain.py", f"--workdir={tmp_path}/run"]
    hostile = f"{tmp_path}/\x1b]0;title\x07\u202e.txt"
    flags = ["--config.data.format=text", f"--config.data.path={hostile}"]
    done = subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"error: data path '{tmp_path}/\\x1b]0;title\\x07\\u202e.txt': no such file" in done.stderr
    assert not set(done.stdout + done.stderr) & set(CONTROLS)


def test_the_traceback_of_an_unexpected_error_is_visible_too(tmp_path):
    script = tmp_path / "tool.py"
    script.write_text(
        "from absl import app\nfrom lm import command_line\n\n\n"
        "def main(argv):\n    raise KeyError('a', 'b') from ValueError('\x1b[2J')\n\n\n"
        "app.run(main, flags_parser=command_line.parse)\n".replace("\x1b", "\\x1b")
    )
    done = subprocess.run([sys.executable, script], cwd=ROOT, capture_output=True, text=True, env=IN_ROOT)
    assert done.returncode == 1 and "ValueError: \\x1b[2J\n" in done.stderr and "KeyError: ('a', 'b')\n" in done.stderr
    assert "\x1b" not in done.stderr


@pytest.mark.parametrize("path", python_files("lm", "tools"), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_printed_but_by_lm_terminal(path):
    if path == ROOT / "lm" / "terminal.py":
        return
    found = []
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call):
            is_text = [isinstance(arg, ast.JoinedStr | ast.Constant) for arg in node.args[:1]]
            of_text = bool(is_text and is_text[0]) and not isinstance(getattr(node.args[0], "value", ""), int)
            name = dotted(node.func)
            if name == "print" or name in ("sys.stdout.write", "sys.stderr.write"):
                found.append(f"line {node.lineno}: {name}; use lm.terminal.say")
            if name in ("sys.exit", "SystemExit") and of_text:
                found.append(f"line {node.lineno}: {name} of a text; use lm.terminal.stop")
    assert found == []


def test_a_table_is_aligned_and_its_cells_cannot_break_it():
    rows = [("a\nb", 1), ("日本", 20), ("e\u0301\x1b[2J", 300)]
    assert terminal.table(("name", "n"), rows, right=[1]).split("\n") == [
        *("name        n", "a\\nb        1", "日本       20", "e\u0301\\x1b[2J  300")
    ]
    assert terminal.table((), []) == ""
