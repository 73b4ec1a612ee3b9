"""What is learnt: each objective turns a model and a config into one function of (params, batch, rng).

An objective calls `apply` once and a function of `lm.losses` once; everything about devices, accumulation and the
optimizer is elsewhere.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lm import losses, metrics
from lm.config import Config
from lm.data.tokenizer import Tokenizer
from lm.types import Batch, LossTerms, ModelOutput, Params

Apply = Callable[..., ModelOutput]
LossFn = Callable[[Params, Batch, jax.Array | None], LossTerms]


def clm(apply: Apply, cfg: Config, tokenizer: Tokenizer) -> LossFn:
    """Causal language modelling, and supervised fine-tuning on the tokens that `loss_weights` names: one function.

    Metrics:
      nll: nats a token, without label smoothing and z-loss.
      accuracy: of the most likely token.
      bits_per_byte: bits to code the trained tokens (ends of documents included) / UTF-8 bytes they stand for.
    """
    bytes_of_id_V = jnp.asarray(tokenizer.token_bytes(), jnp.float32)

    def loss_fn(params: Params, batch: Batch, rng: jax.Array | None) -> LossTerms:
        out = apply(params, batch, rng=rng)
        terms = losses.token_cross_entropy(
            out.hidden_BxLxD,
            out.unembed_DxV,
            batch["targets"],
            batch["loss_weights"],
            vocab_size=tokenizer.vocab_size,
            z_loss=cfg.loss.z_loss,
            label_smoothing=cfg.loss.label_smoothing,
            softcap=cfg.model.logit_softcap,
            chunk_len=cfg.loss.chunk_len,
        )
        bytes_BxL = jnp.where(batch["loss_weights"] > 0, bytes_of_id_V[batch["targets"]], 0.0)
        likelihood = metrics.nll_metrics(*terms.metrics["nll"], jnp.sum(bytes_BxL))
        return terms._replace(metrics=terms.metrics | likelihood)

    return loss_fn


OBJECTIVES: dict[str, Callable[[Apply, Config, Tokenizer], LossFn]] = {"clm": clm}
