"""JAX's persistent compilation cache, on by default: a program that any run has compiled is not compiled again."""

import contextlib
import hashlib
import os
import platform
import sys
from pathlib import Path

from lm.terminal import say

MAX_BYTES = 2 << 30  # of the default folder; the programs that were written first go first
_MIN_COMPILE_SECONDS = 0.2


def use(setting: str) -> None:
    """Keeps what is compiled from now on, and reads what was compiled before; processes may share a folder.

    Args:
      setting: `train.compilation_cache`: a folder; '' = none; 'auto' = that of JAX_COMPILATION_CACHE_DIR or
        `jax.config`, which are left as they are, else `default_folder`. Machine code is read from it: it must not be
        one that others can write.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache as of_jax

    jax.config.update("jax_enable_compilation_cache", bool(setting))
    now = jax.config.values["jax_compilation_cache_dir"]
    if not setting or (setting == "auto" and now):
        return
    try:
        folder = default_folder() if setting == "auto" else Path(setting).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        if setting == "auto":
            prune(folder, MAX_BYTES)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        say(f"note: programs that are compiled are not kept: {error}; set train.compilation_cache", file=sys.stderr)
        return
    if str(folder) != now:
        of_jax.reset_cache()  # JAX would go on with the one that it has opened
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_COMPILE_SECONDS)


def default_folder() -> Path:
    """XDG_CACHE_HOME/lm/compiled, or ~/.cache/lm/compiled, one for each kind of processor.

    Programs for CPUs hold machine code for the processor at hand, which JAX's keys do not name; homes are often shared.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    except OSError:
        flags = platform.processor()
    kind = hashlib.sha256(f"{platform.machine()} {flags}".encode()).hexdigest()[:12]
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lm" / "compiled" / kind


def prune(folder: Path, most: int) -> None:
    """Deletes the files of a folder that were written first, until they have at most `most` bytes."""
    found = []
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):  # another process may have deleted it
            if entry.is_file(follow_symlinks=False):
                found.append((entry.stat(follow_symlinks=False), entry.path))
    total = sum(stat.st_size for stat, _ in found)
    for stat, path in sorted(found, key=lambda each: each[0].st_mtime):
        if total <= most:
            return
        Path(path).unlink(missing_ok=True)
        total -= stat.st_size
