"""lm/data/shards.py: what is read back is what was packed, and a row that changed on disk is never used."""

import itertools
import json
import re
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from lm import config, input_pipeline
from lm.data import packing, shards, tokenizer
from lm.data.record import DataError
from lm.tasks import TASKS
from tests import toys

TEXTS = [f"document {i} says hello {'and again ' * (i % 23)}now.\n" for i in range(90)]
TOK = tokenizer.train(TEXTS, 330, 100_000)


def pack(task="causal_lm", **data):
    cfg = config.Config(task=toys.task(task), data=config.DataConfig(**({"seq_len": 48} | data)))
    records = [{"text": text, "source": ""} for text in TEXTS]
    columns = TASKS[task].columns(cfg)
    made = input_pipeline.make_examples(TASKS[task], records, TOK, cfg, Counter())
    rows, _ = packing.pack(made, columns, cfg.data)
    return {key: rows[key].astype(dtype) for key, (_, dtype) in columns.items()}


def layout(rows):
    return shards.Layout(rows["tokens"].shape[1], "targets" in rows)


def prepare(folder, rows, sizes):
    """The rows in shards of so many each, with an index."""
    folder.mkdir(exist_ok=True)
    ends = np.cumsum([0, *sizes])
    entries = [
        shards.write(folder, f"train-{i}", {key: x[a:b] for key, x in rows.items()}, {"documents": 1})
        for i, (a, b) in enumerate(itertools.pairwise(ends))
    ]
    about = {"length": rows["tokens"].shape[1], "shifted": "targets" in rows}
    settings = {"packing": "best_fit"}
    shards.write_index(folder, {"parts": {"train": entries, "valid": []}, "layout": about, "settings": settings})
    return entries


@pytest.mark.parametrize("task", ["causal_lm", "prefix_lm", "masked_lm", "span_corruption"])
@pytest.mark.parametrize("packing_", ["pad", "best_fit", "concat"])
@pytest.mark.parametrize("mask", [True, False])
def test_rows_are_read_back_as_they_were_packed(tmp_path, task, packing_, mask):
    if packing_ not in TASKS[task].packing:
        pytest.skip("this task does not pack so")
    rows = pack(task, packing=packing_, mask_documents=mask)
    size = len(rows["tokens"])
    prepare(tmp_path, rows, [5, 1, size - 6])
    table = shards.open_folder(str(tmp_path)).table("train", mask_documents=mask)
    assert len(table) == size
    ids = np.random.default_rng(0).permutation(size)
    found = table.take(ids)
    assert found.keys() == rows.keys()
    for key, column in rows.items():
        np.testing.assert_array_equal(found[key], column[ids], strict=True)


def test_large_ids_and_rows_of_one_document_are_kept():
    tokens = np.array([[7, 70_000, 2**31 - 1, 0], [1, 2, 3, 4]])
    segments = np.array([[1, 1, 1, 0], [1, 1, 2, 2]])
    positions = np.array([[0, 1, 2, 0], [0, 1, 0, 1]])
    rows = {"tokens": tokens, "segment_ids": segments, "positions": positions}
    cells = shards.encode(rows)
    assert cells.dtype == np.uint32 and cells.shape == (2, 4 + 2 + 2 * 2)
    assert cells[:, 6:].tolist() == [[3, 0, 0, 0], [2, 0, 2, 0]]
    for key, found in shards.decode(cells, layout(rows)).items():
        assert found.tolist() == rows[key].tolist()


def test_rows_that_do_not_follow_from_their_tokens_are_refused():
    rows = pack()
    weights = rows["loss_weights"].copy()
    weights[0, 0] = 0.0
    with pytest.raises(ValueError, match="'loss_weights' does not follow from the tokens"):
        shards.encode(rows | {"loss_weights": weights})


