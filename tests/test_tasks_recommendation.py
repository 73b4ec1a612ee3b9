"""Next-item recommendation: the split, masking, and the loss and ranks of held-out rows."""

import dataclasses
import functools
import json
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lm import input_pipeline
from lm import run as run_lib
from lm.config import Config, DataConfig, MeshConfig, ModelConfig, TokenizerConfig
from lm.config.schema import ConfigError
from lm.data import loader
from lm.data.readers import interactions, registry
from lm.data.record import DataError
from lm.models import transformer
from lm.parallel.mesh import make_mesh
from lm.tasks import TASKS, recommendation
from lm.tasks.recommendation import ItemVocabulary
from tests import toys

MISSED = 2**31 - 1


def write(path: Path, rows: list[tuple], header: str = "user,item,time") -> Path:
    lines = [header] if header else []
    path.write_text("\n".join([*lines, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


def load(path: Path, **data) -> registry.Split:
    return registry.load(DataConfig(format="interactions", path=str(path), **data))


def make_config(vocabulary: ItemVocabulary, task: str = "next_item", seq_len: int = 6, **model) -> Config:
    shape = {"num_layers": 2, "embed_dim": 16, "num_heads": 2, "mlp_dim": 24}
    kind = {"next_item": "decoder", "masked_item": "encoder"}[task]
    resolved = transformer.resolve(
        ModelConfig(**(shape | {"kind": kind} | model)), vocab_size=vocabulary.vocab_size, seq_len=seq_len
    )
    options = toys.task(task, **({"mask_rate": 0.2} if task == "masked_item" else {}))
    return Config(task=options, data=DataConfig(seq_len=seq_len, packing="pad"), model=resolved)


# Reading and splitting --------------------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(st.sampled_from("uvw"), st.sampled_from("abcde"), st.integers(-2, 3) | st.sampled_from([0.5, 1e9])),
        min_size=1,
        max_size=25,
    )
)
@example([("u", "a", 1), ("u", "b", 1), ("u", "c", 0)])
def test_the_second_last_item_of_each_user_is_for_validation_and_the_last_for_testing(rows):
    records = [{"user": u, "item": i, "time": t, "source": f"f:{n}"} for n, (u, i, t) in enumerate(rows)]
    found = interactions.leave_one_out(iter(records))
    train, valid, test, short = {}, {}, {}, []
    for user in "uvw":
        own = [(time, n, item) for n, (u, item, time) in enumerate(rows) if u == user]
        ordered = []
        while own:  # the earliest; ties by order in the file
            ordered.append(own.pop(own.index(min(own)))[2])
        if len(ordered) >= 3:
            train[user] = ordered[:-2]
            valid[user], test[user] = (ordered[:-2], ordered[-2]), (ordered[:-1], ordered[-1])
        elif ordered:
            short.append(len(ordered))
    assert {r["user"]: r["items"] for r in found.train} == train and len(found.train) == len(train)
    assert {r["user"]: (r["items"], r["target"]) for r in found.valid} == valid
    assert {r["user"]: (r["items"], r["target"]) for r in found.test} == test
    assert all("target" not in record for record in found.train)
    assert (found.users_left_out, found.interactions_left_out) == (len(short), sum(short))
    by_source = {record["source"]: record for record in records}
    assert all(by_source[r["source"]]["item"] == r["target"] for r in (*found.valid, *found.test))


def test_a_users_interactions_are_joined_across_files_and_column_names(tmp_path):
    write(tmp_path / "a.csv", [(5, "u", "x", "c"), (4, "v", "x", "a")], "ts,uid,rating,movie")
    write(tmp_path / "b.csv", [(3, "u", "x", "b"), (9, "u", "x", "d"), (3, "u", "x", "e")], "ts,uid,rating,movie")
    split = load(tmp_path, rename=(("uid", "user"), ("movie", "item"), ("ts", "time")))
    assert [(r["items"], r["user"]) for r in split.train] == [(["b", "e"], "u")]
    (valid,), (test,) = split.valid, split.test
    assert (valid["items"], valid["target"], valid["source"]) == (["b", "e"], "c", f"{tmp_path / 'a.csv'}:2")
    assert (test["items"], test["target"], test["source"]) == (["b", "e", "c"], "d", f"{tmp_path / 'b.csv'}:3")
    assert "1 users, split by time" in split.report
    assert "left out: 1 users of fewer than 3 items, with 1 items" in split.report
    bare = tmp_path / "u.data"  # as MovieLens has it
    bare.write_text("".join(f"7\tm{n}\t5\t{900 - n}\n" for n in range(4)))
    split = load(bare, rename=(("1", "user"), ("2", "item"), ("4", "time")))
    assert (split.test[0]["items"], split.test[0]["target"]) == (["m3", "m2", "m1"], "m0")


def test_times_are_compared_exactly(tmp_path):
    start = 1_600_000_000_000_000_000  # nanoseconds: equal as floats
    path = write(tmp_path / "a.csv", [("u", f"i{n}", start + n) for n in (3, 1, 2, 0)])
    assert load(path).test[0]["items"] == ["i0", "i1", "i2"]


@pytest.mark.parametrize("time", ["noon", "nan", "inf", "2020-01-01", "1e999"])
def test_a_time_that_is_not_a_number_is_refused_by_name_or_counted(tmp_path, time):
    rows = [("u", "a", 1), ("u", "b", 2), ("u", "x", time), ("u", "c", 3)]
    path = write(tmp_path / "a.csv", rows)
    with pytest.raises(DataError, match=rf"{path}:4: wrong type: 'time' is '{time}'; expected a finite number"):
        load(path)
    split = load(path, max_bad_records=100)
    assert split.test[0]["items"] == ["a", "b"] and f"1 x wrong type\n    {path}:4: " in split.report


def test_unreadable_tables_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"found 'user', 'item', 'when'; expected .* 'user' and 'item' and 'time'"):
        load(write(tmp_path / "a.csv", [("u", "a", 1)], "user,item,when"))
    with pytest.raises(DataError, match="no train record"):
        load(write(tmp_path / "a.csv", [("u", "a", 1), ("u", "b", 2)]))
    with pytest.raises(ConfigError, match=r"'data.eval_path' is .* does not read it"):
        load(tmp_path / "a.csv", eval_path="x")


