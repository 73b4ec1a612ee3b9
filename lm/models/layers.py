"""Layers that all models share. Parameters are float32, matmuls run in the compute dtype, norms in float32.

Shape letters: see `lm.types`.
"""

import math
import re
import zlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.config import AdapterConfig
from lm.models.initialisers import Init, fan_in_normal
from lm.models.quantization import quantized_matmul
from lm.parallel import sharding
from lm.parallel.tpu_matmul import matmul, sharded_matmul

NO_ADAPTER = AdapterConfig()


def weight(module: nn.Module, name: str, init: Init, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> jax.Array:
    """A float32 parameter of `module` with its logical axes, sharded: cast and gather it for use."""
    value: Any = module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)
    return value


class Dense(nn.Module):
    """y = x @ kernel + bias over the last axis, plus the LoRA branch where the adapter targets this layer.

    Attributes:
      features: width of the output.
      axes: logical axes of the kernel, (input, output).
      use_bias: whether there is a bias.
      dtype: compute dtype.
      quantize: 8-bit type of the matmul, see `lm.models.quantization`; None = `dtype`.
      kernel_init: initialiser of the kernel.
      adapter: the model's adapter; a LoRA applies if its targets match this layer's path.
    """

    features: int
    axes: tuple[str | None, str | None]
    use_bias: bool
    dtype: Any
    kernel_init: Init = fan_in_normal()
    quantize: Any = None
    adapter: AdapterConfig = NO_ADAPTER

    @nn.compact
    def __call__(self, x: jax.Array, keys_B: jax.Array | None = None) -> jax.Array:
        """x [..., in] -> [..., features]. `keys_B`, one key for each row, turns on the adapter's dropout."""
        kernel = weight(self, "kernel", self.kernel_init, (x.shape[-1], self.features), self.axes)
        kernel = kernel.astype(self.dtype)
        if self.quantize is None:
            y = sharded_matmul(x, kernel, self.axes)
        else:
            y = quantized_matmul(self.quantize, x, sharding.gather(kernel, *self.axes))
        if self.use_bias:
            bias = weight(self, "bias", nn.initializers.zeros, (self.features,), (self.axes[1],))
            # Cast after broadcasting, so that the bias's gradient is accumulated over positions in float32.
            row = _row(sharding.gather(bias, self.axes[1]), y)
            y += jnp.broadcast_to(row, y.shape).astype(self.dtype)
        if self.adapter.kind == "lora" and re.fullmatch(self.adapter.targets, "/".join(self.path)):
            y += self._lora(x, keys_B)
        return y

    def _lora(self, x: jax.Array, keys_B: jax.Array | None) -> jax.Array:
        """alpha / rank * dropout(x) @ A @ B, with B initialised to 0 (Hu et al. 2021)."""
        cfg, (axis_in, axis_out) = self.adapter, self.axes
        a = weight(self, "lora_a", fan_in_normal(), (x.shape[-1], cfg.rank), (axis_in, None))
        b = weight(self, "lora_b", nn.initializers.zeros, (cfg.rank, self.features), (None, axis_out))
        if keys_B is not None and cfg.dropout:
            layer_keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, zlib.crc32(str(self.name).encode()))
            x = dropout(x, cfg.dropout, layer_keys_B)
        low_rank = matmul(x, sharding.gather(a.astype(self.dtype), axis_in, None))
        return cfg.alpha / cfg.rank * matmul(low_rank, sharding.gather(b.astype(self.dtype), None, axis_out))


@jax.custom_vjp
def lookup(table_VxD: jax.Array, ids_BxL: jax.Array) -> jax.Array:
    """Rows of an embedding table: [B, L, D]. Their gradients are accumulated in float32, whatever the table's dtype.

    Plain indexing would accumulate in the table's dtype: in bfloat16, 300 ones sum to 256.
    """
    return jnp.take(table_VxD, ids_BxL, axis=0)


def _lookup_fwd(table_VxD: jax.Array, ids_BxL: jax.Array) -> Any:
    return lookup(table_VxD, ids_BxL), (table_VxD, ids_BxL)


def _lookup_bwd(saved: Any, d_BxLxD: jax.Array) -> Any:
    table_VxD, ids_BxL = saved
    # The table's gradient is sharded over 'embed'. Positions are gathered first: resharding positions and rows at once
    # XLA can only do through a full copy on every device.
    d_BxLxD = sharding.constrain(d_BxLxD.astype(jnp.float32), "batch", None, "length")
    d_table_VxD = jnp.zeros_like(table_VxD, jnp.float32).at[ids_BxL].add(d_BxLxD)
    return d_table_VxD.astype(table_VxD.dtype), None


lookup.defvjp(_lookup_fwd, _lookup_bwd)


