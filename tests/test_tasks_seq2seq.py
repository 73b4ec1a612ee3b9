"""Rows of an encoder-decoder and of a prefix model, from records to batches."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lm import checks, input_pipeline
from lm import run as run_lib
from lm.config.schema import ConfigError
from lm.data import loader, tokenizer
from lm.data.readers import registry
from lm.tasks import seq2seq
from tests import toys

WORDS = ["ein", "hund", "und", "eine", "katze", "a", "dog", "and", "cat"]
PAIRS = [("a dog", "ein hund"), ("a cat", "eine katze"), ("a dog and a cat", "ein hund und eine katze")]


@pytest.fixture(scope="module")
def words():
    trained = tokenizer.train([" ".join(WORDS)] * 3, 290, 10_000)
    return tokenizer.SentencePiece(trained.model, extra_ids=20)


def settings(**changes):
    base = {"task__name": "translation", "model__kind": "encoder_decoder"}
    values = {"data__format": "jsonl", "data__packing": "pad", "tokenizer__extra_ids": 20}
    return toys.recipe(Path("none"), **base | values | changes)


def make(words, record, **changes):
    counts = Counter[str]()
    found = seq2seq.translation({"source": "x:1", **record}, words, settings(**changes), counts)
    return [example.columns for example in found], counts


def test_a_translation_pair_becomes_inputs_and_a_shifted_target(words):
    [row], counts = make(words, {"text": PAIRS[0][0], "target": PAIRS[0][1]})
    source, target = (words.encode(text) for text in PAIRS[0])
    assert row["inputs"].tolist() == [*source, words.eos_id]
    assert row["input_positions"].tolist() == list(range(len(source) + 1))
    assert row["input_segment_ids"].tolist() == [1] * (len(source) + 1)
    assert row["tokens"].tolist() == [words.bos_id, *target]
    assert row["targets"].tolist() == [*target, words.eos_id]
    assert row["loss_weights"].tolist() == [1.0] * (len(target) + 1)
    assert not counts
    assert seq2seq.TRANSLATION.prompt(PAIRS[0][0], words) == row["inputs"].tolist(), "as generation reads it"


def test_a_long_pair_is_cut_before_eos_or_dropped(words):
    record = {"text": " ".join(WORDS), "target": "ein hund"}
    [row], counts = make(words, record, data__seq_len=6, data__target_len=3)
    assert row["inputs"].tolist() == [*words.encode(record["text"])[:5], words.eos_id]
    assert row["targets"].tolist() == [*words.encode("ein hund")[:2], words.eos_id]
    assert len(row["tokens"]) == 3
    assert counts == {"source_cut": 1, "target_cut": 1}
    rows, counts = make(words, record, data__seq_len=6, data__overlong="drop")
    assert (rows, counts) == ([], {"dropped_overlong": 1})


def batches(cfg, words, records, count):
    data = input_pipeline.build(cfg, words, registry.Split(records, records, "", ""))
    rows = np.arange(cfg.data.batch_size)
    stream = loader.train_batches(data, batch_size=len(rows), start_example=0, local_rows=rows, seed=cfg.seed)
    made = [next(stream) for _ in range(count)]
    stream.close()
    return data, made


@pytest.mark.parametrize("packing", ["pad", "concat"])
def test_spans_are_drawn_anew_in_every_epoch_and_no_token_is_lost(words, packing):
    cfg = settings(task__name="span_corruption", data__packing=packing, data__batch_size=2, data__seq_len=16)
    records = [{"text": " ".join(np.random.default_rng(n).choice(WORDS, 40)), "source": str(n)} for n in range(3)]
    data, made = batches(cfg, words, records, 40)
    assert data.train.rows["tokens"].shape[1] == seq2seq.raw_len(cfg) > 16
    rows = data.train.rows
    stored = [row[of > 0].tolist() for row, of in zip(rows["tokens"], rows["segment_ids"], strict=True)]
    whole = [token for record in records for token in (*words.encode(record["text"]), words.eos_id)]
    assert sorted(token for row in stored for token in row) == sorted(whole)
    seen = set()
    for batch in made:
        assert {key: value.shape for key, value in batch.items()} == {
            key: (2, *shape) for key, (shape, _) in seq2seq.columns(cfg).items()
        } | {"row_weights": (2,), "example_index": (2,)}
        for row in range(2):
            hidden = [t for t in batch["targets"][row] if t in words.sentinel_ids]
            assert hidden and hidden == [t for t in batch["inputs"][row] if t in words.sentinel_ids]
            seen.add(tuple(batch["inputs"][row]))
    assert len(seen) > 2 * len(stored), "each row is hidden in several ways"


def test_prefixes_are_drawn_for_packed_rows(words):
    cfg = settings(task__name="prefix_lm", model__kind="prefix_decoder", data__packing="best_fit")
    records = [{"text": text, "source": "x"} for pair in PAIRS for text in pair]
    _, made = batches(cfg, words, records, 4)
    for batch in made:
        assert (batch["is_prefix"].sum(axis=1) > 0).all()
        assert (batch["is_prefix"] <= (batch["segment_ids"] > 0)).all()
        hidden = (batch["segment_ids"] > 0) & (batch["loss_weights"] == 0)
        assert (hidden <= (batch["is_prefix"] > 0)).all()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"model__kind": "prefix_decoder", "task__name": "causal_lm"},
            "'model.kind' is prefix_decoder, which does not fit task.name=causal_lm; use decoder",
        ),
        (
            {"model__kind": "decoder", "task__name": "prefix_lm"},
            "'model.kind' is decoder, which does not fit task.name=prefix_lm; use prefix_decoder",
        ),
        (
            {"model__kind": "decoder"},
            "'model.kind' is decoder, which does not fit task.name=translation; use encoder_decoder",
        ),
        ({"task__name": "chat"}, "'model.kind' is encoder_decoder, which does not fit task.name=chat; use decoder"),
        ({"task__name": "span_corruption", "data__target_len": 4}, "'data.target_len' is 4"),
    ],
)
def test_contradicting_options_are_refused(changes, says):
    with pytest.raises(ConfigError, match=says):
        checks.fit(settings(**changes))
    checks.fit(settings())


def test_the_position_table_has_room_for_the_longer_side(tmp_path):
    cfg = settings(data__seq_len=8, data__target_len=12)
    assert run_lib.plan(cfg, tmp_path).cfg.model.max_len == 12
    with pytest.raises(ConfigError, match=r"'model.max_len' \(10\) is shorter"):
        settings(data__seq_len=8, data__target_len=12, model__max_len=10)
