"""lm.data.readers.registry and lm.data.readers.text: every form and every fault of users' own files."""

import gzip
import json
import tempfile
from pathlib import Path

import pytest
import zstandard
from etils import epath
from hypothesis import example, given
from hypothesis import strategies as st

from lm.config import DataConfig
from lm.config.schema import ConfigError
from lm.data.readers import paths, python_stdlib, registry
from lm.data.readers import text as records
from lm.data.readers.text import read_jsonl, read_text
from lm.data.record import DataError, Fault

GOOD = [json.dumps({"text": f"good {i}"}).encode() for i in range(8)]
BOM = b"\xef\xbb\xbf"


def write(path: Path, content: bytes) -> Path:
    packed = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(path.suffix, bytes)(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(packed)
    return path


def read(path: Path, **options) -> registry.Split:
    options = {"format": "jsonl", "eval_fraction": 0.3} | options
    return registry.load(DataConfig(path=str(path), **options))


def contents(found: list[dict]) -> list:
    return [record.get("text", record.get("messages")) for record in found]


def everything(split: registry.Split) -> list:
    return sorted(contents(split.train + split.valid), key=str)


def lines_of(texts: list[str]) -> bytes:
    return b"\n".join(json.dumps({"text": text}).encode() for text in texts)


# Forms ----------------------------------------------------------------------------------------------------------------

TEXTS = [f"record {i}" for i in range(300)]
CHAT = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


@pytest.mark.parametrize(
    ("value", "rename", "expected"),
    [
        ({"text": "a\r\nb", "id": 3}, {}, {"text": "a\nb"}),
        ({"messages": [{"role": "system", "content": "S", "x": 1}, *CHAT]}, {}, None),
        ({"prompt": "Q", "response": "A"}, {}, {"messages": CHAT}),
        ({"question": "Q", "answer": "A"}, {"question": "prompt", "answer": "response"}, {"messages": CHAT}),
        ({"response": "Q", "prompt": "A"}, {"response": "prompt", "prompt": "response"}, {"messages": CHAT}),
        ({"instruction": "Q", "output": "A"}, {}, {"messages": CHAT}),
        ({"instruction": "Q", "input": "", "output": "A", "text": "all of it"}, {}, {"messages": CHAT}),
        (
            {"instruction": "Q", "input": "I", "output": "A"},
            {},
            {"messages": [{"role": "user", "content": "Q\n\nI"}, CHAT[1]]},
        ),
        ({"body": "t"}, {"body": "text"}, {"text": "t"}),
        ({"parts": ["a", "b\r\nc"]}, {"parts": "text"}, {"text": "a\nb\nc"}),
    ],
)
def test_jsonl_forms(tmp_path, value, rename, expected):
    path = write(tmp_path / "a.jsonl", json.dumps(value).encode())
    expected = expected or {"messages": [{"role": "system", "content": "S"}, *CHAT]}
    assert list(read_jsonl(epath.Path(path), rename)) == [{**expected, "source": f"{path}:1"}]


def test_text_without_separator_is_one_document_as_it_is(tmp_path):
    path = write(tmp_path / "a.txt", BOM + "\nOne.\r\n\r\nZwölf.\n".encode())
    assert list(read_text(epath.Path(path), "")) == [{"text": "\nOne.\n\nZwölf.\n", "source": f"{path}:1"}]


def test_separator_splits_documents_and_sources_name_their_first_lines(tmp_path):
    path = write(tmp_path / "a.txt", b"one\r\n1\r\n<|end|>\n\n  two\n<|end|>three<|end|>\n<|end|>\n")
    found = list(read_text(epath.Path(path), "<|end|>"))
    assert contents(found) == ["one\n1", "  two", "three"]
    assert [r["source"] for r in found] == [f"{path}:1", f"{path}:5", f"{path}:6"]
    blank_lines = list(read_text(epath.Path(write(tmp_path / "b.txt", b"one\n\n\n\ntwo\n\nthree")), "\n\n"))
    assert [(r["text"], r["source"][-2:]) for r in blank_lines] == [("one", ":1"), ("two", ":5"), ("three", ":7")]


@pytest.mark.parametrize("chunk_bytes", [1, 2, 5, 1 << 20])
@pytest.mark.parametrize("separator", ["<|end|>", "\n\n", "\n"])
def test_parts_of_a_text_do_not_depend_on_its_chunks(tmp_path, monkeypatch, chunk_bytes, separator):
    monkeypatch.setattr(records, "_CHUNK_BYTES", chunk_bytes)
    content = b"\xef\xbb\xbfOne\r\n<|end|>" + b"long " * 9 + b"\r\n\r\n\r<|en<|end|><|end|>\n\nlast\r\n"
    path = epath.Path(write(tmp_path / "a.txt", content))
    expected = content.decode("utf-8-sig").replace("\r\n", "\n").split(separator)
    assert [part.decode() for part in records._parts(path, separator.encode())] == expected
    found = [(record["text"], record["source"]) for record in read_text(path, separator)]
    lines = [1 + sum(part.count("\n") + separator.count("\n") for part in expected[:i]) for i in range(len(expected))]
    assert found == [
        (part.strip("\n"), f"{path}:{line + len(part) - len(part.lstrip(chr(10)))}")
        for part, line in zip(expected, lines, strict=True)
        if part.strip()
    ]


def test_a_folder_is_read_recursively_in_sorted_order_and_a_glob_as_it_says(tmp_path):
    for name in ("b.txt", "a/z.txt.gz", "a/y.md", "README", ".hidden.txt", ".git/c.txt"):
        write(tmp_path / name, name.encode())
    found = paths.find_files(str(tmp_path), (".txt", ".text", ".md"))
    assert [str(p.relative_to(tmp_path)) for p in found] == ["a/y.md", "a/z.txt.gz", "b.txt"]
    matches = paths.find_files(str(tmp_path / "*" / "[xy].*"), (".txt", ".text", ".md"))
    assert [p.name for p in matches] == ["y.md"]
    assert [p.name for p in paths.find_files(str(tmp_path / "README"), (".txt",))] == ["README"]
    split = read(tmp_path, format="text", eval_path=str(tmp_path / "README"))
    assert contents(split.train) == ["a/y.md", "a/z.txt.gz", "b.txt"]
    assert contents(split.valid) == ["README"]


# Faults ---------------------------------------------------------------------------------------------------------------

LINE_FAULTS = [
    ("malformed JSON", b'{"text": "a"', "at column 13"),
    ("malformed JSON", b'{"text": "a"} {"text": "b"}', "expected one JSON object a line"),
    ("malformed JSON", b"[" * 100_000, "expected one JSON object a line"),
    ("malformed JSON", b"1" * 5_000, "expected one JSON object a line"),
    ("invalid UTF-8", b'{"text": "caf\xe9"}', "0xe9"),
    ("invalid UTF-8", '{"text": "a"}'.encode("utf-16"), "0xff"),
    ("malformed JSON", BOM + b'{"text": "a"}', "found U+FEFF before the object"),
    ("NUL", b'{"text": "a\0b"}', "U+0000"),
    ("NUL", rb'{"text": "a\u0000b"}', "'text'"),
    ("lone surrogate", rb'{"text": "a\ud800b"}', "U+D800"),
    ("wrong type", b'["text"]', "expected a JSON object"),
    ("wrong type", b'{"text": 3}', "'text' is int 3; expected a string"),
    ("wrong type", b'{"text": null}', "NoneType None; expected a string"),
    ("wrong type", b'{"messages": {}}', "expected a list of at least one message"),
    ("wrong type", b'{"messages": []}', "expected a list of at least one message"),
    ("wrong type", b'{"messages": ["hi"]}', r"'messages[0]' is str 'hi'; expected an object"),
    ("wrong type", b'{"messages": [{"role": "user", "content": ["hi"]}]}', "'messages[0].content[0]' is str"),
    ("wrong type", b'{"instruction": "a", "input": 1, "output": "b"}', "'input' is int 1"),
    ("missing field", b"{}", "found no fields; expected 'text', 'messages'"),
    ("missing field", b'{"txt": "a", "prompt": "b"}', "found 'txt', 'prompt'; expected 'text'"),
    ("missing field", b'{"messages": [{"role": "user"}]}', "'messages[0]': found 'role'; expected 'content'"),
    ("missing field", b'{"messages": [{"content": "a"}]}', "'messages[0]': found 'content'; expected 'role'"),
    ("unknown role", b'{"messages": [{"role": "usr", "content": "a"}]}', "(did you mean 'user'?)"),
    ("unknown role", b'{"messages": [{"role": ["user"], "content": "a"}]}', "expected one of system, user, assistant"),
    ("empty text", b'{"text": ""}', "'text' is str ''; expected text"),
    ("empty text", b'{"prompt": "a", "response": " \\n"}', "'response' is str"),
]


@pytest.mark.parametrize(("kind", "line", "says"), LINE_FAULTS)
def test_a_bad_line_is_an_error_with_its_place_or_skipped_and_counted(tmp_path, kind, line, says):
    path = write(tmp_path / "a.jsonl", b"\n".join([*GOOD[:2], b"", line, *GOOD[2:]]))
    with pytest.raises(DataError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}:4: {kind}: ")
    assert says in str(error.value)
    assert "expected" in str(error.value)
    split = read(path, max_bad_records=100)
    assert everything(split) == [f"good {i}" for i in range(8)]
    assert f"skipped 1 bad records:\n  1 x {kind}\n    {path}:4: " in split.report
    assert says in split.report


@pytest.mark.parametrize(
    ("kind", "document", "line"),
    [("invalid UTF-8", b"two\ntw\xe9", 3), ("NUL", b"\n\nt\0", 4)],
)
def test_a_bad_document_is_placed_at_the_line_of_its_fault(tmp_path, kind, document, line):
    path = write(tmp_path / "a.txt", b"one\n|" + document + b"|three")
    with pytest.raises(DataError, match=f"{path}:{line}: {kind}: found .*; expected"):
        read(path, format="text", separator="|")
    split = read(path, format="text", separator="|", max_bad_records=100)
    assert everything(split) == ["one", "three"]
    assert f"1 x {kind}\n    {path}:{line}: found" in split.report


@pytest.mark.parametrize("name", ["e.txt", "e.jsonl", "e.json", "e.jsonl.gz", "e.txt.zst"])
@pytest.mark.parametrize("content", [b"", b" \n\n", BOM])
def test_an_empty_file_is_a_fault(tmp_path, name, content):
    path = write(tmp_path / "data" / name, content)
    options = {"format": "text" if ".txt" in name else "jsonl"}
    with pytest.raises(DataError, match=f"{path}: empty file: found nothing, .*expected at least one record"):
        read(path, **options)
    for i in range(4):
        write(
            tmp_path / "data" / f"{i}{Path(name).suffixes[0]}", GOOD[i] if path.suffix != ".json" else b"[%s]" % GOOD[i]
        )
    split = read(tmp_path / "data", max_bad_records=100, **options)
    assert len(everything(split)) == 4
    assert f"1 x empty file\n    {path}: found nothing" in split.report


@pytest.mark.parametrize(
    ("content", "line", "says"),
    [
        (b'{"text": "a"}', 1, "found an object of str; expected a list of objects, or an object of them"),
        (b'{"a": {"text": "a"},\n"b": 3}', 2, "found an object of int; expected"),
        (b'{"a": {"text": "a"},\n{"text": "b"}}', 2, "malformed JSON: expecting a name and a colon"),
        (b'{"a": {"text": "a"},\n}', 2, "malformed JSON: Expecting value"),
        (b'{"a": {"text": "a"}]', 1, "found ']'; expected ',' or the '}' that ends the file"),
        (b'"a"', 1, "found '\"'; expected a list of objects"),
        (b'[{"text": "a"},\n{"text": }]', 2, "malformed JSON: Expecting value"),
        (b'[{"text": "a"}\n{"text": "b"}]', 2, "expected ',' or the ']'"),
        (b'[{"text": "a"},\n{"text": "b"}', 2, "found the end of the file; expected ',' or the ']'"),
        (b'[{"text": "a"},\n]', 2, "malformed JSON: Expecting value"),
        (b'[{"text": "a"}]\n[]', 1, "expected ',' or the ']' that ends the file"),
        (b"[" * 100_000, 1, "malformed JSON"),
        (b'[{"text": "a"},\n\xff]', 2, "0xff"),
    ],
)
def test_a_broken_json_list_is_an_error_even_when_bad_records_are_skipped(tmp_path, content, line, says):
    path = write(tmp_path / "a.json", content)
    with pytest.raises(DataError) as error:
        read(path, max_bad_records=100)
    assert str(error.value).startswith(f"{path}:{line}: ")
    assert says in str(error.value)


def test_an_object_of_objects_is_a_list_of_them_without_their_names(tmp_path):
    objects = [{"text": f"t {i}", "n": {"deep": [i]}} for i in range(5)]
    path = write(tmp_path / "a.json", json.dumps({f"id {i}": o for i, o in enumerate(objects)}, indent=1).encode())
    found = list(read_jsonl(epath.Path(path), {}))
    lines = [number for number, line in enumerate(path.read_text().splitlines(), 1) if line.startswith(' "id')]
    assert found == [{"text": o["text"], "source": f"{path}:{n}"} for o, n in zip(objects, lines, strict=True)]
    assert [fault.kind for fault in read_jsonl(epath.Path(write(tmp_path / "b.json", b"{ }")), {})] == ["empty file"]


def test_a_text_in_parts_is_joined_and_a_bad_part_named(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"text": ["a", 3]}')
    with pytest.raises(DataError, match=r"a\.jsonl:1: wrong type: 'text\[1\]' is int 3; expected a string"):
        read(path)


def test_a_bad_object_in_a_json_list_is_placed_at_its_line(tmp_path):
    path = write(tmp_path / "a.json", b'[\n {"text":\n  "a"},\n {"text": 3}, {"text": "b"}]')
    with pytest.raises(DataError, match=f"{path}:4: wrong type"):
        read(path)
    assert everything(read(path, max_bad_records=100)) == ["a", "b"]


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("missing.jsonl", "no such file or folder"),
        ("empty", "no file ends in .jsonl, .json .*; found 1 others"),
        ("*.jsonl", "no file matches"),
        ("**/*.jsonl", r"NotImplementedError"),
        ("xyz://bucket/a.jsonl", "xyz"),
    ],
)
def test_a_path_without_files_is_an_error(tmp_path, monkeypatch, path, says):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "empty" / "README", b"x")
    with pytest.raises(DataError, match=f"data path '.*{path.replace('*', '.')}': .*{says}"):
        read(Path(path) if "://" not in path else path, max_bad_records=100)


