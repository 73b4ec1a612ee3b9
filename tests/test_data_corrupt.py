"""What is hidden of a row is what the papers say, can be undone, and is never padding or a control symbol."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.config import Config, CorruptConfig, DataConfig, TokenizerConfig
from lm.config.schema import ConfigError
from lm.tasks import corrupt

WORDS = ["\u2581the", "\u2581cat", "\u2581sat", "s", "ing", "\u2581", "<0x0A>", "<0xC3>", "\u2581on", "mat", "."]


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Four control symbols, `WORDS`, the mask, sentinels: what `corrupt` reads of a tokenizer."""

    sentinels: int = 40
    bos_id: int = 1
    eos_id: int = 2

    @property
    def is_control_V(self) -> np.ndarray:
        ids = np.arange(self.vocab_size)
        return (ids < 4) | (ids >= self.mask_id)

    @property
    def mask_id(self) -> int:
        return 4 + len(WORDS)

    @property
    def sentinel_ids(self) -> np.ndarray:
        return np.arange(self.mask_id + 1, self.vocab_size, dtype=np.int32)

    @property
    def vocab_size(self) -> int:
        return self.mask_id + 1 + self.sentinels

    def piece(self, token_id: int) -> str:
        return WORDS[token_id - 4] if 4 <= token_id < self.mask_id else f"<{token_id}>"


TOKENIZER = Pieces()


def config(
    task: str = "masked_text", seq_len: int = 32, target_len: int = 0, extra_ids: int = 41, **keys: Any
) -> Config:
    data: Any = {"task": task, "seq_len": seq_len, "target_len": target_len}
    return Config(
        data=DataConfig(**data), corrupt=CorruptConfig(**keys), tokenizer=TokenizerConfig(extra_ids=extra_ids)
    )


def packed(lengths: list[int], seq_len: int, seed: int) -> corrupt.Row:
    """Documents of BOS and words, then padding whose tokens could be words; in the narrow dtypes of stored rows."""
    rng = np.random.default_rng(seed)
    tokens, segments, positions = (np.full(seq_len, value, np.uint8) for value in (5, 0, 0))
    at = 0
    for number, length in enumerate(lengths, 1):
        tokens[at : at + length] = [1, *rng.integers(4, 4 + len(WORDS), length - 1)]
        segments[at : at + length], positions[at : at + length] = number, np.arange(length)
        at += length
    return {"tokens": tokens, "segment_ids": segments, "positions": positions, "example_index": np.array(7)}


def documents(max_len: int) -> Any:
    return st.lists(st.integers(1, 12), min_size=1, max_size=5).filter(lambda lengths: sum(lengths) <= max_len)


# Masked tokens --------------------------------------------------------------------------------------------------------


@given(documents(32), st.integers(0, 2**32 - 1), st.sampled_from([0.05, 0.15, 0.5, 0.9]))
def test_masks_so_many_ordinary_tokens_and_nothing_else(lengths, seed, rate):
    row = packed(lengths, 32, seed)
    out = corrupt.mask_tokens(row, np.random.default_rng(seed), TOKENIZER, config(rate=rate))
    ordinary = sum(4 <= token < TOKENIZER.mask_id for token in row["tokens"][: sum(lengths)])
    chosen = out["loss_weights"] == 1
    assert chosen.sum() == (max(1, round(rate * ordinary)) if ordinary else 0)
    assert set(np.unique(out["loss_weights"])) <= {0, 1}
    assert all(4 <= token < TOKENIZER.mask_id for token in row["tokens"][chosen])
    np.testing.assert_array_equal(out["targets"], row["tokens"])
    np.testing.assert_array_equal(out["tokens"][~chosen], row["tokens"][~chosen])
    assert all(4 <= token <= TOKENIZER.mask_id for token in out["tokens"][chosen])
    assert (out["tokens"].dtype, out["targets"].dtype, out["loss_weights"].dtype) == (np.int32, np.int32, np.float32)
    for key in ("segment_ids", "positions", "example_index"):
        assert out[key] is row[key]


def test_eight_of_ten_are_masked_one_is_random_one_stays():
    row = packed([20_000], 20_000, 0)
    out = corrupt.mask_tokens(row, np.random.default_rng(0), TOKENIZER, config(rate=0.5))
    chosen = out["loss_weights"] == 1
    hidden, original = out["tokens"][chosen], out["targets"][chosen]
    masked = (hidden == TOKENIZER.mask_id).mean()
    changed = ((hidden != TOKENIZER.mask_id) & (hidden != original)).mean()
    other = 1 - 1 / len(WORDS)  # a random id is the old one by chance
    np.testing.assert_allclose([masked, changed], [0.8, 0.1 * other], atol=0.01)
    drawn = hidden[(hidden != TOKENIZER.mask_id) & (hidden != original)]
    np.testing.assert_allclose(np.bincount(drawn - 4) / len(drawn), 1 / len(WORDS), atol=0.03)
    where = np.flatnonzero(chosen)  # every place is as likely
    np.testing.assert_allclose(np.histogram(where, 10)[0] / len(where), 0.1, atol=0.01)