class Norm(nn.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang and Sennrich 2019) over the last axis, computed in float32.

    Attributes:
      kind: 'layernorm', 'rmsnorm', or 'rmsnorm_plus_one', whose scale is stored as its difference from 1.
      eps: added to the variance (or mean square).
      use_bias: LayerNorm only: whether it has a bias.
    """

    kind: str
    eps: float
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        y = x.astype(jnp.float32)
        if self.kind == "layernorm":
            y -= jnp.mean(y, axis=-1, keepdims=True)
        y *= jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        is_difference = self.kind == "rmsnorm_plus_one"
        init = nn.initializers.zeros if is_difference else nn.initializers.ones
        scale = weight(self, "scale", init, (width,), ("norm",))
        y *= _row(1.0 + scale if is_difference else scale, y)
        if self.kind == "layernorm" and self.use_bias:
            y += _row(weight(self, "bias", nn.initializers.zeros, (width,), ("norm",)), y)
        return y.astype(x.dtype)


def _row(vector: jax.Array, like: jax.Array) -> jax.Array:
    """vector [D] -> [1, ..., D] with the rank of `like`: rank promotion is always explicit."""
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)


def dropout(x: jax.Array, rate: float, keys_B: jax.Array | None) -> jax.Array:
    """Dropout of x [B, ...] at `rate`, with a key for each row; `keys_B` None = off.

    A row's mask depends on its key alone, whatever micro-batch or device the row is in.
    """
    if rate == 0.0 or keys_B is None:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, x.shape[1:]))(keys_B)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def embed_noise(x_BxLxD: jax.Array, segments_BxL: jax.Array, alpha: float, keys_B: jax.Array | None) -> jax.Array:
    """Adds uniform noise of scale alpha / sqrt(n D) to embeddings of n real positions (NEFTune, Jain et al. 2023)."""
    if alpha == 0.0 or keys_B is None:
        return x_BxLxD
    draw = jax.vmap(lambda key: jax.random.uniform(key, x_BxLxD.shape[1:], jnp.float32, -1.0, 1.0))
    real_B = jnp.maximum((segments_BxL > 0).sum(axis=1), 1).astype(jnp.float32)
    size_B = alpha * jax.lax.rsqrt(real_B * x_BxLxD.shape[-1])
    return x_BxLxD + (size_B[:, None, None] * draw(keys_B)).astype(x_BxLxD.dtype)


RELATIVE_BUCKETS, RELATIVE_MAX_DISTANCE = 32, 128  # as in T5


class RelativeBias(nn.Module):
    """Relative position bias of T5, added to the attention scores of all layers: one scalar per head and bucket.

    Attributes:
      num_heads: H.
      bidirectional: whether keys after their query are seen.
    """

    num_heads: int
    bidirectional: bool

    @nn.compact
    def __call__(self, queries: int, keys: int, offset: jax.Array | int) -> jax.Array:
        """float32 [H, queries, keys]; the position of the first query is that of key `offset`."""
        init = nn.initializers.normal(1.0 / math.sqrt(RELATIVE_BUCKETS))
        table_RxH = weight(self, "table", init, (RELATIVE_BUCKETS, self.num_heads), ("buckets", "heads"))
        distance_LxS = jnp.arange(keys)[None, :] - (jnp.arange(queries) + offset)[:, None]
        bias_LxSxH = jnp.take(table_RxH, relative_buckets(distance_LxS, self.bidirectional), axis=0)
        return sharding.constrain(bias_LxSxH.transpose(2, 0, 1), "heads", "length", None)


def relative_buckets(distance: jax.Array, bidirectional: bool) -> jax.Array:
    """Buckets, int32, of the distances key - query (T5, Raffel et al. 2020, section 2.1).

    Half of the buckets hold one distance each; the others grow logarithmically up to RELATIVE_MAX_DISTANCE, and the
    last one holds all larger distances. If bidirectional, the first 16 are for keys at or before the query and the last
    16 for keys after it. Else all 32 are for keys at or before the query; keys after it, which a causal mask hides, are
    in bucket 0.
    """
    buckets = RELATIVE_BUCKETS // 2 if bidirectional else RELATIVE_BUCKETS
    base = jnp.where(distance > 0, buckets, 0) if bidirectional else jnp.zeros_like(distance)
    far = jnp.abs(distance) if bidirectional else jnp.maximum(-distance, 0)
    exact = buckets // 2
    grown = [
        math.log(max(d, exact) / exact) / math.log(RELATIVE_MAX_DISTANCE / exact)
        for d in range(RELATIVE_MAX_DISTANCE + 1)
    ]
    bucket_of = [min(d if d < exact else exact + int(exact * g), buckets - 1) for d, g in enumerate(grown)]
    return base + jnp.asarray(bucket_of, jnp.int32)[jnp.minimum(far, RELATIVE_MAX_DISTANCE)]


def fold(keys_B: jax.Array | None, data: jax.Array | int) -> jax.Array | None:
    """`jax.random.fold_in` of each row's key: independent keys for independent uses. None stays None."""
    return None if keys_B is None else jax.vmap(jax.random.fold_in, (0, None))(keys_B, data)
