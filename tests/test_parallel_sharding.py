"""lm/parallel/mesh.py and sharding.py: the mesh, the sharding rules, and the transfer of batches to devices."""

import dataclasses
import itertools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from jax import P

from lm import param_paths
from lm.config import MeshConfig
from lm.config.schema import ConfigError
from lm.models import transformer
from lm.parallel import mesh as mesh_lib
from lm.parallel import ring_reduce, sharding, tpu_matmul
from lm.parallel.mesh import AXES, _ring_order, make_mesh, mesh_sizes


def mesh(devices: int = 8, **sizes):
    return make_mesh(MeshConfig(**sizes), jax.devices()[:devices])


@pytest.mark.parametrize(
    ("sizes", "devices", "want"),
    [
        ({}, 8, (1, 8, 1, 1, 1, 1)),
        ({}, 1, (1, 1, 1, 1, 1, 1)),
        ({"fsdp": 4}, 8, (1, 2, 4, 1, 1, 1)),
        ({"fsdp": 2, "tensor": 2}, 8, (1, 2, 2, 1, 1, 2)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 8, (1, 2, 2, 1, 1, 2)),
        ({"fsdp": 4, "dcn_data": 2}, 16, (2, 2, 4, 1, 1, 1)),
        ({"data": 1, "tensor": 8}, 8, (1, 1, 1, 1, 1, 8)),
        ({"context": 4}, 8, (1, 2, 1, 1, 4, 1)),
        ({"expert": 4, "tensor": 2}, 8, (1, 1, 1, 4, 1, 2)),
    ],
)
def test_mesh_sizes(sizes, devices, want):
    assert mesh_sizes(MeshConfig(**sizes), devices) == want


