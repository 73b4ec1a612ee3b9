"""Intermediate files of a job: folders of arrays that are written atomically.

A unit of work whose output folder exists is skipped, so that a job killed at any point can be resumed.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def write(folder: Path, arrays: Mapping[str, np.ndarray], info: Any) -> None:
    """Writes arrays, and `info` as JSON, as one folder. An existing folder is kept: its content is the same."""
    scratch = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    for name, array in arrays.items():
        np.save(scratch / f"{name}.npy", array, allow_pickle=False)
    (scratch / "info.json").write_text(json.dumps(info), encoding="utf-8")
    if not folder.exists():
        try:
            scratch.rename(folder)
        except OSError:  # another process, which the runner gave the same unit, was faster
            if not folder.exists():
                raise
    shutil.rmtree(scratch, ignore_errors=True)


def array(folder: Path, name: str) -> np.ndarray:
    """An array of a folder, memory-mapped."""
    return np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)


def info(folder: Path) -> Any:
    """The `info` that was passed to `write`."""
    return json.loads((folder / "info.json").read_text(encoding="utf-8"))
