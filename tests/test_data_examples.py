"""lm/data/example.py: what is trained on, position by position, and what is cut or dropped and counted."""

import types
from collections import Counter

import numpy as np
import pytest

from lm import input_pipeline
from lm.config import Config, DataConfig
from lm.config.schema import ConfigError
from lm.data import tokenizer
from lm.data.example import check_fields
from lm.data.record import DataError
from lm.tasks import TASKS

TOK = tokenizer.train([f"one two three {i}, say hello and bye now.\n" for i in range(300)], 400, 100_000)
BOS, EOS = TOK.bos_id, TOK.eos_id


def run(records, **options):
    counts = Counter()
    cfg = Config(data=DataConfig(**({"task": "chat"} | options)))
    check_fields(TASKS[cfg.task.name], [{"source": "f:1"} | record for record in records], cfg.data, TASKS)
    sourced = [{"source": "f:1"} | record for record in records]
    made = [
        types.SimpleNamespace(**e.columns)
        for e in input_pipeline.make_examples(TASKS[cfg.task.name], sourced, TOK, cfg, counts)
    ]
    assert counts["examples"] == len(made) and counts["documents"] == len(records)
    for example in made:
        assert example.tokens.dtype == example.targets.dtype == np.int32 and example.loss_weights.dtype == np.float32
        assert example.tokens.shape == example.targets.shape == example.loss_weights.shape
    return made, {key: value for key, value in counts.items() if key not in ("examples", "documents")}


def conversation(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_text_is_shifted_once_and_learns_its_end():
    (example,), counts = run([{"text": "hello <s> two"}], task="text")
    ids = TOK.encode("hello <s> two")
    assert example.tokens.tolist() == [BOS, *ids]
    assert example.targets.tolist() == [*ids, EOS]
    assert example.loss_weights.tolist() == [1] * (len(ids) + 1)
    assert counts == {}


def test_long_text_goes_on_in_pieces_and_loses_nothing():
    text = "one two three 5, " * 20
    whole = [BOS, *TOK.encode(text), EOS]
    pieces, counts = run([{"text": text}, {"text": "bye"}], task="text", seq_len=7)
    pieces = pieces[:-1]
    assert counts == {"cut_in_pieces": 1}
    assert all(len(piece.tokens) == 7 for piece in pieces[:-1]) and len(pieces[-1].tokens) <= 7
    assert np.concatenate([piece.tokens for piece in pieces]).tolist() == whole[:-1]
    assert np.concatenate([piece.targets for piece in pieces]).tolist() == whole[1:]
    (uncut,), counts = run([{"text": text}], task="text", seq_len=7, packing="concat")
    assert uncut.tokens.tolist() == whole[:-1] and counts == {}


def test_examples_without_a_target_are_dropped_and_counted():
    records = [conversation(("user", "hello")), conversation(), conversation(("system", "say"), ("user", "two"))]
    assert run(records) == ([], {"dropped_no_target": 3})
    assert run([{"text": ""}], task="text") == ([], {"dropped_empty": 1})


def test_wrong_records_are_named():
    with pytest.raises(ConfigError, match=r"f:1: 'data.task' is chat, which reads 'messages', .* has text; set data.t"):
        run([{"text": "hello"}])
    with pytest.raises(ConfigError, match=r"set data\.task=.*chat"):
        run([conversation(("user", "hello"))], task="text")
    with pytest.raises(DataError, match="f:1: unknown role 'robot', expected one of system, user, assistant, tool"):
        run([conversation(("robot", "hello"))])


def test_texts_are_all_that_a_tokenizer_may_learn_from():
    assert list(TASKS["causal_lm"].texts({"text": "one", "source": "f"})) == ["one"]
    assert list(TASKS["chat"].texts(conversation(("user", "two"), ("assistant", "three")))) == ["two", "three"]
    pair = {"text": "one", "text_pair": "two", "label": "no"}
    assert list(TASKS["classification"].texts(pair)) == ["one", "two"]


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_change_neither_examples_nor_their_order_nor_counts(threads):
    cfg = Config(data=DataConfig(task="text", seq_len=16))
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
    made = input_pipeline.make_examples(
        TASKS["chat"], chats, TOK, Config(data=DataConfig(task="chat")), Counter(), threads
    )
    with pytest.raises(DataError, match="unknown role 'wrong'"):
        list(made)
