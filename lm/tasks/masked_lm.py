"""Masked language modelling (BERT, Devlin et al. 2019), on texts or on sentence pairs with a label to predict."""

import dataclasses
import functools
import re
from collections import Counter
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from lm import losses
from lm.config import Config
from lm.data import splits
from lm.data.example import Columns, Example, Row, Rows
from lm.data.record import Record
from lm.data.tokenizer import Tokenizer
from lm.tasks.base import (
    TOKEN_LOSS,
    Task,
    check_mask_token,
    field_texts,
    has_mask_token,
    holds_pair,
    sequence_columns,
    shifted_columns,
    whole_row,
)
from lm.tasks.language_modelling import predict_tokens, unshifted_documents
from lm.types import Apply, Batch, Head, LossFn, LossTerms, Params

_SPACE = "\u2581"  # how SentencePiece writes a space
_MASKED, _REPLACED = 0.8, 0.1  # shares of the chosen tokens; the rest stay (Devlin et al. 2019, section 3.1)
_LONG_WORD = 8  # in pieces: a word of at most this many is hidden whole, however short the row
_LEAST_PAIR = 5  # [CLS] A [SEP] B [SEP]
_BETWEEN_SENTENCES = re.compile(r"(?<=[.!?])(?=\s)|(?<=\n)(?=[^\n])")  # keeps all text: white space begins the next


@dataclasses.dataclass(frozen=True)
class MaskedLmOptions:
    """Options of masked language modelling."""

    name: str = "masked_lm"
    mask_rate: float = 0.15  # share of the tokens that are predicted
    whole_words: bool = False  # choose all pieces of a word or none


@dataclasses.dataclass(frozen=True)
class MaskedPairsOptions:
    """Options of masked language modelling on sentence pairs."""

    name: str = "masked_lm_pairs"
    mask_rate: float = 0.15
    whole_words: bool = False
    pairs: Literal["next", "order"] = "next"  # does B follow A (BERT); are A and B swapped (ALBERT)


def mask_tokens(row: Row, rng: np.random.Generator, tokenizer: Any, cfg: Config) -> Row:
    """Chooses tokens to predict, and masks most of them (BERT, Devlin et al. 2019).

    Chooses round(task.mask_rate * n) of the n tokens that are neither padding nor control symbols, at least one if
    n > 0. 80 % of the chosen become the mask, 10 % a random id that is not a control symbol, and 10 % stay. With
    task.whole_words, words are drawn in random order while the whole word fits that number, at least one word (only
    its first pieces if it is longer than `most_predicted`); each of its pieces is then masked independently.

    Worked, _ the mask, sixth token chosen and kept, eighth replaced:

        tokens        [CLS] the _  sat on the _  zoo [SEP]
        targets       [CLS] the cat sat on the mat .  [SEP]
        loss_weights    0    0   1   0  0   1   1  1    0

    Args:
      row: tokens and segment_ids, int [L].
      rng: generator of this row.
      tokenizer: its `mask_id`, `is_control_V`, `vocab_size` and `piece`.
      cfg: `task.mask_rate` and `task.whole_words`.

    Returns:
      The row with tokens and targets int32 [L], loss_weights float32 [L].
    """
    table = _vocabulary(tokenizer)
    tokens_L, segments_L = row["tokens"].astype(np.int32), row["segment_ids"]
    at_M = np.flatnonzero((segments_L > 0) & ~table.is_special[tokens_L])  # candidates
    word_M = np.arange(len(at_M))
    if cfg.task.whole_words and len(at_M):
        word_M = np.cumsum(_starts_word(tokens_L, segments_L, table)[at_M])
        word_M -= word_M[0]
    budget = max(1, round(cfg.task.mask_rate * len(at_M)))
    order_W = rng.permutation(word_M[-1] + 1 if len(at_M) else 0)
    size_W = np.bincount(word_M, minlength=len(order_W))
    fits_W = np.cumsum(size_W[order_W]) <= budget
    fits_W[:1] = True
    chosen = at_M[np.isin(word_M, order_W[fits_W])][: _most(cfg, len(tokens_L))]
    fate = rng.random(len(chosen))
    random_ids = rng.choice(table.ordinary_ids, len(chosen))
    hidden_L = tokens_L.copy()
    hidden_L[chosen] = np.select(
        [fate < _MASKED, fate < _MASKED + _REPLACED], [np.int32(tokenizer.mask_id), random_ids], tokens_L[chosen]
    )
    weights_L = np.zeros(len(tokens_L), np.float32)
    weights_L[chosen] = 1.0
    return row | {"tokens": hidden_L, "targets": tokens_L, "loss_weights": weights_L}


def most_predicted(cfg: Config) -> int:
    """The largest number of positions of a row that have a weight."""
    return _most(cfg, cfg.data.seq_len)


def _most(cfg: Config, row_len: int) -> int:
    return max(round(cfg.task.mask_rate * row_len), _LONG_WORD)


