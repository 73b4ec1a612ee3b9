"""lm.tasks.tagging: every word keeps its label, whatever the tokenizer, row length and characters."""

import dataclasses
import functools
import itertools
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from hypothesis import example, given
from hypothesis import strategies as st

from lm.config import Config, DataConfig
from lm.config.schema import ConfigError
from lm.data import packing, tokenizer
from lm.data.readers import registry, tables
from lm.data.record import DataError
from lm.tasks import tagging
from tests import toys

PROSE = ["Parkinson's disease is treated with selegiline, 10 mg per day. "] * 40 + ["naïve 東京 (PD)-induced"] * 3
TOKENIZER = tokenizer.train(PROSE, 330, 1_000_000)
LABELS = ("O", "B-X", "I-X", "B-Y", "I-Y")


def config(seq_len: int = 32, labels: tuple[str, ...] = LABELS, **options) -> Config:
    task = toys.task("tagging", labels=labels, **options)
    return Config(task=task, data=DataConfig(seq_len=seq_len, packing="pad"))


def record(words: list[str], tags: list[str]) -> dict:
    return {"words": words, "tags": tags, "source": "file:7", "identity": "s7"}


@functools.cache
def decode(*ids: int) -> str:
    return TOKENIZER.decode(ids)


def words_of(example) -> list[tuple[str, int]]:
    """(word, label) pairs of a row; a word is the decoded tokens from one label to the next."""
    tokens, labels = example.columns["tokens"].tolist(), example.columns["labels"]
    assert tokens[0] == TOKENIZER.bos_id and tokens[-1] == TOKENIZER.eos_id
    places = [*np.flatnonzero(labels >= 0), len(tokens) - 1]
    assert places[-1] > places[-2] and labels.min() == -1
    parts = [decode(*tokens[start:end]).strip(" ") for start, end in itertools.pairwise(places)]
    return list(zip(parts, labels[places[:-1]].tolist(), strict=True))


def test_the_first_token_of_a_word_has_its_label():
    words, tags = ["Parkinson", "'", "s", "x"], ["B-X", "I-X", "I-X", "O"]
    (made,) = tagging.tagged_words(record(words, tags), TOKENIZER, config(), Counter())
    ids, offsets = TOKENIZER.encode_with_offsets("Parkinson ' s x")
    labels = np.full(32, -1)
    for start, label in ((0, 1), (10, 2), (12, 2), (14, 0)):
        labels[1 + next(i for i, (_, end) in enumerate(offsets) if end > start)] = label
    np.testing.assert_array_equal(made.columns["labels"], labels)
    assert made.columns["tokens"].tolist() == [TOKENIZER.bos_id, *ids, TOKENIZER.eos_id]
    assert made.meta == ("s7", "Parkinson ' s x")


WORDS = st.text(
    st.characters(exclude_categories=["Cs", "Cc", "Z"]) | st.sampled_from("\u2581é東\U0001f600s"), min_size=1
)


@given(
    pairs=st.lists(st.tuples(WORDS, st.sampled_from(LABELS)), min_size=1, max_size=12),
    seq_len=st.integers(3, 24),
)
@example(pairs=[("a\u2581b", "B-X"), ("\u2581", "I-X"), ("東東東東東東東東東東", "B-Y")], seq_len=5)
def test_every_word_keeps_its_own_label(pairs, seq_len):
    words, tags = map(list, zip(*pairs, strict=True))
    counts: Counter[str] = Counter()
    made = tagging.tagged_words(record(words, tags), TOKENIZER, config(seq_len), counts)
    found = [pair for part in made for pair in words_of(part)]
    assert all(len(part.columns["tokens"]) <= seq_len for part in made)
    assert [LABELS[label] for _, label in found] == tags
    cut = sum(part != word for (part, _), word in zip(found, words, strict=True))
    assert cut == counts["word_cut"]
    assert bool(counts["sentence_cut"]) == (len(made) > 1)


