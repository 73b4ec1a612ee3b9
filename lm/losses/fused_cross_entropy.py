"""Cross-entropy fused with the output projection, in chunks of positions: [B, L, V] logits are never held at once.

Equal to `lm.losses.cross_entropy.reference_token_cross_entropy`. Under differentiation the gradients by the hidden
states and by the output projection are computed in the forward pass, while a chunk's logits are at hand; the backward
pass only scales them by the loss's cotangent. So the logits are computed once, and nothing of size V is kept.

Shape letters as in `lm/types.py`, and C = positions of a row in one chunk, G = groups of rows.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax

from lm.losses.logits import last_axis_index, logits
from lm.parallel import sharding, tpu_matmul


@dataclasses.dataclass(frozen=True)
class Options:
    """As the arguments of `lm.losses.token_cross_entropy`, but `chunk_len` from 1 to L."""

    vocab_size: int
    z_loss: float
    label_smoothing: float
    softcap: float
    chunk_len: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def sums(
    options: Options, hidden_BxLxD: Array, unembed_DxV: Array, targets_BxL: Array, weights_BxL: Array
) -> tuple[Array, ...]:
    """Weighted sums over all positions of loss, nll and correct predictions: float32 [] each.

    Only the loss is differentiable, by `hidden_BxLxD` and `unembed_DxV`. Arguments as in
    `lm.losses.token_cross_entropy`, except that hidden states must be finite where the weight is 0.
    """

    def body(totals_3xB: Array, chunk: tuple[Array, ...]) -> tuple[Array, None]:
        sums_3xB, _ = _chunk(options, unembed_DxV, *chunk)
        return totals_3xB + sums_3xB, None

    # Totals are kept for each row, so that the sum over devices is one collective after the scan.
    totals_3xB = jnp.zeros((3, hidden_BxLxD.shape[0]), jnp.float32)
    chunks = split_positions(options.chunk_len, hidden_BxLxD, targets_BxL, weights_BxL)
    totals_3xB, _ = lax.scan(body, totals_3xB, chunks)
    return tuple(totals_3xB.sum(axis=1))


def _sums_fwd(
    options: Options, hidden_BxLxD: Array, unembed_DxV: Array, targets_BxL: Array, weights_BxL: Array
) -> tuple[tuple[Array, ...], tuple[Array, Array]]:
    """The sums, and the gradients of the loss by hidden states and output projection as the residuals."""

    def body(carry: tuple[Array, Array], chunk: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        totals_3xB, d_unembed_GxDxV = carry
        hidden_BxCxD, _, _ = chunk
        sums_3xB, d_logits_BxCxV = _chunk(options, unembed_DxV, *chunk)
        # The matmuls read the compute dtype, as in every other layer, and accumulate in float32.
        d_logits_BxCxV = d_logits_BxCxV.astype(unembed_DxV.dtype)
        d_hidden_BxCxD = jnp.einsum("bcv,dv->bcd", d_logits_BxCxV, unembed_DxV, preferred_element_type=jnp.float32)
        by_group = ((groups, -1, *x.shape[1:]) for x in (hidden_BxCxD, d_logits_BxCxV))
        hidden_GxbxCxD, d_logits_GxbxCxV = map(jnp.reshape, (hidden_BxCxD, d_logits_BxCxV), by_group)
        d_unembed_GxDxV += jnp.einsum(
            "gbcd,gbcv->gdv", hidden_GxbxCxD, d_logits_GxbxCxV, preferred_element_type=jnp.float32
        )
        return (totals_3xB + sums_3xB, d_unembed_GxDxV), d_hidden_BxCxD.astype(hidden_BxCxD.dtype)

    B, L, _ = hidden_BxLxD.shape
    axes = ("embed", "vocab")
    # One partial gradient for each device's rows, so that devices sum theirs once and not once a chunk.
    groups = math.gcd(sharding.token_shards(), B)
    d_unembed_GxDxV = jnp.zeros((groups, *unembed_DxV.shape), jnp.float32)
    init = jnp.zeros((3, B), jnp.float32), sharding.constrain(d_unembed_GxDxV, "token_shards", None, "vocab")
    chunks = split_positions(options.chunk_len, hidden_BxLxD, targets_BxL, weights_BxL)
    (totals_3xB, d_unembed_GxDxV), d_hidden_nxBxCxD = lax.scan(body, init, chunks)
    d_hidden_BxLxD = jnp.moveaxis(d_hidden_nxBxCxD, 0, 1).reshape(B, -1, hidden_BxLxD.shape[2])[:, :L]
    d_unembed_DxV = tpu_matmul.sum_partial_gradients(d_unembed_GxDxV, axes)
    return tuple(totals_3xB.sum(axis=1)), (d_hidden_BxLxD, d_unembed_DxV.astype(unembed_DxV.dtype))


def _sums_bwd(
    options: Options, gradients: tuple[Array, Array], cotangents: tuple[Array, ...]
) -> tuple[Array, Array, None, None]:
    # Of the three sums only the loss is differentiable.
    d_hidden, d_unembed = ((cotangents[0] * g.astype(jnp.float32)).astype(g.dtype) for g in gradients)
    return d_hidden, d_unembed, None, None


sums.defvjp(_sums_fwd, _sums_bwd)


def _chunk(
    options: Options, unembed_DxV: Array, hidden_BxCxD: Array, targets_BxC: Array, weights_BxC: Array
) -> tuple[Array, Array]:
    """Row sums [3, B] of loss, nll and correct, and the loss's gradient [B, C, V] by the logits before the soft cap."""
    eps, vocab_size = options.label_smoothing, options.vocab_size
    logits_BxCxV = logits(hidden_BxCxD, unembed_DxV, vocab_size=vocab_size, softcap=options.softcap)
    column_BxCxV = last_axis_index(logits_BxCxV)
    is_real_BxCxV = column_BxCxV < vocab_size
    # A comparison and not a gather: it stays local where the vocabulary is sharded.
    is_target_BxCxV = column_BxCxV == targets_BxC[..., None]

    max_BxC = logits_BxCxV.max(axis=-1)
    shifted_BxCxV = logits_BxCxV - max_BxC[..., None]
    exp_BxCxV = jnp.exp(shifted_BxCxV)
    sum_exp_BxC = exp_BxCxV.sum(axis=-1)
    log_sum_BxC = jnp.log(sum_exp_BxC)
    log_z_BxC = log_sum_BxC + max_BxC
    target_BxC = jnp.where(is_target_BxCxV, shifted_BxCxV, 0).sum(axis=-1)  # the target's logit minus the largest

    nll_BxC = log_sum_BxC - target_BxC
    loss_BxC = (1 - eps) * nll_BxC + options.z_loss * log_z_BxC**2
    if eps:
        mean_BxC = jnp.where(is_real_BxCxV, shifted_BxCxV, 0).sum(axis=-1) / vocab_size
        loss_BxC += eps * (log_sum_BxC - mean_BxC)
    sums_3xB = jnp.stack([(weights_BxC * x).sum(axis=-1) for x in (loss_BxC, nll_BxC, target_BxC >= 0)])

    # d loss / d logits = (1 + 2 z log_z) softmax - (1 - eps) one_hot - eps / vocab_size
    softmax_scale_BxC = (1 + 2 * options.z_loss * log_z_BxC) / sum_exp_BxC
    d_logits_BxCxV = exp_BxCxV * softmax_scale_BxC[..., None]
    d_logits_BxCxV = d_logits_BxCxV - jnp.where(is_target_BxCxV, 1 - eps, 0) - eps / vocab_size
    if options.softcap:
        d_logits_BxCxV *= 1 - (logits_BxCxV / options.softcap) ** 2
    return sums_3xB, jnp.where(is_real_BxCxV, d_logits_BxCxV * weights_BxC[..., None], 0)


def split_positions(chunk_len: int, *arrays_BxL: Array) -> tuple[Array, ...]:
    """Chunks of positions for a scan: each [B, L, ...] -> [chunks, B, chunk_len, ...], padded with 0.

    Padding has weight 0. The rows keep their sharding. Example, chunk_len 2: [[1, 2, 3], [4, 5, 6]] ->
    [[[1, 2], [4, 5]], [[3, 0], [6, 0]]].
    """

    def split(x_BxL: Array) -> Array:
        B, L, *rest = x_BxL.shape
        x_BxL = jnp.pad(x_BxL, [(0, 0), (0, -L % chunk_len)] + [(0, 0)] * len(rest))
        return jnp.moveaxis(x_BxL.reshape(B, -1, chunk_len, *rest), 1, 0)

    return tuple(split(x) for x in arrays_BxL)
