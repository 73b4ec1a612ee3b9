"""Decoder and encoder of text, top to bottom: embedding, N blocks, final norm, output projection.

GPT-2, Llama and BERT are the same modules with other values of `ModelConfig`. One block is, unless its norms
are elsewhere,

    x += attention(norm(x))
    x += mlp(norm(x))

Parameters are 'embed/...', 'decoder/layers/...' (causal) or 'encoder/layers/...' (bidirectional), 'decoder/final_norm',
'lm_transform/...', 'lm_head/...' or 'head/...'. Those of the layers are stacked [N, ...], whether the layers run as a
scan or unrolled, so that a checkpoint of one is a checkpoint of the other. `lm.models.encoder_decoder` and
`lm.models.vision` are made of the same blocks.

Shape letters: see `lm.types`.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from lm.config import AdapterConfig, ModelConfig
from lm.config.schema import ConfigError
from lm.models import adapters, functional, layers, moe, rope
from lm.models.attention import Mask, attend
from lm.models.heads import HeadLayer
from lm.models.initialisers import SMALL, Init, initialiser
from lm.models.layers import fold
from lm.models.quantization import quantized_type
from lm.models.remat import REMAT_POLICIES
from lm.optim import mup
from lm.parallel import sharding
from lm.types import Batch, Head, ModelFns, ModelOutput


def text_model(
    cfg: ModelConfig, dtype: Any, head: Head | None = None, adapter: AdapterConfig = layers.NO_ADAPTER
) -> ModelFns:
    """A decoder or an encoder as pure functions.

    Args:
      cfg: as `resolve` returns it.
      dtype: compute dtype of activations, float32 or bfloat16.
      head: output layer of a task; None = the model predicts tokens.
      adapter: adapter of the blocks.
    """
    module = TextModel(cfg, dtype, head, adapter)
    tokens = np.zeros((1, 1), np.int32)
    return functional.model_fns(module, {"tokens": tokens, "positions": tokens, "segment_ids": tokens}, cfg)


class TextModel(nn.Module):
    """Embedding, N blocks, final norm, and the output projection or a task's head."""

    cfg: ModelConfig
    dtype: Any
    head: Head | None
    adapter: AdapterConfig

    @nn.compact
    def __call__(self, batch: Batch, keys_B: jax.Array | None, cache: Any) -> ModelOutput:
        """Logits are not computed here: the loss multiplies hidden states by `unembed_DxV` chunk by chunk.

        Args:
          batch: see `lm.types.Batch`.
          keys_B: a key for each row, which turns dropout on.
          cache: key/value cache of the positions before those in `batch`, from `ModelFns.init_cache`; None = no cache.
        """
        cfg = self.cfg
        is_causal = cfg.kind != "encoder"
        positions_BxL, segments_BxL = batch["positions"], batch["segment_ids"]

        embed = Embed(cfg, self.dtype, name="embed")
        x_BxLxD, embedding_VxD = embed(batch["tokens"], positions_BxL, batch.get("type_ids"))
        x_BxLxD = regularise_embeddings(cfg, x_BxLxD, segments_BxL, keys_B)

        stack = Stack(cfg, self.dtype, self.adapter, name="decoder" if is_causal else "encoder")
        if cache is None:
            prefix_BxL = batch.get("is_prefix")
            mask = Mask(segments_BxL, segments_BxL, cfg.sliding_window, causal=is_causal, is_prefix_BxS=prefix_BxL)
            hidden_BxLxD, _ = stack(x_BxLxD, mask, positions_BxL, keys_B, None)
        else:
            mask, cache = functional.extend_cache(cache, batch, cfg.sliding_window)
            hidden_BxLxD, cache["layers"] = stack(x_BxLxD, mask, positions_BxL, keys_B, cache["layers"])

        head_out, unembed_DxV, transformed_BxLxD = None, None, None
        if self.head is not None:
            head = HeadLayer(cfg, self.head, name="head")
            head_out = head(hidden_BxLxD, segments_BxL, fold(keys_B, cfg.num_layers + 1))
        if self.head is None or self.head.keeps_unembed:
            unembed_DxV = unembed(cfg, self.dtype, embedding_VxD)
            if cfg.lm_transform:
                transform = LmTransform(cfg, self.dtype, name="lm_transform")
                transformed_BxLxD, unembed_DxV = transform(hidden_BxLxD, unembed_DxV)
        return ModelOutput(hidden_BxLxD, unembed_DxV, cache, head_out, transformed_BxLxD=transformed_BxLxD)


