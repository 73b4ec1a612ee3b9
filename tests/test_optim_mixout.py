"""Mixout (Lee et al. 2020): entries of kernels are randomly replaced by their initial values."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import param_paths, step
from lm.optim import trainable
from lm.types import LossTerms
from tests.test_optim_trainable import BASE, LAST_TWO, SHAPES, build, random_tree


def test_mixout_follows_the_paper_with_a_mask_by_step_and_path():
    """Lee et al. 2020, section 4: each entry is one of two values, their mean is the parameter; kernels only."""
    now, start, rate = random_tree(0), random_tree(1), 0.25
    del start["head"]
    keys = [jax.random.fold_in(jax.random.key(5), number) for number in range(400)]
    mixed = jax.vmap(lambda key: step.mix(now, start, rate, key))(jnp.stack(keys))
    for path, leaf in param_paths.flatten(mixed).items():
        w = np.asarray(param_paths.flatten(now)[path], np.float64)
        if path != "decoder/layers/mlp/up/kernel":  # no kernel, or no start
            np.testing.assert_array_equal(leaf, np.broadcast_to(np.float32(w), leaf.shape))
            continue
        u = np.asarray(param_paths.flatten(start)[path], np.float64)
        kept, replaced = (w - rate * u) / (1 - rate), (u - rate * u) / (1 - rate)
        leaf = np.asarray(leaf, np.float64)
        is_kept = np.abs(leaf - kept) < 1e-5
        np.testing.assert_allclose(leaf, np.where(is_kept, kept, replaced), rtol=1e-5, atol=1e-6)
        assert is_kept.mean() == pytest.approx(1 - rate, abs=0.01)
        spread = np.abs(w - u) * np.sqrt(rate / (1 - rate) / len(keys))
        assert (np.abs(leaf.mean(0) - w) < 5 * spread + 1e-6).all()
    same, other = (param_paths.flatten(step.mix(now, start, rate, key)) for key in keys[:2])
    path = "decoder/layers/mlp/up/kernel"
    np.testing.assert_array_equal(same[path], param_paths.flatten(mixed)[path][0])
    assert not np.array_equal(same[path], other[path])
    assert step.mix(now, start, 0.0, keys[0]) is now
    twins = {name: {"kernel": jnp.ones((8, 8))} for name in ("a", "b")}
    masks = step.mix(twins, jax.tree.map(jnp.zeros_like, twins), 0.5, keys[0])
    assert not np.array_equal(masks["a"]["kernel"], masks["b"]["kernel"])


def test_mixout_changes_only_where_the_gradient_is_taken():
    """The gradient is taken at the mixture, times m / (1 - rate); the update starts from the unmixed parameters."""

    def loss_fn(params, batch, rng):  # sum of w^3: its gradient, 3 w^2, says where it was taken
        total = sum(jnp.sum(leaf**3) for leaf in jax.tree.leaves(params)) * batch["labels"].mean()
        return LossTerms(total, jnp.float32(2.0), {})

    params = random_tree(0)
    optimizer = build(dataclasses.replace(BASE, lr_rules=LAST_TWO), params)
    seen = optimizer._replace(init=lambda p: (), update=lambda grads, state, p, step, start: (grads, state, {}))
    kernels = {path: path.endswith("up/kernel") for path in SHAPES}
    state = step.init_state(params, seen, use_ema=False, anchored=kernels)
    state = state._replace(step=jnp.int32(4), start=jax.tree.map(jnp.zeros_like, state.start))
    one = functools.partial(step.train_step, loss_fn=loss_fn, optimizer=seen, seed=3, micro_batches=2, ema_decay=0.0)
    got = param_paths.flatten(jax.jit(functools.partial(one, mixout=0.5))(state, {"labels": jnp.ones(4)})[0].params)
    part = trainable.trained_part(optimizer.selection, params)
    mixed = param_paths.flatten(step.mix(part, state.start, 0.5, jax.random.fold_in(jax.random.key(3), 4)))
    assert not np.array_equal(mixed["decoder/layers/mlp/up/kernel"], part["decoder"]["layers"]["mlp"]["up"]["kernel"])
    for path, w in param_paths.flatten(part).items():
        mask = np.asarray(mixed[path]) / np.asarray(w)  # 0 or 2, as the start is 0; 1 where nothing is mixed
        want = 3 * np.asarray(mixed[path], np.float64) ** 2 / 2 * mask  # / 2: two halves of 1 over two weights of 2
        np.testing.assert_allclose(got[path][-len(w) :], want, rtol=1e-5, atol=1e-7, err_msg=path)
