"""lm/lease.py: one owner of a folder: starts at once, stops, deaths, damage, folders that cannot be written."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lm import lease
from lm.config.schema import ConfigError

ROOT = Path(__file__).resolve().parents[1]
# Holds a folder, and appends a line each 10 ms for so long as it may; `machine` stands for another host. While there is
# a file 'suspend' in the folder, it suspends itself before it looks at its lease.
OWNER = """
import os, signal, sys, time
from pathlib import Path
from lm import lease
folder, machine, seconds, beat, dead = Path(sys.argv[1]), sys.argv[2], *map(float, sys.argv[3:6])
lease.BEAT_SECONDS, lease.DEAD_SECONDS, lease._FRESH_SECONDS, lease._POLL_SECONDS = beat, dead, beat * 2, 0.02
if machine:
    lease._machine = lambda: machine
try:
    with lease.hold(folder) as check:
        end, told = time.monotonic() + seconds, False
        while time.monotonic() < end:
            if (folder / "suspend").exists():
                os.kill(os.getpid(), signal.SIGSTOP)
            check()
            with (folder / "rows").open("a") as file:
                file.write(machine + "\\n")
            told = told or not print("holds", flush=True)
            time.sleep(0.01)
except (lease.Held, lease.Lost) as error:
    print(type(error).__name__, error, flush=True)
    sys.exit(error.exit_status)
