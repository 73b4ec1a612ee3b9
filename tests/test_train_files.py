"""Whole runs whose files are lost, damaged or cannot be written: one line, and the same command goes on."""

import contextlib
import json
import os
import re
import shutil
import subprocess

import pytest

from lm import checkpoint, lease, train
from lm import run as run_lib
from lm.checkpoint import CheckpointError
from lm.config.schema import ConfigError
from lm.tracking import files, report, tracker
from lm.tracking.files import RunFileError
from tests import toys


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    texts = toys.write_texts(tmp_path_factory.mktemp("data") / "texts")
    return toys.recipe(
        texts, train__total_steps=6, eval__every_steps=2, checkpoint__every_steps=2, generate__prompts=("the model",)
    )


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """A run that nothing befell."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    train.train(recipe, workdir)
    return workdir


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(report, "_curves", lambda *args: "")


def figures(workdir):
    """All rows but their times, the samples, and the fingerprints of the last checkpoint."""
    timed = ("seconds", "tokens_per_second", "input_bound")
    rows = [{k: v for k, v in row.items() if k not in timed} for row in files.read_rows(workdir / "metrics.jsonl")]
    saved = checkpoint.list_saved(workdir)[-1]
    return rows, list(files.read_rows(workdir / "samples.jsonl")), saved.step, saved.info["arrays"]


class Stop(Exception):
    pass


@pytest.mark.slow
def test_a_run_stopped_after_its_last_step_writes_its_last_rows_once(recipe, whole, tmp_path, monkeypatch):
    """Killed after the last save: before the evaluation of the test rows, the summary, and the report."""
    run = tmp_path / "run"
    for owner, name in ((train.Evaluator, "test"), (report, "write_summary"), (report, "write_report")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, lambda *_: (_ for _ in ()).throw(Stop))
            with pytest.raises(Stop):
                train.train(recipe, run)
    assert figures(run) == figures(whole)
    summary = train.train(recipe, run)
    assert summary["loss"] == files.read_document(whole / "summary.json")["loss"]
    assert figures(run) == figures(whole)


def test_a_damaged_summary_is_written_again(recipe, whole, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    text = (run / "summary.json").read_text()
    (run / "summary.json").write_text(text.replace('"steps": 6', '"steps": 7'))
    summary = train.train(recipe, run)
    assert (
        "summary.json is damaged: its checksum does not match; evaluating again to write it" in capsys.readouterr().out
    )
    was = json.loads(text)
    for name in ("loss", "steps", "before", "bits_per_byte"):
        assert summary[name] == was[name] == files.read_document(run / "summary.json")[name]
    assert figures(run) == figures(whole)


def test_a_run_that_lost_its_checkpoints_is_refused_before_anything_is_written(recipe, whole, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    monkeypatch.setattr(run_lib, "prepare", lambda *_: pytest.fail("data was read"))
    for kept in ("summary.json", "saved.json", "metrics.jsonl"):  # what is left to tell by
        with pytest.raises(CheckpointError, match=r"has metrics up to step 6 and .* but no checkpoint: "):
            train.train(recipe, run)
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
        if kept != "metrics.jsonl":
            (run / kept).unlink()
            del before[run / kept]


def test_a_run_killed_before_its_first_checkpoint_starts_again(recipe, whole, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "save", lambda *_: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            train.train(recipe, run)
    assert [row["step"] for row in files.read_rows(run / "metrics.jsonl")] and not (run / "saved.json").exists()
    train.train(recipe, run)
    assert figures(run) == figures(whole)


def disturb(monkeypatch, step, action):
    """Calls `action` before the row of a training step is logged, once."""
    log, done = tracker.Tracker.log, []

    def logging(self, at, split, metrics):
        if at == step and split == "train" and not done:
            done.append(True)
            action()
        log(self, at, split, metrics)

    monkeypatch.setattr(tracker.Tracker, "log", logging)


@pytest.mark.slow
@pytest.mark.parametrize(("step", "room"), [(1, 0), (3, 65536), (4, 8192), (6, 0)])
def test_a_run_on_a_full_disk_ends_in_one_line_and_goes_on_once_there_is_room(
    recipe, whole, small_disk, monkeypatch, step, room
):
    def fill():
        size = os.statvfs(small_disk)
        with contextlib.suppress(OSError):  # a save in the background may take the rest
            (small_disk / "filler").write_bytes(b"x" * max(0, size.f_bavail * size.f_frsize - room))

    run = small_disk / "run"
    disturb(monkeypatch, step, fill)
    with pytest.raises((RunFileError, CheckpointError)) as error:
        train.train(recipe, run)
    message = str(error.value)
    assert "\n" not in message and str(run) in message and "No space left on device" in message
    assert re.search("free(ing)? disk space", message)
    assert "last good checkpoint is step" in message or "there is no" in message
    (small_disk / "filler").unlink()
    train.train(recipe, run)
    assert figures(run) == figures(whole)


@pytest.mark.slow
def test_a_run_whose_folder_is_deleted_meanwhile_ends_in_one_line_and_begins_anew(recipe, whole, tmp_path, monkeypatch):
    run = tmp_path / "run"
    disturb(monkeypatch, 3, lambda: shutil.rmtree(run))
    missing = r"writing .*/metrics.jsonl failed: No such file or directory; the folder was deleted or moved$"
    late = r"saving .*/checkpoints/\d failed: the folder was deleted or moved$|no longer owns .*: lease\.\d was deleted"
    with pytest.raises((RunFileError, CheckpointError, lease.Lost), match=f"{missing}|{late}"):
        train.train(recipe, run)
    assert not checkpoint.list_saved(run), "begins anew; a save that was in flight may have left its scratch folder"
    train.train(recipe, run)
    assert figures(run) == figures(whole)


@pytest.mark.slow
def test_a_read_only_folder_is_refused_before_data_is_read_and_gone_on_with_when_writable(
    recipe, whole, small_disk, monkeypatch
):
    run = small_disk / "run"
    disturb(monkeypatch, 5, lambda: (_ for _ in ()).throw(Stop))
    with pytest.raises(Stop):
        train.train(recipe, run)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with monkeypatch.context() as patch:
        patch.setattr(run_lib, "prepare", lambda *_: pytest.fail("data was read"))
        with pytest.raises(ConfigError, match=rf"^{run}: expected a folder that can be written, found Read-only file"):
            train.train(recipe, run)
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    train.train(recipe, run)
    assert figures(run) == figures(whole)