@pytest.mark.parametrize(
    ("sizes", "devices"),
    [
        ({"data": 3}, 8),
        ({"fsdp": 3}, 8),
        ({"context": 3}, 8),
        ({"fsdp": 16}, 8),
        ({"data": 1}, 8),
        ({"data": 8, "dcn_data": 2}, 8),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(sizes, devices):
    cfg = MeshConfig(**sizes)
    sizes = [f"{axis}={getattr(cfg, axis)}" for axis in (*AXES, "dcn_data")]
    asked = f"mesh {' '.join(sizes)} does not fit {devices} devices"
    with pytest.raises(ConfigError, match=f"^{asked}: their product must be {devices}; .* would do$|does not divide"):
        mesh_sizes(cfg, devices)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What JAX's mesh_utils and ours read of a TPU's device."""

    id: int
    coords: tuple[int, ...]
    device_kind: str
    slice_index: int = 0
    process_index: int = 0
    core_on_chip: int = 0
    platform: str = "tpu"


def slice_of(kind: str, *shape: int, slices: int = 1) -> list[Chip]:
    """The devices of TPU slices, the first coordinate running fastest."""
    places = [at[::-1] for at in itertools.product(*(range(n) for n in (*[1] * (3 - len(shape)), *shape[::-1])))]
    return [Chip(i, at, kind, number) for number in range(slices) for i, at in enumerate(places, number * len(places))]


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("TPU v5 lite", (4, 4)),
        ("TPU v5 lite", (8, 8)),
        ("TPU v6 lite", (8, 8)),
        ("TPU v6 lite", (16, 16)),
        ("TPU v5", (2, 4, 4)),
        ("TPU v5", (4, 4, 6)),
    ],
    ids=str,
)
def test_every_factorisation_of_a_slice_is_a_mesh_of_all_its_chips(kind, shape):
    """Also if a mesh axis is a part of a physical axis, as in fsdp=32 x expert=8 on 16x16."""
    devices = slice_of(kind, *shape)
    count = len(devices)
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    for fsdp, expert, tensor in itertools.product(divisors, repeat=3):
        if count % (fsdp * expert * tensor) == 0:
            cfg = MeshConfig(data=count // (fsdp * expert * tensor), fsdp=fsdp, expert=expert, tensor=tensor)
            made = make_mesh(cfg, devices)
            assert made.devices.shape == (cfg.data, fsdp, expert, 1, tensor)
            assert {device.id for device in made.devices.ravel()} == {*range(count)}


def test_slices_may_split_their_axes_too():
    made = make_mesh(MeshConfig(dcn_data=2, fsdp=32, expert=2), slice_of("TPU v6 lite", 8, 8, slices=2))
    assert made.devices.shape == (2, 32, 2, 1, 1)
    for number in range(2):
        assert {device.slice_index for device in made.devices[number].ravel()} == {number}


@pytest.mark.parametrize("devices", [1, 2, 6, 8, 12, 16, 256])
def test_suggested_mesh_sizes_are_valid(devices):
    refused = 0
    for data, fsdp, tensor, dcn in itertools.product((-1, 1, 2), (1, 2, 3, 32), (1, 5, 8), (1, 2)):
        cfg = MeshConfig(data=data, fsdp=fsdp, tensor=tensor, dcn_data=dcn)
        try:
            assert np.prod(mesh_sizes(cfg, devices)) == devices
        except ConfigError as error:
            refused += 1
            offered = str(error).rpartition("; ")[2]
            if "does not divide" in offered:
                assert devices % dcn
                continue
            named = [
                (name, [*map(int, sizes.split(", "))])
                for name, sizes in re.findall(r"mesh\.(\w+)=([\d, ]*\d)", offered)
            ]
            assert named, error
            if "with the others as they are" in offered:
                changes = [{name: size} for name, sizes in named for size in sizes]
            else:
                changes = [{name: size for name, (size,) in named}]
            for change in changes:
                mesh_sizes(dataclasses.replace(cfg, **change), devices)
    assert refused > 30


def test_a_wrong_number_of_slices_is_refused():
    """Several hosts of one slice are not slices; too few slices are an error of the config, not a crash later."""
    chips = [SimpleNamespace(platform="tpu", slice_index=i // 4, process_index=i // 2, id=i) for i in range(8)]
    for cfg, devices, slices in ((MeshConfig(dcn_data=4), chips[:4], 1), (MeshConfig(fsdp=8), chips, 2)):
        with pytest.raises(
            ConfigError, match=f"^mesh.dcn_data={cfg.dcn_data}: expected {slices}, the number of slices$"
        ):
            make_mesh(cfg, devices)
    assert make_mesh(MeshConfig(dcn_data=2, fsdp=4)).shape["data"] == 2, "on CPU there are none"


def test_the_mesh_names_its_axes():
    made = mesh(fsdp=4)
    assert dict(made.shape) == {"data": 2, "fsdp": 4, "expert": 1, "context": 1, "tensor": 1}
    assert made.devices.size == 8 and sharding.batch_shards(made) == 8
    assert sharding.batch_shards(mesh(fsdp=2, tensor=2)) == sharding.batch_shards(mesh(context=2)) == 4
    assert sharding.batch_shards(mesh(expert=4)) == 8


def test_specs():
    cases = {
        ("layers", "embed", "mlp"): P(None, ("context", "fsdp", "expert"), "tensor"),
        ("vocab", "embed"): P("tensor", ("context", "fsdp", "expert")),
        ("batch", "length", None): P(("data", "fsdp", "expert"), "context", None),
        ("batch", "residual_length", None): P(("data", "fsdp", "expert"), ("context", "tensor"), None),
        ("token_shards", None): P(("context", "data", "fsdp", "expert"), None),
        ("experts", "expert_embed", "mlp"): P("expert", ("context", "fsdp"), "tensor"),
        ("embed", "kv_heads"): P(("context", "fsdp", "expert"), "tensor"),
        (None,): P(None),
        (): P(),
    }
    assert {axes: sharding.spec(axes) for axes in cases} == cases
    assert sharding.spec(("vocab", "embed"), whole=("embed",)) == P("tensor", None)


def test_constrain_and_gather_shard_results_and_do_nothing_without_a_mesh():
    w = jnp.ones((16, 8))
    one = jax.jit(lambda w: sharding.constrain(w, "vocab", "embed"))(w)
    assert one.sharding.is_fully_replicated
    with jax.set_mesh(mesh(data=1, fsdp=4, tensor=2)):
        split = jax.jit(lambda w: sharding.constrain(w, "vocab", "embed"))(w)
        gathered = jax.jit(lambda w: sharding.gather(w, "vocab", "embed"))(w)
    assert split.sharding.shard_shape(w.shape) == (8, 2)
    assert gathered.sharding.shard_shape(w.shape) == (8, 8)
    with jax.set_mesh(mesh(data=1, context=4, tensor=2)):
        rows, one = (jax.jit(lambda x: sharding.constrain(x, "batch", "length"))(w[:, :n]) for n in (8, 1))
        gathered = jax.jit(lambda w: sharding.gather(w, "vocab", "embed"))(w)
        finer = [jax.jit(lambda x: sharding.constrain(x, "batch", "residual_length"))(w[:, :n]) for n in (8, 4, 1)]
    assert rows.sharding.shard_shape(rows.shape) == (16, 2)
    assert one.sharding.shard_shape(one.shape) == (16, 1), "one position that is decoded lies on all devices"
    assert gathered.sharding.shard_shape(w.shape) == (8, 8)
    # Positions over context and tensor; where there are not enough for both, over context; one lies on all devices.
    assert [each.sharding.shard_shape(each.shape) for each in finer] == [(16, 1), (16, 1), (16, 1)]
    assert [each.sharding.spec[1:] for each in finer] == [((("context", "tensor")),), ("context",), ()]


@pytest.mark.parametrize("longest", [32, 2])
@pytest.mark.parametrize(
    "sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "context": 2}, {"expert": 4, "data": 2}]
)
@pytest.mark.parametrize("axes", [("embed", "mlp"), ("heads", "embed")])
def test_ring_reduced_gradients_are_exact_and_sharded_as_the_weights(sizes, axes, longest, monkeypatch):
    """With integers, whose sums are exact in any order; rings of a whole axis, and of rows and columns of a grid."""
    monkeypatch.setattr(mesh_lib, "LONGEST_RING", longest)
    rng, made = np.random.default_rng(0), mesh(**{"data": 1} | sizes)
    x, w, c = (jnp.asarray(rng.integers(-4, 5, shape), jnp.float32) for shape in ((8, 4, 16), (16, 32), (8, 4, 32)))
    with jax.set_mesh(made):
        where = jax.NamedSharding(made, sharding.spec(axes))
        loss = jax.jit(
            jax.grad(lambda x, w: (tpu_matmul.overlapped_matmul(x, w, axes, True) * c).sum(), argnums=(0, 1))
        )
        d_x, d_w = loss(x, jax.device_put(w, where))
    assert d_w.sharding.is_equivalent_to(where, 2)
    np.testing.assert_array_equal(d_w, np.einsum("bli,blo->io", x, c))
    np.testing.assert_array_equal(d_x, np.einsum("blo,io->bli", c, w))


def test_a_ring_needs_an_embed_axis_that_the_devices_divide():
    """As of BERT's output projection, whose biases are 128 rows more: 768 of 256 devices, but not 896."""
    abstract = jax.sharding.AbstractMesh((1, 256, 1, 1, 1), ("data", "fsdp", "expert", "context", "tensor"))
    with jax.sharding.use_abstract_mesh(abstract):
        assert [ring_reduce.is_possible((rows, 30_592), ("embed", "vocab")) for rows in (768, 896)] == [True, False]


@pytest.mark.parametrize("shape", [(4, 4, 1), (2, 4, 4), (2, 2, 1)])
def test_ring_neighbours_are_adjacent_chips(shape):
    """From the order of coordinates; an order that is already a ring stays, such as JAX's own of 4 x 4."""
    chips = np.array([SimpleNamespace(coords=place) for place in np.ndindex(shape)], object)

    def hops(devices):
        coords = np.array([device.coords for device in devices.ravel()])
        return np.abs(coords - np.roll(coords, -1, axis=0)).sum(axis=1)

    found = _ring_order(chips.reshape(1, -1, 1, 1, 1))
    assert found.shape == (1, chips.size, 1, 1, 1) and {id(x) for x in found.ravel()} == {id(x) for x in chips}
    assert (hops(found)[:-1] == 1).all(), "a serpentine; only the hop from last to first may be longer"
    assert hops(found).sum() < hops(chips).sum()
    assert shape[0] != 2 or hops(found)[-1] == 1
    np.testing.assert_array_equal(_ring_order(found), found)


@pytest.mark.parametrize(("shape", "far"), [((8, 8, 1), 2), ((8, 16, 1), 2), ((16, 16, 1), 1)])
def test_ring_neighbours_of_long_axes_are_close(shape, far):
    """A long axis is a grid of rings. Axes of 16 chips have wraparound links, axes of 8 do not."""
    chips = np.array([SimpleNamespace(coords=place) for place in np.ndindex(shape)], object)
    found = _ring_order(chips.reshape(1, -1, 1, 1, 1))
    assert {id(x) for x in found.ravel()} == {id(x) for x in chips}
    assert shape != (16, 16, 1) or (found.ravel() == chips).all()
    rows, columns = max(shape), min(size for size in shape if size > 1)
    grid = np.array([device.coords for device in found.ravel()]).reshape(rows, columns, 3)
    for axis in (0, 1):
        away = np.abs(grid - np.roll(grid, -1, axis=axis))
        hops = np.where(np.array(shape) == 16, np.minimum(away, 16 - away), away).sum(axis=-1)
        assert hops.max() <= far


def test_fold_length_into_batch_moves_no_data():
    x = np.arange(8 * 12 * 2, dtype=np.float32).reshape(8, 12, 2)
    made = mesh(data=2, context=4)
    placed = jax.device_put(x, jax.NamedSharding(made, sharding.spec(("batch", "length", None))))
    with jax.set_mesh(made):
        got = jax.jit(sharding.fold_length_into_batch)(placed)
        assert jax.jit(sharding.fold_length_into_batch)(x[:, :10]).shape == (8, 10, 2), "not divisible: whole"
    np.testing.assert_array_equal(got, np.concatenate(np.split(x, 4, axis=1), axis=0))
    before, after = ({s.device: s.data for s in array.addressable_shards} for array in (placed, got))
    for device, held in before.items():
        np.testing.assert_array_equal(after[device], held, err_msg="nothing moves")
    np.testing.assert_array_equal(sharding.fold_length_into_batch(x), x)


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 4}, {"fsdp": 2, "tensor": 2}, {"data": 1, "tensor": 8}, {"context": 4}])
def test_local_rows_and_to_global_reassemble_a_batch(sizes):
    made = mesh(**sizes)
    rows = sharding.local_rows(made, 16)
    assert rows.dtype == np.int64 and rows.tolist() == list(range(16)), "one process holds them all, each once"
    parts = made.shape["context"]
    host = {
        "tokens": np.arange(16 * 4, dtype=np.int32).reshape(16, 4),
        "example_index": np.arange(16, dtype=np.int32),
        "labels": np.arange(16 * 2, dtype=np.int32).reshape(16, 2),
        "targets": np.arange(16 * 24, dtype=np.int32).reshape(16, 3, 8),
    }
    made_global = sharding.to_global(host, rows, 16, made)
    for key, value in host.items():
        assert np.array_equal(made_global[key], value) and made_global[key].dtype == value.dtype
        rows, *_, last = (*made_global[key].sharding.shard_shape(value.shape), 0)[: value.ndim + (value.ndim == 1)]
        assert rows == 16 // sharding.batch_shards(made)
        assert value.ndim == 1 or last == value.shape[-1] // (parts if key in ("tokens", "targets") else 1)


