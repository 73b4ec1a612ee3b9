"""Rank of the target among all candidates. Shape letters as in `lm/types.py`; C = ids of the vocabulary."""

import jax.numpy as jnp
from jax import Array, lax

from lm.losses.logits import logits


def target_rank(
    hidden_BxLxD: Array,
    unembed_DxV: Array,
    targets_BxL: Array,
    weights_BxL: Array,
    is_candidate_V: Array,
    *,
    softcap: float = 0.0,
) -> Array:
    """Rank of the target at each row's last weighted position among all candidates, from 1: int32 [B]; no gradient.

    It is 1 + the number of other candidates whose logit is not less than the target's. So the target ranks last among
    ties, a model of constant logits scores nothing, and NaN never ranks well. A target that is not a candidate has rank
    2^31 - 1. All candidates are ranked, because metrics on a sample can order models wrongly (Krichene and Rendle
    2020). Only [B, V] logits are computed.

    Args:
      hidden_BxLxD: last hidden states, any float dtype.
      unembed_DxV: the output projection.
      targets_BxL: int32 ids in [0, C).
      weights_BxL: the last position of a row whose weight is not 0 is the one that is ranked.
      is_candidate_V: bool [C], C at most V: the ids to rank.
      softcap: as in `lm.losses.logits`.
    """
    place_BxL = lax.broadcasted_iota(jnp.int32, weights_BxL.shape, 1)
    last_B = jnp.where(weights_BxL != 0, place_BxL, 0).max(axis=1)
    # Comparisons and not gathers: they stay local where rows or vocabulary are sharded.
    is_last_BxL = place_BxL == last_B[:, None]
    hidden_BxD = jnp.where(is_last_BxL[..., None], hidden_BxLxD, 0).sum(axis=1)
    target_B = jnp.where(is_last_BxL, targets_BxL, 0).sum(axis=1)
    logits_BxV = logits(hidden_BxD, unembed_DxV, vocab_size=is_candidate_V.size, softcap=softcap)
    is_candidate_V = jnp.pad(is_candidate_V, (0, logits_BxV.shape[1] - is_candidate_V.size))
    is_target_BxV = (lax.broadcasted_iota(jnp.int32, logits_BxV.shape, 1) == target_B[:, None]) & is_candidate_V[None]
    target_logit_B = jnp.where(is_target_BxV, logits_BxV, 0).sum(axis=1)
    ranks_above_BxV = is_candidate_V[None] & ~is_target_BxV & ~(logits_BxV < target_logit_B[:, None])
    rank_B = 1 + ranks_above_BxV.sum(axis=1, dtype=jnp.int32)
    return jnp.where(is_target_BxV.any(axis=1), rank_B, jnp.iinfo(jnp.int32).max)
