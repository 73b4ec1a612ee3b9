"""Models of text: GPT-2, Llama and BERT are the same block with other values of `ModelConfig`.

Shape letters: see `lm.types`. The blocks are those of `lm.models.blocks`, under 'decoder/layers' (causal) or
'encoder/layers' (bidirectional).
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lm.config import AdapterConfig, ModelConfig
from lm.config.schema import ConfigError
from lm.models import layers, moe
from lm.models.attention import Mask
from lm.models.blocks import Stack
from lm.models.heads import HeadLayer
from lm.models.initialisers import SMALL, Init, initialiser
from lm.models.layers import fold
from lm.optim import mup
from lm.parallel import sharding
from lm.types import Batch, Head, ModelFns, ModelOutput, Params


def resolve(cfg: ModelConfig, *, vocab_size: int, seq_len: int) -> ModelConfig:
    """Fills in the sizes that 0 leaves open.

    Args:
      cfg: the model's config.
      vocab_size: ids of the tokenizer.
      seq_len: positions of a row.

    Raises:
      ConfigError: the embedding has fewer rows than the tokenizer has ids.
    """
    if cfg.vocab_size and cfg.vocab_size < vocab_size:
        raise ConfigError(f"'model.vocab_size' ({cfg.vocab_size}) is less than the tokenizer's {vocab_size} ids")
    head_dim = cfg.head_dim or cfg.embed_dim // cfg.num_heads
    if cfg.position == "rope" and head_dim % 2:
        raise ConfigError(f"'model.head_dim' must be even for rope, got {head_dim}")
    return dataclasses.replace(
        cfg,
        vocab_size=cfg.vocab_size or math.ceil(vocab_size / 128) * 128,
        max_len=cfg.max_len or seq_len,
        num_kv_heads=cfg.num_kv_heads or cfg.num_heads,
        head_dim=head_dim,
        mlp_dim=cfg.mlp_dim or 4 * cfg.embed_dim,
    )


def text_model(
    cfg: ModelConfig, dtype: Any, head: Head | None = None, adapter: AdapterConfig = layers.NO_ADAPTER
) -> ModelFns:
    """A decoder or an encoder as pure functions.

    Args:
      cfg: as `resolve` returns it.
      dtype: compute dtype of activations, float32 or bfloat16.
      head: output layer of a task; None = the model predicts tokens.
      adapter: what is added to the blocks.
    """
    module = TextModel(cfg, dtype, head, adapter)
    tokens = np.zeros((1, 1), np.int32)
    return functions(module, {"tokens": tokens, "positions": tokens, "segment_ids": tokens}, cfg)


def functions(module: Any, batch: Mapping[str, Any], cached: ModelConfig | None = None) -> ModelFns:
    """A module as pure functions.

    Args:
      module: called with (batch, keys_B, cache), it gives a `ModelOutput`; has a `dtype`.
      batch: the smallest one, to initialise from; its sizes decide those of the parameters.
      cached: of the layers to cache; None = the model does not generate.
    """

    def boxed_init(key: jax.Array) -> Any:
        return module.init(key, batch, None, None)["params"]

    def apply(params: Params, batch: Batch, *, rng: jax.Array | None = None, cache: Any = None) -> ModelOutput:
        keys_B = None
        if rng is not None:
            keys_B = jax.vmap(jax.random.fold_in, (None, 0))(rng, batch["example_index"])
        out, sown = module.apply({"params": params}, batch, keys_B, cache, mutable=[moe.ROUTING])
        layers_of_each = jax.tree.leaves(sown)  # [N, 2, B] of each stack
        if layers_of_each:
            out = out._replace(routing_2xB=jnp.concatenate(layers_of_each).mean(axis=0))
        return out

    def logical_axes() -> Any:
        specs = nn.get_partition_spec(jax.eval_shape(boxed_init, jax.eval_shape(lambda: jax.random.key(0))))
        return jax.tree.map(tuple, specs, is_leaf=lambda x: isinstance(x, jax.P))

    fns = ModelFns(lambda key: nn.unbox(boxed_init(key)), apply, logical_axes)
    return fns._replace(init_cache=functools.partial(init_cache, cached, module.dtype)) if cached else fns


def init_cache(cfg: ModelConfig, dtype: Any, rows: int, length: int) -> Any:
    """An empty cache for `cfg.num_layers` layers: see `lm.types.ModelFns`."""
    shape = (cfg.num_layers, rows, length, cfg.num_kv_heads, cfg.head_dim)
    return {
        "layers": (jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)),
        "segment_ids": jnp.zeros((rows, length), jnp.int32),
        "index": jnp.zeros((), jnp.int32),
    }


def extend(cache: Any, batch: Batch, window: int) -> tuple[Mask, Any]:
    """(mask, cache) for the positions of `batch`, which come after those in the cache; its layers are still the old."""
    start, segments_BxL = cache["index"], batch["segment_ids"]

    def write(old_BxS: jax.Array, new_BxL: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(old_BxS, new_BxL, (0, start))

    key_segments_BxS = write(cache["segment_ids"], segments_BxL)
    mask = Mask(segments_BxL, key_segments_BxS, window, start)
    if "is_prefix" in batch:  # what is cached already is seen anyway: it comes before
        mask = dataclasses.replace(mask, is_prefix_BxS=write(jnp.zeros_like(key_segments_BxS), batch["is_prefix"]))
    return mask, cache | {"segment_ids": key_segments_BxS, "index": start + segments_BxL.shape[1]}


class TextModel(nn.Module):
    """Embedding, stacked blocks, final norm, and the output projection or a task's head."""

    cfg: ModelConfig
    dtype: Any
    head: Head | None
    adapter: AdapterConfig

    @nn.compact
    def __call__(self, batch: Batch, keys_B: jax.Array | None, cache: Any) -> ModelOutput:
        cfg = self.cfg
        causal = cfg.kind != "encoder"
        embed = Embed(cfg, self.dtype, name="embed")
        segments_BxL, positions_BxL = batch["segment_ids"], batch["positions"]
        x_BxLxD, embedding_VxD = embed(batch["tokens"], positions_BxL, batch.get("type_ids"))
        x_BxLxD = disturb(cfg, x_BxLxD, segments_BxL, keys_B)
        stack = Stack(cfg, self.dtype, self.adapter, name="decoder" if causal else "encoder")
        if cache is None:
            mask = Mask(
                segments_BxL, segments_BxL, cfg.sliding_window, causal=causal, is_prefix_BxS=batch.get("is_prefix")
            )
            hidden_BxLxD, _ = stack(x_BxLxD, mask, positions_BxL, keys_B, None)
        else:
            mask, cache = extend(cache, batch, cfg.sliding_window)
            hidden_BxLxD, cache["layers"] = stack(x_BxLxD, mask, positions_BxL, keys_B, cache["layers"])
        out, unembed_DxV = None, None
        if self.head is not None:
            layer = HeadLayer(cfg, self.head, name="head")
            out = layer(hidden_BxLxD, segments_BxL, fold(keys_B, cfg.num_layers + 1))
        if self.head is None or self.head.keeps_unembed:
            unembed_DxV = unembed(cfg, self.dtype, embedding_VxD)
        return ModelOutput(hidden_BxLxD, unembed_DxV, cache, out)


