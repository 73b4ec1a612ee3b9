"""Writes LoRA alone, in the files of the library `peft`: adapter_config.json and adapter_model.safetensors."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lm import param_paths
from lm.checkpoint import store
from lm.checkpoint.hf import files, published
from lm.checkpoint.hf.adapter import CONFIG, FINGERPRINTS, OF_LORA, PREFIX, WEIGHTS, module_of
from lm.checkpoint.hf.families import Family, Tensor, differences, with_head
from lm.checkpoint.hf.published import Published
from lm.checkpoint.store import CheckpointError
from lm.config import AdapterConfig, ModelConfig
from lm.config.schema import ConfigError
from lm.types import Head, Params


class Lora(NamedTuple):
    """LoRA of one module, of all layers.

    Attributes:
      a_LxRxI: float32.
      b_LxOxR: float32.
    """

    a_LxRxI: np.ndarray
    b_LxOxR: np.ndarray

    @property
    def rank(self) -> int:
        """Of the module."""
        return self.a_LxRxI.shape[1]

    def padded(self, rank: int) -> "Lora":
        """The same product, with rows of A and columns of B that are 0: peft's `rank_pattern` is not read by all."""
        more = (0, rank - self.rank)
        return Lora(np.pad(self.a_LxRxI, ((0, 0), more, (0, 0))), np.pad(self.b_LxOxR, ((0, 0), (0, 0), more)))


def export(
    folder: Path,
    model: ModelConfig,
    params: Params,
    cfg: AdapterConfig,
    base: Published,
    *,
    dtype: Any = np.float32,
    head: Head | None = None,
    others: Mapping[str, bytes] = {},
) -> None:
    """Writes what a run with LoRA has beside the published model that it started from.

    Args:
      folder: new. adapter_config.json is written last: a folder with it is whole.
      model: of the run, resolved.
      params: of the run, LoRA not merged.
      cfg: the adapter.
      base: the published model.
      dtype: of the tensors.
      head: the head of the run's task, which is written whole ('modules_to_save').
      others: name -> contents of further files.

    Raises:
      ConfigError: the adapter is not LoRA, the base is another model, or has no place for the head.
      CheckpointError: the run has changed parameters of the base, so that its adapter alone is not the model.
    """
    from safetensors.numpy import save_file

    if cfg.kind != "lora":
        raise ConfigError(f"'adapter.kind' is {cfg.kind}: only lora can be written as an adapter")
    if other := differences(model, base.model):
        lines = ", ".join(f"model.{key} is {mine!r}, there {theirs!r}" for key, (mine, theirs) in other.items())
        raise ConfigError(f"{base.path} is not the base of this run ({lines}); name it with --base, or export all")
    family, flat = base.family, param_paths.flatten(params)
    _, of_head = with_head(family, head, model)
    prints = _fingerprints_of_base(flat, base)
    name = _names(family, has_prefix=head is None or head.kind != "projection")
    table = {entry.path: entry for entry in family.tensors(model)}
    loras = {name(module): lora for module, lora in _modules(flat, table).items()}
    rank = max(lora.rank for lora in loras.values())
    tensors: dict[str, np.ndarray] = {}
    for module, lora in loras.items():
        for layer, (a_RxI, b_OxR) in enumerate(zip(*lora.padded(rank), strict=True)):
            tensors |= {f"{module.format(layer)}.lora_A.weight": a_RxI, f"{module.format(layer)}.lora_B.weight": b_OxR}
    for entry in of_head:
        value = np.asarray(jax.device_get(flat[entry.path]))
        tensors[name(entry.name)] = value.T if entry.transposed else value
    of_base = [entry.name for entry in table.values()]
    known = {*map(name, map(module_of, [entry.name for entry in (*table.values(), *family.optional)])), *loras}
    config = {
        "base_model_name_or_path": base_name(base.base_path),
        "peft_type": "LORA",
        "task_type": _task_type(model, head),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _plain(cfg.alpha * rank / cfg.rank),
        "lora_dropout": cfg.dropout,
        "target_modules": _targets(loras, known),
        "modules_to_save": sorted({_saved_module(name(entry.name), map(name, of_base)) for entry in of_head}) or None,
        "fan_in_fan_out": not any(table[path].transposed for path in _kernels(flat)),  # GPT-2's Conv1D
        "bias": "none",
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {PREFIX + name: np.ascontiguousarray(tensor).astype(dtype) for name, tensor in tensors.items()},
        folder / WEIGHTS,
        metadata={"format": "pt", FINGERPRINTS: json.dumps(prints)},
    )
    for file, content in others.items():
        (folder / file).write_bytes(content)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def base_of(start: str, has_lora: bool) -> str:
    """What the published model is called that a run started from, without LoRA: as `base_name`; '' = it is not known.

    Args:
      start: as `lm.checkpoint.hf.open_model`; the folders may be gone.
      has_lora: whether the run took its LoRA from there.
    """
    folder, base = published.parts(start)
    place = files.locate(folder)
    if not base and place and (place / CONFIG).is_file():
        base = _named_base(place)
    elif not base and not has_lora:
        base = folder
    if place := files.locate(base):
        return base_name(place)
    return base if files.HUB_NAME.fullmatch(base) else ""


def _named_base(folder: Path) -> str:
    """The base that a folder of `peft` names; '' = none."""
    try:
        named = files.read_json(folder, CONFIG).get("base_model_name_or_path")
    except CheckpointError:
        return ""
    return named if isinstance(named, str) else ""


