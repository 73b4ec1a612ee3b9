"""Auxiliary losses of the router of a mixture of experts. Shape letters as in `lm/types.py`."""

import jax.numpy as jnp
from jax import Array, lax

# Weights of the load-balancing loss (Fedus et al. 2021, section 2.2) and of the z-loss (Zoph et al. 2022, section 3).
LOAD_BALANCE, Z_LOSS = 0.01, 0.001


def router_loss(routing_2xB: Array, weights_BxL: Array) -> tuple[Array, Array]:
    """Weighted sum over rows of the router's auxiliary losses, and of the load balance alone: float32 [] each.

    A row counts once for each of its predicted tokens, so that the router's loss can be added to a loss over tokens
    and divided by the same weight; a batch is then the sum of its micro-batches.

    Args:
      routing_2xB: load balance and z-loss of each row, see `lm.types.ModelOutput`.
      weights_BxL: loss weights of the tokens; a row without any does not count.
    """
    weights_B = lax.stop_gradient(weights_BxL.astype(jnp.float32)).sum(axis=1)
    balance, z = jnp.where(weights_B[None] != 0, weights_B[None] * routing_2xB, 0).sum(axis=1)
    return LOAD_BALANCE * balance + Z_LOSS * z, balance
