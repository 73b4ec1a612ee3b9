"""Learning rates over a run, against worked arrays."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import optim
from lm.config import OptimConfig
from lm.config.schema import ConfigError
from tests.test_optim import random_tree, standard


def rates(steps, total=10, warmup=4, decay=0, **cfg):
    cfg = OptimConfig(**({"learning_rate": 1.0} | cfg))
    fn = optim.schedule(cfg, total_steps=total, warmup_steps=warmup, decay_steps=decay)
    out = jax.jit(fn)(jnp.asarray(steps, jnp.int32))
    assert out.dtype == jnp.float32
    return np.asarray(out)


@pytest.mark.parametrize(
    ("name", "decay", "after_warmup"),
    [
        ("constant", 0, [1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", 0, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0, 0]),
        ("wsd", 3, [1, 1, 1, 1, 2 / 3, 1 / 3, 0, 0]),
    ],
)
def test_schedule_is_the_documented_array(name, decay, after_warmup):
    got, expected = rates(range(12), decay=decay, schedule=name), np.float32([1 / 4, 2 / 4, 3 / 4, 1, *after_warmup])
    np.testing.assert_array_max_ulp(got, expected, maxulp=1)  # XLA divides by a constant n as times 1/n
    exact = (expected * 4) % 1 == 0  # the warm-up, the peak, the end
    np.testing.assert_array_equal(got[exact], expected[exact])


def test_curved_schedules_are_the_documented_arrays():
    cosine = [0.5 + 0.5 * math.cos(math.pi * x / 6) for x in range(6)]
    np.testing.assert_allclose(rates(range(4, 10), schedule="cosine"), cosine, rtol=1e-6)
    rsqrt = [math.sqrt(4 / (step + 1)) for step in range(4, 12)]
    np.testing.assert_allclose(rates(range(4, 12), schedule="rsqrt"), rsqrt, rtol=1e-6)
    for name in ("cosine", "rsqrt"):
        np.testing.assert_array_equal(rates(range(4), schedule=name), np.float32([0.25, 0.5, 0.75, 1]))


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd"])
@pytest.mark.parametrize("phase", [1, 7, 41, 55])  # float32: 41 * (1 / 41) and 55 * (1 / 55) are not 1
def test_schedule_is_exactly_at_the_peak_and_the_end_at_its_boundaries(name, phase):
    decay = phase if name == "wsd" else 0
    total = 2 * phase + decay
    kwargs = {"warmup": phase, "decay": decay, "schedule": name, "learning_rate": 3e-4, "end_lr_ratio": 0.1}
    peak, end = np.float32(3e-4), np.float32(3e-4) * np.float32(0.1)
    np.testing.assert_array_equal(rates([phase - 1, phase, total - phase], total, **kwargs), [peak] * 3)
    np.testing.assert_array_equal(rates([total, total + 1, total + 5000], total, **kwargs), [end] * 3)
    assert phase == 1 or rates([phase - 2], total, **kwargs) < peak
    inside = rates([total - phase + 1, total - 1], total, **kwargs)
    assert phase == 1 or np.all((end < inside) & (inside < peak))


def test_schedule_without_warmup_starts_at_the_peak():
    np.testing.assert_array_equal(rates(range(3), total=4, warmup=0, schedule="linear"), np.float32([1, 0.75, 0.5]))


def test_run_that_is_all_warmup_ends_at_the_peak():
    np.testing.assert_array_equal(rates(range(4), total=4, warmup=4, schedule="cosine"), np.float32([1, 2, 3, 4]) / 4)


@pytest.mark.parametrize(
    ("cfg", "lengths", "message"),
    [
        ({}, (10, 11, 0), r"'optim\.warmup_\*' \(11 steps\).*'train\.total_\*' \(10 steps\)"),
        ({"schedule": "wsd"}, (10, 6, 5), r"'optim\.decay_\*' \(5 steps\).*'train\.total_\*' \(10 steps\)"),
        ({"schedule": "wsd"}, (10, 6, 0), r"wsd, but no 'optim\.decay_steps"),
        ({"schedule": "rsqrt"}, (10, 0, 0), r"rsqrt, but no 'optim\.warmup"),
    ],
)
def test_schedule_that_does_not_fit_is_refused(cfg, lengths, message):
    total, warmup, decay = lengths
    with pytest.raises(ConfigError, match=message):
        optim.schedule(OptimConfig(**cfg), total_steps=total, warmup_steps=warmup, decay_steps=decay)


def test_learning_rate_comes_from_the_global_step_not_from_the_state():
    params, grads, optimizer = random_tree(0), random_tree(1), standard("adamw")
    update, fresh, used = jax.jit(optimizer.update), optimizer.init(params), optimizer.init(params)
    for step in range(3):
        _, used, _ = update(grads, used, params, jnp.int32(step))
    for state in (fresh, used):
        got = [update(grads, state, params, jnp.int32(step))[2]["learning_rate"] for step in range(6)]
        np.testing.assert_array_equal(got, rates(range(6), total=5, warmup=0, schedule="linear"))
