"""Text as it is in the file: U+FEFF inside a text, other encodings than UTF-8, and lines of any length."""

import codecs
import csv
import io
import json
import random
import re
import subprocess
import sys
import textwrap
import tracemalloc
from pathlib import Path

import pytest
from etils import epath

from lm import input_pipeline
from lm.config import DataConfig
from lm.config.schema import ConfigError
from lm.corpus import decontaminate
from lm.data.readers import registry, tables
from lm.data.readers import text as records
from lm.data.record import DataError, Fault
from lm.tasks import build_config
from tests import small_sets

MARK = "\ufeff"
TEXTS = ["Grüße, Zoë", "naïve “café” - 10 €", "ein Wort", "noch eins", "und das letzte"]
OF_EAST_ASIA = ["日本語の文章", "表示ソ能", "中文的句子", "第四行", "最後"]  # 表 ends in 0x5c in shift_jis


def find(path: Path, **options) -> list:
    cfg = DataConfig(path=str(path), **options)
    return [item for unit in registry.find(cfg).train for item in registry.read(unit, cfg)]


def write_as(name: str, folder: Path, texts: list[str], encoding: str = "utf-8") -> tuple[Path, dict]:
    """Texts in a file of a format, and the options that read them again as 'text' of records."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / {"table": "a.csv", "tsv": "a.tsv", "parallel": "a.{x,y}", "squad": "a.json"}.get(name, f"a.{name}")
    options: dict = {"format": {"tsv": "table", "json": "jsonl", "txt": "text"}.get(name, name)}
    if name == "parallel":
        for side in ("a.x", "a.y"):
            (folder / side).write_bytes("\n".join(texts).encode(encoding))
        return path, options
    if name == "table":
        file = io.StringIO()
        csv.writer(file).writerows([["text"], *([text] for text in texts)])
        content = file.getvalue()
    elif name == "squad":
        questions = [
            {
                "context": text,
                "qas": [{"question": "?", "answers": [{"text": text[-1], "answer_start": len(text) - 1}]}],
            }
            for text in texts
        ]
        content = json.dumps({"data": [{"paragraphs": questions}]}, ensure_ascii=False)
    elif name == "conll":
        content = "\n\n".join(f"{text.replace(' ', '_')}\tO\nend\tO" for text in texts) + "\n"
        options["rename"] = (("1", "token"), ("2", "tag"))
    else:
        objects = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
        content = {
            "txt": "<|>".join(texts),
            "tsv": "\r\n".join(["text", *texts]),
            "jsonl": "\n".join(objects),
            "json": f"[{', '.join(objects)}]",
        }[name]
        options |= {"separator": "<|>"} if name == "txt" else {}
    path.write_bytes(content.encode(encoding))
    return path, options


def texts_of(found: list) -> list[str]:
    assert not any(isinstance(item, Fault) for item in found), found
    return [r["words"][0].replace("_", " ") if "words" in r else r.get("text", r.get("context")) for r in found]


TEXT_FORMATS = ("txt", "jsonl", "json", "table", "tsv", "conll", "squad", "parallel")


# U+FEFF ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXT_FORMATS)
def test_a_mark_inside_a_text_is_part_of_it_and_one_at_the_start_of_the_file_is_not(tmp_path, name):
    texts = [f"a{MARK}b", f"{MARK}{MARK}c", f"d{MARK}"]
    path, options = write_as(name, tmp_path, texts)
    assert texts_of(find(path, **options)) == texts
    for file in (path,) if name != "parallel" else (tmp_path / "a.x", tmp_path / "a.y"):
        file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())
    assert texts_of(find(path, **options)) == texts


@pytest.mark.parametrize("name", ["parquet", "arrow", "tfds", "array_record"])
def test_a_mark_is_part_of_a_text_in_every_format(name, tmp_path, tfds_dir):
    import tensorflow_datasets as tfds

    texts = [f"{MARK}a", f"b{MARK}c"]
    rows = [{"text": text} for text in texts]
    if name == "tfds":
        small_sets.write_tfds(tfds_dir, "marks", {"text": tfds.features.Text()}, {"train": rows})
        path = Path("marks")
    elif name == "array_record":
        path = small_sets.write_array_record(tmp_path / "a.array_record", [json.dumps(row).encode() for row in rows])
    elif name == "parquet":
        path = small_sets.write_parquet(tmp_path / "a.parquet", small_sets.table(rows))
    else:
        (tmp_path / "set").mkdir()
        path = small_sets.save_to_disk(tmp_path / "set", small_sets.table(rows), shards=1)
    assert texts_of(find(path, format=name)) == texts


def test_offsets_count_a_mark(tmp_path):
    path = tmp_path / "a.jsonl"
    entity = {"start": 4, "end": 6, "label": "X"}
    path.write_text(json.dumps({"text": f"a{MARK}\r\nbc", "entities": [entity]}))
    (record,) = find(path, format="jsonl")
    assert record["text"][record["entities"][0]["start"] : record["entities"][0]["end"]] == "bc"


def test_only_the_first_of_two_gzip_members_loses_its_byte_order_mark(tmp_path):
    import gzip

    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(codecs.BOM_UTF8 + b"one\n") + gzip.compress(codecs.BOM_UTF8 + b"two"))
    assert texts_of(find(path, format="text")) == [f"one\n{MARK}two"]


# data.encoding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoding", "texts"),
    [
        ("cp1252", TEXTS),
        ("utf-16", [*TEXTS, "\u0a0a\u0a0d\u010a", f"x{MARK}"]),  # characters that hold the byte 0x0a
        ("utf-16-le", [*TEXTS, "\u0a0a\u0a0d\u010a"]),
        ("utf-16-be", ["\U0001f600", *TEXTS]),
        ("utf-32", [*TEXTS, "\u0a0a"]),
        ("utf-8-sig", TEXTS),
        ("shift_jis", OF_EAST_ASIA[:2]),
        ("gb18030", [*OF_EAST_ASIA, "\U0001f600"]),
        ("iso2022_jp", OF_EAST_ASIA[:2]),
        ("cp500", ["plain", "text", "of", "a", "mainframe"]),
        ("utf-7", TEXTS),
    ],
)
@pytest.mark.parametrize("name", TEXT_FORMATS)
def test_every_text_format_is_read_in_every_encoding(tmp_path, monkeypatch, name, encoding, texts):
    path, options = write_as(name, tmp_path, texts, encoding)
    for chunk_bytes in (1, 7, 1 << 20):
        monkeypatch.setattr(records, "_CHUNK_BYTES", chunk_bytes)
        assert texts_of(find(path, encoding=encoding, **options)) == texts


def test_the_mark_of_utf_16_is_taken_once_and_its_absence_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(f"{MARK}a".encode("utf-16"))
    assert texts_of(find(path, format="text", encoding="utf-16")) == [f"{MARK}a"]
    path.write_bytes(f"{MARK}a".encode("utf-16-be"))
    assert texts_of(find(path, format="text", encoding="utf-16-be")) == ["a"]
    path.write_bytes("a".encode("utf-16-be"))
    with pytest.raises(DataError, match=r"a.txt: no byte order mark at its start; set data.encoding=utf-16-le or"):
        find(path, format="text", encoding="utf-16")


@pytest.mark.parametrize(
    ("content", "encoding", "place", "says"),
    [
        (b"ok\ncaf\xe9\nok", "utf-8", 2, "0xe9.*data.encoding.*latin-1 or cp1252"),
        (b"ok\n10 \x80\nok", "utf-8", 2, "0x80.*data.encoding.*do as cp1252"),
        ("ok\n日本語の文章\nok".encode("shift_jis"), "utf-8", 2, "data.encoding.*shift_jis"),
        ("ok\nok".encode("utf-16"), "utf-8", 1, "0xff.*data.encoding.*utf-16"),
        ("ok\nok".encode("utf-16-le"), "utf-8", 1, "NUL.*data.encoding"),
        (b"ok\nok\n\x81\x81", "cp1252", 3, "0x81, which is not cp1252; expected text as data.encoding says"),
        (b"ok\n\xc3\x28\nok", "ascii", 2, "0xc3, which is not ascii"),
        (b"ok\nok\n\xe3\x81\xff", "shift_jis", 3, "0xff, which is not shift_jis"),
        ("ok\nok".encode("utf-16-le") + b"\n\0\x00\xd8\n\0", "utf-16-le", 3, "which is not utf-16-le"),
    ],
)
def test_bytes_that_are_not_of_the_encoding_are_a_fault_of_their_line(tmp_path, content, encoding, place, says):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    found = find(path, format="text", separator="\n", encoding=encoding)
    fault = next(item for item in found if isinstance(item, Fault))
    assert fault.where == f"{path}:{place}"
    assert re.search(says, fault.message), fault.message
    assert len(found) == 3 or b"\0" in content


def test_a_table_in_latin_1(tmp_path):
    path = tmp_path / "latin1.csv"
    path.write_bytes("text,label\nGrüße aus Köln,gut\nschön,gut\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin1.csv:2: invalid UTF-8: found byte 0xfc.*data.encoding.*latin-1"):
        registry.load(DataConfig(path=str(path), format="table"))
    split = registry.load(DataConfig(path=str(path), format="table", encoding="latin-1", eval_fraction=0.5))
    assert sorted(record["text"] for record in split.train + split.valid) == ["Grüße aus Köln", "schön"]
    path.write_bytes("Übung,b\n1,2\n".encode("latin-1"))  # the header, too
    with pytest.raises(DataError, match=r"latin1.csv:1: .*data.encoding"):
        registry.load(DataConfig(path=str(path), format="table"))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("latn-1", "did you mean 'latin_1'|did you mean 'latin1'"),
        ("", "expected an encoding"),
        ("rot13", "not an encoding of text"),
        ("zlib", "not an encoding of text"),
        ("hex", "not an encoding of text"),
        ("idna", "not an encoding of text"),
        ("punycode", "not an encoding of text"),
        ("unicode_escape", "not an encoding of text"),
        ("raw_unicode_escape", "not an encoding of text"),
        ("undefined", "not an encoding of text"),
        ("a\0b", "expected an encoding"),
    ],
)
def test_an_unknown_encoding_is_refused(name, says):
    source = {"data": {"encoding": name}, "train": {"total_steps": 1}}
    with pytest.raises(ConfigError, match=f"'data.encoding' is .*({says})"):
        build_config(source)
    source["data"]["encoding"] = "cp1252"
    assert build_config(source).data.encoding == "cp1252"


@pytest.mark.parametrize("name", ["parquet", "arrow", "tfds", "array_record", "images", "prepared", "builtin_text"])
def test_binary_formats_refuse_the_encoding_key(tmp_path, name):
    (tmp_path / "a").write_bytes(b"x")
    path = "" if name == "builtin_text" else str(tmp_path / "a")
    with pytest.raises(ConfigError, match=f"'data.encoding' is 'latin-1', but .*{name}"):
        input_pipeline.load(DataConfig(path=path, format=name, encoding="latin-1"))


def test_an_evaluation_file_is_utf8_and_its_error_names_no_key(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_bytes(b"one two three four five six seven eight caf\xe9")
    with pytest.raises(DataError, match="invalid UTF-8") as error:
        decontaminate.read([epath.Path(path)], 8)
    assert "data.encoding" not in str(error.value)


# Memory ---------------------------------------------------------------------------------------------------------------


def test_a_field_of_a_table_may_be_long(tmp_path):
    long = "word " * 100_000
    path = tmp_path / "a.csv"
    path.write_text(f'text,label\n{long}x,1\n"{long}, ""y""",2\n')
    found = list(tables.read_table(epath.Path(path), {}))
    assert [record["text"] for record in found] == [f"{long}x", f'{long}, "y"']


