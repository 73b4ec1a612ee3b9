"""lm/data/readers/python_stdlib.py and prose.py: the corpus of the running Python, what is held out, and its cache."""

import gzip
import json
import os
import platform
import re
import sys
from pathlib import Path

import pytest

from lm.data.readers import python_stdlib
from lm.data.readers.prose import first_sentence, is_prose, read_source


@pytest.fixture(scope="module")
def cache_home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def corpus(cache_home) -> python_stdlib.Corpus:
    """Built once, from the real library, as a first run would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache_home))
        return python_stdlib.load()


def paragraphs(text: str) -> list[str]:
    normalised = (" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
    return [paragraph for paragraph in normalised if len(paragraph) >= 40]


def documents_of(corpus: python_stdlib.Corpus, split: str) -> set[str]:
    """Names of the documents, without the lines of the instruction pairs."""
    return {re.sub(r"\.py:\d+$", ".py", r["source"]) for part in corpus.parts.values() for r in part[split]}


def answers_of(corpus: python_stdlib.Corpus, split: str) -> list[str]:
    return [record["messages"][1]["content"] for record in corpus.parts["instructions"][split]]


# The real corpus ------------------------------------------------------------------------------------------------------


def test_size_and_report(corpus):
    text, pairs = corpus.parts["text"], corpus.parts["instructions"]
    size = {split: sum(len(r["text"].encode()) for r in text[split]) for split in text}
    assert 2_200_000 < size["train"] + size["valid"] < 3_200_000
    assert 0.03 < size["valid"] / (size["train"] + size["valid"]) < 0.15
    assert 4_500 < len(pairs["train"]) < 6_500
    assert 150 < len(pairs["valid"]) < 800
    assert f"CPython {platform.python_version()}, builder 1: {sum(size.values()):,} bytes in " in corpus.report
    assert corpus.sha256 in corpus.report
    assert "warning" not in corpus.report
    assert any(record["source"] == "pydoc_data/topics.py:compound" for record in text["train"] + text["valid"])


def test_train_and_valid_share_no_document(corpus):
    train, valid = documents_of(corpus, "train"), documents_of(corpus, "valid")
    assert not train & valid
    assert all(python_stdlib.is_valid(name) for name in valid)
    assert not any(python_stdlib.is_valid(name) for name in train)
    folders = {folder for name in train | valid for folder in name.split("/")[:-1]}
    assert {"unittest", "email", "json"} < folders
    assert not {"test", "tests", "site-packages", "encodings"} & folders


def test_no_paragraph_occurs_twice(corpus):
    found = [p for split in corpus.parts["text"].values() for record in split for p in paragraphs(record["text"])]
    assert len(found) > 10_000
    assert len(found) == len(set(found))


def test_no_answer_of_valid_occurs_in_train(corpus):
    text = "\n".join(" ".join(record["text"].split()) for record in corpus.parts["text"]["train"])
    valid = answers_of(corpus, "valid")
    assert not set(valid) & set(answers_of(corpus, "train"))
    assert not [answer for answer in valid if answer in text]


def test_pairs_are_signatures_and_sentences_on_one_line(corpus):
    pairs = [record["messages"] for split in corpus.parts["instructions"].values() for record in split]
    assert all([turn["role"] for turn in pair] == ["user", "assistant"] for pair in pairs)
    assert all(re.match(r"Summarise this function: [\w.]+\(.*\)", pair[0]["content"]) for pair in pairs)
    assert not [pair for pair in pairs for turn in pair if "\n" in turn["content"] or ">>>" in turn["content"]]
    for turn in (0, 1):
        assert len({pair[turn]["content"] for pair in pairs}) == len(pairs)
    asked = "Summarise this function: textwrap.shorten(text, width, **kwargs)"
    assert [pair[1]["content"] for pair in pairs if pair[0]["content"] == asked] == [
        "Collapse and truncate the given text to fit in the given width."
    ]


def test_documents_are_prose(corpus):
    texts = [record["text"] for split in corpus.parts["text"].values() for record in split]
    assert min(map(len, texts)) >= 200
    assert all(is_prose(paragraph, 0.6) for text in texts for paragraph in text.split("\n\n"))
    assert is_prose("".join(texts), 0.85)
    assert not [text for text in texts if ">>>" in text]


# A library of our own -------------------------------------------------------------------------------------------------

MODULE = '''#!/usr/bin/env python
# Copyright of the example module, all rights belong to everyone.
"""A module
of prose.

    >>> 1 + 1
    2