def test_padding_has_no_label():
    made = tagging.tagged_words(record(["a", "b"], ["O", "O"]), TOKENIZER, config(16), Counter())
    cfg = config(16)
    rows, meta = packing.pack(made, tagging.TAGGING.columns(cfg), cfg.data)
    assert (rows["labels"] >= 0).sum() == 2 and rows["labels"][0, -1] == -1 and meta == [("s7", "a b")]


def test_an_unknown_tag_is_refused_with_the_record_named():
    with pytest.raises(
        DataError, match=r"file:7: unknown label 'B-Z' \(did you mean 'B-.'\?\); task.labels has O, B-X"
    ):
        tagging.tagged_words(record(["a"], ["B-Z"]), TOKENIZER, config(), Counter())


def test_two_words_in_one_token_are_refused(monkeypatch):
    monkeypatch.setattr(tokenizer.SentencePiece, "encode_with_offsets", lambda self, text: ([9], [(0, len(text))]))
    with pytest.raises(DataError, match="file:7: the words 'a' and 'b' begin in one token"):
        tagging.tagged_words(record(["a", "b"], ["O", "O"]), TOKENIZER, config(), Counter())


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
def test_tags_that_continue_no_entity_are_counted_and_kept(tags, count):
    counts: Counter[str] = Counter()
    tags = tags.split()
    (made,) = tagging.tagged_words(record(["a"] * len(tags), tags), TOKENIZER, config(), counts)
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
def test_character_spans_become_word_tags(spans, tags, counted):
    cfg, counts = config(64), Counter()
    given = {"text": TEXT, "entities": spans, "source": "file:7", "identity": "s7"}
    (made,) = tagging.entity_spans(given, TOKENIZER, cfg, counts)
    names = ["The", "(", "PD", ")", "-", "drug", ",", "L", "-2", "dopa", "10mg", "."]
    expected = [(name.rstrip("2") if name == "-2" else name, tags.get(name, "O")) for name in names]
    assert [(word, LABELS[i]) for word, i in words_of(made)] == expected
    assert {name: n for name, n in counts.items() if n} == counted


@given(text=st.text(st.sampled_from("ab -.é\n"), min_size=1, max_size=20), data=st.data())
def test_a_word_is_tagged_if_and_only_if_it_overlaps_the_span(text, data):
    """By brute force over characters."""
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    words, cfg = [match.span() for match in re.finditer(r"\w+|[^\w\s]", text)], config(64)
    entity = {"start": start, "end": end, "label": "X"}
    given = {"text": text, "entities": [entity], "source": "file:7", "identity": "s7"}
    made = tagging.entity_spans(given, TOKENIZER, cfg, Counter())
    tags = [LABELS[i] for part in made for i in part.columns["labels"] if i >= 0]
    expected, begun = [], False
    for first, last in words:
        inside = bool(set(range(first, last)) & set(range(start, end)))
        expected.append(("I-X" if begun else "B-X") if inside else "O")
        begun |= inside
    assert tags == expected


# Scores ---------------------------------------------------------------------------------------------------------------


def test_scores_join_the_parts_of_a_sentence():
    """An entity split by a short row is one entity: correct here, though each half alone is not. And
    what ends one sentence does not go on in the next."""
    expected = [[1, -1, 2, -1], [-1, 2, 3, -1], [4, 0, -1, -1]]
    predicted = [[1, 4, 2, 4], [4, 2, 3, 4], [0, 0, 4, 4]]
    outputs = {"label": np.array(expected), "prediction": np.array(predicted)}
    meta = [("one", "a b c d"), ("one", "a b c d"), ("two", "a b c d")]  # the same text twice
    found = tagging.score(outputs, meta, config())
    assert found == {
        "token_accuracy": 5 / 6,
        "entity_precision": 1.0,
        "entity_recall": pytest.approx(2 / 3),
        "entity_f1": pytest.approx(0.8),
        "entity_f1_strict": 1.0,  # the I- that begins the second sentence begins no entity in IOB2
    }
    parts_of_speech = tagging.score(outputs, meta, config(labels=("A", "B", "C", "D", "E")))
    assert parts_of_speech == {"token_accuracy": 5 / 6}


