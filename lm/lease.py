"""One owner of a folder at a time: a lease file that the owner renews, and that others take over when it is dead.

The lease is a file `lease.N` in the folder, made by exclusive creation, which local disks, NFS and buckets have; file
locks do not reach the other hosts of a mounted bucket. A daemon thread rewrites it every `BEAT_SECONDS`. Clocks of
different hosts are never compared. Whoever finds the lease of

- a process of this machine: is refused while that process exists, also while it is stopped, and takes over at once when
  it is gone. A process is known by its id and the time at which it was started, as ids are used again;
- another machine or container, or a damaged file: watches it for `DEAD_SECONDS`, and is refused as soon as it changes.

A dead `lease.N` is taken over by exclusive creation of `lease.N+1`, which succeeds for one of several that try, and is
then deleted, so that an owner that was only cut off or suspended finds its file gone. It looks before each write.
"""

import contextlib
import dataclasses
import datetime
import errno
import itertools
import json
import os
import re
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from lm.config.schema import ConfigError
from lm.terminal import say

BEAT_SECONDS = 3.0
DEAD_SECONDS = 30.0  # a lease that has not changed for so long is dead
_FRESH_SECONDS = 6.0  # after a beat the lease is known to be ours for so long, far less than DEAD_SECONDS
_POLL_SECONDS = 0.2
_AGREE_SECONDS = 600  # for which the other processes of a run wait for process 0

_NAME = re.compile(r"lease\.(0|[1-9]\d*)")
_agreements = itertools.count()

Check = Callable[[], None]


class Held(RuntimeError):
    """Another process owns the folder. The message says which, and since when."""

    exit_status = 73  # EX_CANTCREAT of sysexits.h


class Lost(RuntimeError):
    """Another process has taken the folder over: nothing may be written any more."""

    exit_status = 74  # EX_IOERR of sysexits.h


@dataclasses.dataclass(frozen=True)
class Owner:
    """Who wrote a lease.

    Attributes:
      token: random, one for each lease.
      host: name of the host, for messages.
      machine: what process ids are relative to: the boot of a machine and a namespace of processes; '' = not known.
      pid: id of the process.
      started: when the process started, in clock ticks since the boot.
      since: when it took the lease, by the clock of its host, for messages.
    """

    token: str
    host: str
    machine: str
    pid: int
    started: str
    since: str

    def __str__(self) -> str:
        host, since = ("".join(c if c.isprintable() else "?" for c in text) for text in (self.host, self.since))
        return f"process {self.pid} on {host}, which has held it since {since}"


