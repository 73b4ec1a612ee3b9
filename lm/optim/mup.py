"""Width transfer (muP: Yang et al., "Tensor Programs V", arXiv:2203.03466, table 8): one learning rate for all widths.

`model.mup_base` = (width, head width) says at which sizes a recipe was tuned; r = that width / this model's. At r = 1
every factor here is exactly 1: the model is the ordinary one, in every bit. Else

    weight, by its fan-in                        starts with variance   its direction (Adam's, say) times
    hidden: a width, and another after it        as at the base x r     r
    few from many: a router, a head's output     as at the base x r^2   r
    many from few: embeddings, biases, norms     as at the base         1
    output projection, tied or not               as at the base         1; logits are multiplied by r

and attention scores are q k sqrt(head width at the base) / head width, no longer over its square root.

Adam's, Lion's and Adafactor's directions have entries of one size, so that they add up over a fan-in: r. Muon's are
orthogonal up to a factor sqrt(width) (`lm.optim`): sqrt(r) keeps their spectral norm, that of a hidden weight's change
(Yang, Simon and Bernstein, arXiv:2310.17813). Weight decay is not multiplied: it is relative to the weight as it is.
"""

import math
from collections.abc import Mapping

from lm.config import ModelConfig
from lm.optim import optimizer
from lm.parallel.sharding import LogicalAxes

# Logical axes that grow with the model's width.
WIDTHS = ("embed", "expert_embed", "heads", "kv_heads", "mlp", "head_in", "head_hidden")


def width_ratio(cfg: ModelConfig) -> float:
    """r: the width at which the recipe was tuned over the model's; 1 where muP is off."""
    return cfg.mup_base[0] / cfg.embed_dim if cfg.mup_base[0] else 1.0


def query_scale(cfg: ModelConfig) -> float:
    """What queries are multiplied with: 1 / sqrt(head width); under muP sqrt(that at the base) / head width."""
    return math.sqrt(cfg.mup_base[1] or cfg.head_dim) / cfg.head_dim


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
