"""Models of images: the Vision Transformer (Dosovitskiy et al. 2020) and the masked autoencoder (He et al. 2021).

Both are the blocks of the text encoder over patches. They share the parameters 'embed/...' and 'encoder/...', so that a
ViT can be initialised from an autoencoder, without its 'decoder/...', 'decoder_embed/...', 'decoder_positions',
'mask_token' and 'pixels/...'. Position embeddings are fixed 2-D sines and cosines, as in He et al. 2021: they need not
be learned, which helps with little data, and fit any image size. Or they are tables 'embed/positions' and
'decoder_positions' for one size, as published models have them (model.position=learned and fixed).

Shape letters: see `lm.types`; here T = patches of an image, M = visible patches, N = masked patches, C = channels, or
values of a patch. L = 1 + M, with [CLS] before the patches.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lm.config import AdapterConfig, Config, ModelConfig
from lm.config.schema import ConfigError
from lm.models import functional, layers
from lm.models.attention import Mask
from lm.models.heads import HeadLayer
from lm.models.initialisers import SMALL, initialiser
from lm.models.transformer import Stack
from lm.parallel import sharding
from lm.types import Batch, Head, ModelFns, ModelOutput


def vit(cfg: Config, head: Head | None, dtype: Any) -> ModelFns:
    """The Vision Transformer as pure functions. Reads `images`, uint8 [B, *task.image_shape].

    `ModelOutput.hidden_BxLxD` is [B, 1 + T, D].
    """
    images = jnp.zeros((1, *cfg.task.image_shape), jnp.uint8)
    return functional.model_fns(Vit(cfg.model, dtype, head, cfg.adapter), {"images": images})


def mae(cfg: Config, head: Head | None, dtype: Any) -> ModelFns:
    """The masked autoencoder as pure functions. Reads `images` as `vit` does, `visible_patches` and `masked_patches`.

    `ModelOutput.head` is the prediction of every patch, float32 [B, T, C]; `hidden_BxLxD` is the encoder's output,
    [B, 1 + M, D]. It takes no other head.
    """
    if head is not None:
        raise ConfigError(f"'model.kind' mae predicts pixels and has no {head.kind} head; use vit")
    height, width, _ = cfg.task.image_shape
    patches = jnp.arange(height * width // cfg.model.patch_size**2, dtype=jnp.int32)[None]
    images = jnp.zeros((1, *cfg.task.image_shape), jnp.uint8)
    batch = {"images": images, "visible_patches": patches[:, :1], "masked_patches": patches[:, 1:]}
    return functional.model_fns(Mae(cfg.model, dtype, cfg.adapter), batch)


def normalise(images: Any, cfg: ModelConfig) -> Any:
    """Pixels 0 to 255 -> float32 (pixel / 255 - mean) / deviation, by default in [-1, 1]; channels are last."""
    mean, deviation = np.asarray(cfg.pixel_mean), np.asarray(cfg.pixel_deviation)

    def row(values: np.ndarray) -> np.ndarray:
        return values.astype(np.float32).reshape((1,) * (images.ndim - 1) + values.shape)

    return images.astype(np.float32) / row(255.0 * deviation) - row(mean / deviation)


def patchify(images_BxHxWxC: Any, size: int) -> Any:
    """Images -> patches [B, T, size * size * C] in row-major order, as are the pixels of a patch; channels are last.

    Example, size 2: the image [[1, 2, 3, 4], [5, 6, 7, 8]] of one channel -> [[1, 2, 5, 6], [3, 4, 7, 8]].

    Raises:
      ValueError: `size` does not divide height and width.
    """
    B, H, W, C = images_BxHxWxC.shape
    if H % size or W % size:
        raise ValueError(f"images of {H} x {W} pixels cannot be divided into patches of {size} x {size}")
    grid = images_BxHxWxC.reshape(B, H // size, size, W // size, size, C)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(B, -1, size * size * C)


def unpatchify(patches_BxTxC: Any, shape: tuple[int, int, int], size: int) -> Any:
    """The inverse of `patchify`: images [B, *shape] of patches."""
    H, W, C = shape
    grid = patches_BxTxC.reshape(-1, H // size, W // size, size, size, C)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(-1, H, W, C)


def positions(rows: int, columns: int, width: int) -> np.ndarray:
    """2-D position embedding, float32 [rows * columns, width]: sines and cosines of a patch's row, then of its column.

    Frequencies fall from 1 to 1/10,000 as in Vaswani et al. 2017.

    Raises:
      ConfigError: the width is not a multiple of 4.
    """
    if width % 4:
        raise ConfigError(f"'model.embed_dim' and 'model.decoder_dim' must be multiples of 4 for images, got {width}")
    frequency_Q = 10_000.0 ** (-np.arange(width // 4) / (width // 4))
    place_2xT = np.indices((rows, columns)).reshape(2, -1)
    angle_2xTxQ = place_2xT[:, :, None] * frequency_Q[None, None, :]
    return np.concatenate([f(angle_Q) for angle_Q in angle_2xTxQ for f in (np.sin, np.cos)], axis=1).astype(np.float32)


def position_table(rows: int, columns: int, width: int) -> np.ndarray:
    """What `model.position` fixed begins as, float32 [1 + rows * columns, width]: 0 for [CLS], then `positions`."""
    return np.pad(positions(rows, columns, width), ((1, 0), (0, 0)))


def _stored_positions(
    module: nn.Module, name: str, cfg: ModelConfig, dtype: Any, grid: tuple[int, int], width: int, axis: str
) -> jax.Array:
    """The table of positions [1 + T, width] of `module`, for learned and fixed `model.position`."""
    is_fixed = cfg.position == "fixed"
    init = (lambda key, shape, dtype: jnp.asarray(position_table(*grid, width), dtype)) if is_fixed else SMALL
    table_LxE = layers.weight(module, name, init, (1 + grid[0] * grid[1], width), ("position", axis))
    table_LxE = jax.lax.stop_gradient(table_LxE) if is_fixed else table_LxE
    return sharding.gather(table_LxE.astype(dtype), "position", axis)


class Vit(nn.Module):
    """Patch embedding, N blocks, final norm, and a task's head."""

    cfg: ModelConfig
    dtype: Any
    head: Head | None
    adapter: AdapterConfig

    @nn.compact
    def __call__(self, batch: Batch, keys_B: jax.Array | None, cache: Any) -> ModelOutput:
        del cache  # only text is generated
        images_BxHxWxC = batch["images"]
        hidden_BxLxD = _encode(self, images_BxHxWxC, None, keys_B)
        out = None
        if self.head is not None:
            layer = HeadLayer(self.cfg, self.head, name="head")
            out = layer(hidden_BxLxD, _ones(hidden_BxLxD), layers.fold(keys_B, self.cfg.num_layers + 1))
        return ModelOutput(hidden_BxLxD, None, head=out)