# Vocabulary -----------------------------------------------------------------------------------------------------------

CHOSEN = [*("b" * 4), *("a" * 4), *("d" * 7), "e", "c"]
VOCABULARY = dataclasses.replace(recommendation.train(CHOSEN, TokenizerConfig(vocab_size=10)), extra_ids=1)


def test_a_saved_vocabulary_loads_unchanged_with_the_same_hash(tmp_path):
    assert [item for item, _ in VOCABULARY.items] == ["d", "a", "b", "c", "e"]
    assert [VOCABULARY.encode(item) for item in "dabcex"] == [3, 4, 5, 6, 7, 2]
    assert [VOCABULARY.piece(i) for i in (0, 1, 2, 3, 7, 8, 10)] == [
        *("<|pad|>", "<|start|>", "<|unseen|>", "d", "e", "<|unused_8|>", "<|mask|>")
    ]
    assert np.flatnonzero(~VOCABULARY.is_control_V).tolist() == [3, 4, 5, 6, 7]
    assert (VOCABULARY.vocab_size, len(VOCABULARY.is_control_V), VOCABULARY.mask_id) == (11, 11, 10)
    VOCABULARY.save(tmp_path / "items.json")
    back = recommendation.load(tmp_path / "items.json")
    assert back == dataclasses.replace(VOCABULARY, extra_ids=0) and back.hash == VOCABULARY.hash
    others = [recommendation.train([*CHOSEN, "c"], TokenizerConfig(vocab_size=10)), dataclasses.replace(back, size=11)]
    assert len({back.hash, *(other.hash for other in others)}) == 3
    with pytest.raises(ConfigError, match=r"'tokenizer.vocab_size' is 7, but .* has 5 items; set it to at least 8"):
        recommendation.train(CHOSEN, TokenizerConfig(vocab_size=7))


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["items"].append(["d", 1]),  # twice
        lambda c: c["items"].reverse(),
        lambda c: c.update(size=7),
        lambda c: c.pop("items"),
        lambda c: c.update(items=[["d"]]),
    ],
)
def test_a_damaged_vocabulary_is_refused(tmp_path, change):
    VOCABULARY.save(tmp_path / "items.json")
    content = json.loads((tmp_path / "items.json").read_text())
    change(content)
    (tmp_path / "items.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=f"{tmp_path}/items.json is"):
        recommendation.load(tmp_path / "items.json")
    for content in ("[" * 100_000, '{"items": [["a", 1e999]], "size": 9}', '{"items": [], "size": 1e999}', "", "7"):
        (tmp_path / "items.json").write_text(content)
        with pytest.raises(ConfigError, match=f"{tmp_path}/items.json is not a vocabulary of items"):
            recommendation.load(tmp_path / "items.json")


@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=40))
def test_the_popularity_rank_counts_ties(chosen):
    vocabulary, counts = recommendation.train(chosen, TokenizerConfig(vocab_size=20)), Counter(chosen)
    for item, count in counts.items():
        assert vocabulary.popularity_rank(item) == sum(other >= count for other in counts.values())
    assert vocabulary.popularity_rank("never") == MISSED


