"""Files to records: decompression, text and JSON lines, and every fault a file can have, each with its place.

A reader yields one `Record` or one `Fault` for each record of a file, so that read + reported = total by construction.
Faults of the whole file (missing, unreadable, truncated, a broken .json list) leave nothing to go on with: `DataError`.

Every text is normalised alike: CRLF becomes LF. A byte order mark is accepted at the start of a file and dropped;
elsewhere, and like NUL, it is a fault, for it tells of files glued together or damaged. JSON lines of white space
alone, and the white space between two separators, are no records.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from etils import epath

from lm.data import fields
from lm.data.fields import BadRecord

# The fields of one of `lm.data.fields.FORMS` (of a table, any), and always "source": "file:line" (or "file").
Record = dict[str, Any]

BOM = b"\xef\xbb\xbf"
_CHUNK_BYTES = 1 << 20


class DataError(ValueError):
    """The data cannot be used. The message names file and line, what was found, and what was expected."""


class Fault(NamedTuple):
    """One bad record: what kind of fault, in 'file:line', and what was found and expected there."""

    kind: str
    where: str
    message: str


def read_text(path: epath.Path, separator: str) -> Iterator[Record | Fault]:
    """Documents of a text file: the whole file as it is, or the parts between `separator`s without outer newlines."""
    line, empty = 1, True
    for part in _parts(path, separator.encode()):
        if part.strip():
            empty = False
            start = len(part) - len(part.lstrip(b"\n")) if separator else 0
            document = part.strip(b"\n") if separator else part
            yield to_record(_text, document, path, line + part[:start].count(b"\n"))
        line += part.count(b"\n") + separator.count("\n")
    if empty:
        yield empty_file(path)


def read_jsonl(path: epath.Path, rename: Mapping[str, str]) -> Iterator[Record | Fault]:
    """Records of a JSON lines file, one object a line; of a .json file, the objects of its one list or object.

    An object that has the fields of several forms is read as the first of them in `lm.data.fields.FORMS`.

    Args:
      path: ends in .json, .json.gz or .json.zst for one list, or one object of name -> object; else holds JSON lines.
      rename: field in the file -> field expected. Other fields are ignored.
    """
    if path.name.removesuffix(".gz").removesuffix(".zst").endswith(".json"):
        objects: Iterator[tuple[int, Any]] = _json_items(path)
    else:
        objects = ((n, line) for n, line in enumerate(lines(path), 1) if line.strip())
    empty = True
    for line_number, value in objects:
        empty = False
        yield to_record(lambda parsed: fields.normalise(parse_json(parsed), rename), value, path, line_number)
    if empty:
        yield empty_file(path)


def to_record(parse: Callable[[Any], Record], value: Any, path: epath.Path, line: int) -> Record | Fault:
    """The parsed record with its source, or the fault that parsing it met."""
    try:
        return {**parse(value), "source": f"{path}:{line}"}
    except BadRecord as error:
        kind, message, *offset = error.args
        line += value[: offset[0]].count(b"\n") if offset and isinstance(value, bytes) else 0
        return Fault(kind, f"{path}:{line}", message)
    except RecursionError:  # parsed, but too deep to be shown in a message
        return Fault("malformed JSON", f"{path}:{line}", "found JSON nested too deep; expected a flat object")


def _text(document: bytes) -> Record:
    return {"text": decode(document)}


def empty_file(path: epath.Path) -> Fault:
    return Fault("empty file", str(path), "found nothing, or white space alone; expected at least one record")


# Bytes of a file ------------------------------------------------------------------------------------------------------


def _chunks(path: epath.Path) -> Iterator[bytes]:
    """The bytes of a file, decompressed when its name ends in .gz or .zst. Raises DataError when it cannot be read."""
    try:
        with path.open("rb") as file:
            if path.suffix == ".zst":
                yield from _zstd_chunks(path, file)
            else:
                stream = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
                while chunk := stream.read(_CHUNK_BYTES):
                    yield chunk
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: truncated or damaged gzip data ({error}); expected a whole .gz file") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _zstd_chunks(path: epath.Path, file: Any) -> Iterator[bytes]:
    """Decompresses frame by frame: zstandard's own stream reader takes a truncated frame for the end of the file."""
    try:
        import zstandard
    except ImportError:
        raise DataError(f"{path}: reading .zst needs the package zstandard: pip install zstandard") from None
    frame = None
    try:
        while chunk := file.read(_CHUNK_BYTES):
            while chunk:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(chunk)
                chunk = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise DataError(f"{path}: damaged zstd data ({error}); expected a whole .zst file") from error
    if frame is not None:
        raise DataError(f"{path}: truncated zstd data: the file ends inside a frame; expected a whole .zst file")


def read_bytes(path: epath.Path) -> bytes:
    """The whole file, decompressed, without its byte order mark. Raises DataError when it cannot be read."""
    return _without_bom(b"".join(_chunks(path)))


