"""One training step and one evaluation step: pure functions, the same for every model, task and mesh."""

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lm import param_paths
from lm.optim import Optimizer
from lm.optim.trainable import trained_part
from lm.types import Batch, LossTerms, Params, TrainState

Metrics = dict[str, Any]

_MIXOUT = 2**32 - 1  # folded into a step's key; dropout folds in example indices, which are below 2^31


def init_state(
    params: Params, optimizer: Optimizer, *, use_ema: bool, anchored: Mapping[str, bool] | None = None
) -> TrainState:
    """The state before the first step. The moving average starts at the parameters' initial values.

    Args:
      params: all parameters.
      optimizer: see `lm.optim`.
      use_ema: whether the state has an average of the trained parameters.
      anchored: path -> whether the state keeps the parameter's initial value, for `l2_sp`, `mixout` or the loss; None =
        none.
    """
    trained = trained_part(optimizer.selection, params)
    ema = jax.tree.map(jnp.copy, trained) if use_ema else None
    start = jax.tree.map(jnp.copy, param_paths.select(trained, anchored)) if anchored else None
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, optimizer.init(trained), ema, jnp.copy(zero), start)


def eval_params(state: TrainState) -> Params:
    """The parameters to evaluate: the moving average if the state has one; sharded as `params`."""
    if state.ema is None:
        return state.params
    whole = param_paths.overlay(state.params, state.ema)
    return jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), whole, state.params)


def start_params(params: Params, start: Params | None) -> Params:
    """All parameters with their initial values.

    Args:
      params: current parameters; frozen ones still have their initial values.
      start: `TrainState.start`, for all trained parameters; None = `params` have not been trained yet.
    """
    return param_paths.overlay(params, start or {})


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    loss_fn: Callable[..., LossTerms],
    optimizer: Optimizer,
    seed: int,
    micro_batches: int,
    ema_decay: float,
    mixout: float = 0.0,
    needs_start: bool = False,
) -> tuple[TrainState, Metrics]:
    """One training step on one global batch.

    The gradient is that of the loss summed over all micro-batches and devices, divided once by the summed weight. A
    batch of weight 0 changes only `step` and `skipped`.

    Args:
      state: its buffers may be donated.
      batch: arrays [B, ...]; B is a multiple of `micro_batches`.
      loss_fn: `Task.loss`, bound.
      optimizer: see `lm.optim`.
      seed: the run's seed. Dropout is a function of the seed, the step and the row's example index.
      micro_batches: number of parts of the batch whose gradients are accumulated one after the other.
      ema_decay: decay of the moving average, limited to (1 + step) / (10 + step) so that the average of a short run is
        not dominated by its initial values; 0 = no average.
      mixout: rate of mixout, see `mix`; 0 = off.
      needs_start: see `Task.needs_start`.

    Returns:
      The next state, and metrics: 'loss', 'weight', 'grad_norm', 'learning_rate' as float32 [], and those of the
      task as (sum, weight).
    """
    trained = trained_part(optimizer.selection, state.params)
    rng = jax.random.fold_in(jax.random.key(seed), state.step)
    # Mixed once, and differentiated once, for all micro-batches.
    mixed, grads_before_mixing = jax.vjp(lambda tree: mix(tree, state.start, mixout, rng), trained)

    start = (start_params(state.params, state.start),) if needs_start else ()

    def terms_and_grads(micro: Batch) -> tuple[LossTerms, Params]:
        def total(mixed: Params) -> tuple[jax.Array, LossTerms]:
            terms = loss_fn(param_paths.overlay(state.params, mixed), micro, rng, *start)._replace(outputs={})
            return terms.sum, terms

        grads, terms = jax.grad(total, has_aux=True)(mixed)
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
    (grads,) = grads_before_mixing(jax.tree.map(lambda g: g / divisor.astype(g.dtype), grads))
    new_trained, new_opt_state, info = optimizer.update(grads, state.opt_state, trained, state.step, state.start)
    new_ema = state.ema
    if state.ema is not None:
        decay = jnp.minimum(ema_decay, (1.0 + state.step) / (10.0 + state.step))
        new_ema = jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p, state.ema, new_trained)
    old, new = (trained, state.opt_state, state.ema), (new_trained, new_opt_state, new_ema)
    trained, opt_state, ema = jax.tree.map(lambda o, n: jnp.where(has_weight, n, o), old, new)
    skipped = state.skipped + jnp.where(has_weight, 0, 1)
    state = TrainState(state.step + 1, param_paths.overlay(state.params, trained), opt_state, ema, skipped, state.start)
    return state, {"loss": terms.sum / divisor, "weight": terms.weight, **info, **terms.metrics}


def mix(trained: Params, start: Params | None, rate: float, rng: jax.Array) -> Params:
    """Mixout (Lee et al., arXiv:1909.11299): replaces a share `rate` of kernel entries by their initial values.

    With initial value u, current value w, and mask m = 1 where w is kept: ((1 - m) u + m w - rate u) / (1 - rate),
    whose expectation is w. As in the authors' code only kernels are mixed. The mask is a function of `rng` and the
    parameter's path alone.
    """
    if rate == 0.0:
        return trained
    anchors = param_paths.flatten(start or {})

    def one(path: str, w: jax.Array) -> jax.Array:
        if path not in anchors or not path.endswith("kernel"):
            return w
        u, key = anchors[path], jax.random.fold_in(jax.random.fold_in(rng, _MIXOUT), zlib.crc32(path.encode()))
        kept = jax.random.bernoulli(key, 1.0 - rate, w.shape)
        return u + jnp.where(kept, (w - u) / (1.0 - rate), 0.0)

    return param_paths.map_with_path(one, trained)


def eval_step(
    params: Params,
    batch: Batch,
    start: Params | None = None,
    *,
    loss_fn: Callable[..., LossTerms],
    needs_start: bool = False,
) -> tuple[dict[str, tuple[jax.Array, jax.Array]], dict[str, jax.Array]]:
    """One evaluation step on one batch.

    Args:
      params: from `eval_params`.
      batch: arrays [B, ...].
      start: `TrainState.start`; None = `params` have not been trained yet.
      loss_fn: `Task.loss`, bound.
      needs_start: see `Task.needs_start`.

    Returns:
      Metric name -> (sum, weight), 'loss' among them, for the caller to add over batches and divide at the end; and the
      task's outputs, name -> [B, ...].
    """
    given = (start_params(params, start),) if needs_start else ()
    terms = loss_fn(params, batch, None, *given)
    return {"loss": (terms.sum, terms.weight), **terms.metrics}, terms.outputs


def _split_rows(x: jax.Array, parts: int) -> jax.Array:
    """[B, ...] -> [parts, B / parts, ...]; row r goes to part r % parts, so that every device has rows of each part."""
    return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)
