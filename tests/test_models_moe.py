"""lm/models/moe.py against a float64 loop over positions and experts; decoder properties with experts."""

import dataclasses
import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import losses, param_paths
from lm.config import Config, MeshConfig
from lm.config.schema import ConfigError
from lm.models import moe
from lm.parallel import sharding
from lm.parallel.mesh import make_mesh
from tests import test_models, toys
from tests.test_step import assert_close

B, L, D, F, X = 3, 5, 8, 6, 4


def made(seed=0, gated=True):
    """x, logits and kernels, float64."""
    rng = np.random.default_rng(seed)
    kernels = [rng.normal(size=(X, D, F)) for _ in range(2 if gated else 1)] + [rng.normal(size=(X, F, D))]
    return rng.normal(size=(B, L, D)), rng.normal(size=(B, L, X)), kernels


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def mixture(x, logits, kernels, choices):
    """One position and one expert after the other."""
    out = np.zeros_like(x)
    for at in np.ndindex(x.shape[:2]):
        p = softmax(logits[at])
        chosen = np.argsort(-p)[:choices]
        for e in chosen:
            *widen, down = (kernel[e] for kernel in kernels)
            wide = [x[at] @ kernel for kernel in widen]
            if len(wide) == 2:
                inner = wide[0] / (1 + np.exp(-wide[0])) * wide[1]
            else:
                u = wide[0]
                inner = u / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3)))
            gate = p[e] / p[chosen].sum() if choices > 1 else p[e]
            out[at] += gate * inner @ down
    return out


@pytest.mark.parametrize(("choices", "gated"), [(1, True), (2, True), (2, False), (X, True)])
def test_experts_and_their_gradients_equal_a_loop_over_experts(choices, gated):
    x, logits, kernels = made(gated=gated)
    rng = np.random.default_rng(1)
    weights = rng.normal(size=x.shape)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
    def run(x, logits, kernels):
        y, chosen = moe.apply_experts(x, logits, kernels, choices)
        return (y * weights.astype(np.float32)).sum(), (y, chosen)

    small = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (x, logits, tuple(kernels)))
    (_, (y, chosen)), grads = run(*small)
    np.testing.assert_allclose(y, mixture(x, logits, kernels, choices), rtol=0, atol=2e-5)
    np.testing.assert_array_equal(chosen, np.argsort(-logits, axis=-1)[..., :choices])
    # Every array's gradient along a direction, by differences in float64. Small steps change no choice.
    arrays, found = [x, logits, *kernels], [grads[0], grads[1], *grads[2]]
    for number, gradient in enumerate(found):
        direction, step = rng.normal(size=arrays[number].shape), 1e-6
        ends = []
        for sign in (1, -1):
            moved = [a + sign * step * direction if i == number else a for i, a in enumerate(arrays)]
            ends.append((mixture(moved[0], moved[1], moved[2:], choices) * weights).sum())
        expected = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose((np.float64(gradient) * direction).sum(), expected, rtol=1e-4, atol=1e-4)
        assert np.abs(gradient).max() > 0 or (number == 1 and choices == X == 1)


def test_no_position_is_dropped_when_all_choose_one_expert():
    x, logits, kernels = made()
    logits[..., 2] += 100
    y, chosen = moe.apply_experts(*jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (x, logits, tuple(kernels))), 1)
    assert (np.asarray(chosen) == 2).all()
    np.testing.assert_allclose(y, mixture(x, logits, kernels, 1), rtol=0, atol=2e-5)


def test_megablox_equals_ragged_dot():
    """Values and gradients, without a TPU: an empty group, groups that are no multiple of a tile, rows of no group."""
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(256, 128)).astype(np.float32), rng.normal(size=(3, 128, 128)).astype(np.float32)
    weights, sizes = rng.normal(size=(256, 128)).astype(np.float32), jnp.array([100, 0, 77], jnp.int32)
    x[177:] = np.nan

    def run(interpret):
        def total(x, kernel):
            return (moe.grouped_matmul(x, kernel, sizes, interpret=interpret) * weights).sum()

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(x, kernel)

    (total, gradients), (expected, others) = run(True), run(False)
    rows = np.concatenate([x[:100] @ kernel[0], x[100:177] @ kernel[2]])
    np.testing.assert_allclose([total, expected], (rows * weights[:177]).sum(), rtol=1e-4)
    for found, other in zip(gradients, others, strict=True):
        np.testing.assert_allclose(found, other, rtol=0, atol=1e-5 * float(jnp.abs(other).max()))


