"""lm/tracking/files.py: damage is seen and named by file and line, rows are cut where a resumed run goes on."""

import errno
import json
import os
import shutil
import zlib

import pytest

from lm.tracking import files
from lm.tracking.files import RunFileError
from tests import toys


def metrics_row(step, split="train", **values):
    return {"step": step, "split": split, "seconds": step / 2, **(values or {"loss": 1 / 3})}


def sample_row(step):
    return {"step": step, "name": 'say "crc32": "', "text": f'{{"step": {step}}}\n, "crc32": "00000000"}}'}


ROWS = {
    "metrics.jsonl": [metrics_row(0, "eval"), metrics_row(10, loss=None, f1=1e-30), metrics_row(20)],
    "samples.jsonl": [sample_row(0), sample_row(10)],
}


def write(folder, name="metrics.jsonl", rows=None):
    """A file of rows as a run writes it; its path."""
    file = files.RowFile(folder / name)
    for row in ROWS[name] if rows is None else rows:
        file.append(row)
    file.close()
    return folder / name


def checksum(text):
    before = text.rpartition(b'"crc32"')[0]
    return f"{zlib.crc32(before):08x}"


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_read_as_they_were_written_and_checked_by_any_tool(tmp_path, name):
    path = write(tmp_path, name)
    assert list(files.read_rows(path)) == ROWS[name]
    for line, row in zip(path.read_bytes().splitlines(), ROWS[name], strict=True):
        assert json.loads(line) == row | {"crc32": checksum(line)}


@pytest.mark.parametrize("name", ROWS)
def test_every_flipped_bit_of_a_row_is_seen_and_the_line_named(tmp_path, name):
    path = write(tmp_path, name)
    content = path.read_bytes()
    for place, damaged in enumerate(toys.flips(content)):
        path.write_bytes(damaged)
        number = next(i for i, (was, now) in enumerate(zip(content, damaged, strict=True)) if was != now)
        line = content[:number].count(b"\n") + 1
        with pytest.raises(RunFileError, match=rf"{name}:{line}: expected .* found .*then start again$") as error:
            files.kept_rows(path, start_step=20) if place % 2 else list(files.read_rows(path))
        assert "\n" not in str(error.value)


def test_every_flipped_bit_of_a_document_is_seen(tmp_path):
    path, content = tmp_path / "summary.json", {"loss": 1 / 3, "best": {"step": 20}, "versions": {"lm": "1"}}
    files.write_document(path, content)
    assert files.read_document(path) == content
    text = path.read_bytes()
    assert json.loads(text) == content | {"crc32": checksum(text)}
    for damaged in toys.flips(text):
        path.write_bytes(damaged)
        try:
            assert files.read_document(path) == content  # only white space after the checksum has changed
        except RunFileError as error:
            assert str(path) in str(error)
        else:
            assert damaged.split() == text.split() or damaged[:-2] == text[:-2]


OLD = '{"step": 10, "split": "train", "seconds": 1.5, "loss": 2.0}'  # as older versions wrote them


