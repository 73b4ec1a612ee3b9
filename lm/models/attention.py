"""Attention. The mask is an argument, described rather than drawn, so that each backend makes what it needs of it."""

import dataclasses
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lm import sharding

# The result of attention, in a remat policy (lm.models.blocks).
NAME = "attention"

# Query rows computed together on one device when there is no cache: later keys of a causal mask are never touched.
QUERY_BLOCKS = 4
# Positions of queries and of keys that the TPU kernel holds at once: the largest that divides the row.
SPLASH_BLOCKS = (1024, 512, 256, 128)
SPLASH_TILE = 128


@flax.struct.dataclass
class Mask:
    """Who sees whom: same segment, key not after query (if causal) or in the prefix, and within the window.

    Example, segment ids [1, 1, 2, 0] (1 = sees):

        query 0: 1 0 0 0
        query 1: 1 1 0 0
        query 2: 0 0 1 0
        query 3: 0 0 0 1     (padding sees itself only, so that no row of the softmax is empty)

    Attributes:
      query_segments_BxL: int32 segment of each query.
      key_segments_BxS: int32 segment of each key; 0 = padding or not yet written.
      window: a query sees this many keys before it, itself included; 0 = all.
      offset: int32 [] or int, index in the key axis of the first query; None = queries and keys are the same positions.
      causal: whether a key after the query is hidden from it.
      is_prefix_BxS: int32, 1 = all of its segment sees this key even so (prefix LM); None = no key is such.
      bias_HxLxS: float32, added to the scores; None = nothing is.
    """

    query_segments_BxL: jax.Array
    key_segments_BxS: jax.Array
    window: int = flax.struct.field(pytree_node=False)
    offset: jax.Array | int | None = None
    causal: bool = flax.struct.field(pytree_node=False, default=True)
    is_prefix_BxS: jax.Array | None = None
    bias_HxLxS: jax.Array | None = None

    def draw(self) -> jax.Array:
        """The mask as bool [B, L, S]."""
        query_L = jnp.arange(self.query_segments_BxL.shape[1]) + (0 if self.offset is None else self.offset)
        key_S = jnp.arange(self.key_segments_BxS.shape[1])
        distance_LxS = query_L[:, None] - key_S[None, :]
        seen_BxLxS = (distance_LxS >= 0 if self.causal else jnp.ones_like(distance_LxS, bool))[None]
        if self.is_prefix_BxS is not None:
            seen_BxLxS |= self.is_prefix_BxS[:, None, :] > 0
        if self.window:
            seen_BxLxS &= jnp.abs(distance_LxS)[None] < self.window
        return seen_BxLxS & (self.query_segments_BxL[:, :, None] == self.key_segments_BxS[:, None, :])


def attend(
    query_BxLxHxE: jax.Array, key_BxSxKxE: jax.Array, value_BxSxKxE: jax.Array, mask: Mask, *, softcap: float
) -> jax.Array:
    """Scaled dot-product attention; query head h reads key/value head h // (H / K).

    The one place where a backend is chosen: a kernel on TPU, causal query blocks where keys and queries are the same
    positions, the plain form when decoding from a cache.

    Returns:
      [B, L, H, E] in the dtype of the query. Scores and softmax are float32.
    """
    if sharding.platform() == "tpu" and splash_fits(query_BxLxHxE, mask):
        return splash(query_BxLxHxE, key_BxSxKxE, value_BxSxKxE, mask, softcap=softcap)
    return checkpoint_name(_in_blocks(query_BxLxHxE, key_BxSxKxE, value_BxSxKxE, mask, softcap), NAME)


def splash_fits(query_BxLxHxE: jax.Array, mask: Mask) -> bool:
    """Whether the TPU kernel has this mask: no cache, prefix or bias, and rows that it can tile."""
    plain = mask.offset is None and mask.is_prefix_BxS is None and mask.bias_HxLxS is None
    same = mask.query_segments_BxL.shape == mask.key_segments_BxS.shape
    return plain and same and query_BxLxHxE.shape[1] % SPLASH_TILE == 0


