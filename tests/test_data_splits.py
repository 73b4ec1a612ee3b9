"""What is held out, what is shared with it, and the fingerprint of a source."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.data import splits
from lm.data.record import DataError
from tests.test_data_readers_text import TEXTS, contents, lines_of, read, write


def test_held_out_records_depend_on_content_alone(tmp_path):
    forward = read(write(tmp_path / "a.jsonl", lines_of(TEXTS)))
    backward = read(write(tmp_path / "b.jsonl", lines_of(TEXTS[::-1])))
    assert contents(forward.valid) == contents(backward.valid)[::-1]
    assert contents(forward.train) == contents(backward.train)[::-1]
    assert contents(forward.train) == [t for t in TEXTS if t in contents(forward.train)]  # the order of the file
    assert 60 < len(forward.valid) < 120
    more = read(write(tmp_path / "c.jsonl", lines_of([f"new {i}" for i in range(50)] + TEXTS)))
    assert set(contents(forward.valid)) < set(contents(more.valid))
    wider = read(tmp_path / "a.jsonl", eval_fraction=0.5)
    assert set(contents(forward.valid)) < set(contents(wider.valid))


@given(st.lists(st.sampled_from("abcdef"), min_size=1), st.floats(0.001, 0.999), st.randoms())
def test_the_same_content_is_never_on_both_sides_and_no_side_is_empty(texts, fraction, random):
    items = [{"text": text, "source": f"x:{i}"} for i, text in enumerate(texts)]
    if len(set(texts)) < 2:
        with pytest.raises(
            DataError, match=r"cannot hold records out: found .*, 1 distinct .by text.; expected two or more"
        ):
            splits.hold_out(items, fraction)
        return
    train, valid = splits.hold_out(items, fraction)
    assert train and valid
    assert not set(contents(train)) & set(contents(valid))
    assert sorted(contents(train) + contents(valid)) == sorted(texts)
    random.shuffle(items)
    assert set(contents(splits.hold_out(items, fraction)[1])) == set(contents(valid))


def test_eval_path_is_held_out_and_overlap_with_training_is_reported(tmp_path):
    train = write(tmp_path / "a.jsonl", lines_of(TEXTS[:9]))
    valid = write(tmp_path / "b.jsonl", lines_of(TEXTS[7:12]))
    split = read(train, eval_path=str(valid))
    assert (contents(split.train), contents(split.valid)) == (TEXTS[:9], TEXTS[7:12])
    assert "warning: 2 of 5 held-out records are trained on as well" in split.report
    with pytest.raises(DataError, match=f"{valid}: named by both data.path and data.eval_path"):
        read(tmp_path, eval_path=str(valid))
    whole = read(train, eval_fraction=0.0)
    assert (contents(whole.train), whole.valid) == (TEXTS[:9], [])
    bad = write(tmp_path / "bad.jsonl", b"{}")
    with pytest.raises(DataError, match="no valid record; expected at least one"):
        read(train, eval_path=str(bad), max_bad_records=100)


def test_max_records_cuts_train_only_and_smaller_cuts_are_subsets(tmp_path):
    path = write(tmp_path / "a.jsonl", lines_of(TEXTS))
    full, large, small = (read(path, max_records=n) for n in (0, 50, 20))
    assert [len(s.train) for s in (large, small)] == [50, 20]
    assert contents(full.valid) == contents(small.valid)
    assert set(contents(small.train)) < set(contents(large.train)) < set(contents(full.train))
    assert contents(small.train) == [t for t in TEXTS if t in contents(small.train)]
    assert f"max_records=20 of {len(full.train)}" in small.report
    backward = read(write(tmp_path / "b.jsonl", lines_of(TEXTS[::-1])), max_records=20)
    assert contents(backward.train) == contents(small.train)[::-1]
    assert read(path, max_records=1000).fingerprint == full.fingerprint


def test_fingerprint_depends_on_contents_and_order_but_not_on_path_or_compression(tmp_path):
    original = read(write(tmp_path / "a.jsonl", lines_of(TEXTS)))
    moved = read(write(tmp_path / "other" / "b.jsonl.gz", lines_of(TEXTS).replace(b"\n", b"\r\n")))
    assert original.fingerprint == moved.fingerprint
    for texts in (TEXTS[::-1], TEXTS[:-1], [*TEXTS[:-1], "other"]):
        changed = read(write(tmp_path / "c.jsonl", lines_of(texts)))
        assert original.fingerprint != changed.fingerprint
