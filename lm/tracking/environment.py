"""environment.json and diff.patch: with what code, on what host and with which packages a run was started.

No user name, no environment variables and no contents of files that git does not track are recorded.
"""

import datetime
import functools
import os
import platform
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax

import lm
from lm.tracking import files
from lm.tracking.files import RunFileError

ENVIRONMENT, DIFF = "environment.json", "diff.patch"
DIFF_BYTES = 2**20  # that are kept of a diff
EARLIER_STARTS = 100  # that are kept
_GIT_SECONDS = 20.0  # for one git command, after which it counts as failed

# Nothing that a repository configures is executed, and nothing is written.
_GIT = ("git", "--no-optional-locks", "-c", "core.fsmonitor=false", "-c", "core.pager=cat")


class Code(NamedTuple):
    """The state of a git repository.

    Attributes:
      repository: its folder.
      commit: that is checked out, 40 hex digits.
      dirty: whether files that git tracks differ from it.
      diff: how, as a patch, without the contents of binary files; at most DIFF_BYTES, whole lines.
      diff_is_cut: whether that is not all of it.
    """

    repository: str
    commit: str
    dirty: bool
    diff: bytes
    diff_is_cut: bool


def code_in(folder: Path) -> Code | None:
    """The state of the git repository that a folder is in; None where there is none, or no git."""
    root = _git(folder, "rev-parse", "--show-toplevel").strip().decode(errors="replace")
    commit = _git(folder, "rev-parse", "--verify", "HEAD").strip().decode()
    if not root or not commit:
        return None
    dirty = bool(_git(Path(root), "status", "--porcelain", "--untracked-files=no", "--ignore-submodules=dirty").strip())
    command = ("diff", "HEAD", "--no-ext-diff", "--no-textconv", "--no-color", "--ignore-submodules=dirty")
    diff = _git(Path(root), *command, most=DIFF_BYTES + 1) if dirty else b""
    is_cut = len(diff) > DIFF_BYTES
    if is_cut:
        diff = diff[: diff[:DIFF_BYTES].rfind(b"\n") + 1]
    return Code(root, commit, dirty, diff, is_cut)


@functools.cache
def running_code() -> Code | None:
    """The code of this process, as it was when first asked: of the repository that `lm` is in, else of the working
    directory's."""
    return code_in(Path(lm.__file__).parent) or code_in(Path.cwd())


def describe() -> dict[str, Any]:
    """What environment.json says of this start: host, devices, command, code, versions; paths begin with ~ for home."""
    code = running_code()
    git = {"repository": _without_home(code.repository), "commit": code.commit, "dirty": code.dirty} if code else {}
    if code and code.dirty:
        git |= {"diff_is_cut": code.diff_is_cut}
    return {
        "began": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "devices": {
            "kind": jax.devices()[0].device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
        },
        "command": [_without_home(argument) for argument in sys.orig_argv],
        "folder": _without_home(os.getcwd()),
        "git": git,
        "python": platform.python_version(),
        "packages": _packages(),
    }


def record(workdir: Path, start_step: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Writes environment.json and diff.patch of this start; what the former said of earlier ones stays, in short.

    Args:
      workdir: the run's folder.
      start_step: steps done before it.
      say: told of a diff that was cut, and of a file that was damaged.

    Returns:
      `describe()`, with 'start_step'.

    Raises:
      RunFileError: a file cannot be written.
    """
    now, code = {"start_step": start_step, **describe()}, running_code()
    with files.access(workdir / DIFF, "removing"):
        (workdir / DIFF).unlink(missing_ok=True)
    if code and code.dirty:
        if code.diff_is_cut:
            since = f"the changes since commit {code.commit[:12]}"
            say(f"{workdir / DIFF} has only the first {len(code.diff):,} bytes of {since}")
        files.write_atomic(workdir / DIFF, code.diff)
    files.write_document(workdir / ENVIRONMENT, {**now, "earlier": _earlier(workdir, say)})
    return now


def _earlier(workdir: Path, say: Callable[[str], None]) -> list[Any]:
    """The earlier starts of a run, oldest first."""
    try:
        last = files.read_document(workdir / ENVIRONMENT)
    except RunFileError as error:
        say(f"{error}; it is written again, without the earlier starts")
        return []
    before = last.get("earlier")
    short = [{key: last.get(key) for key in ("began", "start_step", "host", "git")}] if last else []
    return [*(before if isinstance(before, list) else []), *short][-EARLIER_STARTS:]


@functools.cache
def _packages() -> dict[str, str]:
    """Name -> version of all packages that are installed."""
    found = {dist.metadata["Name"] or "": dist.version for dist in metadata.distributions()}
    return {name: version for name, version in sorted(found.items()) if name}


def _without_home(text: str) -> str:
    home = os.path.expanduser("~")
    return text.replace(home, "~") if len(home) > 1 else text


def _git(folder: Path, *arguments: str, most: int = 2**20) -> bytes:
    """Up to `most` bytes of what a git command prints; b'' if it fails, takes too long, or there is no git."""
    try:
        process = subprocess.Popen(
            [*_GIT, "-C", str(folder), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    except OSError:
        return b""
    watch = threading.Timer(_GIT_SECONDS, process.kill)
    watch.daemon = True
    watch.start()
    with process:
        assert process.stdout is not None
        printed = process.stdout.read(most)
        if is_all := len(printed) < most:
            process.wait()
        else:
            process.kill()
    watch.cancel()
    return printed if process.returncode == 0 or not is_all else b""