def test_every_bit_of_a_row_is_covered_by_the_checksum(tmp_path):
    rows = {key: x[:3] for key, x in pack().items()}
    prepare(tmp_path, rows, [3])
    path = tmp_path / "train-0.npy"
    whole = path.read_bytes()
    begin = whole.index(b"\n") + 1
    flips = np.random.default_rng(0).integers(begin * 8, len(whole) * 8, 400)
    for number, bit in enumerate([*flips, begin * 8, len(whole) * 8 - 1]):
        row = (bit // 8 - begin) // ((len(whole) - begin) // 3)
        copy = tmp_path / f"copy{number}"  # another name: files that were opened stay so
        copy.mkdir()
        shutil.copy(tmp_path / "index.json", copy)
        (copy / path.name).write_bytes(toys.flip(whole, bit))
        table = shards.open_folder(str(copy)).table("train")
        with pytest.raises(DataError, match=rf"{copy}/train-0\.npy: row {row} is damaged: .*max_bad_records"):
            table.take(np.arange(3))
        table.take(np.array([i for i in range(3) if i != row]))
    path.write_bytes(whole[:begin] + bytes(len(whole) - begin))
    with pytest.raises(DataError, match="row 0 is damaged"):
        shards.open_folder(str(tmp_path)).table("train").take(np.arange(3))


def test_damaged_rows_are_left_out_up_to_a_limit_and_counted_once(tmp_path, capsys):
    rows = pack(packing="pad")
    prepare(tmp_path, rows, [4, 6])
    for name, row in (("train-0", 3), ("train-1", 2)):
        stored = np.load(tmp_path / f"{name}.npy")
        stored[row, 7] ^= 1
        np.save(tmp_path / f"{name}.npy", stored)
    with pytest.raises(DataError, match=r"train-1\.npy: row 2 is damaged.*1 were left out before"):
        shards.open_folder(str(tmp_path)).table("train", skip=1).take(np.arange(10))
    table = shards.open_folder(str(tmp_path)).table("train", skip=2)
    capsys.readouterr()
    for _ in range(2):
        found = table.take(np.arange(10))
    assert capsys.readouterr().err.count("is damaged") == len(table.damaged) == 2
    for key, column in rows.items():
        good = np.arange(10)[~np.isin(np.arange(10), [3, 6])]
        np.testing.assert_array_equal(found[key][good], column[good])
        assert not found[key][[3, 6]].any()


def test_an_incomplete_folder_is_refused_by_name(tmp_path):
    with pytest.raises(DataError, match=rf"data path '{tmp_path}': no index.json in it; .*prepare_data"):
        shards.open_folder(str(tmp_path))
    entries = prepare(tmp_path, pack(), [4, 4])
    assert entries[0]["rows"] == 4 and entries[0]["documents"] == 1
    (tmp_path / "train-1.npy").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"train-1\.npy: is missing"):
        shards.open_folder(str(tmp_path))
    (tmp_path / "train-1.npy").write_bytes((tmp_path / "elsewhere").read_bytes()[:-1])
    with pytest.raises(DataError, match=r"train-1\.npy: has [\d,]+ bytes, expected"):
        shards.open_folder(str(tmp_path))
    index = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(index | {"format": 9}))
    with pytest.raises(DataError, match="format 9, this code reads 2"):
        shards.open_folder(str(tmp_path))
    (tmp_path / "index.json").write_text(json.dumps(index)[:40])
    with pytest.raises(DataError, match=r"index\.json: damaged"):
        shards.open_folder(str(tmp_path))


