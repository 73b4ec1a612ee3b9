"""Rows of texts: trained positions with and without a prefix, and counts of split or dropped records."""

import types
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm import input_pipeline
from lm.config import Config, DataConfig
from lm.config.schema import ConfigError
from lm.data import tokenizer
from lm.data.record import DataError
from lm.tasks import TASKS, language_modelling
from lm.tasks.base import check_fields
from tests import toys
from tests.pieces import document_lengths, packed

TOK = tokenizer.train([f"one two three {i}, say hello and bye now.\n" for i in range(300)], 400, 100_000)
BOS, EOS = TOK.bos_id, TOK.eos_id
PREFIX_CONFIG = Config(task=toys.task("prefix_lm"))


def run(records, task="chat", **data):
    counts = Counter()
    cfg = Config(task=toys.task(task), data=DataConfig(**data))
    sourced = [{"source": "f:1"} | record for record in records]
    check_fields(TASKS[task], sourced, TASKS)
    made = [
        types.SimpleNamespace(**e.columns) for e in input_pipeline.make_examples(TASKS[task], sourced, TOK, cfg, counts)
    ]
    assert counts["examples"] == len(made) and counts["documents"] == len(records)
    for example in made:
        assert example.tokens.dtype == example.targets.dtype == np.int32 and example.loss_weights.dtype == np.float32
        assert example.tokens.shape == example.targets.shape == example.loss_weights.shape
    return made, {key: value for key, value in counts.items() if key not in ("examples", "documents")}


def conversation(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_text_is_shifted_once_and_its_end_is_trained_on():
    (example,), counts = run([{"text": "hello <s> two"}], task="causal_lm")
    ids = TOK.encode("hello <s> two")
    assert example.tokens.tolist() == [BOS, *ids]
    assert example.targets.tolist() == [*ids, EOS]
    assert example.loss_weights.tolist() == [1] * (len(ids) + 1)
    assert counts == {}


def test_long_text_is_split_into_pieces_without_loss():
    text = "one two three 5, " * 20
    whole = [BOS, *TOK.encode(text), EOS]
    pieces, counts = run([{"text": text}, {"text": "bye"}], task="causal_lm", seq_len=7)
    pieces = pieces[:-1]
    assert counts == {"cut_in_pieces": 1}
    assert all(len(piece.tokens) == 7 for piece in pieces[:-1]) and len(pieces[-1].tokens) <= 7
    assert np.concatenate([piece.tokens for piece in pieces]).tolist() == whole[:-1]
    assert np.concatenate([piece.targets for piece in pieces]).tolist() == whole[1:]
    (uncut,), counts = run([{"text": text}], task="causal_lm", seq_len=7, packing="concat")
    assert uncut.tokens.tolist() == whole[:-1] and counts == {}


def test_examples_without_a_target_are_dropped_and_counted():
    records = [conversation(("user", "hello")), conversation(), conversation(("system", "say"), ("user", "two"))]
    assert run(records) == ([], {"dropped_no_target": 3})
    assert run([{"text": ""}], task="causal_lm") == ([], {"dropped_empty": 1})


def test_wrong_records_are_named():
    with pytest.raises(ConfigError, match=r"f:1: 'task.name' is chat, which reads 'messages', .* has text; set task.n"):
        run([{"text": "hello"}])
    with pytest.raises(ConfigError, match=r"set task\.name=.*chat"):
        run([conversation(("user", "hello"))], task="causal_lm")
    with pytest.raises(DataError, match="f:1: unknown role 'robot', expected one of system, user, assistant, tool"):
        run([conversation(("robot", "hello"))])


def test_a_tokenizer_is_trained_on_the_texts_only():
    assert list(TASKS["causal_lm"].texts({"text": "one", "source": "f"})) == ["one"]
    assert list(TASKS["chat"].texts(conversation(("user", "two"), ("assistant", "three")))) == ["two", "three"]
    pair = {"text": "one", "text_pair": "two", "label": "no"}
    assert list(TASKS["classification"].texts(pair)) == ["one", "two"]


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_change_neither_examples_nor_order_nor_counts(threads):
    cfg = Config(data=DataConfig(seq_len=16))
    records = [{"text": f"one two three {i} " * (i % 9), "source": f"f:{i}"} for i in range(200)]
    counts = [Counter(), Counter()]
    alone, shared = (
        list(input_pipeline.make_examples(TASKS["causal_lm"], records, TOK, cfg, own, n))
        for own, n in zip(counts, (1, threads), strict=True)
    )
    assert counts[0] == counts[1] and len(alone) == len(shared) > 200
    for one, other in zip(alone, shared, strict=True):
        for key, column in one.columns.items():
            np.testing.assert_array_equal(other.columns[key], column, strict=True)
    chats = [conversation(("user", "hi"), ("assistant", "yo")) | {"source": "f:1"} for _ in range(90)]
    chats[70]["messages"][0]["role"] = "wrong"
    made = input_pipeline.make_examples(TASKS["chat"], chats, TOK, Config(task=toys.task("chat")), Counter(), threads)
    with pytest.raises(DataError, match="unknown role 'wrong'"):
        list(made)


# Prefixes -------------------------------------------------------------------------------------------------------------


@given(document_lengths(40), st.integers(0, 2**32 - 1))
def test_a_prefix_is_the_start_of_each_segment(lengths, seed):
    row = packed(lengths, 40, seed) | {"loss_weights": (np.arange(40) < sum(lengths)).astype(np.uint8)}
    out = language_modelling.prefix(row, np.random.default_rng(seed), TOK, PREFIX_CONFIG)
    for number, length in enumerate(lengths, 1):
        of_segment = row["segment_ids"] == number
        shown = int(out["is_prefix"][of_segment].sum())
        assert 1 <= shown <= length
        np.testing.assert_array_equal(out["is_prefix"][of_segment], np.arange(length) < shown)
        # The target of position i is the token at i + 1: weighted unless it is inside the prefix.
        np.testing.assert_array_equal(out["loss_weights"][of_segment], np.arange(length) + 1 >= shown)
    padding = row["segment_ids"] == 0
    assert not out["is_prefix"][padding].any()
    assert not out["loss_weights"][padding].any()
    assert (out["is_prefix"].dtype, out["loss_weights"].dtype) == (np.int32, np.float32)


def test_prefix_lengths_are_uniform():
    row = packed([4], 5, 0) | {"loss_weights": np.ones(5, np.float32)}
    rng = np.random.default_rng(0)
    shown = [language_modelling.prefix(row, rng, TOK, PREFIX_CONFIG)["is_prefix"].sum() for _ in range(4000)]
    np.testing.assert_allclose(np.bincount(shown, minlength=5)[1:] / 4000, 0.25, atol=0.03)
