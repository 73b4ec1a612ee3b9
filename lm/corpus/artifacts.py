"""Files between the stages of a job: folders of arrays that are there whole or not at all.

A stage that finds its output has nothing to do, so that a job killed at any point goes on where it stopped.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def write(folder: Path, arrays: Mapping[str, np.ndarray], info: Any) -> None:
    """Writes arrays, and `info` as JSON, as one folder. One that is there already stays: it holds the same."""
    scratch = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    for name, array in arrays.items():
        np.save(scratch / f"{name}.npy", array, allow_pickle=False)
    (scratch / "info.json").write_text(json.dumps(info), encoding="utf-8")
    if not folder.exists():
        try:
            scratch.rename(folder)
        except OSError:  # made meanwhile by another process that a runner gave the same work
            if not folder.exists():
                raise
    shutil.rmtree(scratch, ignore_errors=True)


def array(folder: Path, name: str) -> np.ndarray:
    """An array of a folder, memory-mapped: what is read of it is what is touched."""
    return np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)


def info(folder: Path) -> Any:
    """What `write` was given as `info`."""
    return json.loads((folder / "info.json").read_text(encoding="utf-8"))
