"""Reads prepared data sets of TensorFlow Datasets by name, from their ArrayRecord files, without TensorFlow.

They are looked up where TFDS stores them: in `TFDS_DATA_DIR`, by default ~/tensorflow_datasets.

The description of a set names a Python class for each feature, and TFDS imports the module of a class that it does not
know. So the names are checked before TFDS reads a description: loading a data set runs no code of the data set.
"""

import functools
import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from lm.data.readers import array_record, fields, text
from lm.data.readers import images as image_files
from lm.data.readers.fields import BadRecord, Names
from lm.data.record import NOTHING, DataError, Fault, Record, Wanted

# The feature classes of TFDS itself.
_OWN_CLASS = re.compile(r"tensorflow_datasets\.core\.features\.[a-z_]+\.[A-Za-z]+")
_CLASS_KEYS = ("pythonClassName", "python_class_name", "type")  # the last one in descriptions of older versions


class Shard(NamedTuple):
    """The records start ... stop - 1 of a file of `size` records, in the folder of its data set."""

    folder: str
    name: str
    start: int
    stop: int
    size: int

    def __str__(self) -> str:
        return f"{self.folder}/{self.name}[{self.start}:{self.stop}]"


def find(name: str, eval_split: str) -> tuple[list[Shard], list[Shard]]:
    """Finds (shards of 'train', shards of `eval_split`); records of `eval_split` are removed from 'train'.

    Args:
      name: name of the data set in TFDS: 'imdb_reviews', 'wikipedia/20230601.en', 'glue/sst2:2.0.0'.
      eval_split: a split in TFDS notation: 'test', 'train[:1%]'; '' = none.

    Raises:
      DataError: the data set or the split does not exist, or a file is missing or has another format.
    """
    builder = _load(name)
    held_out = _shards(builder, eval_split) if eval_split else []
    train = _shards(builder, "train")
    for out in held_out:
        train = [rest for shard in train for rest in _without(shard, out)]
    return train, held_out


def _load(name: str) -> Any:
    """Loads the description of a data set from its files; neither its builder code nor a download is needed."""
    from tensorflow_datasets.core import read_only_builder
    from tensorflow_datasets.core.utils import error_utils

    data_dir = os.path.expanduser(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    code = f"tfds.builder('{name}', data_dir='{data_dir}', file_format='array_record').download_and_prepare()"
    how = (
        "TFDS prepares it with TensorFlow, in an environment of its own:\n"
        "    pip install tensorflow tensorflow-datasets array_record\n"
        f'    python -c "import tensorflow_datasets as tfds; {code}"'
    )
    try:
        with error_utils.record_error_context():  # `_find_builder_dir` needs it
            folder = read_only_builder._find_builder_dir(name, data_dir=data_dir)
        builder = folder and _from_folder(str(folder))
    except DataError:
        raise
    except Exception as error:  # TFDS raises all kinds of errors for malformed names and damaged descriptions
        raise DataError(f"TFDS set '{name}' in {data_dir}: {type(error).__name__}: {error}") from error
    if builder is None:
        found = f"not found in {data_dir} (TFDS_DATA_DIR names another folder)"
        raise DataError(f"TFDS set '{name}': {found}. {how}")
    if builder.info.file_format.value != "array_record":
        raise DataError(
            f"{builder.data_dir}: TFDS set '{name}' is there in the format {builder.info.file_format.value}; expected "
            f"array_record. Move this folder away. {how}"
        )
    return builder


def _from_folder(folder: str) -> Any:
    """The description in a folder, whose class names are checked before TFDS imports them. Raises DataError."""
    from tensorflow_datasets.core import read_only_builder

    for name in ("features.json", "dataset_info.json"):
        file = epath.Path(folder) / name
        try:
            content = json.loads(file.read_text())
            if name == "dataset_info.json":  # its schema has types that are no classes
                content = content.get("features")
            classes = sorted(set(_class_names(content)))
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise DataError(f"{file}: {type(error).__name__}: {error}; expected the JSON that TFDS writes") from None
        if foreign := [found for found in classes if not _OWN_CLASS.fullmatch(found)]:
            raise DataError(
                f"{file}: names the Python class {foreign[0]!r}; expected one of tensorflow_datasets.core.features, as "
                "no code of a data set is run"
            )
    return read_only_builder.builder_from_directory(folder)


def _class_names(value: Any) -> Iterator[str]:
    """The names of classes in a description, also in the JSON that it holds as strings, as TFDS parses it too."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            value = json.loads(value)
        except ValueError:
            return  # text
    if isinstance(value, dict):
        yield from (value[key] for key in _CLASS_KEYS if isinstance(value.get(key), str))
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _class_names(inner)


def _shards(builder: Any, split: str) -> list[Shard]:
    try:
        found = builder.info.splits[split].file_instructions
    except Exception as error:  # TFDS raises ValueError, KeyError or AssertionError
        known = ", ".join(builder.info.splits)
        raise DataError(f"TFDS set '{builder.info.full_name}': no split '{split}' ({error}); it has {known}") from None
    if missing := [file.filename for file in found if not epath.Path(file.filename).is_file()]:
        raise DataError(f"{missing[0]}: no such file; expected it, for {builder.data_dir}/dataset_info.json names it")
    folder = str(builder.data_dir)
    return [
        Shard(folder, epath.Path(file.filename).name, file.skip, file.skip + file.take, file.examples_in_shard)
        for file in found
    ]


def _without(shard: Shard, out: Shard) -> list[Shard]:
    """The parts of `shard` before and after `out`."""
    if shard.name != out.name:
        return [shard]
    before = shard._replace(stop=min(shard.stop, out.start))
    behind = shard._replace(start=max(shard.start, out.stop))
    return [rest for rest in (before, behind) if rest.start < rest.stop]


def read(shard: Shard, rename: Mapping[str, str], wanted: Wanted = NOTHING) -> Iterator[Record | Fault]:
    """Reads the records of a shard. Class numbers become names, images are decoded (`images.pixels`).

    Raises:
      DataError: the file is missing or damaged, or the features of the data set make no record.
    """
    features = _features(shard.folder)
    try:
        fields.columns(list(features), rename, wanted)
    except BadRecord as error:
        raise DataError(f"{shard.folder}/features.json: {error.args[0]}: {error.args[1]}") from None
    names, images = _names(features), _images(features)

    def parse(content: bytes) -> Record:
        try:
            example = features.deserialize_example_np(content, decoders=images)
        except Exception as error:  # protobuf and the features raise many kinds of errors
            raise BadRecord("malformed example", f"{error}; expected one with the set's features") from None
        plain = {field: bytes(value) if field in images else _plain(value) for field, value in example.items()}
        record = fields.normalise(fields.named(plain, names, ""), rename, wanted)
        return image_files.with_pixels(record, wanted.image_shape)

    path = epath.Path(shard.folder) / shard.name
    return array_record.read_range(path, shard.start, shard.stop, parse, shard.size)


@functools.cache
def _features(folder: str) -> Any:
    return _from_folder(folder).info.features


def _images(features: Any) -> dict[str, Any]:
    """Image features -> a decoder that makes TFDS return the undecoded files."""
    import tensorflow_datasets as tfds

    found = (field for field, feature in features.items() if isinstance(feature, tfds.features.Image))
    return dict.fromkeys(found, tfds.decode.SkipDecoding())


def _names(feature: Any) -> Names:
    import tensorflow_datasets as tfds

    match feature:
        case tfds.features.ClassLabel():
            return tuple(feature.names) if feature.num_classes else None
        case tfds.features.Sequence():
            inner = _names(feature.feature)
            # TFDS stores a sequence of objects as an object of lists.
            return {field: [names] for field, names in inner.items()} if isinstance(inner, dict) else [inner]
        case tfds.features.FeaturesDict():
            return {field: _names(inner) for field, inner in feature.items()}
    return None


def _plain(value: Any) -> Any:
    """Converts arrays to lists and numbers, and bytes to text. Raises BadRecord."""
    if isinstance(value, dict):
        return {field: _plain(inner) for field, inner in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return text.decode(value) if isinstance(value, bytes) else value