class _Vocabulary(NamedTuple):
    """Properties of each id, bool [V], and `ordinary_ids`, int32: all ids that are not control symbols."""

    is_special: np.ndarray
    is_space: np.ndarray
    starts_word: np.ndarray
    ordinary_ids: np.ndarray


@functools.lru_cache(maxsize=4)
def _vocabulary(tokenizer: Any) -> _Vocabulary:
    is_special = tokenizer.is_control_V
    pieces = [tokenizer.piece(i) for i in range(tokenizer.vocab_size)]
    white_bytes = {f"<0x{byte:02X}>" for byte in b" \t\n\v\f\r"}
    is_space = np.array([piece in white_bytes or not piece.replace(_SPACE, " ").strip() for piece in pieces])
    starts_word = is_space | np.array([piece.startswith(_SPACE) for piece in pieces])
    return _Vocabulary(is_special, is_space, starts_word, np.flatnonzero(~is_special).astype(np.int32))


def _starts_word(tokens_L: np.ndarray, segments_L: np.ndarray, table: _Vocabulary) -> np.ndarray:
    """bool [L]: whether a piece begins with a space, or follows white space, a special token or another document."""
    starts_L = table.starts_word[tokens_L]
    starts_L[0] = True
    starts_L[1:] |= (table.is_space | table.is_special)[tokens_L[:-1]] | (segments_L[1:] != segments_L[:-1])
    return starts_L


def masked_token_loss(apply: Apply, cfg: Config, tokenizer: Tokenizer) -> LossFn:
    """Cross-entropy of the chosen tokens (Devlin et al. 2019, section 3.1).

    Metrics:
      nll: nats per predicted token.
      accuracy: of the most likely token.
    """

    def loss_fn(params: Params, batch: Batch, rng: jax.Array | None) -> LossTerms:
        out = apply(params, batch, rng=rng)
        return predict_tokens(out, batch, cfg, tokenizer, most_predicted(cfg))

    return loss_fn


def masked_pair_loss(apply: Apply, cfg: Config, tokenizer: Tokenizer) -> LossFn:
    """Cross-entropy of the chosen tokens plus that of the pair's label.

    The label's loss is weighted by the number of predicted tokens in its row, so that the two means add up as in BERT
    and the loss of a batch is still the sum over its micro-batches.

    Metrics:
      nll, accuracy: as in `masked_token_loss`.
      pair_accuracy: of the labels of pairs.
    """

    def loss_fn(params: Params, batch: Batch, rng: jax.Array | None) -> LossTerms:
        out = apply(params, batch, rng=rng)
        terms = predict_tokens(out, batch, cfg, tokenizer, most_predicted(cfg))
        pairs = losses.class_cross_entropy(out.head, batch["labels"], batch["loss_weights"].sum(axis=1))
        right_B = (pairs.outputs["prediction"] == batch["labels"]) * batch["row_weights"]
        named = terms.metrics | {"pair_accuracy": (right_B.sum(), batch["row_weights"].sum())}
        return terms._replace(sum=terms.sum + pairs.sum, metrics=named)

    return loss_fn


# Pairs ----------------------------------------------------------------------------------------------------------------


def neighbours(record: Record, tokenizer: Tokenizer, cfg: Config, counts: Counter[str]) -> list[Example]:
    """Consecutive sentences that fit a row with its marks (see `_room`), split where A and B are closest in length.

    A sentence ends at . ! ? before white space, or at a new line. The end of one longer than a row is cut (counted as
    sentence_cut); one that fits no row with a neighbour is dropped (dropped_single).


    Returns:
      Columns tokens, A then B; type_ids, 0 in A and 1 in B; document, a hash of the content, so that equal texts are
      one document.
    """
    holds_pair(cfg, tokenizer)
    room = _room(tokenizer, cfg)
    document = np.array(int.from_bytes(splits.digest(record)[:4]) & 0x7FFFFFFF, np.int32)
    groups: list[list[list[int]]] = [[]]
    for sentence in _BETWEEN_SENTENCES.split(record["text"]):
        # Each begins with white space; otherwise the first sentence of a document could be recognised by its lack.
        ids = tokenizer.encode(sentence if sentence[:1].isspace() else f" {sentence}")
        if len(ids) > room:
            counts["sentence_cut"] += 1
        if sum(map(len, groups[-1])) + len(ids) > room:
            groups.append([])
        groups[-1].append(ids[:room])
    made = []
    for group in groups:
        ends = np.cumsum([len(ids) for ids in group])
        if len(group) < 2:
            counts["dropped_single"] += len(group)
            continue
        middle = int(ends[np.argmin(np.abs(2 * ends[:-1] - ends[-1]))])
        tokens = np.array([token for ids in group for token in ids], np.int32)
        types = (np.arange(len(tokens)) >= middle).astype(np.int32)
        made.append(Example({"tokens": tokens, "type_ids": types, "document": document}))
    return made


