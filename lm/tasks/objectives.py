"""What is learnt: each objective turns a model and a config into one function of (params, batch, rng).

An objective calls `apply` once and functions of `lm.losses`; everything about devices, accumulation and the optimizer
is elsewhere.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm import losses
from lm.config import Config
from lm.data.tokenizer import Tokenizer
from lm.evaluation import metrics
from lm.losses import contrastive as contrast
from lm.losses import ranking
from lm.models import vision
from lm.tasks import corrupt, scoring
from lm.tasks import multitask as mixtures
from lm.tasks import span_qa as data_span_qa
from lm.tasks import tagging as data_tagging
from lm.tasks.registry import TASKS
from lm.types import Batch, Head, LossTerms, ModelOutput, Outputs, Params

Apply = Callable[..., ModelOutput]
LossFn = Callable[[Params, Batch, jax.Array | None], LossTerms]


class Objective(NamedTuple):
    """An objective and what it asks of the rest.

    Attributes:
      loss: (apply, config, tokenizer) -> loss function.
      kinds: values of `model.kind` that fit.
      tasks: values of `data.task` that fit.
      head: config -> the output layer it needs; None = the model predicts tokens.
      score: (outputs, meta of the rows, config) -> metrics of all held-out rows together.
      scores: config -> names of those metrics.
      reads: keys of `LossConfig` that it reads.
      couples_rows: the loss of a row depends on the others, so that a batch cannot be computed in parts.
    """

    loss: Callable[[Apply, Config, Any], LossFn]
    kinds: tuple[str, ...]
    tasks: tuple[str, ...]
    head: Callable[[Config], Head | None] = lambda cfg: None
    score: Callable[[Outputs, list[Any], Config], dict[str, float]] | None = None
    scores: Callable[[Config], tuple[str, ...]] = lambda cfg: ()
    reads: tuple[str, ...] = ()
    couples_rows: bool = False


def clm(apply: Apply, cfg: Config, tokenizer: Tokenizer) -> LossFn:
    """Causal language modelling, supervised fine-tuning on the tokens that `loss_weights` names, and what a decoder
    predicts that has an encoder or a prefix: one function.

    Metrics:
      nll: nats a token, without label smoothing and z-loss.
      accuracy: of the most likely token.
      bits_per_byte: bits to code the trained tokens (ends of documents included) / UTF-8 bytes they stand for.
    """
    bytes_of_id_V = jnp.asarray(tokenizer.token_bytes(), jnp.float32)
    token_loss = mlm(apply, cfg, tokenizer)

    def loss_fn(params: Params, batch: Batch, rng: jax.Array | None) -> LossTerms:
        terms = token_loss(params, batch, rng)
        bytes_BxL = jnp.where(batch["loss_weights"] > 0, bytes_of_id_V[batch["targets"]], 0.0)
        likelihood = metrics.nll_metrics(*terms.metrics["nll"], jnp.sum(bytes_BxL))
        return terms._replace(metrics=terms.metrics | likelihood)

    return loss_fn


def mlm(apply: Apply, cfg: Config, tokenizer: Tokenizer) -> LossFn:
    """Prediction of the tokens that `loss_weights` names: of those that the task has hidden (Devlin et al. 2019).

    Where the task gives pairs with a label, its cross-entropy is added: every predicted token counts the label of its
    row once, so that the two add up as means do in BERT, and a batch is still the sum of its parts.

    Metrics:
      nll: nats a predicted token.
      accuracy: of the most likely token.
      pair_accuracy: of the labels of pairs.
    """

    def loss_fn(params: Params, batch: Batch, rng: jax.Array | None) -> LossTerms:
        out = apply(params, batch, rng=rng)
        terms = _predict_tokens(out, batch, cfg, tokenizer)
        if out.head is None:
            return terms
        pairs = losses.class_cross_entropy(out.head, batch["labels"], batch["loss_weights"].sum(axis=1))
        right_B = (pairs.outputs["prediction"] == batch["labels"]) * batch["row_weights"]
        named = terms.metrics | {"pair_accuracy": (right_B.sum(), batch["row_weights"].sum())}
        return terms._replace(sum=terms.sum + pairs.sum, metrics=named)

    return loss_fn


def _pair_head(cfg: Config) -> Head | None:
    """Tells the labels of pairs, where the task gives them."""
    task = TASKS[cfg.data.task]
    gives_labels = "labels" in (task.batch or task.columns)(cfg)
    return Head("pooled", 2, keeps_unembed=True) if gives_labels else None


def item_ranking(apply: Apply, cfg: Config, vocabulary: Any) -> LossFn:
    """Prediction of items by cross-entropy over all of them; a target that the vocabulary lacks has no loss.

    Outputs:
      rank: place of the target of the row's last prediction among all items, see `ranks.target_rank`. Items of the
        history take part: a user may choose one again.
    """
    is_item_V = jnp.asarray(~vocabulary.is_control_V)

    def loss_fn(params: Params, batch: Batch, rng: jax.Array | None) -> LossTerms:
        out = apply(params, batch, rng=rng)
        targets_BxL, weights_BxL = batch["targets"], batch["loss_weights"]
        known = batch | {"loss_weights": jnp.where(is_item_V[targets_BxL], weights_BxL, 0)}
        terms = _predict_tokens(out, known, cfg, vocabulary)
        softcap = cfg.model.logit_softcap
        rank_B = ranking.target_rank(
            out.hidden_BxLxD, out.unembed_DxV, targets_BxL, weights_BxL, is_item_V, softcap=softcap
        )
        return terms._replace(outputs={"rank": rank_B})

    return loss_fn


def _predict_tokens(out: ModelOutput, batch: Batch, cfg: Config, tokenizer: Tokenizer) -> LossTerms:
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
        most_predicted=corrupt.most_predicted(cfg),
    )
    if out.routing_2xB is None:
        return terms
    routing, uneven = losses.routing(out.routing_2xB, batch["loss_weights"])
    return terms._replace(sum=terms.sum + routing, metrics=terms.metrics | {"balance": (uneven, terms.weight)})


def classification(apply: Apply, cfg: Config, tokenizer: Any) -> LossFn:
    """One of `data.labels` for a row. With `loss.r_drop` each row is seen under two dropout masks while training."""
    del tokenizer

    def loss_fn(params: Params, batch: Batch, rng: jax.Array | None) -> LossTerms:
        twice = rng is not None and cfg.loss.r_drop > 0
        if twice:
            batch = two_views(batch)
        logits_BxC = apply(params, batch, rng=rng).head
        labels_B, weights_B = batch["labels"], batch["row_weights"]
        terms = losses.class_cross_entropy(logits_BxC, labels_B, weights_B, label_smoothing=cfg.loss.label_smoothing)
        if twice:
            divergence = losses.symmetric_divergence(logits_BxC[::2], logits_BxC[1::2], weights_B[::2])
            # Two views of a row weigh 2, so the divergence of the pair counts twice too.
            terms = terms._replace(sum=terms.sum + 2 * cfg.loss.r_drop * divergence)
        return terms._replace(outputs=terms.outputs | {"label": labels_B})

    return loss_fn


def two_views(batch: Batch) -> Batch:
    """Every row twice, side by side, under dropout of their own. [a, b] -> [a, a, b, b]."""
    return views_as_rows({key: jnp.stack([x, x], axis=1) if x.ndim > 1 else x for key, x in batch.items()}, 2)


def views_as_rows(batch: Batch, views: int) -> Batch:
    """Arrays [B, views, ...] as [B * views, ...], a row's views side by side; what it has once, [B], each view gets.

    Example indices are told apart, so that each view has dropout of its own.
    """
    rows = {key: x.reshape(-1, *x.shape[2:]) if x.ndim > 1 else jnp.repeat(x, views) for key, x in batch.items()}
    index_B = rows["example_index"]
    # Bits 29 and 30 do that; indices of more than 2^29 examples may then share dropout, which does no harm.
    view_B = jnp.arange(index_B.shape[0], dtype=jnp.int32) % views
    return rows | {"example_index": index_B ^ (view_B << 29)}


def regression(apply: Apply, cfg: Config, tokenizer: Any) -> LossFn:
    """A number for a row, by squared error."""
    del cfg, tokenizer

    def loss_fn(params: Params, batch: Batch, rng: jax.Array | None) -> LossTerms:
        head_Bx1 = apply(params, batch, rng=rng).head
        terms = losses.squared_error(head_Bx1[:, 0], batch["labels"], batch["row_weights"])
        return terms._replace(outputs=terms.outputs | {"label": batch["labels"]})

    return loss_fn


def multitask(apply: Apply, cfg: Config, tokenizer: Any) -> LossFn:
    """Classes or numbers of several tasks, each by its own columns of the head (MT-DNN, Liu et al. 2019).

    The loss is summed over the rows of a batch, whichever tasks they are of, each by its task's loss.

    Metrics:
      TASK_loss, and TASK_accuracy where it has classes: over the rows of that task.
    """
    del tokenizer
    known = mixtures.parts(cfg.data.labels)

    def loss_fn(params: Params, batch: Batch, rng: jax.Array | None) -> LossTerms:
        logits_BxC = apply(params, batch, rng=rng).head
        labels_B, part_B, weights_B = batch["labels"], batch["part"], batch["row_weights"]
        total, found, said_B = jnp.zeros(()), {}, jnp.zeros_like(labels_B)
        for i, part in enumerate(known):
            own_B = jnp.where(part_B == i, weights_B, 0)
            if part.classes:
                columns = slice(part.first, part.first + len(part.classes))
                classes_B, smoothing = labels_B.astype(jnp.int32), cfg.loss.label_smoothing
                terms = losses.class_cross_entropy(logits_BxC[:, columns], classes_B, own_B, label_smoothing=smoothing)
                found[f"{part.name}_accuracy"] = terms.metrics["accuracy"]
            else:
                terms = losses.squared_error(logits_BxC[:, part.first], labels_B, own_B)
            found[f"{part.name}_loss"] = (terms.sum, terms.weight)
            total += terms.sum
            said_B = jnp.where(part_B == i, terms.outputs["prediction"].astype(jnp.float32), said_B)
        outputs = {"prediction": said_B, "label": labels_B, "part": part_B}
        return LossTerms(total, weights_B.sum(), found, outputs)

    return loss_fn


def verbalizer(apply: Apply, cfg: Config, tokenizer: Tokenizer) -> LossFn:
    """Which of the words for `data.labels` goes on with a prompt: a softmax over their likelihoods, each the product of
    its tokens' (Schick and Schütze 2021, section 3.1). Only those tokens count for the loss."""

    def loss_fn(params: Params, batch: Batch, rng: jax.Array | None) -> LossTerms:
        labels_B, classes = batch["labels"], batch["tokens"].shape[1]
        rows = views_as_rows(batch, classes)
        out = apply(params, rows, rng=rng)
        likelihood_R = losses.sequence_log_likelihood(
            out.hidden_BxLxD,
            out.unembed_DxV,
            rows["targets"],
            rows["loss_weights"],
            vocab_size=tokenizer.vocab_size,
            softcap=cfg.model.logit_softcap,
            chunk_len=cfg.loss.chunk_len,
        )
        terms = losses.class_cross_entropy(
            likelihood_R.reshape(-1, classes), labels_B, batch["row_weights"], label_smoothing=cfg.loss.label_smoothing
        )
        return terms._replace(outputs=terms.outputs | {"label": labels_B})

    return loss_fn