def test_more_bad_records_than_allowed_is_an_error_and_the_report_is_capped(tmp_path):
    path = write(tmp_path / "a.jsonl", b"\n".join([*GOOD, *[b"{}"] * 5, b"{", b"{"]))
    split = read(path, max_bad_records=7)
    assert f"read 8 records of 1 files\n  {path}\nskipped 7 bad records:\n  5 x missing field\n" in split.report
    assert "2 x malformed JSON" in split.report
    assert [f"{path}:{line}: " in split.report for line in range(9, 16)] == [True] * 3 + [False] * 2 + [True] * 2
    with pytest.raises(DataError, match=r"more than data.max_bad_records=6: skipped 7 bad records:\n  5 x missing"):
        read(path, max_bad_records=6)


LINES = st.lists(
    st.binary(max_size=40)
    | st.sampled_from([*GOOD, *(line for _, line, _ in LINE_FAULTS if len(line) < 1000)])
    | st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=4),
        lambda inner: (
            st.lists(inner, max_size=2)
            | st.dictionaries(st.sampled_from(["text", "messages", "role", "content", "prompt", "response"]), inner)
        ),
        max_leaves=6,
    ).map(lambda value: json.dumps(value).encode()),
    max_size=6,
)


@given(LINES, st.sampled_from([b"\n", b"\r\n"]))
@example([BOM + b"\n", b""], b"\n")
@example([b"\r", b"\x0b"], b"\n")
def test_whatever_the_bytes_of_a_jsonl_file_read_and_reported_make_the_total(lines, newline):
    content = newline.join(lines)
    total = sum(bool(line.strip()) for line in content.removeprefix(BOM).split(b"\n"))
    with tempfile.TemporaryDirectory() as folder:
        found = list(read_jsonl(epath.Path(write(Path(folder) / "a.jsonl", content)), {}))
    faults = [item for item in found if isinstance(item, Fault)]
    assert len(found) == max(total, 1)
    assert all(fault.kind and "expected" in fault.message for fault in faults)
    for record in (item for item in found if not isinstance(item, Fault)):
        texts = [record["text"]] if "text" in record else [turn["content"] for turn in record["messages"]]
        assert all(text.strip() for text in texts if "text" in record)  # a message may be empty
        assert all(text.encode().decode() == text for text in texts)
        assert not any(bad in text for text in texts for bad in ("\0", "\r\n"))