def words_of(row: corrupt.Row) -> list[list[int]]:
    """Places of the pieces of each word, by a plain loop."""
    words: list[list[int]] = []
    for at, token in enumerate(row["tokens"]):
        piece = TOKENIZER.piece(int(token))
        if row["segment_ids"][at] == 0 or not 4 <= token < TOKENIZER.mask_id:
            continue
        before = TOKENIZER.piece(int(row["tokens"][at - 1])) if at else "<0>"
        follows = at and 4 <= row["tokens"][at - 1] < TOKENIZER.mask_id and before not in ("\u2581", "<0x0A>")
        begins = piece.startswith("\u2581") or piece == "<0x0A>"
        if follows and row["segment_ids"][at - 1] == row["segment_ids"][at] and not begins:
            words[-1].append(at)
        else:
            words.append([at])
    return words


@given(documents(48), st.integers(0, 2**32 - 1))
def test_a_word_is_masked_whole_or_not_at_all(lengths, seed):
    row = packed(lengths, 48, seed)
    out = corrupt.mask_tokens(row, np.random.default_rng(seed), TOKENIZER, config(rate=0.3, whole_words=True))
    words, ordinary = words_of(row), sum(4 <= token < TOKENIZER.mask_id for token in row["tokens"][: sum(lengths)])
    chosen = [word for word in words if out["loss_weights"][word].any()]
    assert all(out["loss_weights"][word].all() for word in chosen)
    assert out["loss_weights"].sum() == sum(map(len, chosen))
    assert bool(chosen) == bool(words)
    assert len(chosen) < 2 or out["loss_weights"].sum() <= max(1, round(0.3 * ordinary))


@pytest.mark.parametrize("whole_words", [False, True])
@pytest.mark.parametrize("task", ["masked_text", "masked_pairs"])
def test_no_row_has_more_predicted_tokens_than_said(task, whole_words):
    """Also where one word is longer than that: its first pieces are hidden."""
    cfg = config(task, seq_len=64, rate=0.15, whole_words=whole_words)
    row = packed([64], 64, 0)
    row["tokens"][1:] = 4 + WORDS.index("mat")  # 63 pieces, one word
    out = corrupt.mask_tokens(row, np.random.default_rng(0), TOKENIZER, cfg)
    assert out["loss_weights"].sum() == (10 if whole_words else 9) and corrupt.most_predicted(cfg) == 10
    assert not whole_words or np.flatnonzero(out["loss_weights"]).tolist() == list(range(1, 11))
    assert corrupt.most_predicted(config("text", rate=0.15)) == 0


def test_a_word_goes_on_until_a_space_a_line_or_a_document():
    ids = {piece: 4 + i for i, piece in enumerate(WORDS)}
    pieces = ["\u2581sat", "s", "<0xC3>", "\u2581", "mat", "<0x0A>", "ing", ".", "\u2581on"]
    tokens = np.array([1, *(ids[piece] for piece in pieces), ids["s"]])
    row = {"tokens": tokens, "segment_ids": np.array([1] * 10 + [2])}
    expected = [[1, 2, 3], [4], [5], [6], [7, 8], [9], [10]]
    assert words_of(row) == expected
    cfg, rng = config(rate=0.01, whole_words=True), np.random.default_rng(0)  # one word at a time
    drawn = [corrupt.mask_tokens(row, rng, TOKENIZER, cfg)["loss_weights"] for _ in range(200)]
    assert sorted({tuple(np.flatnonzero(weights).tolist()) for weights in drawn}) == list(map(tuple, expected))