# Examples -------------------------------------------------------------------------------------------------------------


def example_of(task: str, chosen: str, target: str | None = None, seq_len: int = 6):
    """The example made from one user, as text, and the counts."""
    record = {"items": list(chosen), "user": "u", "source": "f:1"} | ({"target": target} if target else {})
    counts: Counter[str] = Counter()
    cfg = make_config(VOCABULARY, task, seq_len)
    [made] = TASKS[task].examples(record, VOCABULARY, cfg, counts)
    return made, +counts


def show(ids) -> str:
    names = {0: "0", 1: "^", 2: "?", 10: "_"}
    return "".join(names.get(int(i)) or VOCABULARY.piece(i) for i in ids)


@pytest.mark.parametrize(
    ("chosen", "target", "tokens", "targets", "weights", "counted"),
    [
        ("abc", None, "^ab", "abc", "111", {}),
        ("abc", "d", "^abc", "abcd", "0001", {}),
        ("abcdea", None, "^abcde", "abcdea", "111111", {}),
        ("abcdeab", None, "abcdea", "bcdeab", "111111", {"history_cut": 1}),
        ("abcdea", "b", "abcdea", "bcdeab", "000001", {"history_cut": 1}),
        ("axyb", "c", "^ab", "abc", "001", {"items_unseen": 2}),
        ("xy", "c", "^", "c", "1", {"items_unseen": 2}),
        ("ab", "x", "^ab", "ab?", "001", {"targets_unseen": 1}),
        ("xab", None, "^a", "ab", "11", {"items_unseen": 1}),
    ],
)
def test_each_item_is_predicted_from_those_before_it(chosen, target, tokens, targets, weights, counted):
    made, counts = example_of("next_item", chosen, target)
    assert (show(made.columns["tokens"]), show(made.columns["targets"])) == (tokens, targets)
    assert made.columns["loss_weights"].tolist() == list(map(float, weights))
    assert counts == counted
    assert made.meta == (VOCABULARY.popularity_rank(target) if target else None)


@pytest.mark.parametrize(
    ("chosen", "target", "tokens", "targets", "counted"),
    [
        ("abc", "d", "abc_", "abcd", {}),
        ("abcdeab", "d", "cdeab_", "cdeabd", {"history_cut": 1}),
        ("xy", "c", "_", "c", {"items_unseen": 2}),
        ("axb", "x", "ab_", "ab?", {"items_unseen": 1, "targets_unseen": 1}),
    ],
)
def test_only_the_last_item_of_a_held_out_user_is_masked(chosen, target, tokens, targets, counted):
    made, counts = example_of("masked_item", chosen, target)
    row = made.columns | {"segment_ids": np.ones(len(tokens), np.int32)}
    for seed in range(20):
        cfg = make_config(VOCABULARY, "masked_item")
        hidden = recommendation.mask_items(row, np.random.default_rng(seed), VOCABULARY, cfg)
        assert (show(hidden["tokens"]), show(hidden["targets"])) == (tokens, targets)
        assert hidden["loss_weights"].tolist() == [0.0] * (len(tokens) - 1) + [1.0]
    assert counts == counted


