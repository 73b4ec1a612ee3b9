"""Deletes checkpoints, or whole runs, of runs that nobody owns: planned and listed first, then done.

A folder is renamed before it is deleted, so that a kill never leaves a half under its name; what a killed deletion has
left is deleted by the next one. Links are never followed, neither to runs nor inside them. While something of a run is
deleted, its lease is held, so that no process can start or resume it meanwhile.
"""

import dataclasses
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

from lm import checkpoint, lease
from lm import files as files_lib
from lm.checkpoint import CheckpointError
from lm.config.schema import ConfigError
from lm.registry import details, listing
from lm.registry.listing import REMOVED, Entry

KEEP = ("best", "last", "none")


@dataclasses.dataclass(frozen=True)
class Removal:
    """What is to be deleted of a run.

    Attributes:
      run: its folder; that of a deletion that was killed is its parent.
      paths: folders that go; () = none.
      size: bytes of their files.
      why: why nothing goes, or what else is to be known.
      entry: the run as it was listed; None for what a killed deletion has left.
    """

    run: Path
    paths: tuple[Path, ...] = ()
    size: int = 0
    why: str = ""
    entry: Entry | None = None


def plan(entries: Sequence[Entry], root: Path, what: str, keep: Collection[str]) -> list[Removal]:
    """What is to be deleted of each run, and of deletions that were killed. Changes nothing.

    Args:
      entries: the runs.
      root: the folder that they are below; nothing outside goes.
      what: 'runs' = whole folders.
      keep: which checkpoints stay: 'best', 'last', both, or 'none' alone.

    Raises:
      ConfigError: `keep` makes no sense.
    """
    if what == "checkpoints" and (not keep or ("none" in keep and len(keep) > 1) or not set(keep) <= set(KEEP)):
        raise ConfigError(f"--keep={','.join(keep)}: expected best, last, or both; or none, which deletes all")
    removals = [
        Removal(path.parent, (path,), listing.size_of(str(path)), "left by a deletion that was killed")
        for path in _left_over(root)
    ]
    for entry in entries:
        if lease.holder(entry.folder) == "alive":
            removals.append(Removal(entry.folder, why="a process of this machine owns it"))
        else:
            removal = _whole(entry.folder) if what == "runs" else _checkpoints(entry.folder, keep)
            removals.append(dataclasses.replace(removal, entry=entry))
    return removals


def _left_over(root: Path) -> Iterator[Path]:
    """Folders of runs that a killed deletion has renamed, and not yet deleted."""
    for parent, folders, names in os.walk(root):
        for name in [name for name in folders if name.endswith(REMOVED)]:
            if not Path(parent, name).is_symlink():
                yield Path(parent, name)
        is_run = not listing.OF_A_RUN.isdisjoint(names)
        folders[:] = [] if is_run else [n for n in folders if not n.endswith(REMOVED) and not n.startswith(".")]


def _whole(folder: Path) -> Removal:
    if folder.is_symlink():
        return Removal(folder, why="is a link, which is not followed")
    return Removal(folder, (folder,), listing.size_of(str(folder)))


def _checkpoints(folder: Path, keep: Collection[str]) -> Removal:
    """The checkpoints of a run that are not kept."""
    root = folder / "checkpoints"
    if root.is_symlink():
        return Removal(folder, why=f"{root} is a link, which is not followed")
    try:
        saved = checkpoint.list_saved(folder)
    except CheckpointError as error:
        return Removal(folder, why=str(error))
    kept, readable = set[int](), [each.step for each in saved if "unreadable" not in each.info]
    if "last" in keep and readable:
        kept.add(readable[-1])
    if "best" in keep and (best := details.best_step(folder)) is not None:
        kept.add(best)
    if saved and "none" not in keep and not kept:
        why = "none of its checkpoints can be read" if not readable else "no checkpoint was evaluated: there is no best"
        return Removal(folder, why=f"{why}; --keep=none deletes all")
    stays = [each for each in saved if "unreadable" in each.info and "none" not in keep]
    kept |= {each.step for each in stays}
    paths = [*(root / str(each.step) for each in saved if each.step not in kept), *checkpoint.unfinished(folder)]
    links = [path for path in paths if path.is_symlink()]
    gone = tuple(path for path in paths if path not in links)
    notes = [f"{path} is a link, which is not followed" for path in links[:1]]
    notes += [f"step {each.step} {each.info['unreadable']}; it stays" for each in stays[:1]]
    return Removal(folder, gone, sum(listing.size_of(str(path)) for path in gone), "; ".join(notes))


def carry_out(removals: Sequence[Removal], say: Callable[[str], None]) -> tuple[int, list[str]]:
    """Deletes what is planned, run by run.

    Args:
      removals: from `plan`.
      say: progress.

    Returns:
      Bytes that were freed, and a line for each run of which something stayed.
    """
    freed, wrong = 0, list[str]()
    for removal in removals:
        if not removal.paths:
            continue
        try:
            freed += _remove(removal)
            say(f"deleted {', '.join(map(str, removal.paths))}: {listing.in_bytes(removal.size)}")
        except (lease.Held, lease.Lost, ConfigError) as error:
            wrong.append(str(error))
        except OSError as error:
            wrong.append(f"{removal.run}: {error.filename or ''} cannot be deleted: {error.strerror}")
    return freed, wrong


def _remove(removal: Removal) -> int:
    """Deletes the folders of a run; returns the bytes freed. Raises OSError, ConfigError, lease.Held, .Lost."""
    renamed = list(removal.paths)
    if removal.entry:
        with lease.hold(removal.run) as check:
            if listing.written(str(removal.run)) != removal.entry.written:
                raise ConfigError(
                    f"{removal.run}: was written since it was listed, and is left as it is; list it again"
                )
            for i, path in enumerate(removal.paths):
                check()
                renamed[i] = _rename(path, REMOVED if path == removal.run else checkpoint.EXPIRED)
    distinct = list(dict.fromkeys(renamed))  # one may have taken the name of what a killed deletion had left
    size = sum(listing.size_of(str(path)) for path in distinct)
    for path in distinct:
        shutil.rmtree(path)
    return size


def _rename(path: Path, ending: str) -> Path:
    """Gives a folder the name of one that is being deleted."""
    if path.name.endswith(ending):
        return path
    target = path.with_name(path.name + ending)
    if target.exists():  # left by a deletion that was killed
        shutil.rmtree(target)
    path.rename(target)
    files_lib.sync(path.parent)
    return target