def test_the_sides_of_a_parallel_corpus_are_read_line_by_line(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_CHUNK_BYTES", 1 << 12)
    for side in "xy":
        (tmp_path / f"a.{side}").write_bytes(b"a line of words\n" * 10_000)
    tracemalloc.start()
    count = sum(1 for _ in tables.read_parallel(epath.Path(tmp_path / "a.x"), epath.Path(tmp_path / "a.y")))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 10_000 and peak < 300_000


MEASURED = """
    import sys
    from lm import input_pipeline
    from lm.config import Config, DataConfig, TokenizerConfig
    from lm.data.readers import registry
    from lm.tasks import base, language_modelling

    def memory(name):
        lines = open("/proc/self/status").read().splitlines()
        return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024

    path, name, stage = sys.argv[1:]
    data = DataConfig(format=name, path=path, eval_fraction=0.1, separator="<|>" if name == "text" else "")
    cfg = Config(data=data, tokenizer=TokenizerConfig(vocab_size=512, train_bytes=500_000))
    before = memory("VmHWM")
    if stage == "read":
        sum(len(r["text"]) for r in registry.read(registry.find(data).train[0], data))
    else:
        found = list(registry.read(registry.find(data).train[0], data))
        split = registry.Split(found, found[:2], "", "")
        words = base.SENTENCEPIECE.train((r["text"] for r in split.train), cfg.tokenizer)
        if stage == "tokenize":
            ids = [language_modelling.whole_ids(r["text"], words) for r in split.train]
        else:
            input_pipeline.build(cfg, words, split)
    print(memory("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stage", "times"),
    [
        ("text", "read", 4),
        ("jsonl", "read", 5),
        ("table", "read", 10),
        ("jsonl", "tokenize", 10),
        ("jsonl", "build", 14),
    ],
)
def test_a_line_of_50_mb_takes_memory_in_proportion(tmp_path, name, stage, times):
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randrange(2, 9))) for _ in range(2_000)]
    line = " ".join(rng.choices([*words, "said,"], k=9_000_000))[:50_000_000]
    short = [f"a short text, no. {i}" for i in range(9)]
    path, options = write_as({"text": "txt"}.get(name, name), tmp_path, [*short, line])
    command = [sys.executable, "-c", textwrap.dedent(MEASURED), str(path), options["format"], stage]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < times * len(line), f"{int(done.stdout) / len(line):.1f} times the line"
