"""One training step and one evaluation step: pure functions, the same for every model, objective and mesh."""

from typing import Any

import jax
import jax.numpy as jnp

from lm import trees
from lm.objectives import LossFn
from lm.optim import Optimizer
from lm.types import Batch, LossTerms, Params, TrainState

Metrics = dict[str, Any]


def init_state(params: Params, optimizer: Optimizer, *, use_ema: bool) -> TrainState:
    """The state before the first step; the average starts at the parameters."""
    trained, _ = trees.split(params, optimizer.trained)
    ema = jax.tree.map(jnp.copy, trained) if use_ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(trained), ema, jnp.zeros((), jnp.int32))


def eval_params(state: TrainState) -> Params:
    """The parameters to evaluate: the average of the trained ones where there is one."""
    if state.ema is None:
        return state.params
    return trees.unflatten(trees.flatten(state.params) | trees.flatten(state.ema))


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    loss_fn: LossFn,
    optimizer: Optimizer,
    seed: int,
    micro_batches: int,
    ema_decay: float,
) -> tuple[TrainState, Metrics]:
    """One step on one global batch.

    The gradient is that of the summed loss over all micro-batches and devices, divided once by the summed weight. A
    batch of weight 0 changes nothing but `step` and `skipped`.

    Args:
      state: the state.
      batch: arrays [B, ...]; B is a multiple of `micro_batches`.
      loss_fn: see `lm.objectives`.
      optimizer: see `lm.optim`.
      seed: of the run. Dropout is a function of it, the step and the row's example index.
      micro_batches: how many parts of the batch are computed one after the other.
      ema_decay: 0 = no average; at most (1 + step) / (10 + step), so that a short run's average forgets its start.

    Returns:
      The next state, and metrics: 'loss', 'weight', 'grad_norm', 'learning_rate' as float32 [], and those of the
      objective as (sum, weight).
    """
    trained, frozen = trees.split(state.params, optimizer.trained)
    rng = jax.random.fold_in(jax.random.key(seed), state.step)

    def terms_and_grads(micro: Batch) -> tuple[LossTerms, Params]:
        def total(trained: Params) -> tuple[jax.Array, LossTerms]:
            terms = loss_fn(trees.merge(trained, frozen), micro, rng)._replace(outputs={})
            return terms.sum, terms

        grads, terms = jax.grad(total, has_aux=True)(trained)
        return terms, grads

    if micro_batches == 1:
        terms, grads = terms_and_grads(batch)
    else:
        micros = jax.tree.map(lambda x: _split_rows(x, micro_batches), batch)
        shapes = jax.eval_shape(terms_and_grads, jax.tree.map(lambda x: x[0], micros))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (terms, grads), _ = jax.lax.scan(
            lambda sums, micro: (jax.tree.map(jnp.add, sums, terms_and_grads(micro)), None), zeros, micros
        )

    has_weight = terms.weight > 0
    divisor = jnp.where(has_weight, terms.weight, 1.0)
    grads = jax.tree.map(lambda g: g / divisor.astype(g.dtype), grads)
    new_trained, new_opt_state, info = optimizer.update(grads, state.opt_state, trained, state.step)
    new_ema = state.ema
    if state.ema is not None:
        decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
        new_ema = jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p, state.ema, new_trained)
    old, new = (trained, state.opt_state, state.ema), (new_trained, new_opt_state, new_ema)
    trained, opt_state, ema = jax.tree.map(lambda o, n: jnp.where(has_weight, n, o), old, new)
    skipped = state.skipped + jnp.where(has_weight, 0, 1)
    state = TrainState(state.step + 1, trees.merge(trained, frozen), opt_state, ema, skipped)
    return state, {"loss": terms.sum / divisor, "weight": terms.weight, **info, **terms.metrics}


def eval_step(
    params: Params, batch: Batch, *, loss_fn: LossFn
) -> tuple[dict[str, tuple[jax.Array, jax.Array]], dict[str, jax.Array]]:
    """One batch of an evaluation.

    Returns:
      Metric name -> (sum, weight), 'loss' among them: the caller adds them up and divides at the end. And the
      objective's outputs, name -> [B, ...].
    """
    terms = loss_fn(params, batch, None)
    return {"loss": (terms.sum, terms.weight), **terms.metrics}, terms.outputs


def _split_rows(x: jax.Array, parts: int) -> jax.Array:
    """[B, ...] -> [parts, B / parts, ...], row r going to part r % parts: each device keeps rows of every part."""
    return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)
