"""All kinds of models, by `model.kind`."""

from collections.abc import Callable
from typing import Any

from lm.config import Config
from lm.config.schema import ConfigError
from lm.models import encoder_decoder, transformer, vision
from lm.types import Head, ModelFns


def _text(cfg: Config, head: Head | None, dtype: Any) -> ModelFns:
    return transformer.text_model(cfg.model, dtype, head, cfg.adapter)


def _encoder_decoder(cfg: Config, head: Head | None, dtype: Any) -> ModelFns:
    if head is not None:
        raise ConfigError(f"'model.kind' encoder_decoder predicts tokens and has no {head.kind} head; use encoder")
    return encoder_decoder.encoder_decoder(cfg.model, dtype, cfg.adapter)


# model.kind -> function of (config with resolved sizes of the model, head, compute dtype).
MODELS: dict[str, Callable[[Config, Head | None, Any], ModelFns]] = {
    "decoder": _text,
    "prefix_decoder": _text,
    "encoder": _text,
    "encoder_decoder": _encoder_decoder,
    "vit": vision.vit,
    "mae": vision.mae,
}
