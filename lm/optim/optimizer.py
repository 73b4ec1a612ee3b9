"""Schedules and optimizers: how the parameters move that `lm.optim.trainable` lets learn.

One step, on the trained parameters only:

    gradients -> clip by global norm -> direction (adamw | lion | adafactor | muon)
    parameter -= learning_rate(step) * lr_multiplier[path] * (
        scale[path] * direction + weight_decay * parameter (if decayed[path]) + to_init * (parameter - where it started)
    )

`scale` is 1 but where a recipe is transferred to another width, see `lm.optim.mup`. `to_init` is L2-SP (Li et al.,
arXiv:1802.01483), decoupled from the direction as weight decay is. A parameter that `unfreeze_rules` hold back has a
gradient of 0 until its time comes, and its direction then begins as at a first step.

What the keys of `OptimConfig` mean for each direction; all moments are float32:

    adamw      b1, b2, eps: Adam's (Loshchilov & Hutter, arXiv:1711.05101)
    lion       b1: weight of the momentum in the sign; b2: decay of the momentum (Chen et al., arXiv:2302.06675)
    adafactor  b1: momentum of the update, 0 = none held; b2: upper bound of the second moment's decay 1 - t**-0.8;
               eps**2 is added to the squared gradient. Not relative to the parameter's scale, so that adamw's
               learning rates fit (Shazeer & Stern, arXiv:1804.04235, in the form of Zhai et al., arXiv:2106.04560)
    muon       b1: decay of the Nesterov momentum; for the layers' kernels (Liu et al., arXiv:2502.16982). Embeddings,
               output head, norms, biases and LoRA's matrices go to adamw with b1, b2, eps

Weights of layers are stacked on axis 0, `[N, in, out]`: muon and adafactor treat each of the N as a weight of its own.
Of experts, `[N, X, in, out]`, muon treats each of the X so too.
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
from lm.config.schema import ConfigError
from lm.optim import trainable
from lm.optim.trainable import Selection
from lm.types import Params

Schedule = Callable[[jax.Array], jax.Array]

ADAFACTOR_CLIP = 1.0  # largest RMS of one weight's update
ADAFACTOR_MIN_DIM = 128  # smaller matrices keep the whole second moment: nothing to save
MUON_RMS = 0.2  # RMS of adamw's updates in practice (arXiv:2502.16982, section 2.2); one learning rate then fits both


class Optimizer(NamedTuple):
    """An optimizer as pure functions. `params` and `grads` are the trained part only: `selection.trained_part`.

    Attributes:
      init: params -> opt_state; what is frozen has no part in it.
      update: (grads, opt_state, params, step, start_params) -> (new params, new opt_state, info). `step` is int32 [],
        the steps done before this one. `start_params` are the values that `to_init` draws to, a part of `params`, or
        None. `info` has `learning_rate` and `grad_norm` (global, before clipping), float32 [].
      learning_rate: step -> float32 [], before multipliers.
      selection: what is trained, and how.
    """

    init: Callable[[Params], Any]
    update: Callable[[Params, Any, Params, jax.Array, Params | None], tuple[Params, Any, dict[str, jax.Array]]]
    learning_rate: Schedule
    selection: Selection


def schedule(cfg: OptimConfig, *, total_steps: int, warmup_steps: int, decay_steps: int) -> Schedule:
    """The learning rate as a pure function of the global step, so that a resume cannot shift it.

    `step` counts the steps done before this one: training runs steps 0 to total_steps - 1. Warm-up is
    peak * (step + 1) / warmup_steps, so the first step already learns and step warmup_steps - 1 is at the peak. A decay
    starts at the peak again and would reach the end at step total_steps, so the last step still learns.
    With peak 1, end 0, 10 steps in all, 4 of warm-up, and 3 of decay for wsd:

        step      0    1    2    3    4     5     6     7     8     9     10, 11, ...
        constant  1/4  1/2  3/4  1    1     1     1     1     1     1     1
        linear    1/4  1/2  3/4  1    1     5/6   4/6   3/6   2/6   1/6   0
        cosine    1/4  1/2  3/4  1    1     0.93  0.75  0.5   0.25  0.07  0
        rsqrt     1/4  1/2  3/4  1    0.89  0.82  0.76  0.71  0.67  0.63  sqrt(warmup_steps / (step + 1))
        wsd       1/4  1/2  3/4  1    1     1     1     1     2/3   1/3   0

    Args:
      cfg: `learning_rate`, `schedule` and `end_lr_ratio` are read.
      total_steps: length of the run.
      warmup_steps: 0 = none.
      decay_steps: length of the final decay; wsd only.

    Returns:
      step, int32 [...] -> learning rate, float32 [...].

    Raises:
      ConfigError: the phases do not fit in the run, or the schedule lacks the phase that it is made of.
    """
    if warmup_steps + decay_steps > total_steps:
        raise ConfigError(
            f"'optim.warmup_*' ({warmup_steps:,} steps) and 'optim.decay_*' ({decay_steps:,} steps) are together longer"
            f" than the run, 'train.total_*' ({total_steps:,} steps): shorten them or train longer"
        )
    if cfg.schedule == "wsd" and not decay_steps:
        raise ConfigError("'optim.schedule' is wsd, but no 'optim.decay_steps|_tokens|_examples|_epochs' is set")
    if cfg.schedule == "rsqrt" and not warmup_steps:
        raise ConfigError("'optim.schedule' is rsqrt, but no 'optim.warmup_*' is set: it is the unit of its decay")
    decay_start = total_steps - decay_steps if cfg.schedule == "wsd" else warmup_steps

    def remaining(step: jax.Array) -> jax.Array:
        """1 up to decay_start, then linear to 0 at total_steps; both exact, though XLA divides by n as times 1/n."""
        left = jnp.maximum(total_steps - step, 0) / max(total_steps - decay_start, 1)
        return jnp.where(step <= decay_start, 1.0, left)

    # Each maps a step after the warm-up, or the last of it, to the share of the way from the end (0) to the peak (1).
    shapes: dict[str, Schedule] = {
        "constant": lambda step: jnp.ones_like(step, jnp.float32),
        "linear": remaining,
        "cosine": lambda step: 0.5 - 0.5 * jnp.cos(jnp.pi * remaining(step)),
        "rsqrt": lambda step: jnp.sqrt(warmup_steps / (step + 1)),
        "wsd": remaining,
    }
    shape = shapes[cfg.schedule]
    end = cfg.end_lr_ratio if cfg.schedule in ("linear", "cosine", "wsd") else 0.0

    def learning_rate(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.int32)
        warm = (step + 1) / max(warmup_steps, 1)
        share = shape(step)
        ratio = jnp.where(step + 1 < warmup_steps, warm, share + (1 - share) * end)
        return jnp.asarray(cfg.learning_rate * ratio, jnp.float32)

    return learning_rate


def build(
    cfg: OptimConfig,
    abstract_params: Params,
    *,
    total_steps: int,
    warmup_steps: int,
    decay_steps: int,
    scales: Mapping[str, float] | None = None,
) -> Optimizer:
    """Resolves the rules over the parameters' paths and makes the optimizer; no array is made, no device touched.

    Args:
      cfg: the whole section but `ema_decay` is read here.
      abstract_params: all parameters, trained or not; only shapes and dtypes are read.
      total_steps, warmup_steps, decay_steps: as in `schedule`.
      scales: path -> factor of the direction; None = 1.

    Raises:
      ConfigError, ValueError: as `selection.resolve` and `schedule`.
    """
    chosen = trainable.resolve(cfg, abstract_params, total_steps)
    learning_rate = schedule(cfg, total_steps=total_steps, warmup_steps=warmup_steps, decay_steps=decay_steps)
    abstract = param_paths.flatten(trainable.trained_part(chosen, abstract_params))

    def resolved(values: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
        return {path: trainable.of_trained(chosen, path, values[path], leaf.ndim) for path, leaf in abstract.items()}

    decayed, multiplier, start = resolved(chosen.decayed), resolved(chosen.lr_multiplier), resolved(chosen.start)
    starts = {path: chosen.start[path][chosen.frozen_layers.get(path, 0) :] for path in abstract}
    clip = optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity()
    transform = optax.chain(clip, _staged(cfg, abstract, starts))

    def update(
        grads: Params, opt_state: Any, params: Params, step: jax.Array, start_params: Params | None = None
    ) -> tuple[Params, Any, dict[str, jax.Array]]:
        if different := param_paths.flatten(params).keys() ^ abstract.keys():
            raise ValueError(f"update takes exactly the trained parameters; differing: {sorted(different)}")

        def once_begun(path: str, value: jax.Array) -> jax.Array:
            return value if np.all(start[path] == 0) else jnp.where(step >= start[path], value, 0.0)

        grads = param_paths.map_with_path(once_begun, grads)
        directions, new_opt_state = transform.update(grads, opt_state, params, step=step)
        lr, anchors = learning_rate(step), param_paths.flatten(start_params or {})

        def move(path: str, param: jax.Array, direction: jax.Array) -> jax.Array:
            scale = scales[path] if scales else 1.0
            change = scale * direction + cfg.weight_decay * decayed[path] * param
            if path in anchors:
                change += cfg.to_init * (param - anchors[path])
            return param - once_begun(path, lr * multiplier[path] * change)

        info = {"learning_rate": lr, "grad_norm": optax.tree.norm(grads)}
        return param_paths.map_with_path(move, params, directions), new_opt_state, info

    return Optimizer(transform.init, update, learning_rate, chosen)


def state_specs(optimizer: Optimizer, abstract_params: Params, param_specs: Params) -> Any:
    """How the optimizer's state lies on the devices, from how the parameters do.

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


