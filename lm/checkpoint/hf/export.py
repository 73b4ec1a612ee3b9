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
from lm.config.schema import ConfigError
from lm.types import Head, Params

# Parameters with a row, or a column, for each id.
OF_VOCABULARY = ("embed/embedding", "lm_head/kernel", "lm_transform/output_bias")
# model_type -> kind of vocabulary that its tokenizer's class in `transformers` reads; of the others BPE.
_VOCABULARIES = {"bert": "WordPiece", "t5": "Unigram"}
SHARD_BYTES = 5 << 30  # of one file, as `transformers` has it


def export(
    folder: Path,
    model: ModelConfig,
    params: Params,
    *,
    vocab_size: int,
    dtype: Any = np.float32,
    head: Head | None = None,
    about: Mapping[str, Any] = {},
    others: Mapping[str, bytes] = {},
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes config.json and model.safetensors, or several files and their index.

    Args:
      folder: new. config.json is written last: a folder with it is whole.
      model: resolved.
      params: the parameters.
      vocab_size: rows of vocabulary to write; those after them, which only round the size up, are left out.
      dtype: of the tensors.
      head: the head of the model's task; None = the model predicts tokens.
      about: further keys of config.json, such as `bos_token_id`.
      others: name -> contents of further files, such as the tokenizer's.
      shard_bytes: size of a file at most, unless one tensor is larger.

    Raises:
      ConfigError: the model is of no family's shape, its family has no place for the head, or `about` contradicts the
        config.json that the model needs.
      CheckpointError: the parameters are not those of this model.
    """
    from safetensors.numpy import save_file

    family = families.of_model(model)
    flat = param_paths.flatten(params)
    table = {entry.path: entry for entry in family.tensors(model)}
    architecture, more = families.with_head(family, head, model)
    if head is not None:
        table = {path: entry for path, entry in table.items() if head.keeps_unembed or not path.startswith("lm_")}
    table |= {entry.path: entry for entry in more}
    if left := sorted(flat.keys() - table.keys()):
        raise CheckpointError(
            f"parameter '{left[0]}' ({len(left)} such) is none of a {family.model_type}: a run with this head, or with "
            "bottleneck adapters, cannot be exported"
        )
    if missing := sorted(table.keys() - flat.keys()):
        raise CheckpointError(f"no parameter '{missing[0]}', which a {family.model_type} has")
    theirs = families.config_of(family, model) | {"dtype": np.dtype(dtype).name}
    if "vocab_size" in family.keys:
        theirs["vocab_size"] = vocab_size
    theirs["architectures"] = [architecture]
    for key, value in about.items():
        if theirs.get(key, value) not in (value, None):
            raise ConfigError(
                f"{key} of this run is {value!r}, by its tokenizer or task; a {family.model_type} that computes the "
                f"same has {theirs[key]!r}: train it with a tokenizer that fits"
            )
    # Name -> the parameters whose parts the tensor is made of, and the layer where a parameter stacks layers.
    entries: dict[str, list[tuple[Tensor, int | None]]] = {}
    for path, entry in table.items():
        for layer in range(flat[path].shape[0]) if "{}" in entry.name else [None]:
            entries.setdefault(entry.name.format(layer), []).append((entry, layer))

    def tensor(name: str) -> np.ndarray:
        parts = [_part(flat[entry.path], entry, layer, vocab_size) for entry, layer in entries[name]]
        return np.ascontiguousarray(np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]).astype(dtype)

    folder.mkdir(parents=True, exist_ok=True)
    sizes = {
        name: sum(_size(flat[entry.path], layer) for entry, layer in parts) * np.dtype(dtype).itemsize
        for name, parts in entries.items()
    }
    shards = list(_shards(sizes, shard_bytes))
    names = [files.WEIGHTS] if len(shards) == 1 else _shard_names(len(shards))
    for file, shard in zip(names, shards, strict=True):
        save_file({name: tensor(name) for name in shard}, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / files.INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for name, content in others.items():
        (folder / name).write_bytes(content)
    (folder / files.CONFIG).write_text(json.dumps(theirs | dict(about), indent=2) + "\n", encoding="utf-8")


def tokenizer_files(tokenizer: Any, model_type: str) -> dict[str, bytes]:
    """Name -> contents of the files of a run's tokenizer; tokenizer_config.json has the class added where it matters.

    If it names none, `transformers` takes the one of config.json's `model_type`, which builds other ids from a
    tokenizer.json of another kind: of an XLM-RoBERTa, say, that is exported as a RoBERTa. For those the class is named
    that reads tokenizer.json as it is, and the special tokens that a class of its own would know.

    Args:
      tokenizer: of the run, a `lm.data.tokenizer.Tokenizer`.
      model_type: in the config.json of the export.
    """
    out = {Path(name).name: content for name, content in tokenizer.saved_files.items()}
    own = json.loads(out.get("tokenizer_config.json", b"{}"))
    if "tokenizer.json" not in out or own.get("tokenizer_class"):
        return out
    own_model = json.loads(out["tokenizer.json"])["model"]
    kind = own_model.get("type") or ("BPE" if "merges" in own_model else "")  # older files of BPE do not name it
    if kind == _VOCABULARIES.get(model_type, "BPE"):
        return out
    specials = tokenizer.special_tokens()
    if model_type in ("bert", "roberta"):  # what stands at the start and the end of their rows
        ends = {"cls_token": tokenizer.bos_id, "sep_token": tokenizer.eos_id}
        specials = {role: tokenizer.piece(i) for role, i in ends.items()} | specials
    said = json.loads(out.get("special_tokens_map.json", b"{}"))
    own = {key: value for key, value in specials.items() if key not in said} | own
    own["tokenizer_class"] = "PreTrainedTokenizerFast"
    return out | {"tokenizer_config.json": f"{json.dumps(own, indent=2, ensure_ascii=False)}\n".encode()}


def _part(leaf: jax.Array, entry: Tensor, layer: int | None, rows: int) -> np.ndarray:
    """The values that a parameter, or a layer of it, gives to a tensor; of the vocabulary's tables the first `rows`."""
    value = np.asarray(jax.device_get(leaf if layer is None else leaf[layer]))
    value = entry.to_file(value)
    return value[:rows] if entry.path in OF_VOCABULARY else value


def _size(leaf: jax.Array, layer: int | None) -> int:
    return leaf.size if layer is None else leaf.size // leaf.shape[0]


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
