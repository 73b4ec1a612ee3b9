"""lm/checkpoint/store.py: checkpoints are restored bitwise on any mesh; damage never goes unnoticed."""

import dataclasses
import functools
import json
import random
import resource
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm import checkpoint, optim, param_paths, step
from lm.checkpoint import CheckpointError, store
from lm.config import CheckpointConfig, Config, MeshConfig, OptimConfig, schema
from lm.parallel import sharding
from lm.parallel.mesh import make_mesh
from lm.types import TrainState
from tests import toys

# What Orbax leaves behind when it fails at a damaged file or a full disk.
may_stop_orbax = pytest.mark.filterwarnings(
    "ignore:coroutine:RuntimeWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
pytestmark = may_stop_orbax

AXES = {
    "decoder/layers/mlp/up/kernel": ("layers", "embed", "mlp"),
    "decoder/layers/mlp_norm/scale": ("layers", None),
    "embed/embedding": ("vocab", "embed"),
}
SHAPES = {
    "decoder/layers/mlp/up/kernel": (2, 128, 144),  # large enough for Adafactor to factor
    "decoder/layers/mlp_norm/scale": (2, 128),
    "embed/embedding": (128, 128),
}
ABSTRACT = param_paths.unflatten({path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in SHAPES.items()})
MESHES = {
    8: MeshConfig(data=2, fsdp=2, tensor=2),
    4: MeshConfig(data=1, fsdp=4),
    1: MeshConfig(data=1),
}


def abstract_state(name: str, *, use_ema: bool, devices: int) -> TrainState:
    """The state of an optimizer, sharded as in `lm.run`, on some of the fake devices."""
    mesh = make_mesh(MESHES[devices], jax.devices()[:devices])
    optimizer = optim.build(
        OptimConfig(name=name, schedule="constant"), ABSTRACT, total_steps=1, warmup_steps=0, decay_steps=0
    )
    specs = param_paths.unflatten({path: sharding.spec(axes) for path, axes in AXES.items()})
    shapes = jax.eval_shape(functools.partial(step.init_state, optimizer=optimizer, use_ema=use_ema), ABSTRACT)
    where = TrainState(
        step=jax.P(),
        params=specs,
        opt_state=optim.state_specs(optimizer, ABSTRACT, specs),
        ema=specs if use_ema else None,
        skipped=jax.P(),
    )
    where = jax.tree.map(lambda spec: jax.NamedSharding(mesh, spec), where, is_leaf=lambda x: isinstance(x, jax.P))
    return jax.tree.map(lambda a, w: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=w), shapes, where)