def test_to_global_takes_rows_by_their_place_in_the_global_batch():
    """A process that holds rows 8 to 15 alone, as the second of two would."""
    part = mesh(devices=4)
    second = sharding.batch_sharding(part).addressable_devices_indices_map((8,))
    assert sorted(index[0].start for index in second.values()) == [0, 2, 4, 6]
    host = {"tokens": np.arange(8, dtype=np.int32)[:, None]}
    shards = sharding.to_global(host, np.arange(8), 8, part)["tokens"].addressable_shards
    assert {shard.device.id: shard.data.ravel().tolist() for shard in shards} == {
        n: [2 * n, 2 * n + 1] for n in range(4)
    }


def test_a_mesh_that_does_not_divide_a_parameter_is_refused_by_name():
    shapes = {"decoder/layers/mlp/up/kernel": (2, 16, 24)}
    axes = {"decoder/layers/mlp/up/kernel": ("layers", "embed", "mlp")}
    sharding.check_divisible(shapes, axes, mesh(data=1, tensor=8))
    match = r"mesh.fsdp=4 does not divide 'embed' \(18\) of parameter 'decoder/layers/mlp/up/kernel' \(2, 18, 24\)$"
    with pytest.raises(ConfigError, match=match):
        sharding.check_divisible({path: (2, 18, 24) for path in shapes}, axes, mesh(fsdp=4))
    with pytest.raises(ConfigError, match=r"^mesh.context=2 x mesh.fsdp=4 does not divide 'embed' \(12\)"):
        sharding.check_divisible({path: (2, 12, 24) for path in shapes}, axes, mesh(fsdp=4, context=2))
    with pytest.raises(ConfigError, match=r"mesh.tensor=8 does not divide 'mlp' \(20\)"):
        sharding.check_divisible({path: (2, 16, 20) for path in shapes}, axes, mesh(data=1, tensor=8))


@pytest.mark.parametrize("style", toys.STYLES)
def test_every_large_parameter_is_split_over_fsdp_and_over_tensor(style):
    cfg = dataclasses.replace(toys.STYLES[style], embed_dim=64, num_heads=8, num_kv_heads=8, mlp_dim=128)
    cfg = transformer.resolve(cfg, vocab_size=toys.VOCAB, seq_len=32)
    model = transformer.text_model(cfg, jnp.float32)
    axes = param_paths.flatten(model.logical_axes())
    shapes = param_paths.flatten(jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0))))
    large = {path: leaf.shape for path, leaf in shapes.items() if leaf.size >= 64 * 64}
    assert len(large) >= 7
    for sizes in ({"data": 1, "fsdp": 8}, {"data": 1, "tensor": 8}, {"data": 1, "fsdp": 2, "context": 4}):
        made = mesh(**sizes)
        sharding.check_divisible(large, axes, made)
        for path, shape in large.items():
            held = jax.NamedSharding(made, sharding.spec(axes[path])).shard_shape(shape)
            assert np.prod(held) == np.prod(shape) / 8, (path, sizes)
