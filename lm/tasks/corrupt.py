"""What self-supervised tasks hide of a row: pure functions of (row, rng), in numpy, one row at a time.

Each takes a stored row, a generator that (seed, split, global example index) decides, the tokenizer and the config, and
returns the row of the batch. Columns that a function neither reads nor makes pass through. `check` refuses beforehand
what could fail on some row.
"""

import functools
from typing import Any, NamedTuple

import numpy as np

from lm.config import Config
from lm.config.schema import ConfigError
from lm.data.example import Row

_SPACE = "\u2581"  # how SentencePiece writes a space
_MASKED, _REPLACED = 0.8, 0.1  # of the chosen tokens; the rest keep theirs (Devlin et al. 2019, section 3.1)
_LONG_WORD = 8  # pieces: one of up to so many is hidden whole, however short the row
PAIR_SPECIALS = 3  # [CLS] A [SEP] B [SEP]


def check(cfg: Config) -> None:
    """Raises ConfigError, naming the key, where `data.task` could not corrupt some row, whatever the data."""
    if cfg.data.task not in ("masked_text", "masked_pairs", "span_corruption", "masked_items"):
        return
    extra, seq_len = cfg.tokenizer.extra_ids, cfg.data.seq_len
    if cfg.corrupt.rate == 0:
        raise ConfigError(f"'corrupt.rate' is 0, but data.task={cfg.data.task} predicts what it hides")
    if extra < 1:
        raise ConfigError(f"'tokenizer.extra_ids' is {extra}, but data.task={cfg.data.task} needs 1, the mask")
    if cfg.data.task == "masked_pairs" and seq_len < PAIR_SPECIALS + 2:
        least = PAIR_SPECIALS + 2
        raise ConfigError(f"'data.seq_len' ({seq_len}) must be at least {least} for data.task=masked_pairs")
    if cfg.data.task == "span_corruption":
        sizes = span_sizes(raw_len(cfg), cfg)
        if extra - 1 < sizes.spans:
            raise ConfigError(
                f"'tokenizer.extra_ids' is {extra}, but rows of data.seq_len={seq_len} have up to {sizes.spans} hidden "
                f"spans: it must be at least {sizes.spans + 1}, a sentinel for each and the mask"
            )
        if target_len(cfg) < sizes.targets:
            raise ConfigError(
                f"'data.target_len' is {target_len(cfg)}, but what is hidden of rows of data.seq_len={seq_len} takes "
                f"up to {sizes.targets} positions: it must be at least that"
            )


# Masked tokens --------------------------------------------------------------------------------------------------------


def mask_tokens(row: Row, rng: np.random.Generator, tokenizer: Any, cfg: Config) -> Row:
    """Chooses tokens to predict, and hides most of them (BERT, Devlin et al. 2019).

    Of n tokens that are neither padding nor control symbols round(corrupt.rate * n) are chosen, at least one if there
    is one. Of the chosen 80 % become the mask, 10 % a random id that is no control symbol, 10 % stay. With
    corrupt.whole_words words are chosen in random order as long as the whole word fits that number, at least one word
    (of one longer than `most_predicted` its first pieces); each of its pieces is then hidden on its own.

    Worked, _ the mask, sixth token chosen and kept, eighth replaced:

        tokens        [CLS] the _  sat on the _  zoo [SEP]
        targets       [CLS] the cat sat on the mat .  [SEP]
        loss_weights    0    0   1   0  0   1   1  1    0

    Args:
      row: tokens and segment_ids, int [L].
      rng: generator of this row.
      tokenizer: its `mask_id`, `is_control_V`, `vocab_size` and `piece`.
      cfg: `corrupt.rate` and `corrupt.whole_words`.

    Returns:
      The row with tokens and targets int32 [L], loss_weights float32 [L].
    """
    table = _vocabulary(tokenizer)
    tokens_L, segments_L = row["tokens"].astype(np.int32), row["segment_ids"]
    at_M = np.flatnonzero((segments_L > 0) & ~table.is_special[tokens_L])  # what may be chosen
    word_M = np.arange(len(at_M))
    if cfg.corrupt.whole_words and len(at_M):
        word_M = np.cumsum(_starts_word(tokens_L, segments_L, table)[at_M])
        word_M -= word_M[0]
    budget = max(1, round(cfg.corrupt.rate * len(at_M)))
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
    """Positions of a row that `data.task` ever gives a weight, where it hides a share of them; else 0, any number."""
    return _most(cfg, cfg.data.seq_len) if cfg.data.task in ("masked_text", "masked_pairs") else 0


