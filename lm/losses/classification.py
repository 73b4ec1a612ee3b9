"""Losses of rows, positions or patches, from a head's output. Shape letters as in `lm/types.py`; C = classes."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from lm.losses.logits import MASKED_LOGIT, select_target
from lm.types import LossTerms


def class_cross_entropy(logits: Array, labels: Array, weights: Array, *, label_smoothing: float = 0.0) -> LossTerms:
    """Weighted cross-entropy over classes, for rows or positions.

    sum = sum_i w_i * [(1 - eps) * nll_i + eps * mean_c(-log p_ic)], in nats, with eps the label smoothing.

    Args:
      logits: float32 [..., C].
      labels: int32 [...] in [0, C), or anything where the weight is 0. A weighted label that is out of range makes the
        sum NaN, so that the error is noticed.
      weights: float32 [...], 0 = does not count. No gradient flows to them.
      label_smoothing: 0 = off.

    Returns:
      LossTerms; metrics 'nll' (plain, in nats) and 'accuracy'; outputs 'prediction', int32 [...].
    """
    weights = lax.stop_gradient(weights.astype(jnp.float32))
    classes = logits.shape[-1]
    in_range = (labels >= 0) & (labels < classes)
    weights = jnp.where((weights != 0) & ~in_range, jnp.nan, weights)
    # Masked before the product with the weight, as 0 * NaN = NaN.
    log_probs = jax.nn.log_softmax(jnp.where(weights[..., None] != 0, logits, 0))
    nll = -select_target(log_probs, labels)
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
    """Weighted cross-entropy of the start and the end of a span, each a softmax over the allowed positions of its row.

    sum = sum_i w_i * (nll_i,start + nll_i,end) / 2, in nats: half the objective of Devlin et al. 2019, section 4.2.

    Args:
      logits_BxLx2: float32; [..., 0] of the start, [..., 1] of the end.
      labels_Bx2: int32, allowed positions, or anything where the weight is 0. A weighted label that is not allowed
        makes the sum NaN, so that the error is noticed.
      allowed_BxL: bool.
      weights_B: float32, 0 = does not count. No gradient flows to them.

    Returns:
      LossTerms; metrics 'nll' and 'accuracy' (start and end both correct); outputs 'span_logits', float32 [B, L, 2],
      `MASKED_LOGIT` at positions that are not allowed.
    """
    weights_B = lax.stop_gradient(weights_B.astype(jnp.float32))
    masked_BxLx2 = jnp.where(allowed_BxL[..., None], logits_BxLx2, MASKED_LOGIT)
    # Masked before the product with the weight, as 0 * NaN = NaN.
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
    prediction_BxTxC: Array,
    patches_BxTxC: Array,
    masked_BxM: Array,
    weights_B: Array,
    *,
    target: str = "normalised",
    eps: float = 1e-6,
) -> LossTerms:
    """Mean squared error of masked patches, with normalised target patches (MAE, He et al. 2021, section 4).

    sum = sum_b w_b * sum_m mean_c (prediction - (patch - mean_c patch) / sqrt(var_c patch + eps))^2.

    Args:
      prediction_BxTxC: the model's prediction of all T patches, any float dtype.
      patches_BxTxC: the image's patches of C values; no gradient flows to them.
      masked_BxM: int32 indices of the masked patches.
      weights_B: 0 = a row that does not count.
      target: 'normalised', 'normalised_unbiased' = by the unbiased variance, as He et al.'s code and ViT-MAE have it,
        or 'pixels' = the patches as they are.
      eps: added to the variance; a patch of one colour has target 0.

    Returns:
      LossTerms; its weight is the sum of `weights_B` times M.
    """
    weights_B = lax.stop_gradient(weights_B.astype(jnp.float32))
    target_BxMxC = jnp.take_along_axis(patches_BxTxC.astype(jnp.float32), masked_BxM[..., None], axis=1)
    if target != "pixels":
        target_BxMxC -= target_BxMxC.mean(axis=-1, keepdims=True)
        variance_BxMx1 = jnp.square(target_BxMxC).mean(axis=-1, keepdims=True)
        if target == "normalised_unbiased":
            variance_BxMx1 *= target_BxMxC.shape[-1] / (target_BxMxC.shape[-1] - 1)
        target_BxMxC *= lax.rsqrt(variance_BxMx1 + eps)
    error_BxMxC = jnp.take_along_axis(prediction_BxTxC.astype(jnp.float32), masked_BxM[..., None], axis=1)
    error_BxMxC -= lax.stop_gradient(target_BxMxC)
    error_BxMxC = jnp.where((weights_B != 0)[:, None, None], error_BxMxC, 0)
    error_B = jnp.square(error_BxMxC).mean(axis=-1).sum(axis=-1)
    return LossTerms((weights_B * error_B).sum(), weights_B.sum() * masked_BxM.shape[1], {})