def pair_sentences(row: Row, rng: np.random.Generator, tokenizer: Any, cfg: Config) -> Row:
    """Makes [CLS] A [SEP] B [SEP] of two segments of a document, corrupted with probability 1/2 as the label says.

    Between A and B is the tokenizer's separator: one [SEP], of a RoBERTa two.

    task.pairs=next (BERT's next sentence prediction): a corrupted pair takes its B from another document.
    task.pairs=order (ALBERT, Lan et al. 2020): A and B are swapped. The longer one is cut at its end to fit.

    Args:
      row: tokens int [L], A then B; type_ids [L], 0 in A and 1 in B; segment_ids [L], 0 = padding; document [], its
        hash. With pairs=next also the same columns of a random row, named 'other_...'; if that row is of the same
        document, the pair is left as it is.
      rng: generator of this row.
      tokenizer: its `bos_id` ([CLS]), `separator_ids` (between A and B) and `eos_id` ([SEP]).
      cfg: `task.pairs` and `data.seq_len`.

    Returns:
      tokens, segment_ids, positions and type_ids int32 [seq_len]; labels int32 []: 0 = unchanged, 1 = corrupted.
      No other column passes through.
    """
    first, second = _stretches(row, "")
    spoilt = bool(rng.random() < 0.5)
    if cfg.task.pairs == "order" and spoilt:
        first, second = second, first
    elif spoilt:
        spoilt = bool(row["document"] != row["other_document"])
        second = _stretches(row, "other_")[1] if spoilt else second
    room = _room(tokenizer, cfg)
    first, second = (
        first[: max(room - len(second), (room + 1) // 2)],
        second[: max(room - len(first), room // 2)],
    )
    separator = tokenizer.separator_ids
    ids = np.concatenate([[tokenizer.bos_id], first, separator, second, [tokenizer.eos_id]])
    types = np.repeat([0, 1], [1 + len(first) + len(separator), len(second) + 1])
    return whole_row("tokens", ids, cfg.data.seq_len) | {
        "type_ids": np.pad(types, (0, cfg.data.seq_len - len(ids))).astype(np.int32),
        "labels": np.array(spoilt, np.int32),
    }


def masked_pairs(row: Row, rng: np.random.Generator, tokenizer: Any, cfg: Config) -> Row:
    """`pair_sentences`, then `mask_tokens`."""
    return mask_tokens(pair_sentences(row, rng, tokenizer, cfg), rng, tokenizer, cfg)


def _room(tokenizer: Any, cfg: Config) -> int:
    """Ids of a pair that a row holds beside [CLS], the tokenizer's separator and [SEP]."""
    return int(cfg.data.seq_len) - 2 - len(tokenizer.separator_ids)


def _stretches(row: Row, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    is_token, type_ids = row[f"{prefix}segment_ids"] > 0, row[f"{prefix}type_ids"]
    tokens = row[f"{prefix}tokens"].astype(np.int32)
    return tokens[is_token & (type_ids == 0)], tokens[is_token & (type_ids == 1)]


def _pair_columns(cfg: Config) -> Columns:
    return sequence_columns(("tokens", "type_ids"), cfg.data.seq_len) | {"document": ((), np.int32)}


def _pair_batch_columns(cfg: Config) -> Columns:
    return shifted_columns(cfg) | {"type_ids": ((cfg.data.seq_len,), np.int32), "labels": ((), np.int32)}


def _one_document(rows: Rows, cfg: Config) -> str:
    if cfg.task.pairs == "next" and len(np.unique(rows["document"])) < 2:
        return "all rows are of one document, so that no pair can take its B from another one; expected two or more"
    return ""


def _columns(cfg: Config) -> Columns:
    return sequence_columns(("tokens",), cfg.data.seq_len)


def _check_pair_tokenizer(cfg: Config, tokenizer: Any) -> None:
    has_mask_token(cfg, tokenizer)
    holds_pair(cfg, tokenizer)


MASKED_LM = Task(
    name="masked_lm",
    models=("encoder",),
    fields=("text",),
    examples=unshifted_documents,
    columns=_columns,
    texts=field_texts("text"),
    loss=masked_token_loss,
    loss_unit="nats per hidden token",
    balances_experts=True,
    legend="A token is trained when the model learns to predict the original token, shown with it.",
    options=MaskedLmOptions,
    least_len=3,
    check=check_mask_token,
    packing=("pad", "best_fit", "concat"),
    transform=mask_tokens,
    check_tokenizer=has_mask_token,
    batch_columns=shifted_columns,
    loss_options=TOKEN_LOSS,
    has_perplexity=True,
)
MASKED_LM_PAIRS = MASKED_LM._replace(
    name="masked_lm_pairs",
    examples=neighbours,
    columns=_pair_columns,
    loss=masked_pair_loss,
    options=MaskedPairsOptions,
    least_len=_LEAST_PAIR,
    check_tokenizer=_check_pair_tokenizer,
    packing=("pad",),
    transform=masked_pairs,
    batch_columns=_pair_batch_columns,
    draws_other=True,
    lacks=_one_document,
    head=lambda cfg: Head("pooled", 2, keeps_unembed=True),
)
