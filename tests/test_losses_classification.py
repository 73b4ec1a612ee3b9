"""lm/losses/classification.py against float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import losses
from tests.test_losses_contrastive import MESHES, WEIGHTS, on_mesh
from tests.test_losses_cross_entropy import B, L, assert_leaf_close

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_class_cross_entropy_equals_float64(smoothing):
    logits = (5 * RNG.standard_normal((7, 4))).astype(np.float32)
    labels, weights = RNG.integers(0, 4, 7).astype(np.int32), np.array([1, 1, 0, 2, 0.5, 1, 0], np.float32)
    labels[2], logits[6] = 99, np.nan  # no weight, no harm
    terms = losses.class_cross_entropy(logits, labels, weights, label_smoothing=smoothing)
    wide = np.nan_to_num(logits.astype(np.float64))
    log_probs = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    nll = -log_probs[np.arange(7), np.clip(labels, 0, 3)]
    loss = (1 - smoothing) * nll - smoothing * log_probs.mean(axis=1)
    assert float(terms.sum) == pytest.approx((weights * loss).sum(), rel=1e-6)
    assert float(terms.weight) == weights.sum()
    assert float(terms.metrics["nll"][0]) == pytest.approx((weights * nll).sum(), rel=1e-6)
    right = (wide.argmax(axis=1) == labels) * weights
    assert float(terms.metrics["accuracy"][0]) == right.sum()
    gradient = jax.grad(lambda x: losses.class_cross_entropy(x, labels, weights, label_smoothing=smoothing).sum)(logits)
    target = (1 - smoothing) * np.eye(4)[np.clip(labels, 0, 3)] + smoothing / 4
    np.testing.assert_allclose(gradient, weights[:, None] * (np.exp(log_probs) - target), atol=1e-6)
    assert np.isnan(losses.class_cross_entropy(logits, labels, np.ones(7, np.float32)).sum)


def test_squared_error_and_divergence_equal_float64():
    a, b = (RNG.standard_normal(6).astype(np.float32) for _ in range(2))
    weights = np.array([1, 0, 2, 1, 0, 1], np.float32)
    a[1] = np.nan
    terms = losses.squared_error(a, b, weights)
    want = (weights * np.nan_to_num(a.astype(np.float64) - b) ** 2).sum()
    assert float(terms.sum) == pytest.approx(want, rel=1e-6) and float(terms.weight) == 5
    p, q = (np.asarray(jax.nn.softmax(RNG.standard_normal((6, 3)), axis=-1), np.float64) for _ in range(2))
    both = ((p * np.log(p / q)).sum(axis=1) + (q * np.log(q / p)).sum(axis=1)) / 2
    got = losses.symmetric_divergence(np.log(p).astype(np.float32), np.log(q).astype(np.float32), weights)
    assert float(got) == pytest.approx((weights * both).sum(), rel=1e-5)


def test_span_cross_entropy_is_that_of_float64_numpy():
    """Row by row over the allowed positions alone; rows of weight 0 may hold anything, and get no gradient."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(B, L, 2)).astype(np.float32) * 3
    allowed = rng.random((B, L)) < 0.6
    allowed[:, :2] = True
    labels = np.array([rng.choice(np.flatnonzero(row), 2) for row in allowed], np.int32)
    weights = rng.random(B).astype(np.float32)
    weights[[2, 5]] = 0
    logits[2], labels[2], allowed[5] = np.nan, 99, False

    def total(logits):
        terms = losses.span_cross_entropy(logits, labels, allowed, weights)
        return terms.sum, terms

    (_, terms), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(logits)
    expected, correct, expected_grads = 0.0, 0.0, np.zeros(logits.shape)
    for row in np.flatnonzero(weights):
        places, both = np.flatnonzero(allowed[row]), []
        for side in range(2):
            x = logits[row, places, side].astype(np.float64)
            p = np.exp(x) / np.exp(x).sum()
            expected -= weights[row] * np.log(p[places == labels[row, side]])[0] / 2
            expected_grads[row, places, side] = weights[row] * (p - (places == labels[row, side])) / 2
            both.append(places[x.argmax()] == labels[row, side])
        correct += weights[row] * all(both)
    np.testing.assert_allclose(terms.sum, expected, rtol=1e-5)
    np.testing.assert_allclose(terms.weight, weights.sum(), rtol=1e-6)
    np.testing.assert_allclose(terms.metrics["accuracy"][0], correct, rtol=1e-6)
    assert_leaf_close(grads, expected_grads)
    real = terms.outputs["span_logits"][0]
    np.testing.assert_array_equal(real, np.where(allowed[0, :, None], logits[0], np.float32(losses.MASKED_LOGIT)))


@pytest.mark.parametrize("label", [-1, L, 3])
def test_a_weighted_span_that_is_not_allowed_gives_nan(label):
    allowed = np.ones((2, L), bool)
    allowed[:, 3] = False
    labels = np.array([[1, 1], [1, label]], np.int32)
    logits = jnp.zeros((2, L, 2))
    assert np.isnan(losses.span_cross_entropy(logits, labels, allowed, np.ones(2, np.float32)).sum)
    assert np.isfinite(losses.span_cross_entropy(logits, labels, allowed, np.array([1.0, 0.0], np.float32)).sum)


@pytest.mark.parametrize("mesh", MESHES)
def test_patch_mse_is_that_of_normalised_hidden_patches(mesh):
    rng = np.random.default_rng(0)
    patches = rng.normal(size=(B, 6, 12)).astype(np.float32) * rng.uniform(0.1, 3, size=(B, 6, 1)).astype(np.float32)
    patches[1, 4] = 0.25  # of one colour
    prediction = rng.normal(size=(B, 6, 12)).astype(np.float32)
    masked = np.array([rng.permutation(6)[:4] for _ in range(B)], np.int32)
    masked[1] = [4, 0, 5, 2]
    prediction[7] = np.nan  # of weight 0

    def loss(prediction, patches, masked, weights):
        terms = losses.patch_mse(prediction, patches, masked, weights)
        return terms.sum, terms

    gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (_, terms), grads = on_mesh(gradients, MESHES[mesh], prediction, patches, masked, WEIGHTS)
    total, d_prediction = 0.0, np.zeros(prediction.shape)
    for b, t in [(row, place) for row in range(B) for place in masked[row] if WEIGHTS[row]]:
        target = patches[b, t].astype(np.float64)
        target = (target - target.mean()) / np.sqrt(target.var() + 1e-6)
        error = prediction[b, t] - target
        total += WEIGHTS[b] * np.mean(error**2)
        d_prediction[b, t] = WEIGHTS[b] * 2 * error / 12
    np.testing.assert_allclose(terms.sum, total, rtol=2e-6)
    np.testing.assert_allclose(terms.weight, 4 * WEIGHTS.sum(), rtol=1e-6)
    np.testing.assert_allclose(grads[0], d_prediction, rtol=0, atol=3e-6 * np.abs(d_prediction).max())
    assert np.all(np.asarray(grads[1]) == 0), "targets get no gradient"