class Mae(nn.Module):
    """An encoder over the visible patches; a narrower decoder over all, with a learned token for masked ones."""

    cfg: ModelConfig
    dtype: Any
    adapter: AdapterConfig

    @nn.compact
    def __call__(self, batch: Batch, keys_B: jax.Array | None, cache: Any) -> ModelOutput:
        del cache
        cfg, images_BxHxWxC = self.cfg, batch["images"]
        visible_BxM, masked_BxN = batch["visible_patches"], batch["masked_patches"]
        hidden_BxLxD = _encode(self, images_BxHxWxC, visible_BxM, keys_B)

        small = decoder_config(cfg)
        kernel = initialiser(cfg, "kernel")
        axes = ("embed", "decoder_embed")
        x_BxLxE = layers.Dense(small.embed_dim, axes, True, self.dtype, kernel, name="decoder_embed")(hidden_BxLxD)
        token_E = layers.weight(self, "mask_token", SMALL, (small.embed_dim,), ("decoder_embed",))
        masked_shape = (*masked_BxN.shape, small.embed_dim)
        masked_BxNxE = jnp.broadcast_to(token_E[None, None].astype(self.dtype), masked_shape)
        # Visible then masked patches, put back in the order of the image.
        order_BxT = jnp.argsort(jnp.concatenate([visible_BxM, masked_BxN], axis=1), axis=1)
        shuffled_BxTxE = jnp.concatenate([x_BxLxE[:, 1:], masked_BxNxE], axis=1)
        x_BxTxE = jnp.take_along_axis(shuffled_BxTxE, order_BxT[..., None], axis=1)
        H, W, C = images_BxHxWxC.shape[1:]
        grid, width = (H // cfg.patch_size, W // cfg.patch_size), small.embed_dim
        if cfg.position == "sincos":
            x_BxTxE += jnp.asarray(positions(*grid, width), self.dtype)[None]
        x_BxLxE = jnp.concatenate([x_BxLxE[:, :1], x_BxTxE], axis=1)
        if cfg.position != "sincos":
            x_BxLxE += _stored_positions(self, "decoder_positions", cfg, self.dtype, grid, width, "decoder_embed")[None]
        decoder = Stack(small, self.dtype, name="decoder")
        out_BxLxE = _stack(decoder, x_BxLxE, layers.fold(keys_B, cfg.num_layers + 1))
        axes, size = ("decoder_embed", "pixels"), cfg.patch_size**2 * C
        pixels = layers.Dense(size, axes, True, jnp.float32, kernel, name="pixels")
        return ModelOutput(hidden_BxLxD, None, head=pixels(out_BxLxE[:, 1:].astype(jnp.float32)))


def decoder_config(cfg: ModelConfig) -> ModelConfig:
    """The config of the autoencoder's decoder: that of the encoder with another depth, width and number of heads.

    Raises:
      ConfigError: the heads do not divide its width.
    """
    width, heads = cfg.decoder_dim or cfg.embed_dim, cfg.decoder_heads or cfg.num_heads
    if width % heads:
        key = "decoder_heads" if heads != cfg.num_heads else "num_heads"
        raise ConfigError(f"'model.decoder_dim' ({width}) must be a multiple of 'model.{key}' ({heads})")
    return dataclasses.replace(
        cfg,
        num_layers=cfg.decoder_layers,
        embed_dim=width,
        num_heads=heads,
        num_kv_heads=max(1, cfg.num_kv_heads * heads // cfg.num_heads),
        head_dim=width // heads,
        mlp_dim=cfg.decoder_mlp_dim or cfg.mlp_dim * width // cfg.embed_dim,
    )


class PatchEmbed(nn.Module):
    """[CLS], then a linear projection plus position embedding of each visible patch: [B, 1 + M, D]."""

    cfg: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self, images_BxHxWxC: jax.Array, visible_BxM: jax.Array | None) -> jax.Array:
        cfg, size = self.cfg, self.cfg.patch_size
        B, H, W, _ = images_BxHxWxC.shape
        patches_BxMxC = patchify(normalise(images_BxHxWxC, cfg), size).astype(self.dtype)
        grid, width = (H // size, W // size), cfg.embed_dim
        place_of_cls_D = None
        if cfg.position == "sincos":
            place_BxMxD = jnp.asarray(positions(*grid, width), self.dtype)[None]
        else:
            table_LxD = _stored_positions(self, "positions", cfg, self.dtype, grid, width, "embed")
            place_of_cls_D, place_BxMxD = table_LxD[0], table_LxD[None, 1:]
        if visible_BxM is not None:
            patches_BxMxC = jnp.take_along_axis(patches_BxMxC, visible_BxM[..., None], axis=1)
            place_BxMxD = place_BxMxD[0, visible_BxM]
        kernel = initialiser(cfg, "kernel")
        project = layers.Dense(cfg.embed_dim, ("patch", "embed"), True, self.dtype, kernel, name="patches")
        x_BxMxD = project(patches_BxMxC)
        x_BxMxD += jnp.broadcast_to(place_BxMxD, x_BxMxD.shape)
        cls_D = layers.weight(self, "cls", SMALL, (cfg.embed_dim,), ("embed",))
        cls_D = sharding.gather(cls_D.astype(self.dtype), "embed")
        cls_D = cls_D if place_of_cls_D is None else cls_D + place_of_cls_D
        return jnp.concatenate([jnp.broadcast_to(cls_D[None, None], (B, 1, cfg.embed_dim)), x_BxMxD], axis=1)


def _encode(
    module: Vit | Mae, images_BxHxWxC: jax.Array, visible_BxM: jax.Array | None, keys_B: jax.Array | None
) -> jax.Array:
    """Patch embedding and encoder, [B, 1 + M, D]; called in `module`, to which their parameters belong."""
    cfg, dtype = module.cfg, module.dtype
    x_BxLxD = PatchEmbed(cfg, dtype, name="embed")(images_BxHxWxC, visible_BxM)
    x_BxLxD = layers.dropout(x_BxLxD, cfg.dropout, layers.fold(keys_B, cfg.num_layers))
    return _stack(Stack(cfg, dtype, module.adapter, name="encoder"), x_BxLxD, keys_B)


def _stack(stack: Stack, x_BxLxD: jax.Array, keys_B: jax.Array | None) -> jax.Array:
    """The stack with full attention: every position sees every other."""
    x_BxLxD = sharding.constrain(x_BxLxD, "batch", "residual_length", None)
    ones_BxL = _ones(x_BxLxD)
    mask = Mask(ones_BxL, ones_BxL, 0, causal=False)
    hidden_BxLxD, _ = stack(x_BxLxD, mask, ones_BxL, keys_B, None)
    return hidden_BxLxD


def _ones(x_BxLxD: jax.Array) -> jax.Array:
    return jnp.ones(x_BxLxD.shape[:2], jnp.int32)
