"""Reads labelled data in published formats: tables, CoNLL columns, SQuAD JSON and parallel text.

Empty lines are skipped in tables; in CoNLL files they end a sentence.
"""

import csv
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from etils import epath

from lm.config.schema import ConfigError
from lm.data.readers import fields
from lm.data.readers.fields import BadRecord
from lm.data.readers.text import AS_IS, Opening, decode, empty_file, lines, read_utf8, to_record, unpacked_name
from lm.data.record import NOTHING, DataError, Fault, Record, Wanted

_NOT_A_WORD = re.compile(rb"\d+[-.]\d+")  # CoNLL-U: 3-4 is a multiword token, 5.1 an empty node


def read_table(
    path: epath.Path, rename: Mapping[str, str], opening: Opening = AS_IS, wanted: Wanted = NOTHING
) -> Iterator[Record | Fault]:
    """Reads rows of a .csv file (RFC 4180: quoted fields may hold commas, quotes, newlines) or .tsv file (no quoting).

    Args:
      path: its name may end in .gz or .zst.
      rename: column -> field. Other columns keep their names; those of no record are not read (see
        `fields.normalise`). If all renamed columns are numbers, counted from 1, the file has no header.
      opening: options for opening the file.
      wanted: the form of record that is preferred.

    Yields:
      A record for each row, from `fields.normalise`; all cells are strings.
    """
    is_csv = unpacked_name(path).endswith(".csv")
    split = functools.partial(_csv_cells if is_csv else _tsv_cells, encoding=opening.encoding)
    rows = ((n, line.removesuffix(b"\r")) for n, line in enumerate(lines(path, opening), 1))
    filled = ((n, row) for n, row in (_quoted_rows(rows, path) if is_csv else rows) if row)
    first = next(filled, None)
    if first is None:
        yield empty_file(path)
        return
    try:
        cells = split(first[1])
        has_header = not rename or not all(map(str.isdecimal, rename))
        names = cells if has_header else [str(i + 1) for i in range(len(cells))]
        read = [(names.index(name), name) for name in fields.columns(names, rename, wanted)]
    except BadRecord as error:
        raise DataError(f"{path}:{first[0]}: {error.args[0]}: {error.args[1]}") from None

    def parse(row: bytes) -> Record:
        cells = split(row)
        if len(cells) != len(names):
            raise BadRecord(
                "wrong number of columns", f"found {len(cells)}; expected {len(names)}, as in the first row"
            )
        return fields.normalise({name: cells[place] for place, name in read}, rename, wanted)

    empty = True
    for number, row in itertools.chain([] if has_header else [first], filled):
        empty = False
        yield to_record(parse, row, path, number)
    if empty:
        yield empty_file(path)


def _tsv_cells(row: bytes, encoding: str) -> list[str]:
    return decode(row, encoding).split("\t")


csv.field_size_limit(2**31 - 1)  # the default refuses fields of more than 128 KB


def _csv_cells(row: bytes, encoding: str) -> list[str]:
    text = decode(row, encoding)
    if '"' not in text and "\r" not in text:
        return text.split(",")
    try:
        [cells] = csv.reader([text], strict=True)
    except csv.Error as error:
        raise BadRecord("malformed CSV", f"{error}; expected fields as in RFC 4180") from None
    return cells


def _quoted_rows(numbered: Iterable[tuple[int, bytes]], path: epath.Path) -> Iterator[tuple[int, bytes]]:
    """Joins lines to rows: a row is complete when its number of quotes is even, since quotes in a field are doubled."""
    open_row: list[bytes] = []
    start = 0
    for number, line in numbered:
        start = start if open_row else number
        is_odd = line.count(b'"') % 2 == 1
        if open_row or is_odd:
            open_row.append(line)
        if not open_row:
            yield number, line
        elif is_odd and len(open_row) > 1:
            yield start, b"\n".join(open_row)
            open_row = []
    if open_row:
        raise DataError(f"{path}:{start}: a quote opens a field here that the file never closes")


