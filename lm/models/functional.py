"""A Flax module as pure functions, and the key/value cache that generation passes through them."""

import dataclasses
import functools
import operator
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.config import ModelConfig
from lm.models import moe
from lm.models.attention import Mask
from lm.types import Batch, ModelFns, ModelOutput, Params


def model_fns(module: Any, batch: Mapping[str, Any], cached: ModelConfig | None = None) -> ModelFns:
    """A module as pure functions.

    Args:
      module: has a `dtype`, and is called with (batch, keys_B, cache) for a `ModelOutput`.
      batch: the smallest batch that initialises it; shapes of parameters depend on no more of it.
      cached: sizes of the layers whose keys and values are cached; None = the model does not generate.
    """

    def boxed_init(key: jax.Array) -> Any:
        return module.init(key, batch, None, None)["params"]

    def apply(params: Params, batch: Batch, *, rng: jax.Array | None = None, cache: Any = None) -> ModelOutput:
        keys_B = None
        if rng is not None:
            keys_B = jax.vmap(jax.random.fold_in, (None, 0))(rng, batch["example_index"])
        out, sown = module.apply({"params": _stacked(params)}, batch, keys_B, cache, mutable=[moe.ROUTING])
        routing_of_stacks = jax.tree.leaves(sown)  # [N, 2, B] of each stack
        if routing_of_stacks:
            out = out._replace(routing_2xB=jnp.concatenate(routing_of_stacks).mean(axis=0))
        return out

    def logical_axes() -> Any:
        specs = nn.get_partition_spec(jax.eval_shape(boxed_init, jax.eval_shape(lambda: jax.random.key(0))))
        return jax.tree.map(tuple, specs, is_leaf=lambda x: isinstance(x, jax.P))

    fns = ModelFns(lambda key: nn.unbox(boxed_init(key)), apply, logical_axes)
    if cached is None:
        return fns
    return fns._replace(init_cache=functools.partial(init_cache, cached, module.dtype), for_decoding=for_decoding)


def for_decoding(params: Params) -> Params:
    """Parameters for a program that decodes: see `lm.types.ModelFns`.

    On CPU XLA copies a layer's kernels out of the stacked ones wherever they are used, which is three times the memory
    traffic of a new id. There the decoder's layers become a list, one copy for all ids. Accelerators read the stacked
    ones in place.
    """
    stacked = params["decoder"]["layers"]
    if {device.platform for device in jax.tree.leaves(stacked)[0].devices()} != {"cpu"}:
        return params
    return {**params, "decoder": {**params["decoder"], "layers": _unstacked(stacked)}}


@jax.jit
def _unstacked(stacked: Any) -> list[Any]:
    number = jax.tree.leaves(stacked)[0].shape[0]
    return [jax.tree.map(operator.itemgetter(i), stacked) for i in range(number)]


def _stacked(params: Params) -> Params:
    """The parameters that `for_decoding` was given; where layers are unrolled, XLA reads those of the list."""
    layers = params.get("decoder", {}).get("layers")
    if not isinstance(layers, list):
        return params
    return {**params, "decoder": {**params["decoder"], "layers": jax.tree.map(lambda *x: jnp.stack(x), *layers)}}


def init_cache(cfg: ModelConfig, dtype: Any, rows: int, length: int) -> Any:
    """An empty cache for `cfg.num_layers` layers: see `lm.types.ModelFns`."""
    shape = (rows, cfg.num_kv_heads, length, cfg.head_dim)  # as the products of attention read it
    return {
        "layers": tuple((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(cfg.num_layers)),
        "segment_ids": jnp.zeros((rows, length), jnp.int32),
        "index": jnp.zeros((), jnp.int32),
    }


def extend_cache(cache: Any, batch: Batch, window: int) -> tuple[Mask, Any]:
    """(mask, cache) for the positions of `batch`, which follow those in the cache.

    Segment ids and index of the cache are updated; its 'layers' are not: attention writes the new keys and values.
    """
    start, segments_BxL = cache["index"], batch["segment_ids"]

    def write(old_BxS: jax.Array, new_BxL: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(old_BxS, new_BxL, (0, start))

    key_segments_BxS = write(cache["segment_ids"], segments_BxL)
    mask = Mask(segments_BxL, key_segments_BxS, window, start)
    if "is_prefix" in batch:  # cached positions come before all queries, which see them anyway
        mask = dataclasses.replace(mask, is_prefix_BxS=write(jnp.zeros_like(key_segments_BxS), batch["is_prefix"]))
    return mask, cache | {"segment_ids": key_segments_BxS, "index": start + segments_BxL.shape[1]}