def _staged(
    cfg: OptimConfig, abstract: Mapping[str, Any], starts: Mapping[str, tuple[int, ...]]
) -> optax.GradientTransformationExtraArgs:
    """Directions of parameters that begin at different steps: each group is a run of its own that begins at its step.

    Args:
      cfg: of the direction.
      abstract: path -> trained parameter.
      starts: path -> the step at which each of its layers begins, or its only one.

    Returns:
      A transformation whose update takes `step`; before a group's first step its state stands still. Its state is a
      tuple with one a group, each over the layers of that group alone.
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
    """What `cfg.name` makes of gradients: the update at learning rate 1, not negated, before weight decay."""
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
    """Whether muon takes it."""
    return _is_stacked(path, _) and path.endswith("kernel")


def _partition(
    transforms: dict[str, optax.GradientTransformation],
    params: Mapping[str, Any],
    in_layers: Callable[[str, Any], bool],
) -> optax.GradientTransformation:
    """Sends each parameter to 'layers' or 'rest'. A part with no parameters is left out: vmap refuses empty trees."""
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
    """Applies `transform` to each index of axis 0 as if it were alone; counts stay shared, and so must N be.

    Left to itself, Adafactor would factor `[N, in, out]` over its two largest axes, whichever they are, and clip by one
    RMS over all layers.
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
    """Muon for leaves `[N, ..., in, out]`, each `[in, out]` made orthogonal, then scaled to an RMS of `MUON_RMS`."""

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
