"""lm.data.labels: what a label is in every format, and that one which is none costs its record and not the run."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from lm.config import Config, DataConfig
from lm.data import labels
from lm.data.readers import registry
from lm.data.record import DataError, Fault, Wanted
from lm.tasks import TASKS
from tests import small_sets, toys


def write_jsonl(folder: Path, rows: list[dict]) -> Path:
    path = folder / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def write_csv(folder: Path, rows: list[dict]) -> Path:
    """As pandas and `datasets` write it: None and NaN are empty cells, booleans True and False."""
    path = folder / "a.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        is_missing = lambda value: value is None or value != value  # noqa: E731
        writer.writerows({key: "" if is_missing(value) else value for key, value in row.items()} for row in rows)
    return path


def write_parquet(folder: Path, rows: list[dict]) -> Path:
    return small_sets.write_parquet(folder / "a.parquet", small_sets.table(rows))


def write_arrow(folder: Path, rows: list[dict]) -> Path:
    return small_sets.save_to_disk(folder / "arrow", small_sets.table(rows))


WRITERS = {
    "jsonl": ("jsonl", write_jsonl),
    "csv": ("table", write_csv),
    "parquet": ("parquet", write_parquet),
    "arrow": ("arrow", write_arrow),
}


def texts_with(values: list) -> list[dict]:
    return [{"text": f"text {i}", "label": value} for i, value in enumerate(values)]


def wanted(name: str, *names: str) -> Wanted:
    """What a task asks of the records, if these are its labels."""
    task = TASKS[name]
    return task.wanted(Config(task=toys.task(name, **({"labels": names} if names else {}))))


def read(where: tuple[str, Path | str], task: str, names: tuple[str, ...] = ()) -> list:
    """The label of each record, or the kind of its fault."""
    cfg = DataConfig(format=where[0], path=str(where[1]))
    found = [item for unit in registry.find(cfg).train for item in registry.read(unit, cfg, wanted(task, *names))]
    return [item.kind if isinstance(item, Fault) else item.get("label") for item in found]


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("names", [("false", "true"), ("True", "False")])
def test_a_boolean_label_is_read_alike_in_every_format(tmp_path, name, names):
    kind, write = WRITERS[name]
    where = kind, write(tmp_path, texts_with([True, False, None, True]))
    yes, no = sorted(names, key=str.lower, reverse=True)
    assert read(where, "classification", names) == [yes, no, "no label", yes]
    assert read(where, "classification", ("0", "1")) == ["wrong label", "wrong label", "no label", "wrong label"]
    assert read(where, "regression") == ["wrong label", "wrong label", "no label", "wrong label"]
    cfg = DataConfig(format=kind, path=str(where[1]))
    found = [item for unit in registry.find(cfg).train for item in registry.read(unit, cfg)]
    assert [record["text"] for record in found] == [f"text {i}" for i in range(4)]


@pytest.mark.parametrize("name", WRITERS)
def test_a_number_that_is_missing_is_a_fault_of_its_record(tmp_path, name):
    kind, write = WRITERS[name]
    where = kind, write(tmp_path, texts_with([1.5, None, math.nan, -2.0]))
    assert read(where, "regression") == ["1.5", "no label", "no label", "-2.0"]
    assert read(where, "classification", ("1.5",)) == ["1.5", "no label", "no label", "-2.0"]
    assert read(where, "causal_lm") == ["1.5", None, None, "-2.0"]


def test_a_boolean_and_an_unknown_class_of_tfds(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    features = {"text": tfds.features.Text(), "label": tfds.features.Scalar(dtype=np.bool_)}
    small_sets.write_tfds(tmp_path, "yes_no", features, {"train": texts_with([True, False])})
    assert read(("tfds", "yes_no"), "classification", ("False", "True")) == ["True", "False"]
    features["label"] = tfds.features.ClassLabel(names=["neg", "pos"])
    small_sets.write_tfds(tmp_path, "classes", features, {"train": texts_with([1, -1])})
    assert read(("tfds", "classes"), "classification", ("neg", "pos")) == ["pos", "no label"]
    assert read(("tfds", "classes"), "causal_lm") == ["pos", None]


@pytest.mark.parametrize(
    ("task", "names", "label", "expected"),
    [
        ("classification", ("a", "none"), "none", "none"),  # a class of that name
        ("classification", ("a", "b"), "None", "wrong label"),
        ("classification", ("a", "b"), "nan", "wrong label"),
        ("classification", ("a", "b"), "TRUE", "wrong label"),
        ("classification", ("a", "b"), "c", "c"),  # task.labels is wrong: the task refuses it
        ("regression", (), "1e-3", "1e-3"),
        ("regression", (), "inf", "wrong label"),
        ("regression", (), "1_000", "wrong label"),
        ("regression", (), "\uff11\uff12", "wrong label"),
        ("regression", (), "high", "wrong label"),
        ("regression", (), 1e39, "wrong label"),  # infinite in float32
        ("regression", (), 3, "3"),
        ("prompting", ("no", "true"), True, "true"),
        ("multitask", ("a/x", "a/y", "b/"), "a/x", "a/x"),
        ("multitask", ("a/true", "a/false", "b/"), "a/True", "a/true"),
        ("multitask", ("a/x", "a/y", "b/"), "a/None", "wrong label"),
        ("multitask", ("a/x", "a/y", "b/"), "b/nan", "wrong label"),
        ("multitask", ("a/x", "a/y", "b/"), "b/2", "b/2"),
        ("multitask", ("a/true", "a/false", "b/"), True, "wrong label"),
    ],
)
def test_labels_of_each_task(tmp_path, task, names, label, expected):
    where = "jsonl", write_jsonl(tmp_path, [{"text": "a", "label": label}])
    assert read(where, task, names) == [expected]


def test_a_record_without_the_field_is_a_fault_that_names_it(tmp_path):
    fault = labels.checked({"text": "a", "source": "f:3"}, wanted("classification", "a", "b"))
    expected = "found the fields text; expected 'label', which task.name=classification reads (data.rename maps another"
    assert fault.where == "f:3" and fault.message.startswith(expected)


def test_bad_labels_are_left_out_and_counted_up_to_the_limit(tmp_path):
    path = write_jsonl(tmp_path, texts_with(["a", "b", None, "a", True, math.nan, "b"]))
    cfg = DataConfig(format="jsonl", path=str(path), max_bad_records=3, eval_fraction=0.4)
    split = registry.load(cfg, wanted("classification", "a", "b"))
    assert len(split.train) + len(split.valid) == 4
    assert "skipped 3 bad records:\n  2 x no label\n" in split.report and "1 x wrong label" in split.report
    with pytest.raises(DataError, match=r"a.jsonl:3: no label: found no label; expected 'label'.*max_bad_records=N"):
        registry.load(DataConfig(format="jsonl", path=str(path)), wanted("classification", "a", "b"))


@pytest.mark.parametrize("tag", [None, True, math.nan])
def test_a_bad_tag_or_entity_is_a_fault_of_its_record(tmp_path, tag):
    rows = [{"words": ["a", "b"], "tags": ["O", "O"]}, {"words": ["a", "b"], "tags": ["O", tag]}]
    rows += [{"text": "a b", "entities": [{"start": 0, "end": 1, "label": name}]} for name in (tag, "X")]
    cfg = DataConfig(format="jsonl", path=str(write_jsonl(tmp_path, rows)))
    found = [item for unit in registry.find(cfg).train for item in registry.read(unit, cfg, wanted("tagging"))]
    assert [isinstance(item, Fault) for item in found] == [False, True, True, False]


def test_labels_are_checked_for_exactly_the_tasks_that_read_them():
    assert {name for name, task in TASKS.items() if "label" in task.fields} == {n for n in TASKS if wanted(n).label}


@pytest.mark.parametrize("label", [None, "", " ", float("nan"), "null", "N/A"])
def test_an_empty_cell_is_no_label_where_it_is_to_be_predicted(label):
    record = {"text": "a", "label": label, "source": "f:1"}
    wanted = Wanted(task="classification", label="class", classes=("yes", "no"), may_lack=("label",))
    assert labels.checked(record, wanted) == {"text": "a", "source": "f:1"}
    named = labels.checked(record | {"label": "null"}, wanted._replace(classes=("null", "no")))
    assert named == {"text": "a", "label": "null", "source": "f:1"}
