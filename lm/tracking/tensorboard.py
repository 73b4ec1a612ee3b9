"""TensorBoard as a tracker of a run: event files with scalars, texts, and the config's changes for its page HParams."""

import itertools
import math
import os
import time
from collections.abc import Mapping
from typing import Any

from lm.tracking import files
from lm.tracking.service import RunFacts, Service, Status

FLUSH_SECONDS = 30.0
_numbers = itertools.count()  # of event files of this process: several may begin in the same second


def open_service(facts: RunFacts) -> Service:
    """Makes a new event file in `workdir`/tensorboard, in which the run's config stands.

    A resumed run writes the rows of later steps again: TensorBoard hides those of older files.

    Its functions raise RunFileError; the next call then begins a new file, as the last record may be torn.
    """
    events = _EventFiles(facts)

    def finish(figures: Mapping[str, float], status: Status) -> None:
        events.final(figures, status)
        events.close()

    return Service(events.scalars, events.text, finish)


class _EventFiles:
    """Writes without tensorboardX's SummaryWriter, which has a thread of its own and hides what went wrong in it."""

    def __init__(self, facts: RunFacts):
        self._folder, self._changed = facts.workdir / "tensorboard", _hyperparameters(facts.changed)
        self._writer: Any = None
        self._flushed = time.monotonic()
        self._open(facts.start_step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboardX import summary

        for tag, value in values.items():
            self._write(step, summary=summary.scalar(tag, value))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._flush()

    def text(self, step: int, tag: str, text: str) -> None:
        from tensorboardX import summary

        verbatim = "\n".join("    " + line for line in text.splitlines())  # in Markdown
        self._write(step, summary=summary.text(tag, verbatim))

    def final(self, figures: Mapping[str, float], status: Status) -> None:
        """Writes the final figures, as scalars 'final/NAME' that the page HParams shows, and how the run has ended."""
        from tensorboardX import summary
        from tensorboardX.proto.api_pb2 import Status as Code
        from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData, SessionEndInfo

        named = {f"final/{name}": value for name, value in figures.items() if math.isfinite(value)}
        step = int(figures.get("steps", 0))
        if named:
            experiment, _, _ = summary.hparams(self._changed, named)
            self._write(0, summary=experiment)
            self.scalars(step, named)
        if status != "interrupted":
            end = SessionEndInfo(status=Code.Value("STATUS_SUCCESS" if status == "done" else "STATUS_FAILURE"))
            _, _, event = summary.hparams({}, {})
            content = HParamsPluginData(session_end_info=end, version=0).SerializeToString()
            event.value[0].metadata.plugin_data.content = content
            self._write(step, summary=event)

    def close(self) -> None:
        if self._writer is not None:
            with files.access(self._folder, "writing to"):
                self._writer.close()

    def _open(self, start_step: int | None) -> None:
        """Begins a file. TensorBoard then hides the events after `start_step` in older files; None = it hides none."""
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        with files.access(self._folder, "writing to"):
            self._folder.mkdir(exist_ok=True)
            self._writer = EventsWriter(str(self._folder / "events"), f".{os.getpid()}.{next(_numbers)}")
        if start_step is not None:
            purge_step = start_step + 1 if start_step else 0
            self._write(purge_step, session_log=SessionLog(status=SessionLog.START))
        _, session_start, _ = summary.hparams(self._changed, {})
        self._write(0, summary=session_start)
        self._flush()

    def _write(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        if self._writer is None:
            self._open(None)
        try:
            with files.access(self._folder, "writing to"):
                self._writer.write_event(Event(wall_time=time.time(), step=step, **content))
        except files.RunFileError:
            self._writer = None
            raise

    def _flush(self) -> None:
        with files.access(self._folder, "writing to"):
            self._writer.flush()
        self._flushed = time.monotonic()


def _hyperparameters(changed: Mapping[str, Any]) -> dict[str, Any]:
    """The values as TensorBoard knows them: numbers, booleans and texts."""
    return {key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in changed.items()}
