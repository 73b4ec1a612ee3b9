"""The encoder-decoder (Vaswani et al. 2017; T5, Raffel et al. 2020), of the blocks of `lm.models.transformer`.

Encoder and decoder share the token embedding and the table of learned positions, if there is one. Parameters:
'embed/...', 'encoder/layers/...', 'decoder/layers/...' with 'cross_attention' in each layer. Shape letters: see
`lm.types`.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from lm.config import AdapterConfig, ModelConfig
from lm.models import functional
from lm.models.attention import Mask
from lm.models.layers import fold
from lm.models.transformer import Embed, Memory, Stack, regularise_embeddings, unembed
from lm.types import Batch, ModelFns, ModelOutput


def encoder_decoder(cfg: ModelConfig, dtype: Any, adapter: AdapterConfig) -> ModelFns:
    """An encoder-decoder as pure functions.

    The decoder reads 'tokens' and so on, the encoder 'inputs', 'input_segment_ids' and 'input_positions'; a position
    of the decoder sees the inputs of its own segment. With a cache, the first batch has inputs, whose keys and values
    are cached; later batches have none.

    Args:
      cfg: as `transformer.resolve` returns it.
      dtype: compute dtype of activations, float32 or bfloat16.
      adapter: adapter of the blocks.
    """
    ones = np.zeros((1, 1), np.int32)
    names = ("tokens", "positions", "segment_ids", "inputs", "input_positions", "input_segment_ids")
    module = EncoderDecoder(cfg, dtype, adapter)
    return functional.model_fns(module, dict.fromkeys(names, ones), _decoder_config(cfg))


def _decoder_config(cfg: ModelConfig) -> ModelConfig:
    return dataclasses.replace(cfg, num_layers=cfg.decoder_layers)


class EncoderDecoder(nn.Module):
    """Embedding, encoder, decoder, output projection."""

    cfg: ModelConfig
    dtype: Any
    adapter: AdapterConfig

    @nn.compact
    def __call__(self, batch: Batch, keys_B: jax.Array | None, cache: Any) -> ModelOutput:
        embed = Embed(self.cfg, self.dtype, name="embed")
        encoder_segments_BxS, encoded_BxSxD = self._encode(embed, batch, fold(keys_B, 0), cache)
        cfg, keys_B = _decoder_config(self.cfg), fold(keys_B, 1)
        segments_BxL, positions_BxL = batch["segment_ids"], batch["positions"]
        x_BxLxD, embedding_VxD = embed(batch["tokens"], positions_BxL, None)
        x_BxLxD = regularise_embeddings(cfg, x_BxLxD, segments_BxL, keys_B)
        memory = Memory(Mask(segments_BxL, encoder_segments_BxS, 0, causal=False), encoded_BxSxD)
        stack = Stack(cfg, self.dtype, self.adapter, name="decoder")
        if cache is None:
            mask = Mask(segments_BxL, segments_BxL, cfg.sliding_window)
            hidden_BxLxD, _ = stack(x_BxLxD, mask, positions_BxL, keys_B, None, memory)
        else:
            mask, cache = functional.extend_cache(cache, batch, cfg.sliding_window)
            cache["input_segment_ids"] = encoder_segments_BxS
            hidden_BxLxD, cache["layers"] = stack(x_BxLxD, mask, positions_BxL, keys_B, cache["layers"], memory)
        return ModelOutput(hidden_BxLxD, unembed(cfg, self.dtype, embedding_VxD), cache)

    def _encode(
        self, embed: Embed, batch: Batch, keys_B: jax.Array | None, cache: Any
    ) -> tuple[jax.Array, jax.Array | None]:
        """(segment ids, hidden states) of the inputs; hidden states are None if keys and values are in the cache."""
        if "inputs" not in batch:
            return cache["input_segment_ids"], None
        segments_BxS, positions_BxS = batch["input_segment_ids"], batch["input_positions"]
        x_BxSxD, _ = embed(batch["inputs"], positions_BxS, None)
        x_BxSxD = regularise_embeddings(self.cfg, x_BxSxD, segments_BxS, keys_B)
        mask = Mask(segments_BxS, segments_BxS, self.cfg.sliding_window, causal=False)
        encoder = Stack(self.cfg, self.dtype, self.adapter, name="encoder")
        return segments_BxS, encoder(x_BxSxD, mask, positions_BxS, keys_B, None)[0]
