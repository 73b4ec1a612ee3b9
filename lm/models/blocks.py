"""The block that every model is a stack of: attention, an encoder's output where there is one, MLP.

Shape letters: see `lm.types`. Parameters of the layers are always stacked [N, ...], whether the layers run as a scan or
unrolled: a checkpoint of one is a checkpoint of the other.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lm.config import AdapterConfig, ModelConfig
from lm.models import adapters, attention, layers, moe
from lm.models.attention import Mask, attend
from lm.models.initialisers import initialiser
from lm.models.layers import fold
from lm.models.quantization import quantized_type
from lm.optim import mup
from lm.parallel import sharding

# What is kept of a layer's forward pass for its backward pass, by the names of `checkpoint_name`; the rest is computed
# again. What is gathered for use is never kept, but gathered again, or every layer's would be held: weights (ZeRO-3),
# and the keys and values of positions that lie elsewhere.
_QKV = ("query", "key", "value")
_MATMULS = (*_QKV, attention.NAME, "out", "gate", "up")  # all matmuls but the last, whose result none needs
_names = jax.checkpoint_policies.save_only_these_names
REMAT_POLICIES = {
    "none": lambda primitive, *_, **__: primitive.name not in ("sharding_constraint", "all_gather"),
    "minimal": _names(*_MATMULS),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(  # the same, in the host's memory meanwhile
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=_MATMULS,
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "attention": _names(*_QKV, attention.NAME, "out"),
    "qkv": _names(*_QKV),
    "full": jax.checkpoint_policies.nothing_saveable,  # the layer's input only
}


@flax.struct.dataclass
class Memory:
    """What a decoder's blocks read of an encoder.

    Attributes:
      mask: which of its positions each query sees.
      hidden_BxSxD: its output; None = keys and values of it are in the cache.
    """

    mask: Mask
    hidden_BxSxD: jax.Array | None


class Stack(nn.Module):
    """N blocks by `nn.scan`, then the final norm."""

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
        """(output, what `cache_kv` becomes). Both are None without a cache."""
        cfg = self.cfg
        if cfg.position == "relative":
            bias = layers.RelativeBias(cfg.num_heads, not mask.causal, name="relative_bias")
            sizes = (mask.query_segments_BxL.shape[1], mask.key_segments_BxS.shape[1])
            mask = dataclasses.replace(mask, bias_HxLxS=bias(*sizes, 0 if mask.offset is None else mask.offset))
        unroll = cfg.unroll or cfg.num_layers
        block: Any = Block
        if cfg.remat != "none" or sharding.is_distributed_trace():
            # Inside a loop XLA cannot merge the recomputation with the forward pass, so nothing must prevent it.
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
        x_BxLxD, cache_kv = scanned(cfg, self.dtype, self.adapter, name="layers")(
            x_BxLxD, mask, positions_BxL, keys_B, memory, jnp.arange(cfg.num_layers), cache_kv
        )
        x_BxLxD = layers.Norm(cfg.norm, cfg.norm_eps, cfg.use_bias, name="final_norm")(x_BxLxD)
        return sharding.gather_positions(x_BxLxD), cache_kv


class Block(nn.Module):
    """x + attention(norm(x)), then (with a memory) x + cross_attention(norm(x)), then x + mlp(norm(x))."""

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
        cfg = self.cfg

        def norm(name: str, x: jax.Array) -> jax.Array:
            return sharding.gather_positions(layers.Norm(cfg.norm, cfg.norm_eps, cfg.use_bias, name=name)(x))

        keys_B = fold(keys_B, layer)

        def added(name: str, y: jax.Array, number: int) -> jax.Array:
            y = sharding.constrain(y, "batch", "residual_length", None)
            y = layers.dropout(y, cfg.dropout, fold(keys_B, number))
            return adapters.adapt(self.adapter, f"adapter_{name}", y, self.dtype)

        self_kv, cross_kv = (None, None) if cache_kv is None else (cache_kv[:2], cache_kv[2:])
        attention = Attention(cfg, self.dtype, self.adapter, name="attention")
        normed_BxLxD = norm("attention_norm", x_BxLxD)
        y_BxLxD, cache_kv = attention(normed_BxLxD, mask, positions_BxL, self_kv, fold(keys_B, 2))
        x_BxLxD += added("attention", y_BxLxD, 0)
        if memory is not None:
            cross = CrossAttention(cfg, self.dtype, self.adapter, name="cross_attention")
            normed_BxLxD = norm("cross_attention_norm", x_BxLxD)
            y_BxLxD, cross_kv = cross(normed_BxLxD, memory, cross_kv, fold(keys_B, 5))
            cache_kv = None if cache_kv is None else (*cache_kv, *cross_kv)
            x_BxLxD += added("cross_attention", y_BxLxD, 4)
        normed_BxLxD = norm("mlp_norm", x_BxLxD)
        if cfg.experts[0]:
            y_BxLxD = moe.Experts(cfg, self.dtype, name="mlp")(normed_BxLxD, mask.query_segments_BxL)
        else:
            y_BxLxD = Mlp(cfg, self.dtype, self.adapter, name="mlp")(normed_BxLxD, fold(keys_B, 3))
        x_BxLxD += added("mlp", y_BxLxD, 1)
        return sharding.constrain(x_BxLxD, "batch", "residual_length", None), cache_kv


class Attention(nn.Module):
    """Multi-head attention with grouped key/value heads (Ainslie et al. 2023), reading and writing a cache if given."""

    cfg: ModelConfig
    dtype: Any
    adapter: AdapterConfig = layers.NO_ADAPTER

    @nn.compact
    def __call__(
        self, x_BxLxD: jax.Array, mask: Mask, positions_BxL: jax.Array, cache_kv: Any, keys_B: jax.Array | None
    ) -> tuple[jax.Array, Any]:
        cfg = self.cfg
        turned = positions_BxL if cfg.position == "rope" else None
        query_BxLxHxE = _heads(self, "query", cfg.num_heads, x_BxLxD, keys_B, turned)
        key = _heads(self, "key", cfg.num_kv_heads, x_BxLxD, keys_B, turned)
        value = _heads(self, "value", cfg.num_kv_heads, x_BxLxD, keys_B)
        if cache_kv is not None:
            at: Any = (0, mask.offset, 0, 0)
            key, value = (
                jax.lax.dynamic_update_slice(old, new.astype(old.dtype), at)
                for old, new in zip(cache_kv, (key, value), strict=True)
            )
            cache_kv = (key, value)
        y_BxLxHxE = attend(query_BxLxHxE, key, value, mask, softcap=cfg.attention_softcap)
        return _output(self, y_BxLxHxE, keys_B), cache_kv


class CrossAttention(nn.Module):
    """Attention of a decoder to an encoder's output (Vaswani et al. 2017), whose keys and values it makes only once."""

    cfg: ModelConfig
    dtype: Any
    adapter: AdapterConfig

    @nn.compact
    def __call__(
        self, x_BxLxD: jax.Array, memory: Memory, cache_kv: Any, keys_B: jax.Array | None
    ) -> tuple[jax.Array, Any]:
        cfg, hidden_BxSxD = self.cfg, memory.hidden_BxSxD
        query_BxLxHxE = _heads(self, "query", cfg.num_heads, x_BxLxD, keys_B)
        if hidden_BxSxD is not None:
            cache_kv = tuple(_heads(self, name, cfg.num_kv_heads, hidden_BxSxD, keys_B) for name in ("key", "value"))
        key, value = cache_kv
        y_BxLxHxE = attend(query_BxLxHxE, key, value, memory.mask, softcap=cfg.attention_softcap)
        return _output(self, y_BxLxHxE, keys_B), cache_kv


