"""LoRA in the files of the library `peft`, to be read: adapter_config.json and adapter_model.safetensors."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from lm.checkpoint.hf import files
from lm.checkpoint.hf.families import Family, Tensor
from lm.checkpoint.hf.files import Tensors
from lm.checkpoint.store import CheckpointError
from lm.config import AdapterConfig, ModelConfig
from lm.config.schema import ConfigError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of the names of all tensors
FINGERPRINTS = "lm_base_fingerprints"  # in the metadata of the safetensors file: JSON, parameter -> fingerprint
OF_LORA = ("/lora_a", "/lora_b")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
# Keys of adapter_config.json that change nothing that is computed here, or that the tensors say too.
_HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "task_type", "peft_version"),
    *("lora_dropout", "target_modules", "exclude_modules", "modules_to_save", "fan_in_fan_out", "layers_pattern"),
    *("megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying"),
}
# Keys of `config.adapter` that say what it computes.
_SHAPE = ("kind", "rank", "alpha", "targets")


class Adapter(NamedTuple):
    """A folder of `peft`, its tensors not yet read.

    Attributes:
      tensors: of the folder.
      cfg: rank and alpha; the targets are known with the base.
      base: the published model that it belongs to, a folder or a GGUF file.
      fingerprints: parameter of the base -> its fingerprint; {} where another program wrote the folder.
    """

    tensors: Tensors
    cfg: AdapterConfig
    base: Path
    fingerprints: dict[str, int]


def open_folder(folder: Path, base: str) -> Adapter:
    """Opens a folder of `peft`.

    Args:
      folder: has adapter_config.json.
      base: the published model that it belongs to; '' = the one that adapter_config.json names.

    Raises:
      CheckpointError: a file is missing or damaged, the adapter is of a kind that is not supported, or its base is not
        on this machine.
    """
    if not (folder / CONFIG).exists():
        raise CheckpointError(f"no {folder / CONFIG}: expected a folder of the library peft, with it and {WEIGHTS}")
    theirs = files.read_json(folder, CONFIG)
    cfg = _config(theirs, folder / CONFIG)
    if any((folder / name).exists() for name in (files.WEIGHTS, files.INDEX)):
        raise CheckpointError(f"{folder} has both {CONFIG} and the weights of a whole model; remove one of them")
    tensors = files.open_files(folder, theirs, CONFIG, files.listed(folder, WEIGHTS))
    text = tensors.metadata.get(FINGERPRINTS, "{}")
    try:
        prints = {str(path): int(value) for path, value in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(
            f"{folder / WEIGHTS}: its metadata {FINGERPRINTS} is no JSON of parameters and fingerprints; copy the "
            "folder again"
        ) from None
    return Adapter(tensors, cfg, _base(folder, theirs, base), prints)


def _config(theirs: dict[str, Any], path: Path) -> AdapterConfig:
    """Rank and alpha. Raises CheckpointError for what is not supported."""
    supported = {"peft_type": ("LORA",), "bias": ("none", None), "use_rslora": (True, False, None)}
    supported["init_lora_weights"] = (True, False, "gaussian", None)  # others may change the base
    for key, values in supported.items():
        if not any(theirs.get(key) is value or theirs.get(key) == value for value in values):
            raise CheckpointError(f"{path}: {key} is {theirs.get(key)!r}; supported is {values[0]!r}")
    for key, value in theirs.items():
        if value and key not in {*supported, *_HARMLESS, "r", "lora_alpha"}:
            what = (
                "this makes ranks differ by module, and there is one for all" if "pattern" in key else "not supported"
            )
            raise CheckpointError(f"{path}: {key} is {value!r}, {what}")
    rank, alpha = theirs.get("r"), theirs.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= 1 << 20:
        raise CheckpointError(f"{path}: r is {rank!r}; expected a whole number from 1")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < 1e30:
        raise CheckpointError(f"{path}: lora_alpha is {alpha!r}; expected a number above 0")
    # rank-stabilised LoRA (Kalajdzievski 2023) divides by sqrt(r)
    scaled = alpha * rank**0.5 if theirs.get("use_rslora") else alpha
    return AdapterConfig(kind="lora", rank=rank, alpha=float(scaled))


def _base(folder: Path, theirs: dict[str, Any], given: str) -> Path:
    """Where the base is: as given, or as adapter_config.json says, a path or the name of a model in the hub's cache."""
    name = given or theirs.get("base_model_name_or_path")
    how = f"name it as {folder},BASE"
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"{folder / CONFIG} names no base_model_name_or_path; {how}")
    cache = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")) / "hub" / f"models--{name.replace('/', '--')}"
    for path in (Path(name), cache):
        if path.expanduser().exists():
            return path.expanduser()
    raise CheckpointError(f"the base of {folder}, {name!r}, is not on this machine, and nothing is downloaded; {how}")