def score_of(
    records: list[dict], predictions: list[str], labels: tuple[str, ...], seq_len: int = 32, **options
) -> dict:
    """Scores of records whose words are predicted to have the tags of `predictions`, one text a record."""
    cfg = config(seq_len, labels, **options)
    made = [part for given in records for part in tagging.tagged_words(given, TOKENIZER, cfg, Counter())]
    rows, meta = packing.pack(made, tagging.TAGGING.columns(cfg), cfg.data)
    said = np.full_like(rows["labels"], 0)
    said[rows["labels"] >= 0] = [labels.index(tag) for tags in predictions for tag in tags.split()]
    return tagging.score({"label": rows["labels"], "prediction": said}, meta, cfg)


def load(path: Path, text: str, **data) -> list[dict]:
    path.write_text(text)
    train = path.with_stem("train")
    train.write_text(text)
    return registry.load(DataConfig(path=str(train), eval_path=str(path), **data)).valid


def test_repeated_sentences_are_scored_separately(tmp_path):
    one = {"words": ["Ann", "met", "Bob"], "tags": ["B-PER", "O", "B-PER"]}
    records = load(tmp_path / "a.json", json.dumps([one, one]), format="jsonl")
    found = score_of(records, ["I-PER O B-PER"] * 2, ("O", "B-PER", "I-PER"))
    assert (found["entity_f1"], found["token_accuracy"]) == (1.0, pytest.approx(2 / 3))
    assert found["entity_f1_strict"] == pytest.approx(2 / 3)  # two of four entities, and nothing else