@given(LINES, st.sampled_from([b",", b"\n", b", "]))
def test_whatever_the_bytes_of_a_json_list_only_data_errors(lines, comma):
    with tempfile.TemporaryDirectory() as folder:
        path = epath.Path(write(Path(folder) / "a.json", b"[" + comma.join(lines) + b"]"))
        try:
            found = list(read_jsonl(path, {}))
        except DataError as error:
            assert str(path) in str(error)
        else:
            assert found


@given(st.lists(st.binary(max_size=20) | st.text(max_size=20).map(str.encode), max_size=5))
def test_whatever_the_bytes_of_a_text_file_read_and_reported_make_the_total(documents):
    content = b"<|end|>".join(documents)
    parts = content.removeprefix(BOM).replace(b"\r\n", b"\n").split(b"<|end|>")
    with tempfile.TemporaryDirectory() as folder:
        found = list(read_text(epath.Path(write(Path(folder) / "a.txt", content)), "<|end|>"))
    assert len(found) == max(sum(bool(part.strip()) for part in parts), 1)


@pytest.mark.parametrize(
    "options",
    [
        {"format": "text", "rename": (("a", "text"),)},
        {"format": "jsonl", "separator": "|"},
        {"format": "builtin_text"},
        {"format": "jsonl", "rename": (("a", "text"), ("b", "text"))},
        {"format": "jsonl", "rename": (("a", "text"), ("a", "prompt"))},
    ],
)
def test_a_key_that_would_be_ignored_is_refused(tmp_path, options):
    with pytest.raises(ConfigError, match=r"'data.(rename|separator|path)'"):
        read(write(tmp_path / "a.jsonl", lines_of(TEXTS)), **options)


