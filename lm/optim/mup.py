"""Hyperparameter transfer across widths (muP: Yang et al., "Tensor Programs V", arXiv:2203.03466, table 8).

`model.mup` has the sizes at which a recipe was tuned; r = base width / width of the model.
At r = 1 every factor here is exactly 1, and the model is bitwise the one without muP. Otherwise

    weight, by fan-in -> fan-out                         initial variance    optimizer's direction
    hidden (width -> width)                              base x r            x r
    output-like (width -> fixed): router, task head      base x r^2          x r
    input-like (fixed -> width): embeddings, biases...   base                x 1
    output projection, tied or not                       base                x 1; logits are multiplied by r

and attention scores are q k sqrt(base head width) / head width instead of q k / sqrt(head width).

The directions of Adam, Lion and Adafactor have entries of about one size, which add up over the fan-in: hence r. Those
of Muon are orthogonal up to a factor sqrt(width) (`lm.optim`): sqrt(r) keeps the spectral norm of a hidden weight's
update (Yang, Simon and Bernstein, arXiv:2310.17813). Weight decay is not scaled: it is relative to the weight.
"""

import math
from collections.abc import Mapping

from lm.config import ModelConfig
from lm.optim import optimizer
from lm.parallel.sharding import LogicalAxes

# Logical axes that grow with the model's width.
WIDTHS = ("embed", "expert_embed", "heads", "kv_heads", "mlp", "head_in", "head_hidden")


def width_ratio(cfg: ModelConfig) -> float:
    """r: base width / width of the model; 1 without muP."""
    return cfg.mup.base_width / cfg.embed_dim if cfg.mup.base_width else 1.0


def query_scale(cfg: ModelConfig) -> float:
    """Scale of queries: `query_scale`, or 1 / sqrt(head width); under muP sqrt(base head width) / head width."""
    if cfg.query_scale:
        return cfg.query_scale
    return math.sqrt(cfg.mup.base_head_dim or cfg.head_dim) / cfg.head_dim


def direction_scales(name: str, logical_axes: Mapping[str, LogicalAxes], ratio: float) -> dict[str, float]:
    """Path -> factor of the optimizer's direction, for `lm.optim.build`.

    Args:
      name: `optim.name`.
      logical_axes: path -> logical axes, weights as [..., fan-in, fan-out].
      ratio: r.
    """

    def scale(path: str, axes: LogicalAxes) -> float:
        fan_in, fan_out = axes[-2:] if len(axes) > 1 else (None, None)
        if fan_in not in WIDTHS or fan_out == "vocab":
            return 1.0
        is_orthogonal = name == "muon" and optimizer.is_stacked_kernel(path) and fan_out in WIDTHS
        return math.sqrt(ratio) if is_orthogonal else ratio

    return {path: scale(path, axes) for path, axes in logical_axes.items()}
