"""Reads Parquet files and Arrow streams in batches of rows; columns are read like the fields of JSON Lines.

Class numbers of Hugging Face data sets (`ClassLabel`) become names.
"""

import contextlib
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import PurePath
from typing import Any

from etils import epath

from lm.data.readers import fields, images, paths, text
from lm.data.readers.fields import BadRecord, Names
from lm.data.record import NOTHING, DataError, Fault, Record, Wanted

_ROWS_AT_ONCE = 256
_BUFFER_BYTES = 1 << 20  # read ahead of each column
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def find_arrow(path: str, suffixes: tuple[str, ...]) -> dict[str, list[epath.Path]]:
    """Split -> its files, for a data set that Hugging Face's `save_to_disk` wrote; otherwise as `paths.find_splits`.

    Raises:
      DataError: a file of the data set is missing.
    """
    try:
        folder = epath.Path(path).expanduser()
        if (folder / "dataset_dict.json").is_file():
            splits = _json(folder / "dataset_dict.json").get("splits")
            if not isinstance(splits, list) or not splits or not all(isinstance(name, str) for name in splits):
                raise DataError(f"{folder / 'dataset_dict.json'}: names no split; expected the list 'splits'")
            if bad := [name for name in splits if PurePath(name).name != name]:
                raise DataError(
                    f"{folder / 'dataset_dict.json'}: split {bad[0]!r}; expected the name of a folder in it"
                )
            there = [name for name in splits if name == paths.TRAIN or (folder / name).is_dir()]
            usual = [paths.split_named(name) or name for name in splits]
            keys = usual if len(set(usual)) == len(usual) else splits
            return {
                key: _saved_files(folder / name) if name in there else []
                for key, name in zip(keys, splits, strict=True)
            }
        is_saved = (folder / "state.json").is_file()
    except (KeyError, NotImplementedError, OSError):  # find_files reports these
        return paths.find_splits(path, suffixes)
    return {"": _saved_files(folder)} if is_saved else paths.find_splits(path, suffixes)


def described_in(path: epath.Path) -> list[epath.Path]:
    """The files in which `save_to_disk` describes the data of a file."""
    folder = path.parent
    return [folder / "state.json", folder / "dataset_info.json", folder.parent / "dataset_dict.json"]


def _saved_files(folder: epath.Path) -> list[epath.Path]:
    """The files listed in the state.json of `save_to_disk`, in its order."""
    state = _json(folder / "state.json")
    if state.get("_indices_data_files"):
        raise DataError(f"{folder}: a selection of the rows of its files; save it again after flatten_indices()")
    try:
        names = [entry["filename"] for entry in state["_data_files"]]
        if outside := [name for name in names if PurePath(name).name != name]:
            raise DataError(f"{folder / 'state.json'}: file {outside[0]!r}; expected the name of a file beside it")
        found = [folder / name for name in names]
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{folder / 'state.json'}: {error!r}; expected the list '_data_files' of save_to_disk"
        ) from None
    if missing := [file for file in found if not file.is_file()]:
        raise DataError(f"{missing[0]}: no such file; expected it, for {folder / 'state.json'} names it")
    if not found:
        raise DataError(f"{folder / 'state.json'}: names no file; expected at least one")
    return found