def read_conll(
    path: epath.Path, rename: Mapping[str, str], opening: Opening = AS_IS, wanted: Wanted = NOTHING
) -> Iterator[Record | Fault]:
    """Reads sentences of a CoNLL file: one word per line, an empty line after each sentence.

    Columns are separated by tabs if the line of the first word has one, else by white space. Skipped are -DOCSTART-
    lines; comments, which begin with # and do not have the columns of a word; and in CoNLL-U (where the first column is
    not the word) multiword tokens 3-4 and empty nodes 5.1.

    Args:
      path: its name may end in .gz or .zst.
      rename: {number of a column, counted from 1: 'token', number of a column: 'tag'}.
      opening: options for opening the file.
      wanted: where its `may_lack` has 'tags', the column of tags may be missing.

    Yields:
      {"words": [str], "tags": [str]}, with the line of the first word as its source; no "tags" without their column.

    Raises:
      ConfigError: `rename` is not of that form.
    """
    may_lack_tags = "tags" in wanted.may_lack
    is_known = sorted(rename.values()) in (["tag", "token"], *[["token"]] * may_lack_tags)
    if not is_known or not all(map(str.isdecimal, rename)) or "0" in rename:
        example = "(('1', 'token'), ('2', 'tag'))"
        raise ConfigError(f"'data.rename' is {tuple(rename.items())}; data.format=conll expects such as {example}")
    places = {field: int(number) - 1 for number, field in rename.items()}
    separator, width, empty = None, 0, True
    sentence: list[tuple[int, list[bytes]]] = []
    for number, raw in enumerate(itertools.chain(lines(path, opening), [b""]), 1):
        line = raw.removesuffix(b"\r")
        if not line.strip():
            if sentence:
                empty = False
                parse = functools.partial(
                    _sentence, places=places, width=width, encoding=opening.encoding, wanted=wanted
                )
                yield _placed(parse, sentence, path)
            sentence = []
            continue
        is_comment = line.startswith(b"#") and (not width or len(line.split(separator)) != width)
        if is_comment or line.startswith(b"-DOCSTART-"):
            continue
        if not width:
            separator = b"\t" if b"\t" in line else None
            width = len(line.split(separator))
            if may_lack_tags and places.get("tag", 0) >= width:
                del places["tag"]
        cells = line.split(separator)
        if places["token"] == 0 or not _NOT_A_WORD.fullmatch(cells[0]):
            sentence.append((number, cells))
    if empty:
        yield empty_file(path)


def _placed(
    parse: Callable[[Any], Record], sentence: list[tuple[int, list[bytes]]], path: epath.Path
) -> Record | Fault:
    """Like `to_record`, but a fault gets the line of the word that caused it."""
    whole = to_record(parse, [cells for _, cells in sentence], path, sentence[0][0])
    if not isinstance(whole, Fault):
        return whole
    alone = (to_record(parse, [cells], path, number) for number, cells in sentence)
    return next((fault for fault in alone if isinstance(fault, Fault)), whole)


def _sentence(rows: list[list[bytes]], places: Mapping[str, int], width: int, encoding: str, wanted: Wanted) -> Record:
    for cells in rows:
        if len(cells) != width or max(places.values()) >= width:
            expected = f"{width} as above" if max(places.values()) < width else f"column {max(places.values()) + 1} too"
            raise BadRecord("wrong number of columns", f"found {len(cells)}; expected {expected}")
    columns = {"words": "token", "tags": "tag"}
    found = {
        name: [decode(cells[places[field]], encoding) for cells in rows]
        for name, field in columns.items()
        if field in places
    }
    return fields.normalise(found, {}, wanted)


