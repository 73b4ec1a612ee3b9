"""Sets of TensorFlow Datasets, read from where they were prepared."""

import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from lm.config import DataConfig
from lm.config.schema import ConfigError
from lm.data.readers import registry
from lm.data.readers import tfds as tfds_reader
from lm.data.record import DataError
from tests import small_sets
from tests.test_data_readers_formats import FEATURES, NAMED, ROWS, contents, everything


def many_shards(folder: Path) -> None:
    """Makes of a set's one training file of 20 records files of 8, 8 and 4, as TFDS does for larger sets."""
    [file] = folder.glob("*-train.*")
    reader = small_sets.array_record_module.ArrayRecordReader(str(file))
    content = reader.read_all()
    reader.close()
    file.unlink()
    for i in range(3):
        name = file.name.replace("00000-of-00001", f"{i:05}-of-00003")
        small_sets.write_array_record(folder / name, content[8 * i : 8 * i + 8])
    info = json.loads((folder / "dataset_info.json").read_text())
    [train] = [split for split in info["splits"] if split["name"] == "train"]
    train["shardLengths"] = ["8", "8", "4"]
    (folder / "dataset_info.json").write_text(json.dumps(info))


@pytest.fixture
def imdb(tfds_dir):
    folder = small_sets.write_tfds(
        tfds_dir, "imdb_reviews/plain_text", FEATURES, {"train": ROWS, "test": [{"text": "t", "label": -1}]}
    )
    many_shards(folder)
    return folder


@pytest.mark.parametrize(
    "split", ["test", "train[:10%]", "train[5:18]", "train[16:]", "train[8:16]+test", "train[-3:]"]
)
def test_what_is_held_out_of_train_is_not_trained_on(imdb, split):
    cfg = DataConfig(format="tfds", path="imdb_reviews", eval_path=split)
    found = registry.load(cfg)
    reference = tfds.data_source("imdb_reviews", data_dir=imdb.parents[2], split=split)
    assert [record["text"].encode() for record in found.valid] == [example["text"] for example in reference]
    held_out = {record["text"] for record in found.valid}
    assert contents(found.train) == [row for row in NAMED if row["text"] not in held_out]
    assert "trained on as well" not in found.report
    assert [(record["text"], record["source"]) for record in found.valid if "label" not in record] == [
        ("t", f"{next(imdb.glob('*-test.*'))}:1") for _ in range("test" in split)
    ]  # the number that TFDS writes where there is no label is none


def test_a_missing_data_set_is_an_error_with_the_command_that_prepares_it(imdb, tfds_dir):
    with pytest.raises(DataError) as error:
        registry.load(DataConfig(format="tfds", path="glue/sst2"))
    assert str(error.value).startswith(f"TFDS set 'glue/sst2': not found in {tfds_dir} (TFDS_DATA_DIR")
    code = f"tfds.builder('glue/sst2', data_dir='{tfds_dir}', file_format='array_record').download_and_prepare()"
    assert str(error.value).endswith(f'    python -c "import tensorflow_datasets as tfds; {code}"')
    with pytest.raises(DataError, match=r"TFDS set 'imdb_reviews/plain_text/1.0.0': no split 'tset' .*train, test"):
        registry.load(DataConfig(format="tfds", path="imdb_reviews", eval_path="tset"))
    with pytest.raises(DataError, match=r"TFDS set 'no name!' in .*Parsing builder name string no name! failed"):
        registry.load(DataConfig(format="tfds", path="no name!"))
    with pytest.raises(ConfigError, match=r"'data.separator'"):
        registry.load(DataConfig(format="tfds", path="imdb_reviews", separator="|"))


def test_a_set_in_another_format_a_missing_and_a_foreign_shard_are_errors(imdb):
    [first, *_] = sorted(imdb.glob("*-train.*"))
    content = first.read_bytes()
    small_sets.write_array_record(first, [b"foreign"] * 7)
    cfg = DataConfig(format="tfds", path="imdb_reviews")
    with pytest.raises(DataError, match=rf"{first}: found 7 records; expected 8, as the data set's description says"):
        registry.load(cfg)
    small_sets.write_array_record(first, [b"foreign"] * 8)
    with pytest.raises(DataError, match=rf"{first}:1: malformed example: "):
        registry.load(cfg)
    first.unlink()
    with pytest.raises(DataError, match=rf"{first}: no such file; expected it, for {imdb}/dataset_info.json names it"):
        registry.find(cfg)
    first.write_bytes(content)
    info = imdb / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(
        DataError,
        match=r"in the format tfrecord; expected array_record. Move this folder away. TFDS .*:\n .*\n *python",
    ):
        registry.load(cfg)
    for damaged in ("{", "[]", "[" * 100_000):
        info.write_text(damaged)
        with pytest.raises(DataError, match=rf"{info}: .*; expected the JSON that TFDS writes"):
            registry.load(cfg)


CODE = "raise SystemExit('CODE OF A DATA SET RAN')"
TEXT = {"pythonClassName": "tensorflow_datasets.core.features.text_feature.Text", "text": {}}
DICT = "tensorflow_datasets.core.features.features_dict.FeaturesDict"
SEQUENCE = "tensorflow_datasets.core.features.sequence_feature.Sequence"
FOREIGN = {"pythonClassName": "payload.X", "featuresDict": {"features": {}}}


