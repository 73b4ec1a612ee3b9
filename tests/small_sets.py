"""Small data sets in the real formats of their publishers: TFDS, ArrayRecord, parquet, Hugging Face's folders."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
from array_record.python import array_record_module
from pyarrow import parquet

Rows = Sequence[Mapping[str, Any]]


def write_tfds(folder: Path, name: str, features: Any, splits: Mapping[str, Rows], version: str = "1.0.0") -> Path:
    """A set as TFDS itself writes it, in the order of the rows.

    Args:
      folder: what TFDS_DATA_DIR names.
      name: 'NAME' or 'NAME/CONFIG'.
      features: field -> feature.
      splits: split -> its rows.
      version: of the set.

    Returns:
      The folder of the set.
    """
    import tensorflow_datasets as tfds

    set_name, _, config = name.partition("/")

    class Set(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        pkg_dir_path = folder
        VERSION = tfds.core.Version(version)
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config, description="")] if config else []

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(dict(features)), disable_shuffling=True
            )

        def _split_generators(self, _):
            return {split: enumerate(rows) for split, rows in splits.items()}

        def _generate_examples(self):
            raise AssertionError("the splits are given")

    Set.name = set_name
    tfds.disable_progress_bar()
    builder = Set(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return Path(builder.data_dir)


def write_array_record(path: Path, records: Iterable[bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return path


def table(rows: Rows, classes: Mapping[str, Any] | None = None) -> pyarrow.Table:
    """Rows as a table; `classes`: field -> the feature that Hugging Face's library notes in the schema's metadata."""
    found = pyarrow.Table.from_pylist(list(rows))
    if not classes:
        return found
    return found.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": dict(classes)}})})


def class_label(*names: str) -> dict[str, Any]:
    return {"names": list(names), "_type": "ClassLabel"}


def write_parquet(path: Path, rows: pyarrow.Table, row_group_size: int = 5) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(rows, path, row_group_size=row_group_size)
    return path


def write_arrow(path: Path, rows: pyarrow.Table, batch_rows: int = 5) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, rows.schema) as stream:
        stream.write_table(rows, max_chunksize=batch_rows)
    return path


def save_to_disk(folder: Path, rows: pyarrow.Table, shards: int = 2) -> Path:
    """What the method of that name writes of a `datasets.Dataset`."""
    size = -(-len(rows) // shards)
    names = [f"data-{i:05}-of-{shards:05}.arrow" for i in range(shards)]
    for i, name in enumerate(names):
        write_arrow(folder / name, rows.slice(i * size, size))
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0" * 16, "_split": folder.name}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder
