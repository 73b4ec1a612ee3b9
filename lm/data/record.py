"""What readers yield: records, faults (bad records) and files that hold no record."""

from typing import Any, Literal, NamedTuple

# The fields of one of `lm.data.readers.fields.FORMS` (for a table, any), and always "source": "file:line" or "file".
Record = dict[str, Any]


class DataError(ValueError):
    """The data cannot be used. The message names the file and line, what was found and what was expected."""


class Fault(NamedTuple):
    """One bad record: the kind of fault, its place ('file:line'), and what was found and expected there."""

    kind: str
    where: str
    message: str


class NotRead(NamedTuple):
    """A file in an archive that is not a record, such as a README among images. It is reported, but is not a fault."""

    archive: str
    name: str


class Wanted(NamedTuple):
    """What a task asks of the records that it reads.

    Attributes:
      task: its name, for messages.
      label: what 'label' is to be: a class, a number, or either ('TASK/CLASS' and 'TASK/NUMBER'); '' = it is not read.
      classes: the labels that are known.
      image_shape: height, width, channels of images.
      fields: an object that has the fields of several forms of `lm.data.readers.fields.FORMS` is read as the first of
        those that have these; where there is none, as the first of all.
    """

    task: str = ""
    label: Literal["", "class", "number", "mixed"] = ""
    classes: tuple[str, ...] = ()
    image_shape: tuple[int, int, int] = (32, 32, 3)
    fields: tuple[str, ...] = ()


NOTHING = Wanted()  # of records that are read for no task
