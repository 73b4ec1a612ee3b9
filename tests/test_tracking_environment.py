"""lm/tracking/environment.py: each start says with what code, on what host and with which packages it was made."""

import json
import os
import socket
import subprocess
from pathlib import Path

import pytest

from lm.registry import details
from lm.study import runs
from lm.tracking import environment, files


def git(folder, *arguments):
    identity = ("-c", "user.name=n", "-c", "user.email=n@example.org", "-c", "commit.gpgsign=false")
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / "code.py").write_text("a = 1\n")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    return folder


@pytest.fixture
def code(repository, monkeypatch):
    """The state of the repository stands for that of the code."""
    monkeypatch.setattr(environment, "running_code", lambda: environment.code_in(repository))
    return repository


def test_a_diff_has_the_changes_of_tracked_files_alone(repository):
    clean = environment.code_in(repository)
    assert len(clean.commit) == 40 and clean.dirty is False and clean.diff is None
    (repository / "secret.txt").write_text("password")
    assert not environment.code_in(repository).dirty, "a file that git does not track is no change"
    (repository / "code.py").write_text("a = 2\n")
    changed = environment.code_in(repository)
    assert changed.dirty and b"-a = 1\n+a = 2\n" in changed.diff and b"password" not in changed.diff
    (repository / "folder").mkdir()
    assert environment.code_in(repository / "folder") == changed
    git(repository, "checkout", "-q", "code.py")
    subprocess.run(["git", "apply", "-"], cwd=repository, input=changed.diff, check=True)
    assert (repository / "code.py").read_text() == "a = 2\n"


def test_a_long_diff_is_cut_between_lines_and_says_so(code, tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "DIFF_BYTES", 1000)
    (code / "code.py").write_text("".join(f"line = {n}\n" for n in range(100_000)))
    run, said = tmp_path / "run", []
    run.mkdir()
    environment.record(run, 0, said.append)
    diff = (run / "diff.patch").read_bytes()
    assert 900 < len(diff) <= 1000 and diff.endswith(b"\n")
    assert files.read_document(run / "environment.json")["git"]["diff_is_cut"]
    assert len(said) == 1 and f"has only the first {len(diff):,} bytes" in said[0]


def test_of_what_a_repository_configures_only_filters_are_executed(repository, tmp_path):
    program = tmp_path / "program.sh"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/executed\n")
    program.chmod(0o755)
    for key in ("core.fsmonitor", "diff.external", "core.pager", "diff.d.textconv", "diff.d.command"):
        git(repository, "config", key, str(program))
    (repository / ".gitattributes").write_text("* diff=d\n")
    (repository / "code.py").write_text("a = 2\n")
    assert b"+a = 2" in environment.code_in(repository).diff
    assert not (tmp_path / "executed").exists()


def test_a_diff_can_be_applied_whatever_prefix_is_configured(repository):
    git(repository, "config", "diff.noprefix", "true")
    (repository / "code.py").write_text("a = 2\n")
    diff = environment.code_in(repository).diff
    git(repository, "checkout", "-q", "code.py")
    subprocess.run(["git", "apply", "-"], cwd=repository, input=diff, check=True)
    assert (repository / "code.py").read_text() == "a = 2\n"


@pytest.mark.parametrize("fails", ["status", "diff"])
def test_where_git_fails_the_code_is_not_said_to_be_clean(fails, code, tmp_path, monkeypatch):
    run, said = tmp_path / "run", []
    run.mkdir()
    (run / "metrics.jsonl").touch()
    (code / "code.py").write_text("a = 2\n")
    if fails == "status":
        (code / ".git" / "index").write_bytes(b"damaged")
    else:
        git_ = environment._git
        monkeypatch.setattr(
            environment, "_git", lambda *given, **more: None if "diff" in given else git_(*given, **more)
        )
    found = environment.code_in(code)
    assert found.dirty is (None if fails == "status" else True) and found.diff is None
    assert runs.commit_of(code) == found.commit[:12] + ("?" if fails == "status" else "+")
    environment.record(run, 0, said.append)
    assert len(said) == 1 and said[0].startswith(
        f"git does not say how the code differs from commit {found.commit[:12]}"
    )
    assert (
        not (run / "diff.patch").exists() and "diff_is_cut" not in files.read_document(run / "environment.json")["git"]
    )
    assert "with changes that git failed to tell" in details.show(run)[0]


def test_no_repository_no_commit_and_no_git_are_no_errors(tmp_path, repository, monkeypatch):
    assert environment.code_in(tmp_path) is None
    empty = tmp_path / "empty"
    empty.mkdir()
    git(empty, "init", "-q")
    assert environment.code_in(empty) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.code_in(repository) is None


def test_a_start_is_recorded_beside_the_earlier_ones(code, tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "EARLIER_STARTS", 2)
    run = tmp_path / "run"
    run.mkdir()
    (code / "code.py").write_text("a = 2\n")
    environment.record(run, 0, print)
    assert b"+a = 2" in (run / "diff.patch").read_bytes()
    git(code, "commit", "-qam", "second")
    for step in (10, 20, 30):
        environment.record(run, step, print)
    assert not (run / "diff.patch").exists(), "the code of the last start has no changes"
    found = files.read_document(run / "environment.json")
    assert found["start_step"] == 30 and [start["start_step"] for start in found["earlier"]] == [10, 20]
    assert found["host"] == socket.gethostname() and not found["git"]["dirty"]
    assert found["packages"]["jax"] and found["devices"] == {"kind": "cpu", "count": 8, "processes": 1}
    (run / "environment.json").write_text("{")
    said = []
    environment.record(run, 40, said.append)
    assert "is damaged" in said[0] and files.read_document(run / "environment.json")["earlier"] == []


def test_neither_the_home_folder_nor_the_environment_is_recorded(tmp_path, monkeypatch):
    home = tmp_path / "home" / "somebody"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("A_KEY", "secret-value")
    monkeypatch.setattr("sys.orig_argv", ["python", f"{home}/train.py", f"--config={home}/c.py", f"{home}2/d.py"])
    monkeypatch.chdir(home)
    described = environment.describe()
    assert (
        described["command"] == ["python", "~/train.py", "--config=~/c.py", f"{home}2/d.py"]
        and described["folder"] == "~"
    )
    assert "secret-value" not in json.dumps(described)


def test_show_says_how_a_run_was_started(code, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (code / "code.py").write_text("a = 2\n")
    (run / "metrics.jsonl").touch()
    environment.record(run, 0, print)
    environment.record(run, 5, print)
    text, wrong = details.show(run)
    assert f"on {socket.gethostname()}, 1 earlier start" in text and wrong == []
    commit = environment.code_in(code).commit
    assert f"commit {commit} of {environment._without_home(str(code))} with changes, see diff.patch" in text
    assert "command " in text
    (run / "environment.json").write_text('{"git": 1, "crc32": "00000000"}')
    _, wrong = details.show(run)
    assert any("environment.json is damaged" in line for line in wrong)


def test_the_code_of_a_process_is_that_of_lm():
    found = environment.running_code()
    if found is None:
        pytest.skip("the tests are not in a git repository")
    assert Path(found.repository) in [Path(environment.__file__).parents[2], *Path(os.getcwd()).parents, Path.cwd()]
