"""Contrastive learning of sentence embeddings (SimCSE, Gao et al. 2021)."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from lm.config import Config
from lm.config.schema import ConfigError
from lm.data.example import Columns, Example, Rows
from lm.data.record import Record
from lm.data.tokenizer import Tokenizer
from lm.evaluation import scores
from lm.losses import contrastive as contrastive_losses
from lm.models import heads
from lm.tasks.base import TEXT_MODELS, Predictor, Task, field_texts, sequence_columns, views_as_rows
from lm.tasks.classification import LEAST_LEN, encode_pair
from lm.types import Apply, Batch, Head, LossFn, LossTerms, Outputs, Params


@dataclasses.dataclass(frozen=True)
class ContrastiveOptions:
    """Options of contrastive learning of sentences."""

    name: str = "contrastive_sentences"
    temperature: float = 0.05  # similarities are divided by it
    projection_dim: int = 128  # width of the projection head's output


def contrastive_loss(apply: Apply, cfg: Config, tokenizer: Any) -> LossFn:
    """Contrastive loss between the views of a row, with other rows as negatives: SimCLR for images, SimCSE for text.

    A single text, [B, 1, L], is encoded under two dropout masks. Evaluation has no dropout, so that the two views are
    equal and only `uniformity` is informative.
    """
    del tokenizer

    def loss_fn(params: Params, batch: Batch, rng: jax.Array | None) -> LossTerms:
        weights_B, is_image = batch["row_weights"], "images" in batch
        views = batch["images" if is_image else "tokens"].shape[1]
        if views == 1:
            arrays = cast(dict[str, jax.Array], batch)
            twice = {key: jnp.repeat(x, 2, axis=1) if x.ndim > 1 else x for key, x in arrays.items()}
            batch, views = cast(Batch, twice), 2
        z_RxP = apply(params, views_as_rows(batch, views), rng=rng).head
        z_BxnxP = z_RxP.reshape(-1, views, z_RxP.shape[-1])
        terms = contrastive_losses.info_nce(z_BxnxP, weights_B, temperature=cfg.task.temperature, symmetric=is_image)
        return terms._replace(outputs={"first": z_BxnxP[:, 0], "second": z_BxnxP[:, 1]})

    return loss_fn


def view_scores(outputs: Outputs, meta: list[Any], cfg: Config) -> dict[str, float]:
    """Alignment and uniformity of the two views of each row (Wang and Isola 2020)."""
    del meta, cfg
    return scores.views(outputs["first"], outputs["second"])


def view_score_names(cfg: Config) -> tuple[str, ...]:
    """The names of `view_scores`."""
    return ("alignment", "uniformity")


def embedding_outputs(apply: Apply, cfg: Config, tokenizer: Any) -> Callable[[Params, Batch], dict[str, jax.Array]]:
    """'embedding', float32 [B, D]: the last hidden states, pooled as `model.pool` says.

    The projection head is left out: it is for training only (Chen et al. 2020, section 4.2).
    """
    del tokenizer

    def outputs(params: Params, batch: Batch) -> dict[str, jax.Array]:
        hidden_BxLxD = apply(params, batch).hidden_BxLxD.astype(jnp.float32)
        segments_BxL = batch["segment_ids"] if "tokens" in batch else jnp.ones(hidden_BxLxD.shape[:2], jnp.int32)
        return {"embedding": heads.pool(hidden_BxLxD, segments_BxL, cfg.model.pool)}

    return outputs


def embedding(outputs: Outputs, meta: list[Any], record: Record, cfg: Config, tokenizer: Any) -> dict[str, Any]:
    """The vector of a record."""
    del meta, record, cfg, tokenizer
    return {"prediction": [float(value) for value in outputs["embedding"][0]]}


def one_sentence(record: Record, tokenizer: Tokenizer, cfg: Config, counts: Counter[str]) -> list[Example]:
    """[CLS] text [SEP], which is embedded."""
    return [Example({"tokens": encode_pair(record["text"], None, tokenizer, cfg.data.seq_len, counts)["tokens"]})]


def one_sentence_columns(cfg: Config) -> Columns:
    """Columns of `one_sentence`."""
    return sequence_columns(("tokens",), cfg.data.seq_len)


def projection_head(cfg: Config) -> Head:
    """The projection head, an MLP that is used only for training."""
    return Head("projection", cfg.task.projection_dim)


def check_contrast(cfg: Config) -> None:
    """Raises ConfigError for a temperature or a projection width that is too small."""
    if cfg.task.temperature <= 0:
        raise ConfigError(f"'task.temperature' must be greater than 0, got {cfg.task.temperature}")
    if cfg.task.projection_dim < 1:
        raise ConfigError(f"'task.projection_dim' must be at least 1, got {cfg.task.projection_dim}")


def _views(name: str, fields: tuple[str, ...]) -> Task:
    """A contrastive task on the sentences of a record, [n, L]: anchor, positive, hard negative."""

    def make(record: Record, tokenizer: Tokenizer, cfg: Config, counts: Counter[str]) -> list[Example]:
        rows = [encode_pair(record[field], None, tokenizer, cfg.data.seq_len, counts)["tokens"] for field in fields]
        length = max(map(len, rows))
        tokens = np.stack([np.pad(row, (0, length - len(row))) for row in rows])
        real = np.stack([np.arange(length) < len(row) for row in rows])
        return [
            Example(
                {
                    "tokens": tokens,
                    "segment_ids": real.astype(np.int32),
                    "positions": (np.arange(length) * real).astype(np.int32),
                }
            )
        ]

    def columns(cfg: Config) -> Columns:
        if len(fields) == 1 and not cfg.model.dropout:
            raise ConfigError(f"task.name={cfg.task.name} compares two dropout masks, but 'model.dropout' is 0")
        shape = (len(fields), cfg.data.seq_len)
        return {name: (shape, np.int32) for name in ("tokens", "segment_ids", "positions")}

    def lacks(rows: Rows, cfg: Config) -> str:
        tokens_RxnxL = rows["tokens"]
        if (tokens_RxnxL[:, 0] == tokens_RxnxL[:1, 0]).all():
            return "all rows have the same sentence, so that there is nothing to tell it from; expected two or more"
        if len(fields) > 1 and (tokens_RxnxL[:, 0] == tokens_RxnxL[:, 1]).all():
            return "'text' and 'text_pair' are equal in every row; expected two different sentences"
        return ""

    return Task(
        name=name,
        models=TEXT_MODELS,
        fields=fields,
        examples=make,
        columns=columns,
        texts=field_texts(*fields),
        loss=contrastive_loss,
        loss_unit="nats per example",
        legend="The model learns which views belong together.",
        options=ContrastiveOptions,
        least_len=LEAST_LEN,
        check=check_contrast,
        lacks=lacks,
        head=projection_head,
        scores=view_scores,
        score_names=view_score_names,
        predictor=Predictor(fields[1:], one_sentence, one_sentence_columns, embedding_outputs, embedding),
        couples_rows=True,
    )


# An anchor is compared with itself under another dropout mask; with its pair; with its pair and a hard negative.
CONTRASTIVE_SENTENCES = _views("contrastive_sentences", ("text",))
CONTRASTIVE_PAIRS = _views("contrastive_pairs", ("text", "text_pair"))
CONTRASTIVE_TRIPLES = _views("contrastive_triples", ("text", "text_pair", "negative"))
