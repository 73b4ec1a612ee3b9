"""The text files of a run: rows of JSON (metrics.jsonl, samples.jsonl) and JSON documents (summary.json, saved.json).

Each row and each document ends in a key "crc32": the CRC-32, as eight hex digits, of all the bytes before that key. A
file is then checked without being parsed, and any JSON tool reads it. What older versions wrote has no checksum; its
keys and the types of its values are checked. Files of rows are read in one pass, in bounded memory.
"""

import contextlib
import errno
import itertools
import json
import math
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lm import files
from lm.evaluation import metrics

# File of rows -> the types of the keys that each row has. Rows of metrics.jsonl have metrics beside them.
COLUMNS: dict[str, dict[str, tuple[type, ...]]] = {
    "metrics.jsonl": {"step": (int,), "split": (str,), "seconds": (int, float)},
    "samples.jsonl": {"step": (int,), "name": (str,), "text": (str,)},
}
MAX_LINE = 2**24  # bytes
_NESTED = frozenset((dict, list))
MAX_STEP = 2**31  # steps are int32

_MARK = b'"crc32": "'
_UNNAMED = re.compile(rb'"[0-9a-f]{8}"\s*}\s*\Z')  # a checksum whose key has changed
_FIRST_KEYS = re.compile(rb'\{"step": (\d{1,10}), "(?:split": "(\w+)"|name": ")')  # of a row that `sealed` wrote

_EVALUATION = re.compile(rb'"split":\s*"eval"')

_WHAT_TO_DO = {
    errno.ENOSPC: "free disk space",
    errno.EDQUOT: "free disk space",
    errno.EROFS: "make it writable, or choose another --workdir",
    errno.EACCES: "make it writable, or choose another --workdir",
    errno.EPERM: "make it writable, or choose another --workdir",
    errno.ENOENT: "the folder was deleted or moved",
    errno.ENOTDIR: "a file stands where a folder is expected",
}


class RunFileError(RuntimeError):
    """A text file of a run is damaged or cannot be read or written. The message names the file and what to do."""


@contextlib.contextmanager
def access(path: Path | str, verb: str) -> Iterator[None]:
    """Turns an OSError of its block into a RunFileError: '`verb` `path` failed', the reason, and what to do."""
    try:
        yield
    except OSError as error:
        hint = _WHAT_TO_DO.get(error.errno or 0)
        reason = error.strerror or str(error)
        raise RunFileError(f"{verb} {path} failed: {reason}" + (f"; {hint}" if hint else "")) from error


def finite(value: Any) -> Any:
    """`value` (nested dicts, lists, scalars) with NaN and infinity as None, since JSON has neither."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if hasattr(value, "item"):  # a numpy or jax scalar
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sealed(content: Mapping[str, Any], indent: int | None = None) -> bytes:
    """JSON of an object that is not empty, with its checksum as the last key, and a newline.

    Example: {"step": 1} -> b'{"step": 1, "crc32": "c1f9bbab"}\\n'.
    """
    text = json.dumps(finite(content), indent=indent, allow_nan=False).encode()
    if indent is None:
        head, end = text[:-1] + b", ", b"}\n"
    else:
        head, end = text[:-2] + b",\n" + b" " * indent, b"\n}\n"
    return head + _MARK + b'%08x"' % zlib.crc32(head) + end


def _intact(text: bytes) -> bool | None:
    """Whether a sealed text is as it was written; None if it has no checksum."""
    head, mark, tail = text.rpartition(_MARK)
    if mark:
        return tail.replace(b"\n", b"") == b'%08x"}' % zlib.crc32(head)
    return False if _UNNAMED.search(text[-64:]) else None


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file atomically: a reader, also after a crash, finds either the old content or the new.

    Raises:
      RunFileError: it cannot be written; the old content is still there.
    """
    with access(path, "writing"):
        files.write_atomic(path, content)


