"""Output layers for tasks, on top of the last hidden states. They are small, and computed in float32.

Shape letters: see `lm.types`; C is the size of the head's output.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.config import ModelConfig
from lm.models import initialisers, layers
from lm.optim import mup
from lm.types import Head


class HeadLayer(nn.Module):
    """The output layer that `lm.types.Head` describes.

    Attributes:
      cfg: `pool` and `dropout` are read.
      head: kind and size.
    """

    cfg: ModelConfig
    head: Head

    @nn.compact
    def __call__(self, hidden_BxLxD: jax.Array, segments_BxL: jax.Array, keys_B: jax.Array | None) -> jax.Array:
        hidden_BxLxD = hidden_BxLxD.astype(jnp.float32)
        if self.head.kind == "token":
            return self._out("classifier")(layers.dropout(hidden_BxLxD, self.cfg.dropout, keys_B))
        pooled_BxD = pool(hidden_BxLxD, segments_BxL, self.cfg.pool)
        width = pooled_BxD.shape[-1]
        if self.head.kind == "projection":
            return self._out("out")(jax.nn.gelu(self._hidden(width, "hidden")(pooled_BxD)))
        if self.cfg.pool == "first":
            pooled_BxD = jnp.tanh(self._hidden(width, "pooler")(pooled_BxD))  # Devlin et al. 2019
        return self._out("classifier")(layers.dropout(pooled_BxD, self.cfg.dropout, keys_B))

    def _hidden(self, features: int, name: str) -> Any:
        return layers.Dense(features, ("head_in", "head_hidden"), use_bias=True, dtype=jnp.float32, name=name)

    def _out(self, name: str) -> Any:
        init = initialisers.fan_in_normal(mup.width_ratio(self.cfg) ** 0.5)
        return layers.Dense(self.head.size, ("head_in", "head_out"), True, jnp.float32, init, name=name)


def pool(hidden_BxLxD: jax.Array, segments_BxL: jax.Array, how: str) -> jax.Array:
    """Pools each row to one vector: float32 [B, D]. Padding (segment 0) is ignored; 'mean' of padding alone is 0.

    Args:
      hidden_BxLxD: float32.
      segments_BxL: int32, one segment in each row.
      how: 'first' position, also called 'cls', 'mean' over real positions, or 'last' real position.
    """
    is_real_BxL = segments_BxL > 0
    if how in ("first", "cls"):
        return hidden_BxLxD[:, 0]
    if how == "mean":
        count_B = jnp.maximum(is_real_BxL.sum(axis=1), 1).astype(jnp.float32)
        return jnp.where(is_real_BxL[..., None], hidden_BxLxD, 0).sum(axis=1) / count_B[:, None]
    place_L = jnp.arange(hidden_BxLxD.shape[1])
    last_B = jnp.where(is_real_BxL, place_L[None], 0).max(axis=1)
    # A masked sum and not a gather: it stays local where rows are sharded.
    return jnp.where((place_L[None] == last_B[:, None])[..., None], hidden_BxLxD, 0).sum(axis=1)
