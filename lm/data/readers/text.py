"""Reads text and JSON Lines files, compressed or not, and reports every fault with its place.

A reader yields one `Record` or one `Fault` for each record of a file, so that read + reported = total by construction.
An error that affects the whole file (missing, unreadable, truncated, malformed .json) raises `DataError`.

CRLF becomes LF. A byte order mark at the start of a file is dropped; anywhere else U+FEFF is part of the text. NUL is a
fault. Blank lines of JSON Lines, and blank text between two separators, are not records.

Other encodings are transcoded to UTF-8 before the text is split into lines, since in some of them the byte 0x0A is part
of other characters.
"""

import codecs
import gzip
import json
import os
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from etils import epath

from lm.config import DataConfig
from lm.data.readers import fields
from lm.data.readers.fields import BadRecord
from lm.data.record import NOTHING, DataError, Fault, Record, Wanted

BOM = b"\xef\xbb\xbf"
_CHUNK_BYTES = 1 << 20
_NEVER_A_BOMB = 1 << 20  # bytes that any compressed file may expand to
_ZSTD_BYTES = 1 << 10  # decompressed at a time, to at most 32 MB: a zstd block of 4 bytes may expand to 128 KB


class Opening(NamedTuple):
    """Options for opening a file: `data.encoding` and `data.max_expansion`."""

    encoding: str = DataConfig.encoding
    max_expansion: int = DataConfig.max_expansion


AS_IS = Opening()


def read_text(path: epath.Path, separator: str, opening: Opening = AS_IS) -> Iterator[Record | Fault]:
    """Reads documents of a text file: the whole file, or the parts between `separator`s, stripped of outer newlines."""
    line, empty = 1, True
    for part in _parts(path, separator.encode(), opening):
        if part.strip():
            empty = False
            start = len(part) - len(part.lstrip(b"\n")) if separator else 0
            document = part.strip(b"\n") if separator else part
            yield to_record(
                lambda content: {"text": decode(content, opening.encoding)},
                document,
                path,
                line + part[:start].count(b"\n"),
            )
        line += part.count(b"\n") + separator.count("\n")
    if empty:
        yield empty_file(path)


def read_jsonl(
    path: epath.Path, rename: Mapping[str, str], opening: Opening = AS_IS, wanted: Wanted = NOTHING
) -> Iterator[Record | Fault]:
    """Reads a JSON Lines file, one object per line, or a .json file, the objects in its one list or object.

    Args:
      path: .json, .json.gz or .json.zst: one list of objects, or one object of name -> object. Other names: JSON Lines.
      rename: name of a field in the file -> field of a record. Other fields are ignored.
      opening: options for opening the file.
      wanted: the form of record that is preferred, where an object has the fields of several.
    """
    if unpacked_name(path).endswith(".json"):
        objects: Iterator[tuple[int, Any]] = _json_items(path, opening)
    else:
        objects = ((n, line) for n, line in enumerate(lines(path, opening), 1) if line.strip())
    empty = True
    for line_number, value in objects:
        empty = False
        yield to_record(
            lambda parsed: fields.normalise(parse_json(parsed, opening.encoding), rename, wanted),
            value,
            path,
            line_number,
        )
    if empty:
        yield empty_file(path)


def to_record(parse: Callable[[Any], Record], value: Any, path: epath.Path, line: int) -> Record | Fault:
    """Parses a record and adds its source; a BadRecord becomes a fault."""
    try:
        return {**parse(value), "source": f"{path}:{line}"}
    except BadRecord as error:
        kind, message, *offset = error.args
        line += value[: offset[0]].count(b"\n") if offset and isinstance(value, bytes) else 0
        return Fault(kind, f"{path}:{line}", message)
    except RecursionError:  # it was parsed, but is too deep for a message
        return Fault("malformed JSON", f"{path}:{line}", "found JSON nested too deep; expected a flat object")


def empty_file(path: epath.Path) -> Fault:
    return Fault("empty file", str(path), "found nothing, or white space alone; expected at least one record")


# Bytes of a file ------------------------------------------------------------------------------------------------------


