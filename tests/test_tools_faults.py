"""tools/faults.py: damages are what they are called, each failure is told, and a damaged run is read rightly."""

import json
import random
import sys

import pytest

from lm.checkpoint import CheckpointError
from tests import tool_modules
from tests.test_checkpoint_store import may_stop_orbax

faults = tool_modules.load("faults")
Damage = faults.Damage


@pytest.fixture
def files(tmp_path):
    """The files of a run with two steps, that no model reads."""
    for step in (2, 4):
        (tmp_path / f"checkpoints/{step}").mkdir(parents=True)
        (tmp_path / f"checkpoints/{step}/data").write_bytes(bytes(range(step, 200)))
        (tmp_path / f"checkpoints/{step}/about").write_text(json.dumps({"a": {"b": 1.5}, "c": [{"d": "x"}]}))
    (tmp_path / "rows").write_text('{"step": 1}\n{"step": 2}\n')
    return tmp_path


def test_each_damage_changes_the_file_as_its_name_says(files):
    data, other = files / "checkpoints/4/data", files / "checkpoints/2/data"
    whole, its_twin = data.read_bytes(), other.read_bytes()

    def damaged(kind: str, place: float = 0.5, twin: str = "") -> bytes | None:
        data.write_bytes(whole)
        faults.apply(files, Damage(kind, "checkpoints/4/data", place, twin))
        return data.read_bytes() if data.exists() else None

    flips = {damaged("flip", place / 100) for place in range(100)}
    assert all(sum((a ^ b).bit_count() for a, b in zip(whole, new, strict=True)) == 1 for new in flips)
    assert len(flips) == 100
    half = len(whole) // 2
    assert damaged("zero") == whole[:half] + bytes(64) + whole[half + 64 :]
    assert damaged("truncate") == whole[:half]
    assert damaged("delete") is None
    assert damaged("swap", twin="checkpoints/2/data") == its_twin and other.read_bytes() == whole


def test_each_key_of_each_json_file_is_changed_in_turn(files):
    damages = faults.key_damages(files)
    assert [damage.file for damage in damages].count("checkpoints/2/about") == 4, "a, b, c, d"
    assert [damage.file for damage in damages].count("rows") == 2 and not any("data" in d.file for d in damages)
    assert {damage.kind for damage in damages} == set(faults.KEY_KINDS)
    path = files / "checkpoints/2/about"
    whole = path.read_text()
    found = set()
    for number in range(4):
        for kind in faults.KEY_KINDS:
            path.write_text(whole)
            faults.apply(files, Damage(kind, "checkpoints/2/about", number))
            assert path.read_text() not in found
            found.add(path.read_text())
            if kind == "nest":
                with pytest.raises(RecursionError):
                    json.loads(path.read_text())
            else:
                json.loads(path.read_text())
    assert json.dumps({"a": {"b": 2.5}, "c": [{"d": "x"}]}) in found
    assert json.dumps({"a": {"b": 1.5}, "c": [{"e": "x"}]}) in found


def test_random_damages_reach_every_file_and_are_the_same_again(files):
    damages = faults.random_damages(files, 300, random.Random(0))
    assert damages == faults.random_damages(files, 300, random.Random(0))
    assert {damage.kind for damage in damages} == set(faults.KINDS)
    assert {damage.file for damage in damages} == {
        "rows",
        *(f"checkpoints/{s}/{f}" for s in (2, 4) for f in ("about", "data")),
    }
    assert {damage.other for damage in damages if damage.file == "checkpoints/2/data"} <= {"", "checkpoints/4/data"}


def reader(act):
    return faults.Reader(act, {4: "four", 2: "two"})


def raising(error: Exception):
    def act(_):
        raise error

    return act


def going_back(line: str):
    def act(_):
        print(line, file=sys.stderr)
        return "two"

    return act


@pytest.mark.parametrize(
    ("act", "newest", "older", "of_run"),
    [
        (lambda _: "four", "unharmed", "unharmed", "unharmed"),
        (going_back("/run/checkpoints/4 is damaged"), "passed over", *["healthy step not found"] * 2),
        (going_back("something else"), "silent", *["healthy step not found"] * 2),
        (lambda _: "five", *["wrong values"] * 3),
        (raising(CheckpointError("none can be read")), *["healthy step not found"] * 2, "refused"),
        (raising(KeyError("config")), *["traceback"] * 3),
    ],
)
def test_each_way_to_go_wrong_is_told(act, newest, older, of_run, tmp_path):
    for file, verdict in (("checkpoints/4/x", newest), ("checkpoints/2/x", older), ("tokenizer.model", of_run)):
        assert faults.judge(reader(act), tmp_path, Damage("flip", file, 0.5))[0] == verdict
    both = Damage("swap", "checkpoints/4/x", 0.5, "checkpoints/2/x")
    assert faults.judge(reader(raising(CheckpointError("none can be read"))), tmp_path, both)[0] == "refused"


@pytest.mark.slow
@may_stop_orbax
def test_no_damage_of_a_step_loses_another_one_or_gives_a_wrong_value(tmp_path):
    """The short form of the command, which applies thousands."""
    run = faults.make_run(tmp_path)
    rng = random.Random(0)
    damages = [*faults.random_damages(run, 15, rng), *rng.sample(faults.key_damages(run), 15)]
    counts, failures = faults.measure(run, damages, tmp_path)
    assert failures == []
    assert "lm.main" in faults.table(counts)
    assert sum(found["passed over"] for found in counts.values()) > 10
