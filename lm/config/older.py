"""Upgrades configs that older versions wrote to the keys of today."""

from collections.abc import Mapping
from typing import Any

# Before version 1, 'data.task' and 'objective' together stood for today's 'task.name'.
_TASKS = {
    "text": "causal_lm",
    "prefix_text": "prefix_lm",
    "masked_text": "masked_lm",
    "masked_pairs": "masked_lm_pairs",
    "lone_sentences": "contrastive_sentences",
    "sentence_pairs": "contrastive_pairs",
    "sentence_triples": "contrastive_triples",
    "image_pairs": "contrastive_images",
    "sentences": "classification",
    "images": "image_classification",
    "scored_sentences": "regression",
    "mixed_sentences": "multitask",
    "prompted": "prompting",
    "masked_images": "masked_autoencoding",
    "items": "next_item",
    "masked_items": "masked_item",
}
# (section, key) of an option that has moved to its task -> its key there.
_OPTIONS = {
    ("data", "labels"): "labels",
    ("data", "image_shape"): "image_shape",
    ("data", "templates"): "templates",
    ("data", "shots"): "shots",
    ("corrupt", "rate"): "mask_rate",
    ("corrupt", "mean_span"): "mean_span_length",
    ("corrupt", "whole_words"): "whole_words",
    ("corrupt", "pairs"): "pairs",
    ("loss", "temperature"): "temperature",
    ("loss", "r_drop"): "r_drop",
    ("model", "projection_dim"): "projection_dim",
    ("eval", "entity_scheme"): "entity_scheme",
    ("eval", "null_threshold"): "null_threshold",
    ("eval", "bleu_tokenizer"): "bleu_tokenizer",
}
# (section, key) of a pair of values -> the key of each of them now, below the section.
_PAIRS = {
    ("model", "experts"): (("num_experts",), ("experts_per_token",)),
    ("model", "mup_base"): (("mup", "base_width"), ("mup", "base_head_dim")),
    ("train", "patience"): (("early_stopping", "patience"), ("early_stopping", "min_delta")),
    ("monitor", "profile"): (("profile", "first_step"), ("profile", "num_steps")),
}
_RENAMED = {("model", "embed_noise"): "neftune_alpha", ("optim", "to_init"): "l2_sp"}
# Keys newer than some runs, whose default differs from what those runs did -> the value that they used.
_BEFORE: dict[tuple[str, str], Any] = {("model", "init"): "fan_in"}


def successor(key: str) -> str:
    """The key of today in the place of one of older versions. Example: 'data.labels' -> 'task.labels'; '' = none."""
    section, _, name = key.partition(".")
    if key in ("objective", "data.task"):
        return "task.name"
    if option := _OPTIONS.get((section, name)):
        return f"task.{option}"
    if places := _PAIRS.get((section, name)):
        return " and ".join(f"{section}.{'.'.join(path)}" for path in places)
    renamed = _RENAMED.get((section, name))
    return f"{section}.{renamed}" if renamed else ""


def task_name(name: str) -> str:
    """The name of today of a task of older versions. Example: 'sentences' -> 'classification'; '' = none."""
    return _TASKS.get(name, "")


def is_older(source: Mapping[str, Any]) -> bool:
    """Whether a saved config is of a version that kept the options of tasks in the shared sections."""
    return "task" not in source


def _size_decoder(saved: dict[str, Any]) -> None:
    """Sets the sizes of a decoder in the `model` of a run, which earlier versions left open as 0 or did not have.

    A config that was only planned, such as that of a trial, leaves other sizes open too, and stays as it is.
    """
    is_resolved = all(map(saved.get, ("num_kv_heads", "head_dim", "mlp_dim", "vocab_size", "max_len")))
    if saved.get("kind") in ("encoder_decoder", "mae") and is_resolved:
        saved["decoder_layers"] = saved.get("decoder_layers") or saved["num_layers"]
    if saved.get("kind") == "mae" and is_resolved:
        width = saved["decoder_dim"] = saved.get("decoder_dim") or saved["embed_dim"]
        saved["decoder_heads"] = saved.get("decoder_heads") or saved["num_heads"]
        saved["decoder_mlp_dim"] = saved.get("decoder_mlp_dim") or saved["mlp_dim"] * width // saved["embed_dim"]


def _drop_unread(saved: dict[str, Any]) -> None:
    """Drops keys of a saved section `model` that the model never read; they are refused today."""
    is_rope = saved.get("position", "learned") == "rope"
    scaling = saved.get("rope_scaling", {})
    if not is_rope or (isinstance(scaling, Mapping) and scaling.get("kind") == "none"):
        saved.pop("rope_scaling", None)
    if not is_rope:
        saved.pop("rope_local_theta", None)
    if saved.get("use_bias", True):
        saved.pop("qkv_bias", None)
    if saved.get("kind") in ("vit", "mae"):
        saved.pop("sliding_window", None)
        saved.pop("scale_embeddings", None)


def upgrade(source: Mapping[str, Any], known: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """A saved config with every key renamed or moved to where it is today.

    Args:
      source: the config that a run of this or an older version wrote.
      known: name of a task -> the keys of its options.
    """
    out = {key: dict(value) if isinstance(value, Mapping) else value for key, value in source.items()}
    for (section, key), value in _BEFORE.items():
        out.setdefault(section, {}).setdefault(key, value)
    _drop_unread(out["model"])
    _size_decoder(out["model"])
    if not is_older(source):
        return out
    for (section, key), places in _PAIRS.items():
        if isinstance(pair := out.get(section, {}).get(key), list | tuple):
            del out[section][key]
            for path, value in zip(places, pair, strict=True):
                inner = out[section]
                for name in path[:-1]:
                    inner = inner.setdefault(name, {})
                inner[path[-1]] = value
    for (section, key), name in _RENAMED.items():
        if key in out.get(section, {}):
            out[section][name] = out[section].pop(key)
    out.pop("objective", None)
    old = out.get("data", {}).pop("task", "text")
    name = _TASKS.get(old, old)
    task: dict[str, Any] = {"name": name}
    for (section, key), option in _OPTIONS.items():
        if key in out.get(section, {}):
            value = out[section].pop(key)
            if option in known.get(name, ()):
                task[option] = value
    if name not in ("chat", "translation") and "overlong" in out.get("data", {}):
        out["data"]["overlong"] = "truncate"  # what the other tasks did, whatever it said
    out.pop("corrupt", None)
    return out | {"task": task}


def upgrade_data(data: Mapping[str, Any]) -> dict[str, Any]:
    """A saved `data` section without the keys that have moved to `task`: what is left says where records are."""
    moved = {"task", *(key for section, key in _OPTIONS if section == "data")}
    return {key: value for key, value in data.items() if key not in moved}


def upgrade_prepared(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a folder prepared by this or an older version, with every key where it is today."""
    data = dict(settings["data"])
    name = data.pop("task", None)
    task = {"task": {"name": _TASKS.get(name, name)}} if name else {}
    return {**settings, "data": data, **task}
