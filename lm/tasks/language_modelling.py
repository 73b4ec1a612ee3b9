"""Language modelling: next-token prediction, causal or with a prefix that is attended to bidirectionally."""

import itertools
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import losses
from lm.config import Config
from lm.data.example import Columns, Example, Row
from lm.data.record import Record
from lm.data.tokenizer import Tokenizer
from lm.data.tokenizer_protocol import target_bytes
from lm.evaluation import metrics
from lm.tasks.base import TOKEN_LOSS, Task, field_texts, shifted_columns
from lm.types import Apply, Batch, LossFn, LossTerms, ModelOutput, Params


def predict_tokens(
    out: ModelOutput, batch: Batch, cfg: Config, tokenizer: Tokenizer, most_predicted: int = 0
) -> LossTerms:
    """Cross-entropy of the weighted targets and, for a model with experts, the load-balancing loss.

    Args:
      most_predicted: largest number of positions of a row that have a weight; 0 = no limit.
    """
    terms = losses.token_cross_entropy(
        out.pre_logits_BxLxD,
        out.unembed_DxV,
        batch["targets"],
        batch["loss_weights"],
        vocab_size=tokenizer.vocab_size,
        z_loss=cfg.loss.z_loss,
        label_smoothing=cfg.loss.label_smoothing,
        softcap=cfg.model.logit_softcap,
        chunk_len=cfg.loss.chunk_len,
        most_predicted=most_predicted,
    )
    if out.routing_2xB is None:
        return terms
    router_loss, balance = losses.router_loss(out.routing_2xB, batch["loss_weights"])
    return terms._replace(sum=terms.sum + router_loss, metrics=terms.metrics | {"balance": (balance, terms.weight)})


def log_likelihood(out: ModelOutput, batch: Batch, cfg: Config, tokenizer: Tokenizer) -> jax.Array:
    """float32 [B]: the log-likelihood of each row's weighted targets, in nats, summed over them."""
    return losses.sequence_log_likelihood(
        out.pre_logits_BxLxD,
        out.unembed_DxV,
        batch["targets"],
        batch["loss_weights"],
        vocab_size=tokenizer.vocab_size,
        softcap=cfg.model.logit_softcap,
        chunk_len=cfg.loss.chunk_len,
    )


def next_token_loss(apply: Apply, cfg: Config, tokenizer: Tokenizer) -> LossFn:
    """Next-token prediction of each token that has a loss weight: causal language modelling, and supervised fine-tuning
    on answers, translations, or the continuation of a prefix or of an encoder's input.

    Metrics:
      nll: nats per token, without label smoothing and z-loss.
      accuracy: of the most likely token.
      bits_per_byte: bits to code the trained tokens (ends of documents included) / UTF-8 bytes of their text.
    """
    bytes_of_id_V = jnp.asarray(tokenizer.token_bytes(), jnp.float32)

    def loss_fn(params: Params, batch: Batch, rng: jax.Array | None) -> LossTerms:
        terms = predict_tokens(apply(params, batch, rng=rng), batch, cfg, tokenizer)
        bytes_BxL = target_bytes(tokenizer, bytes_of_id_V, batch["tokens"], batch["targets"])
        bytes_BxL = jnp.where(batch["loss_weights"] > 0, bytes_BxL, 0.0)
        likelihood = metrics.nll_metrics(*terms.metrics["nll"], jnp.sum(bytes_BxL))
        return terms._replace(metrics=terms.metrics | likelihood)

    return loss_fn


def documents(record: Record, tokenizer: Tokenizer, cfg: Config, counts: Counter[str]) -> list[Example]:
    """BOS, the text, EOS, all trained on. Worked: ids a b -> tokens [BOS a b], targets [a b EOS].

    Longer than seq_len: split into pieces, each of which starts where the last one stopped, so that no target is lost.
    Packing `concat` splits documents itself, at the ends of rows.
    """
    whole = whole_ids(record["text"], tokenizer)
    if len(whole) == 2:
        counts["dropped_empty"] += 1
        return []
    columns = {"tokens": whole[:-1], "targets": whole[1:], "loss_weights": _ones(len(whole) - 1)}
    return _pieces(columns, cfg, counts)