def read_squad(path: epath.Path, opening: Opening = AS_IS, wanted: Wanted = NOTHING) -> Iterator[Record | Fault]:
    """Reads a file in the format of SQuAD v1.1 or v2.0 (Rajpurkar et al. 2016, 2018), one record for each question.

    Yields:
      {"id", "question", "context", "answers": [{"text", "answer_start"}]}, see `fields.question`; the source is the
      path within the JSON.

    Raises:
      DataError: the file is not in this format.
    """
    try:
        whole = json.loads(decode(read_utf8(path, opening), opening.encoding))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: malformed JSON: {error}; expected a file in the format of SQuAD") from None
    except BadRecord as error:
        raise DataError(f"{path}: {error.args[1]}") from None
    empty = True
    for i, article in enumerate(_list(whole, "data", f"{path}:")):
        for j, paragraph in enumerate(_list(article, "paragraphs", f"{path}:data[{i}]")):
            place = f"data[{i}].paragraphs[{j}]"
            for k, asked in enumerate(_list(paragraph, "qas", f"{path}:{place}")):
                empty = False
                yield _question(paragraph, asked, path, f"{place}.qas[{k}]", wanted)
    if empty:
        yield empty_file(path)


def _question(paragraph: Any, asked: Any, path: epath.Path, place: str, wanted: Wanted) -> Record | Fault:
    try:
        record = fields.question({**paragraph, **asked} if isinstance(asked, dict) else asked, wanted)
        return {**record, "source": f"{path}:{place}"}
    except BadRecord as error:
        return Fault(error.args[0], f"{path}:{place}", error.args[1])


def _list(value: Any, field: str, where: str) -> list[Any]:
    if not isinstance(value, dict) or not isinstance(value.get(field), list):
        raise DataError(f"{where}: no list '{field}'; expected a file in the format of SQuAD")
    return value[field]


def read_parallel(source: epath.Path, target: epath.Path, opening: Opening = AS_IS) -> Iterator[Record | Fault]:
    """Reads two files line by line, a line and its translation: `text` and `target`, and both as a conversation.

    Raises:
      DataError: the files have different numbers of lines.
    """
    sides, number = [_whole_lines(path, opening) for path in (source, target)], 0
    parse = functools.partial(_side, encoding=opening.encoding)
    for number, (line, translation) in enumerate(itertools.zip_longest(*sides), 1):
        if line is None or translation is None:
            longer = number + sum(1 for side in sides for _ in side)
            counts = (number - 1, longer) if line is None else (longer, number - 1)
            raise DataError(
                f"{source} has {counts[0]:,} lines, but {target} has {counts[1]:,}; expected the translation of each "
                "line in the same line of the other file"
            )
        question, answer = to_record(parse, line, source, number), to_record(parse, translation, target, number)
        if isinstance(question, Fault) or isinstance(answer, Fault):
            yield question if isinstance(question, Fault) else answer
            continue
        turns = (("user", question["text"]), ("assistant", answer["text"]))
        messages = [{"role": role, "content": content} for role, content in turns]
        yield question | {"target": answer["text"], "messages": messages}
    if not number:
        yield empty_file(source)


def read_lines(path: epath.Path, opening: Opening = AS_IS) -> Iterator[Record | Fault]:
    """Reads one side of a parallel corpus, to be translated: each line is a `text`."""
    number = 0
    for number, line in enumerate(_whole_lines(path, opening), 1):
        yield to_record(functools.partial(_side, encoding=opening.encoding), line, path, number)
    if not number:
        yield empty_file(path)


def _whole_lines(path: epath.Path, opening: Opening) -> Iterator[bytes]:
    """The lines of a file, without the empty one after a final LF."""
    for line, following in itertools.pairwise(itertools.chain(lines(path, opening), [None])):
        if line or following is not None:
            yield line or b""


def _side(line: bytes, encoding: str) -> Record:
    text = decode(line.removesuffix(b"\r"), encoding)
    if not text.strip():
        raise BadRecord("empty text", f"the line is {text!r}; expected text")
    return {"text": text}
