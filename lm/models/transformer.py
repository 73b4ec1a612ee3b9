"""Models of text: GPT-2, Llama and BERT are the same block with other values of `ModelConfig`.

Shape letters: see `lm.types`. Parameters of the layers are always stacked [N, ...] under 'decoder/layers' (causal) or
'encoder/layers' (bidirectional), whether the layers run as a scan or unrolled: a checkpoint of one is a checkpoint of
the other.
"""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm import sharding
from lm.config import AdapterConfig, ModelConfig
from lm.models import adapters, layers
from lm.models.attention import Mask, attend
from lm.models.heads import HeadLayer
from lm.schema import ConfigError
from lm.types import Batch, Head, ModelFns, ModelOutput, Params

# What is kept of a layer's forward pass for its backward pass; the rest is computed again.
REMAT_POLICIES = {
    # All but what only moves: a weight gathered over 'fsdp' is gathered again, or every layer's would be held (ZeRO-3).
    "none": lambda primitive, *_, **__: primitive.name != "sharding_constraint",
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # results of weight matmuls
    "full": jax.checkpoint_policies.nothing_saveable,  # the layer's input only
}


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
    tokens = jnp.zeros((1, 1), jnp.int32)
    fns = functions(
        TextModel(cfg, dtype, head, adapter), {"tokens": tokens, "positions": tokens, "segment_ids": tokens}
    )

    def init_cache(rows: int, length: int) -> Any:
        shape = (cfg.num_layers, rows, length, cfg.num_kv_heads, cfg.head_dim)
        return {
            "key": jnp.zeros(shape, dtype),
            "value": jnp.zeros(shape, dtype),
            "segment_ids": jnp.zeros((rows, length), jnp.int32),
            "index": jnp.zeros((), jnp.int32),
        }

    return fns._replace(init_cache=init_cache)


def functions(module: nn.Module, batch: Batch) -> ModelFns:
    """A module as pure functions, without a cache.

    Args:
      module: called with (batch, a key for each row or None, cache or None), it returns a `ModelOutput`.
      batch: any that has the keys which the module reads; its sizes decide those of the parameters.
    """

    def boxed_init(key: jax.Array) -> Any:
        return module.init(key, batch, None, None)["params"]

    def apply(params: Params, batch: Batch, *, rng: jax.Array | None = None, cache: Any = None) -> ModelOutput:
        keys_B = None
        if rng is not None:
            keys_B = jax.vmap(jax.random.fold_in, (None, 0))(rng, batch["example_index"])
        out: Any = module.apply({"params": params}, batch, keys_B, cache)
        return out

    def logical_axes() -> Any:
        specs = nn.get_partition_spec(jax.eval_shape(boxed_init, jax.eval_shape(lambda: jax.random.key(0))))
        return jax.tree.map(tuple, specs, is_leaf=lambda x: isinstance(x, jax.P))

    return ModelFns(lambda key: nn.unbox(boxed_init(key)), apply, logical_axes)


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
        x_BxLxD, embedding_VxD = embed(batch["tokens"], batch["positions"], batch.get("type_ids"))
        x_BxLxD = layers.dropout(x_BxLxD, cfg.dropout, fold(keys_B, cfg.num_layers))
        segments_BxL = batch["segment_ids"]
        x_BxLxD = layers.embed_noise(x_BxLxD, segments_BxL, cfg.embed_noise, fold(keys_B, cfg.num_layers + 2))
        x_BxLxD = sharding.constrain(x_BxLxD, "batch", "length", None)
        mask, cache_kv = Mask(segments_BxL, segments_BxL, cfg.sliding_window, causal=causal), None
        if cache is not None:
            start = cache["index"]
            key_segments = jax.lax.dynamic_update_slice(cache["segment_ids"], segments_BxL, (0, start))
            mask = Mask(segments_BxL, key_segments, cfg.sliding_window, start)
            cache_kv = (cache["key"], cache["value"])
            cache = {"segment_ids": key_segments, "index": start + segments_BxL.shape[1]}
        stack = Stack(cfg, self.dtype, self.adapter, name="decoder" if causal else "encoder")
        hidden_BxLxD, cache_kv = stack(x_BxLxD, mask, batch["positions"], keys_B, cache_kv)
        if cache is not None:
            cache |= {"key": cache_kv[0], "value": cache_kv[1]}
        out, unembed_DxV = None, None
        if self.head is not None:
            layer = HeadLayer(cfg, self.head, name="head")
            out = layer(hidden_BxLxD, segments_BxL, fold(keys_B, cfg.num_layers + 1))
        if self.head is None or self.head.keeps_unembed:
            unembed_DxV = embedding_VxD.T if cfg.tie_embeddings else Unembed(cfg, self.dtype, name="lm_head")()
        return ModelOutput(hidden_BxLxD, unembed_DxV, cache, out)


