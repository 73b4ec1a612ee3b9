"""Every kind of model by its name in `model.kind`."""

from collections.abc import Callable
from typing import Any

from lm.config import Config
from lm.models import transformer, vision
from lm.types import Head, ModelFns


def _text(cfg: Config, head: Head | None, dtype: Any) -> ModelFns:
    return transformer.text_model(cfg.model, dtype, head, cfg.adapter)


# model.kind -> (config with the model's sizes resolved, head, compute dtype) -> the model's functions.
MODELS: dict[str, Callable[[Config, Head | None, Any], ModelFns]] = {
    "decoder": _text,
    "encoder": _text,
    "vit": vision.vit,
    "mae": vision.mae,
}
