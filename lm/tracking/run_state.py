"""The state of a run, told from the files in its folder alone; for single runs and for the trials of a study."""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lm import command_line, lease, preemption
from lm.tracking import files
from lm.tracking.files import RunFileError

FAILURE, LOG, RECORD = "failure.json", "log.txt", "trial.json"  # the latter two: of a trial of a study
SUMMARY = "summary.json"
State = Literal["done", "running", "interrupted", "failed", "damaged"]
STATES: tuple[State, ...] = ("done", "running", "interrupted", "failed", "damaged")
_LONGEST = 4000  # characters of an error that are kept


class RunState(NamedTuple):
    """What a run's files say.

    Attributes:
      state: 'running': a process holds its lease, or may hold it on another machine; 'interrupted': it has begun, and
        was killed or stopped; the same command resumes it. 'damaged': summary.json or failure.json cannot be trusted.
      why: of a failed or damaged one.
      summary: of one that is done.
    """

    state: State
    why: str = ""
    summary: Mapping[str, Any] = {}


def look(folder: Path, names: Collection[str] | None = None) -> RunState:
    """The state of the run in a folder.

    Args:
      folder: of a run that has begun.
      names: of the files in it; None = look.
    """
    has: Callable[[str], bool] = (lambda name: True) if names is None else names.__contains__
    holder = lease.holder(folder) if names is None or any(map(lease.is_lease, names)) else ""
    try:
        if holder == "alive":
            return RunState("running")
        if has(SUMMARY) and (summary := files.read_document(f"{folder}/{SUMMARY}")):
            return RunState("done", summary=summary)
        if holder:
            return RunState("running")
        if has(FAILURE) and (failure := files.read_document(f"{folder}/{FAILURE}")):
            return RunState("failed", str(failure.get("error")))
    except RunFileError as error:
        return RunState("damaged", str(error))
    return RunState("interrupted")


def in_words(error: Exception) -> str:
    """The error on one line."""
    return str(error) if command_line.is_expected(error) else f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def recorded_failure(folder: Path, check_lease: Callable[[], None]) -> Iterator[None]:
    """Removes the failure.json of an earlier start, and writes one if its block ends with an error; not if the run was
    stopped, or the folder is another's.

    Raises:
      RunFileError: the earlier one cannot be removed.
    """
    with files.access(folder / FAILURE, "removing"):
        (folder / FAILURE).unlink(missing_ok=True)
    try:
        yield
    except (preemption.Preempted, lease.Lost):
        raise
    except Exception as error:
        with contextlib.suppress(RunFileError, lease.Lost):  # such as a full disk, which is the error itself
            check_lease()
            files.write_document(folder / FAILURE, {"error": in_words(error)[:_LONGEST]})
        raise
