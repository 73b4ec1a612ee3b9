"""lm/checkpoint/store.py: which checkpoints are kept, which is the best, and which one a name refers to."""

import os
import shutil

import pytest

from lm import checkpoint, files
from lm.checkpoint import CheckpointError
from lm.config import CheckpointConfig
from tests.test_checkpoint_store import info, may_stop_orbax, save, small, steps

pytestmark = may_stop_orbax


@pytest.mark.parametrize(
    ("name", "values", "kept"),
    [
        ("loss", {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5, 5: None, 6: 4.0}, [2, 5, 6]),
        ("accuracy", {1: 3.0, 2: 9.0, 3: 2.0, 4: 2.5, 5: None, 6: 4.0}, [2, 5, 6]),
        ("loss", {1: None, 2: None, 3: None, 4: None}, [3, 4]),
        ("loss", {1: 1.0, 2: None, 3: None, 4: None}, [1, 3, 4]),
        ("loss", {1: 5.0, 2: 4.0, 3: 3.0, 4: 2.0}, [3, 4]),
        ("accuracy", {1: float("nan"), 2: 2.0, 3: None, 4: float("nan"), 5: None}, [2, 4, 5]),
    ],
)
def test_the_latest_two_and_the_best_one_are_kept(name, values, kept, tmp_path):
    save(tmp_path, values, name, keep_latest=2, keep_best=1, best_metric=name)
    assert steps(tmp_path) == kept
    if any(values.values()):
        assert checkpoint.choose(f"{tmp_path}@best").step == kept[0 if len(kept) == 3 else -1]


def test_retention_continues_after_restarts_and_can_keep_no_best(tmp_path):
    for number, loss in {1: 1.0, 2: 3.0, 3: 2.0, 4: 5.0}.items():
        save(tmp_path / "best", {number: loss}, keep_latest=1, keep_best=2)
        save(tmp_path / "none", {number: loss}, keep_latest=1, keep_best=0)
    assert steps(tmp_path / "best") == [1, 3, 4]
    assert steps(tmp_path / "none") == [4]


def test_is_best_compares_with_all_kept_steps(tmp_path):
    answers = []
    for cfg in (CheckpointConfig(), CheckpointConfig(best_metric="f1"), CheckpointConfig(keep_best=0)):
        workdir, name = tmp_path / f"{cfg.best_metric}{cfg.keep_best}", cfg.best_metric
        with checkpoint.Checkpoints(workdir, cfg) as saves:
            first = saves.is_best({name: 9.0})
            saves.save(1, small()[0], info(), {name: 2.0})
            saves.save(2, small()[0], info(), {name: float("nan")})
            saves.save(3, small()[0], info(), None)
        with checkpoint.Checkpoints(workdir, cfg) as saves:
            answers.append([first, *(saves.is_best({name: value}) for value in (1.0, 2.0, 3.0, float("nan")))])
    assert answers == [[True, True, False, False, False], [True, False, False, True, False], [False] * 5]


def test_choose_finds_the_step_that_is_named(tmp_path):
    run = tmp_path / "a@b" / "run"  # the @ of the path is not that of the step
    save(run, {1: 3.0, 2: 1.0, 3: 2.0, 10: None}, keep_latest=9)
    found = {name: checkpoint.choose(f"{run}{name}").step for name in ("", "@latest", "@best", "@3", "@10")}
    assert found == {"": 10, "@latest": 10, "@best": 2, "@3": 3, "@10": 10}
    for which in ("@4", "@bets", "@"):
        with pytest.raises(CheckpointError, match=f"{which}': expected latest, best or one of the steps 1, 2, 3, 10$"):
            checkpoint.choose(f"{run}{which}")
    with pytest.raises(CheckpointError, match=r"no checkpoint under '.*/nowhere/checkpoints'.*--workdir"):
        checkpoint.choose(str(tmp_path / "nowhere@best"))


