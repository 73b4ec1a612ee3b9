"""Which parameters are trained: rules over parameter paths, resolved for each layer of stacked parameters.

Training the last layers, biases only (BitFit, Ben Zaken et al. 2022) or a head only, layer-wise learning rates and
gradual unfreezing (ULMFiT, Howard and Ruder 2018) are lists of rules; `configs/common.py` has the usual ones. With

    optim.lr_rules = ((r"decoder/layers/[23]/.*", 1.0), (r".*", 0.0))

and a 'decoder/layers/mlp/up/kernel' [4, …], `kernel[2:]` is trained. Only this part is differentiated and has moments.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm import param_paths
from lm.config import OptimConfig
from lm.config.schema import ConfigError
from lm.types import Params


class Selection(NamedTuple):
    """The rules as they apply to each parameter. Tuples have an entry for each layer, or one if there are no layers.

    Attributes:
      trained: path -> False where the learning rate's multiplier is 0 in all layers.
      frozen_layers: path -> number of first layers that are frozen; only paths of which the other layers are trained.
      lr_multiplier: path -> multipliers of the learning rate.
      decayed: path -> whether weight decay is applied.
      start: path -> first step at which it is trained.
    """

    trained: dict[str, bool]
    frozen_layers: dict[str, int]
    lr_multiplier: dict[str, tuple[float, ...]]
    decayed: dict[str, tuple[bool, ...]]
    start: dict[str, tuple[int, ...]]


def resolve(cfg: OptimConfig, abstract_params: Params, total_steps: int) -> Selection:
    """Applies `lr_rules`, `decay_rules` and `unfreeze_rules` to every parameter.

    Raises:
      ConfigError: a rule matches nothing, a value is out of range, no rule covers a parameter, nothing is trained, or
        frozen layers follow trained ones.
      ValueError: a trained parameter is not float32.
    """
    flat = param_paths.flatten(abstract_params)
    multiplier = param_paths.match_layers(cfg.lr_rules, abstract_params, "optim.lr_rules")
    decayed = param_paths.match_layers(cfg.decay_rules, abstract_params, "optim.decay_rules")
    share = param_paths.match_layers(cfg.unfreeze_rules, abstract_params, "optim.unfreeze_rules")
    for pattern, value in cfg.lr_rules:
        if value < 0:
            raise ConfigError(f"'optim.lr_rules': {pattern!r} has the negative multiplier {value}; 0 freezes")
    for pattern, value in cfg.unfreeze_rules:
        if not 0 <= value <= 1:
            raise ConfigError(f"'optim.unfreeze_rules': {pattern!r} has {value}; expected a share of the run, 0 to 1")
    trained = {path: any(values) for path, values in multiplier.items()}
    if not any(trained.values()):
        raise ConfigError("'optim.lr_rules' freezes every parameter (all multipliers are 0): nothing would be trained")
    if wrong := [path for path in flat if trained[path] and flat[path].dtype != jnp.float32]:
        raise ValueError(f"trained parameter '{wrong[0]}' is {flat[wrong[0]].dtype}; master weights must be float32")
    frozen_layers = {}
    for path, values in multiplier.items():
        learning = [layer for layer, value in enumerate(values) if value]
        if learning and len(learning) < len(values):
            frozen_layers[path] = learning[0]
            if learning != list(range(learning[0], len(values))):
                raise ConfigError(
                    f"'optim.lr_rules' train the layers {learning} of '{path}', which has {len(values)}: only the "
                    f"first ones can be frozen; give layers {learning[0]} to {len(values) - 1} a multiplier above 0"
                )

    def step_of(share: float) -> int:  # rounded because 0.07 * 100 is 7.000000000000001 in floats, a step too many
        return max(math.ceil(round(share * total_steps, 6)), int(share > 0))

    start = {path: tuple(map(step_of, shares)) for path, shares in share.items()}
    return Selection(trained, frozen_layers, multiplier, decayed, start)


def trained_part(selection: Selection, params: Params) -> Params:
    """The trained part of `params` (arrays or their shapes): whole leaves, or their last layers.

    `param_paths.overlay` is the inverse.
    """

    def select(tree: Params) -> Params:
        return param_paths.select(tree, selection.trained, selection.frozen_layers)

    is_abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params))
    return jax.eval_shape(select, params) if is_abstract else select(params)


def of_trained(selection: Selection, path: str, values: tuple[Any, ...], ndim: int) -> Any:
    """`values` of the trained layers of a leaf: one number if they are equal, else float32 [n, 1, …] to broadcast."""
    values = values[selection.frozen_layers.get(path, 0) :]
    if len(set(values)) == 1:
        return values[0]
    return np.asarray(values, np.float32).reshape(-1, *[1] * (ndim - 1))