def filled(abstract, seed: int = 0):
    """Random arrays on the devices of the abstract state."""
    rng = np.random.default_rng(seed)

    def make(leaf):
        value = rng.integers(0, 1000, leaf.shape) if leaf.dtype == jnp.int32 else rng.normal(size=leaf.shape)
        return jax.device_put(value.astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(make, abstract)


def assert_same(got, want) -> None:
    """Same structure, dtypes and bits."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


def small(value: float = 0.0):
    """A state of two arrays, and its abstract form."""
    state = {"a": jnp.arange(1000, dtype=jnp.float32) + value, "b": {"c": jnp.full((3, 4), value, jnp.bfloat16)}}
    return state, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def info(**changes):
    """The JSON that a run saves beside the arrays."""
    cfg = dataclasses.replace(Config(), checkpoint=CheckpointConfig(**changes))
    return {"config": schema.to_dict(cfg), "tokenizer_hash": "abc", "data": {"example": 8, "fingerprint": "f"}}


def save(workdir, metrics: dict[int, float | None], name: str = "loss", **changes) -> None:
    """A small checkpoint for each step, with the step as the value of its arrays."""
    with checkpoint.Checkpoints(workdir, CheckpointConfig(**changes)) as saves:
        for number, value in metrics.items():
            saves.save(number, small(number)[0], info(**changes), None if value is None else {name: value})


def steps(workdir) -> list[int]:
    return [saved.step for saved in checkpoint.list_saved(workdir)]


@pytest.mark.parametrize(("name", "use_ema"), [("adamw", False), ("adafactor", True), ("muon", True)])
def test_a_state_moves_from_8_to_4_to_1_devices_bitwise(name, use_ema, tmp_path):
    original = state = filled(abstract_state(name, use_ema=use_ema, devices=8))
    assert len(jax.tree.leaves(state.opt_state)) > 3
    for number, devices in enumerate((4, 1)):
        with checkpoint.Checkpoints(tmp_path / str(devices), CheckpointConfig()) as saves:
            saves.save(number, state, info(), None)
        wanted = abstract_state(name, use_ema=use_ema, devices=devices)
        state = checkpoint.load(checkpoint.choose(str(tmp_path / str(devices))), wanted)
        assert_same(state, original)
        assert (state.ema is None) != use_ema
        jax.tree.map(lambda leaf, want: None if leaf.sharding == want.sharding else pytest.fail(), state, wanted)


def test_a_part_of_a_state_can_be_read_by_itself(tmp_path):
    save(tmp_path, {3: None})
    state, abstract = small(3)
    got = checkpoint.load(checkpoint.choose(str(tmp_path)), {"b": abstract["b"]})
    assert_same(got, {"b": state["b"]})


def test_a_save_is_not_affected_when_the_next_step_donates_the_state(tmp_path):
    state = {"a": jnp.arange(3_000_000, dtype=jnp.float32)}
    abstract = {"a": jax.ShapeDtypeStruct((3_000_000,), jnp.float32, sharding=state["a"].sharding)}
    next_step = jax.jit(lambda s: {"a": s["a"] * 0}, donate_argnums=0)
    with checkpoint.Checkpoints(tmp_path, CheckpointConfig()) as saves:
        saves.save(1, state, info(), None)
        state = next_step(state)
        state["a"].block_until_ready()
    got = checkpoint.load(checkpoint.choose(str(tmp_path)), abstract)
    assert np.array_equal(got["a"], np.arange(3_000_000, dtype=np.float32))


@given(
    st.sampled_from([np.float32, ml_dtypes.bfloat16, np.int32]),
    st.integers(0, 14),
    st.integers(0, 31),
    st.integers(0, 9),
)
def test_any_flipped_bit_changes_the_fingerprint(dtype, element, bit, seed):
    before = np.random.default_rng(seed).normal(scale=100, size=(3, 5)).astype(dtype)
    after = before.copy()
    unsigned = {2: np.uint16, 4: np.uint32}[after.itemsize]
    after.reshape(-1).view(unsigned)[element] ^= unsigned(1 << bit % (8 * after.itemsize))
    assert fingerprint(before) != fingerprint(after)


def fingerprint(x) -> int:
    return int(FINGERPRINTS({"x": jnp.asarray(x)})["x"])


FINGERPRINTS = checkpoint.fingerprints


def plain_fingerprint(x: np.ndarray) -> int:
    """The definition, in numpy: the sum of mix(bits ^ mix(position))."""

    def mix(h):
        h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
        h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
        return h ^ (h >> 16)

    bits = x.reshape(-1).view({1: np.uint8, 2: np.uint16, 4: np.uint32}[x.itemsize]).astype(np.uint32)
    return int(np.sum(mix(bits ^ mix(np.arange(x.size, dtype=np.uint32))), dtype=np.uint32))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((), np.float32),
        ((3, 5), ml_dtypes.bfloat16),
        ((1 << 20,), np.float32),
        ((1 << 20 | 5,), np.int32),
        ((3, 5, 70_001), np.float32),
        ((1025, 1031), ml_dtypes.bfloat16),
        ((1025, 1031), np.int8),
        ((1025, 1031), bool),
    ],
)
def test_the_fingerprint_of_small_and_large_arrays_is_as_defined(shape, dtype):
    x = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    assert fingerprint(x) == plain_fingerprint(x)
    traced = jax.jit(checkpoint.fingerprints)({"x": jnp.asarray(x)})
    assert int(traced["x"]) == plain_fingerprint(x)


def test_the_fingerprint_detects_zeros_swaps_and_positions():
    """A lost chunk is read as zeros, and must not pass for the ones of a newly initialised scale."""
    ones, zeros = np.ones((2, 128), np.float32), np.zeros((2, 128), np.float32)
    half = ones.copy()
    half[1] = 0
    swapped = np.arange(256, dtype=np.float32).reshape(2, 128)
    rows = swapped[::-1].copy()
    found = [fingerprint(x) for x in (ones, zeros, half, half[::-1].copy(), swapped, rows, -zeros)]
    assert len(set(found)) == len(found)
    square = swapped.reshape(16, 16)
    assert fingerprint(square) != fingerprint(square.T.copy())


def test_the_fingerprint_does_not_depend_on_the_sharding():
    one, eight = (filled(abstract_state("adamw", use_ema=False, devices=devices)) for devices in (1, 8))
    first, second = (jax.device_get(FINGERPRINTS(state)) for state in (one, eight))
    assert first == second
    assert len({int(value) for value in first.values()}) == len(first), "and differs from leaf to leaf"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("shape", "position"), [((7,), 3), ((1025, 1031), 0), ((1025, 1031), 1025 * 1031 - 1)])
def test_a_state_that_is_not_finite_is_refused_by_name_and_nothing_is_deleted_for_it(
    value, dtype, shape, position, tmp_path
):
    good = np.ones(shape, dtype)
    bad = good.copy()
    bad.reshape(-1)[position] = value
    rest = {"params": {"a": jnp.arange(5)}, "skipped": jnp.int32(2**31 - 1)}
    with checkpoint.Checkpoints(tmp_path, CheckpointConfig(keep_latest=1)) as saves:
        with pytest.raises(
            checkpoint.Diverged, match=r"step 3: 'mu/b' .*\(1 of 3 arrays\).*: there is no checkpoint yet"
        ):
            saves.save(3, rest | {"mu": {"b": jnp.asarray(bad)}}, info(), None)
        saves.save(4, rest | {"mu": {"b": jnp.asarray(good)}}, info(), None)
        with pytest.raises(checkpoint.Diverged, match=r"last good checkpoint: step 4\. This step was not saved"):
            saves.save(5, rest | {"mu": {"b": jnp.asarray(bad)}}, info(), None)
    assert steps(tmp_path) == [4]


def test_files_are_saved_with_a_step_and_checked_when_read(tmp_path):
    with checkpoint.Checkpoints(tmp_path, CheckpointConfig()) as saves:
        saves.save(1, small()[0], info(), None)
        saves.save(2, small()[0], info(), None, {"tokenizer.model": b"words", "b.json": b""})
    old, saved = checkpoint.list_saved(tmp_path)
    assert (checkpoint.read_file(saved, "tokenizer.model"), checkpoint.read_file(saved, "b.json")) == (b"words", b"")
    with pytest.raises(CheckpointError, match=r"checkpoints/1 has no tokenizer\.model$"):
        checkpoint.read_file(old, "tokenizer.model")
    Path(saved.path / "tokenizer.model").write_bytes(b"sword")
    with pytest.raises(CheckpointError, match=r"checkpoints/2/tokenizer\.model is damaged"):
        checkpoint.read_file(saved, "tokenizer.model")
    Path(saved.path / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoints/2/tokenizer\.model cannot be read: FileNotFoundError"):
        checkpoint.read_file(saved, "tokenizer.model")
    assert_same(checkpoint.load(saved, small()[1]), small()[0])


def test_the_reason_of_a_failure_is_not_what_it_replaced():
    try:
        try:
            raise ValueError("an attempt")
        except ValueError:
            raise OSError("disk full") from None
    except OSError as error:
        assert store._reason(error) == "OSError: disk full"


def test_a_file_that_cannot_be_written_fails_the_save(tmp_path):
    with (
        pytest.raises(CheckpointError, match=r"saving .*/checkpoints/2 failed.*last good checkpoint is step 1"),
        checkpoint.Checkpoints(tmp_path, CheckpointConfig(keep_latest=1)) as saves,
    ):
        saves.save(1, small()[0], info(), None)
        saves.save(2, small()[0], info(), None, {"tokenizer": b"words", "tokenizer/vocab.txt": b"no folder"})
    assert steps(tmp_path) == [1]


def files_of(saved: checkpoint.Saved) -> list[Path]:
    return sorted(path for path in Path(saved.path).rglob("*") if path.is_file())


@pytest.mark.slow
def test_flipped_bits_never_give_wrong_values(tmp_path):
    """In any file of a checkpoint, the JSON too: either all values are right, or the checkpoint is refused."""
    save(tmp_path / "run", {1: 0.5, 2: 0.25})
    good = checkpoint.choose(str(tmp_path / "run"))
    state, abstract = small(2)
    rng = random.Random(0)
    files = files_of(good)
    data = [path for path in files if "/d/" in str(path)]
    refused = 0
    for number in range(44):
        path = rng.choice(data if number % 2 else files)
        content = path.read_bytes()
        bit = rng.randrange(8 * len(content))
        path.write_bytes(toys.flip(content, bit))
        try:
            found = checkpoint.list_saved(tmp_path / "run")[-1]
            got = checkpoint.load(found, abstract)
            assert_same(got, state)
            assert (found.info, found.metrics) == (good.info, good.metrics), (path, bit)
        except CheckpointError as error:
            refused += 1
            assert str(good.path) in str(error) and len(str(error)) < 1000
        path.write_bytes(content)
    assert refused > 20
    assert_same(checkpoint.load(checkpoint.choose(str(tmp_path / "run")), abstract), state)


@pytest.mark.parametrize("damage", ["delete", "empty", "half"])
def test_missing_and_truncated_files_are_refused_by_name_or_are_harmless(damage, tmp_path):
    save(tmp_path / "run", {1: 0.5, 2: 0.25})
    good = checkpoint.choose(str(tmp_path / "run"))
    state, abstract = small(2)
    refused = set()
    for path in files_of(good):
        content = path.read_bytes()
        path.unlink() if damage == "delete" else path.write_bytes(content[: len(content) // 2 * (damage == "half")])
        try:
            found = checkpoint.list_saved(tmp_path / "run")[-1]
            assert_same(checkpoint.load(found, abstract), state)
        except CheckpointError as error:
            assert str(good.path) in str(error) and "use another step" in str(error)
            refused.add(path.relative_to(good.path).parts[-2] if "d" in path.parts else path.name)
        with checkpoint.Checkpoints(tmp_path / "run", CheckpointConfig()) as saves:  # resumes from step 1
            assert saves.last_good in (1, 2)
        path.write_bytes(content)
    assert {"_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt", "d"} <= refused


def test_an_array_that_does_not_fit_is_refused_by_name(tmp_path):
    save(tmp_path, {1: None})
    saved = checkpoint.choose(str(tmp_path))
    _, abstract = small()

    def refusal(changed) -> str:
        with pytest.raises(CheckpointError) as error:
            checkpoint.load(saved, changed)
        return str(error.value)

    def leaf(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=abstract["a"].sharding)

    shape = refusal(abstract | {"a": leaf((10, 100), jnp.float32)})
    assert "'a' is ((1000,), 'float32'), expected ((10, 100), 'float32')" in shape and str(saved.path) in shape
    dtype = refusal(abstract | {"b": {"c": leaf((3, 4), jnp.float32)}})
    assert "'b/c' is ((3, 4), 'bfloat16'), expected ((3, 4), 'float32')" in dtype
    assert "lacks 'b/d' (1 of 3 arrays missing)" in refusal(
        abstract | {"b": abstract["b"] | {"d": leaf((1,), jnp.int32)}}
    )


def test_another_format_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.store, "FORMAT", 7)
    save(tmp_path, {1: None})
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"checkpoints/1 has format 7, this code reads 1; "):
        checkpoint.load(checkpoint.choose(str(tmp_path)), small()[1])


@pytest.fixture
def full_disk():
    """A function after whose call no file can grow beyond 64 kB (EFBIG; Python ignores SIGXFSZ)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("surfaces_at", ["poll", "save", "wait", "exit"])
def test_a_full_disk_is_reported_at_the_next_call_and_the_last_good_step_is_kept(surfaces_at, tmp_path, full_disk):
    rng = np.random.default_rng(0)
    large = {"a": jnp.asarray(rng.normal(size=100_000), jnp.float32)}
    message = (
        r"saving .*/checkpoints/2 failed: .*; the last good checkpoint is step 1\. Remove the cause, for example by "
        r"freeing disk space, and start again\."
    )
    with (
        pytest.raises(CheckpointError, match=message),
        checkpoint.Checkpoints(tmp_path, CheckpointConfig(keep_latest=1)) as saves,
    ):
        saves.save(1, large, info(), None)
        saves.wait()
        assert saves.last_good == 1
        full_disk()
        saves.save(2, large, info(), None)
        assert saves.last_good == 1
        if surfaces_at == "poll":
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:
                saves.poll()
                time.sleep(0.01)
        if surfaces_at == "save":
            saves.save(3, large, info(), None)
        if surfaces_at == "wait":
            saves.wait()
        assert surfaces_at == "exit", "not told"
    assert saves.last_good == 1
    assert steps(tmp_path) == [1], "neither is step 2 there, nor was step 1 collected for it"
    abstract = {"a": jax.ShapeDtypeStruct((100_000,), jnp.float32, sharding=large["a"].sharding)}
    assert_same(checkpoint.load(checkpoint.choose(str(tmp_path)), abstract), large)


def test_a_save_that_cannot_start_names_its_path(tmp_path, monkeypatch):
    with checkpoint.Checkpoints(tmp_path, CheckpointConfig()) as saves:
        shutil.rmtree(tmp_path / "checkpoints")
        (tmp_path / "checkpoints").write_text("a file in place of the folder")
        with pytest.raises(CheckpointError, match=r"saving .*/checkpoints/5 failed: .*; there is no earlier one\."):
            saves.save(5, small()[0], info(), None)
            saves.wait()
        assert saves.last_good is None


def test_an_error_of_a_save_does_not_hide_the_error_that_ended_the_run(tmp_path, full_disk):
    large = {"a": jnp.asarray(np.random.default_rng(0).normal(size=100_000), jnp.float32)}
    with pytest.raises(KeyError, match="first"), checkpoint.Checkpoints(tmp_path, CheckpointConfig()) as saves:
        full_disk()
        saves.save(2, large, info(), None)
        raise KeyError("first")


def test_last_good_is_a_committed_step(tmp_path, monkeypatch):
    with checkpoint.Checkpoints(tmp_path, CheckpointConfig(keep_latest=9)) as saves:
        assert saves.last_good is None
        for number in (1, 2, 3):
            saves.save(number, small()[0], info(), None)
            assert saves.last_good == (number - 1 or None)
        saves.wait()
        assert saves.last_good == 3
    with checkpoint.Checkpoints(tmp_path, CheckpointConfig()) as saves:
        assert saves.last_good == 3
    with checkpoint.Checkpoints(tmp_path, CheckpointConfig(), resumed=2) as saves:
        assert saves.last_good == 2, "what could not be read is not good"


def test_the_folder_of_an_interrupted_save_is_ignored_and_removed(tmp_path):
    save(tmp_path, {1: None})
    left = tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints" / "1", left)
    (tmp_path / "checkpoints" / "4.deleted").mkdir()
    assert steps(tmp_path) == [1] and checkpoint.choose(str(tmp_path)).step == 1
    said = []
    checkpoint.sweep(tmp_path, said.append)
    assert said[0].endswith("checkpoints/4.deleted, checkpoints/5.orbax-checkpoint-tmp")
    save(tmp_path, {2: None})
    assert steps(tmp_path) == [1, 2]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]
    assert_same(checkpoint.load(checkpoint.choose(str(tmp_path)), small()[1]), small(2)[0])