def unshifted_documents(record: Record, tokenizer: Tokenizer, cfg: Config, counts: Counter[str]) -> list[Example]:
    """BOS, the text, EOS, without targets: the input of a task that masks tokens. Split as in `documents`."""
    whole = whole_ids(record["text"], tokenizer)
    if len(whole) == 2:
        counts["dropped_empty"] += 1
        return []
    return _pieces({"tokens": whole}, cfg, counts)


def whole_ids(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """BOS, the ids of a text, EOS: int32."""
    ids = itertools.chain((tokenizer.bos_id,), tokenizer.ids(text), (tokenizer.eos_id,))
    return np.fromiter(ids, np.int32)


def _ones(length: int) -> np.ndarray:
    """float32 ones [length]: a view of a single element, so it takes no memory."""
    return np.broadcast_to(np.float32(1), length)


def _pieces(columns: dict[str, np.ndarray], cfg: Config, counts: Counter[str]) -> list[Example]:
    length, limit = len(columns["tokens"]), cfg.data.seq_len
    if length <= limit or cfg.data.packing == "concat":
        return [Example(columns)]
    counts["cut_in_pieces"] += 1
    starts = range(0, length, limit)
    return [Example({name: array[start : start + limit] for name, array in columns.items()}) for start in starts]


def text_prompt(text: str, tokenizer: Tokenizer) -> list[int]:
    """BOS and the ids of a text: the start of a document."""
    return [tokenizer.bos_id, *tokenizer.encode(text)]


def prefix(row: Row, rng: np.random.Generator, tokenizer: Any, cfg: Config) -> Row:
    """Makes a random number of each segment's first tokens its prefix, visible to the whole segment (T5, 3.2.1).

    Targets inside the prefix get weight 0. The last prefix position keeps its weight: its target is outside.
    Worked, segments of four and two tokens, prefixes of three and one:

        tokens        a b c d  e f
        targets       b c d .  f .
        is_prefix     1 1 1 0  1 0
        loss_weights  0 0 1 1  1 1

    Args:
      row: segment_ids int [L], segments numbered from 1, and loss_weights [L].
      rng: generator of this row. The prefix length is uniform over 1..n, for a segment of n tokens.
      tokenizer: unused.
      cfg: unused.

    Returns:
      The row with is_prefix int32 [L] and loss_weights float32 [L].
    """
    segments_L = row["segment_ids"].astype(np.int64)
    length_G = np.bincount(segments_L)
    start_G = np.searchsorted(np.where(segments_L > 0, segments_L, len(length_G)), np.arange(len(length_G)))
    end_G = start_G + 1 + np.floor(rng.random(len(length_G)) * length_G).astype(np.int64)
    at_L = np.arange(len(segments_L))
    is_prefix_L = (segments_L > 0) & (at_L < end_G[segments_L])
    in_sight_L = is_prefix_L & (at_L + 1 < end_G[segments_L])
    weights_L = np.where(in_sight_L, 0.0, row["loss_weights"]).astype(np.float32)
    return row | {"is_prefix": is_prefix_L.astype(np.int32), "loss_weights": weights_L}


def _prefix_columns(cfg: Config) -> Columns:
    return shifted_columns(cfg) | {"is_prefix": ((cfg.data.seq_len,), np.int32)}


CAUSAL_LM = Task(
    name="causal_lm",
    models=("decoder",),
    fields=("text",),
    examples=documents,
    columns=shifted_columns,
    texts=field_texts("text"),
    loss=next_token_loss,
    loss_unit="nats per token",
    balances_experts=True,
    predicts_every_position=True,
    packing=("pad", "best_fit", "concat"),
    loss_options=TOKEN_LOSS,
    has_perplexity=True,
    prompt=text_prompt,
)
PREFIX_LM = CAUSAL_LM._replace(
    name="prefix_lm", models=("prefix_decoder",), transform=prefix, batch_columns=_prefix_columns
)