def table(
    adapter: Adapter, family: Family, model: ModelConfig, shapes: dict[str, tuple[int, ...]]
) -> tuple[AdapterConfig, dict[str, Tensor], dict[str, tuple[int, ...]]]:
    """The adapter with its targets; parameter -> its entry, and its shape, for LoRA and the heads that the folder has.

    Args:
      adapter: the folder.
      family: of the base.
      model: the base.
      shapes: parameter -> shape, of the base.

    Raises:
      CheckpointError: a module that adapter_config.json names has no tensors, or there are none at all.
    """
    names = {name.removeprefix(PREFIX) for name in adapter.tensors.shapes}
    cut = "" if any(name.startswith(family.prefix) for name in names) else family.prefix  # of a model without a head
    theirs = adapter.tensors.config
    wanted = [] if theirs.get("exclude_modules") else _list(theirs.get("target_modules"))
    entries: dict[str, Tensor] = {}
    sizes: dict[str, tuple[int, ...]] = {}
    targets = []
    for entry in family.tensors(model):
        dense, _, last = entry.path.rpartition("/")
        if last != "kernel" or "{}" not in entry.name:
            continue
        module = entry.name.removesuffix(".weight").removeprefix(cut)
        if not any(f"{module.format(layer)}.lora_A.weight" in names for layer in range(model.num_layers)):
            if any(f".{module.format(0)}".endswith(f".{each}") for each in wanted):
                raise CheckpointError(
                    f"{adapter.tensors.path / WEIGHTS} has no tensor '{PREFIX}{module.format(0)}.lora_A.weight', a "
                    f"module that {CONFIG} adapts; copy both again"
                )
            continue
        layers, width_in, width_out = shapes[entry.path]
        a, b = (f"{PREFIX}{module}.lora_{half}.weight" for half in "AB")
        entries[f"{dense}/lora_a"] = Tensor(f"{dense}/lora_a", a, True)
        entries[f"{dense}/lora_b"] = Tensor(f"{dense}/lora_b", b, True, entry.part, entry.parts, axis=0)
        sizes[f"{dense}/lora_a"] = (layers, width_in, adapter.cfg.rank)
        sizes[f"{dense}/lora_b"] = (layers, adapter.cfg.rank, width_out)
        targets.append(dense)
    if not targets:
        raise CheckpointError(f"{adapter.tensors.path / WEIGHTS} has no LoRA of any module of a {family.model_type}")
    for entry in family.optional:
        name = entry.name.removeprefix(cut)
        if name in names:
            entries[entry.path] = entry._replace(name=PREFIX + name)
            sizes[entry.path] = adapter.tensors.shapes[PREFIX + name][:: -1 if entry.transposed else 1]
    return dataclasses.replace(adapter.cfg, targets="|".join(targets)), entries, sizes


def _list(value: Any) -> list[Any]:
    """The value if it is a list. A regular expression of a folder that is not trusted may run for ever."""
    return value if isinstance(value, list) else []


def adopt(mine: AdapterConfig, there: AdapterConfig, where: Any) -> AdapterConfig:
    """`there`, with the dropout of `mine`.

    Args:
      mine: of a config that starts from `where`. A key with its default takes the value from there.
      there: the adapter there.
      where: its place, for messages.

    Raises:
      ConfigError: a key is set to something else.
    """
    usual = AdapterConfig()
    both = {key: (getattr(mine, key), getattr(there, key)) for key in _SHAPE}
    wrong = [
        f"  adapter.{key}: {here!r} here, {its!r} there"
        for key, (here, its) in both.items()
        if here not in (getattr(usual, key), its)
    ]
    if wrong:
        lines = "\n".join(wrong)
        raise ConfigError(f"'init_from': the adapter of {where} is another one:\n{lines}\nremove these keys")
    return dataclasses.replace(there, dropout=mine.dropout)