"""

import os

# result = compute(first, second, third) if first else None

# Ten or more words of explanation stand here,
# ------------------------------------------
#   and go on in the next line.
x = 1  # a comment behind code is left out of the corpus always
if x:
    class Reader(Base):
        """Reads records, e.g. of
        a file.  Slowly."""

        async def read(self, size: int = -1, *, flag=None) -> bytes:
            """Read at most
            size bytes."""
            def inner(): "Nothing much."

        def undocumented(self): pass
'''


SHARED_PARAGRAPH = "This paragraph stands in all of the modules of the library."


def library(folder: Path, names: list[str]) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        own = f"Module {name} does a thing of its own, which this text describes. " * 4
        path.write_text(f'"""{own}\n\n{SHARED_PARAGRAPH}"""\n')
    return folder


def test_a_source_file_gives_docstrings_and_comments_in_order(tmp_path):
    (tmp_path / "m.py").write_text(MODULE)
    document = read_source("pkg/m.py", tmp_path / "m.py")
    assert document.prose == [
        "!/usr/bin/env python\nCopyright of the example module, all rights belong to everyone.",
        "A module\nof prose.\n\n    >>> 1 + 1\n    2",
        "Ten or more words of explanation stand here,\n  and go on in the next line.",
        "Reads records, e.g. of\na file.  Slowly.",
        "Read at most\nsize bytes.",
        "Nothing much.",
    ]
    assert document.functions == [
        (23, "pkg.m.Reader.read(self, size: int=-1, *, flag=None) -> bytes", "Read at most\nsize bytes."),
        (26, "pkg.m.Reader.read.inner()", "Nothing much."),
    ]


def test_build_is_deterministic_and_skips_files_outside_the_library(tmp_path, monkeypatch):
    monkeypatch.setattr(python_stdlib, "_MIN_SOURCES", 5)
    names = ["a.py", "b.py", "pkg/__init__.py", "pkg/c.py", "z.py"]
    skipped = ["test/t.py", "pkg/tests/t.py", "site-packages/s.py", "encodings/e.py", "sitecustomize.py"]
    one, from_sources = python_stdlib.build(library(tmp_path / "one", names + skipped))
    two, _ = python_stdlib.build(library(tmp_path / "two", (names + skipped)[::-1]))
    assert from_sources
    assert one == two
    records = [record for split in one.parts["text"].values() for record in split]
    assert [r["source"] for r in records if "topics" not in r["source"]] == sorted(names, key=python_stdlib.is_valid)
    assert [r["source"] for r in records if SHARED_PARAGRAPH in r["text"]] == ["a.py"]  # the first that has it


def test_a_file_that_cannot_be_parsed_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(python_stdlib, "_MIN_SOURCES", 2)
    library(tmp_path, ["a.py", "b.py"])
    (tmp_path / "old.py").write_text("print 'hello'\n")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    corpus, _ = python_stdlib.build(tmp_path)
    assert "2 could not be read: latin.py (SyntaxError), old.py (SyntaxError)" in corpus.report


def test_without_sources_docstrings_are_imported_and_the_report_says_so(tmp_path, monkeypatch):
    corpus, from_sources = python_stdlib.build(tmp_path / "python311.zip")
    assert not from_sources
    assert "warning: only 0 source files of the standard library" in corpus.report
    assert "fell back to the docstrings of" in corpus.report
    assert sum(len(r["text"]) for r in corpus.parts["text"]["train"]) > 600_000
    assert len(corpus.parts["instructions"]["train"]) > 1_000
    assert len(corpus.parts["instructions"]["valid"]) > 20
    assert not documents_of(corpus, "train") & documents_of(corpus, "valid")
    assert corpus == python_stdlib.build(tmp_path / "python311.zip")[0]
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert "warning: this Python has no pydoc_data.topics" in python_stdlib.build(tmp_path)[0].report


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Return the\n    size of it.  It is slow.", "Return the size of it."),
        (
            "Split the text, e.g. at\n    blanks (i.e. white space). Slow.",
            "Split the text, e.g. at blanks (i.e. white space).",
        ),
        ("Accept names, sizes, etc. and more of them. Then stop.", "Accept names, sizes, etc. and more of them."),
        ("Accept names, sizes, etc. Then stop.", "Accept names, sizes, etc."),
        ("Read os.path and x.y of it. open it.", "Read os.path and x.y of it."),
        ("Wait ... until it is done! Then go.", "Wait ... until it is done!"),
        ("Written by J. Smith for all. More.", "Written by J. Smith for all."),
        ('Return the word "end." Then stop.', 'Return the word "end."'),
        ("Return the cosine of x. It is slow.", "Return the cosine of x."),
        ("Return the size of it\n\n    More text.", "Return the size of it"),
        ("exit\n    quit\n        Leave the debugger now.", ""),
        ("size(x) -> int\n\n    Return the size of it.", "Return the size of it."),
        ("size(x)\n    Return the size of it.", "Return the size of it."),
        ("Return the size\nof it without a stop", ""),
        ("Return one of the following:", ""),
        (">>> f(1)\n    2", ""),
        ("Read all about it at https://example.org for now. Yes.", ""),
        ("Convert every name -> number of the list. Yes.", ""),
        ("Too short.", ""),
        ("x[i] += a * b ** (c - d) for i, j in k.", ""),
        ("- a list of three things. Yes.", ""),
        ("A " + "very " * 100 + "long one.", ""),
        ("", ""),
        ("\n\n", ""),
    ],
)
def test_first_sentence(docstring, expected):
    assert first_sentence(docstring) == expected


# Cache ----------------------------------------------------------------------------------------------------------------


def test_the_cache_gives_back_what_was_built(corpus, cache_home, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_home))
    monkeypatch.setattr(python_stdlib, "build", lambda stdlib: pytest.fail("built again"))
    cached = python_stdlib.load()
    assert cached[:2] == corpus[:2]
    (path,) = (cache_home / "lm").iterdir()  # and no temporary file beside it
    assert path.name.startswith(f"builtin-{platform.python_version()}-")
    assert cached.report == f"{corpus.report}\nread from the cache {path}"


@pytest.fixture
def small(tmp_path, monkeypatch) -> python_stdlib.Corpus:
    """A corpus that builds in no time, in an empty cache folder."""
    record = {"text": "short", "source": "a.py"}
    parts = {part: {"train": [record], "valid": []} for part in python_stdlib.PARTS}
    digest = python_stdlib.hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    corpus = python_stdlib.Corpus(parts, digest, "small")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(python_stdlib, "build", lambda stdlib: (corpus, True))
    return corpus


DAMAGES = {
    "empty": lambda whole: b"",
    "cut": lambda whole: whole[:-20],
    "one bit of the stream": lambda whole: whole[:40] + bytes([whole[40] ^ 1]) + whole[41:],
    "not gzip": lambda whole: b"{}",
    "not JSON": lambda whole: gzip.compress(b"nonsense"),
    "other JSON": lambda whole: gzip.compress(b'{"parts": 3}'),
    "no object": lambda whole: gzip.compress(b"[]"),
    "other text": lambda whole: gzip.compress(gzip.decompress(whole).replace(b"short", b"shirt")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_rebuilt_and_the_report_says_so(small, tmp_path, damage):
    assert python_stdlib.load() == small
    (path,) = (tmp_path / "lm").iterdir()
    whole = path.read_bytes()
    path.write_bytes(DAMAGES[damage](whole))
    rebuilt = python_stdlib.load()
    assert rebuilt[:2] == small[:2]
    assert rebuilt.report.startswith(f"small\nthe cache {path} was damaged and is rebuilt: ")
    assert path.read_bytes() == whole
    assert python_stdlib.load().report == f"small\nread from the cache {path}"


def test_a_cache_that_cannot_be_written_is_reported(small, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "lm").mkdir()
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("no space left")))
    assert python_stdlib.load().report == "small\nthe corpus is not cached: no space left"
    assert not list((tmp_path / "lm").iterdir())


def test_a_fallback_corpus_is_not_cached(small, tmp_path, monkeypatch):
    monkeypatch.setattr(python_stdlib, "build", lambda stdlib: (small, False))
    assert python_stdlib.load() == small
    assert not (tmp_path / "lm").exists()