def test_the_best_is_by_the_metric_of_the_run(tmp_path):
    run = tmp_path / "run"
    changes = {"keep_latest": 9, "best_metric": "accuracy"}
    save(run, {1: 0.1, 2: 0.3, 3: 0.2}, name="accuracy", **changes)
    assert checkpoint.choose(f"{run}@best").step == 2
    save(tmp_path / "other", {1: None, 2: None}, **changes)
    with pytest.raises(CheckpointError, match="no step was evaluated on 'accuracy'; there are steps 1, 2"):
        checkpoint.choose(f"{tmp_path}/other@best")


def test_choose_refuses_a_damaged_step_and_best_ignores_it(tmp_path):
    save(tmp_path, {1: 3.0, 2: 1.0, 3: 2.0}, keep_latest=9)
    (tmp_path / "checkpoints/2/_CHECKPOINT_METADATA").write_text("{")
    assert checkpoint.choose(f"{tmp_path}@best").step == 3
    with pytest.raises(CheckpointError, match=r"checkpoints/2 is damaged: .*; use another step"):
        checkpoint.choose(f"{tmp_path}@2")
    for number in (1, 3):
        (tmp_path / f"checkpoints/{number}/_CHECKPOINT_METADATA").write_text("{")
    with pytest.raises(CheckpointError, match=r"checkpoints/3 is damaged"):
        checkpoint.choose(f"{tmp_path}@best")


def test_a_step_is_renamed_before_it_is_deleted_and_the_new_one_is_on_disk_before(tmp_path, monkeypatch):
    did = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: did.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    monkeypatch.setattr(shutil, "rmtree", lambda path: did.append(f"delete {path}"))
    save(tmp_path, {1: None, 2: None}, keep_latest=1)
    root = str(tmp_path / "checkpoints")
    assert did[-2:] == [root, f"delete {root}/1.deleted"], "the rename is on disk before anything is deleted"
    before = did[: did.index(f"delete {root}/1.deleted") - 1]
    written = [str(path) for path in (tmp_path / "checkpoints/2").rglob("*")]
    assert {root, f"{root}/2", *written} <= {*before}, "all files and folders of the new step are on disk"
    assert steps(tmp_path) == [2] and (tmp_path / "checkpoints/1.deleted").is_dir()
    monkeypatch.undo()
    checkpoint.sweep(tmp_path)
    assert os.listdir(root) == ["2"]


def test_a_step_that_cannot_be_deleted_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    def busy(path):
        raise OSError(f"busy: {path}")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        save(tmp_path, {1: None, 2: None, 3: None}, keep_latest=1)
    assert steps(tmp_path) == [3]
    said = capsys.readouterr().err
    assert "checkpoints/1 could not be deleted: busy" in said and "checkpoints/2 could not be" in said


def test_sweeping_removes_scratch_files_of_dead_writers_only(tmp_path):
    dead, other = 2**22 + 1, "elsewhere"  # no process has a number above 2^22
    names = {
        f".summary.json.{files._HOST}-{dead}.tmp": False,
        f".report.html.{dead}.tmp": False,  # of an older version
        f".metrics.jsonl.{files._HOST}-{os.getpid()}.tmp": False,  # of an earlier process with this number
        f".config.json.{files._HOST}-{os.getppid()}.tmp": True,
        f".new.json.{other}-{dead}.tmp": True,
        f".old.json.{other}-{dead}.tmp": False,
        ".notes.tmp": True,
        "metrics.jsonl": True,
    }
    for name in names:
        (tmp_path / name).write_text("x")
    os.utime(tmp_path / f".old.json.{other}-{dead}.tmp", (0, 0))
    said = []
    checkpoint.sweep(tmp_path, said.append)
    assert {*os.listdir(tmp_path)} == {name for name, kept in names.items() if kept}
    assert all(name in said[0] for name, kept in names.items() if not kept) and len(said) == 1
    checkpoint.sweep(tmp_path, said.append)
    assert len(said) == 1, "nothing to say"
