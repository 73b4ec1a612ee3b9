"""lm.data.tagging: every word has its own label, whatever the tokenizer, the length of a row, and the characters."""

import functools
import itertools
import re
from collections import Counter

import numpy as np
import pytest
from etils import epath
from hypothesis import example, given
from hypothesis import strategies as st

from lm.config import Config, DataConfig
from lm.data import packing, tables, tagging, tokenizer
from lm.data.records import DataError

PROSE = ["Parkinson's disease is treated with selegiline, 10 mg per day. "] * 40 + ["naïve 東京 (PD)-induced"] * 3
TOKENIZER = tokenizer.train(PROSE, 330, 1_000_000)
LABELS = ("O", "B-X", "I-X", "B-Y", "I-Y")


def config(seq_len: int = 32, labels: tuple[str, ...] = LABELS) -> Config:
    return Config(data=DataConfig(task="tagging", labels=labels, seq_len=seq_len, packing="pad"))


def record(words: list[str], tags: list[str]) -> dict:
    return {"words": words, "tags": tags, "source": "file:7"}


@functools.cache
def decode(*ids: int) -> str:
    return TOKENIZER.decode(ids)


def words_of(example) -> list[tuple[str, int]]:
    """(word, label) of a row by what its tokens decode to, from where a word is labelled to where the next one is."""
    tokens, labels = example.columns["tokens"].tolist(), example.columns["labels"]
    assert tokens[0] == TOKENIZER.bos_id and tokens[-1] == TOKENIZER.eos_id
    places = [*np.flatnonzero(labels >= 0), len(tokens) - 1]
    assert places[-1] >= places[-2] and labels.min() == -1
    parts = [decode(*tokens[start:end]).strip(" ") for start, end in itertools.pairwise(places)]
    return list(zip(parts, labels[places[:-1]].tolist(), strict=True))


def test_the_first_token_of_a_word_has_its_label():
    words, tags = ["Parkinson", "'", "s", "x"], ["B-X", "I-X", "I-X", "O"]
    (made,) = tagging.tagging(record(words, tags), TOKENIZER, config(), Counter())
    ids, offsets = TOKENIZER.encode_with_offsets("Parkinson ' s x")
    labels = np.full(32, -1)
    for start, label in ((0, 1), (10, 2), (12, 2), (14, 0)):
        labels[1 + next(i for i, (_, end) in enumerate(offsets) if end > start)] = label
    np.testing.assert_array_equal(made.columns["labels"], labels)
    assert made.columns["tokens"].tolist() == [TOKENIZER.bos_id, *ids, TOKENIZER.eos_id]
    assert made.meta == ("file:7", "Parkinson ' s x")


WORDS = st.text(
    st.characters(exclude_categories=["Cs", "Cc", "Z"]) | st.sampled_from("\u2581é東\U0001f600s"), min_size=1
)


@given(
    pairs=st.lists(st.tuples(WORDS, st.sampled_from(LABELS)), min_size=1, max_size=12),
    seq_len=st.integers(3, 24),
)
@example(pairs=[("a\u2581b", "B-X"), ("\u2581", "I-X"), ("東東東東東東東東東東", "B-Y")], seq_len=5)
def test_no_word_is_lost_and_none_has_the_label_of_another(pairs, seq_len):
    words, tags = map(list, zip(*pairs, strict=True))
    counts: Counter[str] = Counter()
    made = tagging.tagging(record(words, tags), TOKENIZER, config(seq_len), counts)
    found = [pair for part in made for pair in words_of(part)]
    assert all(len(part.columns["tokens"]) <= seq_len for part in made)
    assert [LABELS[label] for _, label in found] == tags
    cut = sum(part != word for (part, _), word in zip(found, words, strict=True))
    assert cut == counts["word_cut"]
    assert bool(counts["sentence_cut"]) == (len(made) > 1)


def test_padding_has_no_label_in_the_rows():
    made = tagging.tagging(record(["a", "b"], ["O", "O"]), TOKENIZER, config(16), Counter())
    cfg = config(16)
    rows, meta = packing.pack(made, tagging.TAGGING.columns(cfg), cfg.data)
    assert (rows["labels"] >= 0).sum() == 2 and rows["labels"][0, -1] == -1 and meta == [("file:7", "a b")]


def test_a_tag_that_is_not_known_is_an_error_that_names_the_record():
    with pytest.raises(
        DataError, match=r"file:7: unknown label 'B-Z' \(did you mean 'B-.'\?\); data.labels has O, B-X"
    ):
        tagging.tagging(record(["a"], ["B-Z"]), TOKENIZER, config(), Counter())


def test_two_words_in_one_token_are_an_error(monkeypatch):
    monkeypatch.setattr(tokenizer.Tokenizer, "encode_with_offsets", lambda self, text: ([9], [(0, len(text))]))
    with pytest.raises(DataError, match="file:7: the words 'a' and 'b' begin in one token"):
        tagging.tagging(record(["a", "b"], ["O", "O"]), TOKENIZER, config(), Counter())


