"""lm/tracking/saved_step.py: a run that has lost its checkpoints is refused, one that had none yet is not."""

import json

import pytest

from lm.checkpoint import CheckpointError
from lm.tracking import files, saved_step
from lm.tracking.files import RunFileError
from tests import toys
from tests.test_tracking_files import OLD, write


def check(workdir, *steps):
    said = []
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    try:
        saved_step.check(workdir, steps, said.append)
    finally:
        assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before
    return said


def test_a_run_that_was_stopped_before_its_first_checkpoint_starts_again(tmp_path):
    assert check(tmp_path / "new") == check(tmp_path) == []
    write(tmp_path)  # rows up to step 20
    (tmp_path / "checkpoints").mkdir()
    assert check(tmp_path) == []
    (tmp_path / "config.json").write_text(json.dumps({"checkpoint": {"every_steps": 10}}))
    assert check(tmp_path) == [], "the save of step 10 may not have been complete"


@pytest.mark.parametrize(
    ("made", "sign"),
    [
        ({"saved.json": None}, "saved.json, by which the checkpoint of step 1,000 was complete"),
        ({"saved.json": "{"}, r"saved.json \(.*/saved.json is damaged: .*\)"),
        ({"saved.json": '{"step": "5"}'}, r"saved.json \(.*/saved.json is damaged: .*\)"),
        ({"summary.json": "{"}, "summary.json"),
        # Of older versions, which wrote no saved.json.
        ({"checkpoints": None}, "no folder checkpoints/, which is made before the first row"),
        ({"config.json": '{"checkpoint": {"every_steps": 9}}'}, "a checkpoint every 9 steps"),
    ],
)
def test_a_run_that_has_lost_its_checkpoints_is_refused_and_left_as_it_is(tmp_path, made, sign):
    write(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    for name, content in made.items():
        if name == "checkpoints":
            (tmp_path / name).rmdir()
        elif content is None:
            saved_step.record(tmp_path, 1000)
        else:
            (tmp_path / name).write_text(content)
    match = (
        rf"^{tmp_path} has metrics up to step 20 and {sign}, but no checkpoint: .*Restore {tmp_path}/checkpoints; or"
    )
    with pytest.raises(CheckpointError, match=match):
        check(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    if not made.keys() & {"checkpoints", "config.json"}:  # there is no work to lose
        with pytest.raises(CheckpointError, match="has no metrics and "):
            check(tmp_path)


def test_a_line_says_so_where_the_newest_complete_checkpoint_is_gone(tmp_path):
    saved_step.record(tmp_path, 30)
    assert check(tmp_path, 10, 30) == check(tmp_path, 10, 40) == []
    assert check(tmp_path, 10, 20) == [f"{tmp_path}/checkpoints has lost step 30, which was complete; the newest is 20"]
    (tmp_path / "saved.json").write_text("x")
    (said,) = check(tmp_path, 10)
    assert "saved.json is damaged" in said and "written again" in said


def test_a_damaged_row_is_refused_before_a_run_resumes_unless_it_is_written_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{OLD}\n{OLD.replace('10', '20')}\nx\n")
    assert check(tmp_path, 10) == []
    with pytest.raises(RunFileError, match=r"metrics\.jsonl:3: "):
        check(tmp_path, 10, 20)
    (tmp_path / "samples.jsonl").write_text("x\n")
    with pytest.raises(RunFileError, match=r"samples\.jsonl:1: "):
        check(tmp_path, 10)


def test_the_record_survives_any_flipped_bit_or_is_known_to_be_damaged(tmp_path):
    saved_step.record(tmp_path, 400)
    path = tmp_path / "saved.json"
    content = path.read_bytes()
    assert saved_step.read(tmp_path) == 400 and json.loads(content)["step"] == 400
    for damaged in toys.flips(content):
        path.write_bytes(damaged)
        try:
            assert saved_step.read(tmp_path) == 400
        except files.RunFileError as error:
            assert "saved.json is damaged" in str(error)
