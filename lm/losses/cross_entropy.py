"""Cross-entropy of tokens: the definition, and the form that training runs. Shape letters as in `lm/types.py`."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from lm.losses import fused_cross_entropy
from lm.losses.logits import logits, select_target
from lm.parallel import sharding
from lm.types import LossTerms


def reference_token_cross_entropy(
    hidden_BxLxD: Array,
    unembed_DxV: Array,
    targets_BxL: Array,
    weights_BxL: Array,
    *,
    vocab_size: int,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
) -> LossTerms:
    """The definition of `token_cross_entropy`, which is tested against it. Holds all [B, L, V] logits at once."""
    weight = weights_BxL.sum()
    hidden_BxLxD, weights_BxL = _mask(hidden_BxLxD, targets_BxL, weights_BxL, vocab_size)
    logits_BxLxV = logits(hidden_BxLxD, unembed_DxV, vocab_size=vocab_size, softcap=softcap)[..., :vocab_size]
    log_probs_BxLxV = jax.nn.log_softmax(logits_BxLxV)
    nll_BxL = -select_target(log_probs_BxLxV, targets_BxL)
    uniform_BxL = -log_probs_BxLxV.mean(axis=-1)
    log_z_BxL = jax.nn.logsumexp(logits_BxLxV, axis=-1)
    loss_BxL = (1 - label_smoothing) * nll_BxL + label_smoothing * uniform_BxL + z_loss * log_z_BxL**2
    correct_BxL = select_target(logits_BxLxV, targets_BxL) >= logits_BxLxV.max(axis=-1)
    loss, nll, correct = ((weights_BxL * x_BxL).sum() for x_BxL in (loss_BxL, nll_BxL, correct_BxL))
    return LossTerms(loss, weight, {"nll": (nll, weight), "accuracy": (correct, weight)})


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
    """Weighted cross-entropy of tokens, from hidden states, in chunks of positions (`lm.losses.fused_cross_entropy`).

    sum = sum_t w_t * [(1 - eps) * nll_t + eps * mean_v(-log p_tv) + z * logsumexp_t^2], in nats, with eps the label
    smoothing (Szegedy et al. 2016, section 7) and z the z-loss (PaLM, section 5).

    Reverse-mode differentiation only.

    Args:
      hidden_BxLxD: last hidden states, any float dtype. Where the weight is 0 they may be inf or NaN.
      unembed_DxV: the output projection; its columns from `vocab_size` on are padding and get gradient 0.
      targets_BxL: int32 in [0, vocab_size), or anything where the weight is 0. A weighted target that is out of range
        makes the sum, the metrics and the gradients NaN, so that the error is noticed.
      weights_BxL: 0 = not trained on. No gradient flows to them.
      vocab_size: the real vocabulary, at most V.
      z_loss, label_smoothing, softcap: 0 = off.
      chunk_len: positions of each row, or of a device's shard of it, whose logits are held at once; 0 = all. It need
        not divide L.
      most_predicted: an upper bound on the weighted positions of a row. Logits are then computed at this many positions
        of each row only (as in BERT's own code); 0 = at all. A row with more makes the sum, the metrics and the
        gradients NaN.

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
    hidden_BxLxD, weights_BxL = _mask(hidden_BxLxD, targets_BxL, weights_BxL, vocab_size)

    # Each position has its own loss, so a device's shard of a row can be treated as a row.
    arrays = (hidden_BxLxD, targets_BxL, weights_BxL)
    hidden_BxLxD, targets_BxL, weights_BxL = map(sharding.fold_length_into_batch, arrays)
    L = hidden_BxLxD.shape[1]
    if 0 < most_predicted < L:
        hidden_BxLxD, targets_BxL, weights_BxL = _take_weighted(most_predicted, hidden_BxLxD, targets_BxL, weights_BxL)
        L = most_predicted

    options = fused_cross_entropy.Options(vocab_size, z_loss, label_smoothing, softcap, min(chunk_len, L) or L)
    loss, nll, correct = fused_cross_entropy.sums(options, hidden_BxLxD, unembed_DxV, targets_BxL, weights_BxL)
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
    """Weighted log-likelihood of each row's targets, sum_t w_t * log p_t: float32 [B].

    The logits of `chunk_len` positions are held at once, and recomputed in the backward pass. NaN where a target
    with a weight is out of range. Arguments as in `token_cross_entropy`.
    """

    @jax.checkpoint
    def body(totals_R: Array, chunk: tuple[Array, ...]) -> tuple[Array, None]:
        hidden_BxCxD, targets_BxC, weights_BxC = chunk
        logits_BxCxV = logits(hidden_BxCxD, unembed_DxV, vocab_size=vocab_size, softcap=softcap)
        target_BxC = select_target(jax.nn.log_softmax(logits_BxCxV), targets_BxC)
        return totals_R + (weights_BxC * target_BxC).sum(axis=-1), None

    B = hidden_BxLxD.shape[0]
    hidden_BxLxD, weights_BxL = _mask(hidden_BxLxD, targets_BxL, weights_BxL, vocab_size)
    arrays = (hidden_BxLxD, targets_BxL, weights_BxL)
    hidden_BxLxD, targets_BxL, weights_BxL = map(sharding.fold_length_into_batch, arrays)
    rows, L, _ = hidden_BxLxD.shape
    totals_R = jnp.zeros(rows, jnp.float32)
    chunks = fused_cross_entropy.split_positions(min(chunk_len, L) or L, hidden_BxLxD, targets_BxL, weights_BxL)
    totals_R, _ = lax.scan(body, totals_R, chunks)
    return totals_R.reshape(-1, B).sum(axis=0)


def _mask(hidden_BxLxD: Array, targets_BxL: Array, weights_BxL: Array, vocab_size: int) -> tuple[Array, Array]:
    """(hidden, weights): hidden states 0 where the weight is 0; weights NaN where a weighted target is out of range.

    A weight of 0 alone would not stop an inf or NaN: 0 * NaN = NaN.
    """
    is_trained_BxL = weights_BxL != 0
    hidden_BxLxD = jnp.where(is_trained_BxL[..., None], hidden_BxLxD, 0)
    in_vocab_BxL = (targets_BxL >= 0) & (targets_BxL < vocab_size)
    return hidden_BxLxD, jnp.where(is_trained_BxL & ~in_vocab_BxL, jnp.nan, weights_BxL)


def _take_weighted(
    count: int, hidden_BxLxD: Array, targets_BxL: Array, weights_BxL: Array
) -> tuple[Array, Array, Array]:
    """The first `count` positions of each row, weighted ones first, in order. NaN weights if a row has more of them."""
    has_weight_BxL = weights_BxL != 0
    index_BxK = jnp.argsort(~has_weight_BxL, axis=1, stable=True)[:, :count]
    hidden_BxKxD = jnp.take_along_axis(hidden_BxLxD, index_BxK[..., None], axis=1)
    targets_BxK, weights_BxK = (jnp.take_along_axis(x, index_BxK, axis=1) for x in (targets_BxL, weights_BxL))
    fits_B = has_weight_BxL.sum(axis=1) <= count
    return hidden_BxKxD, targets_BxK, jnp.where(fits_B[:, None], weights_BxK, jnp.nan)