def write_document(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object with a checksum, atomically. Raises RunFileError."""
    write_atomic(path, sealed(content, indent=2))


def read_document(path: Path | str) -> dict[str, Any]:
    """The JSON object in a file, without its checksum; {} if there is no file.

    Raises:
      RunFileError: it cannot be read, is no JSON object, or has changed since it was written.
    """
    with access(path, "reading"):
        try:
            with open(path, "rb") as file:  # in half the time of `Path.read_bytes`
                text = file.read()
        except FileNotFoundError:
            return {}
    content = _parse(text)
    is_intact = _intact(text)
    if not isinstance(content, dict) or is_intact is False or (is_intact is None and _is_deeper(content, 20)):
        found = "its checksum does not match" if is_intact is False else f"expected a JSON object, found {text[:40]!r}"
        raise RunFileError(f"{path} is damaged: {found}")
    content.pop("crc32", None)
    return content


class RowFile:
    """A file of rows that a run appends to. A row is handed to the operating system before `append` returns."""

    def __init__(self, path: Path):
        self._path = path
        with access(path, "opening"):
            self._file = path.open("ab", buffering=0)

    def append(self, row: Mapping[str, Any]) -> None:
        """Appends a row. Raises RunFileError if that fails, or if the file was deleted since it was opened."""
        self._check()
        rest = memoryview(sealed(row))
        with access(self._path, "writing"):
            while rest:  # a disk that is getting full takes a part, then raises
                rest = rest[self._file.write(rest) :]

    def sync(self) -> None:
        """Waits until the rows are on disk. Raises RunFileError as `append` does."""
        self._check()
        with access(self._path, "writing"):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _check(self) -> None:
        with access(self._path, "writing"):  # rows written to a deleted file are lost without an error
            if not os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno())):
                raise OSError("it was replaced by another file while the run was writing it")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbers, from 1, and lines of a file, each with its newline if it has one; none if there is no file."""
    with access(path, "reading"), contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        for number in itertools.count(1):
            if not (line := file.readline(MAX_LINE)):
                return
            if len(line) == MAX_LINE:
                raise RunFileError(
                    f"{path}:{number}: a line of {MAX_LINE:,} bytes or more; restore the file or move it away"
                )
            yield number, line


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of metrics.jsonl or samples.jsonl, without their checksums, one pass in bounded memory.

    An incomplete last line, as a kill leaves it, is left out unless only its newline is missing.

    Raises:
      RunFileError: another line is damaged; names file and line.
    """
    lines = _lines(path)
    while batch := list(itertools.islice(lines, 1000)):
        last = batch.pop() if not batch[-1][1].endswith(b"\n") else None
        rows = []
        if all(_intact(line) for _, line in batch):  # parsing many at once is faster
            rows = json.loads(b"[" + b",".join(line for _, line in batch) + b"]")
        if not rows or not all(
            row.keys() >= COLUMNS[path.name].keys() for row in rows
        ):  # an intact row may be of another file
            rows = [_row(path, number, line) for number, line in batch]
        if last and (row := _torn_row(path, *last)):
            rows.append(row)
        for row in rows:
            row.pop("crc32", None)
            yield row


def read_evaluations(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of evaluations in metrics.jsonl, and its last row ({} if there is none), without their checksums.

    Other lines are skipped without being parsed or checked, so that the files of many runs are read fast.

    Raises:
      RunFileError: one of these rows is damaged; names file and line.
    """
    evaluations: list[dict[str, Any]] = []
    last, number, rest = (0, b""), 0, b""
    with access(path, "reading"), contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        while block := file.read(MAX_LINE):
            lines = (rest + block).split(b"\n")
            rest = lines.pop()
            if len(rest) >= MAX_LINE:
                raise RunFileError(f"{path}:{number + 1}: a line of {MAX_LINE:,} bytes or more")
            evaluations += [
                _row(path, number + i, line + b"\n") for i, line in enumerate(lines, 1) if _EVALUATION.search(line)
            ]
            number += len(lines)
            last = (number, lines[-1]) if lines else last
    final = _torn_row(path, number + 1, rest) if rest else None
    if final and final["split"] == "eval":
        evaluations.append(final)
    if final is None and last[0]:
        final = _row(path, last[0], last[1] + b"\n")
    for row in (*evaluations, final or {}):
        row.pop("crc32", None)
    return evaluations, final or {}


def first_and_best(evaluations: Iterable[Mapping[str, Any]], metric: str) -> dict[str, dict[str, Any]]:
    """'before' -> the evaluation at step 0, 'best' -> the best of the later ones by `metric`; {} where there is none.

    Args:
      evaluations: rows of metrics.jsonl, in their order; of equals the first counts.
    """
    before: dict[str, Any] = {}
    best: dict[str, Any] = {}
    for row in evaluations:
        figures = {key: value for key, value in row.items() if key != "split"}
        if row["step"] == 0:
            before = before or figures
        elif row.get(metric) is not None and (
            not best or metrics.gain(metric, row[metric]) > metrics.gain(metric, best[metric])
        ):
            best = figures
    return {"before": before, "best": best}


def _row(path: Path, number: int, line: bytes) -> dict[str, Any]:
    """A row. Raises RunFileError if its line is damaged, which names file and line."""
    row, columns = _parse(line), COLUMNS[path.name]
    expected, found = f"a JSON object with {', '.join(columns)}", ""
    if _intact(line) is False:
        found = "a line that has changed since it was written: its checksum does not match"
    elif not isinstance(row, dict) or not all(type(row.get(key)) in types for key, types in columns.items()):
        found = repr(line[:60])
    elif not 0 <= row["step"] < MAX_STEP:
        found = f"step {line[:60]!r}"
    else:
        others = {key: value for key, value in row.items() if key not in (*columns, "crc32")}
        wrong = [key for key, value in others.items() if "split" not in columns or not _is_number_or_null(value)]
        if wrong or not _is_number_or_null(row.get("seconds")):
            expected = f"{expected}, and numbers beside them" if "split" in columns else f"{expected} only"
            found = f"{(wrong or ['seconds'])[0]!r} in {line[:60]!r}"
    if found:
        raise RunFileError(
            f"{path}:{number}: expected {expected}, found {found}; restore the file, delete that line, or move the "
            "file away, then start again"
        )
    return row


def _torn_row(path: Path, number: int, line: bytes) -> dict[str, Any] | None:
    """The row of a last line without newline; None if it is incomplete."""
    is_newline_damaged = _intact(line[:-1])
    return _row(path, number, line) if is_newline_damaged or isinstance(_parse(line), dict) else None


def _is_number_or_null(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and abs(value) <= sys.float_info.max)


def _parse(text: bytes) -> Any:
    """The value of a JSON text; None if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether dicts and lists are nested in more than so many levels."""
    level = [value] if type(value) in _NESTED else []
    for _ in range(levels):
        if not level:
            return False
        inner = (item.values() if type(item) is dict else item for item in level)
        level = [item for items in inner for item in items if type(item) in _NESTED]
    return bool(level)


class Kept(NamedTuple):
    """The rows of a file that a resumed run keeps: those before the first one that it will write again.

    Attributes:
      end: bytes they take.
      last: the last one; {} = none is kept.
      is_closed: whether the last one has its newline.
      dropped: number of lines after them, an incomplete last one not counted.
      is_torn: whether the last line of the file is incomplete, or lacks its newline.
    """

    end: int
    last: dict[str, Any]
    is_closed: bool
    dropped: int
    is_torn: bool


def kept_rows(path: Path, start_step: int, is_over: bool = False) -> Kept:
    """Reads the rows that a run resumed after `start_step` keeps; the file is not changed.

    A run writes rows of later steps again; those of the test, which are written at the end of a run; if no step is
    left also evaluation and samples of the last step; and all rows if it starts from scratch, at step 0.

    Args:
      path: of metrics.jsonl or samples.jsonl; it need not exist.
      start_step: steps done.
      is_over: whether no step is left.

    Raises:
      RunFileError: a line before the first one to be written again is damaged; names file and line.
    """
    end, last_line, dropped, is_torn, is_closed = 0, (0, b""), 0, False, True
    lines = _lines(path)
    for number, line in lines if start_step else ():
        is_whole = line.endswith(b"\n")
        is_torn |= not is_whole
        known = _FIRST_KEYS.match(line) if _intact(line) else None
        if known and bool(known[2]) == ("split" in COLUMNS[path.name]):
            step, split = int(known[1]), known[2] or b""
        else:
            row = _row(path, number, line) if is_whole else _torn_row(path, number, line)
            if row is None:
                continue
            step, split = row["step"], str(row.get("split", "")).encode()
        is_redone = is_over and step == start_step and split != b"train"
        if step > start_step or split == b"test" or is_redone:
            dropped = 1
            break
        end, last_line, is_closed = end + len(line), (number, line), is_whole
    for _, line in lines:  # they need not be intact
        dropped += line.endswith(b"\n")
        is_torn |= not line.endswith(b"\n")
    last = _row(path, *last_line) if end else {}
    last.pop("crc32", None)
    return Kept(end, last, is_closed, dropped, is_torn)


def rewind(path: Path, start_step: int, is_over: bool = False) -> tuple[dict[str, Any], str]:
    """Cuts off the rows of a file that a resumed run will write again (`kept_rows`), and an incomplete last line.

    Returns:
      The last row kept, and a message that says what was cut off; '' for nothing.

    Raises:
      RunFileError: as `kept_rows`, or the file cannot be written.
    """
    kept = kept_rows(path, start_step, is_over)
    if kept.dropped or kept.is_torn:
        with access(path, "writing"), path.open("r+b") as file:
            file.truncate(kept.end)
            if not kept.is_closed:
                file.seek(kept.end)
                file.write(b"\n")
            file.flush()
            os.fsync(file.fileno())
    notes = [f"dropped {kept.dropped} rows that are written again after step {start_step}"] if kept.dropped else []
    notes += ["repaired an incomplete last line"] if kept.is_torn else []
    return kept.last, f"{path.name}: {' and '.join(notes)}" if notes else ""
