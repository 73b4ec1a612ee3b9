"""Files to records: decompression, text and JSON lines, and every fault a file can have, each with its place.

A reader yields one `Record` or one `Fault` for each record of a file, so that read + reported = total by construction.
Faults of the whole file (missing, unreadable, truncated, a broken .json list) leave nothing to go on with: `DataError`.

Every text is normalised alike: CRLF becomes LF. A byte order mark is accepted at the start of a file and dropped;
elsewhere, and like NUL, it is a fault, for it tells of files glued together or damaged. JSON lines of white space
alone, and the white space between two separators, are no records.
"""

import functools
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from etils import epath

from lm.data.tokenizer import ROLES
from lm.schema import nearest

# {"text": str} or {"messages": [{"role": str, "content": str}, ...]}, and always "source": "file:line" (or "file").
Record = dict[str, Any]

BOM = b"\xef\xbb\xbf"
_CHUNK_BYTES = 1 << 20
_FORMS = (("messages",), ("prompt", "response"), ("instruction", "output"), ("text",))
_EXPECTED = "'text', 'messages', 'prompt' and 'response', or 'instruction' and 'output' (data.rename maps other names)"


class DataError(ValueError):
    """The data cannot be used. The message names file and line, what was found, and what was expected."""


class Fault(NamedTuple):
    """One bad record: what kind of fault, in 'file:line', and what was found and expected there."""

    kind: str
    where: str
    message: str


class _BadRecord(Exception):
    """Raised with (kind, message) while one record is parsed; never leaves this module."""


def read_text(path: epath.Path, separator: str) -> Iterator[Record | Fault]:
    """Documents of a text file: the whole file as it is, or the parts between `separator`s without outer newlines."""
    content = _without_bom(b"".join(_chunks(path))).replace(b"\r\n", b"\n")
    line, empty = 1, True
    for part in content.split(separator.encode()) if separator else [content]:
        if part.strip():
            empty = False
            start = len(part) - len(part.lstrip(b"\n")) if separator else 0
            document = part.strip(b"\n") if separator else part
            yield _record(_text, document, path, line + part[:start].count(b"\n"))
        line += part.count(b"\n") + separator.count("\n")
    if empty:
        yield _empty_file(path)


def read_jsonl(path: epath.Path, rename: Mapping[str, str]) -> Iterator[Record | Fault]:
    """Records of a JSON lines file, one object a line; of a .json file, the objects of its one list.

    An object that has the fields of several forms is read as `messages`, else as a prompt and response or an
    instruction and output, else as `text`.

    Args:
      path: ends in .json or .json.gz or .json.zst for a list; any other name holds JSON lines.
      rename: field in the file -> field expected. Other fields are ignored.
    """
    if path.name.removesuffix(".gz").removesuffix(".zst").endswith(".json"):
        objects: Iterator[tuple[int, Any]] = _json_list(path)
    else:
        objects = ((n, line) for n, line in enumerate(_lines(path), 1) if line.strip())
    empty = True
    for line_number, value in objects:
        empty = False
        yield _record(functools.partial(_normalise, rename=rename), value, path, line_number)
    if empty:
        yield _empty_file(path)


def _record(parse: Callable[[Any], Record], value: Any, path: epath.Path, line: int) -> Record | Fault:
    """The parsed record with its source, or the fault that parsing it met."""
    try:
        return {**parse(value), "source": f"{path}:{line}"}
    except _BadRecord as error:
        kind, message, *offset = error.args
        line += value[: offset[0]].count(b"\n") if offset and isinstance(value, bytes) else 0
        return Fault(kind, f"{path}:{line}", message)
    except RecursionError:  # parsed, but too deep to be shown in a message
        return Fault("malformed JSON", f"{path}:{line}", "found JSON nested too deep; expected a flat object")


def _text(document: bytes) -> Record:
    return {"text": _decode(document)}


def _empty_file(path: epath.Path) -> Fault:
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


def _lines(path: epath.Path) -> Iterator[bytes]:
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


def _without_bom(content: bytes) -> bytes:
    return content.removeprefix(BOM)


