"""environment.json and diff.patch: with what code, on what host and with which packages a run was started.

No environment variables and no contents of files that git does not track are recorded. The command line and paths are,
as they are but for the home folder: names of users and secrets in them are too.
"""

import datetime
import functools
import os
import platform
import re
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

# Of what a repository configures, its filters (such as Git LFS's) are executed, without which git does not know which
# files have changed; its hooks, monitor, pager and diff programs are not. Nothing is written.
_GIT = ("git", "--no-optional-locks", "-c", "core.fsmonitor=false", "-c", "core.pager=cat")
_DIFF = ("diff", "HEAD", "--no-ext-diff", "--no-textconv", "--no-color", "--ignore-submodules=dirty")
_PREFIXES = ("--src-prefix=a/", "--dst-prefix=b/")  # whatever is configured, so that `git apply` takes it


class Code(NamedTuple):
    """The state of a git repository.

    Attributes:
      repository: its folder.
      commit: that is checked out, 40 hex digits.
      dirty: whether files that git tracks differ from it; None = git failed to say.
      diff: how, as a patch, without the contents of binary files; at most DIFF_BYTES, whole lines; None = nothing
        differs, or git failed.
      diff_is_cut: whether that is not all of it.
    """

    repository: str
    commit: str
    dirty: bool | None
    diff: bytes | None
    diff_is_cut: bool


def code_in(folder: Path) -> Code | None:
    """The state of the git repository that a folder is in; None where there is none, or no git."""
    root, commit = (_git(folder, "rev-parse", *what) for what in (("--show-toplevel",), ("--verify", "HEAD")))
    if not root or not commit:
        return None
    top = root.strip().decode(errors="replace")
    status = _git(Path(top), "status", "--porcelain", "--untracked-files=no", "--ignore-submodules=dirty")
    dirty = None if status is None else bool(status.strip())
    diff = _git(Path(top), *_DIFF, *_PREFIXES, most=DIFF_BYTES + 1) if dirty else None
    is_cut = diff is not None and len(diff) > DIFF_BYTES
    if diff is not None and is_cut:
        diff = diff[: diff[:DIFF_BYTES].rfind(b"\n") + 1]
    return Code(top, commit.strip().decode(), dirty, diff, is_cut)


@functools.cache
def running_code() -> Code | None:
    """The code of this process, as it was when first asked: of the repository that `lm` is in, else of the working
    directory's."""
    return code_in(Path(lm.__file__).parent) or code_in(Path("."))


def describe() -> dict[str, Any]:
    """What environment.json says of this start: host, devices, command, code, versions; paths begin with ~ for home."""
    code = running_code()
    git = {"repository": _without_home(code.repository), "commit": code.commit, "dirty": code.dirty} if code else {}
    if code and code.diff is not None:
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
        "folder": _without_home(_working_folder()),
        "git": git,
        "python": platform.python_version(),
        "packages": _packages(),
    }


def record(workdir: Path, start_step: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Writes environment.json and diff.patch of this start; what the former said of earlier ones stays, in short.

    Args:
      workdir: the run's folder.
      start_step: steps done before it.
      say: told of a diff that was cut or is missing, and of a file that was damaged.

    Returns:
      `describe()`, with 'start_step'.

    Raises:
      RunFileError: a file cannot be written.
    """
    now, code = {"start_step": start_step, **describe()}, running_code()
    with files.access(workdir / DIFF, "removing"):
        (workdir / DIFF).unlink(missing_ok=True)
    if code and code.dirty is not False and code.diff is None:
        say(f"git does not say how the code differs from commit {code.commit[:12]}: there is no {workdir / DIFF}")
    if code and code.diff is not None:
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
    return re.sub(re.escape(home) + r"(?=/|$)", "~", text) if len(home) > 1 else text


def _working_folder() -> str:
    try:
        return os.getcwd()
    except OSError:  # it was deleted
        return ""


def _git(folder: Path, *arguments: str, most: int = 2**20) -> bytes | None:
    """Up to `most` bytes of what a git command prints; None if it fails, takes too long, or there is no git."""
    try:
        process = subprocess.Popen(
            [*_GIT, "-C", str(folder), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    except OSError:
        return None
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
    return printed if process.returncode == 0 or not is_all else None
