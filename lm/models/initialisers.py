"""Initialisation of parameters: one scheme for the whole model, named by `model.init`.

Standard deviations for N layers; in all schemes biases are 0 and scales of norms 1:

    scheme  token embedding (tied)    kernels                 residual kernels   output projection
    gpt2    0.02                      0.02                    0.02 / sqrt(2N)    0.02
    fan_in  1    (1 / sqrt(width))    1 / sqrt(fan-in)        that / sqrt(2N)    1 / sqrt(fan-in)
    bert    0.02, truncated           0.02, truncated         as kernels         0.02, truncated
    llama   1    (0.02)               0.02                    0.02 / sqrt(2N)    1 / sqrt(fan-in)
    t5      1    (1 / sqrt(width))    1 / sqrt(fan-in)        as kernels         1 / sqrt(fan-in)
    vit     0.02                      Xavier's, uniform       as kernels         Xavier's, uniform

Residual kernels write to the residual stream: attention's `out` and the MLP's `down`. Truncated: a normal
distribution of this deviation, truncated at two deviations.

    gpt2    GPT-2 (Radford et al. 2019, section 2.3), as nanoGPT and transformers' GPT2Model have it
    fan_in  LeCun et al. 1998, with GPT-2's depth factor: entries of the residual stream and of all activations are
            about 1, whatever the width
    bert    BERT (Devlin et al. 2019) as google-research/bert has it, without a depth factor; also transformers' Llama
    llama   Llama 3 as torchtitan has it with depth_init=False, the same factor in every layer; there the output
            projection is truncated at 3 deviations
    t5      T5 (Raffel et al. 2020) as Mesh TensorFlow and transformers have it. T5 does not scale scores by
            1 / sqrt(head width) but puts this factor in the query kernel; here the scores are scaled, unless
            model.query_scale is 1, as published T5s have it: their query kernels are read, not drawn. T5 scales tied
            logits by 1 / sqrt(width); here this factor is in the token table, which has deviation 1 with
            model.scale_logits.
    vit     ViT (Dosovitskiy et al. 2020) as big_vision has it, and the masked autoencoder (He et al. 2021), which
            follows it: Glorot and Bengio 2010, variance 2 / (fan-in + fan-out)

In every scheme, tables of positions and types, [CLS] and the mask token of images have deviation 0.02; relative
position biases, routers, task heads and adapters are initialised as their modules say.

Under muP these are the deviations at the base width; at other widths they are scaled as in the table of `lm.optim.mup`.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import flax.linen as nn
import jax

from lm.config import ModelConfig
from lm.optim import mup

Init = Callable[..., jax.Array]
# Role of a weight: a token table [vocabulary, width], tied to the output projection or not; a kernel
# [..., fan-in, fan-out]; a kernel that writes to the residual stream; an output projection of its own.
Role = Literal["embedding", "tied_embedding", "kernel", "residual", "output"]
Distribution = Literal["normal", "truncated", "uniform"]
# (rows, columns) of a weight -> standard deviation.
Deviation = Callable[[float, float], float]


class Scheme(NamedTuple):
    """An initialisation scheme. Deviations are functions of (rows, columns), of a kernel (fan-in, fan-out).

    Attributes:
      embedding: deviation of a token table.
      tied: deviation of a token table that is also the output projection.
      kernel: deviation of a kernel.
      output: deviation of an output projection.
      by_depth: whether residual kernels are divided by sqrt(2N).
      draw: distribution of kernels and output projection.
      table: distribution of token tables.
    """

    embedding: Deviation
    tied: Deviation
    kernel: Deviation
    output: Deviation
    by_depth: bool
    draw: Distribution = "normal"
    table: Distribution = "normal"


def _small(rows: float, columns: float) -> float:
    return 0.02


def _one(rows: float, columns: float) -> float:
    return 1.0


def _fan_in(rows: float, columns: float) -> float:
    return 1.0 / math.sqrt(rows)


def _width(rows: float, columns: float) -> float:
    return 1.0 / math.sqrt(columns)


def _xavier(rows: float, columns: float) -> float:
    return math.sqrt(2.0 / (rows + columns))


SCHEMES = {
    "gpt2": Scheme(embedding=_small, tied=_small, kernel=_small, output=_small, by_depth=True),
    "fan_in": Scheme(embedding=_one, tied=_width, kernel=_fan_in, output=_fan_in, by_depth=True),
    "bert": Scheme(_small, _small, _small, _small, by_depth=False, draw="truncated", table="truncated"),
    "llama": Scheme(embedding=_one, tied=_small, kernel=_small, output=_fan_in, by_depth=True),
    "t5": Scheme(embedding=_one, tied=_width, kernel=_fan_in, output=_fan_in, by_depth=False),
    "vit": Scheme(embedding=_small, tied=_small, kernel=_xavier, output=_xavier, by_depth=False, draw="uniform"),
}


def initialiser(cfg: ModelConfig, role: Role) -> Init:
    """Initialiser of a weight of the model: (key, shape, dtype) -> array.

    Args:
      cfg: `init`, `num_layers`, `embed_dim` and `mup` are read.
      role: role of the weight.
    """
    scheme, ratio = SCHEMES[cfg.init], mup.width_ratio(cfg)

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.Array:
        std = deviation(cfg.init, role, shape[-2:], cfg.num_layers, ratio)
        distribution = scheme.table if role in ("embedding", "tied_embedding") else scheme.draw
        return _draw(distribution, std, key, shape, dtype)

    return init


def deviation(name: str, role: Role, shape: tuple[int, ...], num_layers: int, ratio: float = 1.0) -> float:
    """Standard deviation of a weight, before truncation.

    Args:
      name: name of the scheme.
      role: role of the weight.
      shape: (rows, columns) of the weight of one layer.
      num_layers: N.
      ratio: muP's r, base width / width of the model.
    """
    scheme, (rows, columns) = SCHEMES[name], shape
    match role:
        case "embedding":
            return scheme.embedding(rows, columns * ratio)
        case "tied_embedding":
            return scheme.tied(rows, columns * ratio)
        case "output":
            return scheme.output(rows * ratio, columns)
    std = scheme.kernel(rows * ratio, columns * ratio) * math.sqrt(ratio)
    return std / math.sqrt(2 * num_layers) if role == "residual" and scheme.by_depth else std


def _draw(
    distribution: Distribution, std: float, key: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike
) -> jax.Array:
    match distribution:
        case "truncated":
            return std * jax.random.truncated_normal(key, -2.0, 2.0, shape, dtype)
        case "uniform":
            return math.sqrt(3.0) * std * jax.random.uniform(key, shape, dtype, -1.0, 1.0)
    return std * jax.random.normal(key, shape, dtype)


def fan_in_normal(scale: float = 1.0) -> Init:
    """Normal with standard deviation scale / sqrt(fan-in), for kernels [..., in, out] in every scheme."""
    return lambda key, shape, dtype: scale / math.sqrt(shape[-2]) * jax.random.normal(key, shape, dtype)


# Tables of positions and types, [CLS] and the mask token of images, in every scheme.
SMALL: Init = nn.initializers.normal(0.02)
