"""Packed files (gzip, zstandard, …) are read as the plain ones, and damaged ones are named."""

import sys

import pytest
from etils import epath

from lm.data import records
from lm.data.records import DataError, read_jsonl
from tests.test_data_sources import BOM, GOOD, contents, read, write


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.json.gz", "a.json.zst"])
@pytest.mark.parametrize("chunk_bytes", [3, 1 << 20])
def test_packed_files_give_what_the_plain_one_gives(tmp_path, monkeypatch, name, chunk_bytes):
    plain = write(tmp_path / "plain.jsonl", b"\n".join(GOOD))
    content = b"[" + b" ,\n".join(GOOD) + b" ]\n" if ".json." in f"{name}." else BOM + b"\r\n".join(GOOD) + b"\r\n\r\n"
    packed = write(tmp_path / name, content)
    monkeypatch.setattr(records, "_CHUNK_BYTES", chunk_bytes)  # lines that span chunks, chunks that hold many lines
    found, expected = (list(read_jsonl(epath.Path(p), {})) for p in (packed, plain))
    assert contents(found) == contents(expected) == [f"good {i}" for i in range(8)]
    assert [r["source"] for r in found] == [f"{packed}:{i + 1}" for i in range(8)]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_concatenated_members_are_one_file(tmp_path, suffix):
    one, two = write(tmp_path / f"1{suffix}", GOOD[0] + b"\n"), write(tmp_path / f"2{suffix}", GOOD[1])
    both = tmp_path / f"both.jsonl{suffix}"
    both.write_bytes(one.read_bytes() + two.read_bytes())
    assert contents(read_jsonl(epath.Path(both), {})) == ["good 0", "good 1"]


def test_an_empty_gzip_of_zero_bytes_is_an_empty_file(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(b"")
    with pytest.raises(DataError, match="empty file"):
        read(tmp_path / "a.jsonl.gz")


@pytest.mark.parametrize("max_bad_records", [0, 100])
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.txt.gz", "a.txt.zst", "a.json.gz"])
@pytest.mark.parametrize("damage", ["cut in half", "last byte lost", "foreign", "trailing bytes"])
def test_a_damaged_packed_file_is_an_error_that_names_it(tmp_path, name, damage, max_bad_records):
    path = write(tmp_path / name, b"[" + b",\n".join(GOOD) + b"]" if ".json." in name else b"\n".join(GOOD * 50))
    whole = path.read_bytes()
    damaged = {
        "cut in half": whole[: len(whole) // 2],
        "last byte lost": whole[:-1],
        "foreign": b"\n".join(GOOD),
        "trailing bytes": whole + b"trailing",
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(DataError, match=rf"{path}: .*(truncated|damaged).*expected a whole .{path.suffix[1:]} file"):
        read(path, format="text" if ".txt" in name else "jsonl", max_bad_records=max_bad_records)


def test_without_zstandard_the_error_says_what_to_install(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl.zst", GOOD[0])
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(DataError, match=f"{path}: .*pip install zstandard"):
        read(path)