def test_a_vocabulary_without_a_mask_is_refused_for_the_task_that_hides_items():
    cfg = make_config(VOCABULARY, "masked_item")
    TASKS["masked_item"].check_tokenizer(cfg, VOCABULARY)
    none = dataclasses.replace(VOCABULARY, extra_ids=0)
    TASKS["next_item"].check_tokenizer(cfg, none)
    with pytest.raises(ConfigError, match=r"task.name=masked_item needs a mask"):
        TASKS["masked_item"].check_tokenizer(cfg, none)


@pytest.mark.parametrize(("n", "hidden"), [(1, 1), (3, 1), (10, 2), (20, 4)])
def test_training_masks_a_share_of_the_items_and_sometimes_only_the_last_one(n, hidden):
    length, draws = 24, 3000
    tokens = np.pad(np.random.default_rng(0).integers(3, 8, n), (0, length - n)).astype(np.uint8)
    row = {"tokens": tokens, "segment_ids": (np.arange(length) < n).astype(np.uint8), "held_out": np.array(0)}
    cfg = make_config(VOCABULARY, "masked_item", length)
    last_alone, chosen = 0, np.zeros(length)
    for seed in range(draws):
        out = recommendation.mask_items(row, np.random.default_rng([1, seed]), VOCABULARY, cfg)
        at = np.flatnonzero(out["loss_weights"])
        assert (out["tokens"][at] == VOCABULARY.mask_id).all() and (out["targets"] == tokens).all()
        kept = np.setdiff1d(np.arange(length), at)
        assert (out["tokens"][kept] == tokens[kept]).all()
        assert len(at) == hidden or at.tolist() == [n - 1]
        last_alone += len(at) == 1
        chosen[at] += 1
    assert chosen[n:].sum() == 0
    rate = hidden / n  # five standard deviations
    if hidden > 1:
        assert abs(last_alone / draws - 1 / 11) < 5 * np.sqrt(1 / 11 / draws)
    others = chosen[: n - 1] / draws
    assert np.all(np.abs(others - rate * 10 / 11) < 5 * np.sqrt(rate / draws))


def test_the_held_out_items_are_in_no_training_row(tmp_path):
    rows = [(f"u{u}", f"i{u}_{n}", n) for u in range(9) for n in range(3 + u % 4)]  # every item its own
    split = load(write(tmp_path / "a.csv", rows))
    vocabulary = recommendation.train((i for r in split.train for i in r["items"]), TokenizerConfig(vocab_size=90))
    held_out = {r["target"] for r in (*split.valid, *split.test)}
    assert held_out == {f"i{u}_{n + u % 4}" for u in range(9) for n in (1, 2)}
    assert not held_out & {item for item, _ in vocabulary.items}
    data = input_pipeline.build(make_config(vocabulary, seq_len=8), vocabulary, split)
    assert data.report["valid"]["targets_unseen"] == data.report["valid"]["targets"] == 9
    assert data.report["train"]["targets"] == sum(1 + u % 4 for u in range(9))
    assert data.valid.meta == [MISSED] * 9


# Losses ---------------------------------------------------------------------------------------------------------------


def brute_rank(logits: np.ndarray, target: int, candidates: set[int]) -> int:
    """Sorted best first, with the target after its ties."""
    if target not in candidates:
        return MISSED
    order = sorted(candidates, key=lambda i: (-logits[i], i == target))
    return 1 + order.index(target)


