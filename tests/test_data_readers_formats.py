"""Every format of published data sets: the same records, the same held-out ones, every fault with its place."""

import json
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import tensorflow_datasets as tfds
from etils import epath

from lm.config import DataConfig
from lm.config.schema import ConfigError
from lm.data.readers import array_record, parquet, registry
from lm.data.record import DataError, Fault
from tests import small_sets

CLASSES = ("neg", "pos")
ROWS = [{"text": f"review {i}\nof a film", "label": i % 2} for i in range(20)]
NAMED = [{"text": row["text"], "label": CLASSES[row["label"]]} for row in ROWS]


def lines(rows) -> list[bytes]:
    return [json.dumps(row).encode() for row in rows]


def write_jsonl(folder: Path, rows) -> Path:
    folder.mkdir()
    for i, half in enumerate((rows[:10], rows[10:])):
        (folder / f"{i}.jsonl").write_bytes(b"\n".join(lines(half)))
    return folder


def write_array_record(folder: Path, rows) -> Path:
    for i, half in enumerate((rows[:10], rows[10:])):
        small_sets.write_array_record(folder / f"{i}.array_record", lines(half))
    return folder


def in_columns(rows) -> pyarrow.Table:
    return small_sets.table(rows, {"label": small_sets.class_label(*CLASSES), "text": {"_type": "Value"}})


def write_parquet(folder: Path, rows) -> Path:
    for i, half in enumerate((rows[:10], rows[10:])):
        small_sets.write_parquet(folder / f"train-{i:05}-of-00002.parquet", in_columns(half))
    return folder


def write_arrow(folder: Path, rows) -> Path:
    return small_sets.save_to_disk(folder, in_columns(rows))


FEATURES = {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(names=CLASSES)}


def write_tfds(folder: Path, rows) -> str:
    small_sets.write_tfds(folder.parent / "tfds", "imdb_reviews/plain_text", FEATURES, {"train": rows})
    return "imdb_reviews"


# format -> (writes rows at a place and gives the data.path to them, rows of a file, whether classes have names there)
WRITERS = {
    "jsonl": (write_jsonl, 10, False),
    "array_record": (write_array_record, 10, False),
    "parquet": (write_parquet, 10, True),
    "arrow": (write_arrow, 10, True),
    "tfds": (write_tfds, 20, True),
}


def written(name: str, place: Path, numbered: list[dict]) -> DataConfig:
    """A config that reads `numbered` in that format; where it names no classes, they stand by their names."""
    write, _, names_classes = WRITERS[name]
    named = [row | {"label": CLASSES[row["label"]]} if row.get("label") in (0, 1) else row for row in numbered]
    path = write(place, numbered if names_classes else named)
    return DataConfig(format=name, path=str(path), eval_fraction=0.3)


def contents(found) -> list[dict]:
    return [{key: value for key, value in record.items() if key not in ("source", "identity")} for record in found]


def everything(cfg: DataConfig) -> list:
    return [item for unit in registry.find(cfg).train for item in registry.read(unit, cfg)]


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_records_and_the_same_held_out_ones(name, tmp_path, tfds_dir):
    cfg = written(name, tmp_path / "set", ROWS)
    found = everything(cfg)
    assert contents(found) == NAMED
    per_file = WRITERS[name][1]
    assert [int(record["source"].rpartition(":")[2]) for record in found] == [i % per_file + 1 for i in range(20)]
    assert all(Path(record["source"].rpartition(":")[0]).is_file() for record in found)
    split = registry.load(cfg)
    reference = registry.load(written("jsonl", tmp_path / "reference", ROWS))
    assert contents(split.train) == contents(reference.train)
    assert contents(split.valid) == contents(reference.valid)
    assert 0 < len(split.valid) < 12


