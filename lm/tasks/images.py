"""Image tasks: classification, masked autoencoding (He et al. 2021), contrastive learning (Chen et al. 2020)."""

import dataclasses
from collections import Counter
from typing import Any, Literal

import jax
import numpy as np

from lm import losses
from lm.config import Config, schema
from lm.config.schema import ConfigError
from lm.data import augment
from lm.data.example import Columns, Example, Row
from lm.data.record import Record, Wanted
from lm.models import vision
from lm.tasks.base import Predictor, Task, check_mask_rate, head_outputs, label_index, one_label
from lm.tasks.classification import (
    check_classes,
    class_score_names,
    class_scores,
    classification_loss,
    likely_label,
)
from lm.tasks.sentence_embeddings import (
    check_contrast,
    contrastive_loss,
    embedding,
    embedding_outputs,
    projection_head,
    view_score_names,
    view_scores,
)
from lm.types import Apply, Batch, Head, LossFn, LossTerms, Params


@dataclasses.dataclass(frozen=True)
class ImageClassificationOptions:
    """Options of image classification."""

    name: str = "image_classification"
    labels: tuple[str, ...] = schema.about_data(())  # all labels; the index of a label is its position here
    image_shape: tuple[int, int, int] = schema.about_data((32, 32, 3))  # height, width, channels
    r_drop: float = 0.0  # weight of the divergence between two dropout masks (R-Drop, Liang et al. 2021); 0 = off


@dataclasses.dataclass(frozen=True)
class MaskedAutoencodingOptions:
    """Options of masked autoencoding."""

    name: str = "masked_autoencoding"
    image_shape: tuple[int, int, int] = schema.about_data((32, 32, 3))
    mask_rate: float = 0.75  # share of an image's patches that are hidden
    # What is predicted: the pixels of a patch, normalised to mean 0 and variance 1, the same by the unbiased variance
    # (ViT-MAE's norm_pix_loss), or as the model reads them.
    target: Literal["normalised", "normalised_unbiased", "pixels"] = "normalised"


@dataclasses.dataclass(frozen=True)
class ContrastiveImagesOptions:
    """Options of contrastive learning of images."""

    name: str = "contrastive_images"
    image_shape: tuple[int, int, int] = schema.about_data((32, 32, 3))
    temperature: float = 0.05  # similarities are divided by it
    projection_dim: int = 128  # width of the projection head's output


def labelled_image(record: Record, tokenizer: Any, cfg: Config, counts: Counter[str]) -> list[Example]:
    """An image with the index of its label."""
    del tokenizer, counts
    label = np.array(label_index(record["label"], record, cfg), np.int32)
    return [Example({"images": record["image"], "labels": label})]


def image(record: Record, tokenizer: Any, cfg: Config, counts: Counter[str]) -> list[Example]:
    """An image without its label."""
    del tokenizer, cfg, counts
    return [Example({"images": record["image"]})]


def hide_patches(row: Row, rng: np.random.Generator, tokenizer: Any, cfg: Config) -> Row:
    """Draws which patches are visible and which are hidden (a fraction `task.mask_rate`), from one shuffle of all."""
    del tokenizer
    visible, masked = _patch_counts(cfg)
    order = rng.permutation(visible + masked).astype(np.int32)
    return row | {"visible_patches": order[:visible], "masked_patches": order[visible:]}


def two_image_views(row: Row, rng: np.random.Generator, tokenizer: Any, cfg: Config) -> Row:
    """Two views of one image, each with its own draw of every entry of `data.augment` (Chen et al. 2020, section 2.1).

    Evaluation draws views too, the same ones every time: comparing an image with itself would measure nothing.
    """
    views = []
    for _ in range(2):
        view = row
        for name, strength in cfg.data.augment:
            view = augment.AUGMENTATIONS[name].change(view, rng, strength, tokenizer, cfg)
        views.append(view["images"])
    return row | {"images": np.stack(views)}


