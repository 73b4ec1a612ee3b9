"""Files that are written atomically and synced, and the scratch files that a killed process leaves behind."""

import contextlib
import os
import re
import socket
import time
from pathlib import Path

_HOST = re.sub(r"[^\w-]", "_", socket.gethostname())
_SCRATCH = re.compile(r"\..+?\.(?:(?P<host>[\w-]+)-)?(?P<pid>\d+)\.tmp")  # older versions wrote no host
_FOREIGN_SECONDS = 600.0  # after so long without a change the scratch file of another host is that of a dead process


def write_atomic(path: os.PathLike[str] | str, content: str | bytes) -> None:
    """Writes a file atomically, and waits until it is on disk.

    Args:
      path: where to; any path that `etils.epath` opens. An object of an object store is atomic as it is.
      content: text is written as UTF-8, its line breaks as they are.
    """
    raw = content.encode() if isinstance(content, str) else content
    if "://" in os.fspath(path):
        from etils import epath

        epath.Path(path).write_bytes(raw)
        return
    path = Path(path)
    scratch = path.with_name(f".{path.name}.{_HOST}-{os.getpid()}.tmp")
    try:
        with scratch.open("wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Waits until a folder and everything in it is on disk."""
    for parent, _, names in os.walk(folder):
        for name in names:
            sync(Path(parent, name))
        sync(Path(parent))


def remove_scratch(folder: Path) -> list[str]:
    """Removes the scratch files that killed calls of `write_atomic` have left in a folder; returns their names.

    That of a process of this host which is still running is kept, and so is a recent one of another host.
    """
    found = [(path, match) for path in folder.glob(".*.tmp") if (match := _SCRATCH.fullmatch(path.name))]
    dead = [path for path, match in found if _is_dead(path, match["host"] or _HOST, int(match["pid"]))]
    for path in dead:
        path.unlink(missing_ok=True)
    return sorted(path.name for path in dead)


def _is_dead(scratch: Path, host: str, pid: int) -> bool:
    if host != _HOST:
        with contextlib.suppress(FileNotFoundError):
            return time.time() - scratch.stat().st_mtime > _FOREIGN_SECONDS
        return False
    if pid == os.getpid():  # of an earlier process that had the same number
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False
