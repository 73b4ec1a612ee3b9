"""Tensors of a folder of safetensors files, read slice by slice. Nothing in the folder is trusted or executed."""

import dataclasses
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lm.checkpoint.store import CheckpointError

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
# Formats that are not read, as loading them executes code from the file or needs another framework.
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx")
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")  # OWNER/NAME or NAME of a model on a hub
_MAX_JSON = 64 << 20  # bytes


@dataclasses.dataclass(frozen=True)
class Tensors:
    """The tensors of a model's files, not yet read.

    Attributes:
      path: the folder, or the file.
      config: the contents of config.json, or what it would say.
      config_path: the file that says it.
      shapes: tensor -> shape.
      places: tensor -> 'FILE, tensor NAME', for messages.
      read: (tensor, slices) -> that part of it, float16, bfloat16 or float32.
      metadata: of the safetensors files.
    """

    path: Path
    config: dict[str, Any]
    config_path: Path
    shapes: dict[str, tuple[int, ...]]
    places: dict[str, str]
    read: Callable[[str, tuple[slice, ...]], np.ndarray]
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)


def open_folder(path: Path) -> Tensors:
    """Opens a folder: config.json, and model.safetensors or the files that model.safetensors.index.json lists.

    Args:
      path: a folder, or that of a model in a hub's cache (with snapshots/).

    Raises:
      CheckpointError: a file is missing, damaged, or lies outside of the folder; there are no safetensors.
    """
    folder = snapshot(path)
    config = read_json(folder, CONFIG)
    return open_files(folder, config, CONFIG, _weight_files(folder))


def open_files(folder: Path, config: dict[str, Any], config_name: str, names: dict[str, set[str] | None]) -> Tensors:
    """Opens files of a folder.

    Args:
      folder: the folder.
      config: what its file `config_name` says.
      config_name: that file.
      names: safetensors file -> the tensors that must be in it; None = any.

    Raises:
      CheckpointError: as `open_folder`.
    """
    handles, shapes, places, file_of = {}, {}, {}, {}
    metadata: dict[str, str] = {}
    for name, expected in names.items():
        handle = _open(_inside(folder, name))
        metadata |= handle.metadata() or {}
        found = list(handle.keys())
        if expected is not None and (wrong := sorted(set(found) ^ expected)):
            where = "is in the file but not in the index" if wrong[0] in found else "is in the index, not in the file"
            raise CheckpointError(f"{folder / name}: tensor '{wrong[0]}' {where} ({INDEX}); download both again")
        handles[name] = handle
        for tensor in found:
            shapes[tensor] = tuple(handle.get_slice(tensor).get_shape())
            places[tensor] = f"{folder / name}, tensor '{tensor}'"
            file_of[tensor] = name

    def read(tensor: str, index: tuple[slice, ...]) -> np.ndarray:
        part = handles[file_of[tensor]].get_slice(tensor)
        if part.get_dtype() not in ("F32", "F16", "BF16"):
            raise CheckpointError(f"{places[tensor]} is {part.get_dtype()}; expected F32, F16 or BF16")
        values: np.ndarray = part[index] if index else part[...]
        return values

    return Tensors(folder, config, folder / config_name, shapes, places, read, metadata)


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The object in a JSON file of the folder. Raises CheckpointError, naming the file."""
    file = _inside(folder, name)
    if not file.is_file():
        raise CheckpointError(f"no {folder / name}: expected a folder with {CONFIG} and {WEIGHTS} or {INDEX}")
    if file.stat().st_size > _MAX_JSON:
        raise CheckpointError(f"{folder / name} has {file.stat().st_size:,} bytes; expected at most {_MAX_JSON:,}")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / name} is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{folder / name} holds a {type(value).__name__}; expected an object")
    return value


def locate(name: str) -> Path | None:
    """A published model on this machine: a path, or OWNER/NAME of one in the hub's cache; None = it is not here."""
    hub = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")) / "hub"
    for path in (Path(name), hub / f"models--{name.replace('/', '--')}") if name else ():
        try:
            if path.expanduser().exists():
                return path.expanduser()
        except (OSError, ValueError, RuntimeError):  # a name that is too long for a path, or ~ of an unknown user
            continue
    return None


def snapshot(path: Path) -> Path:
    """The folder with the files: of a model in a hub's cache the snapshot that refs/main names, or the only one."""
    if not path.is_dir():
        raise CheckpointError(f"no folder {path}: expected one with {CONFIG} and {WEIGHTS}")
    if (path / CONFIG).exists() or not (path / "snapshots").is_dir():
        return path
    there = sorted(folder.name for folder in (path / "snapshots").iterdir())
    main = path / "refs" / "main"
    named = main.read_text(encoding="utf-8").strip() if main.is_file() else ""
    wanted = named if named in there else there[0] if len(there) == 1 else ""
    if not wanted:
        raise CheckpointError(f"{path} has the snapshots {', '.join(there) or 'none'}; name one: {path}/snapshots/NAME")
    return path / "snapshots" / wanted


def _inside(folder: Path, name: str) -> Path:
    """The file of this name in the folder. Raises CheckpointError for a path, or a link that leads out of the folder.

    In a hub's cache files are links into the model's own folder, which are followed.
    """
    if Path(name).name != name or "\\" in name or ":" in name:
        raise CheckpointError(f"{folder / INDEX} names the file {name!r}; expected the name of a file in this folder")
    root = folder.parent.parent if folder.parent.name == "snapshots" else folder
    file = (folder / name).resolve()
    if not file.is_relative_to(root.resolve()):
        raise CheckpointError(f"{folder / name} is a link to {file}, outside of {root}; put the file itself there")
    return file


def _weight_files(folder: Path) -> dict[str, set[str] | None]:
    """File -> the tensors that the index says are in it; None without an index."""
    if (folder / INDEX).exists():
        weight_map = read_json(folder, INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{folder / INDEX} has no 'weight_map' of tensors to file names")
        files: dict[str, set[str] | None] = {}
        for tensor, name in weight_map.items():
            own = files.setdefault(name, set())
            assert own is not None
            own.add(tensor)
        if WEIGHTS not in files and (folder / WEIGHTS).exists():
            raise CheckpointError(f"{folder} has both {WEIGHTS} and {INDEX}, which does not list it; remove one")
        for name in files:
            if not name.endswith(".safetensors"):
                raise CheckpointError(f"{folder / INDEX} names the file {name!r}; expected safetensors files")
            if not _inside(folder, name).is_file():
                raise CheckpointError(f"no {folder / name}, which {INDEX} lists; download it again")
        return files
    return listed(folder, WEIGHTS, f"{WEIGHTS} or {INDEX}")


def listed(folder: Path, name: str, expected: str = "") -> dict[str, set[str] | None]:
    """{name: None}: one file with any tensors. Raises CheckpointError, with what is there instead, if it is absent."""
    if _inside(folder, name).is_file():
        return {name: None}
    others = sorted(file.name for pattern in _OTHER_WEIGHTS for file in folder.glob(pattern))
    found = f"found {', '.join(others)}, which are not read: loading them may execute code" if others else "found none"
    raise CheckpointError(f"{folder}: expected {expected or name}, {found}; save the model as safetensors")


def _open(file: Path) -> Any:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise CheckpointError("reading safetensors needs the extra hf: pip install -e '.[hf]'") from None
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is no safetensors file, or damaged: {error}; download it again") from None