def test_steps_that_a_killed_process_had_still_to_delete_go_when_the_run_resumes_and_not_before(tmp_path):
    save(tmp_path, {1: 0.1, 2: 0.5, 3: 0.4, 4: 0.3}, keep_latest=9)
    with checkpoint.Checkpoints(tmp_path, CheckpointConfig(keep_latest=1, keep_best=1)):
        assert steps(tmp_path) == [1, 2, 3, 4], "nothing was loaded: all may be needed"
    with checkpoint.Checkpoints(tmp_path, CheckpointConfig(keep_latest=1, keep_best=1), resumed=3):
        assert steps(tmp_path) == [1, 3, 4], "4 could not be read: it neither counts nor goes"
    with checkpoint.Checkpoints(tmp_path, CheckpointConfig(keep_latest=1, keep_best=1), resumed=4):
        assert steps(tmp_path) == [1, 4]


@pytest.mark.parametrize("file", ["_CHECKPOINT_METADATA", "state/manifest.ocdbt"])
def test_a_damaged_step_is_saved_again_and_does_not_count_among_those_kept(file, tmp_path):
    """Steps 2 and 4, of which 4 is damaged; the run resumes from 2 and saves every step, keeping one."""
    save(tmp_path, {2: None, 4: None}, keep_latest=2)
    (tmp_path / "checkpoints/4" / file).write_bytes(b"{")
    with checkpoint.Checkpoints(tmp_path, CheckpointConfig(keep_latest=1), resumed=2) as saves:
        saves.save(3, small(3)[0], info(), None)
        saves.wait()
        assert steps(tmp_path) == [3, 4], "not collected, for it is the only one to be read"
        saves.save(4, small(44)[0], info(), None)
        saves.wait()
    assert steps(tmp_path) == [4]
    assert_same(checkpoint.load(checkpoint.choose(str(tmp_path)), small()[1]), small(44)[0])


def test_a_checkpoint_contains_only_arrays_and_json(tmp_path):
    save(tmp_path, {1: 0.5})
    saved = checkpoint.choose(str(tmp_path))
    assert saved.info["config"] == json.loads(json.dumps(info()["config"]))
    assert (saved.info["tokenizer_hash"], saved.info["data"]["example"], saved.metrics) == ("abc", 8, {"loss": 0.5})
    for path in files_of(saved):
        assert not path.read_bytes().startswith(b"\x80"), f"{path}: a pickle"
