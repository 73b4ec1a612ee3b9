"""Every mesh gives the training steps of one device: losses and gradients of five steps."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import optim, param_paths, step
from lm.config import Config, LossConfig, MeshConfig, OptimConfig
from lm.models import attention
from lm.parallel import ring_reduce, sharding
from lm.parallel.mesh import make_mesh
from tests import toys
from tests.test_step import assert_close

SEQ_LEN, ROWS, STEPS = 16, 8, 5
LOSS = LossConfig(z_loss=1e-3, label_smoothing=0.1, chunk_len=3)
STYLES = toys.STYLES | {"experts": toys.MOE, "bert": toys.BERT}


def mesh_of(**sizes):
    sizes = {"data": 1} | sizes
    return make_mesh(MeshConfig(**sizes), jax.devices()[: int(np.prod(list(sizes.values())))])


def steps_of(model, cfg, params, batch, mesh):
    """(loss, gradients) of each of five steps, with dropout; then the average and Adam's moments."""
    # Adam divides by the gradient's size: where that is rounding noise its direction is too. eps keeps it out.
    options = OptimConfig(schedule="constant", learning_rate=1e-2, eps=1e-3)
    adamw = optim.build(options, params, total_steps=10, warmup_steps=0, decay_steps=0)

    def update(grads, *rest):
        new, state, info = adamw.update(grads, *rest)
        return new, state, info | {"gradients": grads}

    one = functools.partial(
        step.train_step,
        loss_fn=toys.token_loss(model.apply, Config(model=cfg, loss=LOSS), SimpleNamespace(vocab_size=toys.VOCAB)),
        optimizer=adamw._replace(update=update),
        seed=3,
        micro_batches=1,
        ema_decay=0.9,
    )
    with jax.set_mesh(mesh):
        specs = param_paths.map_with_path(
            lambda _, axes: jax.NamedSharding(mesh, sharding.spec(axes)), model.logical_axes()
        )
        state = step.init_state(jax.device_put(params, specs), adamw, use_ema=True)
        placed = sharding.to_global(batch, sharding.local_rows(mesh, ROWS), ROWS, mesh)
        jitted, found = jax.jit(one), []
        for _ in range(STEPS):
            state, metrics = jitted(state, placed)
            found.append((metrics["loss"], metrics["gradients"]))
    return jax.device_get((found, (state.ema, state.opt_state[1].mu)))


@functools.cache
def on_one_device(style):
    heads = {"num_heads": 8, "head_dim": 4, "num_kv_heads": 8 if style == "gpt2" else 4}
    cfg, model, params = toys.decoder(dataclasses.replace(STYLES[style], dropout=0.2, **heads), SEQ_LEN)
    params, batch = jax.device_get(params), toys.batch(ROWS, SEQ_LEN)
    return model, cfg, params, batch, steps_of(model, cfg, params, batch, mesh_of())


@pytest.mark.parametrize(
    ("style", "sizes"),
    [
        ("llama", {"context": 2, "fsdp": 2, "tensor": 2}),
        ("llama", {"context": 8}),
        ("llama", {"tensor": 4, "data": 2}),
        ("llama", {"dcn_data": 2, "fsdp": 2, "tensor": 2}),
        ("gpt2", {"context": 4, "data": 2}),
        ("experts", {"expert": 2, "context": 2, "tensor": 2}),
        ("bert", {"fsdp": 2, "context": 2, "tensor": 2}),
    ],
    ids=str,
)
def test_a_mesh_takes_the_steps_of_one_device(style, sizes):
    """With packed rows whose documents span devices; the Llama style has a window and soft caps."""
    model, cfg, params, batch, (expected, expected_state) = on_one_device(style)
    ends = batch["segment_ids"].reshape(ROWS, sizes.get("context", 1), -1)
    assert "context" not in sizes or (ends[:, 1:, 0] == ends[:, :-1, -1]).any(), "documents go on on the next device"
    assert_the_same_steps(steps_of(model, cfg, params, batch, mesh_of(**sizes)), (expected, expected_state))


def assert_the_same_steps(found, expected):
    for (loss, gradients), (other_loss, other_gradients) in zip(found[0], expected[0], strict=True):
        assert loss == pytest.approx(other_loss, rel=1e-5)
        assert_close(gradients, other_gradients, 1e-5)
    for tree, other in zip(found[1], expected[1], strict=True):
        assert_close(tree, other, 1e-5)


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "context": 2}], ids=str)
def test_ring_reduced_gradients_equal_those_of_one_device(sizes, monkeypatch):
    """The matmuls of the layers are those of a TPU; the rows are too short for splash attention."""
    model, cfg, params, batch, expected = on_one_device("llama")
    summed, calls = ring_reduce.reduce_scatter_local, []
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")
    monkeypatch.setattr(ring_reduce, "reduce_scatter_local", lambda *args: calls.append(1) or summed(*args))
    found = steps_of(model, cfg, params, batch, mesh_of(**sizes))
    assert len(calls) == 8, "one for each kernel of the scanned layer, and one for the output projection"
    assert_the_same_steps(found, expected)


