"""saved.json: the step of the newest checkpoint of a run that was complete on disk.

It tells a run that has lost its checkpoints from one that was stopped before its first: the one is refused, since a
start from scratch would erase its metrics; the other starts again.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from lm.checkpoint import CheckpointError
from lm.tracking import files
from lm.tracking.files import RunFileError


def record(workdir: Path, step: int) -> None:
    """Records that the checkpoint of a step is complete. Raises RunFileError."""
    files.write_document(workdir / "saved.json", {"step": step})


def read(workdir: Path) -> int | None:
    """The recorded step; None = no checkpoint was recorded. Raises RunFileError if the file is damaged."""
    path = workdir / "saved.json"
    content = files.read_document(path)
    if content and type(content.get("step")) is not int:
        raise RunFileError(f"{path} is damaged: expected an integer 'step', found {str(content)[:60]}")
    return content.get("step")


def check(workdir: Path, steps: Sequence[int], say: Callable[[str], None]) -> None:
    """Checks that the text files of a run fit its checkpoints, before it starts. Writes nothing.

    Args:
      workdir: the run's folder; it need not exist.
      steps: of the checkpoints that are there, readable or not.
      say: told where only checkpoints before the newest one that was complete are left.

    Raises:
      CheckpointError: the run had a checkpoint and has none now.
      RunFileError: a row that the run would keep is damaged.
    """
    try:
        recorded, damage = read(workdir), ""
    except RunFileError as error:
        recorded, damage = None, str(error)
    if not steps:
        return _refuse_lost_work(workdir, recorded, damage)
    if damage:
        say(f"{damage}; it is written again")
    if recorded is not None and recorded > max(steps):
        say(f"{workdir}/checkpoints has lost step {recorded:,}, which was complete; the newest is {max(steps):,}")
    for name in files.COLUMNS:
        files.kept_rows(workdir / name, max(steps))


def _refuse_lost_work(workdir: Path, recorded: int | None, damage: str) -> None:
    """Raises CheckpointError if a run without checkpoints had one."""
    last = files.kept_rows(workdir / "metrics.jsonl", files.MAX_STEP).last.get("step")
    signs = []
    if (workdir / "summary.json").exists():
        signs.append("summary.json")
    if recorded is not None:
        signs.append(f"saved.json, by which the checkpoint of step {recorded:,} was complete")
    if damage:
        signs.append(f"saved.json ({damage})")
    if last is not None:
        # Older versions wrote no saved.json. The folder is made before the first row is written, and a save is begun
        # after the one before it is complete.
        saves = files.read_document(workdir / "config.json").get("checkpoint")
        every = saves.get("every_steps") if isinstance(saves, dict) else None
        if not (workdir / "checkpoints").is_dir():
            signs.append("no folder checkpoints/, which is made before the first row")
        elif isinstance(every, int) and 0 < 2 * every < last:
            signs.append(f"a checkpoint every {every:,} steps")
    if signs:
        rows = "no metrics" if last is None else f"metrics up to step {last:,}"
        raise CheckpointError(
            f"{workdir} has {rows} and {' and '.join(signs)}, but no checkpoint: its work would be erased by a start "
            f"from scratch. Restore {workdir}/checkpoints; or to start from scratch, delete {workdir} or give another "
            "--workdir. Nothing was changed"
        )