@pytest.mark.parametrize(
    ("tags", "count"),
    [
        ("O B-X I-X O", 0),
        ("I-X I-X", 1),
        ("B-X I-Y", 1),
        ("B-X O I-X", 1),
        ("B-X I-X I-Y I-Y B-Y", 1),
        ("I-X O I-Y", 2),
    ],
)
def test_tags_that_continue_nothing_are_counted_and_kept(tags, count):
    counts: Counter[str] = Counter()
    tags = tags.split()
    (made,) = tagging.tagging(record(["a"] * len(tags), tags), TOKENIZER, config(), counts)
    assert counts["tag_continues_nothing"] == count
    assert [LABELS[i] for i in made.columns["labels"] if i >= 0] == tags


# Character spans ------------------------------------------------------------------------------------------------------

TEXT = "The (PD)-drug, L-dopa  10mg."


def span(part: str, label: str = "X", text: str = TEXT) -> dict:
    return {"start": text.index(part), "end": text.index(part) + len(part), "label": label}


@pytest.mark.parametrize(
    ("spans", "tags", "counted"),
    [
        ([], {}, {}),
        ([span("PD"), span("L-dopa", "Y")], {"PD": "B-X", "L": "B-Y", "-2": "I-Y", "dopa": "I-Y"}, {}),
        ([span("dru")], {"drug": "B-X"}, {"entity_grown": 1}),
        ([span("rug, L")], {"drug": "B-X", ",": "I-X", "L": "I-X"}, {"entity_grown": 1}),
        ([span(" PD"[1:] + ")"), span(")-drug")], {"PD": "B-X", ")": "I-X"}, {"entity_dropped": 1}),
        ([span("PD"), span("PD)", "Y")], {"PD": "B-Y", ")": "I-Y"}, {"entity_dropped": 1}),
        ([span("  ")], {}, {"entity_dropped": 1}),
        ([span(" 10mg")], {"10mg": "B-X"}, {}),
    ],
)
def test_spans_become_tags_of_words(spans, tags, counted):
    cfg, counts = config(64), Counter()
    (made,) = tagging.entities({"text": TEXT, "entities": spans, "source": "file:7"}, TOKENIZER, cfg, counts)
    names = ["The", "(", "PD", ")", "-", "drug", ",", "L", "-2", "dopa", "10mg", "."]
    expected = [(name.rstrip("2") if name == "-2" else name, tags.get(name, "O")) for name in names]
    assert [(word, LABELS[i]) for word, i in words_of(made)] == expected
    assert {name: n for name, n in counts.items() if n} == counted


@given(text=st.text(st.sampled_from("ab -.é\n"), min_size=1, max_size=20), data=st.data())
def test_every_character_of_the_only_span_is_in_a_word_with_its_tag(text, data):
    """By a brute force over characters: a word is tagged if and only if it shares one with the span."""
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    words, cfg = [match.span() for match in re.finditer(r"\w+|[^\w\s]", text)], config(64)
    given = {"text": text, "entities": [{"start": start, "end": end, "label": "X"}], "source": "file:7"}
    made = tagging.entities(given, TOKENIZER, cfg, Counter())
    tags = [LABELS[i] for part in made for i in part.columns["labels"] if i >= 0]
    expected, begun = [], False
    for first, last in words:
        inside = bool(set(range(first, last)) & set(range(start, end)))
        expected.append(("I-X" if begun else "B-X") if inside else "O")
        begun |= inside
    assert tags == expected


# Scores ---------------------------------------------------------------------------------------------------------------


def test_scores_put_the_parts_of_a_sentence_together_again():
    """An entity that is cut in two by a short row is one entity: right here, though each half alone is not. And
    what ends one sentence does not go on in the next."""
    expected = [[1, -1, 2, -1], [-1, 2, 3, -1], [4, 0, -1, -1]]
    predicted = [[1, 4, 2, 4], [4, 2, 3, 4], [0, 0, 4, 4]]
    outputs = {"label": np.array(expected), "prediction": np.array(predicted)}
    meta = [("a:1", "first"), ("a:1", "first"), ("a:1", "second")]  # of one line of a JSON list
    found = tagging.score(outputs, meta, config())
    assert found == {
        "token_accuracy": 5 / 6,
        "entity_precision": 1.0,
        "entity_recall": pytest.approx(2 / 3),
        "entity_f1": pytest.approx(0.8),
    }
    parts_of_speech = tagging.score(outputs, meta, config(labels=("A", "B", "C", "D", "E")))
    assert parts_of_speech == {"token_accuracy": 5 / 6}


# All of BC5CDR --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_all_words_of_bc5cdr(shared_data):
    cfg, cut = config(24, ("O", "B-Chemical", "I-Chemical", "B-Disease", "I-Disease")), 0
    counts: Counter[str] = Counter()
    for name in ("train", "devel", "test"):
        for found in tables.read_conll(epath.Path(shared_data("bc5cdr") / f"{name}.tsv"), {"1": "token", "2": "tag"}):
            pairs = [pair for part in tagging.tagging(found, TOKENIZER, cfg, counts) for pair in words_of(part)]
            words, labels = zip(*pairs, strict=True)
            assert [cfg.data.labels[i] for i in labels] == found["tags"]
            cut += sum(word != part for word, part in zip(found["words"], words, strict=True))
            assert all(map(str.startswith, found["words"], words))
    assert cut == counts["word_cut"] < 200
    assert counts["tag_continues_nothing"] == 0 and counts["sentence_cut"] > 1000