@pytest.mark.parametrize(
    "bad",
    [
        "{oops",
        "[1]",
        "",
        '{"loss": 1}',
        '{"step": 10, "split": "train"}',
        OLD.replace("10", "true"),
        OLD.replace("10", '"10"'),
        OLD.replace("10", "10.0"),
        OLD.replace("10", "-1"),
        OLD.replace("10", "9" * 30),
        OLD.replace("10", "9" * 5000),
        OLD.replace('"train"', "null"),
        OLD.replace("1.5", '"1.5"'),
        OLD.replace("1.5", "NaN"),
        OLD.replace("2.0", "true"),
        OLD.replace("2.0", '"2.0"'),
        OLD.replace("2.0", "[2.0]"),
        OLD.replace("2.0", "Infinity"),
        OLD.replace("2.0", "1e999"),
        OLD.replace("2.0", "9" * 400),
        OLD.replace("2.0", "[" * 100_000),
        OLD.replace("2.0", '{"a":' * 100_000),
        "\0" * 50,
        OLD.replace("2.0", "\0"),
        OLD[:20],
        "\N{LATIN SMALL LETTER E WITH ACUTE}",
    ],
)
def test_a_damaged_line_is_refused_by_number_and_nothing_is_dropped(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{OLD}\n{bad}\n{OLD}\n", encoding="latin-1")
    content = path.read_bytes()
    for read in (lambda: list(files.read_rows(path)), lambda: files.rewind(path, 10)):
        with pytest.raises(
            RunFileError, match=r"metrics\.jsonl:2: expected a JSON object with step, split, seconds"
        ) as e:
            read()
        assert len(str(e.value)) < 600 and "\n" not in str(e.value)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "bad",
    ['{"step": 1, "name": "a"}', '{"step": 1, "name": "a", "text": 2}', '{"step": 1, "name": "", "text": "", "x": 1}'],
)
def test_damaged_samples_are_refused_by_number(tmp_path, bad):
    path = tmp_path / "samples.jsonl"
    path.write_text(f"{bad}\n")
    with pytest.raises(RunFileError, match=r"samples\.jsonl:1: expected a JSON object with step, name, text"):
        list(files.read_rows(path))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "3", "\0" * 9, '{"a":' * 100_000, '{"a":' * 30 + "1" + "}" * 30]
)
def test_a_damaged_document_is_refused(tmp_path, text):
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(RunFileError, match=r"summary\.json is damaged: expected a JSON object, found"):
        files.read_document(tmp_path / "summary.json")


def test_what_older_versions_wrote_is_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{OLD}\n")
    write(tmp_path, rows=[metrics_row(20)])  # a newer version goes on
    assert list(files.read_rows(path)) == [json.loads(OLD), metrics_row(20)]
    (tmp_path / "summary.json").write_text('{"loss": 1}')
    assert files.read_document(tmp_path / "summary.json") == {"loss": 1}
    assert files.read_document(tmp_path / "none.json") == {} and not list(files.read_rows(tmp_path / "metrics" / "no"))


def test_rows_are_cut_before_the_first_that_is_written_again(tmp_path):
    rows = [metrics_row(0, "eval"), metrics_row(10), metrics_row(10, "eval"), metrics_row(20), metrics_row(20, "eval")]
    rows += [metrics_row(10, "test")]

    def left(start_step, is_over=False):
        (tmp_path / "metrics.jsonl").unlink(missing_ok=True)
        last, _ = files.rewind(write(tmp_path, rows=rows), start_step, is_over)
        found = list(files.read_rows(tmp_path / "metrics.jsonl"))
        assert found == rows[: len(found)] and last == (found[-1] if found else {})
        return len(found)

    assert left(0) == 0  # nothing was restored
    assert left(10) == 3 and left(19) == 3
    assert left(20) == 5  # the test is done at the end of each run
    assert left(20, is_over=True) == 4  # so is the last evaluation, where no step is left
    assert left(30) == 5
    samples = write(tmp_path, "samples.jsonl")
    assert files.rewind(samples, 10) == (sample_row(10), "")
    assert files.rewind(samples, 10, is_over=True)[0] == sample_row(0)


def test_damage_after_the_cut_does_not_matter_as_those_rows_are_written_again(tmp_path):
    path = write(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content + b"{damaged\n" + content[:30])
    message = "metrics.jsonl: dropped 2 rows that are written again after step 10 and repaired an incomplete last line"
    assert files.rewind(path, 10) == (ROWS["metrics.jsonl"][1], message)
    assert content.startswith(path.read_bytes()) and list(files.read_rows(path)) == ROWS["metrics.jsonl"][:2]


@pytest.mark.parametrize("rest", range(1, 60, 7))
def test_a_line_cut_off_by_a_kill_is_left_out_and_then_repaired(tmp_path, rest):
    path = write(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-rest])
    assert list(files.read_rows(path)) == ROWS["metrics.jsonl"][: 3 if rest == 1 else 2]
    _, message = files.rewind(path, 20)
    assert message == "metrics.jsonl: repaired an incomplete last line"
    write(tmp_path, rows=[metrics_row(30)])
    assert [row["step"] for row in files.read_rows(path)] == ([0, 10, 20, 30] if rest == 1 else [0, 10, 30])


