"""The loss of views of the same thing: it alone couples the rows of a batch. Shape letters as in `lm/types.py`."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from lm.losses.logits import MASKED_LOGIT
from lm.parallel import sharding
from lm.types import LossTerms


def info_nce(z_BxnxP: Array, weights_B: Array, *, temperature: float, symmetric: bool) -> LossTerms:
    """Cross-entropy of finding a row's other view among the views of all rows, by their cosines / temperature.

    With `symmetric`, each of views 0 and 1 looks for the other among all views but itself: NT-Xent (SimCLR, Chen et al.
    2020, equation 1). Else view 0 looks for view 1 among all rows' views 1 and above: InfoNCE with negatives from the
    batch (SimCSE, Gao et al. 2021, equation 1) and, where n = 3, a hard negative a row (equation 5).

    Example, two rows, views named by row and view, who looks (left) for whom (first) among whom:

        symmetric, n = 2       a0: a1 | b0 b1    a1: a0 | b0 b1    b0: b1 | a0 a1    b1: b0 | a0 a1
        not symmetric, n = 3   a0: a1 | a2 b1 b2                   b0: b1 | b2 a1 a2

    Args:
      z_BxnxP: n >= 2 views of each row, not normalised, any float dtype. Where the weight is 0 they may be NaN.
      weights_B: 0 = a row that neither looks nor is looked at. A row's views share its weight.
      temperature: above 0.
      symmetric: see above.

    Returns:
      LossTerms over the global batch; metric 'accuracy' of the largest cosine (ties count as correct).

    Raises:
      ValueError: there is no second view.
    """
    if z_BxnxP.shape[1] < 2:
        raise ValueError(f"z is {z_BxnxP.shape}, expected two views of each row or more")
    weights_B = lax.stop_gradient(weights_B.astype(jnp.float32))
    is_row_B = weights_B != 0
    z_BxnxP = jnp.where(is_row_B[:, None, None], z_BxnxP.astype(jnp.float32), 0)
    z_BxnxP *= lax.rsqrt(jnp.maximum(jnp.square(z_BxnxP).sum(axis=-1, keepdims=True), 1e-12))
    anchors, candidates = (slice(0, 2), slice(0, None)) if symmetric else (slice(0, 1), slice(1, None))
    # Each device keeps its rows as anchors and gathers everyone's as candidates.
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
    # Where a row does not count its scores are all masked, and finite.
    weight = weights_B.sum()
    return LossTerms((weights_B * loss_B).sum(), weight, {"accuracy": ((weights_B * correct_B).sum(), weight)})