def _most(cfg: Config, row_len: int) -> int:
    return max(round(cfg.corrupt.rate * row_len), _LONG_WORD)


class _Vocabulary(NamedTuple):
    """bool [V] each, but `ordinary_ids`, int32: all ids that are no control symbol."""

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
    """bool [L]: a piece that begins with a space, or follows white space, a special token or another document."""
    starts_L = table.starts_word[tokens_L]
    starts_L[0] = True
    starts_L[1:] |= (table.is_space | table.is_special)[tokens_L[:-1]] | (segments_L[1:] != segments_L[:-1])
    return starts_L


# Spans ----------------------------------------------------------------------------------------------------------------


class SpanSizes(NamedTuple):
    """Of a row of n tokens: how many are hidden, in how many spans, and how long its inputs and targets become."""

    hidden: int
    spans: int
    inputs: int
    targets: int


def span_sizes(n: int, cfg: Config) -> SpanSizes:
    """round(rate * n) tokens are hidden, at least one and never all, in round(hidden / mean_span) spans, at least one.

    Both ends are counted. A row of fewer than two tokens hides nothing.
    """
    hidden = min(max(round(n * cfg.corrupt.rate), 1), n - 1) if n > 1 else 0
    spans = min(max(round(hidden / cfg.corrupt.mean_span), 1), hidden, n - hidden)
    return SpanSizes(hidden, spans, n - hidden + spans + 1, hidden + spans + 1)


def raw_len(cfg: Config) -> int:
    """Tokens of a row before its spans are hidden: as many as then fill the data.seq_len positions of the encoder.

    Raises:
      ConfigError: not even two tokens fit.
    """
    n = 2
    if span_sizes(n, cfg).inputs > cfg.data.seq_len:
        raise ConfigError(f"'data.seq_len' ({cfg.data.seq_len}) must be at least 3 for data.task=span_corruption")
    while span_sizes(n + 1, cfg).inputs <= cfg.data.seq_len:
        n += 1
    return n


def target_len(cfg: Config) -> int:
    """Positions of the decoder's row, where there is an encoder too."""
    return cfg.data.target_len or cfg.data.seq_len


def span_corruption(row: Row, rng: np.random.Generator, tokenizer: Any, cfg: Config) -> Row:
    """Hides spans of a row, each behind a sentinel; the decoder says what was there (T5, Raffel et al. 2020, 3.1.4).

    Lengths of the spans, and of what is kept before, between and after them, are random compositions, as in T5's
    `random_spans_noise_mask`. There a span always ends the row, so that of a row with one span the same tokens would be
    hidden each time; here nothing need be kept before the first and after the last one. The row is taken as one
    sequence: documents packed in it see each other. Worked, <0> <1> the sentinels:

        row      thank you for inviting me to your party last week
        inputs   thank you <0> me to your party <1> week EOS
        targets  <0> for inviting <1> last EOS
        tokens   BOS <0> for inviting <1> last

    Args:
      row: tokens and segment_ids (0 = padding), int [n], n at most `raw_len(cfg)`.
      rng: generator of this row.
      tokenizer: its `sentinel_ids`, `bos_id` and `eos_id`.
      cfg: `corrupt` and `data`; `check` has passed.

    Returns:
      The row with inputs, input_segment_ids, input_positions int32 [seq_len] and, of target_len positions, tokens,
      targets, segment_ids, positions int32 and loss_weights float32: 0 on padding, and everywhere if nothing is hidden.
    """
    tokens = row["tokens"][row["segment_ids"] > 0].astype(np.int32)
    sizes = span_sizes(len(tokens), cfg)
    inputs: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    kept_lengths = _composition(len(tokens) - sizes.hidden + 2, sizes.spans + 1, rng)
    kept_lengths[0] -= 1  # the first and the last, which is what is left, may be of no token
    hidden_lengths = _composition(sizes.hidden, sizes.spans, rng)
    at = 0
    for number, (kept, hidden) in enumerate(zip(kept_lengths, hidden_lengths, strict=False)):
        sentinel = tokenizer.sentinel_ids[number : number + 1]
        inputs += [tokens[at : at + kept], sentinel]
        targets += [sentinel, tokens[at + kept : at + kept + hidden]]
        at += kept + hidden
    end = [tokenizer.eos_id]
    target_ids = np.concatenate([*targets, end])
    encoder = _sequence("inputs", np.concatenate([*inputs, tokens[at:], end]), cfg.data.seq_len, "input_")
    decoder = _sequence("tokens", np.concatenate([[tokenizer.bos_id], target_ids[:-1]]), target_len(cfg))
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
    """Lengths, each at least 1, of `parts` parts of `total`; all such lists are equally likely. [0] parts: empty."""
    if not parts:
        return np.zeros(0, int)
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=total)