def tagging(apply: Apply, cfg: Config, tokenizer: Any) -> LossFn:
    """One of `data.labels` for each position that has one: for each word, where it begins."""
    del tokenizer

    def loss_fn(params: Params, batch: Batch, rng: jax.Array | None) -> LossTerms:
        logits_BxLxC = apply(params, batch, rng=rng).head
        labels_BxL = batch["labels"]
        is_word_BxL = (labels_BxL >= 0) & (batch["segment_ids"] > 0)
        weights_BxL = jnp.where(is_word_BxL, batch["row_weights"][:, None], 0.0)
        smoothing = cfg.loss.label_smoothing
        terms = losses.class_cross_entropy(logits_BxLxC, labels_BxL, weights_BxL, label_smoothing=smoothing)
        return terms._replace(outputs=terms.outputs | {"label": labels_BxL})

    return loss_fn


def span_qa(apply: Apply, cfg: Config, tokenizer: Tokenizer) -> LossFn:
    """Where the answer to a question begins and ends in a context, or [CLS] for both where this window has none."""
    del cfg

    def loss_fn(params: Params, batch: Batch, rng: jax.Array | None) -> LossTerms:
        logits_BxLx2 = apply(params, batch, rng=rng).head
        is_context_BxL = (batch["type_ids"] == 1) & (batch["tokens"] != tokenizer.eos_id)
        is_first_BxL = jax.lax.broadcasted_iota(jnp.int32, is_context_BxL.shape, 1) == 0
        return losses.span_cross_entropy(
            logits_BxLx2, batch["labels"], is_context_BxL | is_first_BxL, batch["row_weights"]
        )

    return loss_fn