def unpacked_name(path: epath.Path) -> str:
    """The name of a file in lower case, without .gz or .zst."""
    return path.name.lower().removesuffix(".gz").removesuffix(".zst")


_SPECIAL = (
    (stat.S_ISFIFO, "a FIFO (named pipe)"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)


def refuse_special(path: epath.Path) -> None:
    """Raises DataError for a local FIFO, socket or device: opening it could block, and reading it might never end."""
    if "://" in str(path):
        return
    try:
        mode = os.stat(path).st_mode
    except OSError:  # reported when the file is opened
        return
    for is_kind, kind in _SPECIAL:
        if is_kind(mode):
            raise DataError(f"{path} is {kind}; expected a regular file: write its content to one")


def chunks(path: epath.Path, max_expansion: int = DataConfig.max_expansion) -> Iterator[bytes]:
    """Yields the bytes of a file in chunks, decompressed if its name ends in .gz or .zst.

    Raises:
      DataError: the file cannot be read to its end, or expands to more than `max_expansion` times its size.
    """
    refuse_special(path)
    suffix = path.suffix.lower()
    size = 0
    try:
        with path.open("rb") as file:
            if suffix == ".zst":
                unpacked = _zstd_chunks(path, file)
            else:
                stream = gzip.GzipFile(fileobj=file) if suffix == ".gz" else file
                unpacked = iter(lambda: stream.read(_CHUNK_BYTES), b"")
            for chunk in unpacked:
                size += len(chunk)
                if suffix in (".gz", ".zst") and size > max(_NEVER_A_BOMB, max_expansion * file.tell()):
                    raise DataError(
                        f"{path}: {file.tell():,} bytes of it unpack to {size:,} or more; expected at most "
                        f"{max_expansion} times as many: unpack it yourself if it is what it should be, or set a "
                        "larger data.max_expansion"
                    )
                yield chunk
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: truncated or damaged gzip data ({error}); expected a whole .gz file") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _zstd_chunks(path: epath.Path, file: Any) -> Iterator[bytes]:
    """Decompresses frame by frame, since zstandard's stream reader takes a truncated frame for the end of the file."""
    try:
        import zstandard
    except ImportError:
        raise DataError(f"{path}: reading .zst needs the package zstandard: pip install zstandard") from None
    frame, ready, size = None, list[bytes](), 0
    try:
        while piece := file.read(_ZSTD_BYTES):
            while piece:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                ready.append(frame.decompress(piece))
                size += len(ready[-1])
                piece = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
            if size >= _CHUNK_BYTES:
                yield b"".join(ready)
                ready, size = [], 0
    except zstandard.ZstdError as error:
        if "memory" in str(error):
            found = "unpacking it needs a window of more than 128 MiB"
            raise DataError(f"{path}: {found}; compress it again with --long=27 or less") from error
        raise DataError(f"{path}: damaged zstd data ({error}); expected a whole .zst file") from error
    if frame is not None:
        raise DataError(f"{path}: truncated zstd data: the file ends inside a frame; expected a whole .zst file")
    if ready:
        yield b"".join(ready)


def read_bytes(path: epath.Path, max_expansion: int = DataConfig.max_expansion) -> bytes:
    """The whole file, decompressed. Raises DataError when it cannot be read."""
    return b"".join(chunks(path, max_expansion))


def read_utf8(path: epath.Path, opening: Opening = AS_IS) -> bytes:
    """The whole text of a file in UTF-8, see `utf8_chunks`."""
    return b"".join(utf8_chunks(path, opening))


def utf8_chunks(path: epath.Path, opening: Opening) -> Iterator[bytes]:
    """Yields the text of a file as UTF-8 in chunks, without a byte order mark at the start.

    Invalid bytes are passed on for `decode` to report: unchanged from a UTF-8 file, as U+DC00 + byte from others.
    """
    codec = codecs.lookup(opening.encoding).name
    found = chunks(path, opening.max_expansion)
    if codec not in ("utf-8", "utf-8-sig"):
        found = _transcoded(found, codec, path)
    start: bytes | None = b""
    for chunk in found:
        if start is not None:
            chunk = start + chunk
            start = chunk if len(chunk) < len(BOM) else None
            chunk = chunk.removeprefix(BOM)
        if start is None:
            yield chunk
    if start:
        yield start


def _keep_undecodable(error: UnicodeError) -> tuple[str, int]:
    """Error handler for codecs: invalid bytes become surrogates, which `decode` then reports with their line."""
    assert isinstance(error, UnicodeDecodeError)
    return "".join(chr(0xDC00 + byte) for byte in error.object[error.start : error.end]), error.end


codecs.register_error("lm_keep_undecodable", _keep_undecodable)


def _transcoded(found: Iterable[bytes], codec: str, path: epath.Path) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(codec)("lm_keep_undecodable")
    if codec in ("utf-16", "utf-32"):
        found = _with_mark(found, codec, path)
        yield BOM  # the codec removes the mark, and `utf8_chunks` would remove a second one
    for chunk in found:
        yield decoder.decode(chunk).encode(errors="surrogatepass")
    yield decoder.decode(b"", True).encode(errors="surrogatepass")


def _with_mark(found: Iterable[bytes], codec: str, path: epath.Path) -> Iterator[bytes]:
    """Passes the bytes on. Raises DataError if they do not begin with a byte order mark."""
    if codec == "utf-16":
        marks = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    else:
        marks = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
    start = b""
    for chunk in found:
        is_new, start = len(start) < len(marks[0]), start + chunk[: len(marks[0])]
        if is_new and len(start) >= len(marks[0]) and not start.startswith(marks):
            raise DataError(f"{path}: no byte order mark at its start; set data.encoding={codec}-le or {codec}-be")
        yield chunk


def lines(path: epath.Path, opening: Opening = AS_IS) -> Iterator[bytes]:
    """Yields lines as UTF-8, without LF, holding one chunk of the file at a time; see `utf8_chunks`."""
    rest: list[bytes] = []  # pieces of an unfinished line, joined once however many chunks it spans
    for chunk in utf8_chunks(path, opening):
        *ended, tail = chunk.split(b"\n")
        for line in ended:
            yield _joined(rest, line)
        rest.append(tail)
    yield _joined(rest, b"")


def _joined(pieces: list[bytes], last: bytes) -> bytes:
    """Joins the pieces and empties the list, so that the pieces are not kept in memory as well."""
    pieces.append(last)
    whole = b"".join(pieces)
    pieces.clear()
    return whole


def _parts(path: epath.Path, separator: bytes, opening: Opening = AS_IS) -> Iterator[bytes]:
    """Yields the parts between separators, with CRLF as LF, holding one part and one chunk at a time; '' = one part."""
    rest, tail = list[bytes](), b""  # of an unfinished part: what precedes, and what may be the start of, a separator
    for chunk in _unix_lines(utf8_chunks(path, opening)):
        if not separator:
            rest.append(chunk)
            continue
        *ended, tail = (tail + chunk).split(separator)
        for part in ended:
            yield _joined(rest, part)
        at = max(0, len(tail) - len(separator) + 1)
        rest.append(tail[:at])
        tail = tail[at:]
    yield _joined(rest, tail)


def _unix_lines(found: Iterable[bytes]) -> Iterator[bytes]:
    """Replaces CRLF by LF, also across chunks."""
    held = b""
    for chunk in found:
        chunk = held + chunk
        held = b"\r" if chunk.endswith(b"\r") else b""
        yield chunk[: len(chunk) - len(held)].replace(b"\r\n", b"\n")
    yield held


def decode(content: bytes, encoding: str = "") -> str:
    """Decodes bytes from `utf8_chunks`, or of a format that is UTF-8 by definition, and cleans the text.

    Args:
      content: the bytes.
      encoding: data.encoding, if the format reads that key.

    Raises:
      BadRecord: invalid bytes, NUL, or a lone surrogate.
    """
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        byte = _undecodable(content[error.start : error.start + 3])
        if encoding and byte is not None:
            found = f"found byte 0x{byte:02x}, which is not {encoding}; expected text as data.encoding says"
            raise BadRecord("not of the encoding", found, error.start) from None
        hint = f", or its encoding as data.encoding{_guess(content)}" if encoding else ""
        found = (
            f"found byte 0x{content[error.start]:02x}, which is not UTF-8 ({error.reason}); expected UTF-8 text{hint}"
        )
        raise BadRecord("invalid UTF-8", found, error.start) from None
    try:
        return fields.clean(text, "the text")
    except BadRecord as error:
        kind, found, *at = error.args
        if encoding and 3 * text.count("\0") >= len(text):
            found += " (if it is UTF-16 or UTF-32, set data.encoding: utf-16-le, utf-16-be, utf-32-le, utf-32-be)"
        raise BadRecord(kind, found, *at) from None


def _undecodable(start: bytes) -> int | None:
    """The byte that `_keep_undecodable` encoded at the start of this text, or None."""
    try:
        found = ord(start.decode(errors="surrogatepass")) - 0xDC00
    except (UnicodeDecodeError, TypeError):
        return None
    return found if 0 <= found < 256 else None


def _guess(content: bytes) -> str:
    """' (it may be ...)': encodings that could be those of bytes that are not UTF-8, the likely ones first."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return " (it begins like utf-16)"
    fits = []
    for name in ("cp1252", "shift_jis", "gb18030"):
        try:
            content.decode(name)
            fits.append(name)
        except UnicodeDecodeError:
            continue
    if fits[:1] == ["cp1252"]:  # which is latin-1 and the punctuation of Windows
        fits = ["cp1252"] if any(0x80 <= byte < 0xA0 for byte in content) else ["latin-1", "cp1252"]
    return f" (its bytes would do as {' or '.join(fits or ['latin-1'])})"


# JSON to records ------------------------------------------------------------------------------------------------------


def _json_items(path: epath.Path, opening: Opening) -> Iterator[tuple[int, Any]]:
    """Yields (line, value) for the items of the list or object in a .json file. Raises DataError if it is malformed."""
    content = read_utf8(path, opening)
    try:
        text = decode(content, opening.encoding)
    except BadRecord as error:
        raise DataError(f"{path}:{content[: error.args[2]].count(10) + 1}: {error.args[1]}") from None
    del content
    at, line, counted = _skip_space(text, 0), 1, 0
    if at == len(text):
        return
    expected = "a list of objects, or an object of them (one object a line goes in a file named .jsonl)"
    if text[at] not in "[{":
        raise DataError(f"{path}:{text.count(chr(10), 0, at) + 1}: found {text[at]!r}; expected {expected}")
    opener, closing = text[at], "]" if text[at] == "[" else "}"
    separator, decoder = opener, json.JSONDecoder()
    while text[at : at + 1] == separator:
        at = _skip_space(text, at + 1)
        if separator == opener and text[at : at + 1] == closing:
            break
        line, counted = line + text.count("\n", counted, at), at
        try:
            if opener == "{":
                at = _skip_name(text, at, decoder)
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{line}: malformed JSON: {_reason(error)}; expected {expected}") from None
        if opener == "{" and not isinstance(value, dict):
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
    """The position of the value after a name and a colon. Raises JSONDecodeError if they are missing."""
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
    """The parser's message without its line number, which counts from where it started to parse."""
    return (
        f"{error.msg.removesuffix(' at')} at column {error.colno}"
        if isinstance(error, json.JSONDecodeError)
        else str(error)
    )


def parse_json(value: Any, encoding: str = "") -> Any:
    """Parses one line of JSON Lines; items of a list are parsed already. Raises BadRecord."""
    if not isinstance(value, bytes):
        return value
    text = decode(value, encoding)
    if text.startswith("\ufeff"):  # the parser's own message speaks of a codec
        found = "found U+FEFF before the object (perhaps several files were concatenated)"
        raise BadRecord("malformed JSON", f"{found}; expected one JSON object a line")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        raise BadRecord("malformed JSON", f"{_reason(error)}; expected one JSON object a line") from None