def _patch_counts(cfg: Config) -> tuple[int, int]:
    """Numbers of visible and of hidden patches of an image. Raises ConfigError if either is 0."""
    height, width, _ = cfg.task.image_shape
    total = (height // cfg.model.patch_size) * (width // cfg.model.patch_size)
    masked = round(cfg.task.mask_rate * total)
    if not 0 < masked < total:
        raise ConfigError(
            f"'task.mask_rate' ({cfg.task.mask_rate}) hides {masked} of the {total} patches of an image: expected some "
            "patches hidden and some not"
        )
    return total - masked, masked


def _image_columns(cfg: Config) -> Columns:
    return {"images": (cfg.task.image_shape, np.uint8)}


def _masked_columns(cfg: Config) -> Columns:
    visible, masked = _patch_counts(cfg)
    return _image_columns(cfg) | {"visible_patches": ((visible,), np.int32), "masked_patches": ((masked,), np.int32)}


def _pair_columns(cfg: Config) -> Columns:
    if not cfg.data.augment:
        raise ConfigError("task.name=contrastive_images compares two views of an image, but 'data.augment' is empty")
    return {"images": ((2, *cfg.task.image_shape), np.uint8)}


def _labelled_columns(cfg: Config) -> Columns:
    return _image_columns(cfg) | {"labels": ((), np.int32)}


def reconstruction_loss(apply: Apply, cfg: Config, tokenizer: Any) -> LossFn:
    """Squared error of the pixels of hidden patches, from the visible ones (He et al. 2021)."""
    del tokenizer

    def loss_fn(params: Params, batch: Batch, rng: jax.Array | None) -> LossTerms:
        prediction_BxTxC = apply(params, batch, rng=rng).head
        patches_BxTxC = vision.patchify(vision.normalise(batch["images"], cfg.model), cfg.model.patch_size)
        masked_BxM, weights_B = batch["masked_patches"], batch["row_weights"]
        return losses.patch_mse(prediction_BxTxC, patches_BxTxC, masked_BxM, weights_B, target=cfg.task.target)

    return loss_fn


def _check_shape(cfg: Config) -> None:
    shape, patch = cfg.task.image_shape, cfg.model.patch_size
    if min(shape) < 1 or shape[2] not in (1, 3):
        raise ConfigError(f"'task.image_shape' is {shape}; expected height, width, and 1 channel (grey) or 3 (RGB)")
    if any(size % patch for size in shape[:2]):
        raise ConfigError(
            f"'task.image_shape' {shape} must be multiples of 'model.patch_size' ({patch}) in height and width"
        )
    if len(cfg.model.pixel_mean) not in (1, shape[2]):
        raise ConfigError(
            f"'model.pixel_mean' has {len(cfg.model.pixel_mean)} values, but 'task.image_shape' {shape} has {shape[2]} "
            "channels: give one for each, or one for all"
        )


def _check_classes(cfg: Config) -> None:
    check_classes(cfg)
    _check_shape(cfg)


def _check_masked(cfg: Config) -> None:
    check_mask_rate(cfg)
    _check_shape(cfg)


def _check_pairs(cfg: Config) -> None:
    check_contrast(cfg)
    _check_shape(cfg)


IMAGE_CLASSIFICATION = Task(
    name="image_classification",
    models=("vit",),
    fields=("image", "label"),
    examples=labelled_image,
    columns=_labelled_columns,
    texts=None,
    loss=classification_loss,
    loss_unit="nats per example",
    legend="The model learns from each row as a whole.",
    options=ImageClassificationOptions,
    least_len=0,
    check=_check_classes,
    wanted=lambda cfg: Wanted(cfg.task.name, "class", cfg.task.labels, cfg.task.image_shape),
    lacks=lambda rows, cfg: one_label(rows, cfg.task.labels),
    head=lambda cfg: Head("pooled", len(cfg.task.labels)),
    scores=class_scores,
    score_names=class_score_names,
    predictor=Predictor(("label",), image, _image_columns, head_outputs, likely_label),
    loss_options=("label_smoothing",),
)
MASKED_AUTOENCODING = Task(
    name="masked_autoencoding",
    models=("mae",),
    fields=("image",),
    examples=image,
    columns=_image_columns,
    texts=None,
    loss=reconstruction_loss,
    loss_unit="squared error per hidden patch",
    legend="The model learns what the hidden patches show.",
    options=MaskedAutoencodingOptions,
    least_len=0,
    check=_check_masked,
    wanted=lambda cfg: Wanted(cfg.task.name, image_shape=cfg.task.image_shape),
    transform=hide_patches,
    batch_columns=_masked_columns,
)
CONTRASTIVE_IMAGES = Task(
    name="contrastive_images",
    models=("vit",),
    fields=("image",),
    examples=image,
    columns=_image_columns,
    texts=None,
    loss=contrastive_loss,
    loss_unit="nats per example",
    legend="The model learns which views belong together.",
    options=ContrastiveImagesOptions,
    least_len=0,
    check=_check_pairs,
    wanted=lambda cfg: Wanted(cfg.task.name, image_shape=cfg.task.image_shape),
    transform=two_image_views,
    batch_columns=_pair_columns,
    augments=True,
    head=projection_head,
    scores=view_scores,
    score_names=view_score_names,
    predictor=Predictor((), image, _image_columns, embedding_outputs, embedding),
    couples_rows=True,
)