HISTORIES = [("abc", "d"), ("dd", "e"), ("abcdea", "b"), ("x", "a"), ("ab", "x"), ("ed", "c"), ("c", "c"), ("bad", "a")]


def batch_of(task: str, histories=HISTORIES):
    """The held-out rows of some users, packed and masked."""
    records = [{"items": list(h), "user": "u", "source": "f", "target": t} for h, t in histories]
    cfg = make_config(VOCABULARY, task)
    data = input_pipeline.build(cfg, VOCABULARY, registry.Split(records, records, "", ""))
    [batch] = loader.eval_batches(
        data.valid, batch_size=len(records), local_rows=np.arange(len(records)), max_tokens=0, seq_len=6
    )
    return cfg, batch


@functools.cache
def loss_of(task: str):
    """(apply, loss function, parameters), compiled for eight rows."""
    cfg = make_config(VOCABULARY, task, num_layers=1)
    model = transformer.text_model(cfg.model, jnp.float32)
    params = jax.jit(model.init)(jax.random.key(1))
    params = jax.tree.map(lambda x: x + 0.1 * np.random.default_rng(0).standard_normal(x.shape, np.float32), params)
    loss = TASKS[task].loss(model.apply, cfg, VOCABULARY)
    return jax.jit(model.apply), jax.jit(lambda params, batch: loss(params, batch, None)), params


@pytest.mark.parametrize("task", ["next_item", "masked_item"])
def test_loss_and_ranks_of_held_out_rows_match_float64_on_one_device_and_eight(task):
    cfg, batch = batch_of(task)
    apply, loss_fn, params = loss_of(task)
    out = jax.device_get(apply(params, batch))
    logits = out.hidden_BxLxD.astype(np.float64) @ out.unembed_DxV.astype(np.float64)[:, : VOCABULARY.vocab_size]
    nll, ranks = 0.0, []
    for row, (history, target) in enumerate(HISTORIES):
        length = sum(item in "abcde" for item in history) + 1
        own = logits[row, min(length, 6) - 1]
        target_id = VOCABULARY.encode(target)
        ranks.append(brute_rank(own, target_id, {3, 4, 5, 6, 7}))
        if target in "abcde":
            nll += np.log(np.exp(own).sum()) - own[target_id]
    for count in (1, 8):
        mesh = make_mesh(MeshConfig(data=count), jax.devices()[:count])
        with jax.set_mesh(mesh):
            terms = jax.device_get(loss_fn(params, run_lib.placer(mesh, 8)(batch)))
        assert terms.weight == 7  # the unseen target has no loss, but counts as a miss
        assert terms.sum == pytest.approx(nll, rel=2e-6)
        assert terms.outputs["rank"].tolist() == ranks and ranks[4] == MISSED
    score = TASKS["next_item"].scores(terms.outputs, [1, 2, 3, MISSED], cfg)
    assert score["hr_at_10"] == 7 / 8 and score["popularity_hr_at_10"] == 3 / 4
    assert tuple(score) == TASKS["next_item"].score_names(cfg)


def test_a_causal_model_does_not_see_later_items_and_no_model_sees_its_target():
    _, batch = batch_of("next_item", [("abcd", "e"), ("abca", "b")] * 4)
    apply, _, params = loss_of("next_item")
    hidden = jax.device_get(apply(params, batch).hidden_BxLxD)
    np.testing.assert_array_equal(hidden[0, :4], hidden[1, :4])  # ^ a b c
    assert np.abs(hidden[0, 4] - hidden[1, 4]).max() > 1e-3
    _, batch = batch_of("masked_item", [("abcd", "e"), ("abcd", "b")] * 4)
    apply, loss_fn, params = loss_of("masked_item")
    hidden = jax.device_get(apply(params, batch).hidden_BxLxD)
    np.testing.assert_array_equal(hidden[0, :5], hidden[1, :5])
    padded = batch | {"tokens": np.where(batch["segment_ids"] > 0, batch["tokens"], 5)}
    assert loss_fn(params, padded).sum == loss_fn(params, batch).sum