def _decode(content: bytes) -> str:
    """UTF-8 to text. Raises _BadRecord on what no text should hold."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        found = f"found byte 0x{content[error.start]:02x}, which is not UTF-8 ({error.reason}); expected UTF-8 text"
        raise _BadRecord("invalid UTF-8", found, error.start) from None
    return _clean(text, "the text")


def _clean(text: str, what: str) -> str:
    """Text with CRLF as LF. Raises _BadRecord on NUL, a byte order mark, or a surrogate that UTF-8 cannot write."""
    for character, kind in (("\0", "NUL"), ("\ufeff", "byte order mark")):
        at = text.find(character)
        if at >= 0:
            found = f"found {kind} (U+{ord(character):04X}) inside {what}; expected text without it"
            raise _BadRecord(kind, found, len(text[:at].encode(errors="replace")))
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"found the lone surrogate U+{ord(text[error.start]):04X} in {what}; expected valid Unicode"
        raise _BadRecord("lone surrogate", found) from None
    return text.replace("\r\n", "\n")


# JSON to records ------------------------------------------------------------------------------------------------------


def _json_list(path: epath.Path) -> Iterator[tuple[int, Any]]:
    """(line, object) of the one list in a .json file. A broken list leaves nothing to go on with: DataError."""
    content = _without_bom(b"".join(_chunks(path)))
    try:
        text = _decode(content)
    except _BadRecord as error:
        raise DataError(f"{path}:{content[: error.args[2]].count(10) + 1}: {error.args[1]}") from None
    at, line, counted = _skip_space(text, 0), 1, 0
    if at == len(text):
        return
    expected = "a list of objects (one object a line goes in a file named .jsonl)"
    if text[at] != "[":
        raise DataError(f"{path}:{text.count(chr(10), 0, at) + 1}: found {text[at]!r}; expected {expected}")
    separator, decoder = "[", json.JSONDecoder()
    while text[at : at + 1] == separator:
        at = _skip_space(text, at + 1)
        if separator == "[" and text[at : at + 1] == "]":
            break
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{line}: malformed JSON: {_reason(error)}; expected {expected}") from None
        yield line, value
        at, separator = _skip_space(text, at), ","
    if text[at : at + 1] != "]" or _skip_space(text, at + 1) != len(text):
        found = repr(text[at : at + 20]) if at < len(text) else "the end of the file"
        line += text.count("\n", counted, at)
        raise DataError(f"{path}:{line}: malformed JSON: found {found}; expected ',' or the ']' that ends the file")


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


def _parse(value: Any) -> Any:
    """The object of one JSON line; what comes from a list is parsed already."""
    if not isinstance(value, bytes):
        return value
    text = _decode(value)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        raise _BadRecord("malformed JSON", f"{_reason(error)}; expected one JSON object a line") from None


def _normalise(value: Any, rename: Mapping[str, str]) -> Record:
    """A JSON line or parsed object as {"text"} or {"messages"}: the first of `_FORMS` of which it has all fields."""
    value = _parse(value)
    if not isinstance(value, dict):
        raise _BadRecord("wrong type", f"found {_shown(value)}; expected a JSON object")
    for old, new in rename.items():
        if old not in value:
            raise _BadRecord("missing field", f"{_found(value)}; expected '{old}', which data.rename maps to '{new}'")
    value = {k: v for k, v in value.items() if k not in rename} | {new: value[old] for old, new in rename.items()}
    form = next((form for form in _FORMS if all(field in value for field in form)), None)
    if form == ("text",):
        return {"text": _string(value, "text")}
    if form == ("messages",):
        return {"messages": _messages(value["messages"])}
    if form is None:
        raise _BadRecord("missing field", f"{_found(value)}; expected {_EXPECTED}")
    question, answer = (_string(value, field) for field in form)
    if form[0] == "instruction" and value.get("input", "") != "":
        question += "\n\n" + _string(value, "input")
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _messages(turns: Any) -> list[dict[str, str]]:
    if not isinstance(turns, list) or not turns:
        raise _BadRecord("wrong type", f"'messages' is {_shown(turns)}; expected a list of at least one message")
    messages = []
    for i, turn in enumerate(turns):
        where = f"messages[{i}]"
        if not isinstance(turn, dict):
            raise _BadRecord("wrong type", f"'{where}' is {_shown(turn)}; expected an object of 'role' and 'content'")
        for field in ("role", "content"):
            if field not in turn:
                raise _BadRecord("missing field", f"'{where}': {_found(turn)}; expected '{field}'")
        role = turn["role"]
        if role not in ROLES:
            hint = nearest(role, ROLES) if isinstance(role, str) else ""
            expected = ", ".join(ROLES)
            raise _BadRecord("unknown role", f"'{where}.role' is {_shown(role)}; expected one of {expected}{hint}")
        messages.append({"role": role, "content": _string(turn, "content", f"{where}.content")})
    return messages


def _string(value: Mapping[str, Any], field: str, name: str = "") -> str:
    text = value[field]
    if not isinstance(text, str):
        raise _BadRecord("wrong type", f"'{name or field}' is {_shown(text)}; expected a string")
    if not text.strip():
        raise _BadRecord("empty text", f"'{name or field}' is {_shown(text)}; expected text")
    return _clean(text, f"'{name or field}'")


def _found(value: Mapping[str, Any]) -> str:
    return f"found {', '.join(map(repr, list(value)[:10])) or 'no fields'}"


def _shown(value: Any) -> str:
    shown = repr(value)
    return f"{type(value).__name__} {shown[:60]}{'...' if len(shown) > 60 else ''}"
