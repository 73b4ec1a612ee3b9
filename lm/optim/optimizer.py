"""Optimizers: the update of the trained parameters (`lm.optim.trainable`).

One step:

    gradients -> clip by global norm -> direction (adamw | lion | adafactor | muon)
    parameter -= learning_rate(step) * lr_multiplier[path] * (
        scale[path] * direction + weight_decay * parameter (if decayed[path]) + l2_sp * (parameter - initial value)
    )

`scale` is 1 unless hyperparameters are transferred to another width (`lm.optim.mup`). `l2_sp` is L2-SP (Li et al.,
arXiv:1802.01483), decoupled from the direction as weight decay is. A parameter that `unfreeze_rules` freeze for a part
of the run has gradient 0 until then, and its optimizer state starts fresh.

Meaning of the keys of `OptimConfig` for each direction; all moments are float32:

    adamw      b1, b2, eps: Adam's (Loshchilov & Hutter, arXiv:1711.05101)
    lion       b1: weight of the momentum in the sign; b2: decay of the momentum (Chen et al., arXiv:2302.06675)
    adafactor  b1: momentum of the update, 0 = none held; b2: upper bound of the second moment's decay 1 - t**-0.8;
               eps**2 is added to the squared gradient. Updates are not scaled by the parameter's RMS, so that
               learning rates of adamw carry over (Shazeer & Stern, arXiv:1804.04235, in the form of Zhai et al.,
               arXiv:2106.04560)
    muon       b1: decay of the Nesterov momentum; for kernels of layers (Liu et al., arXiv:2502.16982). Embeddings,
               output head, norms, biases and LoRA matrices use adamw with b1, b2, eps

Weights of layers are stacked on axis 0, `[N, in, out]`: muon and adafactor treat each of the N as a separate weight.
Weights of experts are `[N, X, in, out]`: muon treats each of the N * X as a separate weight.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jax.sharding import PartitionSpec

from lm import param_paths
from lm.config import OptimConfig
from lm.optim import trainable
from lm.optim.schedule import Schedule, schedule
from lm.optim.trainable import Selection
from lm.types import Params

ADAFACTOR_CLIP = 1.0  # largest RMS of one weight's update
ADAFACTOR_MIN_DIM = 128  # smaller matrices are not factored: it would save nothing
MUON_RMS = 0.2  # RMS of adamw's updates in practice (arXiv:2502.16982, section 2.2): both share a learning rate


class Optimizer(NamedTuple):
    """An optimizer as pure functions. `params` and `grads` are the trained part only: `selection.trained_part`.

    Attributes:
      init: params -> opt_state.
      update: (grads, opt_state, params, step, start_params) -> (new params, new opt_state, info). `step` is int32 [],
        counted from 0. `start_params` are the values that `l2_sp` pulls towards, a subtree of `params`, or None.
        `info` has `learning_rate` and `grad_norm` (global, before clipping), float32 [].
      learning_rate: step -> float32 [], before multipliers.
      selection: which parameters are trained, and their rules.
    """

    init: Callable[[Params], Any]
    update: Callable[[Params, Any, Params, jax.Array, Params | None], tuple[Params, Any, dict[str, jax.Array]]]
    learning_rate: Schedule
    selection: Selection


def build(
    cfg: OptimConfig,
    abstract_params: Params,
    *,
    total_steps: int,
    warmup_steps: int,
    decay_steps: int,
    scales: Mapping[str, float] | None = None,
) -> Optimizer:
    """Makes the optimizer, resolving the rules over parameter paths; allocates no arrays.

    Args:
      cfg: every key but `ema_decay` is read.
      abstract_params: all parameters, trained or not; only shapes and dtypes are read.
      total_steps, warmup_steps, decay_steps: as in `schedule`.
      scales: path -> factor of the direction; None = 1.

    Raises:
      ConfigError, ValueError: as `trainable.resolve` and `schedule`.
    """
    chosen = trainable.resolve(cfg, abstract_params, total_steps)
    learning_rate = schedule(cfg, total_steps=total_steps, warmup_steps=warmup_steps, decay_steps=decay_steps)
    abstract = param_paths.flatten(trainable.trained_part(chosen, abstract_params))

    def resolved(values: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
        return {path: trainable.of_trained(chosen, path, values[path], leaf.ndim) for path, leaf in abstract.items()}

    decayed, multiplier, start = resolved(chosen.decayed), resolved(chosen.lr_multiplier), resolved(chosen.start)
    starts = {path: chosen.start[path][chosen.frozen_layers.get(path, 0) :] for path in abstract}
    clip = optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity()
    transform = optax.chain(clip, _gradually_unfrozen(cfg, abstract, starts))

    def update(
        grads: Params, opt_state: Any, params: Params, step: jax.Array, start_params: Params | None = None
    ) -> tuple[Params, Any, dict[str, jax.Array]]:
        if different := param_paths.flatten(params).keys() ^ abstract.keys():
            raise ValueError(f"expected exactly the trained parameters; missing or unexpected: {sorted(different)}")

        def zero_if_frozen(path: str, value: jax.Array) -> jax.Array:
            return value if np.all(start[path] == 0) else jnp.where(step >= start[path], value, 0.0)

        grads = param_paths.map_with_path(zero_if_frozen, grads)
        directions, new_opt_state = transform.update(grads, opt_state, params, step=step)
        lr, anchors = learning_rate(step), param_paths.flatten(start_params or {})

        def move(path: str, param: jax.Array, direction: jax.Array) -> jax.Array:
            scale = scales[path] if scales else 1.0
            change = scale * direction + cfg.weight_decay * decayed[path] * param
            if cfg.l2_sp and path in anchors:
                change += cfg.l2_sp * (param - anchors[path])
            return param - zero_if_frozen(path, lr * multiplier[path] * change)

        info = {"learning_rate": lr, "grad_norm": optax.tree.norm(grads)}
        return param_paths.map_with_path(move, params, directions), new_opt_state, info

    return Optimizer(transform.init, update, learning_rate, chosen)


def state_specs(optimizer: Optimizer, abstract_params: Params, param_specs: Params) -> Any:
    """Sharding of the optimizer's state, from that of the parameters.

    Args:
      optimizer: what `build` returned.
      abstract_params: the trained part's shapes.
      param_specs: their `PartitionSpec`s, in a tree of the same structure.

    Returns:
      A tree like `optimizer.init(params)`: the parameter's spec for state of its shape (moments), or of the shape of
      some of its layers; `PartitionSpec()`, replicated, for all other state (counts, factored second moments).
    """
    shapes, specs = param_paths.flatten(abstract_params), param_paths.flatten(param_specs)

    def spec(keys: Any, leaf: Any) -> PartitionSpec:
        names = [entry.key for entry in keys if isinstance(entry, jax.tree_util.DictKey)]
        path = next((p for i in range(len(names)) if (p := "/".join(names[i:])) in shapes), None)
        if path is None:
            return PartitionSpec()
        own = 1 if param_paths.num_layers(path, shapes[path]) else 0
        is_like = leaf.ndim == shapes[path].ndim and leaf.shape[own:] == shapes[path].shape[own:]
        return specs[path] if is_like else PartitionSpec()

    return jax.tree_util.tree_map_with_path(spec, jax.eval_shape(optimizer.init, abstract_params))


def _gradually_unfrozen(
    cfg: OptimConfig, abstract: Mapping[str, Any], starts: Mapping[str, tuple[int, ...]]
) -> optax.GradientTransformationExtraArgs:
    """The direction with gradual unfreezing: parameters grouped by first step, each group with a state of its own.

    Args:
      cfg: settings of the direction.
      abstract: path -> trained parameter.
      starts: path -> first step of each of its layers; one entry if it has no layers.

    Returns:
      A transformation whose update takes `step`. Its state is a tuple with one entry for each group, over the layers
      of that group; it does not change before the group's first step.
    """
    groups = sorted({start for steps in starts.values() for start in steps})
    if groups == [0]:
        return optax.with_extra_args_support(_direction(cfg, abstract))
    layers = {group: {path: np.flatnonzero(np.equal(starts[path], group)) for path in starts} for group in groups}
    members = {group: {path: leaf for path, leaf in abstract.items() if group in starts[path]} for group in groups}
    transforms = {group: _direction(cfg, members[group]) for group in groups}

    def take(tree: Params, group: int) -> Params:
        flat = param_paths.flatten(tree)
        whole = {path: len(layers[group][path]) == len(starts[path]) for path in members[group]}
        return param_paths.unflatten({p: flat[p] if whole[p] else flat[p][layers[group][p]] for p in members[group]})

    def init(params: Params) -> tuple[Any, ...]:
        return tuple(transforms[group].init(take(params, group)) for group in groups)

    def update(grads: Params, states: Any, params: Any = None, *, step: jax.Array, **_: Any) -> tuple[Params, Any]:
        out = {path: jnp.zeros_like(leaf) for path, leaf in param_paths.flatten(grads).items()}
        after = []
        for group, state in zip(groups, states, strict=True):
            part, new = transforms[group].update(take(grads, group), state, take(params, group))
            has_begun = step >= group
            after.append(jax.tree.map(lambda old, new, on=has_begun: jnp.where(on, new, old), state, new))
            for path, leaf in param_paths.flatten(part).items():
                leaf = jnp.where(has_begun, leaf, 0.0)
                out[path] = leaf if leaf.shape == out[path].shape else out[path].at[layers[group][path]].set(leaf)
        return param_paths.unflatten(out), tuple(after)

    return optax.GradientTransformationExtraArgs(init, update)


def _direction(cfg: OptimConfig, trained: Mapping[str, Any]) -> optax.GradientTransformation:
    """Gradients -> update of the optimizer `cfg.name` at learning rate 1, not negated, before weight decay."""
    adamw = optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps)
    match cfg.name:
        case "adamw":
            return adamw
        case "lion":
            return optax.scale_by_lion(cfg.b1, cfg.b2)
        case "adafactor":
            adafactor = _adafactor(cfg)
            return _partition({"layers": _per_layer(adafactor), "rest": adafactor}, trained, _is_stacked)
        case "muon":
            return _partition({"layers": _muon(cfg), "rest": adamw}, trained, is_stacked_kernel)


def _is_stacked(path: str, _: Any) -> bool:
    return "layers" in path.split("/")


def is_stacked_kernel(path: str, _: Any = None) -> bool:
    """Whether it is a kernel of stacked layers, which muon updates."""
    return _is_stacked(path, _) and path.endswith("kernel")


def _partition(
    transforms: dict[str, optax.GradientTransformation],
    params: Mapping[str, Any],
    in_layers: Callable[[str, Any], bool],
) -> optax.GradientTransformation:
    """`optax.partition` into 'layers' and 'rest'. A part without parameters is left out: vmap rejects empty trees."""
    labels = {path: "layers" if in_layers(path, leaf) else "rest" for path, leaf in params.items()}
    used = {label: transform for label, transform in transforms.items() if label in labels.values()}
    return optax.partition(used, param_paths.unflatten(labels))


def _adafactor(cfg: OptimConfig) -> optax.GradientTransformation:
    return optax.chain(
        optax.scale_by_factored_rms(
            decay_rate_fn=lambda count, exponent: jnp.minimum(cfg.b2, 1 - (count + 1.0) ** -exponent),
            min_dim_size_to_factor=ADAFACTOR_MIN_DIM,
            epsilon=cfg.eps**2,
        ),
        optax.clip_by_block_rms(ADAFACTOR_CLIP),
        optax.ema(cfg.b1) if cfg.b1 else optax.identity(),
    )


def _per_layer(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """`transform` mapped over axis 0, the layers. Counts are shared; all leaves must have the same N.

    Without it Adafactor would factor `[N, in, out]` over the two largest axes, and clip by one RMS over all layers.
    """

    def init(params: Any) -> Any:
        state = transform.init(jax.tree.map(lambda param: param[0], params))
        return optax.tree_map_params(
            transform, lambda leaf, param: jnp.broadcast_to(leaf, (param.shape[0], *leaf.shape)), state, params
        )

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        axes = optax.tree_map_params(transform, lambda _: 0, state, transform_non_params=lambda _: None)
        return jax.vmap(transform.update, in_axes=(0, axes, 0), out_axes=(0, axes))(grads, state, params)

    return optax.GradientTransformation(init, update)


def _muon(cfg: OptimConfig) -> optax.GradientTransformation:
    """Muon for leaves `[N, ..., in, out]`: each `[in, out]` is orthogonalised, then scaled to an RMS of `MUON_RMS`."""

    def axes(leaf: Any) -> Any:
        return optax.contrib.MuonDimensionNumbers(reduction_axis=leaf.ndim - 2, output_axis=leaf.ndim - 1)

    return optax.chain(
        optax.contrib.scale_by_muon(
            beta=cfg.b1,
            eps=cfg.eps,
            weight_dimension_numbers=lambda updates: jax.tree.map(axes, updates),
        ),
        optax.stateless(
            lambda updates, _: jax.tree.map(lambda leaf: MUON_RMS * math.sqrt(max(leaf.shape[-2:])) * leaf, updates)
        ),
    )
