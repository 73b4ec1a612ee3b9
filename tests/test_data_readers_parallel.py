"""Parallel corpora: lines of two files are pairs."""

import pytest

from lm.config import DataConfig
from lm.data.readers import registry
from lm.data.record import DataError
from tests.test_data_readers_text import read, write


def parallel(tmp_path, source: bytes, target: bytes, **options) -> registry.Split:
    write(tmp_path / "train.en.gz", source)
    write(tmp_path / "train.de.gz", target)
    return read(tmp_path / "train.{en,de}.gz", format="parallel", **options)


@pytest.mark.parametrize("end", [b"", b"\n"])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_lines_of_two_files_are_pairs(tmp_path, newline, end):
    split = parallel(tmp_path, newline.join([b"a b", b"c", b"d"]) + end, newline.join([b"A", b"C D", "\xdf".encode()]))
    found = sorted(split.train + split.valid, key=lambda record: record["source"])
    assert [(record["text"], record["target"]) for record in found] == [("a b", "A"), ("c", "C D"), ("d", "\xdf")]
    assert [record["source"] for record in found] == [f"{tmp_path}/train.en.gz:{n}" for n in (1, 2, 3)]
    assert found[1]["messages"] == [{"role": "user", "content": "c"}, {"role": "assistant", "content": "C D"}]


def test_pairs_of_several_files(tmp_path):
    for name, text in {"1.en": b"a", "2.en": b"b", "1.de": b"A", "2.de": b"B"}.items():
        write(tmp_path / name, text)
    split = read(tmp_path / "*.{en,de}", format="parallel")
    assert sorted((record["text"], record["target"]) for record in split.train + split.valid) == [
        ("a", "A"),
        ("b", "B"),
    ]
    (tmp_path / "2.de").unlink()
    with pytest.raises(DataError, match="2 files of the first side, but 1 of the second"):
        read(tmp_path / "*.{en,de}", format="parallel")


def test_files_of_unequal_length_are_an_error_even_when_bad_records_are_skipped(tmp_path):
    with pytest.raises(DataError, match=r"train.en.gz has 3 lines, but \S*train.de.gz has 2"):
        parallel(tmp_path, b"a\nb\nc\n", b"A\nB\n", max_bad_records=100)


def test_an_empty_line_of_either_side_is_a_fault_at_its_place(tmp_path):
    with pytest.raises(DataError, match=r"train.en.gz:2: empty text"):
        parallel(tmp_path, b"a\n \nc\nd\n", b"A\n\nC\nD\n")
    with pytest.raises(DataError, match=r"train.de.gz:2: empty text"):
        parallel(tmp_path, b"a\nb\nc\nd\n", b"A\n\nC\nD\n")
    split = parallel(tmp_path, b"a\nb\nc\nd\n", b"A\n\nC\nD\n", max_bad_records=100)
    assert sorted(record["text"] for record in split.train + split.valid) == ["a", "c", "d"]
    assert "1 x empty text" in split.report


@pytest.mark.parametrize("path", ["train.en", "train.{en}", "{a,b}.{en,de}"])
def test_the_path_of_a_parallel_corpus_names_both_sides(path):
    with pytest.raises(DataError, match=r"expected the two sides once in braces, such as DIR/train.\{en,de\}.gz"):
        registry.load(DataConfig(path=path, format="parallel"))


def test_multi30k(shared_data):
    folder = shared_data("multi30k")
    split = read(folder / "val.{en,de}.gz", format="parallel", eval_path=str(folder / "test_2016_flickr.{en,de}.gz"))
    assert (len(split.train), len(split.valid)) == (1014, 1000)
    assert split.train[0]["text"].startswith("A group of men") and split.train[0]["target"].startswith("Eine Gruppe")