def mae(apply: Apply, cfg: Config, tokenizer: Any) -> LossFn:
    """The pixels of hidden patches from the visible ones (He et al. 2021)."""
    del tokenizer

    def loss_fn(params: Params, batch: Batch, rng: jax.Array | None) -> LossTerms:
        prediction_BxTxC = apply(params, batch, rng=rng).head
        patches_BxTxC = vision.patchify(vision.normalise(batch["images"]), cfg.model.patch_size)
        return losses.patch_mse(prediction_BxTxC, patches_BxTxC, batch["masked_patches"], batch["row_weights"])

    return loss_fn


def contrastive(apply: Apply, cfg: Config, tokenizer: Any) -> LossFn:
    """Views of the same row alike, those of other rows not: SimCLR for images, SimCSE for text.

    A text alone, [B, 1, L], is seen under two dropout masks; while evaluating there is none, so that its views are the
    same and only `uniformity` tells something.
    """
    del tokenizer

    def loss_fn(params: Params, batch: Batch, rng: jax.Array | None) -> LossTerms:
        weights_B, is_image = batch["row_weights"], "images" in batch
        views = batch["images" if is_image else "tokens"].shape[1]
        if views == 1:
            batch = {key: jnp.repeat(x, 2, axis=1) if x.ndim > 1 else x for key, x in batch.items()}
            views = 2
        z_RxP = apply(params, views_as_rows(batch, views), rng=rng).head
        z_BxnxP = z_RxP.reshape(-1, views, z_RxP.shape[-1])
        terms = contrast.info_nce(z_BxnxP, weights_B, temperature=cfg.loss.temperature, symmetric=is_image)
        return terms._replace(outputs={"first": z_BxnxP[:, 0], "second": z_BxnxP[:, 1]})

    return loss_fn


