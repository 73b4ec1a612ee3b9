"""lm/tracking/tracker.py: rows are on disk at once, a resumed run rewrites its later rows, time adds up."""

import errno
import io
import json
import math
import os
import shutil
import subprocess

import jax
import numpy as np
import pytest

from lm.config import MonitorConfig, ProfileConfig
from lm.tracking import saved_step, tracker
from lm.tracking.files import RunFileError
from lm.tracking.tracker import Tracker


class Clock:
    """A clock that the test advances."""

    seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(tracker, "_now", clock)
    return clock


def start(workdir, total_steps=100, start_step=0, enabled=True, is_over=False, **config):
    return Tracker(workdir, total_steps, start_step, enabled, MonitorConfig(**config), is_over)


def lines(path):
    """The rows of a file as any JSON tool reads them, without their checksums."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "crc32"} for row in rows]


def old_row(step):
    """A row as older versions wrote it."""
    return f'{{"step": {step}, "split": "train", "seconds": 1.5, "loss": 2.0}}'


def test_rows_are_valid_json_and_flushed_at_once(tmp_path, clock):
    with start(tmp_path) as run:
        clock.seconds += 2.5
        run.log(10, "train", {"loss": np.float32(0.5), "grad_norm": math.inf})
        expected = {"step": 10, "split": "train", "seconds": 2.5, "loss": 0.5, "grad_norm": None}
        assert lines(tmp_path / "metrics.jsonl") == [expected]  # before the file is closed: a kill loses no row
        run.text(10, "prompt", "a\nb")
    assert lines(tmp_path / "samples.jsonl") == [{"step": 10, "name": "prompt", "text": "a\nb"}]


def test_a_metric_may_not_have_the_name_of_a_key_of_the_row(tmp_path):
    with start(tmp_path) as run, pytest.raises(ValueError, match="'seconds' has the name"):
        run.log(1, "train", {"loss": 1.0, "seconds": 3.0})


def test_a_resumed_run_drops_later_rows_and_continues(tmp_path, clock, capsys):
    with start(tmp_path) as run:
        for step in (10, 20, 30):
            clock.seconds += 1
            run.log(step, "train", {"loss": 1 / step})
            run.text(step, "prompt", str(step))
    kept = (tmp_path / "metrics.jsonl").read_bytes().splitlines()[:2]
    with start(tmp_path, start_step=20) as run:
        clock.seconds += 1
        run.log(30, "train", {"loss": 1 / 30})
    assert (tmp_path / "metrics.jsonl").read_bytes().splitlines()[:2] == kept
    rows = lines(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [10, 20, 30]
    assert [row["seconds"] for row in rows] == [1, 2, 3]  # wall time continues from the last row kept
    assert [row["step"] for row in lines(tmp_path / "samples.jsonl")] == [10, 20]
    assert "metrics.jsonl: dropped 1 rows that are written again after step 20" in capsys.readouterr().err


def test_a_start_without_checkpoint_drops_all_rows(tmp_path):
    for _ in range(2):  # killed before the first checkpoint, started again
        with start(tmp_path) as run:
            run.log(0, "eval", {"loss": 9.0})
    assert [row["step"] for row in lines(tmp_path / "metrics.jsonl")] == [0]


@pytest.mark.parametrize(
    ("tail", "steps"), [('{"step": 30, "lo', [10, 20]), (old_row(20), [10, 20, 20]), ("\0", [10, 20])]
)
def test_an_incomplete_last_line_is_repaired(tmp_path, capsys, tail, steps):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{old_row(10)}\n{old_row(20)}\n{tail}")
    with start(tmp_path, start_step=20) as run:
        run.log(30, "train", {"loss": 1.0})
    assert [row["step"] for row in lines(path)] == [*steps, 30]
    assert "metrics.jsonl: repaired an incomplete last line" in capsys.readouterr().err


def test_the_trackers_get_the_same_rows_and_samples(tmp_path):
    calls = []

    class Others:
        scalars = text = lambda self, *args: calls.append(args)

    with Tracker(tmp_path, 100, 5, True, MonitorConfig(), trackers=Others()) as run:
        run.log(10, "eval", {"loss": np.float32(2.5)})
        run.text(10, "prompt", "# not a title")
    assert calls == [(10, {"eval/loss": 2.5}), (10, "prompt", "# not a title")]


def test_rows_of_the_last_step_are_written_once_when_nothing_is_left_to_train(tmp_path):
    for is_over in (False, True):  # killed before the summary, started again
        with start(tmp_path, start_step=20 if is_over else 0, is_over=is_over) as run:
            if not is_over:
                run.log(20, "train", {"loss": 3.0})
            run.log(20, "eval", {"loss": 2.0})
            run.text(20, "prompt", "text")
            run.log(10, "test", {"loss": 2.5})
    assert [(row["step"], row["split"]) for row in lines(tmp_path / "metrics.jsonl")] == [
        (20, "train"), (20, "eval"), (10, "test"),
    ]  # fmt: skip
    assert [row["step"] for row in lines(tmp_path / "samples.jsonl")] == [20]


def test_the_newest_complete_checkpoint_is_recorded(tmp_path):
    with start(tmp_path) as run:
        run.saved(None)
        assert saved_step.read(tmp_path) is None
        run.saved(10)
        run.saved(20)
        assert saved_step.read(tmp_path) == 20
    with start(tmp_path, start_step=10):  # step 20 is damaged
        assert saved_step.read(tmp_path) == 10
    with start(tmp_path / "other", enabled=False) as run:
        run.saved(10)
    assert not (tmp_path / "other").exists()


def test_a_full_disk_ends_the_run_with_one_line_and_loses_no_row(small_disk):
    """A row that was logged without an error is there."""
    run, filler, logged = small_disk / "run", small_disk / "filler", 0
    with pytest.raises(RunFileError) as error, start(run) as writing:
        writing.saved(1)
        room = 12 * 1024
        filler.write_bytes(b"x" * (os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize - room))
        for step in range(1, 10_000):
            writing.log(step, "train", {"loss": 1 / 3})
            logged = step
    message = str(error.value)
    assert "failed: No space left on device; free disk space; the last good checkpoint is step 1" in message
    assert "\n" not in message and str(run) in message and logged > 20
    filler.unlink()
    with start(run, start_step=logged) as writing:
        writing.log(logged + 1, "train", {"loss": 1.0})
    assert [row["step"] for row in lines(run / "metrics.jsonl")] == [*range(1, logged + 2)]


def test_a_folder_that_vanishes_is_named(tmp_path):
    match = r"metrics.jsonl failed: No such file or directory; the folder was deleted or moved$"
    with pytest.raises(RunFileError, match=match), start(tmp_path / "run") as run:
        run.log(1, "train", {"loss": 1.0})
        shutil.rmtree(tmp_path / "run")
        run.log(2, "train", {"loss": 1.0})
    assert not (tmp_path / "run").exists()


def test_a_read_only_folder_is_named(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(
        RunFileError, match=r"writing to .*/run failed: Read-only file system; make it writable, or cho"
    ):
        start(small_disk / "run")


def test_a_console_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    class Full(io.StringIO):
        def write(self, _):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with start(tmp_path, start_step=5) as run:
        monkeypatch.setattr(run._console, "file", Full())
        with pytest.raises(
            RunFileError, match=r"^writing to the console \(stderr\) failed: No space left .* step 5, from"
        ):
            run.note("note")


def test_a_disabled_tracker_writes_nothing_but_counts_time(tmp_path, clock, capsys, monkeypatch):
    monkeypatch.setattr(jax.profiler, "start_trace", lambda _: pytest.fail("profiled on a process that must not write"))
    with start(tmp_path / "run", enabled=False, profile=ProfileConfig(0, 1)) as run:
        run.log(1, "train", {"loss": 1.0})
        run.text(1, "prompt", "text")
        run.progress(1, 1.0, 1.0)
        run.profile(0)
        run.note("note")
        with run.bucket("step"):
            clock.seconds += 3
        assert run.goodput()["step"] == 3
    assert not (tmp_path / "run").exists() and capsys.readouterr().err == ""


def test_buckets_add_up_to_the_total_time_and_nested_ones_count_once(tmp_path, clock):
    with start(tmp_path, enabled=False) as run:
        clock.seconds += 1
        with pytest.raises(RuntimeError), run.bucket("eval"):
            clock.seconds += 2
            with run.bucket("compile"):
                clock.seconds += 4
            clock.seconds += 8
            raise RuntimeError
        clock.seconds += 16
        expected = {"compile": 4, "input": 0, "step": 0, "eval": 10, "checkpoint": 0, "other": 17}
        assert run.goodput() == expected and run.seconds() == sum(expected.values())
        with pytest.raises(ValueError, match="no time bucket 'stepp'"), run.bucket("stepp"):
            pass


def test_progress_without_a_terminal_is_rate_limited_and_estimates_the_time_left(tmp_path, clock, capsys):
    (tmp_path / "metrics.jsonl").touch()
    with start(tmp_path, total_steps=1000, start_step=100) as run:
        for step in range(101, 1001):
            run.progress(step, 2.0, 12_345.6, 0.4123 if step > 900 else None)
            clock.seconds += 1
    printed = capsys.readouterr().err.splitlines()
    assert printed[0] == "step 101/1,000 · loss 2.0000 · 12,346 tokens/s"
    assert printed[1] == "step 111/1,000 · loss 2.0000 · 12,346 tokens/s · ETA 0:14:49"  # 889 steps of 1 s
    assert printed[-1] == "step 1,000/1,000 · loss 2.0000 · 12,346 tokens/s · MFU 41.2% · ETA 0:00:00"
    assert len(printed) == 91  # of 900 calls: one in 10 s, and the last


def test_a_terminal_shows_a_progress_bar(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    with start(tmp_path, total_steps=40) as run:
        run.progress(10, 2.5, 1000.0, 0.5)
        run.note("[not markup]")
    printed = capsys.readouterr().err
    assert "━" in printed and "10/40" in printed and "loss 2.5000 · 1,000 tokens/s · MFU 50.0%" in printed
    assert "[not markup]" in printed


def test_the_profile_covers_the_steps_asked_for(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: calls.append(f"start {path}"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    with start(tmp_path, profile=ProfileConfig(3, 2)) as run:
        for step in range(8):
            calls.append(step)
            run.profile(step)
    assert calls == [0, 1, 2, 3, f"start {tmp_path / 'profile'}", 4, 5, "stop", 6, 7]


def test_the_profile_ends_with_the_run(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    with pytest.raises(KeyboardInterrupt), start(tmp_path, profile=ProfileConfig(3, 9)) as run:
        run.profile(5)
        raise KeyboardInterrupt
    assert calls == ["start", "stop"]


def test_a_url_is_refused_before_anything_is_written():
    with pytest.raises(ValueError, match="gs://bucket/run is a URL"):
        start("gs://bucket/run")


def test_control_characters_of_a_sample_do_not_reach_the_terminal(tmp_path, capsys):
    text = "a\x1b[2Jb\x07\tc\x9b1m\r\u202ed\x7f\nhe\u200dllo\u3000"
    with start(tmp_path) as run:
        run.text(1, "\x1b]0;title\x07", text)
    printed = capsys.readouterr().err
    assert (
        "a\\x1b[2Jb\\x07 " in printed
        and "c\\x9b1m" in printed
        and "\\u202ed\\x7f" in printed
        and "he\u200dllo\u3000" in printed
    )
    assert not set(printed) & set("\x1b\x07\x9b\r\u202e\x7f")
    assert lines(tmp_path / "samples.jsonl")[0]["text"] == text
