"""Encoder-decoder tasks: translation, and span corruption (T5, Raffel et al. 2020)."""

import dataclasses
from collections import Counter
from typing import Any, Literal, NamedTuple

import numpy as np

from lm.config import Config, schema
from lm.config.schema import ConfigError
from lm.data.example import Columns, Example, Row
from lm.data.record import Record
from lm.data.tokenizer import Tokenizer
from lm.tasks.base import (
    TOKEN_LOSS,
    Task,
    check_mask_rate,
    field_texts,
    sequence_columns,
    shifted,
    trains_tokenizer,
    whole_row,
)
from lm.tasks.language_modelling import next_token_loss


@dataclasses.dataclass(frozen=True)
class TranslationOptions:
    """Options of translation."""

    name: str = "translation"
    # The tokenizer of sacrebleu in tools/translate.py; auto = by target language (the suffix of the reference file).
    bleu_tokenizer: Literal[
        Literal["auto", "13a", "zh", "ja-mecab", "ko-mecab", "flores101", "flores200", "spBLEU-1K"],
        Literal["intl", "char", "none"],
    ] = schema.scoring_only("auto")


@dataclasses.dataclass(frozen=True)
class SpanCorruptionOptions:
    """Options of span corruption; T5's names for them are noise_density and mean_noise_span_length."""

    name: str = "span_corruption"
    mask_rate: float = 0.15  # share of the tokens that are hidden
    mean_span_length: float = 3.0  # of the hidden spans, in tokens


def target_len(cfg: Config) -> int:
    """Length of the decoder's rows."""
    return cfg.data.target_len or cfg.data.seq_len


def columns(cfg: Config) -> Columns:
    """Columns of the encoder, of data.seq_len positions, and of the decoder, of data.target_len."""
    names = ("inputs", "input_segment_ids", "input_positions")
    decoder = sequence_columns(("tokens", "targets", "loss_weights"), target_len(cfg))
    return decoder | {name: ((cfg.data.seq_len,), np.int32) for name in names}


def source_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """The encoder's input for a text: its ids and EOS."""
    return [*tokenizer.encode(text), tokenizer.eos_id]


def translation(record: Record, tokenizer: Tokenizer, cfg: Config, counts: Counter[str]) -> list[Example]:
    """A text and its translation; all target tokens are trained on. Worked, text ids a b and translation ids x y:

        inputs   a b EOS
        tokens   BOS x y
        targets  x y EOS

    Longer than its row: cut at the end, before EOS (counted as source_cut, target_cut), or with data.overlong=drop the
    pair is dropped (counted as dropped_overlong).
    """
    inputs = source_ids(record["text"], tokenizer)
    target = source_ids(record["target"], tokenizer)
    cut = {"source_cut": len(inputs) > cfg.data.seq_len, "target_cut": len(target) > target_len(cfg)}
    if any(cut.values()) and cfg.data.overlong == "drop":
        counts["dropped_overlong"] += 1
        return []
    counts.update(name for name, is_cut in cut.items() if is_cut)
    inputs = [*inputs[: min(len(inputs), cfg.data.seq_len) - 1], tokenizer.eos_id]
    target = [*target[: min(len(target), target_len(cfg)) - 1], tokenizer.eos_id]
    encoder = {
        "inputs": np.array(inputs, np.int32),
        "input_segment_ids": np.ones(len(inputs), np.int32),
        "input_positions": np.arange(len(inputs), dtype=np.int32),
    }
    return [Example(encoder | shifted([tokenizer.bos_id, *target], [True] * (1 + len(target))))]


# Span corruption ----------------------------------------------------------------------------------------------------


class SpanSizes(NamedTuple):
    """For a row: the numbers of hidden tokens and of spans, and the lengths of the inputs and targets made from it."""

    hidden: int
    spans: int
    inputs: int
    targets: int


def span_sizes(n: int, cfg: Config) -> SpanSizes:
    """Sizes for a row of n tokens: round(mask_rate * n) hidden tokens, at least one and never all, in
    round(hidden / mean_span_length) spans, at least one.

    The lengths include EOS. In a row of fewer than two tokens nothing is hidden.
    """
    hidden = min(max(round(n * cfg.task.mask_rate), 1), n - 1) if n > 1 else 0
    spans = min(max(round(hidden / cfg.task.mean_span_length), 1), hidden, n - hidden)
    return SpanSizes(hidden, spans, n - hidden + spans + 1, hidden + spans + 1)


