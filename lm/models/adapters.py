"""Adapters for a frozen model: bottleneck layers after sublayers, and merging of LoRA into the kernels.

LoRA itself is a branch of `layers.Dense`: `<dense>/lora_a` [in, r] and `<dense>/lora_b` [r, out]. Which parameters are
trained is set by rules, see `configs/common.py`. An adapter is initialised to add exactly 0.
"""

from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm import param_paths
from lm.config import AdapterConfig
from lm.config.schema import ConfigError
from lm.models import layers
from lm.types import Params

# adapter.kind -> names of the bottleneck layers of a block.
BOTTLENECKS = {
    "houlsby": ("adapter_attention", "adapter_mlp"),  # Houlsby et al. 2019, figure 2
    "pfeiffer": ("adapter_mlp",),  # Pfeiffer et al. 2021, section 3.2.1
}


class Bottleneck(nn.Module):
    """x + up(gelu(down(x))), with `up` initialised to 0 (Houlsby et al. 2019)."""

    rank: int
    dtype: Any

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
        down = layers.Dense(self.rank, ("embed", None), True, self.dtype, name="down")
        up = layers.Dense(x_BxLxD.shape[-1], (None, "embed"), True, self.dtype, nn.initializers.zeros, name="up")
        return x_BxLxD + up(jax.nn.gelu(down(x_BxLxD)))


def adapt(cfg: AdapterConfig, name: str, x_BxLxD: jax.Array, dtype: Any) -> jax.Array:
    """Applies the bottleneck layer `name` to a sublayer's output if `cfg` has one there. Called in a module."""
    return Bottleneck(cfg.rank, dtype, name=name)(x_BxLxD) if name in BOTTLENECKS.get(cfg.kind, ()) else x_BxLxD


def check(cfg: AdapterConfig, paths: Iterable[str]) -> None:
    """Checks that the model has the adapter.

    Args:
      cfg: the adapter.
      paths: paths of all parameters of the model that was made with it.

    Raises:
      ConfigError: LoRA's targets match no Dense layer of a block, or this kind of model supports no bottlenecks.
    """
    paths = list(paths)
    if cfg.kind == "lora":
        dense = [path.removesuffix("/kernel") for path in paths if "/layers/" in path and path.endswith("/kernel")]
        param_paths.match_rules(((cfg.targets, True), (".*", False)), dense, "adapter.targets")
    elif cfg.kind != "none" and not any("/adapter_" in path for path in paths):
        raise ConfigError(f"'adapter.kind' {cfg.kind} adds no parameter to this kind of model")


def merge(params: Params, cfg: AdapterConfig) -> Params:
    """Merges LoRA into the kernels: kernel + alpha / rank * A @ B, in float32. The merged model computes the same.

    Raises:
      ConfigError: the adapter is not LoRA. Bottleneck layers are not linear and cannot be merged.
    """
    if cfg.kind != "lora":
        raise ConfigError(f"'adapter.kind' is {cfg.kind}: only lora can be merged into the kernels")
    flat = param_paths.flatten(params)
    return param_paths.unflatten(
        {p: _add_lora(flat, p, cfg, 1.0) for p in flat if not p.endswith(("/lora_a", "/lora_b"))}
    )


def unmerge(merged: Params, adapters: Params, cfg: AdapterConfig) -> Params:
    """Inverse of `merge` up to rounding, with the LoRA parameters of `adapters`."""
    lora = {path: leaf for path, leaf in param_paths.flatten(adapters).items() if path.endswith(("/lora_a", "/lora_b"))}
    flat = param_paths.flatten(merged) | lora
    return param_paths.unflatten({path: _add_lora(flat, path, cfg, -1.0) for path in flat})


def _add_lora(flat: dict[str, Any], path: str, cfg: AdapterConfig, sign: float) -> Any:
    """A kernel plus sign * alpha / rank * A @ B if it has LoRA parameters; any other leaf unchanged."""
    dense, _, name = path.rpartition("/")
    if name != "kernel" or f"{dense}/lora_a" not in flat:
        return flat[path]
    a, b = flat[f"{dense}/lora_a"], flat[f"{dense}/lora_b"]
    return flat[path] + sign * cfg.alpha / cfg.rank * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
