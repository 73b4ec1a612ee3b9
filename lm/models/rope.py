"""Rotary position embedding (RoPE), and what changes its frequencies for rows longer than a model was trained on.

Shape letters: see `lm.types`; e = E / 2, the pairs of a head.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.config import ModelConfig, RopeScalingConfig


def rotate(
    x_BxLxHxE: jax.Array, positions_BxL: jax.Array, frequency: Any, magnitude: jax.Array | float = 1.0
) -> jax.Array:
    """Rotary position embedding (Su et al. 2021), of the pairs (i, i + E/2) as in Llama.

    Pair i of a vector at position p is rotated by the angle p * frequency_i, usually theta^(-2i/E), so that the product
    of a query and a key depends only on the difference of their positions.

    Args:
      x_BxLxHxE: queries or keys.
      positions_BxL: int32.
      frequency: radians a position of each pair, float32 [e], or [B, L, e] where they differ between rows.
      magnitude: factor of the result.
    """
    frequency = jnp.asarray(frequency)
    frequency = frequency[:, :, None] if frequency.ndim == 3 else frequency[None, None, None]
    angle_BxLx1xe = positions_BxL.astype(jnp.float32)[:, :, None, None] * frequency
    sin_BxLx1xe, cos_BxLx1xe = jnp.sin(angle_BxLx1xe), jnp.cos(angle_BxLx1xe)
    if not isinstance(magnitude, float) or magnitude != 1.0:
        sin_BxLx1xe, cos_BxLx1xe = magnitude * sin_BxLx1xe, magnitude * cos_BxLx1xe
    # The barrier keeps XLA from fusing the cast to float32 into the matmul before, which doubles its memory traffic.
    return _rotate(jax.lax.optimization_barrier(x_BxLxHxE), sin_BxLx1xe, cos_BxLx1xe)


@jax.custom_vjp
def _rotate(x_BxLxHxE: jax.Array, sin_BxLx1xe: jax.Array, cos_BxLx1xe: jax.Array) -> jax.Array:
    """x * cos + swap_halves(x) * (-sin, sin), in float32."""
    swapped = jnp.roll(x_BxLxHxE, x_BxLxHxE.shape[-1] // 2, axis=-1)
    cos, sin = (jnp.concatenate(pair, axis=-1) for pair in ((cos_BxLx1xe,) * 2, (-sin_BxLx1xe, sin_BxLx1xe)))
    return (x_BxLxHxE.astype(jnp.float32) * cos + swapped.astype(jnp.float32) * sin).astype(x_BxLxHxE.dtype)


def _rotate_fwd(x_BxLxHxE: jax.Array, sin_BxLx1xe: jax.Array, cos_BxLx1xe: jax.Array) -> Any:
    return _rotate(x_BxLxHxE, sin_BxLx1xe, cos_BxLx1xe), (sin_BxLx1xe, cos_BxLx1xe)


def _rotate_bwd(saved: Any, d_BxLxHxE: jax.Array) -> Any:
    sin_BxLx1xe, cos_BxLx1xe = saved
    return _rotate(d_BxLxHxE, -sin_BxLx1xe, cos_BxLx1xe), None, None  # a rotation's transpose is its inverse


_rotate.defvjp(_rotate_fwd, _rotate_bwd)


def of_layer(
    cfg: ModelConfig, positions_BxL: jax.Array, segments_BxL: jax.Array, is_global: jax.Array | None
) -> tuple[Any, jax.Array | float]:
    """(frequency, magnitude) for `rotate` in one layer.

    Args:
      cfg: `head_dim` and the keys that begin with `rope` are read.
      positions_BxL: int32, of the queries.
      segments_BxL: int32, their segments: with scaling 'dynamic' the frequencies depend on a document's length.
      is_global: bool [], whether this layer has no window; None = layers are alike.
    """
    rope_scaling = cfg.rope_scaling
    if rope_scaling.kind == "dynamic":
        frequency: Any = _dynamic(cfg, _lengths(positions_BxL, segments_BxL))
    else:
        frequency = frequencies(cfg.rope_theta, cfg.head_dim, rope_scaling)
    magnitude: jax.Array | float = attention_magnitude(rope_scaling)
    if is_global is not None and cfg.rope_local_theta:
        local = frequencies(cfg.rope_local_theta, cfg.head_dim, RopeScalingConfig())
        frequency = jnp.where(is_global, frequency, jnp.asarray(local))
        magnitude = jnp.where(is_global, magnitude, 1.0)
    return frequency, magnitude


def frequencies(theta: float, head_dim: int, rope_scaling: RopeScalingConfig) -> np.ndarray:
    """Radians a position of each pair of a head, float32 [e]; of 'dynamic' scaling those of short rows.

    Each operation is rounded to float32 as in the published implementations: at position 8,192 a difference in the last
    bit would be an angle of 5e-4.

        linear   f / factor (Chen et al. 2023, arXiv:2306.15595)
        llama3   by the number of rotations within the original length: few (low_freq_factor), f / factor; many
                 (high_freq_factor), f; between, a mean of both (Llama 3.1)
        yarn     the same by the pair's number, between those that rotate beta_fast and beta_slow times
                 (Peng et al. 2023, arXiv:2309.00071, section 3.2)
    """
    one = np.float32(1)
    period = np.power(theta, _exponent(head_dim), dtype=np.float64).astype(np.float32)
    plain = one / period
    factor, length = np.float32(rope_scaling.factor), rope_scaling.original_len
    if rope_scaling.kind == "linear":
        return plain / factor
    if rope_scaling.kind == "llama3":
        low, high = np.float32(rope_scaling.low_freq_factor), np.float32(rope_scaling.high_freq_factor)
        wavelength = np.float32(2 * math.pi) / plain
        share = (np.float32(length) / wavelength - low) / (high - low)
        between = (one - share) * plain / factor + share * plain
        slowest, fastest = np.float32(length) / low, np.float32(length) / high
        return np.where(wavelength > slowest, plain / factor, np.where(wavelength < fastest, plain, between))
    if rope_scaling.kind == "yarn":
        bounds = [
            head_dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))
            for rotations in (rope_scaling.beta_fast, rope_scaling.beta_slow)
        ]
        if rope_scaling.truncate:
            bounds = [math.floor(bounds[0]), math.ceil(bounds[1])]
        first, last = max(bounds[0], 0), min(bounds[1], head_dim - 1)
        pair = np.arange(head_dim // 2, dtype=np.float32)
        span = np.float32(last - first if last != first else 0.001)
        kept = one - np.clip((pair - np.float32(first)) / span, 0, 1)
        return one / (factor * period) * (one - kept) + plain * kept
    return plain


def attention_magnitude(rope_scaling: RopeScalingConfig) -> float:
    """The factor of queries and keys: of yarn `magnitude`, or 0.1 ln(factor) + 1; else 1."""
    if rope_scaling.kind != "yarn":
        return 1.0
    return rope_scaling.magnitude or 0.1 * math.log(rope_scaling.factor) + 1.0


def _exponent(head_dim: int) -> np.ndarray:
    return np.arange(0, head_dim, 2).astype(np.float32) / np.float32(head_dim)


def _dynamic(cfg: ModelConfig, length_BxL: jax.Array) -> jax.Array:
    """Frequencies [B, L, e] of rows longer than the original length: theta grows with it (NTK-aware scaling)."""
    factor, original = cfg.rope_scaling.factor, cfg.rope_scaling.original_len
    ratio_BxL = factor * jnp.maximum(length_BxL, original).astype(jnp.float32) / original - (factor - 1)
    theta_BxL = cfg.rope_theta * ratio_BxL ** (cfg.head_dim / (cfg.head_dim - 2))
    return 1.0 / theta_BxL[..., None] ** jnp.asarray(_exponent(cfg.head_dim))[None, None]


def _lengths(positions_BxL: jax.Array, segments_BxL: jax.Array) -> jax.Array:
    """Positions, int32 [B, L], of the document that each position is in, as far as the row goes."""

    def row(positions_L: jax.Array, segments_L: jax.Array) -> jax.Array:
        last = jax.ops.segment_max(positions_L, segments_L, num_segments=segments_L.shape[0] + 1)
        return last[segments_L] + 1

    return jax.vmap(row)(positions_BxL, segments_BxL)