def test_what_is_chosen_depends_on_the_generator_alone():
    row = packed([30], 32, 0)
    first, again, other = (
        corrupt.mask_tokens(row, np.random.default_rng(seed), TOKENIZER, config()) for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(first["tokens"], again["tokens"])
    assert not np.array_equal(first["loss_weights"], other["loss_weights"])


# Spans ----------------------------------------------------------------------------------------------------------------


def undo(out: corrupt.Row) -> list[int]:
    """The row that inputs and targets were made of."""
    spans: dict[int, list[int]] = {}
    for token in out["targets"][out["segment_ids"] > 0].tolist()[:-1]:
        if token in TOKENIZER.sentinel_ids:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    inputs = out["inputs"][out["input_segment_ids"] > 0].tolist()[:-1]
    return [token for unit in inputs for token in spans.get(unit, [unit])]


@given(
    st.integers(0, 60),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.05, 0.15, 0.5, 0.8]),
    st.sampled_from([1.0, 1.5, 3.0, 8.0]),
)
def test_spans_can_be_put_back(n, seed, rate, mean_span):
    cfg = config("span_corruption", 64, 96, rate=rate, mean_span=mean_span)
    row = packed([n] if n else [], 64, seed)
    out = corrupt.span_corruption(row, np.random.default_rng(seed), TOKENIZER, cfg)
    assert undo(out) == row["tokens"][:n].tolist()
    used = [token for token in out["inputs"].tolist() if token in TOKENIZER.sentinel_ids]
    assert used == TOKENIZER.sentinel_ids[: len(used)].tolist()
    hidden = n - (int(out["input_segment_ids"].sum()) - len(used) - 1)
    assert hidden == (np.clip(round(n * rate), 1, n - 1) if n > 1 else 0)
    length = int(out["segment_ids"].sum())
    assert length == hidden + len(used) + 1
    assert out["targets"][length - 1] == TOKENIZER.eos_id
    assert out["inputs"][out["input_segment_ids"].sum() - 1] == TOKENIZER.eos_id
    np.testing.assert_array_equal(out["tokens"][:length], [TOKENIZER.bos_id, *out["targets"][: length - 1]])
    np.testing.assert_array_equal(out["loss_weights"], (np.arange(96) < length) * (hidden > 0))
    for key in ("segment_ids", "positions", "tokens", "targets", "inputs", "input_segment_ids", "input_positions"):
        assert out[key].dtype == np.int32
        assert out[key].shape == ((64,) if key.startswith("input") else (96,))
    np.testing.assert_array_equal(out["input_positions"], np.arange(64) * out["input_segment_ids"])
    np.testing.assert_array_equal(out["positions"], np.arange(96) * out["segment_ids"])


def test_spans_are_of_every_length_and_place_alike():
    # Compositions of 4 in 2 parts: 1+3, 2+2, 3+1, each as likely.
    rng = np.random.default_rng(0)
    drawn = [tuple(corrupt._composition(4, 2, rng)) for _ in range(3000)]
    counts = [drawn.count(parts) / 3000 for parts in ((1, 3), (2, 2), (3, 1))]
    np.testing.assert_allclose(counts, 1 / 3, atol=0.03)


def test_a_single_span_is_anywhere_alike():
    cfg, rng = config("span_corruption", 16), np.random.default_rng(0)
    row = packed([14], 14, 0)  # round(0.15 * 14) = 2 hidden tokens in one span
    out = [corrupt.span_corruption(row, rng, TOKENIZER, cfg)["inputs"] for _ in range(1300)]
    places = [inputs.tolist().index(TOKENIZER.sentinel_ids[0]) for inputs in out]
    np.testing.assert_allclose(np.bincount(places, minlength=13) / len(places), 1 / 13, atol=0.03)


def test_lengths_are_those_of_t5():
    cfg = config("span_corruption", 512, 114, extra_ids=101)
    assert corrupt.raw_len(cfg) == 568  # what random_spans_helper gives for 512 inputs, 15 %, spans of 3
    assert corrupt.span_sizes(568, cfg) == (85, 28, 512, 114)
    corrupt.check(cfg)


@given(
    st.integers(3, 80), st.sampled_from([0.02, 0.15, 0.5, 0.9]), st.sampled_from([1.0, 3.0, 5.0]), st.integers(0, 99)
)
def test_a_checked_config_fits_every_row(seq_len, rate, mean_span, seed):
    cfg = config("span_corruption", seq_len, 1, rate=rate, mean_span=mean_span)
    longest = corrupt.raw_len(cfg)
    sizes = corrupt.span_sizes(longest, cfg)
    cfg = config("span_corruption", seq_len, sizes.targets, sizes.spans + 1, rate=rate, mean_span=mean_span)
    corrupt.check(cfg)
    tokenizer: Any = Pieces(sentinels=sizes.spans)
    for n in {longest, seed % longest}:
        row = packed([n] if n else [], longest + 1, seed)
        out = corrupt.span_corruption(row, np.random.default_rng(seed), tokenizer, cfg)
        assert len(out["inputs"]) == seq_len
        assert len(out["targets"]) == sizes.targets


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (config("span_corruption", 512, 113, 101), r"'data.target_len' is 113.* up to 114"),
        (config("span_corruption", 512, 114, 28), r"'tokenizer.extra_ids' is 28.* at least 29"),
        (config("span_corruption", 2), "'data.seq_len'"),
        (config("masked_text", extra_ids=0), "'tokenizer.extra_ids' is 0"),
        (config("masked_text", rate=0.0), "'corrupt.rate' is 0"),
        (config("masked_pairs", seq_len=4), "'data.seq_len'"),
    ],
)
def test_what_cannot_work_is_refused_before_data_is_read(cfg, message):
    with pytest.raises(ConfigError, match=message):
        corrupt.check(cfg)


