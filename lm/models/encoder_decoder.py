"""The encoder-decoder (Vaswani et al. 2017; T5, Raffel et al. 2020) of the same blocks as the other models of text.

Both sides share the token embedding and, where positions are learned, their table. Parameters: 'embed/...',
'encoder/layers/...', 'decoder/layers/...' with 'cross_attention' in each layer. Shape letters: see `lm.types`.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from lm.config import AdapterConfig, ModelConfig
from lm.models import transformer
from lm.models.attention import Mask
from lm.models.blocks import Memory, Stack
from lm.models.layers import fold
from lm.models.transformer import Embed, disturb, extend, unembed
from lm.types import Batch, ModelFns, ModelOutput


def encoder_decoder(cfg: ModelConfig, dtype: Any, adapter: AdapterConfig) -> ModelFns:
    """An encoder-decoder as pure functions.

    The decoder reads 'tokens' and so on, the encoder 'inputs', 'input_segment_ids' and 'input_positions'; a position
    of the decoder sees the inputs of its own segment. With a cache, the batch that has inputs comes first: later ones,
    without, read what it left there.

    Args:
      cfg: as `transformer.resolve` returns it.
      dtype: compute dtype of activations, float32 or bfloat16.
      adapter: what is added to the blocks.
    """
    ones = np.zeros((1, 1), np.int32)
    names = ("tokens", "positions", "segment_ids", "inputs", "input_positions", "input_segment_ids")
    return transformer.functions(EncoderDecoder(cfg, dtype, adapter), dict.fromkeys(names, ones), _decoder_of(cfg))


def _decoder_of(cfg: ModelConfig) -> ModelConfig:
    return dataclasses.replace(cfg, num_layers=cfg.decoder_layers or cfg.num_layers)


class EncoderDecoder(nn.Module):
    """Embedding, encoder, decoder, output projection."""

    cfg: ModelConfig
    dtype: Any
    adapter: AdapterConfig

    @nn.compact
    def __call__(self, batch: Batch, keys_B: jax.Array | None, cache: Any) -> ModelOutput:
        embed = Embed(self.cfg, self.dtype, name="embed")
        encoder_segments_BxS, encoded_BxSxD = self._encode(embed, batch, fold(keys_B, 0), cache)
        cfg, keys_B = _decoder_of(self.cfg), fold(keys_B, 1)
        segments_BxL, positions_BxL = batch["segment_ids"], batch["positions"]
        x_BxLxD, embedding_VxD = embed(batch["tokens"], positions_BxL, None)
        x_BxLxD = disturb(cfg, x_BxLxD, segments_BxL, keys_B)
        memory = Memory(Mask(segments_BxL, encoder_segments_BxS, 0, causal=False), encoded_BxSxD)
        stack = Stack(cfg, self.dtype, self.adapter, name="decoder")
        if cache is None:
            mask = Mask(segments_BxL, segments_BxL, cfg.sliding_window)
            hidden_BxLxD, _ = stack(x_BxLxD, mask, positions_BxL, keys_B, None, memory)
        else:
            mask, cache = extend(cache, batch, cfg.sliding_window)
            cache["input_segment_ids"] = encoder_segments_BxS
            hidden_BxLxD, cache["layers"] = stack(x_BxLxD, mask, positions_BxL, keys_B, cache["layers"], memory)
        return ModelOutput(hidden_BxLxD, unembed(cfg, self.dtype, embedding_VxD), cache)

    def _encode(
        self, embed: Embed, batch: Batch, keys_B: jax.Array | None, cache: Any
    ) -> tuple[jax.Array, jax.Array | None]:
        """(segments, hidden states) of the inputs; no hidden states when what is needed of them is in the cache."""
        if "inputs" not in batch:
            return cache["input_segment_ids"], None
        segments_BxS, positions_BxS = batch["input_segment_ids"], batch["input_positions"]
        x_BxSxD, _ = embed(batch["inputs"], positions_BxS, None)
        x_BxSxD = disturb(self.cfg, x_BxSxD, segments_BxS, keys_B)
        mask = Mask(segments_BxS, segments_BxS, self.cfg.sliding_window, causal=False)
        encoder = Stack(self.cfg, self.dtype, self.adapter, name="encoder")
        return segments_BxS, encoder(x_BxSxD, mask, positions_BxS, keys_B, None)[0]