def is_lease(name: str) -> bool:
    """Whether a file of this name is a lease."""
    return _NAME.fullmatch(name) is not None


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[Check]:
    """Owns `folder`, which is made if it is missing, while the `with` block runs.

    Yields:
      A function to call before each write: raises `Lost` where the folder is no longer ours.

    Raises:
      Held: another process owns the folder.
      ConfigError: it cannot be made or written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        lease = _acquire(folder)
    except OSError as error:
        _remove_empty(made)
        raise ConfigError(f"{folder}: expected a folder that can be written, found {_reason(error)}") from None
    lease.thread.start()
    try:
        yield lease.check
    finally:
        lease.release()
        _remove_empty(made)


@contextlib.contextmanager
def hold_for_run(workdir: Path) -> Iterator[Check]:
    """As `hold`, by process 0 for all processes of a run (`jax.distributed`); a refusal is raised by all of them."""
    import jax

    if not jax.distributed.is_initialized():
        with hold(workdir) as check:
            yield check
        return
    from jax._src import distributed

    # Not a collective: those of a CPU end after 30 s, the time for which process 0 may watch another's lease.
    state, key = distributed.global_state, f"lm/lease/{next(_agreements)}"
    client: Any = state.client
    with contextlib.ExitStack() as stack:
        if state.process_id == 0:
            try:
                check = stack.enter_context(hold(workdir))
            except (Held, ConfigError) as error:
                client.key_value_set(key, f"{type(error).__name__} {error}")
                raise
            client.key_value_set(key, "")
        elif refusal := client.blocking_key_value_get(key, _AGREE_SECONDS * 1000):
            name, _, message = refusal.partition(" ")
            raise Held(message) if name == Held.__name__ else ConfigError(message)
        else:
            check = _nothing
        yield check


class _Lease:
    """A lease of this process. One thread at a time reads or writes its file."""

    def __init__(self, path: Path, owner: Owner):
        self.path, self._owner = path, owner
        self._lock, self._stop, self._beats = threading.Lock(), threading.Event(), 0
        self._lost, self._known = "", _now()  # why it is lost; when it was ours and renewed
        self.thread = threading.Thread(target=self._renew, daemon=True, name="lease")

    def check(self) -> None:
        """Raises Lost if the lease is another's now. Reads the file only if the thread has not renewed it lately."""
        if not self._lost and _now() - self._known > _FRESH_SECONDS:
            try:
                self._beat(write=False)
            except OSError as error:
                raise Lost(f"stopped: whether {self.path} is still ours cannot be read: {_reason(error)}") from None
        if self._lost:
            raise Lost(f"stopped before writing more: this process no longer owns {self.path.parent}: {self._lost}")

    def release(self) -> None:
        """Deletes the lease if it is still ours."""
        self._stop.set()
        with contextlib.suppress(OSError):
            self._beat(write=False)
            if not self._lost:
                self.path.unlink()

    def _renew(self) -> None:
        while not self._lost and not self._stop.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # such as a full disk, or a mount that is away: try again
                self._beat(write=True)

    def _beat(self, write: bool) -> None:
        """Reads the lease, and rewrites it if it is still ours: the file that was read, never one that replaced it."""
        with self._lock:
            try:
                file = os.open(self.path, os.O_RDWR if write else os.O_RDONLY)
            except (FileNotFoundError, NotADirectoryError):
                self._lost = f"{self.path.name} was {_newer(self.path)}"
                return
            try:
                owner = parse(os.pread(file, 1 << 16, 0))
                if owner != self._owner:
                    self._lost = f"{self.path.name} is of {owner}" if owner else f"{self.path.name} is damaged"
                elif write:
                    self._beats += 1
                    os.pwrite(file, _written(self._owner, self._beats), 0)
            finally:
                os.close(file)  # which NFS and buckets write at
            if write and not self._lost:
                self._known = _now()


