"""lm/losses/contrastive.py against loops in float64 numpy, on one device and on eight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from lm.config import Config, MeshConfig
from lm.evaluation import scores
from lm.losses import contrastive
from lm.parallel.mesh import make_mesh
from lm.tasks import TASKS
from lm.types import ModelOutput
from tests import toys

B, P = 8, 5
WEIGHTS = np.array([1, 1, 0, 1, 1, 0.5, 1, 0], np.float32)


def brute_force(z, weights, temperature, symmetric):
    """(sum, correct) by the papers' equations, one anchor after the other."""
    z = z / np.linalg.norm(z, axis=-1, keepdims=True)
    rows = [i for i in range(len(z)) if weights[i] > 0]
    views = z.shape[1]
    total = correct = 0.0
    for i in rows:
        looking = (0, 1) if symmetric else (0,)
        for a in looking:
            among = [(j, c) for j in rows for c in range(0 if symmetric else 1, views) if (j, c) != (i, a)]
            scores = [z[i, a] @ z[j, c] / temperature for j, c in among]
            own = z[i, a] @ z[i, 1 - a] / temperature
            share = weights[i] / len(looking)
            total += share * (np.log(np.sum(np.exp(scores))) - own)
            correct += share * (own >= max(scores) - 1e-12)
    return total, correct


def numeric_gradient(function, x, step=1e-5):
    out = np.zeros_like(x)
    for at in np.ndindex(x.shape):
        moved = [x.copy(), x.copy()]
        moved[0][at] += step
        moved[1][at] -= step
        out[at] = (function(moved[0]) - function(moved[1])) / (2 * step)
    return out


def make_views(views, seed=0):
    """Views of a row are alike, so that some but not all are found; lengths differ."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(B, 1, P)) + 0.7 * rng.normal(size=(B, views, P))
    return (z * rng.uniform(0.3, 3, size=(B, views, 1))).astype(np.float32)


def on_mesh(function, mesh_cfg, *arrays):
    """The jitted function of arrays whose rows are split over a mesh; None = one device and no mesh."""
    if mesh_cfg is None:
        return jax.jit(function)(*arrays)
    mesh = make_mesh(mesh_cfg)
    with jax.set_mesh(mesh):
        rows = jax.NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        return jax.jit(function)(*(jax.device_put(x, rows) for x in arrays))


MESHES = {"one": None, "eight": MeshConfig(data=4, fsdp=2)}


@pytest.mark.parametrize(
    ("mesh", "views", "symmetric"),
    [("one", 2, True), ("one", 3, True), ("one", 2, False), ("one", 3, False), ("eight", 2, True), ("eight", 3, False)],
)
def test_contrastive_is_the_papers_equation(mesh, views, symmetric):
    z = make_views(views)

    def loss(z, weights):
        terms = contrastive.info_nce(z, weights, temperature=0.2, symmetric=symmetric)
        return terms.sum, terms

    (_, terms), grad = on_mesh(jax.value_and_grad(loss, has_aux=True), MESHES[mesh], z, WEIGHTS)
    total, correct = brute_force(z.astype(np.float64), WEIGHTS, 0.2, symmetric)
    np.testing.assert_allclose(terms.sum, total, rtol=2e-6)
    np.testing.assert_allclose(terms.weight, WEIGHTS.sum(), rtol=1e-6)
    np.testing.assert_allclose(terms.metrics["accuracy"], (correct, WEIGHTS.sum()), rtol=1e-6)
    assert 0 < correct < WEIGHTS.sum()
    expected = numeric_gradient(lambda z: brute_force(z, WEIGHTS, 0.2, symmetric)[0], z.astype(np.float64))
    np.testing.assert_allclose(grad, expected, rtol=0, atol=3e-6 * np.abs(expected).max())


def test_rows_of_weight_0_change_nothing_even_when_not_finite():
    z = make_views(2)
    junk = np.where((WEIGHTS == 0)[:, None, None], np.nan, z).astype(np.float32)

    def loss(z):
        return contrastive.info_nce(z, jnp.asarray(WEIGHTS), temperature=0.05, symmetric=True).sum

    run = jax.jit(jax.value_and_grad(loss))
    (value, grad), clean = run(junk), run(z)
    np.testing.assert_array_equal(value, clean[0])
    np.testing.assert_array_equal(grad, clean[1])
    assert np.all(np.asarray(grad)[WEIGHTS == 0] == 0)


def test_contrastive_of_no_rows_is_0_and_of_one_view_refused():
    def loss(z):
        terms = contrastive.info_nce(z, jnp.zeros(B), temperature=0.05, symmetric=True)
        return terms.sum, terms

    (_, terms), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(make_views(2))
    assert all(np.all(x == 0) for x in jax.tree.leaves((terms, grad)))
    with pytest.raises(ValueError, match=r"z is \(8, 1, 5\), expected two or more views"):
        contrastive.info_nce(make_views(1), jnp.ones(B), temperature=0.05, symmetric=False)


# The task and its scores ----------------------------------------------------------------------------------------------


def made_up_apply(params, batch, *, rng=None, cache=None):
    """A head that tells its input apart, and whose 'dropout' is a function of the row's example index alone."""
    z_BxP = batch["tokens"].astype(jnp.float32) @ params
    if rng is not None:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, batch["example_index"])
        z_BxP += jax.vmap(lambda key: jax.random.normal(key, (P,)))(keys)
    return ModelOutput(None, None, head=z_BxP)


