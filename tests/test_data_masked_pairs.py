"""Pairs of neighbouring sentences, from documents to the loss on them."""

from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm import build, input_pipeline, losses, program
from lm.data import loader, tokenizer
from lm.data.readers import registry
from lm.tasks import TASKS, masked_lm
from tests import toys

SENTENCES = ["The dog ran.", "Was it red?", "Not at all!\n", "A cat sat", " on the mat", ".", "\n\nIt slept. ", "Yes."]


@pytest.fixture(scope="module")
def words():
    trained = tokenizer.train([" ".join(SENTENCES)] * 3, 300, 10_000)
    return tokenizer.Tokenizer(trained.model, extra_ids=1)


def settings(**changes):
    base = {"task__name": "masked_lm_pairs", "model__kind": "encoder", "data__packing": "pad"}
    return toys.recipe(Path("none"), **base | {"tokenizer__extra_ids": 1, "data__batch_size": 8} | changes)


def squeezed(text):
    return " ".join(text.split())


@given(parts=st.lists(st.sampled_from(SENTENCES), max_size=30), seq_len=st.integers(5, 40))
def test_pairs_are_the_document_in_order_split_near_its_middle(words, parts, seq_len):
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
        # No other end of a sentence is nearer to the middle.
        middle, total = int((row["type_ids"] == 0).sum()), len(row["tokens"])
        sentences = masked_lm._BETWEEN_SENTENCES.split(record["text"])
        ends = np.cumsum([len(words.encode(s if s[:1].isspace() else f" {s}")) for s in sentences])
        starts = {0, *ends.tolist()}
        if not counts:
            at = sum(len(other["tokens"]) for other in rows[: next(i for i, r in enumerate(rows) if r is row)])
            inside = [end - at for end in starts if at < end < at + total]
            assert abs(2 * middle - total) == min(abs(2 * end - total) for end in inside)


def test_every_stretch_begins_with_white_space_so_that_none_tells_its_place(words):
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
    tokens = batch["targets"][row][batch["segment_ids"][row] > 0]  # before anything was hidden
    types = batch["type_ids"][row][batch["segment_ids"][row] > 0]
    return tuple(tokens[types == 0][1:-1]), tuple(tokens[types == 1][:-1])


@pytest.mark.parametrize("pairs", ["next", "order"])
def test_the_label_says_whether_b_follows_a_in_the_document(words, pairs):
    cfg = settings(task__pairs=pairs, data__seq_len=64)
    data, made = batches(cfg, words, 12)
    rows, true = data.train.rows, set()
    for tokens, types, real in zip(rows["tokens"], rows["type_ids"], rows["segment_ids"] > 0, strict=True):
        true.add((tuple(tokens[real & (types == 0)]), tuple(tokens[real & (types == 1)])))
    labels, spoilt = [], set()
    for batch in made:
        for row in range(8):
            first, second = halves(batch, row)
            pair = (second, first) if pairs == "order" and batch["labels"][row] else (first, second)
            assert (pair in true) == (pairs == "order" or not batch["labels"][row])
            labels.append(batch["labels"][row])
            if pairs == "next" and batch["labels"][row]:  # B of another pair, whose end may be cut
                assert any(b[: len(second)] == second for _, b in true)
                spoilt.add(second)
    assert pairs == "order" or len(spoilt) > 8, "any other row is as good"
    assert 0.3 < np.mean(labels) < 0.7
    again = list(loader.eval_batches(data.valid, batch_size=4, local_rows=np.arange(4), max_tokens=0, seq_len=64))
    twice = list(loader.eval_batches(data.valid, batch_size=4, local_rows=np.arange(4), max_tokens=0, seq_len=64))
    for one, other in zip(again, twice, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)


def test_the_loss_is_that_of_the_tokens_and_of_the_pairs(words, tmp_path):
    """Every hidden token counts the label of its row once: computed by hand from the logits."""
    cfg = build.plan(settings(model__num_layers=1, model__dropout=0.0, data__seq_len=48), tmp_path).cfg
    _, [batch] = batches(cfg, words, 1)
    batch["loss_weights"][2] = 0  # a row that only fills up
    model = program.make_model(cfg, np.float32)
    params = model.init(jax.random.key(0))
    loss = jax.jit(TASKS["masked_lm"].loss(model.apply, cfg, words))
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