def splash(
    query_BxLxHxE: jax.Array,
    key_BxLxKxE: jax.Array,
    value_BxLxKxE: jax.Array,
    mask: Mask,
    *,
    softcap: float,
    interpret: bool = False,
) -> jax.Array:
    """JAX's splash attention (block-sparse flash attention for TPU): scores are never held, hidden blocks not computed.

    Rows and heads stay on their devices. Arguments as `attend`; `interpret` runs it without a TPU, for tests.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, _, width = query_BxLxHxE.shape[1:]
    shape = (length, length)
    reach = mask.window - 1 if mask.window else None
    if reach is not None:
        seen: Any = masks.LocalMask(shape, (reach, 0 if mask.causal else reach), 0)
    else:
        seen = masks.CausalMask(shape) if mask.causal else masks.FullMask(shape)
    block = max(size for size in SPLASH_BLOCKS if length % size == 0)
    sizes = kernel.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, use_fused_bwd_kernel=True
    )

    def on_device(query: jax.Array, key: jax.Array, value: jax.Array, segments_BxL: jax.Array) -> jax.Array:
        attend_heads = kernel.make_splash_mha(
            masks.MultiHeadMask([seen] * query.shape[2]),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            attn_logits_soft_cap=softcap or None,
            residual_checkpoint_name=NAME,
            interpret=interpret,
        )

        def row(query_HxLxE: jax.Array, key: jax.Array, value: jax.Array, segments_L: jax.Array) -> jax.Array:
            return attend_heads(query_HxLxE, key, value, kernel.SegmentIds(segments_L, segments_L))

        query, key, value = (x.transpose(0, 2, 1, 3) for x in (query, key, value))
        return jax.vmap(row)(query, key, value, segments_BxL).transpose(0, 2, 1, 3)

    query_BxLxHxE = (query_BxLxHxE / math.sqrt(width)).astype(query_BxLxHxE.dtype)
    split = [sharding.spec(("batch", None, name, None)) for name in ("heads", "kv_heads", "kv_heads")]
    arrays = (query_BxLxHxE, key_BxLxKxE, value_BxLxKxE, mask.query_segments_BxL)
    if not sharding.is_distributed_trace():
        return on_device(*arrays)
    rows = sharding.spec(("batch", None))
    return jax.shard_map(on_device, in_specs=(*split, rows), out_specs=split[0], check_vma=False)(*arrays)


def _in_blocks(
    query_BxLxHxE: jax.Array, key_BxSxKxE: jax.Array, value_BxSxKxE: jax.Array, mask: Mask, softcap: float
) -> jax.Array:
    """Causal query blocks, whose later keys are never touched; all at once where that does not fit the mask."""
    length = query_BxLxHxE.shape[1]
    sees_later = not mask.causal or mask.is_prefix_BxS is not None
    if sees_later or mask.offset is not None or length % QUERY_BLOCKS or length < 32 * QUERY_BLOCKS:
        return _dense(query_BxLxHxE, key_BxSxKxE, value_BxSxKxE, mask, softcap)
    size = length // QUERY_BLOCKS
    blocks = []
    for start in range(0, length, size):
        end = start + size
        first = max(0, start - mask.window + 1) if mask.window else 0
        part = Mask(
            mask.query_segments_BxL[:, start:end], mask.key_segments_BxS[:, first:end], mask.window, start - first
        )
        if mask.bias_HxLxS is not None:
            part = dataclasses.replace(part, bias_HxLxS=mask.bias_HxLxS[:, start:end, first:end])
        blocks.append(
            _dense(query_BxLxHxE[:, start:end], key_BxSxKxE[:, first:end], value_BxSxKxE[:, first:end], part, softcap)
        )
    return jnp.concatenate(blocks, axis=1)


def _dense(
    query_BxLxHxE: jax.Array, key_BxSxKxE: jax.Array, value_BxSxKxE: jax.Array, mask: Mask, softcap: float
) -> jax.Array:
    """The reference: every score of the mask's rectangle."""
    rows, length, heads, width = query_BxLxHxE.shape
    kv_heads = key_BxSxKxE.shape[2]
    query_BxLxKxGxE = (query_BxLxHxE / math.sqrt(width)).reshape(rows, length, kv_heads, heads // kv_heads, width)
    scores = jnp.einsum("blkge,bske->bkgls", query_BxLxKxGxE, key_BxSxKxE, preferred_element_type=jnp.float32)
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    if mask.bias_HxLxS is not None:
        scores += mask.bias_HxLxS.reshape(1, kv_heads, heads // kv_heads, *mask.bias_HxLxS.shape[1:])
    scores = jnp.where(mask.draw()[:, None, None], scores, jnp.float32(-1e30))
    weights = jax.nn.softmax(scores, axis=-1).astype(value_BxSxKxE.dtype)
    out = jnp.einsum("bkgls,bske->blkge", weights, value_BxSxKxE)
    return out.reshape(rows, length, heads, width)
