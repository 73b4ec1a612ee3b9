"""Masked language modelling: masking follows the papers and never hides padding or control symbols; sentence pairs,
from documents to the loss."""

from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm import input_pipeline, losses, program
from lm import run as run_lib
from lm.config import Config, DataConfig, TokenizerConfig
from lm.config.schema import ConfigError
from lm.data import loader, tokenizer
from lm.data.example import Row
from lm.data.readers import registry
from lm.tasks import TASKS, masked_lm
from tests import toys
from tests.pieces import TOKENIZER, WORDS, document_lengths, packed


def config(name: str = "masked_lm", seq_len: int = 32, extra_ids: int = 1, **options: Any) -> Config:
    return Config(
        task=toys.task(name, **options),
        data=DataConfig(seq_len=seq_len),
        tokenizer=TokenizerConfig(extra_ids=extra_ids),
    )


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (config(extra_ids=0), "'tokenizer.extra_ids' is 0"),
        (config(mask_rate=0.0), "'task.mask_rate' is 0"),
    ],
)
def test_invalid_configs_are_refused_before_data_is_read(cfg, message):
    with pytest.raises(ConfigError, match=message):
        TASKS[cfg.task.name].check(cfg)


# Masked tokens --------------------------------------------------------------------------------------------------------


@given(document_lengths(32), st.integers(0, 2**32 - 1), st.sampled_from([0.05, 0.15, 0.5, 0.9]))
def test_masks_the_given_share_of_ordinary_tokens_and_nothing_else(lengths, seed, rate):
    row = packed(lengths, 32, seed)
    out = masked_lm.mask_tokens(row, np.random.default_rng(seed), TOKENIZER, config(mask_rate=rate))
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


def test_of_chosen_tokens_80_percent_are_masked_10_random_10_kept():
    row = packed([20_000], 20_000, 0)
    out = masked_lm.mask_tokens(row, np.random.default_rng(0), TOKENIZER, config(mask_rate=0.5))
    chosen = out["loss_weights"] == 1
    hidden, original = out["tokens"][chosen], out["targets"][chosen]
    masked = (hidden == TOKENIZER.mask_id).mean()
    changed = ((hidden != TOKENIZER.mask_id) & (hidden != original)).mean()
    other = 1 - 1 / len(WORDS)  # a random id may equal the old one
    np.testing.assert_allclose([masked, changed], [0.8, 0.1 * other], atol=0.01)
    drawn = hidden[(hidden != TOKENIZER.mask_id) & (hidden != original)]
    np.testing.assert_allclose(np.bincount(drawn - 4) / len(drawn), 1 / len(WORDS), atol=0.03)
    where = np.flatnonzero(chosen)  # positions are uniform
    np.testing.assert_allclose(np.histogram(where, 10)[0] / len(where), 0.1, atol=0.01)


def words_of(row: Row) -> list[list[int]]:
    """Positions of the pieces of each word, by a plain loop."""
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


@given(document_lengths(48), st.integers(0, 2**32 - 1))
def test_a_word_is_masked_whole_or_not_at_all(lengths, seed):
    row = packed(lengths, 48, seed)
    out = masked_lm.mask_tokens(row, np.random.default_rng(seed), TOKENIZER, config(mask_rate=0.3, whole_words=True))
    words, ordinary = words_of(row), sum(4 <= token < TOKENIZER.mask_id for token in row["tokens"][: sum(lengths)])
    chosen = [word for word in words if out["loss_weights"][word].any()]
    assert all(out["loss_weights"][word].all() for word in chosen)
    assert out["loss_weights"].sum() == sum(map(len, chosen))
    assert bool(chosen) == bool(words)
    assert len(chosen) < 2 or out["loss_weights"].sum() <= max(1, round(0.3 * ordinary))