class Embed(nn.Module):
    """Token embedding, plus a learned position embedding where the config says so, plus an encoder's of the type."""

    cfg: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(
        self, tokens_BxL: jax.Array, positions_BxL: jax.Array, types_BxL: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        cfg = self.cfg

        def table(name: str, rows: int, axis: str, std: float) -> jax.Array:
            axes, init = (axis, "embed"), nn.initializers.normal(std)
            rows_xD = layers.weight(self, name, init, (rows, cfg.embed_dim), axes)
            return sharding.gather(rows_xD.astype(self.dtype), *axes)

        # The residual stream starts with entries of size 1, unless the table makes the logits too: then they do.
        std = cfg.embed_dim**-0.5 if cfg.tie_embeddings else 1.0
        embedding_VxD = table("embedding", cfg.vocab_size, "vocab", std)
        x_BxLxD = layers.lookup(embedding_VxD, tokens_BxL)
        if cfg.position == "learned":
            x_BxLxD += layers.lookup(table("position_embedding", cfg.max_len, "position", 0.02), positions_BxL)
        if cfg.kind == "encoder":
            types_BxL = jnp.zeros_like(tokens_BxL) if types_BxL is None else types_BxL
            x_BxLxD += layers.lookup(table("type_embedding", 2, "type", 0.02), types_BxL)
        return x_BxLxD, embedding_VxD


class Unembed(nn.Module):
    """The output projection of a model that does not tie it to the embedding."""

    cfg: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self) -> jax.Array:
        axes = ("embed", "vocab")
        shape = (self.cfg.embed_dim, self.cfg.vocab_size)
        kernel_DxV = layers.weight(self, "kernel", layers.fan_in_normal(), shape, axes)
        return sharding.gather(kernel_DxV.astype(self.dtype), *axes)


class Stack(nn.Module):
    """N blocks by `nn.scan`, then the final norm."""

    cfg: ModelConfig
    dtype: Any
    adapter: AdapterConfig = layers.NO_ADAPTER

    @nn.compact
    def __call__(
        self, x_BxLxD: jax.Array, mask: Mask, positions_BxL: jax.Array, keys_B: jax.Array | None, cache_kv: Any
    ) -> tuple[jax.Array, Any]:
        cfg = self.cfg
        unroll = cfg.unroll or cfg.num_layers
        block: Any = Block
        if cfg.remat != "none" or sharding.is_distributed_trace():
            # Inside a loop XLA cannot merge the recomputation with the forward pass, so nothing must prevent it.
            block = nn.remat(Block, policy=REMAT_POLICIES[cfg.remat], prevent_cse=unroll > 1)
        scanned = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0, 0),
            length=cfg.num_layers,
            unroll=unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x_BxLxD, cache_kv = scanned(cfg, self.dtype, self.adapter, name="layers")(
            x_BxLxD, mask, positions_BxL, keys_B, jnp.arange(cfg.num_layers), cache_kv
        )
        return layers.Norm(cfg.norm, cfg.norm_eps, cfg.use_bias, name="final_norm")(x_BxLxD), cache_kv


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    cfg: ModelConfig
    dtype: Any
    adapter: AdapterConfig = layers.NO_ADAPTER

    @nn.compact
    def __call__(
        self, x_BxLxD: jax.Array, mask: Mask, positions_BxL: jax.Array, keys_B: Any, layer: jax.Array, cache_kv: Any
    ) -> tuple[jax.Array, Any]:
        cfg = self.cfg

        def norm(name: str, x: jax.Array) -> jax.Array:
            return layers.Norm(cfg.norm, cfg.norm_eps, cfg.use_bias, name=name)(x)

        keys_B = fold(keys_B, layer)

        def dropped(name: str, y: jax.Array, number: int) -> jax.Array:
            return adapters.adapt(self.adapter, name, layers.dropout(y, cfg.dropout, fold(keys_B, number)), self.dtype)

        attention = Attention(cfg, self.dtype, self.adapter, name="attention")
        normed_BxLxD = norm("attention_norm", x_BxLxD)
        y_BxLxD, cache_kv = attention(normed_BxLxD, mask, positions_BxL, cache_kv, fold(keys_B, 2))
        x_BxLxD += dropped("adapter_attention", y_BxLxD, 0)
        y_BxLxD = Mlp(cfg, self.dtype, self.adapter, name="mlp")(norm("mlp_norm", x_BxLxD), fold(keys_B, 3))
        x_BxLxD += dropped("adapter_mlp", y_BxLxD, 1)
        return sharding.constrain(x_BxLxD, "batch", "length", None), cache_kv


