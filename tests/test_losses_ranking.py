"""lm/losses/ranking.py: the rank of the chosen item, and metrics of ranks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics

from lm.config import MeshConfig
from lm.evaluation import scores
from lm.losses import ranking
from lm.parallel import sharding
from lm.parallel.mesh import make_mesh
from tests.test_tasks_recommendation import MISSED, VOCABULARY, brute_rank


def whole_numbers(rows: int, length: int, width: int, vocab: int, seed: int):
    """Small whole numbers, so that logits are exact in any order of summation, with many ties."""
    rng = np.random.default_rng(seed)
    hidden = rng.integers(-2, 3, (rows, length, width)).astype(np.float32)
    unembed = rng.integers(-2, 3, (width, vocab)).astype(np.float32)
    targets = rng.integers(0, 11, (rows, length)).astype(np.int32)
    weights = (rng.random((rows, length)) < 0.5).astype(np.float32)
    weights[:, 0] = 1
    return hidden, unembed, targets, weights


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("mesh_sizes", [{"data": 1}, {"data": 8}, {"data": 2, "tensor": 4}])
def test_ranks_are_those_of_a_sort(mesh_sizes, softcap):
    devices = jax.devices()[: mesh_sizes["data"] * mesh_sizes.get("tensor", 1)]
    mesh = make_mesh(MeshConfig(**mesh_sizes), devices)
    hidden, unembed, targets, weights = whole_numbers(32, 5, 3, 16, seed=1)
    placed = sharding.to_global(
        {"hidden": hidden, "targets": targets, "weights": weights}, sharding.local_rows(mesh, 32), 32, mesh
    )

    @jax.jit
    def ranked(batch, unembed_DxV):
        unembed_DxV = sharding.constrain(unembed_DxV, None, "vocab")
        is_item_V = jnp.asarray(~VOCABULARY.is_control_V)
        return ranking.target_rank(
            batch["hidden"], unembed_DxV, batch["targets"], batch["weights"], is_item_V, softcap=softcap
        )

    with jax.set_mesh(mesh):
        got = jax.device_get(ranked(placed, jax.device_put(unembed, sharding.replicated(mesh))))
    candidates = set(np.flatnonzero(~VOCABULARY.is_control_V).tolist())
    want = []
    for row in range(32):
        last = max(np.flatnonzero(weights[row]))
        logits = hidden[row, last].astype(np.float64) @ unembed.astype(np.float64)
        want.append(brute_rank(logits, int(targets[row, last]), candidates))
    assert got.tolist() == want and got.dtype == np.int32
    assert {2, 4, 5, MISSED} <= set(want)


def test_constant_or_nan_logits_rank_the_target_last():
    for value in (0.0, np.nan):
        hidden = np.full((2, 1, 3), value, np.float32)
        targets, weights = np.array([[3], [7]], np.int32), np.ones((2, 1), np.float32)
        is_item_V = jnp.asarray(~VOCABULARY.is_control_V)
        got = ranking.target_rank(hidden, jnp.ones((3, 16)), jnp.asarray(targets), jnp.asarray(weights), is_item_V)
        assert got.tolist() == [5, 5]


def test_hit_rate_and_ndcg_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    by_item = rng.random((40, 30))
    target = rng.integers(0, 30, 40)
    relevant = (np.arange(30)[None] == target[:, None]).astype(int)
    ranks = np.array([brute_rank(row, int(t), set(range(30))) for row, t in zip(by_item, target, strict=True)])
    found = scores.ranking(ranks.astype(np.int32))
    assert found["ndcg_at_10"] == pytest.approx(sklearn.metrics.ndcg_score(relevant, by_item, k=10), rel=1e-12)
    hits = sklearn.metrics.top_k_accuracy_score(target, by_item, k=10, labels=np.arange(30))
    assert found["hr_at_10"] == pytest.approx(hits) and 0 < hits < 1
    missed = scores.ranking(np.full(3, MISSED, np.int32))
    assert missed == scores.ranking(np.zeros(0, np.int32)) == {"hr_at_10": 0.0, "ndcg_at_10": 0.0}
