"""lm/data/augment.py: what a changed row still holds, and which configs are refused."""

import dataclasses
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm import checks, config, input_pipeline
from lm.config.schema import ConfigError
from lm.data import augment, loader, tokenizer
from lm.data.readers import registry
from lm.data.record import DataError
from lm.tasks.classification import encode_pair
from tests import toys

WORDS = ["good", "bad", "film", "the", "a", "goodness", "very", "na\u00efve", "plot", "twist"]
SENTENCES = toys.task("classification", labels=("0", "1"))
MASKED = toys.task("masked_lm")
TEXTS = [" ".join(WORDS[i % 3 :]) + f", {i}." for i in range(30)]
TOK = dataclasses.replace(tokenizer.train(TEXTS, 330, 100_000), extra_ids=2)
L = 24
SYNONYMS = "good\tfine\nvery good\texcellent\nfilm\tmotion picture\nbad\tawful\nbad\tpoor\n"


def make_row(first, second=None, length=L):
    columns = encode_pair(first, second, TOK, length, Counter())
    n = len(columns["tokens"])
    columns |= {"segment_ids": np.ones(n, np.int32), "positions": np.arange(n, dtype=np.int32)}
    return {name: np.pad(x, (0, length - n)) for name, x in columns.items()} | {"labels": np.array(1, np.int32)}


def make_config(*named, task=SENTENCES, packing="pad", synonyms="", **data):
    data = config.DataConfig(packing=packing, augment=named, synonyms=synonyms, **data)
    return config.Config(task=task, data=data)


def change(name, row, seed, strength, cfg=None):
    cfg = cfg or make_config((name, strength))
    return augment.AUGMENTATIONS[name].change(row, np.random.default_rng(seed), strength, TOK, cfg)


def sentences(row):
    """The ids of each sentence, control symbols left out."""
    real = (row["segment_ids"] > 0) & ~TOK.is_control_V[row["tokens"]]
    return [row["tokens"][real & (row["type_ids"] == i)].tolist() for i in (0, 1)]


def controls(row):
    is_control = TOK.is_control_V[row["tokens"]] & (row["segment_ids"] > 0)
    return list(zip(row["tokens"][is_control].tolist(), row["type_ids"][is_control].tolist(), strict=True))


def is_subsequence(part, whole):
    left = iter(whole)
    return all(item in left for item in part)


texts = st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join)
strengths = st.floats(0.01, 1.0)


@pytest.mark.parametrize("name", ["delete", "swap", "cutoff"])
@settings(max_examples=60)
@given(first=texts, second=st.none() | texts, strength=strengths, seed=st.integers(0, 99))
def test_an_augmented_row_is_a_valid_row(name, first, second, strength, seed):
    row = make_row(first, second)
    before = {key: x.copy() for key, x in row.items()}
    out = change(name, row, seed, strength)
    for key, x in before.items():
        np.testing.assert_array_equal(row[key], x)  # the stored row is not written to
        assert (out[key].dtype, out[key].shape) == (x.dtype, x.shape)
    np.testing.assert_equal(change(name, row, seed, strength), out)  # nothing but its arguments counts
    n = int((out["segment_ids"] > 0).sum())
    assert out["segment_ids"].tolist() == [1] * n + [0] * (L - n)
    assert out["positions"].tolist() == [*range(n), *[0] * (L - n)]
    assert not out["tokens"][n:].any() and not out["type_ids"][n:].any()
    assert controls(out) == controls(row) and out["tokens"][0] == TOK.bos_id and out["tokens"][n - 1] == TOK.eos_id
    for old, new in zip(sentences(row), sentences(out), strict=True):
        assert bool(old) == bool(new)  # no sentence is emptied
        if name == "swap":
            assert sorted(new) == sorted(old)
        else:
            assert is_subsequence(new, old)


def test_delete_drops_tokens_with_the_given_probability():
    row = make_row("the film the plot the twist the bad the good")
    total = len(sentences(row)[0])
    left = [len(sentences(change("delete", row, seed, 0.3))[0]) for seed in range(400)]
    assert abs(1 - np.mean(left) / total - 0.3) < 0.03
    for strength in (0.1, 0.5):
        gone = {total - len(sentences(change("cutoff", row, seed, strength))[0]) for seed in range(40)}
        assert gone == {max(1, round(strength * total))}


def test_cutoff_removes_a_span_that_may_be_anywhere():
    row = make_row("the film the plot")
    old = sentences(row)[0]
    size = round(0.5 * len(old))
    runs = {tuple(old[:i] + old[i + size :]) for i in range(len(old) - size + 1)}
    assert {tuple(sentences(change("cutoff", row, seed, 0.5))[0]) for seed in range(200)} == runs


def test_swap_exchanges_two_tokens_of_one_sentence():
    row = make_row("the film", "a twist")
    for seed in range(30):
        out = change("swap", row, seed, 0.01)
        moved = np.flatnonzero(out["tokens"] != row["tokens"])
        assert len(moved) in (0, 2) and len(set(row["type_ids"][moved].tolist())) <= 1


@pytest.fixture
def synonym_file(tmp_path):
    path = tmp_path / "synonyms.tsv"
    path.write_text(SYNONYMS)
    return str(path)


def by_text(text, table):
    """What the file says, on the text: the longest word first, whole words only."""
    words = "|".join(re.escape(word) for word in sorted(table, key=len, reverse=True))
    return re.sub(rf"(?<!\w)({words})(?!\w)", lambda match: table[match[1]][0], text)