def _json(path: epath.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (ValueError, OSError, RecursionError) as error:
        raise DataError(f"{path}: {error}; expected the JSON that save_to_disk writes") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: found {type(content).__name__}; expected the object that save_to_disk writes")
    return content


def read_parquet(path: epath.Path, rename: Mapping[str, str], wanted: Wanted = NOTHING) -> Iterator[Record | Fault]:
    """Reads the rows of a Parquet file.

    Args:
      path: the file.
      rename: column -> field of a record. Columns of no record are not read.
      wanted: the form of record that is preferred, and the shape of images, if there are any.

    Raises:
      DataError: the file cannot be read to its end, or its columns make no record.
    """
    with _reading(path, "parquet"), path.open("rb") as file:
        from pyarrow import parquet

        table = parquet.ParquetFile(file, buffer_size=_BUFFER_BYTES, page_checksum_verification=True)
        names = _columns(table.schema_arrow, path, rename, wanted)
        batches = table.iter_batches(_ROWS_AT_ONCE, columns=names, use_threads=False)
        parse = functools.partial(_record, names=_class_names(table.schema_arrow), rename=rename, wanted=wanted)
        yield from _rows(batches, parse, path, table.metadata.num_rows)


def read_arrow(path: epath.Path, rename: Mapping[str, str], wanted: Wanted = NOTHING) -> Iterator[Record | Fault]:
    """Reads the rows of a file in Arrow's stream format, as Hugging Face's `save_to_disk` writes it, see above."""
    with _reading(path, "arrow"), path.open("rb") as file:
        import pyarrow

        stream = pyarrow.ipc.open_stream(file)
        names = _columns(stream.schema, path, rename, wanted)
        batches = (_checked(batch).select(names) for batch in stream)
        parse = functools.partial(_record, names=_class_names(stream.schema), rename=rename, wanted=wanted)
        yield from _rows(batches, parse, path, None)
        # A stream that is truncated between two batches seems to end regularly.
        end = file.tell()
        file.seek(-len(_END_OF_STREAM), 2)
        if file.read() != _END_OF_STREAM or file.tell() != end:
            raise DataError(f"{path}: truncated or damaged: no end of the stream where it ends; expected a whole file")


def _checked(batch: Any) -> Any:
    """Validates a batch: pyarrow would follow offsets that point outside of it."""
    batch.validate(full=True)
    return batch


@contextlib.contextmanager
def _reading(path: epath.Path, kind: str) -> Iterator[None]:
    """Turns pyarrow's errors into a DataError that names the file."""
    try:
        import pyarrow
    except ImportError:
        raise DataError(f"{path}: reading {kind} needs the package pyarrow: pip install -e '.[parquet]'") from None
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        place = "".join(getattr(error, "__notes__", ()))
        raise DataError(f"{path}: damaged or no {kind} file{place} ({reason}); expected a whole one") from error


def _columns(schema: Any, path: epath.Path, rename: Mapping[str, str], wanted: Wanted) -> list[str]:
    try:
        return fields.columns(schema.names, rename, wanted)
    except BadRecord as error:
        raise DataError(f"{path}: {error.args[0]}: {error.args[1]}") from None


def _rows(
    batches: Iterable[Any], parse: Callable[[Any, int], Record], path: epath.Path, total: int | None
) -> Iterator[Record | Fault]:
    number = 0
    try:
        for batch in batches:
            for row in range(batch.num_rows):
                number += 1
                yield text.to_record(functools.partial(parse, batch), row, path, number)
    except Exception as error:
        error.add_note(f" behind row {number}")  # for `_reading`, which knows the file but not the row
        raise
    if total is not None and number != total:
        raise DataError(f"{path}: read {number:,} rows; expected {total:,}, as the file says")
    if not number:
        yield text.empty_file(path)


def _record(batch: Any, row: int, names: Names, rename: Mapping[str, str], wanted: Wanted) -> Record:
    values = {}
    for field, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            values[field] = column[row].as_py()
        except UnicodeDecodeError as error:
            raise BadRecord("invalid UTF-8", f"'{field}' is not UTF-8 ({error.reason}); expected UTF-8 text") from None
    return images.with_pixels(fields.normalise(fields.named(values, names, ""), rename, wanted), wanted.image_shape)


def _class_names(schema: Any) -> Names:
    """The class names that a Hugging Face data set keeps in the metadata of the schema."""
    try:
        return _names(json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"])
    except (LookupError, TypeError, ValueError, RecursionError):  # written by something else
        return None


def _names(feature: Any) -> Names:
    """Class names from features such as {"names": [...], "_type": "ClassLabel"}, also nested in lists and objects."""
    if isinstance(feature, list):
        return [_names(feature[0])]
    if not isinstance(feature, dict):
        return None
    kind = feature.get("_type")
    if kind == "ClassLabel":
        return tuple(map(str, feature["names"]))
    if isinstance(kind, str):
        return [_names(feature["feature"])] if "feature" in feature else None
    return {field: _names(inner) for field, inner in feature.items()}