def of_features(**features) -> dict:
    return {"pythonClassName": DICT, "featuresDict": {"features": features}}


LEGACY = {"type": DICT, "content": {"text": {"type": "payload.X", "content": {}}}}
NAMING_CODE = {
    "at the top": (FOREIGN, {}),
    "by the proto's own field name": ({"python_class_name": "payload.X", "featuresDict": {"features": {}}}, {}),
    "nested": (of_features(text=TEXT, a=FOREIGN), {}),
    "in a list": (of_features(a={"pythonClassName": SEQUENCE, "sequence": {"feature": FOREIGN}}), {}),
    "in the older form": (LEGACY, {}),
    "in JSON in JSON": (of_features(a={"pythonClassName": DICT, "jsonFeature": {"json": json.dumps(LEGACY)}}), {}),
    "in dataset_info.json": (of_features(text=TEXT), {"features": FOREIGN}),
    "inside TFDS, but no feature": (of_features(a=TEXT | {"pythonClassName": "tensorflow_datasets.testing.X"}), {}),
}


@pytest.mark.parametrize("where", NAMING_CODE)
def test_code_that_a_description_names_is_not_imported(where, tfds_dir, tmp_path, monkeypatch):
    """For both ways in: the set's name, as `data.path` gives it, and a shard's folder, as workers get it."""
    features, more = NAMING_CODE[where]
    folder = small_sets.write_tfds(tfds_dir, "evil", {"text": tfds.features.Text()}, {"train": [{"text": "a"}]})
    (folder / "features.json").write_text(json.dumps(features))
    info = folder / "dataset_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | more))
    (tmp_path / "payload.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    named = rf"{folder}/\w+.json: names the Python class '(payload|tensorflow_datasets.testing).X'; expected one of"
    with pytest.raises(DataError, match=named):
        registry.load(DataConfig(format="tfds", path="evil"))
    with pytest.raises(DataError, match=named):
        list(tfds_reader.read(tfds_reader.Shard(str(folder), "evil-train.array_record-00000-of-00001", 0, 1, 1), {}))


def test_the_classes_of_tfds_itself_are_allowed(tfds_dir):
    tfds_dir.mkdir(exist_ok=True)
    classes = [one for one in vars(tfds.features).values() if isinstance(one, type)]
    names = {f"{one.__module__}.{one.__name__}" for one in classes if issubclass(one, tfds.features.FeatureConnector)}
    assert {TEXT["pythonClassName"], DICT, SEQUENCE} < names
    assert [name for name in names if not tfds_reader._OWN_CLASS.fullmatch(name)] == []
    labels = tfds.features.ClassLabel(num_classes=2)
    every = {"text": tfds.features.Text(), "many": tfds.features.Sequence({"class": labels})}
    tfds.features.FeaturesDict(every).save_config(str(tfds_dir))
    written = set(tfds_reader._class_names(json.loads((tfds_dir / "features.json").read_text())))
    assert TEXT["pythonClassName"] in written and written < names


def test_classes_in_lists_have_names_and_answers_are_objects(tfds_dir):
    features = {
        "words": tfds.features.Sequence(tfds.features.Text()),
        "tags": tfds.features.Sequence(tfds.features.ClassLabel(names=["O", "B"])),
    }
    small_sets.write_tfds(tfds_dir, "ner", features, {"train": [{"words": ["a", "b"], "tags": [1, 0]}]})
    answers = {"text": tfds.features.Text(), "answer_start": tfds.features.Scalar(np.int32)}
    features = {name: tfds.features.Text() for name in ("id", "context", "question")} | {
        "answers": tfds.features.Sequence(answers)
    }
    asked = {"id": "7", "context": "a b c", "question": "what?"}
    row = asked | {"answers": {"text": ["b", "c"], "answer_start": [2, 4]}}
    small_sets.write_tfds(tfds_dir, "squad/v1.1", features, {"train": [row]})
    assert contents(everything(DataConfig(format="tfds", path="ner"))) == [{"words": ["a", "b"], "tags": ["B", "O"]}]
    assert contents(everything(DataConfig(format="tfds", path="squad"))) == [
        asked | {"answers": [{"text": "b", "answer_start": 2}, {"text": "c", "answer_start": 4}]}
    ]


@pytest.mark.parametrize("name", ["wikipedia/20230601.en", "imdb_reviews"])
def test_the_sets_that_recipes_are_tested_on_have_the_names_and_features_of_the_real_ones(name, small_world):
    import tensorflow_datasets.text  # noqa: F401

    real = tfds.builder(name).info
    [folder] = (small_world.parent / "tensorflow_datasets").glob(real.full_name)
    small = tfds.builder_from_directory(folder).info
    assert (small.full_name, repr(small.features)) == (real.full_name, repr(real.features))
    names = {field: feature.names for field, feature in real.features.items() if hasattr(feature, "names")}
    assert {field: small.features[field].names for field in names} == names