def disturb(cfg: ModelConfig, x_BxLxD: jax.Array, segments_BxL: jax.Array, keys_B: jax.Array | None) -> jax.Array:
    """Embeddings as they enter the first block: with dropout and noise while training."""
    x_BxLxD = layers.dropout(x_BxLxD, cfg.dropout, fold(keys_B, cfg.num_layers))
    x_BxLxD = layers.embed_noise(x_BxLxD, segments_BxL, cfg.embed_noise, fold(keys_B, cfg.num_layers + 2))
    return sharding.constrain(x_BxLxD, "batch", "residual_length", None)


class Embed(nn.Module):
    """Token embedding, plus a learned position embedding where the config says so, plus an encoder's of the type."""

    cfg: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(
        self, tokens_BxL: jax.Array, positions_BxL: jax.Array, types_BxL: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        cfg = self.cfg

        def table(name: str, rows: int, axis: str, init: Init) -> jax.Array:
            axes = (axis, "embed")
            rows_xD = layers.weight(self, name, init, (rows, cfg.embed_dim), axes)
            return sharding.gather(rows_xD.astype(self.dtype), *axes)

        init = initialiser(cfg, "tied_embedding" if cfg.tie_embeddings else "embedding")
        embedding_VxD = table("embedding", cfg.vocab_size, "vocab", init)
        x_BxLxD = layers.lookup(embedding_VxD, tokens_BxL)
        if cfg.position == "learned":
            x_BxLxD += layers.lookup(table("position_embedding", cfg.max_len, "position", SMALL), positions_BxL)
        if cfg.kind == "encoder":
            types_BxL = jnp.zeros_like(tokens_BxL) if types_BxL is None else types_BxL
            x_BxLxD += layers.lookup(table("type_embedding", 2, "type", SMALL), types_BxL)
        return x_BxLxD, embedding_VxD


def unembed(cfg: ModelConfig, dtype: Any, embedding_VxD: jax.Array) -> jax.Array:
    """The output projection, [D, V]; inside the call of a module. What muP makes of the logits is in it."""
    ratio = mup.width_ratio(cfg)
    unembed_DxV = embedding_VxD.T if cfg.tie_embeddings else Unembed(cfg, dtype, name="lm_head")()
    return unembed_DxV if ratio == 1 else ratio * unembed_DxV


class Unembed(nn.Module):
    """The output projection of a model that does not tie it to the embedding."""

    cfg: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self) -> jax.Array:
        axes = ("embed", "vocab")
        shape = (self.cfg.embed_dim, self.cfg.vocab_size)
        kernel_DxV = layers.weight(self, "kernel", initialiser(self.cfg, "output"), shape, axes)
        return sharding.gather(kernel_DxV.astype(self.dtype), *axes)
