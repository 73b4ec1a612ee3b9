"""The event file of a run for TensorBoard."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm.tracking import files

FLUSH_SECONDS = 30.0


class EventFile:
    """Writes scalars and texts; a failure is raised by the call that meets it.

    tensorboardX's own SummaryWriter writes in a thread. Where that ends, on a full disk, the run waits for it forever.
    """

    def __init__(self, folder: Path, purge_step: int):
        """Makes a new file in `folder`. TensorBoard then hides the events of `purge_step` and later in older files."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        self._folder, self._flushed = folder, time.monotonic()
        with files.access(folder, "writing to"):
            folder.mkdir(exist_ok=True)
            self._writer = EventsWriter(str(folder / "events"), f".{os.getpid()}")
        self._write(purge_step, session_log=SessionLog(status=SessionLog.START))
        self._flush()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes scalars, tag -> value. Raises RunFileError."""
        from tensorboardX import summary

        for tag, value in values.items():
            self._write(step, summary=summary.scalar(tag, value))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._flush()

    def text(self, step: int, tag: str, text: str) -> None:
        """Writes a text, in Markdown. Raises RunFileError."""
        from tensorboardX import summary

        self._write(step, summary=summary.text(tag, text))

    def close(self) -> None:
        with files.access(self._folder, "writing to"):
            self._writer.close()

    def _write(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        with files.access(self._folder, "writing to"):
            self._writer.write_event(Event(wall_time=time.time(), step=step, **content))

    def _flush(self) -> None:
        with files.access(self._folder, "writing to"):
            self._writer.flush()
        self._flushed = time.monotonic()