@pytest.mark.parametrize(
    "text", ["good film", "very good, very goodness", "a good good-film: film", "filmgood na\u00efvegood"]
)
def test_synonyms_equal_replacement_in_the_text(tmp_path, text):
    path = tmp_path / "one.tsv"
    path.write_text("good\tfine\ngood film\thit\nvery good\texcellent\nfilm\tmotion picture\n")
    cfg = make_config(("synonyms", 1.0), synonyms=str(path))
    out = change("synonyms", make_row(text, "the film", 60), 0, 1.0, cfg)
    table = augment.read_synonyms(str(path))
    np.testing.assert_equal(out, make_row(by_text(text, table), by_text("the film", table), 60))


def test_a_byte_order_mark_in_the_synonym_file_is_ignored(tmp_path):
    (tmp_path / "a.tsv").write_text("\ufeffgood\tfine\n")
    assert augment.read_synonyms(str(tmp_path / "a.tsv")) == {"good": ["fine"]}


def test_every_synonym_is_drawn_and_strength_is_the_probability(synonym_file):
    cfg = make_config(("synonyms", 0.3), synonyms=synonym_file)
    row = make_row("bad plot")
    made = [TOK.decode(sentences(change("synonyms", row, seed, 0.3, cfg))[0]) for seed in range(400)]
    counts = {text: made.count(text) for text in set(made)}
    assert counts.keys() == {"bad plot", "awful plot", "poor plot"}
    assert abs(counts["bad plot"] / 400 - 0.7) < 0.08
    assert abs(counts["poor plot"] - counts["awful plot"]) < 60


@settings(max_examples=60)
@given(first=texts, second=st.none() | texts, length=st.integers(6, 30), seed=st.integers(0, 9))
def test_a_synonym_never_makes_a_row_too_long(tmp_path_factory, first, second, length, seed):
    path = tmp_path_factory.getbasetemp() / "long.tsv"
    path.write_text("film\tmotion picture of moving pictures\ngood\tfine\n")
    cfg = make_config(("synonyms", 1.0), synonyms=str(path))
    row = make_row(first, second, length)
    out = change("synonyms", row, seed, 1.0, cfg)
    n = int((out["segment_ids"] > 0).sum())
    assert controls(out) == controls(row) and out["tokens"][n - 1] == TOK.eos_id
    assert out["positions"].tolist() == [*range(n), *[0] * (length - n)]


def test_a_bad_file_of_synonyms_is_named(tmp_path):
    path = tmp_path / "bad.tsv"
    path.write_text("good\tfine\n\nbad awful\n")
    with pytest.raises(DataError, match=r"bad\.tsv:3: found 'bad awful'; expected a word, a tab and a synonym"):
        checks.fit(make_config(("synonyms", 0.1), synonyms=str(path)))
    path.write_text("\n")
    with pytest.raises(DataError, match=r"bad\.tsv: found no synonym"):
        checks.fit(make_config(("synonyms", 0.1), synonyms=str(path)))
    with pytest.raises(DataError, match=r"'data\.synonyms': .*gone\.tsv cannot be read"):
        checks.fit(make_config(("synonyms", 0.1), synonyms=str(tmp_path / "gone.tsv")))


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (
            make_config(("delet", 0.1)),
            r"'data\.augment': no 'delet' \(did you mean 'delete'\?\); there are .*delete, ",
        ),
        (make_config(("delete", 0.0)), r"'data\.augment': the strength of delete must be in \(0, 1\], got 0\.0"),
        (
            make_config(("swap", 0.1), task=toys.task("tagging")),
            r"'data\.augment': swap does not fit 'task\.name' tagging; use class",
        ),
        (make_config(("swap", 0.1), task=MASKED, packing="concat"), r"set data\.packing=pad, not concat"),
        (make_config(("synonyms", 0.1)), r"'data\.synonyms' is empty, but data\.augment names synonyms"),
        (make_config(synonyms="x.tsv"), r"'data\.synonyms' is read by the augmentation synonyms only"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(cfg, message):
    with pytest.raises(ConfigError, match=message):
        augment.check(cfg)


def test_training_rows_are_changed_anew_each_epoch_and_held_out_ones_never():
    records = [{"text": text, "label": str(i % 2), "source": f"f:{i}"} for i, text in enumerate(TEXTS)]
    cfg = make_config(("delete", 0.3), ("swap", 0.2), seq_len=L)
    data = input_pipeline.build(cfg, TOK, registry.Split(records[:20], records[20:], "", ""))

    def rows(start, local):
        stream = loader.train_batches(data, batch_size=20, start_example=start, local_rows=local, seed=3)
        batch = next(stream)
        stream.close()
        return batch

    first, second = rows(0, np.arange(20)), rows(20, np.arange(20))
    ids = loader.train_row_ids(20, 3, 0, 40)
    changed = {row: x.tolist() for row, x in zip(ids[:20], first["tokens"], strict=True)}
    again = {row: x.tolist() for row, x in zip(ids[20:], second["tokens"], strict=True)}
    assert sum(changed[row] != again[row] for row in range(20)) > 15
    parts = [rows(7, np.arange(i, 20, 2)) for i in range(2)]  # another host count, another start
    np.testing.assert_array_equal(parts[0]["tokens"][0], first["tokens"][7])
    np.testing.assert_array_equal(parts[1]["tokens"][0], first["tokens"][8])
    limits = {"batch_size": 4, "local_rows": np.arange(4), "max_tokens": 0, "seq_len": L}
    held_out = np.concatenate([b["tokens"] for b in loader.eval_batches(data.valid, **limits)])
    np.testing.assert_array_equal(held_out[:10], data.valid.rows["tokens"])
