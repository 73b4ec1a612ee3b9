"""Images to rows: with a label, with patches to hide, or as two views; and the augmentations that images have."""

from collections import Counter
from typing import Any

import numpy as np

from lm.config import Config
from lm.config.schema import ConfigError
from lm.data import augment
from lm.data.example import Columns, Example, Row, Task, one_label
from lm.data.record import Record
from lm.tasks.classification import label_index


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
            view = augment.AUGMENTATIONS[name].change(view, rng, strength, tokenizer, cfg)
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
