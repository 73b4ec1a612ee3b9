"""Writes parameters as the files of a published family, by the same table that reads them."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lm import param_paths
from lm.checkpoint.hf import families, files
from lm.checkpoint.hf.families import Tensor
from lm.checkpoint.store import CheckpointError
from lm.config import ModelConfig
from lm.types import Params

SHARD_BYTES = 5 << 30  # of one file, as `transformers` has it


def export(
    folder: Path,
    model: ModelConfig,
    params: Params,
    *,
    vocab_size: int,
    dtype: Any = np.float32,
    about: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes config.json and model.safetensors, or several files and their index.

    Args:
      folder: new or empty.
      model: resolved.
      params: the parameters.
      vocab_size: rows of vocabulary to write; those after them, which only round the size up, are left out.
      dtype: of the tensors.
      about: further keys of config.json, such as `bos_token_id`.
      shard_bytes: size of a file at most, unless one tensor is larger.

    Raises:
      ConfigError: the model is of no family's shape.
      CheckpointError: the folder has files; the parameters are not those of this model.
    """
    from safetensors.numpy import save_file

    family = families.of_model(model)
    if folder.exists() and any(folder.iterdir()):
        raise CheckpointError(f"{folder} is not empty; name a new folder")
    flat = param_paths.flatten(params)
    entries: dict[str, list[Tensor]] = {}  # name -> the parameters whose parts the tensor is made of
    for entry in family.tensors(model):
        if entry.path not in flat:
            raise CheckpointError(f"no parameter '{entry.path}', which a {family.model_type} has")
        layers = range(flat[entry.path].shape[0]) if "{}" in entry.name else [0]
        for layer in layers:
            entries.setdefault(entry.name.format(layer), []).append(entry._replace(name=str(layer)))
    if left := sorted(flat.keys() - {entry.path for parts in entries.values() for entry in parts}):
        raise CheckpointError(
            f"parameter '{left[0]}' ({len(left)} such) is none of a {family.model_type}; merge adapters first"
        )

    def tensor(name: str) -> np.ndarray:
        parts = [_part(flat[entry.path], entry, model.vocab_size, vocab_size) for entry in entries[name]]
        return np.ascontiguousarray(np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]).astype(dtype)

    folder.mkdir(parents=True, exist_ok=True)
    config = families.config_of(family, model) | {"vocab_size": vocab_size, "dtype": np.dtype(dtype).name}
    (folder / files.CONFIG).write_text(json.dumps(config | dict(about or {}), indent=2) + "\n", encoding="utf-8")
    sizes = {name: _size(flat, parts) * np.dtype(dtype).itemsize for name, parts in entries.items()}
    shards = list(_shards(sizes, shard_bytes))
    names = [files.WEIGHTS] if len(shards) == 1 else _shard_names(len(shards))
    for file, shard in zip(names, shards, strict=True):
        save_file({name: tensor(name) for name in shard}, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / files.INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _part(leaf: jax.Array, entry: Tensor, rows: int, kept: int) -> np.ndarray:
    """The values that a parameter gives to a tensor; `entry.name` is the number of the layer."""
    value = np.asarray(jax.device_get(leaf[int(entry.name)] if "layers" in entry.path.split("/") else leaf))
    value = value.T if entry.transposed else value
    is_vocabulary = entry.path in ("embed/embedding", "lm_head/kernel") and value.shape[0] == rows
    return value[:kept] if is_vocabulary else value


def _size(flat: Mapping[str, Any], parts: list[Tensor]) -> int:
    return sum(flat[e.path].size // (flat[e.path].shape[0] if "layers" in e.path.split("/") else 1) for e in parts)


def _shards(sizes: Mapping[str, int], most: int) -> Iterator[list[str]]:
    """Tensors of each file, in order."""
    shard: list[str] = []
    used = 0
    for name, size in sizes.items():
        if shard and used + size > most:
            yield shard
            shard, used = [], 0
        shard.append(name)
        used += size
    yield shard


def _shard_names(count: int) -> list[str]:
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