def test_builtin_formats_take_their_split_from_the_corpus(monkeypatch):
    side = {"train": [{"text": "a", "source": "x"}, {"text": "b", "source": "y"}], "valid": [{"text": "c"}]}
    corpus = python_stdlib.Corpus({"text": side, "instructions": {**side, "valid": []}}, "0" * 64, "corpus report")
    monkeypatch.setattr(python_stdlib, "load", lambda: corpus)
    split = registry.load(DataConfig(format="builtin_text", max_records=1))
    assert len(split.train) == 1 and split.valid == side["valid"]
    assert "corpus report\ntext: 2 train and 1 valid records, split by file" in split.report
    with pytest.raises(DataError, match=r"data.format=builtin_instructions: no valid record"):
        registry.load(DataConfig(format="builtin_instructions"))


# Real files -----------------------------------------------------------------------------------------------------------


def test_gsm8k(shared_data):
    folder = shared_data("gsm8k")
    rename = (("question", "prompt"), ("answer", "response"))
    split = read(folder / "train.jsonl", eval_path=str(folder / "test.jsonl"), rename=rename)
    assert (len(split.train), len(split.valid)) == (7473, 1319)
    assert split.train[0]["messages"][0]["content"].startswith("Natalia sold clips to 48 of her friends")
    assert split.train[0]["messages"][1]["content"].endswith("#### 72")
    with pytest.raises(DataError, match=r"train.jsonl:1: missing field: found 'question', 'answer'; expected 'text'"):
        read(folder / "train.jsonl")


def test_tinystories(shared_data):
    path = shared_data("tinystories") / "sample.txt"
    split = read(path, format="text", separator="<|endoftext|>", eval_fraction=0.02)
    parts = path.read_text().split("<|endoftext|>")
    assert everything(split) == sorted(p.strip("\n") for p in parts if p.strip())
    assert 20 < len(split.valid) < 90


def test_instruction_list(shared_data):
    split = read(shared_data("instr_rasbt") / "instruction-data.json", eval_fraction=0.1)
    assert len(split.train) + len(split.valid) == 1100
    assert split.train[0]["messages"][0]["content"].endswith("given.\n\nfreind --> friend")


def test_gzipped_reviews(shared_data):
    path = shared_data("imdb") / "imdb_test.jsonl.gz"
    split = read(path, eval_fraction=0.02)
    with gzip.open(path, "rt", encoding="utf-8") as file:
        expected = sorted(json.loads(line)["text"].replace("\r\n", "\n") for line in file)
    assert everything(split) == expected