def lines(path: epath.Path) -> Iterator[bytes]:
    """Lines without their LF, held one chunk at a time; the byte order mark of the first is dropped."""
    rest: list[bytes] = []  # pieces of a line not ended yet: joined once, however many chunks it spans
    first = True
    for chunk in _chunks(path):
        *ended, tail = chunk.split(b"\n")
        for line in ended:
            whole = b"".join([*rest, line])
            yield _without_bom(whole) if first else whole
            rest, first = [], False
        rest.append(tail)
    last = b"".join(rest)
    yield _without_bom(last) if first else last


def _parts(path: epath.Path, separator: bytes) -> Iterator[bytes]:
    """What is between separators, CRLF as LF, held one part and one chunk at a time; without a separator, all of it."""
    rest, fresh, first = b"", list[bytes](), True
    for chunk in _chunks(path):
        fresh.append(chunk)
        # Looked through once it has doubled, so that a part of many chunks takes time in proportion to its length.
        if separator and sum(map(len, fresh)) >= len(rest):
            *ended, rest = b"".join([rest, *fresh]).replace(b"\r\n", b"\n").split(separator)
            for part in ended:
                yield _without_bom(part) if first else part
                first = False
            fresh = []
    whole = b"".join([rest, *fresh]).replace(b"\r\n", b"\n")
    for part in whole.split(separator) if separator else [whole]:
        yield _without_bom(part) if first else part
        first = False


def _without_bom(content: bytes) -> bytes:
    return content.removeprefix(BOM)


def decode(content: bytes) -> str:
    """UTF-8 to text. Raises BadRecord on what no text should hold."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        found = f"found byte 0x{content[error.start]:02x}, which is not UTF-8 ({error.reason}); expected UTF-8 text"
        raise BadRecord("invalid UTF-8", found, error.start) from None
    return fields.clean(text, "the text")


# JSON to records ------------------------------------------------------------------------------------------------------


def _json_items(path: epath.Path) -> Iterator[tuple[int, Any]]:
    """(line, value) of the one list in a .json file, or of the one object. A broken one leaves nothing: DataError."""
    content = read_bytes(path)
    try:
        text = decode(content)
    except BadRecord as error:
        raise DataError(f"{path}:{content[: error.args[2]].count(10) + 1}: {error.args[1]}") from None
    at, line, counted = _skip_space(text, 0), 1, 0
    if at == len(text):
        return
    expected = "a list of objects, or an object of them (one object a line goes in a file named .jsonl)"
    if text[at] not in "[{":
        raise DataError(f"{path}:{text.count(chr(10), 0, at) + 1}: found {text[at]!r}; expected {expected}")
    opening, closing = text[at], "]" if text[at] == "[" else "}"
    separator, decoder = opening, json.JSONDecoder()
    while text[at : at + 1] == separator:
        at = _skip_space(text, at + 1)
        if separator == opening and text[at : at + 1] == closing:
            break
        line, counted = line + text.count("\n", counted, at), at
        try:
            if opening == "{":
                at = _skip_name(text, at, decoder)
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{line}: malformed JSON: {_reason(error)}; expected {expected}") from None
        if opening == "{" and not isinstance(value, dict):
            raise DataError(f"{path}:{line}: found an object of {type(value).__name__}; expected {expected}")
        yield line, value
        at, separator = _skip_space(text, at), ","
    if text[at : at + 1] != closing or _skip_space(text, at + 1) != len(text):
        found = repr(text[at : at + 20]) if at < len(text) else "the end of the file"
        line += text.count("\n", counted, at)
        raise DataError(
            f"{path}:{line}: malformed JSON: found {found}; expected ',' or the '{closing}' that ends the file"
        )


def _skip_name(text: str, at: int, decoder: json.JSONDecoder) -> int:
    """Where the value begins behind a name and its colon. Raises JSONDecodeError where there is no name."""
    name, at = decoder.raw_decode(text, at)
    at = _skip_space(text, at)
    if not isinstance(name, str) or text[at : at + 1] != ":":
        raise json.JSONDecodeError("expecting a name and a colon", text, at)
    return _skip_space(text, at + 1)


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\n\r":
        at += 1
    return at


def _reason(error: Exception) -> str:
    """What the parser says, without the line number that it counts from its own start."""
    return (
        f"{error.msg.removesuffix(' at')} at column {error.colno}"
        if isinstance(error, json.JSONDecodeError)
        else str(error)
    )


def parse_json(value: Any) -> Any:
    """The object of one JSON line; what comes from a list is parsed already. Raises BadRecord."""
    if not isinstance(value, bytes):
        return value
    text = decode(value)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        raise BadRecord("malformed JSON", f"{_reason(error)}; expected one JSON object a line") from None