def _dense(module: Any) -> Any:
    """`layers.Dense` as the model of this attention or MLP has it."""
    cfg, quantize = module.cfg, quantized_type(module.cfg.dtype)
    return functools.partial(
        layers.Dense,
        use_bias=cfg.use_bias,
        dtype=module.dtype,
        kernel_init=initialiser(cfg, "kernel"),
        quantize=quantize,
        adapter=module.adapter,
    )


def _heads(
    module: Any,
    name: str,
    heads: int,
    x_BxLxD: jax.Array,
    keys_B: jax.Array | None,
    turned_BxL: jax.Array | None = None,
) -> jax.Array:
    """The query, key or value of each head, [B, L, heads, E]; inside the call of an attention `module`.

    `turned_BxL`: the positions by which rotary embedding turns them.
    """
    cfg, axis = module.cfg, "heads" if name == "query" else "kv_heads"
    dense = _dense(module)
    y = dense(heads * cfg.head_dim, ("embed", axis), name=name)(x_BxLxD, keys_B)
    y = sharding.constrain(y, "batch", "length", axis)
    y = y.reshape(*y.shape[:2], heads, cfg.head_dim)
    is_normed = cfg.qk_norm and name != "value"
    if is_normed:  # whose backward pass needs what it was given
        y = layers.Norm("rmsnorm", cfg.norm_eps, name=f"{name}_norm")(checkpoint_name(y, name))
    if turned_BxL is not None:
        y = layers.rope(y, turned_BxL, cfg.rope_theta)
    if name == "query":  # here and not in attention, so that what is kept of it is what the kernel reads
        y *= mup.query_scale(cfg)
    return y if is_normed else checkpoint_name(y, name)


def _output(module: Any, y_BxLxHxE: jax.Array, keys_B: jax.Array | None) -> jax.Array:
    cfg = module.cfg
    y_BxLxHE = sharding.constrain(y_BxLxHxE.reshape(*y_BxLxHxE.shape[:2], -1), "batch", "length", "heads")
    dense = _dense(module)
    out = dense(cfg.embed_dim, ("heads", "embed"), kernel_init=initialiser(cfg, "residual"), name="out")
    y_BxLxD = sharding.constrain(out(y_BxLxHE, keys_B), "batch", "residual_length", None)
    # The barrier keeps a TPU's compiler from adding to the residual stream inside the matmul, slower than a pass more.
    return checkpoint_name(jax.lax.optimization_barrier(y_BxLxD), "out")


class Mlp(nn.Module):
    """GELU (tanh form, as GPT-2) or SwiGLU (Shazeer 2020)."""

    cfg: ModelConfig
    dtype: Any
    adapter: AdapterConfig = layers.NO_ADAPTER

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, keys_B: jax.Array | None = None) -> jax.Array:
        cfg = self.cfg
        dense = _dense(self)

        def widen(name: str) -> jax.Array:
            y = dense(cfg.mlp_dim, ("embed", "mlp"), name=name)(x_BxLxD, keys_B)
            return checkpoint_name(sharding.constrain(y, "batch", "length", "mlp"), name)

        y_BxLxF = jax.nn.silu(widen("gate")) * widen("up") if cfg.mlp == "swiglu" else jax.nn.gelu(widen("up"))
        down = dense(cfg.embed_dim, ("mlp", "embed"), kernel_init=initialiser(cfg, "residual"), name="down")
        return down(y_BxLxF, keys_B)