def _acquire(folder: Path) -> _Lease:
    """Takes the lease of a folder. Raises Held or OSError."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            found = leases(folder)
        except FileNotFoundError:  # another that had made the folder has removed it
            continue
        _refuse_living(folder, found)
        path, owner = folder / f"lease.{max(found, default=0) + 1}", _this_process()
        try:
            file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except (FileExistsError, FileNotFoundError):  # another was faster, or has removed the empty folder
            continue
        try:
            try:
                os.write(file, _written(owner, 0))
            finally:
                os.close(file)
            # Whoever else created a lease meanwhile, from an older listing of the folder, sees this one too.
            others = {number: text for number, text in leases(folder).items() if folder / f"lease.{number}" != path}
            settled = all(found.get(number) == text for number, text in others.items())
        except OSError as error:
            if error.errno == errno.ESTALE:  # how a bucket tells, at the end of writing, that another was faster
                continue
            path.unlink(missing_ok=True)
            raise
        if not settled:
            path.unlink(missing_ok=True)
            continue
        for number, text in others.items():
            (folder / f"lease.{number}").unlink(missing_ok=True)
            _say(f"{folder}: taken over from {parse(text) or f'lease.{number}, which is damaged'}, which is gone")
        return _Lease(path, owner)


def _refuse_living(folder: Path, found: Mapping[int, bytes]) -> None:
    """Returns once the owners of all these leases are gone; raises Held for one that lives."""
    far = {}
    for number, text in found.items():
        owner, state = parse(text), _known_state(text)
        if state == "unknown":
            far[number] = text
        elif owner and state == "stopped":
            raise Held(f"{folder} is in use by {owner} and is stopped; continue it (kill -CONT {owner.pid}) or kill it")
        elif owner and state == "running":
            raise Held(f"{folder} is in use by {owner}; wait for it, or stop it (kill {owner.pid})")
    if not far:
        return
    text = next(iter(far.values()))
    name = str(parse(text) or f"a process that is not known, as lease.{next(iter(far))} is damaged")
    said, began = False, _now()
    while (waited := _now() - began) < DEAD_SECONDS:
        if waited > DEAD_SECONDS / 20 and not said:  # one that is just starting shows itself sooner
            _say(f"{folder} is held by {name}; taken over unless it shows signs of life within {DEAD_SECONDS:.0f} s")
            said = True
        time.sleep(_POLL_SECONDS)
        now = leases(folder)
        if changed := [text for number, text in now.items() if far.get(number, found.get(number)) != text]:
            raise Held(f"{folder} is in use by {parse(changed[0]) or name}; wait for it, or stop it there")
        if not far.keys() & now.keys():
            return  # released


def holder(folder: Path) -> Literal["", "alive", "unknown"]:
    """Whether a process owns the folder, as far as its files tell at once. 'unknown': it is of another machine or boot,
    or its lease is damaged, and it may be dead."""
    try:
        states = {_known_state(text) for text in leases(folder).values()}
    except FileNotFoundError:
        return ""
    if {"running", "stopped"} & states:
        return "alive"
    return "unknown" if "unknown" in states else ""


def leases(folder: Path) -> dict[int, bytes]:
    """Number -> content of each lease in a folder; more than one only while or after one was taken over."""
    out = {}
    for name in os.listdir(folder):
        if match := _NAME.fullmatch(name):
            with contextlib.suppress(FileNotFoundError):
                out[int(match[1])] = (folder / name).read_bytes()[: 1 << 16]
    return dict(sorted(out.items()))


def parse(text: bytes) -> Owner | None:
    """Who wrote a lease; None where it is damaged, or not yet written."""
    try:
        fields = json.loads(text)
        owner = Owner(**{field.name: fields[field.name] for field in dataclasses.fields(Owner)})
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    kinds = {field.name: int if field.name == "pid" else str for field in dataclasses.fields(Owner)}
    return owner if all(type(getattr(owner, name)) is kind for name, kind in kinds.items()) else None


def _written(owner: Owner, beats: int) -> bytes:
    return (json.dumps({**dataclasses.asdict(owner), "beats": beats}) + "\n").encode()


def _this_process() -> Owner:
    since = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    _, started = _stat(os.getpid()) or ("", "")
    return Owner(uuid.uuid4().hex, socket.gethostname(), _machine(), os.getpid(), started, since)


def _machine() -> str:
    """Names the boot of this machine and the namespace of process ids; '' where the platform has neither."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _known_state(text: bytes) -> str:
    """`_state` of the owner of a lease; 'unknown' for one of another machine, or where the lease is damaged."""
    match parse(text):
        case Owner(machine=machine) as owner if machine and machine == _machine():
            return _state(owner)
    return "unknown"


def _state(owner: Owner) -> str:
    """What a process of this machine is: 'running', 'stopped', 'gone' (its id may be used again) or 'unknown'."""
    if not 0 < owner.pid < 1 << 22:
        return "gone"
    if found := _stat(owner.pid):
        state, started = found
        if started != owner.started or state in "ZX":  # Z: ended, but its parent has not asked how
            return "gone"
        return "stopped" if state in "Tt" else "running"
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return "gone"
    except OSError:
        pass
    return "unknown"  # of another user, where /proc shows only one's own


def _stat(pid: int) -> tuple[str, str] | None:
    """(state, start time) of a process, from proc(5)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return fields[0], fields[19]
    except (OSError, IndexError):
        return None


def _newer(path: Path) -> str:
    """Who has taken the lease over, for a message."""
    with contextlib.suppress(OSError):
        if found := leases(path.parent):
            return f"replaced by that of {parse(list(found.values())[-1]) or 'another process'}"
    return "deleted, perhaps by a process that took over and has ended"


def _remove_empty(folders: list[Path]) -> None:
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _reason(error: OSError) -> str:
    return f"{error.strerror or type(error).__name__} ({error.filename or ''})"


def _say(message: str) -> None:
    say(message, file=sys.stderr)


def _nothing() -> None:
    pass


def _now() -> float:
    """Seconds; on Linux they pass while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
