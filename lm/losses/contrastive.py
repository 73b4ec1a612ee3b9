"""Contrastive loss of views, the only loss that couples the rows of a batch. Shape letters as in `lm/types.py`."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from lm.losses.logits import MASKED_LOGIT
from lm.parallel import sharding
from lm.types import LossTerms


def info_nce(z_BxnxP: Array, weights_B: Array, *, temperature: float, symmetric: bool) -> LossTerms:
    """InfoNCE with in-batch negatives: cross-entropy of an anchor's positive, by cosine similarity / temperature.

    With `symmetric`, views 0 and 1 are each other's positive, and all other views are negatives: NT-Xent (SimCLR, Chen
    et al. 2020, equation 1). Else view 0 is the anchor, view 1 its positive, and the views 1 and above of all rows are
    the negatives (SimCSE, Gao et al. 2021, equation 1); with n = 3, view 2 is a hard negative (equation 5).

    Example, rows a and b, as anchor: positive | negatives

        symmetric, n = 2       a0: a1 | b0 b1    a1: a0 | b0 b1    b0: b1 | a0 a1    b1: b0 | a0 a1
        not symmetric, n = 3   a0: a1 | a2 b1 b2                   b0: b1 | b2 a1 a2

    Args:
      z_BxnxP: n >= 2 views of each row, not normalised, any float dtype. Where the weight is 0 they may be NaN.
      weights_B: 0 = a row that is neither an anchor nor a negative. A row's anchors share its weight.
      temperature: above 0.
      symmetric: see above.

    Returns:
      LossTerms over the global batch; metric 'accuracy': the positive is the most similar (ties count as correct).

    Raises:
      ValueError: fewer than two views.
    """
    if z_BxnxP.shape[1] < 2:
        raise ValueError(f"z is {z_BxnxP.shape}, expected two or more views of each row on axis 1")
    weights_B = lax.stop_gradient(weights_B.astype(jnp.float32))
    is_row_B = weights_B != 0
    z_BxnxP = jnp.where(is_row_B[:, None, None], z_BxnxP.astype(jnp.float32), 0)
    z_BxnxP *= lax.rsqrt(jnp.maximum(jnp.square(z_BxnxP).sum(axis=-1, keepdims=True), 1e-12))
    anchors, candidates = (slice(0, 2), slice(0, None)) if symmetric else (slice(0, 1), slice(1, None))
    # Each device has the anchors of its rows, and gathers the candidates of all rows.
    anchors_BxaxP = sharding.constrain(z_BxnxP[:, anchors], "batch", None, None)
    candidates_BxcxP = sharding.constrain(z_BxnxP[:, candidates], None, None, None)
    scores_BxaxBxc = jnp.einsum("iap,jcp->iajc", anchors_BxaxP, candidates_BxcxP, precision="float32") / temperature
    scores_BxaxBxc = sharding.constrain(scores_BxaxBxc, "batch", None, None, None)

    row_i, view_a, row_j, view_c = (lax.broadcasted_iota(jnp.int32, scores_BxaxBxc.shape, d) for d in range(4))
    view_c += candidates.start
    is_same = (row_i == row_j) & (view_a == view_c)
    is_positive = (row_i == row_j) & (view_a + view_c == 1)
    scores_BxaxBxc = jnp.where(is_same | ~is_row_B[None, None, :, None], MASKED_LOGIT, scores_BxaxBxc)
    positive_Bxa = jnp.where(is_positive, scores_BxaxBxc, 0).sum(axis=(2, 3))
    loss_B = (jax.nn.logsumexp(scores_BxaxBxc, axis=(2, 3)) - positive_Bxa).mean(axis=1)
    correct_B = (positive_Bxa >= scores_BxaxBxc.max(axis=(2, 3))).mean(axis=1)
    # Finite also where the weight is 0: there all scores are masked.
    weight = weights_B.sum()
    return LossTerms((weights_B * loss_B).sum(), weight, {"accuracy": ((weights_B * correct_B).sum(), weight)})