@pytest.mark.parametrize(("views", "training"), [(1, True), (1, False), (3, True)])
def test_each_view_has_its_own_dropout(views, training):
    rng = np.random.default_rng(0)
    params = jnp.asarray(rng.normal(size=(4, P)), jnp.float32)
    tokens = rng.integers(0, 3, (B, views, 4)).astype(np.int32)
    batch = {"tokens": tokens, "row_weights": WEIGHTS, "example_index": np.arange(100, 100 + B, dtype=np.int32)}
    cfg = Config(task=toys.task("contrastive_sentences", temperature=0.2))
    loss_fn = TASKS["contrastive_sentences"].loss(made_up_apply, cfg, None)
    key = jax.random.key(0) if training else None
    terms = jax.jit(loss_fn)(params, batch, key)
    seen = [tokens[:, min(v, views - 1)] for v in range(max(2, views))]
    index = [(v << 29) ^ batch["example_index"] for v in range(len(seen))]
    z = [
        made_up_apply(params, {"tokens": t, "example_index": i}, rng=key).head for t, i in zip(seen, index, strict=True)
    ]
    assert np.array_equal(z[0], z[1]) == (views == 1 and not training)
    z = np.stack([np.asarray(x, np.float64) for x in z], axis=1)
    np.testing.assert_allclose(terms.sum, brute_force(z, WEIGHTS, 0.2, False)[0], rtol=1e-5)
    np.testing.assert_allclose(terms.outputs["first"], z[:, 0], rtol=1e-6)
    np.testing.assert_allclose(terms.outputs["second"], z[:, 1], rtol=1e-6)


def test_alignment_and_uniformity_are_those_of_all_pairs():
    z = make_views(2).astype(np.float64)
    found = scores.views(z[:, 0], z[:, 1])
    unit = z / np.linalg.norm(z, axis=-1, keepdims=True)
    distances = [np.sum((unit[i, 0] - unit[j, 0]) ** 2) for i in range(B) for j in range(B) if i != j]
    assert found["alignment"] == pytest.approx(np.mean([np.sum((a - b) ** 2) for a, b in unit]))
    assert found["uniformity"] == pytest.approx(np.log(np.mean(np.exp(-2 * np.array(distances)))))
    assert scores.views(np.zeros((1, P)), np.zeros((1, P))) == {"alignment": 0.0, "uniformity": 0.0}
    rng = np.random.default_rng(0)
    many = rng.normal(size=(1500, 3)).astype(np.float32)  # more than one block of rows
    unit = many / np.linalg.norm(many, axis=1, keepdims=True)
    near = np.exp(-2 * np.square(unit[:, None] - unit[None]).sum(axis=-1, dtype=np.float64))
    expected = np.log((near.sum() - 1500) / (1500 * 1499))
    assert scores.views(many, many)["uniformity"] == pytest.approx(expected, rel=1e-5)