"""


def start(folder, machine="", seconds=60.0, beat=0.1, dead=1.5) -> subprocess.Popen:
    arguments = [str(folder), machine, *map(str, (seconds, beat, dead))]
    command = [sys.executable, "-c", OWNER, *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def holder(*args, **kwargs) -> subprocess.Popen:
    """A process that holds the folder by now."""
    process = start(*args, **kwargs)
    assert process.stdout.readline() == "holds\n", process.communicate()
    return process


@pytest.fixture
def processes():
    """A list whose processes are killed at the end."""
    started: list[subprocess.Popen] = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    for name, value in {"BEAT": 0.1, "DEAD": 1.0, "_FRESH": 0.2, "_POLL": 0.02}.items():
        monkeypatch.setattr(lease, f"{name}_SECONDS", value)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_of_many_starts_at_once_one_holds_and_the_others_name_it(tmp_path, processes):
    folder = tmp_path / "new" / "run"
    processes += [start(folder, seconds=3) for _ in range(6)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert sorted(process.returncode for process in processes) == [0, *[lease.Held.exit_status] * 5]
    (owner,) = (process for process in processes if process.returncode == 0)
    for output in outputs:
        assert output == "holds\n" or f"Held {folder} is in use by process {owner.pid} on " in output, output
    assert names(folder) == ["rows"], "released at exit"


def test_of_many_that_take_over_at_once_one_holds(tmp_path, processes):
    """Of another machine, dead: all watch it for as long, and try at the same moment."""
    write(tmp_path, machine="another")
    processes += [start(tmp_path, f"host {i}", seconds=3, dead=1.0) for i in range(6)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert sorted(process.returncode for process in processes) == [0, *[lease.Held.exit_status] * 5], outputs
    assert len({*(tmp_path / "rows").read_text().splitlines()}) == 1
    assert names(tmp_path) == ["rows"]


@pytest.mark.parametrize("number", [1, 2])
def test_a_lease_that_an_old_listing_hides_is_seen(tmp_path, monkeypatch, number):
    """As caches of network disks do: of the same number, by exclusive creation; of another, after it."""
    write(tmp_path, pid=os.getpid(), started=lease._stat(os.getpid())[1])
    (tmp_path / "lease.1").rename(tmp_path / f"lease.{number}")
    before, real, old = (tmp_path / f"lease.{number}").read_bytes(), lease.leases, [{}]
    monkeypatch.setattr(lease, "leases", lambda folder: old.pop() if old else real(folder))
    with pytest.raises(lease.Held, match=f"in use by process {os.getpid()} on h"), lease.hold(tmp_path):
        pass
    assert names(tmp_path) == [f"lease.{number}"] and (tmp_path / f"lease.{number}").read_bytes() == before


@pytest.mark.parametrize("machine", ["", "another host"])
def test_a_second_start_is_refused_at_once_with_who_holds_it_and_since_when(tmp_path, processes, machine):
    processes.append(holder(tmp_path, machine))
    before = time.monotonic()
    with (
        pytest.raises(lease.Held, match=rf"in use by process {processes[0].pid} on \S+, which has held it since 20"),
        lease.hold(tmp_path),
    ):
        pass
    assert time.monotonic() - before < lease.DEAD_SECONDS
    processes[0].kill()


def test_a_stopped_process_of_this_machine_keeps_the_folder_and_goes_on(tmp_path, processes):
    processes.append(holder(tmp_path, seconds=2))
    processes[0].send_signal(signal.SIGSTOP)
    time.sleep(1.5)
    with (
        pytest.raises(lease.Held, match=rf"process {processes[0].pid} .* is stopped; continue it \(kill -CONT"),
        lease.hold(tmp_path),
    ):
        pass
    processes[0].send_signal(signal.SIGCONT)
    assert processes[0].wait(60) == 0
    with lease.hold(tmp_path):
        assert names(tmp_path) == ["lease.1", "rows"]


def test_a_dead_process_of_this_machine_is_followed_at_once(tmp_path, processes):
    processes.append(holder(tmp_path))
    processes[0].kill()
    os.waitid(os.P_PID, processes[0].pid, os.WEXITED | os.WNOWAIT)
    before = time.monotonic()
    with lease.hold(tmp_path):  # while it is a zombie, whose id still exists
        assert time.monotonic() - before < 0.5
        assert names(tmp_path) == ["lease.2", "rows"]
    assert names(tmp_path) == ["rows"]


def test_a_process_id_that_is_used_again_does_not_hold_the_folder(tmp_path):
    """Of a process that lives, this one, but which started at another time."""
    write(tmp_path, pid=os.getpid(), started="12")
    before = time.monotonic()
    with lease.hold(tmp_path):
        assert time.monotonic() - before < 0.5


def test_a_dead_owner_of_another_machine_is_followed_after_its_heartbeat_has_not_changed(tmp_path, processes, capsys):
    processes.append(holder(tmp_path, "another host"))
    processes[0].kill()
    before = time.monotonic()
    with lease.hold(tmp_path):
        assert lease.DEAD_SECONDS <= time.monotonic() - before < lease.DEAD_SECONDS + 1
        said = capsys.readouterr().err
        assert f"is held by process {processes[0].pid} on " in said and "taken over from process" in said
    assert lease.BEAT_SECONDS * 3 < lease.DEAD_SECONDS


def test_the_waits_of_a_real_run_fit_a_minute():
    program = "from lm import lease; print(lease.BEAT_SECONDS, lease._FRESH_SECONDS, lease.DEAD_SECONDS)"
    output = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    beat, fresh, dead = map(float, output.split())
    assert 2 * beat <= fresh and 3 * fresh <= dead < 50


def test_an_owner_that_was_suspended_finds_its_lease_taken_and_writes_nothing(tmp_path, processes):
    """As with a virtual machine or a network that is away for a while: processes of two machines."""
    processes += [holder(tmp_path, "a")]
    (tmp_path / "suspend").touch()
    os.waitid(os.P_PID, processes[0].pid, os.WSTOPPED)
    (tmp_path / "suspend").unlink()
    processes.append(holder(tmp_path, "b"))
    before = (tmp_path / "rows").read_text().count("a")
    processes[0].send_signal(signal.SIGCONT)
    output, _ = processes[0].communicate(timeout=60)
    assert processes[0].returncode == lease.Lost.exit_status
    assert output.count("\n") == 1 and f"replaced by that of process {processes[1].pid} on " in output
    assert (tmp_path / "rows").read_text().count("a") == before
    assert processes[1].poll() is None and names(tmp_path) == ["lease.2", "rows"], "the new owner is not disturbed"


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"pid": "x"}', "[" * 100_000, "\x1b[2J\0", "9" * 5000])
def test_a_damaged_lease_is_watched_then_replaced(tmp_path, text, capsys):
    (tmp_path / "lease.7").write_text(text)
    before = time.monotonic()
    with lease.hold(tmp_path):
        assert time.monotonic() - before >= lease.DEAD_SECONDS and names(tmp_path) == ["lease.8"]
    assert "\x1b" not in capsys.readouterr().err


def test_control_characters_of_a_lease_do_not_reach_the_terminal(tmp_path, capsys):
    write(tmp_path, host="\x1b[2Jhost", machine="another")
    with lease.hold(tmp_path):
        said = capsys.readouterr().err
    assert "?[2Jhost" in said and "\x1b" not in said


@pytest.mark.parametrize("pid", [0, -1, 1 << 40])
def test_a_process_id_that_cannot_be_is_of_no_process(tmp_path, pid):
    write(tmp_path, pid=pid)
    with lease.hold(tmp_path):
        pass


def test_a_process_that_another_user_hides_is_watched(tmp_path, monkeypatch):
    """Where /proc shows only one's own processes: process 1 exists, but nothing is known of it."""
    monkeypatch.setattr(lease, "_stat", lambda pid: None)
    write(tmp_path, pid=1)
    before = time.monotonic()
    with lease.hold(tmp_path):
        assert time.monotonic() - before >= lease.DEAD_SECONDS