def _sequence(name: str, ids: np.ndarray, length: int, prefix: str = "") -> Row:
    """Ids as one segment of a row of `length` positions, int32, padded with 0."""
    room = (0, length - len(ids))
    columns = {
        name: ids,
        f"{prefix}segment_ids": np.ones(len(ids)),
        f"{prefix}positions": np.arange(len(ids)),
    }
    return {key: np.pad(column, room).astype(np.int32) for key, column in columns.items()}


# Prefixes -------------------------------------------------------------------------------------------------------------


def prefix(row: Row, rng: np.random.Generator, tokenizer: Any, cfg: Config) -> Row:
    """Makes a random number of each segment's first tokens its prefix, which all of the segment sees (T5, 3.2.1).

    Targets that the prefix shows have no weight. Its last position keeps its own: what it predicts is not in sight.
    Worked, segments of four and two tokens, prefixes of three and one:

        tokens        a b c d  e f
        targets       b c d .  f .
        is_prefix     1 1 1 0  1 0
        loss_weights  0 0 1 1  1 1

    Args:
      row: segment_ids int [L], segments numbered from 1, and loss_weights [L].
      rng: generator of this row. A prefix of n tokens has 1, 2, ... or n of them, each as likely.
      tokenizer: unused.
      cfg: unused.

    Returns:
      The row with is_prefix int32 [L] and the loss_weights, float32.
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


# Pairs of sentences ---------------------------------------------------------------------------------------------------


def pair_sentences(row: Row, rng: np.random.Generator, tokenizer: Any, cfg: Config) -> Row:
    """[CLS] A [SEP] B [SEP] of two stretches of one document, half of the time spoilt: the label says whether.

    corrupt.pairs=next (BERT's next sentence prediction): the spoilt B is another document's. corrupt.pairs=order
    (ALBERT, Lan et al. 2020): A and B change places. What does not fit is cut from the end of the longer one.

    Args:
      row: tokens int [L], A then B; type_ids [L], 0 in A and 1 in B; segment_ids [L], 0 = padding; document [], which
        document. With pairs=next also the same columns of a random row, named 'other_...'; a row of the same
        document spoils nothing.
      rng: generator of this row.
      tokenizer: its `bos_id` ([CLS]) and `eos_id` ([SEP]).
      cfg: `corrupt.pairs` and `data.seq_len`.

    Returns:
      tokens, segment_ids, positions and type_ids int32 [seq_len]; labels int32 []: 0 = as in the document, 1 = spoilt.
      No other column passes through.
    """
    first, second = _stretches(row, "")
    spoilt = bool(rng.random() < 0.5)
    if cfg.corrupt.pairs == "order" and spoilt:
        first, second = second, first
    elif spoilt:
        spoilt = bool(row["document"] != row["other_document"])
        second = _stretches(row, "other_")[1] if spoilt else second
    room = cfg.data.seq_len - PAIR_SPECIALS
    first, second = (
        first[: max(room - len(second), (room + 1) // 2)],
        second[: max(room - len(first), room // 2)],
    )
    ids = np.concatenate([[tokenizer.bos_id], first, [tokenizer.eos_id], second, [tokenizer.eos_id]])
    types = np.repeat([0, 1], [len(first) + 2, len(second) + 1])
    return _sequence("tokens", ids, cfg.data.seq_len) | {
        "type_ids": np.pad(types, (0, cfg.data.seq_len - len(ids))).astype(np.int32),
        "labels": np.array(spoilt, np.int32),
    }


def masked_pairs(row: Row, rng: np.random.Generator, tokenizer: Any, cfg: Config) -> Row:
    """`pair_sentences`, then `mask_tokens`."""
    return mask_tokens(pair_sentences(row, rng, tokenizer, cfg), rng, tokenizer, cfg)


def _stretches(row: Row, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    is_token, type_ids = row[f"{prefix}segment_ids"] > 0, row[f"{prefix}type_ids"]
    tokens = row[f"{prefix}tokens"].astype(np.int32)
    return tokens[is_token & (type_ids == 0)], tokens[is_token & (type_ids == 1)]
