"""Output to the terminal. Text of data, models and file names must not control it: everything is printed with `say`."""

import contextvars
import re
import sys
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


def say(*values: object, file: TextIO | None = None, end: str = "\n") -> None:
    """Prints values, made `visible`, at once. A tool's own control characters, such as a '\\r' of `end`, pass."""
    print(*map(visible, values), file=output.get() or file or sys.stdout, end=end, flush=True)


def stop(message: str) -> NoReturn:
    """Ends the program with a message, made `visible`, on stderr and status 1."""
    raise SystemExit(visible(message))
