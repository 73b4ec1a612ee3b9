"""Dot-product attention, its mask, and the choice of a backend.

The mask is a description (`Mask`), not an array, so that each backend builds the form that it needs.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from lm.parallel import sharding

# Name of attention's result in remat policies (lm.models.remat).
NAME = "attention"

# Number of query blocks on one device without a cache: a block does not compute the keys after it, which are hidden.
QUERY_BLOCKS = 4
# Block sizes of the TPU kernel, in positions: the largest that divides the row is used.
SPLASH_BLOCKS = (1024, 512, 256, 128)
SPLASH_TILE = 128


@flax.struct.dataclass
class Mask:
    """Attention mask: a query sees the keys of its segment that are not after it (or in the prefix), within the window.

    Example, causal, segment ids [1, 1, 2, 0] (1 = sees):

        query 0: 1 0 0 0
        query 1: 1 1 0 0
        query 2: 0 0 1 0
        query 3: 0 0 0 1     (padding sees itself, so that no row of the softmax is empty)

    Attributes:
      query_segments_BxL: int32 segment of each query.
      key_segments_BxS: int32 segment of each key; 0 = padding or not yet written.
      window: a query sees this many keys up to itself, itself included (and as many after it, if not causal); 0 = all.
      offset: int32 [] or int, index in the key axis of the first query; None = queries and keys are the same positions.
      causal: whether keys after the query are hidden.
      is_prefix_BxS: int32, 1 = all queries of the segment see this key (prefix LM); None = no prefix.
      bias_HxLxS: float32, added to the scores; None = no bias.
    """

    query_segments_BxL: jax.Array
    key_segments_BxS: jax.Array
    window: int = flax.struct.field(pytree_node=False)
    offset: jax.Array | int | None = None
    causal: bool = flax.struct.field(pytree_node=False, default=True)
    is_prefix_BxS: jax.Array | None = None
    bias_HxLxS: jax.Array | None = None

    def dense(self) -> jax.Array:
        """The mask as an array, bool [B, L, S]."""
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
    """Dot-product attention of queries that are already scaled; query head h reads key/value head h // (H / K).

    The one place where a backend is chosen: splash attention on TPU, cuDNN on GPU; elsewhere, if positions are sharded,
    each device's queries with all keys gathered; causal query blocks; or the plain form, as in decoding from a cache.

    Returns:
      [B, L, H, E] in the dtype of the query. Scores and softmax are float32.
    """
    if sharding.platform() == "tpu" and splash_fits(query_BxLxHxE, mask):
        return splash(query_BxLxHxE, key_BxSxKxE, value_BxSxKxE, mask, softcap=softcap)
    if sharding.platform() == "gpu" and cudnn_fits(query_BxLxHxE, mask, softcap):
        return checkpoint_name(cudnn(query_BxLxHxE, key_BxSxKxE, value_BxSxKxE, mask), NAME)
    parts = sharding.length_shards()
    is_split = parts > 1 and mask.offset is None and query_BxLxHxE.shape[1] % parts == key_BxSxKxE.shape[1] % parts == 0
    plain = _over_context if is_split else _in_blocks
    return checkpoint_name(plain(query_BxLxHxE, key_BxSxKxE, value_BxSxKxE, mask, softcap), NAME)


def cudnn_fits(query_BxLxHxE: jax.Array, mask: Mask, softcap: float) -> bool:
    """Whether cuDNN supports it: 16 bits, heads up to 128 wide, no soft cap, cache or bias, unsharded positions."""
    width, lengths = query_BxLxHxE.shape[-1], (mask.query_segments_BxL.shape[1], mask.key_segments_BxS.shape[1])
    plain = mask.offset is None and mask.bias_HxLxS is None and not softcap and sharding.length_shards() == 1
    half = query_BxLxHxE.dtype in (jnp.bfloat16, jnp.float16)
    return plain and half and width % 8 == 0 and width <= 128 and not any(length % 2 for length in lengths)


def cudnn(
    query_BxLxHxE: jax.Array,
    key_BxSxKxE: jax.Array,
    value_BxSxKxE: jax.Array,
    mask: Mask,
    *,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """cuDNN's flash attention by `jax.nn`: scores are not stored, and hidden blocks of a causal mask not computed.

    The mask is a dense array [B, 1, L, S] for all heads. The kernel's own format for packed rows needs a bound on the
    documents in a row and leaves padding undefined, and its window cannot be combined with another mask.

    Arguments as in `attend`; `implementation` is for tests without a GPU.
    """
    length = query_BxLxHxE.shape[1]
    is_causal = mask.causal and mask.is_prefix_BxS is None and length == key_BxSxKxE.shape[1]

    def on_device(query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask) -> jax.Array:
        return jax.nn.dot_product_attention(
            query, key, value, mask=mask.dense()[:, None], scale=1.0, is_causal=is_causal, implementation=implementation
        )

    attend_on = _on_devices if sharding.is_distributed_trace() else lambda fn, *arrays: fn(*arrays)
    out: jax.Array = attend_on(on_device, query_BxLxHxE, key_BxSxKxE, value_BxSxKxE, mask)
    return out


def splash_fits(query_BxLxHxE: jax.Array, mask: Mask) -> bool:
    """Whether splash attention supports this mask: no cache, prefix or bias, and a length that it can tile."""
    plain = mask.offset is None and mask.is_prefix_BxS is None and mask.bias_HxLxS is None
    same = mask.query_segments_BxL.shape == mask.key_segments_BxS.shape
    parts = sharding.length_shards()
    return plain and same and query_BxLxHxE.shape[1] % (SPLASH_TILE * (2 * parts if parts > 1 else 1)) == 0


def splash(
    query_BxLxHxE: jax.Array,
    key_BxLxKxE: jax.Array,
    value_BxLxKxE: jax.Array,
    mask: Mask,
    *,
    softcap: float,
    interpret: bool = False,
) -> jax.Array:
    """JAX's splash attention, block-sparse flash attention for TPU: scores are not stored, hidden blocks not computed.

    Rows and heads are computed where they are. If positions are sharded too, keys and values are gathered and each
    device computes its own queries. A causal mask would give devices unequal work, so pairs of devices exchange half of
    their queries first, see `_balanced_order`.

    Arguments as in `attend`; `interpret` is for tests without a TPU.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    parts, length = sharding.length_shards(), query_BxLxHxE.shape[1]
    reach = mask.window - 1 if 0 < mask.window < length else None
    is_full, is_uneven = not mask.causal and reach is None, parts > 1 and mask.causal and reach is None
    if reach is not None:
        seen: Any = masks.LocalMask((length, length), (reach, 0 if mask.causal else reach), 0)
    elif mask.causal:
        seen = masks.CausalMask((length, length))
        seen.q_sequence = _balanced_order(length, parts)
    else:  # of one device's queries: the library cannot shard a full mask, which is the same on all devices
        seen = masks.FullMask((length // parts, length))
    block, block_q = (
        max(size for size in SPLASH_BLOCKS if rows % size == 0)
        for rows in (length, length // parts // (2 if is_uneven else 1))
    )
    sizes = kernel.BlockSizes(
        block_q=block_q, block_kv=block, block_q_dkv=block_q, block_kv_dkv=block, use_fused_bwd_kernel=True
    )
    # One head: all heads have the same mask.
    attend_heads = kernel.make_splash_mha(
        masks.MultiHeadMask([seen]),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1 if is_full else parts,
        attn_logits_soft_cap=softcap or None,
        residual_checkpoint_name=NAME,
        interpret=interpret,
    )

    def on_device(
        attend_heads: Any,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        query_segments_BxL: jax.Array,
        key_segments_BxL: jax.Array,
    ) -> jax.Array:
        def row(query_HxLxE: jax.Array, key: jax.Array, value: jax.Array, *segments_L: jax.Array) -> jax.Array:
            out: jax.Array = attend_heads(query_HxLxE, key, value, kernel.SegmentIds(*segments_L))
            return out

        if parts > 1:
            key, value, key_segments_BxL = map(_gather_positions, (key, value, key_segments_BxL))
        if is_uneven:
            query, query_segments_BxL = (_swap_halves(x, parts) for x in (query, query_segments_BxL))
        query, key, value = (x.transpose(0, 2, 1, 3) for x in (query, key, value))
        out = jax.vmap(row)(query, key, value, query_segments_BxL, key_segments_BxL).transpose(0, 2, 1, 3)
        return _swap_halves(out, parts) if is_uneven else out

    arrays = (query_BxLxHxE, key_BxLxKxE, value_BxLxKxE, mask.query_segments_BxL, mask.key_segments_BxS)
    if not sharding.is_distributed_trace():
        return on_device(attend_heads, *arrays)
    by_query: Any = jax.NamedSharding(jax.sharding.get_abstract_mesh(), jax.P(None, None if is_full else "context"))
    split = [sharding.spec(("batch", "length", name, None)) for name in ("heads", "kv_heads", "kv_heads")]
    rows = sharding.spec(("batch", "length"))
    specs = (attend_heads.manual_sharding_spec(by_query), *split, rows, rows)
    return jax.shard_map(on_device, in_specs=specs, out_specs=split[0], check_vma=False)(attend_heads, *arrays)


def _balanced_order(length: int, parts: int) -> np.ndarray:
    """Order of query positions over devices that gives each the same work under a causal mask: int32 [length].

    Device i of n has the first half of its own positions and the second half of those of device n - 1 - i. Example, 8
    positions on 2 devices: [0 1 6 7 | 4 5 2 3], which see 1 + 2 + 7 + 8 and 5 + 6 + 3 + 4 keys. On one device the order
    is unchanged.
    """
    if parts == 1:
        return np.arange(length, dtype=np.int32)
    half_PxIxT = np.arange(length, dtype=np.int32).reshape(parts, 2, -1)
    return np.stack([half_PxIxT[:, 0], half_PxIxT[::-1, 1]], axis=1).ravel()


def _swap_halves(x_BxLxX: jax.Array, parts: int) -> jax.Array:
    """Exchanges a device's positions with those of `_balanced_order`; its own inverse. Inside `jax.shard_map`."""
    first, second = jnp.split(x_BxLxX, 2, axis=1)
    second = jax.lax.ppermute(second, "context", [(i, parts - 1 - i) for i in range(parts)])
    return jnp.concatenate([first, second], axis=1)


def _gather_positions(x_BxLxX: jax.Array) -> jax.Array:
    """All-gather of positions over 'context'; inside `jax.shard_map`."""
    gathered: jax.Array = jax.lax.all_gather(x_BxLxX, "context", axis=1, tiled=True)
    return gathered


def _over_context(
    query_BxLxHxE: jax.Array, key_BxSxKxE: jax.Array, value_BxSxKxE: jax.Array, mask: Mask, softcap: float
) -> jax.Array:
    """Context parallelism: each device's own queries with the keys and values of all (Llama 3, section 3.3.2)."""

    def on_device(query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask) -> jax.Array:
        local_mask = dataclasses.replace(mask, offset=jax.lax.axis_index("context") * query.shape[1])
        return _dense(query, _gather_positions(key), _gather_positions(value), local_mask, softcap)

    return _on_devices(on_device, query_BxLxHxE, key_BxSxKxE, value_BxSxKxE, mask)


def _on_devices(
    fn: Callable[..., jax.Array], query_BxLxHxE: jax.Array, key: jax.Array, value: jax.Array, mask: Mask
) -> jax.Array:
    """`fn` on each device's rows, positions and heads, with the part of the mask for its queries and all keys."""
    split = [sharding.spec(("batch", "length", name, None)) for name in ("heads", "kv_heads", "kv_heads")]
    keys = sharding.spec(("batch", None))
    changes: dict[str, Any] = {"query_segments_BxL": sharding.spec(("batch", "length")), "key_segments_BxS": keys}
    if mask.is_prefix_BxS is not None:
        changes["is_prefix_BxS"] = keys
    if mask.bias_HxLxS is not None:
        changes["bias_HxLxS"] = sharding.spec(("heads", "length", None))
    masks = dataclasses.replace(mask, **changes)
    return jax.shard_map(fn, in_specs=(*split, masks), out_specs=split[0], check_vma=False)(
        query_BxLxHxE, key, value, mask
    )


def _in_blocks(
    query_BxLxHxE: jax.Array, key_BxSxKxE: jax.Array, value_BxSxKxE: jax.Array, mask: Mask, softcap: float
) -> jax.Array:
    """Blocks of queries, each with the keys up to its end only (causal masks); other masks in one block."""
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
    """Plain attention: all scores [B, H, L, S]."""
    rows, length, heads, width = query_BxLxHxE.shape
    kv_heads = key_BxSxKxE.shape[2]
    query_BxLxKxGxE = query_BxLxHxE.reshape(rows, length, kv_heads, heads // kv_heads, width)
    scores = jnp.einsum("blkge,bske->bkgls", query_BxLxKxGxE, key_BxSxKxE, preferred_element_type=jnp.float32)
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    if mask.bias_HxLxS is not None:
        scores += mask.bias_HxLxS.reshape(1, kv_heads, heads // kv_heads, *mask.bias_HxLxS.shape[1:])
    scores = jnp.where(mask.dense()[:, None, None], scores, jnp.float32(-1e30))
    weights = jax.nn.softmax(scores, axis=-1).astype(value_BxSxKxE.dtype)
    out = jnp.einsum("bkgls,bske->blkge", weights, value_BxSxKxE)
    return out.reshape(rows, length, heads, width)