def raw_len(cfg: Config) -> int:
    """Length of a row before spans are hidden: the inputs made from it then fill data.seq_len positions.

    Raises:
      ConfigError: `data.seq_len` has no room for two tokens.
    """
    n = 2
    if span_sizes(n, cfg).inputs > cfg.data.seq_len:
        raise ConfigError(f"'data.seq_len' ({cfg.data.seq_len}) must be at least 3 for task.name=span_corruption")
    while span_sizes(n + 1, cfg).inputs <= cfg.data.seq_len:
        n += 1
    return n


def raw_text(record: Record, tokenizer: Tokenizer, cfg: Config, counts: Counter[str]) -> list[Example]:
    """The text and EOS, in which `span_corruption` hides spans; split into pieces if longer than a row."""
    ids = tokenizer.encode(record["text"])
    if not ids:
        counts["dropped_empty"] += 1
        return []
    tokens, limit = np.array([*ids, tokenizer.eos_id], np.int32), raw_len(cfg)
    if len(tokens) <= limit or cfg.data.packing == "concat":
        return [Example({"tokens": tokens})]
    counts["cut_in_pieces"] += 1
    return [Example({"tokens": tokens[start : start + limit]}) for start in range(0, len(tokens), limit)]


def span_corruption(row: Row, rng: np.random.Generator, tokenizer: Any, cfg: Config) -> Row:
    """Replaces spans of a row by sentinels; the decoder predicts the spans (T5, Raffel et al. 2020, 3.1.4).

    The lengths of the spans, and of the kept parts before, between and after them, are random compositions, as in T5's
    `random_spans_noise_mask`. There the last span always ends the row, so that a row with one span would hide the same
    tokens each time; here the parts before the first and after the last span may be empty. The row is one sequence:
    documents packed in it see each other. Worked, <0> <1> the sentinels:

        row      thank you for inviting me to your party last week
        inputs   thank you <0> me to your party <1> week EOS
        targets  <0> for inviting <1> last EOS
        tokens   BOS <0> for inviting <1> last

    Args:
      row: tokens and segment_ids (0 = padding), int [n], n at most `raw_len(cfg)`.
      rng: generator of this row.
      tokenizer: its `sentinel_ids`, `bos_id` and `eos_id`.
      cfg: `task` and `data`, as checked by `_check`.

    Returns:
      The row with inputs, input_segment_ids, input_positions int32 [seq_len]; tokens, targets, segment_ids, positions
      int32 [target_len]; loss_weights float32 [target_len], 0 on padding, and everywhere if nothing is hidden.
    """
    tokens = row["tokens"][row["segment_ids"] > 0].astype(np.int32)
    sizes = span_sizes(len(tokens), cfg)
    inputs: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    kept_lengths = _composition(len(tokens) - sizes.hidden + 2, sizes.spans + 1, rng)
    kept_lengths[0] -= 1  # the first part, and the last, which is the rest, may be empty
    hidden_lengths = _composition(sizes.hidden, sizes.spans, rng)
    at = 0
    for number, (kept, hidden) in enumerate(zip(kept_lengths, hidden_lengths, strict=False)):
        sentinel = tokenizer.sentinel_ids[number : number + 1]
        inputs += [tokens[at : at + kept], sentinel]
        targets += [sentinel, tokens[at + kept : at + kept + hidden]]
        at += kept + hidden
    end = [tokenizer.eos_id]
    target_ids = np.concatenate([*targets, end])
    encoder = whole_row("inputs", np.concatenate([*inputs, tokens[at:], end]), cfg.data.seq_len, "input_")
    decoder = whole_row("tokens", np.concatenate([[tokenizer.bos_id], target_ids[:-1]]), target_len(cfg))
    room = target_len(cfg) - len(target_ids)
    weight = 1.0 if sizes.spans else 0.0
    return (
        row
        | encoder
        | decoder
        | {
            "targets": np.pad(target_ids, (0, room)).astype(np.int32),
            "loss_weights": np.pad(np.full(len(target_ids), weight, np.float32), (0, room)),
        }
    )