@pytest.mark.parametrize("whole_words", [False, True])
@pytest.mark.parametrize("task", ["masked_lm", "masked_lm_pairs"])
def test_no_row_exceeds_most_predicted(task, whole_words):
    """Even if a single word is longer than that: then only its first pieces are hidden."""
    cfg = config(task, seq_len=64, mask_rate=0.15, whole_words=whole_words)
    row = packed([64], 64, 0)
    row["tokens"][1:] = 4 + WORDS.index("mat")  # 63 pieces, one word
    out = masked_lm.mask_tokens(row, np.random.default_rng(0), TOKENIZER, cfg)
    assert out["loss_weights"].sum() == (10 if whole_words else 9) and masked_lm.most_predicted(cfg) == 10
    assert not whole_words or np.flatnonzero(out["loss_weights"]).tolist() == list(range(1, 11))


def test_a_word_ends_at_a_space_a_line_or_a_document_boundary():
    ids = {piece: 4 + i for i, piece in enumerate(WORDS)}
    pieces = ["\u2581sat", "s", "<0xC3>", "\u2581", "mat", "<0x0A>", "ing", ".", "\u2581on"]
    tokens = np.array([1, *(ids[piece] for piece in pieces), ids["s"]])
    row = {"tokens": tokens, "segment_ids": np.array([1] * 10 + [2])}
    expected = [[1, 2, 3], [4], [5], [6], [7, 8], [9], [10]]
    assert words_of(row) == expected
    cfg, rng = config(mask_rate=0.01, whole_words=True), np.random.default_rng(0)  # one word at a time
    drawn = [masked_lm.mask_tokens(row, rng, TOKENIZER, cfg)["loss_weights"] for _ in range(200)]
    assert sorted({tuple(np.flatnonzero(weights).tolist()) for weights in drawn}) == list(map(tuple, expected))


def test_masking_is_a_function_of_the_generator_alone():
    row = packed([30], 32, 0)
    first, again, other = (
        masked_lm.mask_tokens(row, np.random.default_rng(seed), TOKENIZER, config()) for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(first["tokens"], again["tokens"])
    assert not np.array_equal(first["loss_weights"], other["loss_weights"])


# Pairs of sentences ---------------------------------------------------------------------------------------------------


def pair(first: list[int], second: list[int], document: int, length: int = 64) -> Row:
    ids, types = [*first, *second], [0] * len(first) + [1] * len(second)
    room = (0, length - len(ids))
    return {
        "tokens": np.pad(ids, room),
        "type_ids": np.pad(types, room),
        "segment_ids": np.pad(np.ones(len(ids), int), room),
        "document": np.array(document),
    }


def parts(out: Row) -> tuple[list[int], list[int]]:
    """A and B of [CLS] A [SEP] B [SEP]; checks the special tokens, types and positions."""
    ids = out["tokens"][out["segment_ids"] > 0].tolist()
    middle = ids.index(2)
    assert (ids[0], ids[-1], ids.count(2)) == (1, 2, 2)
    expected = np.arange(len(out["tokens"]))
    np.testing.assert_array_equal(out["type_ids"], (expected > middle) & (expected < len(ids)))
    np.testing.assert_array_equal(out["positions"], expected * (expected < len(ids)))
    return ids[1:middle], ids[middle + 1 : -1]


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 30), st.integers(0, 2**32 - 1), st.booleans())
def test_b_follows_a_or_is_from_another_document(a, b, c, seed, same_document):
    first, second, third = [5] * a, [6] * b, [7] * c
    other = pair([8], third, 4 if same_document else 5)
    row = pair(first, second, 4) | {f"other_{key}": column for key, column in other.items()}
    cfg = config("masked_lm_pairs", 24)
    out = masked_lm.pair_sentences(row, np.random.default_rng(seed), TOKENIZER, cfg)
    assert set(out) == {"tokens", "segment_ids", "positions", "type_ids", "labels"}
    partner = third if out["labels"] else second
    assert not (same_document and out["labels"])
    # BERT's truncate_seq_pair: the longer one loses a token until both fit.
    lengths = [a, len(partner)]
    while sum(lengths) > 21:
        lengths[int(lengths[1] >= lengths[0])] -= 1
    assert parts(out) == ([5] * lengths[0], partner[: lengths[1]])


