"""lm/corpus/decontaminate.py: exactly the documents that share an n-gram with an evaluation file are found."""

import gzip
import json

import numpy as np
import pytest
from etils import epath

from lm.corpus import decontaminate, ngrams
from lm.data.record import DataError

N = 5


def runs(words, n):
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


@pytest.fixture
def random_words():
    rng = np.random.default_rng(0)
    return lambda count, most=12: [f"w{k}" for k in rng.integers(0, most, count)]


def test_matches_equal_those_of_plain_python(tmp_path, monkeypatch, random_words):
    monkeypatch.setattr(decontaminate, "LEAST_WORDS", 3)
    texts = {name: [random_words(size) for size in (2, 3, 4, 5, 9)] for name in ("a.txt", "b.txt")}
    texts["b.txt"].append(texts["a.txt"][-1])  # n-grams of both files
    for name, found in texts.items():
        (tmp_path / name).write_text("\n".join(map(" ".join, found)))
    evaluation = decontaminate.read([epath.Path(tmp_path / name) for name in texts], N)
    assert (evaluation.texts, evaluation.unchecked, evaluation.lengths) == (11, 2, (3, 4, 5))
    documents = [random_words(size, most) for size in (0, 3, 8, 300) for most in (4, 12, 40)] + texts["a.txt"]
    found = decontaminate.matches(evaluation, *ngrams.word_hashes([" ".join(words) for words in documents]))
    expected = {}
    for i, words in enumerate(documents):
        counts = {
            str(tmp_path / name): sum(
                run in {r for text in lines for r in runs(text, n) if len(text) == n or (n == N and len(text) >= N)}
                for n in (3, 4, 5)
                for run in runs(words, n)
            )
            for name, lines in texts.items()
        }
        expected |= {i: {name: count for name, count in counts.items() if count}} if any(counts.values()) else {}
    assert found == expected
    assert 3 < len(found) < len(documents)


def test_planted_text_is_found_despite_case_and_punctuation(tmp_path):
    question = "How many clips did Natalia sell altogether in April and May, if she sold 48 in April?"
    (tmp_path / "test.jsonl.gz").write_bytes(gzip.compress(json.dumps({"id": 1, "q": [{"x": question}]}).encode()))
    evaluation = decontaminate.read([epath.Path(tmp_path / "test.jsonl.gz")], 13)
    texts = [f"Before. {question.upper().replace(',', ' -- ')} After.", question[:40], "Another text altogether."]
    found = decontaminate.matches(evaluation, *ngrams.word_hashes(texts))
    assert found == {0: {str(tmp_path / "test.jsonl.gz"): 17 - 13 + 1}}


def test_texts_are_extracted_from_every_file_format(tmp_path):
    nine = "one two three four five six seven eight nine"
    (tmp_path / "a.json").write_text(json.dumps([{"t": nine}, {"t": "\ud800 short"}]))
    (tmp_path / "b.tsv").write_text(f"label\t{nine}\nshort\t\n")
    for name, texts in (("a.json", 2), ("b.tsv", 3)):
        evaluation = decontaminate.read([epath.Path(tmp_path / name)], 8)
        assert (evaluation.texts, evaluation.unchecked, len(evaluation.hash_G)) == (texts, texts - 1, 2)
    assert decontaminate.matches(decontaminate.read([], 8), *ngrams.word_hashes([nine])) == {}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": ', "a.jsonl:2: malformed JSON"),
        ("a.txt", b"fine\n\xff\n", "a.txt:2: invalid UTF-8: found byte 0xff"),
        ("a.txt", b"too short\n", "a.txt: found no text of 8 words or more"),
        ("a.json", b"[" * 100_000, "a.json: malformed JSON"),
    ],
)
def test_an_unusable_evaluation_file_is_an_error(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        decontaminate.read([epath.Path(tmp_path / name)], 13)