class Embed(nn.Module):
    """Token embedding, plus learned positions (`model.position`) and, in an encoder, an embedding of the sentence."""

    cfg: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(
        self, tokens_BxL: jax.Array, positions_BxL: jax.Array, types_BxL: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """(embeddings [B, L, D], the token table [V, D], to which the output projection may be tied)."""
        cfg = self.cfg

        def table(name: str, rows: int, axis: str, init: Init) -> jax.Array:
            axes = (axis, "embed")
            rows_xD = layers.weight(self, name, init, (rows, cfg.embed_dim), axes)
            return sharding.gather(rows_xD.astype(self.dtype), *axes)

        init = initialiser(cfg, "tied_embedding" if cfg.tie_embeddings and not cfg.scale_logits else "embedding")
        embedding_VxD = table("embedding", cfg.vocab_size, "vocab", init)
        x_BxLxD = layers.lookup(embedding_VxD, tokens_BxL)
        if cfg.scale_embeddings:
            x_BxLxD *= jnp.asarray(math.sqrt(cfg.embed_dim), self.dtype)
        if cfg.position == "learned":
            rows = cfg.unused_positions + cfg.max_len
            table_PxD = table("position_embedding", rows, "position", SMALL)
            x_BxLxD += layers.lookup(table_PxD, positions_BxL + cfg.unused_positions)
        if cfg.kind == "encoder":
            if types_BxL is None or cfg.sentence_types == 1:
                types_BxL = jnp.zeros_like(tokens_BxL)
            x_BxLxD += layers.lookup(table("type_embedding", cfg.sentence_types, "type", SMALL), types_BxL)
        if cfg.embed_norm:
            x_BxLxD = layers.Norm(cfg.norm, cfg.norm_eps, cfg.use_bias, name="norm")(x_BxLxD)
        return x_BxLxD, embedding_VxD


def regularise_embeddings(
    cfg: ModelConfig, x_BxLxD: jax.Array, segments_BxL: jax.Array, keys_B: jax.Array | None
) -> jax.Array:
    """Embeddings with dropout and noise (NEFTune) while training, in the residual stream's sharding."""
    x_BxLxD = layers.dropout(x_BxLxD, cfg.dropout, fold(keys_B, cfg.num_layers))
    x_BxLxD = layers.embed_noise(x_BxLxD, segments_BxL, cfg.neftune_alpha, fold(keys_B, cfg.num_layers + 2))
    return sharding.constrain(x_BxLxD, "batch", "residual_length", None)


@flax.struct.dataclass
class Memory:
    """An encoder's output, to which the blocks of a decoder attend.

    Attributes:
      mask: the encoder's positions that each query sees.
      hidden_BxSxD: the encoder's hidden states; None = their keys and values are in the cache.
    """

    mask: Mask
    hidden_BxSxD: jax.Array | None


class Stack(nn.Module):
    """N blocks by `nn.scan`, then the final norm, unless the blocks end in a norm (model.norm_position=post)."""

    cfg: ModelConfig
    dtype: Any
    adapter: AdapterConfig = layers.NO_ADAPTER

    @nn.compact
    def __call__(
        self,
        x_BxLxD: jax.Array,
        mask: Mask,
        positions_BxL: jax.Array,
        keys_B: jax.Array | None,
        cache_kv: Any,
        memory: Memory | None = None,
    ) -> tuple[jax.Array, Any]:
        """(hidden states [B, L, D], the updated `cache_kv`: None without a cache)."""
        cfg = self.cfg
        if cfg.position == "relative":
            bias = layers.RelativeBias(cfg.num_heads, not mask.causal, name="relative_bias")
            sizes = (mask.query_segments_BxL.shape[1], mask.key_segments_BxS.shape[1])
            mask = dataclasses.replace(mask, bias_HxLxS=bias(*sizes, 0 if mask.offset is None else mask.offset))
        # One new position: no layer's weights, keys and values are copied out of those of all layers, nor back.
        is_decoding = cache_kv is not None and x_BxLxD.shape[1] == 1
        unroll = cfg.num_layers if is_decoding else cfg.unroll or cfg.num_layers
        block: Any = Block
        if cfg.remat != "none" or sharding.is_distributed_trace():
            # Within a scan XLA cannot merge the recomputation with the forward pass, so CSE need not be prevented.
            block = nn.remat(Block, policy=REMAT_POLICIES[cfg.remat], prevent_cse=unroll > 1)
        scanned = nn.scan(
            block,
            variable_axes={"params": 0, moe.ROUTING: 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast, 0, 0),
            length=cfg.num_layers,
            unroll=unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        stacked_kv = None if cache_kv is None else jax.tree.map(lambda *layers: jnp.stack(layers), *cache_kv)
        x_BxLxD, stacked_kv = scanned(cfg, self.dtype, self.adapter, name="layers")(
            x_BxLxD, mask, positions_BxL, keys_B, memory, jnp.arange(cfg.num_layers), stacked_kv
        )
        if cache_kv is not None:
            cache_kv = tuple(jax.tree.map(operator.itemgetter(i), stacked_kv) for i in range(cfg.num_layers))
        if cfg.norm_position != "post":
            x_BxLxD = layers.Norm(cfg.norm, cfg.norm_eps, cfg.use_bias, name="final_norm")(x_BxLxD)
        return sharding.gather_positions(x_BxLxD), cache_kv


class Block(nn.Module):
    """x += attention(norm(x)); of a decoder with a memory x += cross_attention(norm(x)); x += mlp(norm(x)).

    With model.norm_position=both, x += norm(attention(norm(x))) and x += norm(mlp(norm(x))); with post,
    x = norm(x + attention(x)) and x = norm(x + mlp(x)), by the norms of the same names (Vaswani et al. 2017).
    """

    cfg: ModelConfig
    dtype: Any
    adapter: AdapterConfig = layers.NO_ADAPTER

    @nn.compact
    def __call__(
        self,
        x_BxLxD: jax.Array,
        mask: Mask,
        positions_BxL: jax.Array,
        keys_B: Any,
        memory: Memory | None,
        layer: jax.Array,
        cache_kv: Any,
    ) -> tuple[jax.Array, Any]:
        """(x [B, L, D], the layer's updated `cache_kv`).

        The numbers that keys are folded with are part of the random stream: a resumed run needs the same ones.
        """
        cfg = self.cfg
        keys_B = fold(keys_B, layer)
        self_kv, cross_kv = (None, None) if cache_kv is None else (cache_kv[:2], cache_kv[2:])

        is_post = cfg.norm_position == "post"

        def norm(name: str, x_BxLxD: jax.Array) -> jax.Array:
            return layers.Norm(cfg.norm, cfg.norm_eps, cfg.use_bias, name=name)(x_BxLxD)

        def branch_input(name: str, x_BxLxD: jax.Array) -> jax.Array:
            return sharding.gather_positions(x_BxLxD if is_post else norm(f"{name}_norm", x_BxLxD))

        def add(name: str, x_BxLxD: jax.Array, y_BxLxD: jax.Array, dropout_key: int) -> jax.Array:
            if cfg.norm_position == "both":
                y_BxLxD = norm(f"{name}_post_norm", y_BxLxD)
            y_BxLxD = sharding.constrain(y_BxLxD, "batch", "residual_length", None)
            y_BxLxD = layers.dropout(y_BxLxD, cfg.dropout, fold(keys_B, dropout_key))
            x_BxLxD += adapters.adapt(self.adapter, f"adapter_{name}", y_BxLxD, self.dtype)
            return norm(f"{name}_norm", x_BxLxD) if is_post else x_BxLxD

        attention = Attention(cfg, self.dtype, self.adapter, name="attention")
        in_BxLxD = branch_input("attention", x_BxLxD)
        y_BxLxD, cache_kv = attention(in_BxLxD, mask, positions_BxL, self_kv, fold(keys_B, 2), layer)
        x_BxLxD = add("attention", x_BxLxD, y_BxLxD, 0)

        if memory is not None:
            cross_attention = CrossAttention(cfg, self.dtype, self.adapter, name="cross_attention")
            in_BxLxD = branch_input("cross_attention", x_BxLxD)
            y_BxLxD, cross_kv = cross_attention(in_BxLxD, memory, cross_kv, fold(keys_B, 5))
            cache_kv = None if cache_kv is None else (*cache_kv, *cross_kv)
            x_BxLxD = add("cross_attention", x_BxLxD, y_BxLxD, 4)

        in_BxLxD = branch_input("mlp", x_BxLxD)
        if cfg.num_experts:
            y_BxLxD = moe.Experts(cfg, self.dtype, name="mlp")(in_BxLxD, mask.query_segments_BxL)
        else:
            y_BxLxD = Mlp(cfg, self.dtype, self.adapter, name="mlp")(in_BxLxD, fold(keys_B, 3))
        x_BxLxD = add("mlp", x_BxLxD, y_BxLxD, 1)
        return sharding.constrain(x_BxLxD, "batch", "residual_length", None), cache_kv


class Attention(nn.Module):
    """Multi-head attention with grouped key/value heads (Ainslie et al. 2023), with an optional key/value cache."""

    cfg: ModelConfig
    dtype: Any
    adapter: AdapterConfig = layers.NO_ADAPTER

    @nn.compact
    def __call__(
        self,
        x_BxLxD: jax.Array,
        mask: Mask,
        positions_BxL: jax.Array,
        cache_kv: Any,
        keys_B: jax.Array | None,
        layer: jax.Array,
    ) -> tuple[jax.Array, Any]:
        cfg = self.cfg
        is_global = (layer + 1) % cfg.global_every == 0 if cfg.global_every else None
        rotate = None
        if cfg.position == "rope":
            frequency, magnitude = rope.of_layer(cfg, positions_BxL, mask.query_segments_BxL, is_global)
            rotate = functools.partial(
                rope.rotate, positions_BxL=positions_BxL, frequency=frequency, magnitude=magnitude
            )
        query_BxLxHxE = _project_heads(self, "query", cfg.num_heads, x_BxLxD, keys_B, rotate)
        key_BxSxKxE = _project_heads(self, "key", cfg.num_kv_heads, x_BxLxD, keys_B, rotate)
        value_BxSxKxE = _project_heads(self, "value", cfg.num_kv_heads, x_BxLxD, keys_B)
        if cache_kv is not None:
            start: Any = (0, 0, mask.offset, 0)
            cache_kv = tuple(
                jax.lax.dynamic_update_slice(
                    cached_BxKxSxE, new_BxLxKxE.swapaxes(1, 2).astype(cached_BxKxSxE.dtype), start
                )
                for cached_BxKxSxE, new_BxLxKxE in zip(cache_kv, (key_BxSxKxE, value_BxSxKxE), strict=True)
            )
            key_BxSxKxE, value_BxSxKxE = (cached_BxKxSxE.swapaxes(1, 2) for cached_BxKxSxE in cache_kv)
        attend_to = functools.partial(attend, query_BxLxHxE, key_BxSxKxE, value_BxSxKxE, softcap=cfg.attention_softcap)
        if is_global is None:
            y_BxLxHxE = attend_to(mask)
        else:  # backends need to know the window when they are compiled
            whole = dataclasses.replace(mask, window=0)
            y_BxLxHxE = jax.lax.cond(is_global, lambda: attend_to(whole), lambda: attend_to(mask))
        return _project_out(self, y_BxLxHxE, keys_B), cache_kv


class CrossAttention(nn.Module):
    """Attention of a decoder to an encoder's output (Vaswani et al. 2017), whose keys and values are computed once."""

    cfg: ModelConfig
    dtype: Any
    adapter: AdapterConfig

    @nn.compact
    def __call__(
        self, x_BxLxD: jax.Array, memory: Memory, cache_kv: Any, keys_B: jax.Array | None
    ) -> tuple[jax.Array, Any]:
        cfg, hidden_BxSxD = self.cfg, memory.hidden_BxSxD
        query_BxLxHxE = _project_heads(self, "query", cfg.num_heads, x_BxLxD, keys_B)
        if hidden_BxSxD is not None:
            names = ("key", "value")
            cache_kv = tuple(_project_heads(self, name, cfg.num_kv_heads, hidden_BxSxD, keys_B) for name in names)
        key_BxSxKxE, value_BxSxKxE = cache_kv
        y_BxLxHxE = attend(query_BxLxHxE, key_BxSxKxE, value_BxSxKxE, memory.mask, softcap=cfg.attention_softcap)
        return _project_out(self, y_BxLxHxE, keys_B), cache_kv


def _project_heads(
    module: Any,
    name: str,
    heads: int,
    x_BxLxD: jax.Array,
    keys_B: jax.Array | None,
    rotate: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """The query, key or value of each head, [B, L, heads, E]; called in an attention `module`.

    Normalised with `model.qk_norm`, then rotated where there is a `rotate`; queries are scaled already.
    """
    cfg, axis = module.cfg, "heads" if name == "query" else "kv_heads"
    dense = _dense(module)(heads * cfg.head_dim, ("embed", axis), name=name, use_bias=cfg.use_bias or cfg.qkv_bias)
    y_BxLxHE = dense(x_BxLxD, keys_B)
    y_BxLxHE = sharding.constrain(y_BxLxHE, "batch", "length", axis)
    y = y_BxLxHE.reshape(*y_BxLxHE.shape[:2], heads, cfg.head_dim)
    is_normed = cfg.qk_norm and name != "value"
    if is_normed:  # remat keeps the norm's input, which its backward pass reads
        kind = "rmsnorm" if cfg.norm == "layernorm" else cfg.norm
        y = layers.Norm(kind, cfg.norm_eps, name=f"{name}_norm")(checkpoint_name(y, name))
    if rotate is not None:
        y = rotate(y)
    if name == "query":  # scaled here and not in `attend`, so that remat keeps what the attention kernel reads
        y *= mup.query_scale(cfg)
    return y if is_normed else checkpoint_name(y, name)


def _project_out(module: Any, y_BxLxHxE: jax.Array, keys_B: jax.Array | None) -> jax.Array:
    """The heads' outputs, projected back to [B, L, D]; called in an attention `module`."""
    cfg = module.cfg
    y_BxLxHE = sharding.constrain(y_BxLxHxE.reshape(*y_BxLxHxE.shape[:2], -1), "batch", "length", "heads")
    out = _dense(module)(cfg.embed_dim, ("heads", "embed"), kernel_init=initialiser(cfg, "residual"), name="out")
    y_BxLxD = sharding.constrain(out(y_BxLxHE, keys_B), "batch", "residual_length", None)
    # The barrier keeps XLA from fusing the residual addition into the matmul, slower on TPU than a pass of its own.
    return checkpoint_name(jax.lax.optimization_barrier(y_BxLxD), "out")


class Mlp(nn.Module):
    """down(act(up(x))), with GELU in the tanh form of GPT-2 or exact, or ReLU; or gated: down(silu(gate(x)) * up(x)),
    called SwiGLU, and GeGLU with GELU in place of SiLU (Shazeer 2020)."""

    cfg: ModelConfig
    dtype: Any
    adapter: AdapterConfig = layers.NO_ADAPTER

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, keys_B: jax.Array | None = None) -> jax.Array:
        cfg = self.cfg
        dense = _dense(self)

        def widen(name: str) -> jax.Array:
            y_BxLxF = dense(cfg.mlp_dim, ("embed", "mlp"), name=name)(x_BxLxD, keys_B)
            return checkpoint_name(sharding.constrain(y_BxLxF, "batch", "length", "mlp"), name)

        match cfg.mlp:
            case "swiglu":
                y_BxLxF = jax.nn.silu(widen("gate")) * widen("up")
            case "geglu":
                y_BxLxF = jax.nn.gelu(widen("gate")) * widen("up")
            case "relu":
                y_BxLxF = jax.nn.relu(widen("up"))
            case _:
                y_BxLxF = jax.nn.gelu(widen("up"), approximate=cfg.mlp == "gelu")
        down = dense(cfg.embed_dim, ("mlp", "embed"), kernel_init=initialiser(cfg, "residual"), name="down")
        return down(y_BxLxF, keys_B)


def _dense(module: Any) -> Any:
    """`layers.Dense` with the settings that all kernels of an attention or MLP `module` share."""
    cfg = module.cfg
    return functools.partial(
        layers.Dense,
        use_bias=cfg.use_bias,
        dtype=module.dtype,
        kernel_init=initialiser(cfg, "kernel"),
        quantize=quantized_type(cfg.dtype),
        adapter=module.adapter,
    )


def unembed(cfg: ModelConfig, dtype: Any, embedding_VxD: jax.Array) -> jax.Array:
    """The output projection [D, V], tied to the embedding or not; the factors of the logits are in it: muP's, and
    1 / sqrt(D) with `model.scale_logits`.

    Called in a module, to which the parameters 'lm_head/...' belong.
    """
    ratio = mup.width_ratio(cfg) * (cfg.embed_dim**-0.5 if cfg.scale_logits else 1.0)
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


_BIAS_ROWS = 128  # that hold the biases of the logits: as many as keep the matmul's size a multiple of a tile


class LmTransform(nn.Module):
    """norm(gelu(dense(hidden))) before the output projection, and the biases of its logits (Devlin et al. 2019).

    The biases are more rows of the projection, for an input that is always 1: the losses know of no biases.
    """

    cfg: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self, hidden_BxLxD: jax.Array, unembed_DxV: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What the projection multiplies, [B, L, D + _BIAS_ROWS], and the projection with the biases, [.., V]."""
        cfg, axes = self.cfg, ("head_in", "head_hidden")
        dense = layers.Dense(cfg.embed_dim, axes, cfg.use_bias, self.dtype, initialiser(cfg, "kernel"), name="dense")
        y_BxLxD = jax.nn.gelu(dense(hidden_BxLxD), approximate=cfg.mlp != "gelu_exact")
        y_BxLxD = layers.Norm(cfg.norm, cfg.norm_eps, cfg.use_bias, name="norm")(y_BxLxD)
        bias_V = layers.weight(self, "output_bias", nn.initializers.zeros, (cfg.vocab_size,), ("vocab",))
        bias_V = sharding.gather(bias_V.astype(self.dtype), "vocab")
        one = (jnp.arange(_BIAS_ROWS) == 0).astype(self.dtype)
        ones = jnp.broadcast_to(one[None, None], (*y_BxLxD.shape[:2], _BIAS_ROWS))
        whole_DxV = jnp.concatenate([unembed_DxV, one[:, None] * bias_V[None]], axis=0)
        return jnp.concatenate([y_BxLxD, ones], axis=2), whole_DxV


def resolve(cfg: ModelConfig, *, vocab_size: int, seq_len: int) -> ModelConfig:
    """Fills in the sizes that 0 leaves open.

    Args:
      cfg: the model's config.
      vocab_size: ids of the tokenizer.
      seq_len: positions of a row.

    Raises:
      ConfigError: the embedding has fewer rows than the tokenizer has ids, or rope has an odd head width.
    """
    if cfg.vocab_size and cfg.vocab_size < vocab_size:
        raise ConfigError(f"'model.vocab_size' ({cfg.vocab_size}) is less than the tokenizer's {vocab_size} ids")
    head_dim = cfg.head_dim or cfg.embed_dim // cfg.num_heads
    if cfg.position == "rope" and head_dim % 2:
        raise ConfigError(f"'model.head_dim' must be even for rope, got {head_dim}")
    decoder_layers = cfg.decoder_layers or cfg.num_layers * (cfg.kind in ("encoder_decoder", "mae"))
    mlp_dim = cfg.mlp_dim or 4 * cfg.embed_dim
    if cfg.kind == "mae":
        width = cfg.decoder_dim or cfg.embed_dim
        cfg = dataclasses.replace(
            cfg,
            decoder_dim=width,
            decoder_heads=cfg.decoder_heads or cfg.num_heads,
            decoder_mlp_dim=cfg.decoder_mlp_dim or mlp_dim * width // cfg.embed_dim,
        )
    return dataclasses.replace(
        cfg,
        decoder_layers=decoder_layers,
        vocab_size=cfg.vocab_size or math.ceil(vocab_size / 128) * 128,
        max_len=cfg.max_len or seq_len,
        num_kv_heads=cfg.num_kv_heads or cfg.num_heads,
        head_dim=head_dim,
        mlp_dim=mlp_dim,
    )