@given(st.integers(0, 2**32 - 1))
def test_order_swaps_a_and_b(seed):
    cfg = config("masked_lm_pairs", 24, pairs="order")
    out = masked_lm.pair_sentences(pair([5, 6], [7], 4), np.random.default_rng(seed), TOKENIZER, cfg)
    assert parts(out) == (([7], [5, 6]) if out["labels"] else ([5, 6], [7]))
    assert out["labels"].dtype == np.int32


@pytest.mark.parametrize("pairs", ["next", "order"])
def test_half_of_the_pairs_are_corrupted(pairs):
    row = pair([5], [6], 4) | {f"other_{key}": column for key, column in pair([7], [8], 5).items()}
    rng, cfg = np.random.default_rng(0), config("masked_lm_pairs", 24, pairs=pairs)
    labels = [masked_lm.masked_pairs(row, rng, TOKENIZER, cfg)["labels"] for _ in range(1000)]
    np.testing.assert_allclose(np.mean(labels), 0.5, atol=0.05)


# From documents to the loss -------------------------------------------------------------------------------------------

SENTENCES = ["The dog ran.", "Was it red?", "Not at all!\n", "A cat sat", " on the mat", ".", "\n\nIt slept. ", "Yes."]


@pytest.fixture(scope="module")
def words():
    trained = tokenizer.train([" ".join(SENTENCES)] * 3, 300, 10_000)
    return tokenizer.SentencePiece(trained.model, extra_ids=1)


def settings(**changes):
    base = {"task__name": "masked_lm_pairs", "model__kind": "encoder", "data__packing": "pad"}
    return toys.recipe(Path("none"), **base | {"tokenizer__extra_ids": 1, "data__batch_size": 8} | changes)


def squeezed(text):
    return " ".join(text.split())


@given(parts=st.lists(st.sampled_from(SENTENCES), max_size=30), seq_len=st.integers(5, 40))
def test_pairs_cover_the_document_in_order_and_split_near_the_middle(words, parts, seq_len):
    counts = Counter[str]()
    record = {"text": "".join(f" {part}" for part in parts), "source": "x:1"}
    found = masked_lm.neighbours(record, words, settings(data__seq_len=seq_len), counts)
    rows = [example.columns for example in found]
    text = "".join(words.decode(row["tokens"]) for row in rows)
    if not counts:
        assert text.split() == record["text"].split()
    for row in rows:
        assert 2 <= len(row["tokens"]) <= seq_len - 3
        assert set(np.diff(row["type_ids"])) <= {0, 1} and set(row["type_ids"]) == {0, 1}
        assert squeezed(words.decode(row["tokens"])) in squeezed(record["text"])
        first = words.decode(row["tokens"][row["type_ids"] == 0])
        assert first.rstrip(" ")[-1] in ".?!\n"
        # No other end of a sentence is closer to the middle.
        middle, total = int((row["type_ids"] == 0).sum()), len(row["tokens"])
        sentences = masked_lm._BETWEEN_SENTENCES.split(record["text"])
        ends = np.cumsum([len(words.encode(s if s[:1].isspace() else f" {s}")) for s in sentences])
        starts = {0, *ends.tolist()}
        if not counts:
            at = sum(len(other["tokens"]) for other in rows[: next(i for i, r in enumerate(rows) if r is row)])
            inside = [end - at for end in starts if at < end < at + total]
            assert abs(2 * middle - total) == min(abs(2 * end - total) for end in inside)


def test_every_segment_begins_with_white_space_so_that_none_reveals_its_position(words):
    record = {"text": f"{SENTENCES[0]} {SENTENCES[1]}", "source": "x:1"}
    (example,) = masked_lm.neighbours(record, words, settings(data__seq_len=64), Counter())
    tokens, types = example.columns["tokens"], example.columns["type_ids"]
    assert [words.decode(tokens[types == side])[0] for side in (0, 1)] == [" ", " "]