SCHEMES = {
    "IOB1": "I-PER I-PER O I-PER / O I-LOC I-LOC I-LOC B-LOC",
    "IOB2": "B-PER I-PER O B-PER / O B-LOC I-LOC I-LOC B-LOC",
    "IOBES": "B-PER E-PER O S-PER / O B-LOC I-LOC E-LOC S-LOC",
    "BILOU": "B-PER L-PER O U-PER / O B-LOC I-LOC L-LOC U-LOC",
    "BMES": "B-PER E-PER O S-PER / O B-LOC M-LOC E-LOC S-LOC",
    "of suffixes": "PER-B PER-I O PER-B / O LOC-B LOC-I LOC-I LOC-B",
    "without types": "B I O B / O B I I B",
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("seq_len", [32, 5])  # 5: sentences are split
def test_entities_of_every_scheme_are_scored(tmp_path, scheme, seq_len):
    sentences = [tags.split() for tags in SCHEMES[scheme].split(" / ")]
    lines = ["".join(f"a\t{tag}\n" for tag in tags) for tags in sentences]
    rename = (("1", "token"), ("2", "tag"))
    records = load(tmp_path / "a.conll", "\n".join(lines), format="conll", rename=rename)
    labels = tuple(sorted({tag for tags in sentences for tag in tags} | {"O"}))
    right = score_of(records, [" ".join(tags) for tags in sentences], labels, seq_len)
    assert set(right.values()) == {1.0} and set(right) == set(tagging.score_names(config(32, labels)))
    first = [" ".join(sentences[0]), " ".join(["O"] * 5)]  # two of four entities
    found = score_of(records, first, labels, seq_len)
    assert found["entity_recall"] == 0.5 and found["entity_precision"] == 1.0
    assert found["entity_f1"] == found["entity_f1_strict"] == pytest.approx(2 / 3)
    words = score_of(records, first, labels, seq_len, entity_scheme="none")
    assert set(words) == {"token_accuracy"}


def test_an_explicit_scheme_is_used():
    """'B-X I-X' begins an entity wrongly in IOB1, 'I-X I-X' in IOB2."""
    records = [record(["a"] * 5, ["O", "I-X", "I-X", "O", "I-X"])]
    labels, tags = ("O", "B-X", "I-X"), ["O I-X I-X O I-X"]
    assert score_of(records, tags, labels)["entity_f1_strict"] == 1.0
    assert score_of(records, tags, labels, entity_scheme="IOB2")["entity_f1_strict"] == 0.0
    assert score_of(records, tags, labels, entity_scheme="IOB1")["entity_f1_strict"] == 1.0


@pytest.mark.parametrize(
    ("labels", "tags", "counted"),
    [
        (("O", "B-X", "E-X", "I-X", "S-X"), "B-X E-X S-X O", {}),
        (("O", "B-X", "E-X", "I-X", "S-X"), "B-X O E-X I-X", {"tag_continues_nothing": 2, "entity_not_ended": 2}),
        (("O", "B-X", "I-X", "L-X", "U-X"), "B-X U-X L-X B-X", {"tag_continues_nothing": 1, "entity_not_ended": 2}),
        (("O", "PER-B", "PER-I"), "PER-I PER-I PER-B PER-I", {"tag_continues_nothing": 1}),
        (("I-X", "NOUN"), "I-X NOUN I-X I-X", None),  # refused earlier
    ],
)
def test_violations_of_the_scheme_are_counted(labels, tags, counted):
    counts: Counter[str] = Counter()
    if counted is None:
        with pytest.raises(ConfigError, match="'NOUN' is not an entity tag"):
            tagging.score_names(config(32, labels))
        return
    tagging.tagged_words(record(["a"] * 4, tags.split()), TOKENIZER, config(32, labels), counts)
    assert counts == counted


def test_character_spans_are_written_in_iob2():
    cfg = config(32, ("O", "B-X", "E-X", "I-X", "S-X"))
    cfg = dataclasses.replace(cfg, task=toys.task("entities", labels=cfg.task.labels))
    with pytest.raises(ConfigError, match=r"'task\.labels': they have the letters B, E, I, S; expected .* IOB2"):
        tagging.score_names(cfg)


# All of BC5CDR --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_all_words_of_bc5cdr_are_tagged(shared_data):
    cfg, cut = config(24, ("O", "B-Chemical", "I-Chemical", "B-Disease", "I-Disease")), 0
    counts: Counter[str] = Counter()
    for name in ("train", "devel", "test"):
        for found in tables.read_conll(epath.Path(shared_data("bc5cdr") / f"{name}.tsv"), {"1": "token", "2": "tag"}):
            found["identity"] = found["source"]
            pairs = [pair for part in tagging.tagged_words(found, TOKENIZER, cfg, counts) for pair in words_of(part)]
            words, labels = zip(*pairs, strict=True)
            assert [cfg.task.labels[i] for i in labels] == found["tags"]
            cut += sum(word != part for word, part in zip(found["words"], words, strict=True))
            assert all(map(str.startswith, found["words"], words))
    assert cut == counts["word_cut"] < 200
    assert counts["tag_continues_nothing"] == 0 and counts["sentence_cut"] > 1000


@given(st.lists(st.sampled_from(["O", "B-X", "I-X", "B-Y", "I-Y"]), min_size=1, max_size=8))
def test_predicted_spans_are_the_entities_that_seqeval_reads_from_the_predicted_tags(tags):
    seqeval = pytest.importorskip("seqeval.metrics.sequence_labeling")
    labels = ("O", "B-X", "I-X", "B-Y", "I-Y")
    cfg = Config(task=tagging.ENTITIES.options(name="entities", labels=labels))
    words = [f"w{i}" for i in range(len(tags))]
    text = " ".join(words)
    logits = np.eye(len(labels), dtype=np.float32)[[labels.index(tag) for tag in tags]]
    places = np.arange(1, len(tags) + 1)
    head = np.concatenate([np.zeros((1, len(labels)), np.float32), logits])[None]
    record = {"text": text, "source": "f:1", "identity": "0"}
    said = tagging.found_spans({"head": head}, [(places, places - 1)], record, cfg, None)
    assert said["tags"] == tags
    expected = [
        {"label": kind, "text": " ".join(words[first : last + 1])} for kind, first, last in seqeval.get_entities(tags)
    ]
    assert [{key: span[key] for key in ("label", "text")} for span in said["prediction"]] == expected
    assert all(text[span["start"] : span["end"]] == span["text"] for span in said["prediction"])