def base_name(path: Path) -> str:
    """What a base is called: OWNER/NAME of a model in a hub's cache, else its path."""
    found = next((part for part in path.absolute().parts if part.startswith("models--")), "")
    return "/".join(found.split("--")[1:]) or str(path.absolute())


def _fingerprints_of_base(flat: Mapping[str, Any], base: Published) -> dict[str, int]:
    """Path -> fingerprint, of the parameters that are neither LoRA's nor the head's.

    Raises:
      CheckpointError: one of them is not what it is in the base.
    """
    shared = {path: leaf for path, leaf in flat.items() if not path.startswith("head/") and not path.endswith(OF_LORA)}
    prints = {path: int(value) for path, value in store.fingerprints(param_paths.unflatten(shared)).items()}
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wrong = []
    for path, leaf in shared.items():
        if path in base.table:
            like = jax.ShapeDtypeStruct(leaf.shape, np.float32, sharding=here)
            there = published.load(base, {"params": param_paths.unflatten({path: like})})["params"]
            if int(store.fingerprints(there)[path]) == prints[path]:
                continue
        wrong.append(path)
    if wrong:
        raise CheckpointError(
            f"'{wrong[0]}' is not what it is in {base.base_path} ({len(wrong)} of {len(shared)} parameters outside of "
            "LoRA and the head): the run trained it, or started from another base; name that with --base, or export "
            "the whole model, without --adapter"
        )
    return prints


def _kernels(flat: Mapping[str, Any]) -> list[str]:
    """The kernels that LoRA adapts."""
    return [path.removesuffix("lora_a") + "kernel" for path in flat if path.endswith("/lora_a")]


def _names(family: Family, *, has_prefix: bool) -> Any:
    """name -> name in a model with the family's prefix, or in one without a head, which lacks it."""
    return (lambda name: name) if has_prefix else (lambda name: name.removeprefix(family.prefix))


def _modules(flat: Mapping[str, Any], table: Mapping[str, Tensor]) -> dict[str, Lora]:
    """Module, with '{}' for the layer's number -> its LoRA."""
    parts: dict[str, list[tuple[Tensor, Any, Any]]] = {}
    for path in _kernels(flat):
        dense = path.removesuffix("/kernel")
        a, b = (np.asarray(jax.device_get(flat[dense + name]), np.float32) for name in OF_LORA)
        parts.setdefault(module_of(table[path].name), []).append((table[path], a, b))
    return {module: _joined(own) for module, own in parts.items()}


def _joined(parts: list[tuple[Tensor, np.ndarray, np.ndarray]]) -> Lora:
    """LoRA of a module of which each kernel is a part, such as GPT-2's query, key and value.

    Each part has rows of B of its own; matrices A that are equal are written once. Example, parts 0 and 2 of 3 with
    ranks r: A = [A0; A2] [2 r, in], B = [[B0, 0], [0, 0], [0, B2]] [3 out, 2 r].
    """
    same = [next(i for i, (_, a, _) in enumerate(parts) if np.array_equal(a, own)) for _, own, _ in parts]
    kept = sorted(set(same))
    layers, rank, width = parts[0][2].shape
    b_LxOxR = np.zeros((layers, parts[0][0].parts * width, rank * len(kept)), np.float32)
    for first, (entry, _, b_LxRxO) in zip(same, parts, strict=True):
        column = rank * kept.index(first)
        rows = slice(entry.part * width, (entry.part + 1) * width)
        b_LxOxR[:, rows, column : column + rank] = b_LxRxO.swapaxes(1, 2)
    return Lora(np.concatenate([parts[i][1].swapaxes(1, 2) for i in kept], axis=1), b_LxOxR)


def _targets(loras: Mapping[str, Lora], known: set[str]) -> list[str]:
    """`target_modules` that match these modules and none of the other known ones.

    `peft` adapts the modules whose name ends with one of them: the shortest end of a name that is unambiguous within a
    layer, else the whole names in all layers.
    """
    others = known - loras.keys()
    out = []
    for module, lora in loras.items():
        parts = module.rpartition("{}.")[2].split(".")
        ends = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        good = [end for end in ends if not any(f".{other}".endswith(f".{end}") for other in others)]
        out += good[:1] or [module.format(layer) for layer in range(len(lora.a_LxRxI))]
    return sorted(set(out))


def _saved_module(tensor: str, of_base: Iterable[str]) -> str:
    """The module that `modules_to_save` names for a tensor of a head: the outermost, if nothing of the base is in it,
    which is the one that `peft` itself names for classification; else the tensor's own."""
    outermost = tensor.partition(".")[0]
    return module_of(tensor) if any(name.startswith(f"{outermost}.") for name in of_base) else outermost


def _task_type(model: ModelConfig, head: Head | None) -> str | None:
    """`peft`'s name of a task; None where it has none."""
    if head is None or head.keeps_unembed:
        return {"encoder": None, "encoder_decoder": "SEQ_2_SEQ_LM"}.get(model.kind, "CAUSAL_LM")
    return {"pooled": "SEQ_CLS", "token": "TOKEN_CLS", "projection": "FEATURE_EXTRACTION"}[head.kind]


def _plain(number: float) -> float:
    """An int where it is whole: `peft` declares lora_alpha as one."""
    return int(number) if number == int(number) else number
