"""What readers yield: records, faults (bad records) and files that hold no record."""

from typing import Any, Literal, NamedTuple

# Has the fields of one of `lm.data.readers.fields.FORMS` (any, for a table), and "source": "file:line" or "file".
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
    """How readers should interpret records for a task.

    Attributes:
      task: its name, for messages.
      label: type of the field 'label': a class, a number, or 'mixed' ('TASK/CLASS' and 'TASK/NUMBER'); '' = not read.
      classes: the known labels.
      image_shape: height, width, channels of images.
      fields: an object that matches several forms of `lm.data.readers.fields.FORMS` is read as the first of them that
        has these fields, or, if none has, as the first of them.
      may_lack: fields that a record may lack because they are to be predicted: 'label', 'tags', 'answers', ...
    """

    task: str = ""
    label: Literal["", "class", "number", "mixed"] = ""
    classes: tuple[str, ...] = ()
    image_shape: tuple[int, int, int] = (32, 32, 3)
    fields: tuple[str, ...] = ()
    may_lack: tuple[str, ...] = ()


NOTHING = Wanted()  # for records that are read without a task
