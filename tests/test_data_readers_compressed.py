"""Packed files (gzip, zstandard, …) are read as the plain ones, and damaged ones are named."""

import gzip
import sys
import tracemalloc

import pytest
import zstandard
from etils import epath

from lm.data.readers import text
from lm.data.readers.text import read_jsonl
from lm.data.record import DataError
from tests.test_data_readers_text import BOM, GOOD, contents, read, write


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.json.gz", "a.json.zst"])
@pytest.mark.parametrize("chunk_bytes", [3, 1 << 20])
def test_packed_files_give_what_the_plain_one_gives(tmp_path, monkeypatch, name, chunk_bytes):
    plain = write(tmp_path / "plain.jsonl", b"\n".join(GOOD))
    content = b"[" + b" ,\n".join(GOOD) + b" ]\n" if ".json." in f"{name}." else BOM + b"\r\n".join(GOOD) + b"\r\n\r\n"
    packed = write(tmp_path / name, content)
    monkeypatch.setattr(text, "_CHUNK_BYTES", chunk_bytes)  # lines that span chunks, chunks that hold many lines
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


# What unpacks to much more than it is --------------------------------------------------------------------------------


def packed(suffix: str, pieces: list[bytes]) -> bytes:
    """The pieces as members of one file, each packed by itself."""
    pack = gzip.compress if suffix == ".gz" else zstandard.ZstdCompressor(level=1).compress
    return b"".join(map(pack, pieces))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.tar", "a-images-idx3-ubyte"])
def test_a_file_that_unpacks_to_too_much_is_an_error_that_names_the_key(tmp_path, monkeypatch, name, suffix):
    monkeypatch.setattr(text, "_NEVER_A_BOMB", 1 << 16)
    path = tmp_path / f"{name}{suffix}"
    path.write_bytes(packed(suffix, [b" " * (1 << 20)]))
    (tmp_path / f"a-labels-idx1-ubyte{suffix}").write_bytes(b"")
    ending = name.partition(".")[2]
    options = {"format": {"txt": "text", "csv": "table", "tar": "images", "": "images"}.get(ending, "jsonl")}
    with pytest.raises(DataError, match=rf"{path}: .*expected at most 20 times .*data.max_expansion"):
        read(path, max_expansion=20, **options)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_the_limit_is_on_what_is_unpacked_of_what_was_read(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(text, "_NEVER_A_BOMB", 0)
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(packed(suffix, [b"".join(b"%s\n" % line for line in GOOD * 100)]))
    factor = len(GOOD[0] + b"\n") * len(GOOD) * 100 / path.stat().st_size
    assert len(list(read_jsonl(epath.Path(path), {}, text.Opening(max_expansion=int(factor) + 1)))) == 800
    with pytest.raises(DataError, match=r"data.max_expansion"):
        list(read_jsonl(epath.Path(path), {}, text.Opening(max_expansion=int(factor) - 1)))
    monkeypatch.undo()
    assert len(list(read_jsonl(epath.Path(path), {}, text.Opening(max_expansion=1)))) == 800  # a small one is no bomb


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_packed_file_is_read_in_bounded_memory(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    line = GOOD[0] + b" " * 9_999 + b"\n"
    path.write_bytes(packed(suffix, [line * 6_000]))  # 60 MB, of some KB
    tracemalloc.start()
    chunks = sum(1 for _ in text.chunks(epath.Path(path), 1_000_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert chunks > 1 and peak < 40e6


def test_an_unpacked_file_has_no_limit_and_zstd_may_skip_frames(tmp_path):
    skipped = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"about"
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(skipped + packed(".zst", [GOOD[0] + b"\n"]) + skipped + packed(".zst", [GOOD[1]]))
    assert contents(read_jsonl(epath.Path(path), {})) == ["good 0", "good 1"]


def test_a_zstd_window_that_is_too_large_is_named(tmp_path):
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(packer.compress(GOOD[0]) + packer.flush())
    with pytest.raises(DataError, match=r"a.jsonl.zst: unpacking it needs a window of more than 128 MiB.*--long=27"):
        list(read_jsonl(epath.Path(path), {}))


def test_capital_endings_are_those_of_packed_files_and_tables_too(tmp_path):
    write(tmp_path / "A.CSV", b'text\n"a, b"\n')
    (tmp_path / "B.CSV.GZ").write_bytes(gzip.compress(b"text\nc\n"))
    split = read(tmp_path, format="table", eval_fraction=0.5)
    assert sorted(contents(split.train + split.valid)) == ["a, b", "c"]