def test_load_balance_is_over_the_real_positions_of_each_row():
    _, logits, _ = made()
    segments = np.array([[1, 1, 2, 2, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]], np.int32)
    chosen = np.argsort(-logits, axis=-1)[..., :2]
    balance = jax.jit(moe.load_balance)
    found = balance(jnp.asarray(logits, jnp.float32), jnp.asarray(chosen), jnp.asarray(segments))
    for b, real in enumerate((4, 1, 0)):
        share, p = np.zeros(X), np.zeros(X)
        for t in range(real):
            share[chosen[b, t]] += 1 / (2 * real)
            p += softmax(logits[b, t]) / real
        np.testing.assert_allclose(found[0, b], X * (share * p).sum(), rtol=1e-5)
        z = np.log(np.exp(logits[b, :real]).sum(-1)) ** 2
        np.testing.assert_allclose(found[1, b], z.mean() if real else 0, rtol=1e-5)
    even = balance(jnp.zeros((1, X, X)), jnp.arange(X)[None, :, None], jnp.ones((1, X), jnp.int32))
    np.testing.assert_allclose(even[0], 1.0, rtol=1e-6)


@pytest.mark.parametrize(
    "holds",
    [
        test_models.test_packed_equals_unpacked,
        functools.partial(test_models.test_another_document_changes_nothing_bitwise, seq_len=test_models.SEQ_LEN),
    ],
    ids=["packed", "documents"],
)
def test_decoder_properties_hold_with_experts(holds, monkeypatch):
    monkeypatch.setitem(toys.STYLES, "experts", toys.MOE)
    holds("experts")


def value_and_gradients(params, batch, **changes):
    cfg, model, _ = toys.decoder(dataclasses.replace(toys.MOE, **changes), 12)
    whole, words = Config(model=cfg), SimpleNamespace(vocab_size=toys.VOCAB)

    def total(params):
        terms = toys.token_loss(model.apply, whole, words)(params, batch, None)
        return terms.sum, terms

    (_, terms), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    return terms, grads


def test_gradients_do_not_depend_on_remat_unrolling_or_micro_batches():
    """The router's losses are per row: those of two micro-batches add up to those of the batch."""
    _, _, params = toys.decoder(toys.MOE, 12)
    batch = toys.batch(4, 12)
    terms, grads = value_and_gradients(params, batch)
    _, others = value_and_gradients(params, batch, remat="minimal", unroll=0)
    assert_close(others, grads, 1e-5)
    parts = [value_and_gradients(params, {key: x[rows] for key, x in batch.items()}) for rows in ([0, 2], [1, 3])]
    assert_close(jax.tree.map(jnp.add, parts[0][1], parts[1][1]), grads, 1e-5)
    np.testing.assert_allclose(parts[0][0].sum + parts[1][0].sum, terms.sum, rtol=1e-6)
    uneven, weight = terms.metrics["balance"]
    assert weight == batch["loss_weights"].sum() and uneven > weight
    more = float(terms.sum - terms.metrics["nll"][0])
    assert more > losses.LOAD_BALANCE * uneven, "and the router's z-loss"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__num_experts": 4, "model__experts_per_token": 5}, "'model.experts_per_token' is 5; expected 1 to 4"),
        ({"model__num_experts": 4, "model__experts_per_token": 0}, "'model.experts_per_token' is 0; expected 1 to 4"),
        ({"mesh__expert": 2}, "'mesh.expert' splits experts, but 'model.num_experts' is 0: set mesh.fsdp instead"),
        (
            {"model__kind": "vit", "model__position": "sincos", "model__num_experts": 4, "model__experts_per_token": 2},
            "'model.num_experts' is for models of text; 'model.kind' vit",
        ),
    ],
)
def test_options_that_experts_do_not_support_are_refused(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        toys.recipe(tmp_path, **changes)


def test_a_mesh_that_does_not_divide_the_experts_is_refused():
    cfg, model, _ = toys.decoder(dataclasses.replace(toys.MOE, num_experts=6, experts_per_token=2), 12)
    axes = param_paths.flatten(model.logical_axes())
    shapes = jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)))
    shapes = {path: leaf.shape for path, leaf in param_paths.flatten(shapes).items()}
    assert shapes["decoder/layers/mlp/down_kernel"] == (cfg.num_layers, 6, cfg.mlp_dim, cfg.embed_dim)
    mesh = make_mesh(MeshConfig(expert=4))
    with pytest.raises(ConfigError, match=r"^mesh.expert=4 does not divide 'experts' \(6\) of parameter '.*_kernel'"):
        sharding.check_divisible(shapes, axes, mesh)
