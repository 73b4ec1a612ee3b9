"""Output to the terminal. Text of data, models and file names must not control it: everything is printed with `say`."""

import contextvars
import re
import sys
import unicodedata
from collections.abc import Collection, Sequence
from typing import NoReturn, TextIO

# Control characters except line break and tab, marks that change the direction of text, surrogates.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

# Where a thread of several that train at once prints; None = the terminal.
output: contextvars.ContextVar[TextIO | None] = contextvars.ContextVar("output", default=None)


def visible(text: object) -> str:
    r"""`str(text)` with every character escaped that would control the terminal, except line breaks and tabs.

    Example: ESC [ 2 J, which clears the screen -> '\x1b[2J'.
    """
    return _UNPRINTABLE.sub(lambda match: repr(match[0])[1:-1], str(text))


def one_line(text: object) -> str:
    """`visible` text with line breaks and tabs escaped too, for a cell of a table."""
    text = str(text)
    if text.isascii() and text.isprintable():
        return text
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")


def table(header: Sequence[str], rows: Sequence[Sequence[object]], right: Collection[int] = ()) -> str:
    """Rows below a header in aligned columns, two blanks apart, each cell made `one_line`.

    Args:
      header: names of the columns.
      rows: as many cells each.
      right: numbers of the columns that are aligned at the right.
    """
    cells = [[one_line(cell) for cell in row] for row in (header, *rows)]
    widths = [[_width(cell) for cell in row] for row in cells]
    most = [max(column) for column in zip(*widths, strict=True)]
    lines = []
    for row, its_widths in zip(cells, widths, strict=True):
        padded = []
        for i, cell in enumerate(row):
            blanks = " " * (most[i] - its_widths[i])
            padded.append(blanks + cell if i in right else cell + blanks)
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def _width(text: str) -> int:
    """How many columns of a terminal a text takes."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
    return len(text) + wide - sum(unicodedata.category(char) in ("Mn", "Me", "Cf") for char in text)


def say(*values: object, file: TextIO | None = None, end: str = "\n") -> None:
    """Prints values, made `visible`, at once. A tool's own control characters, such as a '\\r' of `end`, pass."""
    print(*map(visible, values), file=output.get() or file or sys.stdout, end=end, flush=True)


def stop(message: str) -> NoReturn:
    """Ends the program with a message, made `visible`, on stderr and status 1."""
    raise SystemExit(visible(message))
