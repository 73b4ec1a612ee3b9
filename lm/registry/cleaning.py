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
from lm.checkpoint import CheckpointError, Saved
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
      kept: its checkpoints that stay, which have to be whole before others go.
      size: bytes of the files that go.
      why: why nothing goes, or what else is to be known.
      entry: the run as it was listed; None for what a killed deletion has left.
    """

    run: Path
    paths: tuple[Path, ...] = ()
    kept: tuple[Saved, ...] = ()
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
        Removal(path.parent, (path,), size=listing.size_of(str(path)), why="left by a deletion that was killed")
        for path in _left_over(root)
    ]
    for entry in entries:
        if lease.holder(entry.folder) == "alive":
            removals.append(Removal(entry.folder, why="a process of this machine owns it"))
        else:
            removal = _whole(entry.folder) if what == "runs" else _checkpoints(entry, keep)
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
    if why := _why_it_stays(folder):
        return Removal(folder, why=why)
    return Removal(folder, (folder,), size=listing.size_of(str(folder)))


def _why_it_stays(folder: Path) -> str:
    """Why a whole folder is not deleted: it may be more than a run that nobody owns; '' = it is one."""
    if folder.is_symlink():
        return "is a link, which is not followed"
    if not listing.is_run(folder):
        return "not known to be a run: no config.json or trial.json with the config of one"
    for parent, folders, names in os.walk(folder):
        below = Path(parent)
        if below == folder:
            continue
        if found := sorted(listing.OF_A_RUN.intersection(names)):
            return f"has runs inside: {below / found[0]}"
        if any(map(lease.is_lease, names)) and lease.holder(below):
            return f"has runs inside: {below} may be owned by a process"
        folders[:] = [name for name in folders if not name.endswith(REMOVED)]
    return ""


def _checkpoints(entry: Entry, keep: Collection[str]) -> Removal:
    """The checkpoints of a run that are not kept. One that is done, or damaged and perhaps done, keeps its last step,
    without which the same command would train again, unless all go."""
    folder, notes = entry.folder, list[str]()
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
    if "best" in keep and readable:
        best = details.best_step(folder)
        kept |= set() if best is None else {best}
        notes += ["no checkpoint was evaluated: there is no best"] * (best is None)
    if saved and "none" not in keep and not kept:
        why = notes[0] if readable else "none of its checkpoints can be read"
        return Removal(folder, why=f"{why}; --keep=none deletes all")
    if entry.state in ("done", "damaged") and "none" not in keep and not kept >= {*readable[-1:]}:
        kept.add(readable[-1])
        notes.append(f"step {readable[-1]} stays: without its last step a run that may be done would train again")
    stays = [each for each in saved if "unreadable" in each.info and "none" not in keep]
    kept |= {each.step for each in stays}
    paths = [*(root / str(each.step) for each in saved if each.step not in kept), *checkpoint.unfinished(folder)]
    links = [path for path in paths if path.is_symlink()]
    gone = tuple(path for path in paths if path not in links)
    notes += [f"{path} is a link, which is not followed" for path in links[:1]]
    notes += [f"step {each.step} {each.info['unreadable']}; it stays" for each in stays[:1]]
    whole = tuple(each for each in saved if each.step in kept and each not in stays)
    return Removal(folder, gone, whole, sum(listing.size_of(str(path)) for path in gone), "; ".join(notes))


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
        except CheckpointError as error:
            wrong.append(f"{error}. Nothing of {removal.run} was deleted; --keep=none deletes all its checkpoints")
        except (lease.Held, lease.Lost, ConfigError) as error:
            wrong.append(str(error))
        except OSError as error:
            wrong.append(f"{removal.run}: {error.filename or ''} cannot be deleted: {error.strerror}")
    return freed, wrong


def _remove(removal: Removal) -> int:
    """Deletes the folders of a run; returns the bytes freed.

    Raises:
      CheckpointError: a checkpoint that is kept is damaged, so that those that would go may be needed.
      ConfigError: the folder has changed since it was planned.
      OSError, lease.Held, lease.Lost: the folder cannot be deleted, or is another's.
    """
    renamed = list(removal.paths)
    if removal.entry:
        with lease.hold(removal.run) as check:
            if listing.written(str(removal.run)) != removal.entry.written:
                raise ConfigError(
                    f"{removal.run}: was written since it was listed, and is left as it is; list it again"
                )
            if removal.run in removal.paths and (why := _why_it_stays(removal.run)):
                raise ConfigError(f"{removal.run}: {why}; it stays")
            for saved in removal.kept if any(path.name.isdecimal() for path in removal.paths) else ():
                checkpoint.verify(saved)
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
