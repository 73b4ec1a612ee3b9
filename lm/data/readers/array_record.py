"""Reads ArrayRecord files: yields each record of the file, or a fault with its number.

The format has checksums, so damage is detected.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from etils import epath

from lm.data.readers import fields
from lm.data.readers import text as records
from lm.data.readers.fields import BadRecord
from lm.data.record import NOTHING, DataError, Fault, Record, Wanted

_READ_AT_ONCE = 256  # records


def read_array_record(
    path: epath.Path, rename: Mapping[str, str], wanted: Wanted = NOTHING
) -> Iterator[Record | Fault]:
    """Reads a file whose records are JSON objects (they begin with '{'), like lines of JSON Lines, or UTF-8 texts.

    Args:
      path: the file.
      rename: field of the JSON object -> field expected.
      wanted: which form of record is preferred.

    Raises:
      DataError: the file cannot be read.
    """
    return read_range(path, 0, None, lambda content: _parse(content, rename, wanted))


def read_range(
    path: epath.Path, start: int, stop: int | None, parse: Callable[[bytes], Record], total: int | None = None
) -> Iterator[Record | Fault]:
    """Reads the records start ... stop - 1 of a file; messages and sources number them from 1.

    Args:
      path: the file.
      start: first record, counted from 0.
      stop: end, exclusive; None = to the end of the file.
      parse: bytes of a record -> its fields; raises BadRecord.
      total: expected number of records in the file; None = any.

    Raises:
      DataError: the file cannot be read, or has another number of records.
    """
    from array_record.python.array_record_module import ArrayRecordReader

    if "://" in str(path):
        raise DataError(f"{path}: ArrayRecord files are read from local disks only; copy it to one")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    reader = ArrayRecordReader(str(path))
    try:
        count = reader.num_records() if reader.ok() else -1
        if count < 0:
            raise DataError(f"{path}: empty, truncated or damaged; expected a whole ArrayRecord file")
        if total is not None and count != total:
            raise DataError(f"{path}: found {count:,} records; expected {total:,}, as the data set's description says")
        if not count:
            yield records.empty_file(path)
        stop = count if stop is None else stop
        for first in range(start, stop, _READ_AT_ONCE):
            numbers = range(first, min(first + _READ_AT_ONCE, stop))
            for number, content in zip(numbers, _read(reader, numbers), strict=True):
                yield records.to_record(lambda found: parse(_whole(*found)), (content,), path, number + 1)
    finally:
        if reader.ok():
            reader.close()


def _read(reader: Any, numbers: range) -> list[bytes | RuntimeError]:
    """The bytes of each record, or the error that reading it raised."""
    try:
        return reader.read(numbers.start, numbers.stop)
    except RuntimeError as error:
        if len(numbers) == 1:
            return [error]
    return [found for number in numbers for found in _read(reader, range(number, number + 1))]


def _whole(content: bytes | RuntimeError) -> bytes:
    if isinstance(content, RuntimeError):
        reason = str(content).split(";")[0][:200]
        raise BadRecord("damaged record", f"{reason}; expected the record as it was written")
    return content


def _parse(content: bytes, rename: Mapping[str, str], wanted: Wanted) -> Record:
    if content.lstrip().startswith(b"{"):
        return fields.normalise(records.parse_json(content), rename, wanted)
    if rename:
        raise BadRecord("wrong type", "found no JSON object, which has the fields that data.rename names; expected one")
    text = records.decode(content)
    if control := next((c for c in text if c < " " and c not in "\t\n\r\f"), ""):
        found = f"found the control character U+{ord(control):04X}"
        raise BadRecord("no text", f"{found}; expected a JSON object or UTF-8 text, no other serialized form")
    return fields.normalise({"text": text}, {})
