"""The mesh, the rules that say where arrays lie on it, and batches on their way there."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from jax import P

from lm import sharding, trees
from lm.config import MeshConfig
from lm.models import transformer
from lm.schema import ConfigError


def mesh(devices: int = 8, **sizes):
    return sharding.make_mesh(MeshConfig(**sizes), jax.devices()[:devices])


@pytest.mark.parametrize(
    ("sizes", "devices", "want"),
    [
        ({}, 8, (1, 8, 1, 1)),
        ({}, 1, (1, 1, 1, 1)),
        ({"fsdp": 4}, 8, (1, 2, 4, 1)),
        ({"fsdp": 2, "tensor": 2}, 8, (1, 2, 2, 2)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 8, (1, 2, 2, 2)),
        ({"fsdp": 4, "dcn_data": 2}, 16, (2, 2, 4, 1)),
        ({"data": 1, "tensor": 8}, 8, (1, 1, 1, 8)),
    ],
)
def test_mesh_sizes(sizes, devices, want):
    assert sharding.mesh_sizes(MeshConfig(**sizes), devices) == want


@pytest.mark.parametrize(
    ("sizes", "devices"),
    [({"data": 3}, 8), ({"fsdp": 3}, 8), ({"fsdp": 16}, 8), ({"data": 1}, 8), ({"data": 8, "dcn_data": 2}, 8)],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(sizes, devices):
    cfg = MeshConfig(**sizes)
    asked = f"mesh data={cfg.data} fsdp={cfg.fsdp} tensor={cfg.tensor} dcn_data={cfg.dcn_data} does not fit {devices}"
    with pytest.raises(ConfigError, match=f"^{asked} devices: their product must be {devices}$"):
        sharding.mesh_sizes(cfg, devices)


def test_the_mesh_names_its_axes():
    made = mesh(fsdp=4)
    assert dict(made.shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    assert made.devices.size == 8 and sharding.batch_shards(made) == 8
    assert sharding.batch_shards(mesh(fsdp=2, tensor=2)) == 4


def test_specs():
    cases = {
        ("layers", "embed", "mlp"): P(None, "fsdp", "tensor"),
        ("vocab", "embed"): P("tensor", "fsdp"),
        ("batch", "length", None): P(("data", "fsdp"), None, None),
        ("embed", "kv_heads"): P("fsdp", "tensor"),
        (None,): P(None),
        (): P(),
    }
    assert {axes: sharding.spec(axes) for axes in cases} == cases
    assert sharding.spec(("vocab", "embed"), without=("fsdp",)) == P("tensor", None)
    assert sharding.spec(("batch", "length"), without=("fsdp",)) == P("data", None)


def test_constrain_and_gather_place_what_is_computed_and_do_nothing_without_a_mesh():
    w = jnp.ones((16, 8))
    one = jax.jit(lambda w: sharding.constrain(w, "vocab", "embed"))(w)
    assert one.sharding.is_fully_replicated
    with jax.set_mesh(mesh(data=1, fsdp=4, tensor=2)):
        split = jax.jit(lambda w: sharding.constrain(w, "vocab", "embed"))(w)
        gathered = jax.jit(lambda w: sharding.gather(w, "vocab", "embed"))(w)
    assert split.sharding.shard_shape(w.shape) == (8, 2)
    assert gathered.sharding.shard_shape(w.shape) == (8, 8)


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 4}, {"fsdp": 2, "tensor": 2}, {"data": 1, "tensor": 8}])
def test_local_rows_and_to_global_put_a_batch_together_again(sizes):
    made = mesh(**sizes)
    rows = sharding.local_rows(made, 16)
    assert rows.dtype == np.int64 and rows.tolist() == list(range(16)), "one process holds them all, each once"
    host = {"tokens": np.arange(16 * 3, dtype=np.int32).reshape(16, 3), "example_index": np.arange(16, dtype=np.int32)}
    made_global = sharding.to_global(host, rows, 16, made)
    for key, value in host.items():
        assert np.array_equal(made_global[key], value) and made_global[key].dtype == value.dtype
        assert made_global[key].sharding.shard_shape(value.shape)[0] == 16 // sharding.batch_shards(made)


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
    with pytest.raises(ConfigError, match=r"mesh.tensor=8 does not divide 'mlp' \(20\)"):
        sharding.check_divisible({path: (2, 16, 20) for path in shapes}, axes, mesh(data=1, tensor=8))


@pytest.mark.parametrize("style", toys.STYLES)
def test_every_large_parameter_is_split_over_fsdp_and_over_tensor(style):
    cfg = dataclasses.replace(toys.STYLES[style], embed_dim=64, num_heads=8, num_kv_heads=8, mlp_dim=128)
    cfg = transformer.resolve(cfg, vocab_size=toys.VOCAB, seq_len=32)
    model = transformer.text_model(cfg, jnp.float32)
    axes = trees.flatten(model.logical_axes())
    shapes = trees.flatten(jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0))))
    large = {path: leaf.shape for path, leaf in shapes.items() if leaf.size >= 64 * 64}
    assert len(large) >= 7
    for sizes in ({"data": 1, "fsdp": 8}, {"data": 1, "tensor": 8}):
        made = mesh(**sizes)
        sharding.check_divisible(large, axes, made)
        for path, shape in large.items():
            held = jax.NamedSharding(made, sharding.spec(axes[path])).shard_shape(shape)
            assert np.prod(held) == np.prod(shape) / 8, (path, sizes)