TEXT_MODELS = ("decoder", "prefix_decoder", "encoder")

# What the cross-entropy of tokens reads of the config.
_TOKENS = ("z_loss", "label_smoothing", "chunk_len")

OBJECTIVES: dict[str, Objective] = {
    "clm": Objective(clm, ("decoder", "prefix_decoder"), ("text", "chat", "prefix_text"), reads=_TOKENS),
    "seq2seq": Objective(clm, ("encoder_decoder",), ("translation", "span_corruption"), reads=_TOKENS),
    "mlm": Objective(mlm, ("encoder",), ("masked_text", "masked_pairs"), head=_pair_head, reads=_TOKENS),
    "next_item": Objective(
        item_ranking, ("decoder",), ("items",), score=scoring.ranks, scores=scoring.rank_names, reads=_TOKENS
    ),
    "masked_item": Objective(
        item_ranking, ("encoder",), ("masked_items",), score=scoring.ranks, scores=scoring.rank_names, reads=_TOKENS
    ),
    "classification": Objective(
        classification,
        (*TEXT_MODELS, "vit"),
        ("sentences", "images"),
        head=lambda cfg: Head("pooled", len(cfg.data.labels)),
        score=scoring.classes,
        scores=scoring.class_names,
        reads=("label_smoothing", "r_drop"),
    ),
    "verbalizer": Objective(
        verbalizer,
        ("decoder",),
        ("prompted",),
        score=scoring.classes,
        scores=scoring.class_names,
        reads=("label_smoothing",),
    ),
    "mae": Objective(mae, ("mae",), ("masked_images",)),
    "contrastive": Objective(
        contrastive,
        (*TEXT_MODELS, "vit"),
        ("lone_sentences", "sentence_pairs", "sentence_triples", "image_pairs"),
        head=lambda cfg: Head("projection", cfg.model.projection_dim),
        score=scoring.views,
        scores=scoring.view_names,
        reads=("temperature",),
        couples_rows=True,
    ),
    "regression": Objective(
        regression,
        TEXT_MODELS,
        ("scored_sentences",),
        head=lambda cfg: Head("pooled", 1),
        score=scoring.numbers,
        scores=scoring.number_names,
    ),
    "multitask": Objective(
        multitask,
        TEXT_MODELS,
        ("mixed_sentences",),
        head=lambda cfg: Head("pooled", sum(len(part.classes) or 1 for part in mixtures.parts(cfg.data.labels))),
        score=scoring.parts,
        scores=scoring.part_names,
        reads=("label_smoothing",),
    ),
    "tagging": Objective(
        tagging,
        ("encoder",),
        ("tagging", "entities"),
        head=lambda cfg: Head("token", len(cfg.data.labels)),
        score=data_tagging.score,
        scores=data_tagging.score_names,
        reads=("label_smoothing",),
    ),
    "span_qa": Objective(
        span_qa,
        ("encoder",),
        ("span_qa",),
        head=lambda cfg: Head("token", 2),
        score=data_span_qa.score,
        scores=data_span_qa.score_names,
    ),
}
