"""lm/registry/cleaning.py: what is deleted, what stays, and who is asked."""

import contextlib
import json
import os
import shutil

import pytest

from lm import checkpoint, lease, train
from lm.registry import cleaning, details, listing
from lm.tracking import files, run_state
from tests import tool_modules, toys, trained_runs
from tests.registry_runs import age, write_run
from tests.test_checkpoint_store import may_stop_orbax


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with checkpoints at steps 2, 4 and 6."""
    with pytest.MonkeyPatch.context() as patch:
        toys.use_one_device(patch)
        return trained_runs.trained(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def run(whole, tmp_path):
    folder = tmp_path / "runs" / "run"
    shutil.copytree(whole, folder)
    return folder


def steps(run):
    return [saved.step for saved in checkpoint.list_saved(run)]


def clean(*arguments):
    tool_modules.call("runs", "clean", *arguments)


def files_below(folder):
    return sorted((path, path.lstat().st_size) for path in folder.rglob("*"))


def test_nothing_is_deleted_before_yes_is_said(run, capsys):
    before = files_below(run)
    for arguments in (["--keep=none"], ["--remove=runs", "--state=done"]):
        clean(run.parent, *arguments)
        out = capsys.readouterr().out
        assert "--yes deletes them" in out and files_below(run) == before
        assert ("all of it" in out) == (arguments[0] == "--remove=runs")


@pytest.mark.parametrize(
    ("keep", "is_done", "left"),
    [
        ("best", True, [2, 6]),
        ("best", False, [2]),
        ("last", True, [6]),
        ("best,last", True, [2, 6]),
        ("none", True, []),
    ],
    ids=str,
)
def test_the_checkpoints_that_are_kept_can_be_used_and_the_rest_is_freed(run, capsys, keep, is_done, left, monkeypatch):
    """A run that is done keeps its last step, without which it would train again."""
    metrics = {2: 1.0, 4: 2.0, 6: 3.0}
    if not is_done:
        (run / "summary.json").unlink()
    listed = checkpoint.list_saved

    def with_metrics(folder):
        found = listed(folder)
        for saved in found:
            saved.metrics.update(loss=metrics[saved.step])
        return found

    monkeypatch.setattr(checkpoint.store, "list_saved", with_metrics)
    gone = [run / "checkpoints" / str(step) for step in (2, 4, 6) if step not in left]
    size = sum(listing.size_of(str(path)) for path in gone)
    clean(run.parent, f"--keep={keep}", "--yes")
    monkeypatch.undo()
    assert steps(run) == left and (run / "summary.json").exists() == is_done
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == sorted(map(str, left))
    out = capsys.readouterr().out
    assert f"freed {listing.in_bytes(size)}" in out
    assert ("step 6 stays: without its last step" in out) == (keep == "best" and is_done)
    assert not [name for name in os.listdir(run) if lease.is_lease(name)]


@pytest.mark.parametrize("keep", ["last", "best"])
def test_a_run_that_was_cleaned_of_all_but_one_checkpoint_is_still_done(run, whole, monkeypatch, capsys, keep):
    toys.use_one_device(monkeypatch)
    monkeypatch.setattr(details, "best_step", lambda _: 2)
    clean(run.parent, f"--keep={keep}", "--yes")
    train.train(trained_runs.recipe(whole.parent), run)
    assert "already done: step 6 of 6" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["config.json", "summary.json"])
def test_a_damaged_run_keeps_its_last_step_as_it_may_be_done(run, monkeypatch, capsys, name):
    monkeypatch.setattr(details, "best_step", lambda _: 2)
    (run / name).write_bytes(b"\xff\x00")
    assert [entry.state for entry in listing.find(run.parent).entries] == ["damaged"]
    clean(run.parent, "--keep=best", "--yes")
    assert steps(run) == [2, 6] and "step 6 stays: without its last step" in capsys.readouterr().out


def test_what_somebody_owns_stays(run, capsys):
    with lease.hold(run):
        clean(run.parent, "--keep=none", "--yes")
        clean(run.parent, "--remove=runs", "--where=name=run", "--yes")
    assert steps(run) == [2, 4, 6]
    assert capsys.readouterr().out.count("a process of this machine owns it") == 2


def test_what_another_machine_may_own_stays_if_it_shows_life_and_goes_otherwise(run, monkeypatch):
    monkeypatch.setattr(lease, "DEAD_SECONDS", 0.6)
    monkeypatch.setattr(lease, "_POLL_SECONDS", 0.05)
    (run / "lease.4").write_text("{}")
    listed = listing.find(run.parent).entries
    removals = cleaning.plan(listed, run.parent, "runs", ())
    beats = iter(range(1000))

    def alive(seconds):
        (run / "lease.4").write_text(str(next(beats)))

    with monkeypatch.context() as patch:
        patch.setattr(lease.time, "sleep", alive)
        freed, wrong = cleaning.carry_out(removals, lambda _: None)
    assert freed == 0 and "is in use by" in wrong[0] and steps(run) == [2, 4, 6]
    freed, wrong = cleaning.carry_out(removals, lambda _: None)
    assert freed and not wrong and not run.exists() and not list(run.parent.iterdir())


def test_a_run_that_was_written_since_it_was_listed_stays(run):
    removals = cleaning.plan(listing.find(run.parent).entries, run.parent, "runs", ())
    age(run, -1)
    freed, wrong = cleaning.carry_out(removals, lambda _: None)
    assert freed == 0 and "was written since it was listed" in wrong[0] and steps(run) == [2, 4, 6]


def test_whole_runs_go_by_state_and_age_only(tmp_path, capsys):
    root = tmp_path / "runs"
    for name, is_done, days in (("old", True, 40), ("new", True, 1), ("killed", False, 40), ("study/deep", False, 50)):
        age(write_run(root / name, is_done=is_done), days)
    with pytest.raises(SystemExit, match="--remove=runs: say which"):
        clean(root, "--remove=runs", "--yes")
    with pytest.raises(SystemExit, match="no state 'finished'"):
        clean(root, "--remove=runs", "--state=finished", "--yes")
    for wrong in ("soon", "30", "0d", "-1d", "1e3", "nand"):
        with pytest.raises(SystemExit, match=f"--older_than={wrong}: expected a time above 0 with a unit"):
            clean(root, "--remove=runs", f"--older_than={wrong}", "--yes")
    with pytest.raises(SystemExit, match="'30' is none; an age has a unit"):
        clean(root, "--remove=runs", "--where=age>30", "--yes")
    assert len(listing.find(root).entries) == 4
    clean(root, "--remove=runs", "--state=interrupted,failed", "--older_than=45d", "--yes")
    assert [entry.name for entry in listing.find(root).entries] == ["killed", "new", "old"]
    clean(root, "--remove=runs", "--older_than=4w", "--yes")
    assert [entry.name for entry in listing.find(root).entries] == ["new"]


def test_links_are_not_followed_to_runs_to_checkpoints_or_inside_them(run, tmp_path, capsys):
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(run, elsewhere / "linked")
    shutil.copytree(run / "checkpoints", elsewhere / "checkpoints")
    (run.parent / "link").symlink_to(elsewhere / "linked")
    (run.parent / "loop").symlink_to(run.parent)
    (run / "checkpoints" / "4" / "inside").symlink_to(elsewhere / "checkpoints")
    (run / "checkpoints" / "8").symlink_to(elsewhere / "checkpoints" / "6")
    outside = run.parent / "outside"
    shutil.copytree(run, outside, symlinks=True)
    shutil.rmtree(outside / "checkpoints")
    (outside / "checkpoints").symlink_to(elsewhere / "checkpoints")
    before = files_below(elsewhere)
    clean(run.parent, "--keep=none", "--yes")
    out = capsys.readouterr().out
    assert f"{outside / 'checkpoints'} is a link, which is not followed" in out
    assert files_below(elsewhere) == before and sorted(os.listdir(run / "checkpoints")) == ["8"]
    clean(run.parent, "--remove=runs", "--where=state=*", "--yes")
    assert files_below(elsewhere) == before and sorted(os.listdir(run.parent)) == ["link", "loop"]


def test_what_killed_saves_and_deletions_have_left_goes(run, capsys):
    shutil.copytree(run / "checkpoints" / "4", run / "checkpoints" / "4.deleted")
    shutil.copytree(run / "checkpoints" / "4", run / "checkpoints" / "8.orbax-checkpoint-tmp")
    shutil.copytree(run, run.with_name(f"other{listing.REMOVED}"))
    (run.parent / "mine.deleted").mkdir()
    assert "`clean` deletes what is left" in "".join(listing.find(run.parent).notes)
    clean(run.parent, "--keep=best,last", "--yes")
    assert sorted(os.listdir(run.parent)) == ["mine.deleted", "run"]
    assert not [name for name in os.listdir(run / "checkpoints") if not name.isdecimal()]


def test_a_killed_deletion_never_leaves_a_half_under_the_name_of_a_run_or_a_step(run, monkeypatch):
    monkeypatch.setattr(shutil, "rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    entries = listing.find(run.parent).entries
    with pytest.raises(KeyboardInterrupt):
        cleaning.carry_out(cleaning.plan(entries, run.parent, "checkpoints", ["last"]), lambda _: None)
    assert steps(run) == [6] and len(checkpoint.unfinished(run)) == 2
    with pytest.raises(KeyboardInterrupt):
        cleaning.carry_out(cleaning.plan(entries, run.parent, "runs", ()), lambda _: None)
    assert os.listdir(run.parent) == [f"run{listing.REMOVED}"]


def test_checkpoints_that_cannot_be_read_stay_unless_all_go(run, capsys):
    (run / "checkpoints" / "4" / "_CHECKPOINT_METADATA").write_text("{")
    clean(run.parent, "--keep=last", "--yes")
    assert steps(run) == [4, 6] and "it stays" in capsys.readouterr().out
    (run / "checkpoints" / "6" / "_CHECKPOINT_METADATA").write_text("{")
    clean(run.parent, "--keep=last", "--yes")
    assert steps(run) == [4, 6] and "none of its checkpoints can be read" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--keep=best,none: expected best, last, or both"):
        clean(run.parent, "--keep=best,none", "--yes")
    clean(run.parent, "--keep=none", "--yes")
    assert steps(run) == []


@may_stop_orbax
def test_a_damaged_array_in_a_kept_step_keeps_all_others(run, capsys):
    """Its metadata is whole: only reading the arrays tells."""
    (data,) = sorted((run / "checkpoints" / "6" / "state" / "d").iterdir())[:1]
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 255
    data.write_bytes(content)
    for _ in range(2):
        with pytest.raises(SystemExit, match="1"):
            clean(run.parent, "--keep=last", "--yes")
        assert steps(run) == [2, 4, 6]
        assert f"Nothing of {run} was deleted" in capsys.readouterr().err
    clean(run.parent, "--keep=none", "--yes")
    assert steps(run) == []


def test_a_damaged_file_in_a_kept_step_keeps_all_others(run):
    (run / "checkpoints" / "6" / "tokenizer.model").write_bytes(b"no")
    with pytest.raises(SystemExit):
        clean(run.parent, "--keep=last", "--yes")
    assert steps(run) == [2, 4, 6]


FOREIGN = {
    "a list": ("config.json", "[1, 2]"),
    "an empty object": ("config.json", "{}"),
    "another program's config": ("config.json", '{"model": 1, "lr": 2}'),
    "another program's metrics": ("metrics.jsonl", '{"loss": 1}\n'),
    "another program's trials": ("trial.json", '{"config": {"lr": 2}}'),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_folder_that_is_not_known_to_be_a_run_stays(what, tmp_path, capsys):
    folder, (name, content) = tmp_path / "runs" / "mine", FOREIGN[what]
    write_run(tmp_path / "runs" / "run")
    folder.mkdir()
    (folder / name).write_text(content)
    (folder / "data.bin").write_bytes(b"work")
    clean(tmp_path / "runs", "--remove=runs", "--where=state=*", "--yes")
    out = capsys.readouterr()
    assert sorted(os.listdir(folder)) == sorted([name, "data.bin"]) and not (tmp_path / "runs" / "run").exists()
    assert "not known to be a run" in out.out or "not that of a run" in out.err


def test_a_trial_that_was_killed_before_it_had_a_config_is_known_to_be_a_run(tmp_path):
    folder = write_run(tmp_path / "runs" / "trial", is_done=False)
    config = json.loads((folder / "config.json").read_text())
    files.write_document(folder / "trial.json", {"arm": "a", "config": config})
    (folder / "config.json").unlink()
    clean(tmp_path / "runs", "--remove=runs", "--state=interrupted", "--yes")
    assert not folder.exists()


@pytest.mark.parametrize("inside", ["a run", "a lease"])
def test_a_run_with_runs_inside_stays(inside, tmp_path, capsys):
    outer = write_run(tmp_path / "runs" / "outer")
    inner = outer / "deep" / "inner"
    inner.mkdir(parents=True)
    removals = cleaning.plan(listing.find(tmp_path / "runs").entries, tmp_path / "runs", "runs", ())
    with lease.hold(inner) if inside == "a lease" else contextlib.nullcontext():
        if inside == "a run":
            (inner / "metrics.jsonl").write_text("")
        clean(tmp_path / "runs", "--remove=runs", "--state=done", "--yes")
        assert f"has runs inside: {inner}" in capsys.readouterr().out
        freed, wrong = cleaning.carry_out(removals, lambda _: None)  # it began after the plan
        assert freed == 0 and "has runs inside" in wrong[0] and inner.exists()


def test_keep_is_refused_where_whole_runs_go(tmp_path):
    run = write_run(tmp_path / "runs" / "run")
    for keep in ("best", "bset"):
        with pytest.raises(SystemExit, match="--keep names checkpoints that stay, but --remove=runs deletes whole"):
            clean(run.parent, "--remove=runs", "--state=done", f"--keep={keep}", "--yes")
    assert run.exists()


def test_a_best_that_there_is_not_is_said(run, monkeypatch, capsys):
    monkeypatch.setattr(details, "best_step", lambda _: None)
    clean(run.parent, "--keep=best,last", "--yes")
    assert steps(run) == [6] and "no checkpoint was evaluated: there is no best" in capsys.readouterr().out


def test_a_run_that_goes_on_after_its_end_was_lost_is_not_done(run, whole, monkeypatch):
    """The figures in its summary are of an end that it has yet to reach again."""
    toys.use_one_device(monkeypatch)
    shutil.rmtree(run / "checkpoints" / "6")
    monkeypatch.setattr(train.StepLog, "add", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train.train(trained_runs.recipe(whole.parent), run)
    assert run_state.look(run).state == "interrupted"
    monkeypatch.undo()
    toys.use_one_device(monkeypatch)
    assert train.train(trained_runs.recipe(whole.parent), run)["steps"] == 6
    assert run_state.look(run).state == "done"
