"""lm/checkpoint/store.py: damaged steps are passed over, with a line, by every reader and by all processes together."""

import asyncio
import gc
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from lm import checkpoint, evaluator, param_paths, train
from lm import run as run_lib
from lm.checkpoint import CheckpointError
from lm.config import CheckpointConfig
from tests import toys
from tests.test_checkpoint_resume import run_of
from tests.test_checkpoint_store import assert_same, files_of, info, may_stop_orbax, save, small, steps
from tests.test_run import write_run

ROOT = Path(__file__).resolve().parents[1]
METADATA = "_CHECKPOINT_METADATA"
pytestmark = may_stop_orbax


def metadata(run: Path, step: int) -> Path:
    return run / "checkpoints" / str(step) / METADATA


def replace(path: Path, old: str, new: str) -> None:
    content = path.read_text()
    assert old in content
    path.write_text(content.replace(old, new, 1))


def of_orbax(old: str, new: str):
    return lambda run, step: replace(metadata(run, step), old, new)


DAMAGES = {
    "a key of Orbax": of_orbax('"commit_timestamp_nsecs"', '"commit_timestamp_nsecr"'),
    "a value of Orbax": of_orbax('"commit_timestamp_nsecs": ', '"commit_timestamp_nsecs": "late", "was": '),
    "a key of ours": of_orbax('"arrays"', '"arrayr"'),
    "its format": of_orbax('"format": 1', '"format": 3'),
    "nested too deeply": lambda run, step: metadata(run, step).write_text("[" * 100_000 + "]" * 100_000),
    "not an object": lambda run, step: metadata(run, step).write_text("[1]"),
    "not JSON": lambda run, step: metadata(run, step).write_bytes(b"\xff\x00"),
    "deleted": lambda run, step: metadata(run, step).unlink(),
    "another step's": lambda run, step: shutil.copy(metadata(run, 3), metadata(run, step)),
    "an array's name": lambda run, step: replace(run / f"checkpoints/{step}/state/_METADATA", '"a"', '"A"'),
    "all arrays": lambda run, step: replace(run / f"checkpoints/{step}/state/_METADATA", "tree_metadata", "tree"),
    "the arrays' index": lambda run, step: (run / f"checkpoints/{step}/state/manifest.ocdbt").write_bytes(b""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_one_damaged_step_is_passed_over_with_one_line_wherever_it_is(damage, tmp_path):
    """The newest, and an older one; the values of the others are right, and the run goes on saving."""
    save(tmp_path / "whole", {1: 3.0, 2: 1.0, 3: 2.0}, keep_latest=9)
    for broken, healthy in ((3, 2), (2, 3)):
        run = tmp_path / f"broken_{broken}"
        shutil.copytree(tmp_path / "whole", run)
        if (damage, broken) == ("another step's", 3):
            shutil.copy(metadata(run, 1), metadata(run, 3))
        else:
            DAMAGES[damage](run, broken)
        said = []
        state, _, _ = train.restore(run_of(small()[1]), checkpoint.list_saved(run), said.append)
        used = int(state["b"]["c"][0, 0])
        assert_same(state, small(used)[0])
        if broken == 2:
            assert used == 3 and len(said) == 1
        else:
            assert used == healthy
            assert f"checkpoints/{broken} " in said[0] and said[0].endswith("; going back to step 2")
            assert "\n" not in said[0] and len(said) == 2
        with checkpoint.Checkpoints(run, CheckpointConfig(keep_latest=9), resumed=used) as saves:
            saves.save(4, small(4)[0], info(), None)
        assert steps(run) == [1, 2, 3, 4]
        assert_same(checkpoint.load(checkpoint.choose(str(run)), small()[1]), small(4)[0])


def test_the_format_is_read_before_anything_else(tmp_path, monkeypatch):
    """A newer format may lack our keys, an older one our checksum."""
    for number, version in ((1, 1), (2, 0), (3, 2)):
        monkeypatch.setattr(checkpoint.store, "FORMAT", version)
        save(tmp_path, {number: None}, keep_latest=9)
    monkeypatch.undo()
    for number in (2, 3):
        replace(metadata(tmp_path, number), '"config"', '"settings"')
    said = []
    assert checkpoint.choose(str(tmp_path), said.append).step == 1
    assert said == [
        f"{tmp_path}/checkpoints/2 has format 0, this code reads 1; passed over for step 1",
        f"{tmp_path}/checkpoints/3 has format 2, this code reads 1; passed over for step 1",
    ]


def test_names_that_leave_the_step_open_pass_over_damage_and_a_named_step_does_not(tmp_path):
    save(tmp_path, {1: 3.0, 2: 1.0, 3: 2.0}, keep_latest=9)
    metadata(tmp_path, 3).write_text("{")
    metadata(tmp_path, 2).unlink()
    for name, passed in {"": 2, "@latest": 2, "@best": 2}.items():
        said = []
        assert checkpoint.choose(f"{tmp_path}{name}", said.append).step == 1
        assert len(said) == passed and all(line.endswith("; passed over for step 1") for line in said)
    for number in (2, 3):
        with pytest.raises(
            CheckpointError,
            match=rf"checkpoints/{number} is damaged: .*; use another step, or restore this one from a copy$",
        ):
            checkpoint.choose(f"{tmp_path}@{number}")
    metadata(tmp_path, 1).write_text("")
    with pytest.raises(CheckpointError, match=r"none of the 3 checkpoints in .* can be read: .*/3 is damaged"):
        checkpoint.choose(str(tmp_path))


def test_a_step_is_listed_once_it_is_committed(tmp_path):
    """Where folders are not renamed, a step that is being written has its name already."""
    save(tmp_path, {1: None, 2: None})
    (tmp_path / "checkpoints/2/commit_success.txt").unlink()
    assert steps(tmp_path) == [1, 2], "its metadata still tells that it was committed"
    replace(metadata(tmp_path, 2), '"commit_timestamp_nsecs": ', '"commit_timestamp_nsecs": null, "was": ')
    (tmp_path / "checkpoints/3").mkdir()
    for other in ("007", "4.orbax-checkpoint-tmp", "x", "٣"):
        shutil.copytree(tmp_path / "checkpoints/1", tmp_path / "checkpoints" / other)
    (tmp_path / "checkpoints/5").write_text("a file")
    assert steps(tmp_path) == [1]


def damage_arrays(run: Path, step: int) -> None:
    (run / f"checkpoints/{step}/state/manifest.ocdbt").write_bytes(b"")


def test_a_run_that_is_loaded_goes_back_past_damaged_arrays(tmp_path, capsys):
    """They are found out only when they are read; by the best metric, by the newest step, and from `init_from`."""
    cfg, states = write_run(tmp_path / "run", {1: 0.1, 2: 0.3, 3: 0.2})  # by loss: the best is 1, then 3
    run = str(tmp_path / "run")
    for number in (1, 3):
        damage_arrays(tmp_path / "run", number)
    for name, passed, used in (("", [3], 2), ("@latest", [3], 2), ("@best", [1, 3], 2)):
        saved, (_, _, params, _) = run_lib.load_checkpoint(run + name)
        assert saved.step == used
        for path, leaf in param_paths.flatten(params).items():
            assert jnp.array_equal(leaf, param_paths.flatten(states[used])[path])
        lines = capsys.readouterr().err.splitlines()
        assert [line.split()[0] for line in lines] == [f"{run}/checkpoints/{number}" for number in passed]
        assert lines[-1].endswith("; going back to step 2")
    with pytest.raises(CheckpointError, match=r"checkpoints/3 cannot be read: .*; use another step"):
        run_lib.load_model(f"{run}@3")
    _, _, params = run_lib.init_model(run_lib.dataclasses.replace(cfg, init_from=run))
    assert_same(params, states[2])
    damage_arrays(tmp_path / "run", 2)
    with pytest.raises(CheckpointError, match=r"none of the 3 checkpoints in .* can be read"):
        run_lib.load_model(run)


def test_the_best_state_is_the_next_best_where_the_best_cannot_be_read(tmp_path):
    save(tmp_path, {1: 3.0, 2: 1.0, 3: 2.0}, keep_latest=9)
    damage_arrays(tmp_path, 2)
    run, said = run_of(small()[1]), []
    run.cfg = run_lib.dataclasses.replace(run_lib.Config(), checkpoint=CheckpointConfig())
    step, state = evaluator.best_state(run, tmp_path, 1, small(1)[0], said.append)
    assert step == 3 and len(said) == 1
    assert_same(state, small(3)[0])


def test_nothing_but_one_line_is_printed_for_damaged_arrays(tmp_path, monkeypatch, capfd, caplog):
    """Orbax reads all arrays at once; asyncio would print a traceback for each failure that nobody has waited for."""
    save(tmp_path, {1: None, 2: None})
    from orbax.checkpoint import v1 as ocp

    original = ocp.load_checkpointables

    async def fail():
        raise ValueError("damaged")

    async def read_all():
        tasks = [asyncio.ensure_future(fail()) for _ in range(3)]
        await asyncio.wait(tasks)
        raise ValueError("the first one") from tasks[0].exception()

    def load(path, abstract):
        return asyncio.run(read_all()) if path.name == "2" else original(path, abstract)

    monkeypatch.setattr(ocp, "load_checkpointables", load)
    abstract = small()[1]
    saved = checkpoint.list_saved(tmp_path)[::-1]
    used, _ = checkpoint.first_readable(saved, lambda each: checkpoint.load(each, abstract))
    gc.collect()
    printed = capfd.readouterr()
    assert used.step == 1 and not caplog.records
    assert (printed.out + printed.err).splitlines() == [
        f"{tmp_path}/checkpoints/2 cannot be read: ValueError: damaged; going back to step 1"
    ]


PROCESS = """
import sys, json, jax, jax.numpy as jnp
from lm.parallel import mesh
port, me, *workdirs = sys.argv[1:]
mesh.initialize_processes(f"127.0.0.1:{port}", 2, int(me))
from lm import checkpoint, train
from tests.test_checkpoint_resume import run_of
devices = jax.sharding.Mesh(jax.devices(), ("data",))
halves, whole = (jax.NamedSharding(devices, jax.P(*axes)) for axes in (("data",), ()))
abstract = {
    "a": jax.ShapeDtypeStruct((1000,), jnp.float32, sharding=halves),
    "b": {"c": jax.ShapeDtypeStruct((3, 4), jnp.bfloat16, sharding=whole)},
}
for workdir in workdirs:
    said = []
    try:
        state, position, _ = train.restore(run_of(abstract), checkpoint.list_saved(workdir), said.append)
        mine = state["a"].addressable_shards[0].data.tolist()
        step = int(state["b"]["c"].addressable_shards[0].data[0, 0])
        assert mine == [step + 500 * int(me) + i for i in range(500)], mine
        print("FOUND", json.dumps([step, said]))
    except checkpoint.CheckpointError as error:
        print("FOUND", json.dumps([str(error), said]))
"""


@pytest.mark.slow
def test_two_processes_go_back_to_the_same_step_whichever_of_them_sees_the_damage(tmp_path):
    """Each has its own copy of a run, and each says why it went back; none waits for one that has failed."""
    save(tmp_path / "whole", {2: None, 4: None})
    cases = ("none", "metadata", "arrays", "values", "a step", "both", "all steps")
    folders = {(case, me): tmp_path / f"{case.replace(' ', '_')}_{me}" for case in cases for me in (0, 1)}
    for folder in folders.values():
        shutil.copytree(tmp_path / "whole", folder)
    metadata(folders["metadata", 0], 4).write_text("{")
    damage_arrays(folders["arrays", 1], 4)
    largest = max(files_of(checkpoint.choose(str(folders["values", 1]))), key=lambda path: path.stat().st_size)
    largest.write_bytes(toys.flip(largest.read_bytes(), 8 * 200))
    shutil.rmtree(folders["a step", 0] / "checkpoints/4")
    metadata(folders["both", 0], 4).write_text("{")
    damage_arrays(folders["both", 1], 4)
    damage_arrays(folders["all steps", 0], 4)
    metadata(folders["all steps", 1], 2).write_text("{")

    port = toys.free_port()
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(port), str(me), *(str(folders[case, me]) for case in cases)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for me in (0, 1)
    ]
    try:
        outputs = [process.communicate(timeout=300) for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], outputs
    found = []
    for out, _ in outputs:
        told = [json.loads(line.removeprefix("FOUND")) for line in out.splitlines() if line.startswith("FOUND")]
        found.append(dict(zip(cases, told, strict=True)))
    for case in cases:
        (result, said), (its_result, its_said) = (each[case] for each in found)
        if case == "all steps":
            assert all("none of the 2 checkpoints" in text for text in (result, its_result))
            continue
        assert result == its_result == (4 if case == "none" else 2), case
        for lines in (said, its_said):
            reasons = [line for line in lines if "going back to step 2" in line]
            assert len(reasons) == (case != "none") and len(lines) == 1 + len(reasons), (case, lines)
    assert found[0]["arrays"][1][0].startswith(f"process 1: {folders['arrays', 1]}/checkpoints/4 cannot be read: ")
    assert "is not there (process 0)" in found[1]["a step"][1][0]