def records(count: int) -> list[dict[str, str]]:
    rng = np.random.default_rng(0)
    return [{"text": " ".join(rng.choice(SENTENCES, 8)), "source": f"x:{n}"} for n in range(count)]


def batches(cfg, words, count):
    data = input_pipeline.build(cfg, words, registry.Split(records(12), records(3), "", ""))
    local = np.arange(cfg.data.batch_size)
    stream = loader.train_batches(data, batch_size=len(local), start_example=0, local_rows=local, seed=0)
    made = [next(stream) for _ in range(count)]
    stream.close()
    return data, made


def halves(batch, row):
    tokens = batch["targets"][row][batch["segment_ids"][row] > 0]  # before masking
    types = batch["type_ids"][row][batch["segment_ids"][row] > 0]
    return tuple(tokens[types == 0][1:-1]), tuple(tokens[types == 1][:-1])


@pytest.mark.parametrize("pairs", ["next", "order"])
def test_the_label_says_whether_b_follows_a_in_the_document(words, pairs):
    cfg = settings(task__pairs=pairs, data__seq_len=64)
    data, made = batches(cfg, words, 12)
    rows, true = data.train.rows, set()
    for tokens, types, real in zip(rows["tokens"], rows["type_ids"], rows["segment_ids"] > 0, strict=True):
        true.add((tuple(tokens[real & (types == 0)]), tuple(tokens[real & (types == 1)])))
    labels, corrupted = [], set()
    for batch in made:
        for row in range(8):
            first, second = halves(batch, row)
            pair = (second, first) if pairs == "order" and batch["labels"][row] else (first, second)
            assert (pair in true) == (pairs == "order" or not batch["labels"][row])
            labels.append(batch["labels"][row])
            if pairs == "next" and batch["labels"][row]:  # B of another pair, whose end may be cut
                assert any(b[: len(second)] == second for _, b in true)
                corrupted.add(second)
    assert pairs == "order" or len(corrupted) > 8, "any other row is as good"
    assert 0.3 < np.mean(labels) < 0.7
    again = list(loader.eval_batches(data.valid, batch_size=4, local_rows=np.arange(4), max_tokens=0, seq_len=64))
    twice = list(loader.eval_batches(data.valid, batch_size=4, local_rows=np.arange(4), max_tokens=0, seq_len=64))
    for one, other in zip(again, twice, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)


def test_the_loss_is_the_sum_of_the_token_and_the_pair_loss(words, tmp_path):
    """The label counts once for every hidden token of its row; computed by hand from the logits."""
    cfg = run_lib.plan(settings(model__num_layers=1, model__dropout=0.0, data__seq_len=48), tmp_path).cfg
    _, [batch] = batches(cfg, words, 1)
    batch["loss_weights"][2] = 0  # a padding row
    model = program.make_model(cfg, np.float32)
    params = model.init(jax.random.key(0))
    loss = jax.jit(TASKS[cfg.task.name].loss(model.apply, cfg, words))
    terms = loss(params, batch, None)
    out = model.apply(params, batch)
    logits = losses.logits(out.hidden_BxLxD, out.unembed_DxV, vocab_size=words.vocab_size, softcap=0.0)
    token_nll = -np.take_along_axis(jax.nn.log_softmax(np.float64(logits)), batch["targets"][..., None], -1)[..., 0]
    pair_nll = -np.asarray(jax.nn.log_softmax(out.head))[np.arange(8), batch["labels"]]
    count_B = batch["loss_weights"].sum(axis=1)
    assert terms.weight == count_B.sum()
    want = (batch["loss_weights"] * token_nll).sum() + (count_B * pair_nll).sum()
    np.testing.assert_allclose(terms.sum, want, rtol=1e-5)
    right = np.asarray(out.head).argmax(axis=1) == batch["labels"]
    np.testing.assert_allclose(terms.metrics["pair_accuracy"][0], right.sum())