@pytest.mark.parametrize("name", WRITERS)
def test_a_bad_record_is_named_by_its_file_and_number_in_every_format(name, tmp_path, tfds_dir):
    bad = ROWS[7] | {"text": " \n"}
    cfg = written(name, tmp_path / "set", [*ROWS[:7], bad, *ROWS[8:]])
    found = everything(cfg)
    assert len(found) == 20
    [fault] = [item for item in found if isinstance(item, Fault)]
    assert (fault.kind, found.index(fault)) == ("empty text", 7)
    file, _, number = fault.where.rpartition(":")
    assert Path(file).is_file() and number == "8"
    with pytest.raises(DataError, match=rf"{file}:8: empty text: 'text' is str"):
        registry.load(cfg)


@pytest.mark.parametrize("name", WRITERS)
def test_rename_and_a_field_that_is_missing(name, tmp_path, tfds_dir, monkeypatch):
    rows = [{"sentence": row["text"], "label": row["label"]} for row in ROWS]
    monkeypatch.setitem(FEATURES, "sentence", FEATURES["text"])
    monkeypatch.delitem(FEATURES, "text")
    cfg = written(name, tmp_path / "set", rows)
    with pytest.raises(
        DataError, match=r"missing field: found '(sentence', 'label|label', 'sentence)'; expected 'text'"
    ):
        registry.load(cfg)
    with pytest.raises(ConfigError, match=r"'data.rename' names a field twice"):
        registry.find(DataConfig(format=name, path=cfg.path, rename=(("a", "text"), ("sentence", "text"))))
    renamed = DataConfig(format=name, path=cfg.path, rename=(("sentence", "text"),))
    assert contents(everything(renamed)) == NAMED


@pytest.mark.parametrize("name", WRITERS)
def test_units_are_read_by_themselves_and_can_be_sent_to_another_process(name, tmp_path, tfds_dir):
    import pickle

    cfg = written(name, tmp_path / "set", ROWS)
    units = registry.find(cfg).train
    assert len(units) == 20 / WRITERS[name][1]
    assert len(set(map(str, units))) == len(units)
    sent = pickle.loads(pickle.dumps(units[-1]))
    assert contents(registry.read(sent, cfg)) == NAMED[-WRITERS[name][1] :]


