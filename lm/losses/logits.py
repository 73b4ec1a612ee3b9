"""Logits from hidden states. Shape letters as in `lm/types.py`."""

import jax.numpy as jnp
from jax import Array, lax

# Logit of a padded vocabulary column: exp() of it is exactly 0, and it survives division by a small temperature.
MASKED_LOGIT = -1e30


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
    return jnp.where(last_axis_index(out) < vocab_size, out, MASKED_LOGIT)


def last_axis_index(x: Array) -> Array:
    """Index along the last axis, int32 in the shape of `x`. Example, shape [2, 3]: [[0, 1, 2], [0, 1, 2]]."""
    return lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)


def select_target(x: Array, targets: Array) -> Array:
    """x[..., targets], [...]: the entry of each last axis that its target names; 0 where the target is out of range.

    By comparison, not by a gather, so that it stays local where the vocabulary is sharded.
    """
    return jnp.where(last_axis_index(x) == targets[..., None], x, 0).sum(axis=-1)
