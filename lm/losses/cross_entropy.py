"""Arrays in, `LossTerms` out. Shape letters as in `lm/types.py`, and C = positions of a row in one chunk.

The loss of views, which couples the rows of a batch, is in `lm/losses/contrastive.py`.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax

from lm.parallel import ring_reduce, sharding
from lm.types import LossTerms

# Logit of a padded vocabulary column: exp() of it is exactly 0, and it survives division by a small temperature.
MASKED_LOGIT = -1e30
# Weights of a router's balance and z-loss (Fedus et al. 2021, section 2.2; Zoph et al. 2022, section 3).
BALANCE, ROUTER_Z = 0.01, 0.001


def logits(hidden: Array, unembed_DxV: Array, *, vocab_size: int, softcap: float = 0.0) -> Array:
    """Logits, shared by the loss and by generation.

    Args:
      hidden: [..., D], any float dtype.
      unembed_DxV: the output projection; its columns from `vocab_size` on are padding.
      vocab_size: the real vocabulary, at most V.
      softcap: 0 = off; else cap * tanh(logits / cap) (Gemma 2, section 2).

    Returns:
      float32 [..., V], `MASKED_LOGIT` in the padded columns.
    """
    out = jnp.einsum("...d,dv->...v", hidden, unembed_DxV, preferred_element_type=jnp.float32)
    if softcap:
        out = softcap * jnp.tanh(out / softcap)
    return jnp.where(_column(out) < vocab_size, out, MASKED_LOGIT)


def token_cross_entropy(
    hidden_BxLxD: Array,
    unembed_DxV: Array,
    targets_BxL: Array,
    weights_BxL: Array,
    *,
    vocab_size: int,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    chunk_len: int = 0,
    most_predicted: int = 0,
) -> LossTerms:
    """Weighted cross-entropy of the next token, from hidden states; [B, L, V] logits are never held at once.

    sum = sum_t w_t * [(1 - eps) * nll_t + eps * mean_v(-log p_tv) + z * logsumexp_t^2], in nats, with eps the label
    smoothing (Szegedy et al. 2016, section 7) and z the z-loss (PaLM, section 5).

    Under differentiation the gradients of `hidden` and `unembed` are made in the forward pass, one chunk after the
    other, while its logits are at hand; the backward pass only scales them. Reverse mode only.

    Args:
      hidden_BxLxD: last hidden states, any float dtype. Where the weight is 0 they may even be inf or NaN.
      unembed_DxV: the output projection; its columns from `vocab_size` on are padding and get gradient 0.
      targets_BxL: int32 in [0, vocab_size), or anything where the weight is 0. An id out of range with a weight makes
        the sum, the metrics and the gradients NaN, so that it cannot pass unseen.
      weights_BxL: 0 = not trained on. No gradient flows to them.
      vocab_size: the real vocabulary, at most V.
      z_loss, label_smoothing, softcap: 0 = off.
      chunk_len: positions of each row, or of a device's part of it, whose logits are held at once; 0 = all. It need
        not divide L.
      most_predicted: where each row has at most this many positions with a weight, logits are made of these alone (as
        in BERT's own code); 0 = of all. A row with more makes the sum, the metrics and the gradients NaN.

    Returns:
      LossTerms; metrics 'nll' (plain, in nats) and 'accuracy' (ties with the largest logit count as correct).

    Raises:
      ValueError: shapes that do not fit together.
    """
    B, L, D = hidden_BxLxD.shape
    if unembed_DxV.shape[0] != D or unembed_DxV.shape[1] < vocab_size:
        raise ValueError(f"unembed is {unembed_DxV.shape}, expected ({D}, at least the vocabulary's {vocab_size})")
    if targets_BxL.shape != (B, L) or weights_BxL.shape != (B, L):
        raise ValueError(f"targets {targets_BxL.shape} and weights {weights_BxL.shape} must both be ({B}, {L})")
    weights_BxL = lax.stop_gradient(weights_BxL.astype(jnp.float32))
    weight = weights_BxL.sum()
    # A weight of 0 alone would not stop an inf or NaN: 0 * NaN = NaN.
    trained_BxL = weights_BxL != 0
    hidden_BxLxD = jnp.where(trained_BxL[..., None], hidden_BxLxD, 0)
    in_vocab_BxL = (targets_BxL >= 0) & (targets_BxL < vocab_size)
    weights_BxL = jnp.where(trained_BxL & ~in_vocab_BxL, jnp.nan, weights_BxL)

    # Positions do not meet here, so that what lies on one device can be a row of its own.
    hidden_BxLxD, targets_BxL, weights_BxL = map(sharding.parts_of_rows, (hidden_BxLxD, targets_BxL, weights_BxL))
    L = hidden_BxLxD.shape[1]
    if 0 < most_predicted < L:
        hidden_BxLxD, targets_BxL, weights_BxL = _weighted_first(most_predicted, hidden_BxLxD, targets_BxL, weights_BxL)
        L = most_predicted

    options = _Options(vocab_size, z_loss, label_smoothing, softcap, min(chunk_len, L) or L)
    loss, nll, correct = _sums(options, hidden_BxLxD, unembed_DxV, targets_BxL, weights_BxL)
    return LossTerms(loss, weight, {"nll": (nll, weight), "accuracy": (correct, weight)})


def sequence_log_likelihood(
    hidden_BxLxD: Array,
    unembed_DxV: Array,
    targets_BxL: Array,
    weights_BxL: Array,
    *,
    vocab_size: int,
    softcap: float = 0.0,
    chunk_len: int = 0,
) -> Array:
    """float32 [B], sum_t w_t * log p_t of each row: how likely the model finds what is weighted.

    The logits of `chunk_len` positions are held at once, and made again in the backward pass. Arguments as in
    `token_cross_entropy`.
    """

    @jax.checkpoint
    def body(totals_R: Array, chunk: tuple[Array, ...]) -> tuple[Array, None]:
        hidden_BxCxD, targets_BxC, weights_BxC = chunk
        hidden_BxCxD = jnp.where(weights_BxC[..., None] != 0, hidden_BxCxD, 0)  # 0 * NaN = NaN
        logits_BxCxV = logits(hidden_BxCxD, unembed_DxV, vocab_size=vocab_size, softcap=softcap)
        log_probs_BxCxV = jax.nn.log_softmax(logits_BxCxV)
        is_target_BxCxV = _column(logits_BxCxV) == targets_BxC[..., None]
        found_BxC = jnp.where(is_target_BxCxV, log_probs_BxCxV, 0).sum(axis=-1)
        return totals_R + (weights_BxC * found_BxC).sum(axis=-1), None

    B = hidden_BxLxD.shape[0]
    hidden_BxLxD, targets_BxL, weights_BxL = map(sharding.parts_of_rows, (hidden_BxLxD, targets_BxL, weights_BxL))
    rows, L, _ = hidden_BxLxD.shape
    totals_R = jnp.zeros(rows, jnp.float32)
    totals_R, _ = lax.scan(body, totals_R, _split(min(chunk_len, L) or L, hidden_BxLxD, targets_BxL, weights_BxL))
    return totals_R.reshape(-1, B).sum(axis=0)


def routing(routing_2xB: Array, weights_BxL: Array) -> tuple[Array, Array]:
    """A router's loss, and how unevenly it uses the experts alone: float32 [] each, sums over the rows.

    Each row counts as often as it has predicted tokens, so that the mean over tokens of a batch has the mean over rows
    beside it, and a batch is still the sum of its parts.

    Args:
      routing_2xB: see `lm.types.ModelOutput`.
      weights_BxL: of the tokens; a row without any does not count.
    """
    weights_B = lax.stop_gradient(weights_BxL.astype(jnp.float32)).sum(axis=1)
    uneven, z = jnp.where(weights_B[None] != 0, weights_B[None] * routing_2xB, 0).sum(axis=1)
    return BALANCE * uneven + ROUTER_Z * z, uneven


def class_cross_entropy(logits: Array, labels: Array, weights: Array, *, label_smoothing: float = 0.0) -> LossTerms:
    """Weighted cross-entropy over classes, of rows or of positions.

    sum = sum_i w_i * [(1 - eps) * nll_i + eps * mean_c(-log p_ic)], in nats, with eps the label smoothing.

    Args:
      logits: float32 [..., C].
      labels: int32 [...] in [0, C), or anything where the weight is 0. A label out of range with a weight makes the sum
        NaN, so that it cannot pass unseen.
      weights: float32 [...], 0 = does not count. No gradient flows to them.
      label_smoothing: 0 = off.

    Returns:
      LossTerms; metrics 'nll' (plain, in nats) and 'accuracy'; outputs 'prediction', int32 [...].
    """
    weights = lax.stop_gradient(weights.astype(jnp.float32))
    classes = logits.shape[-1]
    in_range = (labels >= 0) & (labels < classes)
    weights = jnp.where((weights != 0) & ~in_range, jnp.nan, weights)
    # Where the weight is 0, not even an inf or NaN may pass.
    log_probs = jax.nn.log_softmax(jnp.where(weights[..., None] != 0, logits, 0))
    nll = -jnp.where(_column(logits) == labels[..., None], log_probs, 0).sum(axis=-1)
    loss = (1 - label_smoothing) * nll - label_smoothing * log_probs.mean(axis=-1)
    prediction = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    weight = weights.sum()
    sums = [(weights * value).sum() for value in (loss, nll, prediction == labels)]
    metrics = {"nll": (sums[1], weight), "accuracy": (sums[2], weight)}
    return LossTerms(sums[0], weight, metrics, {"prediction": prediction})


def squared_error(predictions_B: Array, labels_B: Array, weights_B: Array) -> LossTerms:
    """Weighted squared error: sum_i w_i * (prediction_i - label_i)^2, float32.

    Args:
      predictions_B: float32.
      labels_B: float32.
      weights_B: float32, 0 = does not count.

    Returns:
      LossTerms; outputs 'prediction', float32 [B].
    """
    weights_B = lax.stop_gradient(weights_B.astype(jnp.float32))
    error_B = jnp.where(weights_B != 0, predictions_B - labels_B, 0)
    return LossTerms((weights_B * error_B**2).sum(), weights_B.sum(), {}, {"prediction": predictions_B})


def span_cross_entropy(logits_BxLx2: Array, labels_Bx2: Array, allowed_BxL: Array, weights_B: Array) -> LossTerms:
    """Weighted cross-entropy of where a span begins and ends, each a softmax over the allowed positions of its row.

    sum = sum_i w_i * (nll_i,start + nll_i,end) / 2, in nats (Devlin et al. 2019, section 4.2, whose mean it is).

    Args:
      logits_BxLx2: float32; [..., 0] of the start, [..., 1] of the end.
      labels_Bx2: int32, allowed positions, or anything where the weight is 0. Another one with a weight makes the sum
        NaN, so that it cannot pass unseen.
      allowed_BxL: bool.
      weights_B: float32, 0 = does not count. No gradient flows to them.

    Returns:
      LossTerms; metrics 'nll' and 'accuracy' (start and end both right); outputs 'span_logits', float32 [B, L, 2],
      which are `MASKED_LOGIT` where not allowed.
    """
    weights_B = lax.stop_gradient(weights_B.astype(jnp.float32))
    masked_BxLx2 = jnp.where(allowed_BxL[..., None], logits_BxLx2, MASKED_LOGIT)
    # Where the weight is 0, not even an inf or NaN may pass.
    log_probs_BxLx2 = jax.nn.log_softmax(jnp.where(weights_B[:, None, None] != 0, masked_BxLx2, 0), axis=1)
    is_label_BxLx2 = lax.broadcasted_iota(jnp.int32, logits_BxLx2.shape, 1) == labels_Bx2[:, None, :]
    is_found_B = (is_label_BxLx2 & allowed_BxL[..., None]).any(axis=1).all(axis=1)
    nll_B = -jnp.where(is_label_BxLx2, log_probs_BxLx2, 0).sum(axis=(1, 2)) / 2
    weights_B = jnp.where((weights_B != 0) & ~is_found_B, jnp.nan, weights_B)
    correct_B = (jnp.argmax(masked_BxLx2, axis=1) == labels_Bx2).all(axis=1)
    loss, correct, weight = (weights_B * nll_B).sum(), (weights_B * correct_B).sum(), weights_B.sum()
    metrics = {"nll": (loss, weight), "accuracy": (correct, weight)}
    return LossTerms(loss, weight, metrics, {"span_logits": masked_BxLx2})


def symmetric_divergence(logits_BxC: Array, other_BxC: Array, weights_B: Array) -> Array:
    """Weighted sum over rows of (KL(p || q) + KL(q || p)) / 2, float32 [], in nats (R-Drop, Liang et al. 2021)."""
    p_BxC, q_BxC = jax.nn.log_softmax(logits_BxC), jax.nn.log_softmax(other_BxC)
    both_B = ((jnp.exp(p_BxC) - jnp.exp(q_BxC)) * (p_BxC - q_BxC)).sum(axis=-1) / 2
    return (lax.stop_gradient(weights_B) * both_B).sum()


def patch_mse(
    prediction_BxTxC: Array, patches_BxTxC: Array, masked_BxM: Array, weights_B: Array, *, eps: float = 1e-6
) -> LossTerms:
    """Mean squared error of the hidden patches alone, each target patch brought to mean 0 and variance 1 (MAE,
    He et al. 2021, section 4: "reconstruction target").

    sum = sum_b w_b * sum_m mean_c (prediction - (patch - mean_c patch) / sqrt(var_c patch + eps))^2.

    Args:
      prediction_BxTxC: what the model makes of all T patches, any float dtype.
      patches_BxTxC: the image's patches, C numbers each; no gradient flows to them.
      masked_BxM: int32 indices of the hidden patches.
      weights_B: 0 = a row that does not count.
      eps: keeps a patch of one colour at 0.

    Returns:
      LossTerms; its weight is that of the rows times M.
    """
    weights_B = lax.stop_gradient(weights_B.astype(jnp.float32))
    target_BxMxC = jnp.take_along_axis(patches_BxTxC.astype(jnp.float32), masked_BxM[..., None], axis=1)
    target_BxMxC -= target_BxMxC.mean(axis=-1, keepdims=True)
    target_BxMxC *= lax.rsqrt(jnp.square(target_BxMxC).mean(axis=-1, keepdims=True) + eps)
    error_BxMxC = jnp.take_along_axis(prediction_BxTxC.astype(jnp.float32), masked_BxM[..., None], axis=1)
    error_BxMxC -= lax.stop_gradient(target_BxMxC)
    error_BxMxC = jnp.where((weights_B != 0)[:, None, None], error_BxMxC, 0)
    error_B = jnp.square(error_BxMxC).mean(axis=-1).sum(axis=-1)
    return LossTerms((weights_B * error_B).sum(), weights_B.sum() * masked_BxM.shape[1], {})


@dataclasses.dataclass(frozen=True)
class _Options:
    vocab_size: int
    z_loss: float
    label_smoothing: float
    softcap: float
    chunk_len: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(
    options: _Options, hidden_BxLxD: Array, unembed_DxV: Array, targets_BxL: Array, weights_BxL: Array
) -> tuple[Array, ...]:
    """(loss, nll, correct), float32 [] each."""

    def body(totals_3xB: Array, chunk: tuple[Array, ...]) -> tuple[Array, None]:
        sums_3xB, _ = _chunk(options, unembed_DxV, *chunk)
        return totals_3xB + sums_3xB, None

    # Totals are kept per row, so that rows on different devices meet once, after the scan.
    totals_3xB = jnp.zeros((3, hidden_BxLxD.shape[0]), jnp.float32)
    totals_3xB, _ = lax.scan(body, totals_3xB, _split(options.chunk_len, hidden_BxLxD, targets_BxL, weights_BxL))
    return tuple(totals_3xB.sum(axis=1))


def _sums_fwd(
    options: _Options, hidden_BxLxD: Array, unembed_DxV: Array, targets_BxL: Array, weights_BxL: Array
) -> tuple[tuple[Array, ...], tuple[Array, Array]]:
    def body(carry: tuple[Array, Array], chunk: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        totals_3xB, d_unembed_GxDxV = carry
        hidden_BxCxD, _, _ = chunk
        sums_3xB, d_logits_BxCxV = _chunk(options, unembed_DxV, *chunk)
        # Matrix units take the compute dtype, as in every other layer; the products are summed in float32.
        d_logits_BxCxV = d_logits_BxCxV.astype(unembed_DxV.dtype)
        d_hidden_BxCxD = jnp.einsum("bcv,dv->bcd", d_logits_BxCxV, unembed_DxV, preferred_element_type=jnp.float32)
        by_group = ((groups, -1, *x.shape[1:]) for x in (hidden_BxCxD, d_logits_BxCxV))
        hidden_GxbxCxD, d_logits_GxbxCxV = map(jnp.reshape, (hidden_BxCxD, d_logits_BxCxV), by_group)
        d_unembed_GxDxV += jnp.einsum(
            "gbcd,gbcv->gdv", hidden_GxbxCxD, d_logits_GxbxCxV, preferred_element_type=jnp.float32
        )
        return (totals_3xB + sums_3xB, d_unembed_GxDxV), d_hidden_BxCxD.astype(hidden_BxCxD.dtype)

    B, L, _ = hidden_BxLxD.shape
    # One sum for each group of rows that lie together, so that devices add theirs up once, not once a chunk.
    groups = math.gcd(sharding.row_groups(), B)
    d_unembed_GxDxV = jnp.zeros((groups, *unembed_DxV.shape), jnp.float32)
    init = jnp.zeros((3, B), jnp.float32), sharding.constrain(d_unembed_GxDxV, "row_parts", None, "vocab")
    chunks = _split(options.chunk_len, hidden_BxLxD, targets_BxL, weights_BxL)
    (totals_3xB, d_unembed_GxDxV), d_hidden_nxBxCxD = lax.scan(body, init, chunks)
    d_hidden_BxLxD = jnp.moveaxis(d_hidden_nxBxCxD, 0, 1).reshape(B, -1, hidden_BxLxD.shape[2])[:, :L]
    axes, is_apart = ("embed", "vocab"), groups == sharding.row_groups() and sharding.platform() == "tpu"
    if is_apart and ring_reduce.can_go_round(unembed_DxV, axes):
        d_unembed_DxV = ring_reduce.sum_parts(d_unembed_GxDxV, axes)  # beside the backward pass of the layers
    else:
        d_unembed_DxV = d_unembed_GxDxV.sum(axis=0)
    return tuple(totals_3xB.sum(axis=1)), (d_hidden_BxLxD, d_unembed_DxV.astype(unembed_DxV.dtype))


def _sums_bwd(
    options: _Options, gradients: tuple[Array, Array], cotangents: tuple[Array, ...]
) -> tuple[Array, Array, None, None]:
    # Of the three sums only the loss is to be differentiated.
    d_hidden, d_unembed = ((cotangents[0] * g.astype(jnp.float32)).astype(g.dtype) for g in gradients)
    return d_hidden, d_unembed, None, None


_sums.defvjp(_sums_fwd, _sums_bwd)


def _chunk(
    options: _Options, unembed_DxV: Array, hidden_BxCxD: Array, targets_BxC: Array, weights_BxC: Array
) -> tuple[Array, Array]:
    """Row sums [3, B] of loss, nll and correct, and the loss's gradient [B, C, V] by the logits before the soft cap."""
    eps, vocab_size = options.label_smoothing, options.vocab_size
    logits_BxCxV = logits(hidden_BxCxD, unembed_DxV, vocab_size=vocab_size, softcap=options.softcap)
    column_BxCxV = _column(logits_BxCxV)
    is_real_BxCxV = column_BxCxV < vocab_size
    # A comparison and not a gather: it stays local where the vocabulary is sharded.
    is_target_BxCxV = column_BxCxV == targets_BxC[..., None]

    max_BxC = logits_BxCxV.max(axis=-1)
    shifted_BxCxV = logits_BxCxV - max_BxC[..., None]
    exp_BxCxV = jnp.exp(shifted_BxCxV)
    sum_exp_BxC = exp_BxCxV.sum(axis=-1)
    log_sum_BxC = jnp.log(sum_exp_BxC)
    lse_BxC = log_sum_BxC + max_BxC
    target_BxC = jnp.where(is_target_BxCxV, shifted_BxCxV, 0).sum(axis=-1)  # its logit, less the largest one

    nll_BxC = log_sum_BxC - target_BxC
    loss_BxC = (1 - eps) * nll_BxC + options.z_loss * lse_BxC**2
    if eps:
        mean_BxC = jnp.where(is_real_BxCxV, shifted_BxCxV, 0).sum(axis=-1) / vocab_size
        loss_BxC += eps * (log_sum_BxC - mean_BxC)
    sums_3xB = jnp.stack([(weights_BxC * x).sum(axis=-1) for x in (loss_BxC, nll_BxC, target_BxC >= 0)])

    from_lse_BxC = (1 + 2 * options.z_loss * lse_BxC) / sum_exp_BxC
    d_logits_BxCxV = exp_BxCxV * from_lse_BxC[..., None] - jnp.where(is_target_BxCxV, 1 - eps, 0) - eps / vocab_size
    if options.softcap:
        d_logits_BxCxV *= 1 - (logits_BxCxV / options.softcap) ** 2
    return sums_3xB, jnp.where(is_real_BxCxV, d_logits_BxCxV * weights_BxC[..., None], 0)


def _weighted_first(
    count: int, hidden_BxLxD: Array, targets_BxL: Array, weights_BxL: Array
) -> tuple[Array, Array, Array]:
    """The `count` first positions of each row with a weight, in order, then others; NaN weights where more have one."""
    has_weight_BxL = weights_BxL != 0
    at_BxK = jnp.argsort(~has_weight_BxL, axis=1, stable=True)[:, :count]
    hidden_BxKxD = jnp.take_along_axis(hidden_BxLxD, at_BxK[..., None], axis=1)
    targets_BxK, weights_BxK = (jnp.take_along_axis(x, at_BxK, axis=1) for x in (targets_BxL, weights_BxL))
    fits_B = has_weight_BxL.sum(axis=1) <= count
    return hidden_BxKxD, targets_BxK, jnp.where(fits_B[:, None], weights_BxK, jnp.nan)


def _split(chunk_len: int, *arrays_BxL: Array) -> tuple[Array, ...]:
    """Each [B, L, ...] -> [chunks, B, chunk_len, ...] for a scan. Padding is 0, so its weight is 0.

    Only positions are cut, so that the sharding of the rows stays. Example, chunk_len 2: [[1, 2, 3], [4, 5, 6]] ->
    [[[1, 2], [4, 5]], [[3, 0], [6, 0]]].
    """

    def split(x_BxL: Array) -> Array:
        B, L, *rest = x_BxL.shape
        x_BxL = jnp.pad(x_BxL, [(0, 0), (0, -L % chunk_len)] + [(0, 0)] * len(rest))
        return jnp.moveaxis(x_BxL.reshape(B, -1, chunk_len, *rest), 1, 0)

    return tuple(split(x) for x in arrays_BxL)


def _column(x: Array) -> Array:
    """Index along the last axis, in the shape of `x`."""
    return lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
