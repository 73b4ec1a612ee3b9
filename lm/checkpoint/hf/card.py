"""The model card of an export: README.md, of what the run itself knows."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm.checkpoint.hf.files import HUB_NAME
from lm.checkpoint.hf.published import PREFIX, parts
from lm.config import Config, EvalConfig, EvalSetConfig, diff, schema
from lm.types import Head

# Keys of config.data that name what was read.
_DATA = ("data.format", "data.path", "data.mixture", "data.eval_path")
# Figure of summary.json -> how it is called.
_FIGURES = {
    "steps": "steps",
    "tokens": "positions read",
    "seconds": "seconds",
    "devices": "devices",
    "device_kind": "kind of device",
    "trained_parameters": "trained parameters",
}


def card(
    name: str,
    cfg: Config,
    *,
    model_type: str,
    head: Head | None,
    parameters: int,
    base: str,
    is_adapter: bool,
    step: int,
    metrics: Mapping[str, float],
    summary: Mapping[str, Any],
) -> str:
    """A model card in Markdown, with the front matter that hubs read. What is not known is left out.

    Args:
      name: of the model.
      cfg: config of the run, resolved.
      model_type: the family.
      head: of the run's task.
      parameters: of the model.
      base: the published model that the run started from, OWNER/NAME or a path; '' = none is known.
      is_adapter: whether the folder has LoRA without the base.
      step: of the checkpoint.
      metrics: of the evaluation at that step.
      summary: summary.json of the run; {} = it has none.
    """
    front = {"library_name": "peft" if is_adapter else "transformers"}
    if pipeline := _pipeline(cfg, head):
        front["pipeline_tag"] = pipeline
    if HUB_NAME.fullmatch(base):
        front |= {"base_model": base, "base_model_relation": "adapter" if is_adapter else "finetune"}
    what = f"LoRA of rank {cfg.adapter.rank} for a `{model_type}`" if is_adapter else f"A `{model_type}`"
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", "", f"# {name}", ""]
    done = f"trained for {step:,} steps of the task `{cfg.task.name}`" if step else "not trained any further"
    lines.append(f"{what} of {parameters:,} parameters, {done}.")
    if base:
        lines += ["", f"Base model: `{_last_name(base)}`."]
    paths = {*schema.path_keys(cfg)}
    read = {key: value for key in _DATA if (value := getattr(cfg.data, key.removeprefix("data.")))}
    read |= {f"eval.sets.{name}.path": one.path for name, one in cfg.eval.sets}
    if step:
        shown = {key: _public(value) if key in paths else value for key, value in read.items()}
        lines += ["", "## Data", "", *(f"- `{key}`: `{value!r}`" for key, value in shown.items())]
    lines += ["", "## Config", "", "Keys that differ from their defaults:", "", "```"]
    shown = {key: _public(value) if key in paths else value for key, (_, value) in diff(_usual(cfg), cfg).items()}
    lines += [f"{key} = {value!r}" for key, value in shown.items()]
    lines.append("```")
    if metrics:
        before = summary.get("before") or {}
        lines += ["", "## Metrics", "", f"On held-out data, at step {step:,}:", ""]
        lines += ["| metric | before training | here |" if before else "| metric | here |"]
        lines += ["|---|---|---|" if before else "|---|---|"]
        for key, value in sorted(metrics.items()):
            cells = [key, *([_figure(before.get(key))] if before else []), _figure(value)]
            lines.append(f"| {' | '.join(cells)} |")
    if figures := [f"- {_FIGURES[key]}: {_figure(summary[key])}" for key in _FIGURES if summary.get(key) is not None]:
        lines += ["", "## Training", "", "Of the whole run:", "", *figures]
    if versions := summary.get("versions"):
        lines += ["", "## Versions", "", *(f"- {package} {version}" for package, version in versions.items())]
    return "\n".join(lines) + "\n"


def _pipeline(cfg: Config, head: Head | None) -> str:
    """A hub's name of what the model is for; '' = it has none."""
    if head is None:
        kinds = {"encoder": "fill-mask", "encoder_decoder": "text2text-generation", "mae": "image-feature-extraction"}
        return kinds.get(cfg.model.kind, "text-generation")
    if head.keeps_unembed:
        return ""
    if cfg.model.kind == "vit":
        return "image-classification" if head.kind == "pooled" else "image-feature-extraction"
    heads = {"pooled": "text-classification", "token": "token-classification", "projection": "sentence-similarity"}
    return heads[head.kind]


def _usual(cfg: Config) -> Config:
    """The defaults of the keys that a config has, by its task and its evaluation sets."""
    tasks = {name: dataclasses.replace(type(one.task)(), name="") for name, one in cfg.eval.sets}
    sets = tuple((name, EvalSetConfig(task=task)) for name, task in tasks.items())
    return dataclasses.replace(Config(), task=type(cfg.task)(), eval=EvalConfig(sets=sets))


def _public(value: Any) -> Any:
    """A path, or a tuple that has some, with the last name instead of each absolute path, which says more of a machine
    than of a model."""
    if isinstance(value, tuple):
        return tuple(map(_public, value))
    if not isinstance(value, str):
        return value
    if value.startswith(PREFIX):
        return PREFIX + ",".join(_last_name(part) for part in parts(value.removeprefix(PREFIX)) if part)
    return _last_name(value)


def _last_name(path: str) -> str:
    return Path(path).name if path.startswith(("/", "~")) else path


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.5g}"
    return f"{value:,}" if isinstance(value, int) else "" if value is None else str(value)