@pytest.mark.parametrize("name", ["parquet", "arrow"])
def test_a_file_of_columns_is_read_a_few_rows_at_a_time(name, tmp_path):
    rows = small_sets.table([{"text": f"{i} " + "x" * 10_000, "unread": "y" * 10_000} for i in range(1000)])
    write = {"parquet": small_sets.write_parquet, "arrow": small_sets.write_arrow}[name]
    path = epath.Path(write(tmp_path / f"a.{name}", rows, 100))
    whole = rows.nbytes
    del rows
    before, peak = pyarrow.total_allocated_bytes(), 0
    tracemalloc.start()  # an Arrow stream lies in Python's own memory, what parquet unpacks in Arrow's
    try:
        for item in {"parquet": parquet.read_parquet, "arrow": parquet.read_arrow}[name](path, {}):
            assert "text" in item
            peak = max(peak, pyarrow.total_allocated_bytes() - before + tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert 0.05 * whole < peak < 0.3 * whole


# ArrayRecord ----------------------------------------------------------------------------------------------------------


def test_array_records_are_json_objects_or_texts_and_nothing_else(tmp_path):
    example = b"\n\x12\n\x10\n\x04text\x12\x08\n\x06\n\x04good"  # a serialized tf.train.Example, valid as UTF-8
    content = [b'{"text": "a"}', b"b\nc\td", example, b"e\nf\xff", b"{b", b' {"text": "d"}']
    path = small_sets.write_array_record(tmp_path / "a.array_record", content)
    cfg = DataConfig(format="array_record", path=str(path))
    found = everything(cfg)
    assert contents(item for item in found if not isinstance(item, Fault)) == [
        {"text": t} for t in ("a", "b\nc\td", "d")
    ]
    faults = [(item.kind, item.where) for item in found if isinstance(item, Fault)]
    assert faults == [("no text", f"{path}:3"), ("invalid UTF-8", f"{path}:4"), ("malformed JSON", f"{path}:5")]
    [fault] = everything(DataConfig(format="array_record", path=str(small_sets.write_array_record(tmp_path / "b", []))))
    assert (fault.kind, fault.where) == ("empty file", str(tmp_path / "b"))
    with pytest.raises(DataError, match=r"gs://bucket/a: ArrayRecord files are read from local disks only"):
        list(array_record.read_array_record(epath.Path("gs://bucket/a"), {}))


# Columns --------------------------------------------------------------------------------------------------------------


def test_a_folder_of_several_splits_stands_for_train(tmp_path):
    for split, rows in (("train", ROWS[:12]), ("test", ROWS[12:])):
        small_sets.write_parquet(tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet", in_columns(rows))
        small_sets.save_to_disk(tmp_path / "saved" / split, in_columns(rows))
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for cfg in (
        DataConfig(format="parquet", path=f"{tmp_path}/hub", eval_path=f"{tmp_path}/hub/data/test-*.parquet"),
        DataConfig(format="arrow", path=f"{tmp_path}/saved", eval_path=f"{tmp_path}/saved/test"),
    ):
        split = registry.load(cfg)
        assert (contents(split.train), contents(split.valid)) == (NAMED[:12], NAMED[12:])
        assert "not read" not in split.report
        with pytest.raises(DataError, match=r"data.eval_path .*: holds the splits 't.*', 't.*'; name one"):
            registry.find(DataConfig(format=cfg.format, path=cfg.path, eval_path=cfg.path))
    small_sets.write_parquet(tmp_path / "other" / "a-00000-of-00001.parquet", in_columns(ROWS))
    small_sets.write_parquet(tmp_path / "other" / "b-00000-of-00001.parquet", in_columns(ROWS))
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["a", "b"]}')
    for name, path in (("parquet", "other"), ("arrow", "saved")):
        with pytest.raises(DataError, match=f"data path '{tmp_path}/{path}': holds 'a', 'b' and no 'train'; name one"):
            registry.find(DataConfig(format=name, path=str(tmp_path / path)))


def test_an_incomplete_saved_data_set_is_an_error_before_it_is_read(tmp_path):
    folder = small_sets.save_to_disk(tmp_path / "set", in_columns(ROWS))
    cfg = DataConfig(format="arrow", path=str(folder))
    second = folder / "data-00001-of-00002.arrow"
    content = second.read_bytes()
    second.unlink()
    with pytest.raises(DataError, match=rf"{second}: no such file; expected it, for {folder}/state.json names it"):
        registry.find(cfg)
    second.write_bytes(content[:-8])  # a stream without its end, whose batches are whole
    with pytest.raises(DataError, match=rf"{second}: truncated or damaged: no end of the stream"):
        everything(cfg)
    second.write_bytes(content + content)
    with pytest.raises(DataError, match=rf"{second}: truncated or damaged: no end of the stream where it ends"):
        everything(cfg)
    for state, says in (
        ("{", "expected the JSON that save_to_disk writes"),
        ("[]", "found list; expected the object"),
        ("[" * 100_000, "expected the JSON that save_to_disk writes"),
        ('{"_data_files": [3]}', "expected the list '_data_files'"),
        ('{"_data_files": [{"filename": "../a.arrow"}]}', "file '../a.arrow'; expected the name of a file beside it"),
        ('{"_data_files": [{"filename": "/etc/passwd"}]}', "file '/etc/passwd'; expected the name of a file beside it"),
        ('{"_data_files": []}', "names no file"),
        ('{"_data_files": [], "_indices_data_files": [3]}', "a selection of the rows .*flatten_indices"),
    ):
        (folder / "state.json").write_text(state)
        with pytest.raises(DataError, match=rf"{folder}.*{says}"):
            registry.find(cfg)


@pytest.mark.parametrize("name", ["parquet", "arrow", "array_record"])
@pytest.mark.parametrize("path", ["xyz://bucket/a", "missing", "a.txt/b", "*.none"])
def test_a_path_without_files_is_an_error(name, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=f"data path '{path.replace('*', '.')}': "):
        registry.find(DataConfig(format=name, path=path))


def test_values_that_columns_can_have(tmp_path):
    rows = [
        {"words": ["a"], "tags": [1], "nested": {"label": 1}},
        {"words": ["b"], "tags": [0], "nested": None},
        {"words": ["c"], "tags": [5], "nested": None},
        {"words": None, "tags": [0], "nested": None},
        {"words": ["d"], "tags": [-5], "nested": None},
    ]
    classes = {"tags": {"feature": small_sets.class_label("O", "B"), "_type": "Sequence"}, "words": {"_type": "List"}}
    path = small_sets.write_parquet(tmp_path / "a.parquet", small_sets.table(rows, classes))
    found = everything(DataConfig(format="parquet", path=str(path)))
    assert contents(found[:2]) == [{"words": ["a"], "tags": ["B"]}, {"words": ["b"], "tags": ["O"]}]
    assert found[2] == Fault("unknown label", f"{path}:3", "'tags[0]' is int 5; expected a number from 0 to 1")
    assert [(item.kind, item.where) for item in found[3:]] == [
        ("wrong type", f"{path}:4"),
        ("unknown label", f"{path}:5"),
    ]
    text = pyarrow.array([b"good", b"caf\xe9", b"good"]).cast(pyarrow.string(), safe=False).dictionary_encode()
    small_sets.write_parquet(path, pyarrow.table({"text": pyarrow.array(["a"] * 3).dictionary_encode()}))
    assert contents(everything(DataConfig(format="parquet", path=str(path)))) == [{"text": "a"}] * 3
    small_sets.write_parquet(path, pyarrow.table({"text": text.dictionary_decode()}))
    found = everything(DataConfig(format="parquet", path=str(path)))
    assert [item.kind if isinstance(item, Fault) else item["text"] for item in found] == [
        "good",
        "invalid UTF-8",
        "good",
    ]
    twice = pyarrow.Table.from_arrays([text, text], names=["text", "text"])
    with pytest.raises(DataError, match=r"b.parquet: wrong column: found more than one column 'text'"):
        everything(DataConfig(format="parquet", path=str(small_sets.write_parquet(tmp_path / "b.parquet", twice))))


def test_offsets_outside_of_a_columnar_file_are_not_followed(tmp_path):
    path = small_sets.write_arrow(tmp_path / "a.arrow", in_columns(ROWS), 20)
    starts = np.cumsum([0, *(len(row["text"]) for row in ROWS)], dtype=np.int32)
    content = path.read_bytes()
    assert content.count(starts.tobytes()) == 1
    for number in (2**30, -1):
        wrong = starts.copy()
        wrong[7] = number
        path.write_bytes(content.replace(starts.tobytes(), wrong.tobytes()))
        with pytest.raises(DataError, match=f"{path}: damaged or no arrow file behind row 0 "):
            everything(DataConfig(format="arrow", path=str(path)))
    path = small_sets.write_arrow(path, in_columns(ROWS), 5)
    content = path.read_bytes()
    path.write_bytes(content[: 3 * len(content) // 4])
    with pytest.raises(DataError, match=f"{path}: damaged or no arrow file behind row 10 "):
        everything(DataConfig(format="arrow", path=str(path)))
    path = small_sets.write_parquet(tmp_path / "a.parquet", in_columns(ROWS))
    rows, more_rows = b"\x16\x28\x19", b"\x16\x2a\x19"  # 20 or 21 of them, in the list of a file's row groups
    assert path.read_bytes().count(rows) == 1
    path.write_bytes(path.read_bytes().replace(rows, more_rows))
    with pytest.raises(DataError, match=f"{path}: read 20 rows; expected 21, as the file says"):
        everything(DataConfig(format="parquet", path=str(path)))


def test_without_pyarrow_the_error_says_what_to_install(tmp_path, monkeypatch):
    import sys

    path = small_sets.write_parquet(tmp_path / "a.parquet", in_columns(ROWS))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        DataError, match=rf"{path}: reading parquet needs the package pyarrow: pip install -e '.\[parquet\]'"
    ):
        everything(DataConfig(format="parquet", path=str(path)))


# Faults of all kinds --------------------------------------------------------------------------------------------------

DAMAGED_FILES, FUZZED_RECORDS = 200, 1000


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Cut off, a bit flipped, bytes overwritten, empty, or with another beginning."""
    at = rng.choice([i for i, byte in enumerate(content) if byte])  # ArrayRecord files are mostly zeros
    changed = bytearray(content)
    match rng.choice(["cut", "bit", "bytes", "empty", "magic"]):
        case "cut":
            return content[:at]
        case "bit":
            changed[at] ^= 1 << rng.randrange(8)
        case "bytes":
            changed[at : at + 20] = rng.randbytes(20)
        case "empty":
            return b""
        case "magic":
            changed[:4] = b"JUNK"
    return bytes(changed)


@pytest.mark.parametrize("name", WRITERS)
def test_every_record_of_a_damaged_file_is_read_or_reported_or_the_file_is_refused(name, tmp_path, tfds_dir):
    rng = random.Random(0)
    rows = [{"text": f"{i} " + rng.randbytes(20).hex(), "label": i % 2} for i in range(20)]
    cfg = written(name, tmp_path / "set", rows)
    unit = registry.find(cfg).train[0]
    file = Path(unit.folder) / unit.name if name == "tfds" else Path(unit)
    content, total = file.read_bytes(), WRITERS[name][1]
    refused = 0
    for _ in range(DAMAGED_FILES // len(WRITERS)):
        file.write_bytes(damaged(content, rng))
        try:
            found = list(registry.read(unit, cfg))
        except DataError as error:
            assert str(file) in str(error)
            refused += 1
            continue
        if name == "jsonl":  # what a line is, the file alone says
            total = max(1, sum(bool(line.strip()) for line in file.read_bytes().split(b"\n")))
        assert len(found) == total
        assert all(str(file) in item.where for item in found if isinstance(item, Fault))
    assert refused > 0 or name == "jsonl"


def fuzzed(rng: random.Random) -> str | None:
    """A text, often one that no text should be."""
    characters = ["a", " ", "\n", "\0", "\ufeff", "\u00e9", "\u4e2d", "{", '"', "\r\n", "\x01"]
    return rng.choice([None, "", "\0", *("".join(rng.choices(characters, k=rng.randrange(12))) for _ in range(9))])


@pytest.mark.parametrize("name", ["jsonl", "array_record", "parquet", "arrow", "tfds"])
def test_every_fuzzed_record_is_read_or_reported(name, tmp_path, tfds_dir):
    rng = random.Random(1)
    count = FUZZED_RECORDS // 5
    rows = [{"text": fuzzed(rng), "label": rng.choice([0, 1, -1] + [7] * (name != "tfds"))} for _ in range(count)]
    if name in ("jsonl", "array_record"):
        raw = [rng.choice([line, line[: rng.randrange(len(line))], rng.randbytes(9)]) for line in lines(rows)]
        raw = [line.replace(b"\n", b"") for line in raw]
        raw = [line if line.strip() else b"x" for line in raw]  # lines of white space alone are no records
        path = tmp_path / f"a.{name}"
        if name == "jsonl":
            path.write_bytes(b"\n".join(raw))
        else:
            small_sets.write_array_record(path, raw)
        cfg = DataConfig(format=name, path=str(path))
    elif name == "tfds":
        cfg = written(name, tmp_path / "set", [row | {"text": row["text"] or ""} for row in rows])
    else:
        cfg = written(name, tmp_path / "set", rows)
    found = everything(cfg)
    assert len(found) == count
    faults = [item for item in found if isinstance(item, Fault)]
    assert 0.2 * count < len(faults) < count
    assert all(Path(fault.where.rpartition(":")[0]).is_file() and "expected" in fault.message for fault in faults)
    texts = [record["text"] for record in found if not isinstance(record, Fault)]
    assert all(text.strip() and "\0" not in text and "\r\n" not in text for text in texts)