class Attention(nn.Module):
    """Multi-head attention with grouped key/value heads (Ainslie et al. 2023), reading and writing a cache if given."""

    cfg: ModelConfig
    dtype: Any
    adapter: AdapterConfig = layers.NO_ADAPTER

    @nn.compact
    def __call__(
        self, x_BxLxD: jax.Array, mask: Mask, positions_BxL: jax.Array, cache_kv: Any, keys_B: Any = None
    ) -> tuple[jax.Array, Any]:
        cfg = self.cfg
        dense = functools.partial(layers.Dense, use_bias=cfg.use_bias, dtype=self.dtype, adapter=self.adapter)

        def project(name: str, heads: int, axis: str) -> jax.Array:
            y = dense(heads * cfg.head_dim, ("embed", axis), name=name)(x_BxLxD, keys_B)
            y = sharding.constrain(y, "batch", "length", axis)
            return y.reshape(*y.shape[:2], heads, cfg.head_dim)

        query_BxLxHxE = project("query", cfg.num_heads, "heads")
        key_BxLxKxE = project("key", cfg.num_kv_heads, "kv_heads")
        value_BxLxKxE = project("value", cfg.num_kv_heads, "kv_heads")
        if cfg.qk_norm:
            query_BxLxHxE = layers.Norm("rmsnorm", cfg.norm_eps, name="query_norm")(query_BxLxHxE)
            key_BxLxKxE = layers.Norm("rmsnorm", cfg.norm_eps, name="key_norm")(key_BxLxKxE)
        if cfg.position == "rope":
            query_BxLxHxE = layers.rope(query_BxLxHxE, positions_BxL, cfg.rope_theta)
            key_BxLxKxE = layers.rope(key_BxLxKxE, positions_BxL, cfg.rope_theta)
        key, value = key_BxLxKxE, value_BxLxKxE
        if cache_kv is not None:
            at: Any = (0, mask.offset, 0, 0)
            key, value = (
                jax.lax.dynamic_update_slice(old, new.astype(old.dtype), at)
                for old, new in zip(cache_kv, (key, value), strict=True)
            )
            cache_kv = (key, value)
        y_BxLxHxE = attend(query_BxLxHxE, key, value, mask, softcap=cfg.attention_softcap)
        y_BxLxHE = sharding.constrain(y_BxLxHxE.reshape(*x_BxLxD.shape[:2], -1), "batch", "length", "heads")
        out = dense(cfg.embed_dim, ("heads", "embed"), kernel_init=_residual_init(cfg), name="out")
        return out(y_BxLxHE, keys_B), cache_kv


class Mlp(nn.Module):
    """GELU (tanh form, as GPT-2) or SwiGLU (Shazeer 2020)."""

    cfg: ModelConfig
    dtype: Any
    adapter: AdapterConfig = layers.NO_ADAPTER

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, keys_B: jax.Array | None = None) -> jax.Array:
        cfg = self.cfg
        dense = functools.partial(layers.Dense, use_bias=cfg.use_bias, dtype=self.dtype, adapter=self.adapter)

        def widen(name: str) -> jax.Array:
            y = dense(cfg.mlp_dim, ("embed", "mlp"), name=name)(x_BxLxD, keys_B)
            return sharding.constrain(y, "batch", "length", "mlp")

        y_BxLxF = jax.nn.silu(widen("gate")) * widen("up") if cfg.mlp == "swiglu" else jax.nn.gelu(widen("up"))
        down = dense(cfg.embed_dim, ("mlp", "embed"), kernel_init=_residual_init(cfg), name="down")
        return down(y_BxLxF, keys_B)


def _residual_init(cfg: ModelConfig) -> layers.Init:
    """Smaller by sqrt(2N): the residual stream's variance then does not grow with depth (GPT-2, section 2.3)."""
    return layers.fan_in_normal(1.0 / math.sqrt(2 * cfg.num_layers))


def fold(keys_B: jax.Array | None, data: jax.Array | int) -> jax.Array | None:
    """The rows' keys for one use of randomness, which a number names; None stays None."""
    return None if keys_B is None else jax.vmap(jax.random.fold_in, (0, None))(keys_B, data)