@pytest.mark.parametrize("damage", ["deleted", "overwritten", "another's", "folder deleted"])
def test_a_lease_that_vanishes_or_changes_stops_its_owner(tmp_path, damage):
    folder = tmp_path / "run"
    lost = r"no longer owns .*: lease\.1 (was deleted|is damaged|is of process 5 on )"
    with pytest.raises(lease.Lost, match=lost), lease.hold(folder) as check:
        check()
        match damage:
            case "deleted":
                (folder / "lease.1").unlink()
            case "overwritten":
                (folder / "lease.1").write_text("gone")
            case "another's":
                write(folder, pid=5)
            case "folder deleted":
                (folder / "lease.1").unlink()
                folder.rmdir()
        end = time.monotonic() + 5
        while time.monotonic() < end:
            check()
    assert not folder.exists() or (names(folder) in ([], ["lease.1"])), "another's lease is left"


def test_the_lease_of_an_owner_that_reads_nothing_else_is_renewed(tmp_path):
    with lease.hold(tmp_path):
        (before,) = lease.leases(tmp_path).values()
        time.sleep(0.5)
        (after,) = lease.leases(tmp_path).values()
    assert json.loads(after)["beats"] > json.loads(before)["beats"] and lease.parse(after) == lease.parse(before)


def test_a_renewal_that_fails_does_not_lose_the_lease(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with lease.hold(tmp_path) as check:
        monkeypatch.setattr(os, "pwrite", full)
        time.sleep(0.5)
        check()
        monkeypatch.undo()


def test_a_folder_that_cannot_be_written_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "held" / "lease.1").mkdir(parents=True)
    for path in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / "loop" / "run", tmp_path / "held"):
        with pytest.raises(ConfigError, match=r"^[^\n]*: expected a folder that can be written, found [^\n]*$"):
            lease.hold(path).__enter__()


def test_a_read_only_folder_is_refused_in_one_line(tmp_path, monkeypatch):
    """By the call that fails: tests may run as root, whom modes do not stop."""
    real = os.open

    def read_only(path, flags, *mode, **dirs):
        if flags & os.O_CREAT:
            raise OSError(30, "Read-only file system", os.fspath(path))
        return real(path, flags, *mode, **dirs)

    monkeypatch.setattr(os, "open", read_only)
    with (
        pytest.raises(ConfigError, match=r"^[^\n]*found Read-only file system \(.*lease\.1\)$"),
        lease.hold(tmp_path / "new"),
    ):
        pass
    assert not (tmp_path / "new").exists()


def test_a_full_disk_leaves_no_lease(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(ConfigError, match="No space left on device"), lease.hold(tmp_path / "new" / "run"):
        pass
    assert names(tmp_path) == []


def test_a_folder_made_for_a_run_that_writes_nothing_is_removed(tmp_path):
    with lease.hold(tmp_path / "new" / "run"):
        assert names(tmp_path / "new" / "run") == ["lease.1"]
    assert names(tmp_path) == []
    (tmp_path / "old").mkdir()
    with lease.hold(tmp_path / "old"):
        pass
    assert names(tmp_path) == ["old"]


def test_a_relative_folder_below_one_that_was_deleted_is_refused(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(ConfigError, match="found No such file or directory"):
        lease.hold(Path("run")).__enter__()
    monkeypatch.undo()


def write(folder: Path, **changes) -> None:
    """A lease of a process of this machine that has ended, but for what is changed."""
    owner = {"token": "t", "host": "h", "machine": lease._machine(), "pid": 4_000_000, "started": "1", "since": "2026"}
    (folder / "lease.1").write_text(json.dumps({**owner, **changes, "beats": 3}))