def test_other_tasks_need_no_extra_ids():
    corrupt.check(config("text", extra_ids=0, rate=0.0))


# Prefixes -------------------------------------------------------------------------------------------------------------


@given(documents(40), st.integers(0, 2**32 - 1))
def test_a_prefix_is_the_start_of_each_segment(lengths, seed):
    row = packed(lengths, 40, seed) | {"loss_weights": (np.arange(40) < sum(lengths)).astype(np.uint8)}
    out = corrupt.prefix(row, np.random.default_rng(seed), TOKENIZER, config())
    for number, length in enumerate(lengths, 1):
        of_segment = row["segment_ids"] == number
        shown = int(out["is_prefix"][of_segment].sum())
        assert 1 <= shown <= length
        np.testing.assert_array_equal(out["is_prefix"][of_segment], np.arange(length) < shown)
        # The target of position i is the token at i + 1: weighted unless the prefix shows it.
        np.testing.assert_array_equal(out["loss_weights"][of_segment], np.arange(length) + 1 >= shown)
    padding = row["segment_ids"] == 0
    assert not out["is_prefix"][padding].any()
    assert not out["loss_weights"][padding].any()
    assert (out["is_prefix"].dtype, out["loss_weights"].dtype) == (np.int32, np.float32)


def test_every_prefix_length_is_as_likely():
    row = packed([4], 5, 0) | {"loss_weights": np.ones(5, np.float32)}
    rng = np.random.default_rng(0)
    shown = [corrupt.prefix(row, rng, TOKENIZER, config())["is_prefix"].sum() for _ in range(4000)]
    np.testing.assert_allclose(np.bincount(shown, minlength=5)[1:] / 4000, 0.25, atol=0.03)


# Pairs of sentences ---------------------------------------------------------------------------------------------------


def pair(first: list[int], second: list[int], document: int, length: int = 64) -> corrupt.Row:
    ids, types = [*first, *second], [0] * len(first) + [1] * len(second)
    room = (0, length - len(ids))
    return {
        "tokens": np.pad(ids, room),
        "type_ids": np.pad(types, room),
        "segment_ids": np.pad(np.ones(len(ids), int), room),
        "document": np.array(document),
    }


def parts(out: corrupt.Row) -> tuple[list[int], list[int]]:
    """A and B of [CLS] A [SEP] B [SEP], with everything around them checked."""
    ids = out["tokens"][out["segment_ids"] > 0].tolist()
    middle = ids.index(2)
    assert (ids[0], ids[-1], ids.count(2)) == (1, 2, 2)
    expected = np.arange(len(out["tokens"]))
    np.testing.assert_array_equal(out["type_ids"], (expected > middle) & (expected < len(ids)))
    np.testing.assert_array_equal(out["positions"], expected * (expected < len(ids)))
    return ids[1:middle], ids[middle + 1 : -1]


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 30), st.integers(0, 2**32 - 1), st.booleans())
def test_b_follows_a_or_is_another_documents(a, b, c, seed, same_document):
    first, second, third = [5] * a, [6] * b, [7] * c
    other = pair([8], third, 4 if same_document else 5)
    row = pair(first, second, 4) | {f"other_{key}": column for key, column in other.items()}
    cfg = config("masked_pairs", 24)
    out = corrupt.pair_sentences(row, np.random.default_rng(seed), TOKENIZER, cfg)
    assert set(out) == {"tokens", "segment_ids", "positions", "type_ids", "labels"}
    partner = third if out["labels"] else second
    assert not (same_document and out["labels"])
    # BERT's truncate_seq_pair: what is longer loses a token until both fit.
    lengths = [a, len(partner)]
    while sum(lengths) > 21:
        lengths[int(lengths[1] >= lengths[0])] -= 1
    assert parts(out) == ([5] * lengths[0], partner[: lengths[1]])


@given(st.integers(0, 2**32 - 1))
def test_order_swaps_a_and_b(seed):
    cfg = config("masked_pairs", 24, pairs="order")
    out = corrupt.pair_sentences(pair([5, 6], [7], 4), np.random.default_rng(seed), TOKENIZER, cfg)
    assert parts(out) == (([7], [5, 6]) if out["labels"] else ([5, 6], [7]))
    assert out["labels"].dtype == np.int32


@pytest.mark.parametrize("pairs", ["next", "order"])
def test_half_of_the_pairs_are_spoilt(pairs):
    row = pair([5], [6], 4) | {f"other_{key}": column for key, column in pair([7], [8], 5).items()}
    rng, cfg = np.random.default_rng(0), config("masked_pairs", 24, pairs=pairs)
    labels = [corrupt.masked_pairs(row, rng, TOKENIZER, cfg)["labels"] for _ in range(1000)]
    np.testing.assert_allclose(np.mean(labels), 0.5, atol=0.05)