@pytest.mark.parametrize(
    "sizes", [{"data": 2}, {"data": 2, "tensor": 4}, {"data": 2, "context": 2, "tensor": 2}], ids=str
)
def test_residual_stream_is_sharded_over_tensor(sizes):
    """By the shape of what full remat keeps of each layer: its input."""
    cfg, model, params = toys.decoder(dataclasses.replace(STYLES["llama"], remat="full", num_heads=4), SEQ_LEN)
    mesh, batch = mesh_of(**sizes), toys.batch(ROWS, SEQ_LEN)
    loss_fn = toys.token_loss(model.apply, Config(model=cfg, loss=LOSS), SimpleNamespace(vocab_size=toys.VOCAB))
    with jax.set_mesh(mesh):
        placed = sharding.to_global(batch, sharding.local_rows(mesh, ROWS), ROWS, mesh)
        grad = jax.jit(jax.grad(lambda params: loss_fn(params, placed, jax.random.key(0)).sum))
        text = grad.lower(params).compile().as_text()
    parts = sizes.get("context", 1) * sizes.get("tensor", 1)
    kept = {n for n in (1, 2, 4) if f"f32[{cfg.num_layers},{ROWS // 2},{SEQ_LEN // n},{cfg.embed_dim}]" in text}
    assert kept == {parts}


# Attention over context -----------------------------------------------------------------------------------------------


def inputs(length, keys, width=4):
    """Query, key and value of 2 rows, 4 heads that share 2; segments of the queries and keys; weights of a loss."""
    rng = np.random.default_rng(0)
    query, weights = (jnp.asarray(rng.normal(size=(2, length, 4, width)), jnp.float32) for _ in range(2))
    key, value = (jnp.asarray(rng.normal(size=(2, keys, 2, width)), jnp.float32) for _ in range(2))
    segments = [
        jnp.asarray(np.stack([np.arange(size) * 3 // size + 1, np.arange(size) * 2 // size]), jnp.int32)
        for size in (length, keys)
    ]
    return (query, key, value), segments, weights


def value_and_gradients(fn, arrays, weights):
    total = jax.jit(jax.value_and_grad(lambda arrays: (fn(*arrays) * weights).sum()))
    return jax.device_get(total(arrays))


def assert_same(found, expected):
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    for one, other in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * float(np.abs(other).max()))


@pytest.mark.parametrize("form", ["window", "prefix and bias", "both sides", "another length of keys"])
def test_context_parallel_attention_equals_one_device(form):
    """Masks that the training steps above do not have."""
    length, keys = 16, 24 if form == "another length of keys" else 16
    arrays, (queries, others), weights = inputs(length, keys)
    mask = attention.Mask(queries, others, 5 if form == "window" else 0, causal=form in ("window", "prefix and bias"))
    if form == "prefix and bias":
        arrays += (jnp.asarray(np.random.default_rng(1).normal(size=(4, length, keys)), jnp.float32),)
        mask = mask.replace(is_prefix_BxS=jnp.asarray(np.arange(16) % 8 < 4, jnp.int32)[None].repeat(2, 0))

    def attend(query, key, value, bias=None):
        return attention.attend(query, key, value, mask.replace(bias_HxLxS=bias), softcap=3.0)

    expected = value_and_gradients(attend, arrays, weights)
    mesh = mesh_of(fsdp=2, context=2, tensor=2)
    with jax.set_mesh(mesh):
        assert_same(value_and_gradients(attend, arrays, weights), expected)


@pytest.mark.parametrize(("causal", "window"), [(True, 0), (True, 200), (False, 0)])
def test_context_parallel_splash_attention_equals_the_plain_form(causal, window):
    """Without a TPU. With a causal mask, devices exchange halves of their queries and get them back."""
    length = 2 * 2 * attention.SPLASH_TILE
    arrays, (queries, _), weights = inputs(length, length, width=8)
    others = queries if causal else queries[:, ::-1]  # an encoder's, say
    mask = attention.Mask(queries, others, window, causal=causal)
    expected = value_and_gradients(lambda *each: attention._dense(*each, mask, 3.0), arrays, weights)
    with jax.set_mesh(mesh_of(context=2)):
        assert attention.splash_fits(arrays[0], mask) and not attention.splash_fits(arrays[0][:, :256], mask)
        kernel = functools.partial(attention.splash, mask=mask, softcap=3.0, interpret=True)
        assert_same(value_and_gradients(kernel, arrays, weights), expected)


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_devices_have_equal_work_under_a_causal_mask(parts):
    order = attention._balanced_order(12 * parts, parts)
    assert sorted(order) == list(range(12 * parts))
    seen = (order + 1).reshape(parts, -1).sum(axis=1)
    assert seen.max() - seen.min() <= parts * 12 // 2, "at most one more key for each query of a half"
    assert attention._balanced_order(8, 2).tolist() == [0, 1, 6, 7, 4, 5, 2, 3]