def test_lines_without_an_end_take_bounded_memory(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with path.open("wb") as file:
        file.truncate(10 * files.MAX_LINE)  # NULs
    with pytest.raises(RunFileError, match=r"metrics\.jsonl:1: a line of 16,777,216 bytes or more"):
        list(files.read_rows(path))


def test_a_full_disk_is_named_with_file_and_reason(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(RunFileError, match=r"^writing .*/metrics\.jsonl failed: No space left on device; free disk sp"):
        files.RowFile(tmp_path / "metrics.jsonl").append(metrics_row(1))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_document_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch, code):
    path = tmp_path / "summary.json"
    files.write_atomic(path, "old")

    def fail(_):
        assert path.read_text() == "old"  # the new text is written to another file first
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RunFileError, match=rf"^writing {path} failed: {os.strerror(code)}"):
        files.write_atomic(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["summary.json"]


def test_a_row_for_a_file_that_was_deleted_or_replaced_is_an_error(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    rows = files.RowFile(folder / "metrics.jsonl")
    rows.append(metrics_row(1))
    shutil.rmtree(folder)
    for call in (lambda: rows.append(metrics_row(2)), rows.sync):
        with pytest.raises(
            RunFileError, match=r"metrics\.jsonl failed: No such file .*; the folder was deleted or move"
        ):
            call()
    folder.mkdir()
    write(folder)
    with pytest.raises(RunFileError, match="it was replaced by another file"):
        rows.append(metrics_row(3))
    assert list(files.read_rows(folder / "metrics.jsonl")) == ROWS["metrics.jsonl"]


@pytest.mark.parametrize(("name", "other"), [("metrics.jsonl", "samples.jsonl"), ("samples.jsonl", "metrics.jsonl")])
def test_intact_rows_of_another_file_are_refused_by_number(tmp_path, name, other):
    path = write(tmp_path, name)
    path.write_bytes(path.read_bytes() + write(tmp_path, other, [ROWS[other][0]]).read_bytes())
    number = len(ROWS[name]) + 1
    with pytest.raises(RunFileError, match=rf"{name}:{number}: expected"):
        list(files.read_rows(path))
    with pytest.raises(RunFileError, match=rf"{name}:{number}: expected"):
        files.rewind(path, 100)


def test_evaluations_are_read_alone_and_the_last_row_of_all(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    assert files.read_evaluations(path) == ([], {})
    rows = [
        {"step": step, "split": split, "seconds": 1.0, "loss": 2.0}
        for step in range(300)
        for split in (("train", "eval") if step % 10 == 0 else ("train",))
    ]
    path.write_bytes(b"".join(files.sealed(row) for row in rows))
    expected = [row for row in rows if row["split"] == "eval"]
    for block in (2**24, 1000, 150):  # lines are cut by the ends of blocks
        monkeypatch.setattr(files, "MAX_LINE", block)
        assert files.read_evaluations(path) == (expected, rows[-1])
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 300, "split": "eval", "seco')
    assert files.read_evaluations(path) == (expected, rows[-1])
    path.write_bytes(whole + files.sealed({**rows[-1], "split": "eval"})[:-1])  # only its newline is missing
    assert files.read_evaluations(path) == ([*expected, {**rows[-1], "split": "eval"}], {**rows[-1], "split": "eval"})
    path.write_bytes(whole.replace(b'{"step": 20, "split": "eval"', b'{"step": 21, "split": "eval"'))
    with pytest.raises(RunFileError, match=r"metrics\.jsonl:24: expected .*its checksum does not match"):
        files.read_evaluations(path)
    path.write_bytes(whole + b"x" * 2000)
    monkeypatch.setattr(files, "MAX_LINE", 1000)
    with pytest.raises(RunFileError, match="a line of 1,000 bytes or more"):
        files.read_evaluations(path)