def test_a_shard_that_is_truncated_while_it_is_read_is_an_error_and_no_death(tmp_path):
    """Reading the lost part of a mapped file ends a process by SIGBUS, hence the process of its own."""
    prepare(tmp_path, pack(), [4, 4])
    code = f"""
import numpy as np
from lm.data import shards
from lm.data.record import DataError
table = shards.open_folder({str(tmp_path)!r}).table("train")
table.take(np.arange(8))
open("{tmp_path}/train-1.npy", "r+b").truncate(0)
table.take(np.arange(4))
try:
    table.take(np.arange(8))
except DataError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(
        rf"{tmp_path}/train-1\.npy: truncated from [\d,]+ to 0 bytes while it .*; copy .*\n", done.stdout
    )


HOSTILE = {
    "a parent's file": lambda index, entry: entry.update(name="../outside/train-0"),
    "an absolute path": lambda index, entry: entry.update(name="/etc/passwd"),
    "a hidden file": lambda index, entry: entry.update(name=".train-0"),
    "a name with NUL": lambda index, entry: entry.update(name="train-0\0"),
    "a name that is none": lambda index, entry: entry.update(name=["train-0"]),
    "negative rows": lambda index, entry: entry.update(rows=-4),
    "rows beyond int64": lambda index, entry: entry.update(rows=2**63),
    "rows of 300 digits": lambda index, entry: entry.update(rows=10**300),
    "tokens of 300 digits": lambda index, entry: entry.update(tokens=10**300),
    "half a row": lambda index, entry: entry.update(rows=1.5),
    "rows as text": lambda index, entry: entry.update(rows="4"),
    "true for rows": lambda index, entry: entry.update(rows=True),
    "more rows than bytes": lambda index, entry: entry.update(rows=10**6),
    "no size": lambda index, entry: entry.pop("bytes_on_disk"),
    "no sha256": lambda index, entry: entry.update(sha256=None),
    "a count that a shard lacks": lambda index, entry: index["parts"]["train"][1].pop("documents"),
    "a shard that is no object": lambda index, entry: index["parts"]["train"].insert(0, "train-0"),
    "parts as a list": lambda index, entry: index.update(parts=[]),
    "no valid part": lambda index, entry: index["parts"].pop("valid"),
    "a length of 0": lambda index, entry: index["layout"].update(length=0),
    "a negative length": lambda index, entry: index["layout"].update(length=-1),
    "a length beyond memory": lambda index, entry: index["layout"].update(length=2**40),
    "a length as text": lambda index, entry: index["layout"].update(length="48"),
    "a layout of other keys": lambda index, entry: index["layout"].update(mask_documents=False),
    "no layout": lambda index, entry: index.pop("layout"),
    "no settings": lambda index, entry: index.pop("settings"),
    "settings as text": lambda index, entry: index.update(settings="best_fit"),
    "a tokenizer of a number": lambda index, entry: index.update(tokenizer_hash=7),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_an_index_made_to_harm_is_refused_by_name(tmp_path, kind):
    """Its checksum is right: whoever writes an index can compute it."""
    prepare(tmp_path, pack(), [4, 4])
    prepare(tmp_path / "outside", pack(), [4, 4])
    index = {key: x for key, x in json.loads((tmp_path / "index.json").read_text()).items() if key != "sha256"}
    HOSTILE[kind](index, index["parts"]["train"][0])
    shards.write_index(tmp_path, index)
    with pytest.raises(DataError, match=rf"^{tmp_path}/index\.json: damaged \(.*\); prepare the data anew$"):
        shards.open_folder(str(tmp_path))


def test_an_index_of_deep_json_a_link_out_of_the_folder_and_a_loop_of_links_are_refused(tmp_path):
    folder = tmp_path / "data"
    prepare(folder, pack(), [4, 4])
    shard = folder / "train-1.npy"
    shard.rename(tmp_path / "elsewhere.npy")
    shard.symlink_to(tmp_path / "elsewhere.npy")
    with pytest.raises(DataError, match=rf"{shard}: a link to {tmp_path}/elsewhere\.npy, outside of the folder"):
        shards.open_folder(str(folder))
    (tmp_path / "linked").symlink_to(folder)  # the folder itself may be a link
    shard.unlink()
    (tmp_path / "elsewhere.npy").rename(shard)
    assert len(shards.open_folder(str(tmp_path / "linked")).table("train")) == 8
    shard.unlink()
    shard.symlink_to(shard)
    with pytest.raises(DataError, match=rf"{shard}: is missing"):
        shards.open_folder(str(folder))
    for deep in ("[" * 100_000, '{"a":' * 100_000, '{"format": 2, "parts": ' + "[" * 900 + "]" * 900 + "}"):
        (folder / "index.json").write_text(deep)
        with pytest.raises(DataError, match=rf"{folder}/index\.json: damaged"):
            shards.open_folder(str(folder))


def test_a_row_whose_documents_are_longer_than_itself_is_damaged_whatever_its_checksum(tmp_path):
    prepare(tmp_path, pack(), [4])
    stored = np.load(tmp_path / "train-0.npy")
    stored[2, 50] = 60_000  # the length of its first document
    np.save(tmp_path / "train-0.npy", shards.stamp(stored, 48, "train-0"))
    table = shards.open_folder(str(tmp_path)).table("train")
    with pytest.raises(DataError, match=r"train-0\.npy: row 2 is damaged"):
        table.take(np.arange(4))


def test_fingerprint_depends_on_the_rows_and_not_on_the_path(tmp_path):
    rows = pack()
    prepare(tmp_path / "a", rows, [4, 4])
    prepare(tmp_path / "b", rows, [4, 4])
    prepare(tmp_path / "c", {key: x[::-1] for key, x in rows.items()}, [4, 4])
    a, b, c = (shards.open_folder(str(tmp_path / name)).fingerprint for name in "abc")
    assert a == b != c


DAMAGE = ("cut", "bit", "bytes", "zeros", "missing", "swapped", "rows swapped", "index")


def damage(folder, kind, rng):
    """Damages a prepared folder of three shards."""
    one, other = (folder / f"train-{i}.npy" for i in rng.choice(3, 2, replace=False))
    content = bytearray(one.read_bytes())
    at = int(rng.integers(len(content)))
    if kind == "cut":
        del content[at:]
    elif kind == "bit":  # of the header too
        at = int(rng.integers(128)) if rng.random() < 0.5 else at
        content[at] ^= 1 << int(rng.integers(8))
    elif kind == "bytes":
        content[at : at + 30] = rng.bytes(len(content[at : at + 30]))
    elif kind == "zeros":  # a page that was never written
        content[at : at + 4096] = bytes(len(content[at : at + 4096]))
    elif kind == "missing":
        one.unlink()
        return
    elif kind == "swapped":  # of the same size: the name alone tells them apart
        content, there = other.read_bytes(), one.read_bytes()
        other.write_bytes(there)
    elif kind == "rows swapped":
        stored = np.load(one)
        stored[[0, 1]] = stored[[1, 0]]
        np.save(one, stored)
        return
    else:
        text = (folder / "index.json").read_text()
        at = rng.choice([i for i, c in enumerate(text) if c.isalnum()])
        new = "7" if text[at] != "7" else "8"
        (folder / "index.json").write_text(text[:at] + new + text[at + 1 :])
        return
    one.write_bytes(content)


def test_every_row_of_200_damaged_folders_is_read_unchanged_or_reported(tmp_path):
    """Read, with a cap that nothing reaches: the rows that come back are the rows that were written, the others are
    padding and named; or all of it is refused by the name of its file."""
    rows = pack()
    size = len(rows["tokens"]) // 3
    rows = {key: x[: 3 * size] for key, x in rows.items()}
    prepare(tmp_path / "whole", rows, [size] * 3)
    rng, refused, reported = np.random.default_rng(0), 0, 0
    for number in range(200):
        kind = DAMAGE[number % len(DAMAGE)]
        folder = tmp_path / str(number)  # another name: files that were opened stay so
        shutil.copytree(tmp_path / "whole", folder)
        damage(folder, kind, rng)
        try:
            table = shards.open_folder(str(folder)).table("train", skip=10**6)
            found = table.take(np.arange(len(table)))
        except DataError as error:
            assert str(folder) in str(error)
            refused += 1
            continue
        finally:
            shards._opened.cache_clear()
        assert len(table) == 3 * size and kind not in ("cut", "missing", "index")
        is_read = found["segment_ids"].any(axis=1)
        assert is_read.sum() + len(table.damaged) == 3 * size
        assert len(table.damaged) == 2 * size if kind == "swapped" else len(table.damaged) > 0
        for key, column in rows.items():
            np.testing.assert_array_equal(found[key][is_read], column[is_read])
        reported += 1
        shutil.rmtree(folder)
    assert refused >= 75 and reported >= 75 and refused + reported == 200
