"""Records: what readers make of files, and what they make of what cannot be one."""

from typing import Any, NamedTuple

# The fields of one of `lm.data.readers.fields.FORMS` (of a table, any), and always "source": "file:line" (or "file").
Record = dict[str, Any]


class DataError(ValueError):
    """The data cannot be used. The message names file and line, what was found, and what was expected."""


class Fault(NamedTuple):
    """One bad record: what kind of fault, in 'file:line', and what was found and expected there."""

    kind: str
    where: str
    message: str


class NotRead(NamedTuple):
    """A file in an archive that holds no record, such as a README among images: counted and named, no fault."""

    archive: str
    name: str
