"""Images to rows: with a label, with patches to hide, or as two views; and the augmentations that images have."""

from collections import Counter
from typing import Any

import numpy as np

from lm.config import Config
from lm.data.examples import Columns, Example, Row, Task, one_label
from lm.data.labelled import label_index
from lm.data.records import Record
from lm.schema import ConfigError


def labelled_image(record: Record, tokenizer: Any, cfg: Config, counts: Counter[str]) -> list[Example]:
    """An image with the index of its label."""
    del tokenizer, counts
    label = np.array(label_index(record["label"], record, cfg), np.int32)
    return [Example({"images": record["image"], "labels": label})]


def image(record: Record, tokenizer: Any, cfg: Config, counts: Counter[str]) -> list[Example]:
    """An image alone, whatever its label."""
    del tokenizer, cfg, counts
    return [Example({"images": record["image"]})]


def hide_patches(row: Row, rng: np.random.Generator, tokenizer: Any, cfg: Config) -> Row:
    """Says which patches are seen and which `corrupt.rate` of them are not: the two halves of one shuffle of all."""
    del tokenizer
    visible, masked = _patch_counts(cfg)
    order = rng.permutation(visible + masked).astype(np.int32)
    return row | {"visible_patches": order[:visible], "masked_patches": order[visible:]}


def two_views(row: Row, rng: np.random.Generator, tokenizer: Any, cfg: Config) -> Row:
    """Two views of one image, each by its own draw of every entry of `data.augment` (Chen et al. 2020, section 2.1).

    In an evaluation too, where the draws are always the same: of two equal views nothing could be learnt.
    """
    views = []
    for _ in range(2):
        view = row
        for name, strength in cfg.data.augment:
            view = AUGMENTATIONS[name](view, rng, strength, tokenizer, cfg)
        views.append(view["images"])
    return row | {"images": np.stack(views)}


def _patch_counts(cfg: Config) -> tuple[int, int]:
    """How many patches of an image are seen and hidden. Raises ConfigError unless there are some of both."""
    height, width, _ = cfg.data.image_shape
    total = (height // cfg.model.patch_size) * (width // cfg.model.patch_size)
    masked = round(cfg.corrupt.rate * total)
    if not 0 < masked < total:
        raise ConfigError(
            f"'corrupt.rate' ({cfg.corrupt.rate}) hides {masked} of the {total} patches of an image: expected some "
            "patches hidden and some not"
        )
    return total - masked, masked


def _image_columns(cfg: Config) -> Columns:
    return {"images": (cfg.data.image_shape, np.uint8)}


def _masked_columns(cfg: Config) -> Columns:
    visible, masked = _patch_counts(cfg)
    return _image_columns(cfg) | {"visible_patches": ((visible,), np.int32), "masked_patches": ((masked,), np.int32)}


def _pair_columns(cfg: Config) -> Columns:
    if not cfg.data.augment:
        raise ConfigError("'data.task' image_pairs compares two views of an image, but 'data.augment' is empty")
    return {"images": ((2, *cfg.data.image_shape), np.uint8)}


def _labelled_columns(cfg: Config) -> Columns:
    return _image_columns(cfg) | {"labels": ((), np.int32)}


LABELLED_IMAGES = Task(("image", "label"), labelled_image, _labelled_columns, None, lacks=one_label)
MASKED_IMAGES = Task(("image",), image, _image_columns, None, hide_patches, _masked_columns)
IMAGE_PAIRS = Task(("image",), image, _image_columns, None, two_views, _pair_columns, augments=True)


# Augmentations: see `lm.data.augment` -------------------------------------------------------------------------------

_ASPECTS = 3 / 4, 4 / 3  # least and greatest width / height of a crop, of a square image
_GREY = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


def crop(row: Row, rng: np.random.Generator, strength: float, tokenizer: Any, cfg: Config) -> Row:
    """A rectangle of the image, brought back to its size; up to `strength` of the area is cut off (Szegedy et al. 2014,
    section 6). Its share of the area is drawn evenly, its aspect from 3:4 to 4:3 evenly on a logarithmic scale."""
    del tokenizer, cfg
    from PIL import Image

    pixels = row["images"]
    height, width, channels = pixels.shape
    area = rng.uniform(1 - strength, 1)
    # A rectangle of that area and aspect fits in the image if the aspect is in [area, 1 / area].
    aspect = np.exp(rng.uniform(np.log(max(_ASPECTS[0], area)), np.log(min(_ASPECTS[1], 1 / area))))
    h, w = height * np.sqrt(area / aspect), width * np.sqrt(area * aspect)
    top, left = rng.uniform(0, height - h), rng.uniform(0, width - w)
    picture = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
    part = picture.resize((width, height), Image.Resampling.BILINEAR, box=(left, top, left + w, top + h))
    return row | {"images": np.asarray(part).reshape(pixels.shape)}


def flip(row: Row, rng: np.random.Generator, strength: float, tokenizer: Any, cfg: Config) -> Row:
    """Left and right change places, with probability `strength`."""
    del tokenizer, cfg
    return row | {"images": row["images"][:, ::-1]} if rng.random() < strength else row


def color(row: Row, rng: np.random.Generator, strength: float, tokenizer: Any, cfg: Config) -> Row:
    """Brightness, contrast and saturation, each times a number drawn from 1 - strength to 1 + strength."""
    del tokenizer, cfg
    pixels = row["images"].astype(np.float32)
    brightness, contrast, saturation = rng.uniform(max(0.0, 1 - strength), 1 + strength, 3).astype(np.float32)
    pixels = np.clip(pixels * brightness, 0, 255)
    mean = _grey(pixels).mean()
    pixels = np.clip(mean + contrast * (pixels - mean), 0, 255)
    grey = _grey(pixels)
    pixels = np.clip(grey + saturation * (pixels - grey), 0, 255)
    return row | {"images": np.rint(pixels).astype(np.uint8)}


def _grey(pixels: np.ndarray) -> np.ndarray:
    """[H, W, C] -> [H, W, 1]."""
    return pixels if pixels.shape[-1] == 1 else (pixels @ _GREY)[..., None]


AUGMENTATIONS = {"crop": crop, "flip": flip, "color": color}
