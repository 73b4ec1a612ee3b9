"""LoRA in the files of the library `peft`, to be read: adapter_config.json and adapter_model.safetensors."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

from lm.checkpoint.hf import files
from lm.checkpoint.hf.families import Family, Tensor, refuse_conflicts
from lm.checkpoint.hf.files import Tensors
from lm.checkpoint.store import CheckpointError
from lm.config import AdapterConfig, ModelConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of the names of all tensors
FINGERPRINTS = "lm_base_fingerprints"  # in the metadata of the safetensors file: JSON, parameter -> fingerprint
OF_LORA = ("/lora_a", "/lora_b")
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
        prints = json.loads(text)
    except (ValueError, RecursionError):
        prints = None
    if not isinstance(prints, dict) or not all(type(value) is int for value in prints.values()):
        raise CheckpointError(
            f"{folder / WEIGHTS}: its metadata {FINGERPRINTS} is no JSON of parameters and fingerprints; copy the "
            "folder again"
        )
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
    if path := files.locate(name):
        return path
    raise CheckpointError(
        f"the base of {folder}, {name[:200]!r}, is not on this machine, and nothing is downloaded; {how}"
    )


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
      CheckpointError: a module that adapter_config.json names lacks a tensor, or there are none at all.
    """
    names = {name.removeprefix(PREFIX) for name in adapter.tensors.shapes if name.startswith(PREFIX)}
    cut = "" if any(name.startswith(family.prefix) for name in names) else family.prefix  # of a model without a head
    theirs = adapter.tensors.config
    wanted = set() if theirs.get("exclude_modules") else _strings(theirs.get("target_modules"))
    entries: dict[str, Tensor] = {}
    sizes: dict[str, tuple[int, ...]] = {}
    targets = []
    for entry in family.tensors(model):
        dense, _, last = entry.path.rpartition("/")
        if last != "kernel" or "{}" not in entry.name:
            continue
        module = entry.name.removesuffix(".weight").removeprefix(cut)
        # One layer more than there are tensors is enough to find what is absent.
        layers, width_in, width_out = shapes[entry.path]
        each_layer = [module.format(layer) for layer in range(min(layers, len(names) + 1))]
        if not any(f"{own}.lora_A.weight" in names for own in each_layer):
            for own in each_layer:
                if any(own == end or own.endswith(f".{end}") for end in wanted):
                    raise _missing(adapter, f"{own}.lora_A.weight", "its target_modules name the module")
            continue
        a, b = (f"{PREFIX}{module}.lora_{half}.weight" for half in "AB")
        entries[f"{dense}/lora_a"] = Tensor(f"{dense}/lora_a", a, True)
        entries[f"{dense}/lora_b"] = Tensor(f"{dense}/lora_b", b, True, entry.part, entry.parts, axis=0)
        sizes[f"{dense}/lora_a"] = (layers, width_in, adapter.cfg.rank)
        sizes[f"{dense}/lora_b"] = (layers, adapter.cfg.rank, width_out)
        targets.append(dense)
    if not targets:
        raise CheckpointError(f"{adapter.tensors.path / WEIGHTS} has no LoRA of any module of a {family.model_type}")
    _check_saved(adapter, names, [entry.name.removeprefix(cut) for entry in (*family.tensors(model), *family.optional)])
    for entry in family.optional:
        name = entry.name.removeprefix(cut)
        if name in names:
            entries[entry.path] = entry._replace(name=PREFIX + name)
            sizes[entry.path] = adapter.tensors.shapes[PREFIX + name][:: -1 if entry.transposed else 1]
    return dataclasses.replace(adapter.cfg, targets="|".join(targets)), entries, sizes


def _check_saved(adapter: Adapter, names: set[str], known: list[str]) -> None:
    """Raises CheckpointError for a module that the folder replaces, of which it lacks a tensor.

    Args:
      adapter: the folder.
      names: its tensors, without the prefix.
      known: tensors of the base and of its heads.
    """
    theirs = adapter.tensors.config
    saved = _strings(theirs.get("modules_to_save"))
    there = {module_of(name) for name in names if ".lora_" not in name}
    for name in known:
        name, module = name.format(0), module_of(name.format(0))
        # A module is one layer or consists of others: of two heads that share a name a folder has one.
        nested = (other for other in there if f"{other}.".startswith(f"{module}.") or module.startswith(f"{other}."))
        if name in names or any(other != module for other in nested):
            continue
        if module in there:
            raise _missing(adapter, name, "it has others of this module")
        if any(path.endswith(end) for path in itertools.accumulate(module.split("."), "{}.{}".format) for end in saved):
            raise _missing(adapter, name, "its modules_to_save name the module")


def module_of(name: str) -> str:
    """The module of a tensor."""
    return name.rpartition(".")[0]


def _missing(adapter: Adapter, name: str, why: str) -> CheckpointError:
    file = adapter.tensors.path / WEIGHTS
    return CheckpointError(f"{file} has no tensor '{PREFIX}{name}', but {why}; copy it and {CONFIG} again")


def _strings(value: Any) -> set[str]:
    """The names in a list; {} for a regular expression, which in a folder that is not trusted may run for ever."""
    return {each for each in value if isinstance(each, str)} if isinstance(value, list) else set()


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
    wrong = {key: pair for key, pair in both.items() if pair[0] not in (getattr(usual, key), pair[1])}
    refuse_conflicts("adapter", wrong, where)
    return dataclasses.replace(there, dropout=mine.dropout)
