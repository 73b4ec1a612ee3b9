"""lm/step.py: equal to a float64 reference however the batch is split, sharded and packed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import losses, optim, param_paths, step
from lm.config import LossConfig, MeshConfig, OptimConfig
from lm.models import transformer
from lm.optim.trainable import trained_part
from lm.parallel import sharding
from lm.parallel.mesh import make_mesh
from tests import reference, toys

LOSS = LossConfig(z_loss=1e-3, label_smoothing=0.1, chunk_len=5)
SEQ_LEN = 12


def loss_of(model, cfg, loss: LossConfig = LOSS):
    """What `language_modelling.next_token_loss` does, without a tokenizer."""

    def loss_fn(params, batch, rng):
        out = model.apply(params, batch, rng=rng)
        return losses.token_cross_entropy(
            out.hidden_BxLxD,
            out.unembed_DxV,
            batch["targets"],
            batch["loss_weights"],
            vocab_size=toys.VOCAB,
            z_loss=loss.z_loss,
            label_smoothing=loss.label_smoothing,
            softcap=cfg.logit_softcap,
            chunk_len=loss.chunk_len,
        )

    return loss_fn


def gradient_as_parameters(params) -> optim.Optimizer:
    """An optimizer whose new parameters are the gradients, so that a test can read them."""
    return adamw(params)._replace(
        init=lambda params: (), update=lambda grads, state, params, step, start: (grads, state, {})
    )


def adamw(params, **changes) -> optim.Optimizer:
    cfg = OptimConfig(schedule="constant", learning_rate=1e-2, **changes)
    return optim.build(cfg, params, total_steps=10, warmup_steps=0, decay_steps=0)


def take_step(params, batch, optimizer, loss_fn, mesh_cfg, devices, *, micro_batches=1, ema=0.9):
    """A step on a mesh; returns the state with host arrays and the metrics."""
    mesh = make_mesh(mesh_cfg, jax.devices()[:devices])
    rows = batch["tokens"].shape[0]
    with jax.set_mesh(mesh):
        state = step.init_state(params, optimizer, use_ema=ema > 0)
        placed = sharding.to_global(batch, sharding.local_rows(mesh, rows), rows, mesh)
        one = functools.partial(
            step.train_step, loss_fn=loss_fn, optimizer=optimizer, seed=3, micro_batches=micro_batches, ema_decay=ema
        )
        state, metrics = jax.jit(one)(state, placed)
    return jax.device_get(state), jax.device_get(metrics)


def assert_close(got, want, tolerance: float) -> None:
    """Each leaf within `tolerance` of the reference, relative to the reference's largest entry.

    A bias of the keys adds the same to all scores of a query, so its exact gradient is 0: what rounding leaves of it is
    held against the bias of the queries.
    """
    got, want = param_paths.flatten(got), param_paths.flatten(want)
    assert got.keys() == want.keys()
    for path in want:
        scale = np.abs(want[path.replace("key/bias", "query/bias")]).max()
        assert scale > 1e-9, path
        assert np.abs(got[path] - want[path]).max() <= tolerance * scale, path


@functools.cache
def expected(style: str):
    cfg, model, params = toys.decoder(toys.STYLES[style], SEQ_LEN)
    batch = toys.batch(8, SEQ_LEN)
    params = jax.device_get(params)
    return cfg, model, params, batch, reference.loss_and_grads(params, batch, cfg, LOSS, toys.VOCAB)


@pytest.mark.parametrize(
    ("style", "shards", "micro_batches"),
    [("llama", shards, micro) for shards in (1, 2, 8) for micro in (1, 2, 4)] + [("gpt2", 1, 1), ("gpt2", 8, 4)],
)
def test_loss_and_every_gradient_leaf_equal_the_float64_reference(style, shards, micro_batches):
    """Gradient accumulation x data shards x uneven masks; with 8 shards, row 3 makes one of them empty."""
    cfg, model, params, batch, (total, weight, grads) = expected(style)
    state, metrics = take_step(
        params,
        batch,
        gradient_as_parameters(params),
        loss_of(model, cfg),
        MeshConfig(data=shards),
        shards,
        micro_batches=micro_batches,
    )
    assert not batch["loss_weights"][3].any()
    assert metrics["weight"] == weight
    assert metrics["loss"] == pytest.approx(total / weight, rel=1e-6)
    assert_close(state.params, jax.tree.map(lambda g: g / weight, grads), 1e-5)


@pytest.mark.parametrize(
    ("remat", "unroll"),
    [("full", 1), ("full", 0), ("minimal", 1), ("offload", 1), ("attention", 0), ("qkv", 1), ("none", 0)],
)
def test_remat_and_unrolling_do_not_change_gradients(remat, unroll):
    cfg, _, params, batch, (_, weight, grads) = expected("llama")
    other = dataclasses.replace(cfg, remat=remat, unroll=unroll)
    model = transformer.text_model(other, jnp.float32)
    optimizer = gradient_as_parameters(params)
    state, _ = take_step(params, batch, optimizer, loss_of(model, other), MeshConfig(data=1), 1)
    assert_close(state.params, jax.tree.map(lambda g: g / weight, grads), 1e-5)


def test_zero3_gathers_weights_and_keeps_them_sharded():
    """On an fsdp mesh all parameters of two or more dimensions except norms are sharded."""
    _, model, params, _, _ = expected("llama")
    mesh = make_mesh(MeshConfig(data=1, fsdp=8), jax.devices())
    axes = param_paths.flatten(model.logical_axes())
    for path, leaf in param_paths.flatten(params).items():
        split = jax.NamedSharding(mesh, sharding.spec(axes[path])).shard_shape(leaf.shape)
        assert np.prod(split) == (leaf.size if "norm" in path else leaf.size / 8), path


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_a_loss_that_needs_the_start_has_it_at_every_step_and_in_evaluation(micro_batches):
    """Bit for bit, with the first layer frozen, beside an average; the state keeps what is trained alone."""
    cfg, model, params, batch, _ = expected("gpt2")
    optimizer = adamw(params, lr_rules=((r".*/layers/0/.*|[^/]*embed.*", 0.0), (r".*", 1.0)))
    plain = loss_of(model, cfg)

    def distance(one, other):
        return sum(jnp.abs(a - b).sum() for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))

    def loss_fn(now, batch, rng, start):
        found = {"start_moved": (distance(start, params), 1.0), "moved": (distance(now, start), 1.0)}
        return plain(now, batch, rng)._replace(metrics=jax.tree.map(jnp.float32, found))

    one = functools.partial(
        step.train_step, loss_fn=loss_fn, optimizer=optimizer, seed=3, micro_batches=micro_batches, ema_decay=0.9
    )
    every = dict.fromkeys(param_paths.flatten(params), True)
    state = step.init_state(params, optimizer, use_ema=True, anchored=every)
    trained = param_paths.flatten(trained_part(optimizer.selection, params))
    assert {path: leaf.shape for path, leaf in param_paths.flatten(state.start).items()} == {
        path: leaf.shape for path, leaf in trained.items()
    }
    one = jax.jit(functools.partial(one, needs_start=True))
    for number in range(3):
        state, metrics = one(state, batch)
        assert metrics["start_moved"][0] == 0
        assert (metrics["moved"][0] > 0) == (number > 0)
    evaluate = jax.jit(functools.partial(step.eval_step, loss_fn=loss_fn, needs_start=True))
    found, _ = evaluate(step.eval_params(state), batch, state.start)
    assert found["start_moved"][0] == 0 < found["moved"][0]
    found, _ = evaluate(step.eval_params(state), batch)
    assert found["moved"][0] == 0 < found["start_moved"][0]


def test_a_batch_of_weight_0_changes_no_parameter_moment_or_average():
    cfg, model, params, batch, _ = expected("gpt2")
    optimizer = adamw(params)
    args = (optimizer, loss_of(model, cfg), MeshConfig(data=1), 1)
    empty = batch | {"loss_weights": np.zeros_like(batch["loss_weights"])}
    state = step.init_state(params, optimizer, use_ema=True)
    one = functools.partial(
        step.train_step, loss_fn=args[1], optimizer=optimizer, seed=3, micro_batches=2, ema_decay=0.9
    )
    state, _ = jax.jit(one)(state, batch)
    after, metrics = jax.jit(one)(state, empty)
    assert metrics["loss"] == 0.0 and metrics["weight"] == 0.0 and metrics["grad_norm"] == 0.0
    assert (int(after.step), int(after.skipped)) == (2, 1)
    before = (state.params, state.opt_state, state.ema)
    jax.tree.map(np.testing.assert_array_equal, before, (after.params, after.opt_state, after.ema))


def test_frozen_parameters_do_not_change_and_have_no_optimizer_state():
    cfg, model, params, batch, _ = expected("gpt2")
    optimizer = adamw(params, lr_rules=((r"decoder/layers/mlp/.*", 1.0), (r".*", 0.0)))
    state, _ = take_step(params, batch, optimizer, loss_of(model, cfg), MeshConfig(data=1), 1)
    new, old = param_paths.flatten(state.params), param_paths.flatten(params)
    for path in old:
        assert np.array_equal(new[path], old[path]) != path.startswith("decoder/layers/mlp/"), path
    held = param_paths.flatten(state.opt_state[1].mu)
    assert set(held) == {path for path in old if path.startswith("decoder/layers/mlp/")}


def test_ema_follows_its_formula():
    cfg, model, params, batch, _ = expected("gpt2")
    state, _ = take_step(params, batch, adamw(params), loss_of(model, cfg), MeshConfig(data=1), 1, ema=0.75)
    for path, average in param_paths.flatten(state.ema).items():
        want = (
            0.1 * param_paths.flatten(params)[path] + 0.9 * param_paths.flatten(state.params)[path]
        )  # 0.1 = (1 + 0) / (10 + 0)
        np.testing.assert_allclose(average, want, rtol=1e-6, atol=1e-7)


def test_dropout_depends_on_the_step_and_the_seed():
    cfg, _, params, batch, _ = expected("gpt2")
    cfg = dataclasses.replace(cfg, dropout=0.3)
    model = transformer.text_model(cfg, jnp.float32)
    loss_fn = jax.jit(loss_of(model, cfg))

    def loss(seed, at_step):
        return float(loss_fn(params, batch, jax.random.fold_in(jax.random.key(seed), at_step)).sum)

    assert loss(0, 0) == loss(0, 0)
    assert len({loss(0, 0), loss(0, 1), loss(1, 0), float(loss_fn(params, batch, None).sum)}) == 4


def test_zero3_gathers_one_layer_at_a_time_and_reduces_the_output_projection_once():
    """On fsdp 8: temporaries take less than the gathered kernels of all layers; no loop reduces [D, V] gradients."""
    wide = dataclasses.replace(toys.LLAMA, num_layers=8, embed_dim=256, mlp_dim=1024, qk_norm=False)
    cfg = transformer.resolve(wide, vocab_size=512, seq_len=32)
    model = transformer.text_model(cfg, jnp.float32)
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    where = param_paths.map_with_path(lambda _, a: jax.NamedSharding(mesh, sharding.spec(a)), model.logical_axes())
    params = jax.tree.map(lambda s, w: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=w), shapes, where)
    rows = sharding.batch_sharding(mesh)
    batch = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows) for k, x in toys.batch(8, 32).items()}
    with jax.set_mesh(mesh):
        loss_fn = loss_of(model, cfg, LossConfig(chunk_len=8))
        gradient = jax.jit(jax.grad(lambda p, b: loss_fn(p, b, None).sum), out_shardings=where)
        compiled = gradient.lower(params, batch).compile()
    kernels = sum(leaf.size * 4 for path, leaf in param_paths.flatten(shapes).items() if "layers" in path)
    assert compiled.memory_analysis().temp_size_in_bytes < kernels
    computation, reductions = "", []
    for line in compiled.as_text().splitlines():
        computation = line if line[:1] not in ("", " ", "}") else computation
        if " all-reduce(" in line and "f32[256,512]" in line:
            reductions.append(computation.split()[0])
    assert reductions == ["ENTRY"]