def _composition(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """A random composition of `total` into `parts` lengths of at least 1, each equally likely; empty for 0 parts."""
    if not parts:
        return np.zeros(0, int)
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=total)


def _check_span_corruption(cfg: Config) -> None:
    check_mask_rate(cfg)
    seq_len = cfg.data.seq_len
    if cfg.task.mean_span_length < 1:
        raise ConfigError(f"'task.mean_span_length' must be at least 1, got {cfg.task.mean_span_length}")
    sizes = span_sizes(raw_len(cfg), cfg)
    if trains_tokenizer(cfg):
        _check_sentinels(cfg.tokenizer.extra_ids - 1, 1, cfg)
    if target_len(cfg) < sizes.targets:
        raise ConfigError(
            f"'data.target_len' is {target_len(cfg)}, but the hidden spans of rows of data.seq_len={seq_len} take "
            f"up to {sizes.targets} positions: set it to at least {sizes.targets}"
        )


def _check_translation(cfg: Config) -> None:
    if cfg.data.target_len == 1:
        raise ConfigError("'data.target_len' is 1: rows would hold no text; expected at least 2")


def _check_sentinels(number: int, masks: int, cfg: Config) -> None:
    """Raises ConfigError if there are too few sentinels; `masks`: how many of `tokenizer.extra_ids` are the mask."""
    sizes, extra = span_sizes(raw_len(cfg), cfg), cfg.tokenizer.extra_ids
    if number < sizes.spans:
        raise ConfigError(
            f"'tokenizer.extra_ids' is {extra}, but rows of data.seq_len={cfg.data.seq_len} have up to {sizes.spans} "
            f"hidden spans: it must be at least {sizes.spans + masks}, a sentinel for each{' and the mask' * masks}"
        )


def _check_tokenizer(cfg: Config, tokenizer: Tokenizer) -> None:
    """Raises ConfigError if the tokenizer has too few sentinels."""
    number, extra = len(tokenizer.sentinel_ids), range(tokenizer.vocab_size - tokenizer.extra_ids, tokenizer.vocab_size)
    if not number or tokenizer.sentinel_ids[0] in extra:
        has_own_mask = tokenizer.has_mask and tokenizer.mask_id not in extra
        _check_sentinels(number, 1 - has_own_mask, cfg)
    elif number < (spans := span_sizes(raw_len(cfg), cfg).spans):
        raise ConfigError(
            f"rows of data.seq_len={cfg.data.seq_len} have up to {spans} hidden spans, but the tokenizer has {number} "
            "sentinels, to which 'tokenizer.extra_ids' adds none: lower 'data.seq_len' or 'task.mask_rate', or raise "
            "'task.mean_span_length'"
        )


TRANSLATION = Task(
    name="translation",
    models=("encoder_decoder",),
    fields=("text", "target"),
    examples=translation,
    columns=columns,
    texts=field_texts("text", "target"),
    loss=next_token_loss,
    loss_unit="nats per token",
    balances_experts=True,
    options=TranslationOptions,
    check=_check_translation,
    overlong=("truncate", "drop"),
    loss_options=TOKEN_LOSS,
    has_perplexity=True,
    prompt=source_ids,
    answers_with_text="target",
)
SPAN_CORRUPTION = Task(
    name="span_corruption",
    models=("encoder_decoder",),
    fields=("text",),
    examples=raw_text,
    columns=lambda cfg: sequence_columns(("tokens",), raw_len(cfg)),
    texts=field_texts("text"),
    loss=next_token_loss,
    loss_unit="nats per token",
    balances_experts=True,
    options=SpanCorruptionOptions,
    check=_check_span_corruption,
    check_tokenizer=_check_tokenizer,
    packing=("pad", "concat"),
    transform=span_corruption,
    batch_columns=columns,
    loss_options=TOKEN_LOSS,
    has_perplexity=True,
    prompt=source_ids,
    generates=("sentinels",),
)
