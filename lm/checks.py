"""Checks across sections of a config: values that are valid each, but contradict each other."""

import dataclasses
import importlib.util
import re
from typing import Any

import jax
import jax.numpy as jnp

from lm import eval_sets, param_paths, program
from lm.config import Config, GenerateConfig, LossConfig, schema
from lm.config.schema import ConfigError
from lm.data import augment
from lm.tasks import TASKS, Task, columns_of_batch, task_of


def fit(cfg: Config) -> None:
    """Refuses a model or keys that the task does not support, by what the task declares.

    Raises:
      ConfigError: names the two keys, and the supported values.
    """
    task, name = task_of(cfg), cfg.task.name
    if cfg.data.seq_len < task.least_len:
        raise ConfigError(
            f"'data.seq_len' is {cfg.data.seq_len}: rows of task.name={name} would hold no text; expected at least "
            f"{task.least_len}"
        )
    task.check(cfg)
    try:
        re.compile(cfg.adapter.targets)
    except re.error as error:
        raise ConfigError(f"'adapter.targets': {cfg.adapter.targets!r} is not a regular expression: {error}") from None
    if cfg.adapter.kind != "none" and all(value for _, value in cfg.optim.lr_rules):
        raise ConfigError(
            f"'adapter.kind' {cfg.adapter.kind}: 'optim.lr_rules' freeze nothing, so that the whole model would learn; "
            "expected, say, ((r'.*/(lora|adapter)_.*', 1.0), (r'.*', 0.0))"
        )
    augment.check(cfg)
    for key, value, fitting in (
        ("model.kind", cfg.model.kind, task.models),
        ("data.packing", cfg.data.packing, task.packing),
        ("data.overlong", cfg.data.overlong, ("auto", *task.overlong)),
    ):
        if value not in fitting:
            raise ConfigError(f"'{key}' is {value}, which does not fit task.name={name}; use {', '.join(fitting)}")
    columns_of_batch(task, cfg)  # raises if nothing would be predicted
    task.score_names(cfg)  # raises if the labels cannot be scored
    usual = schema.to_dict(LossConfig())
    for key, value in schema.to_dict(cfg.loss).items():
        # chunk_len may be set for a task that does not read it: it changes no value.
        if value != usual[key] and key not in (*task.loss_options, "chunk_len"):
            raise ConfigError(f"'loss.{key}' is {value}, but task.name={name} does not read it")
    if cfg.model.num_experts and not task.balances_experts:
        raise ConfigError(
            f"'model.num_experts' is {cfg.model.num_experts}, but the loss of task.name={name} does not balance "
            "experts: set it to 0, or choose a task that predicts tokens"
        )
    if task.couples_rows and cfg.train.micro_batches > 1:
        raise ConfigError(f"'train.micro_batches' must be 1: task.name={name} compares all rows of a batch")
    head = task.head(cfg)
    if head and head.kind != "token" and _sees_itself(cfg):
        raise ConfigError(
            f"'model.pool' is {cfg.model.pool}, but the first position of a {cfg.model.kind} sees only itself; use "
            "last or mean"
        )
    if cfg.model.dtype in ("int8", "fp8") and importlib.util.find_spec("qwix") is None:
        raise ConfigError(f"'model.dtype' is {cfg.model.dtype}, which needs qwix: pip install -e '.[quantization]'")
    generates = task.prompt is not None and not head and cfg.model.kind != "encoder"
    for key in ("prompts", "stop", "min_new_tokens", "repetition_penalty"):
        off = getattr(GenerateConfig(), key)
        if getattr(cfg.generate, key) != off and not generates:
            raise ConfigError(f"'generate.{key}' is set, but this model does not generate text; set it to {off}")
    if cfg.generate.stop and task.answers_with_text:
        raise ConfigError(
            f"'generate.stop' is set, but the texts of task.name={name} are found by beam search, which does not read "
            "it; set it to ()"
        )


def sets_fit(cfg: Config, abstract_params: Any, tokenizer: Any) -> None:
    """Refuses a set of `eval.sets` whose own task this run's model cannot be evaluated on, or whose prompts need
    training records that the run does not have.

    Args:
      cfg: resolved.
      abstract_params: shapes and dtypes of all parameters of the run.
      tokenizer: of the run; None where it has yet to be trained, or the run reads no text.

    Raises:
      ConfigError: names the key, and the tasks that fit.
    """
    there = {path: leaf.shape for path, leaf in param_paths.flatten(abstract_params).items()}
    for name, one in cfg.eval.sets:
        own = eval_sets.config_of(cfg, name)
        key, task = f"'eval.sets.{name}.task", task_of(own)
        if task.held_out and own.task.shots and (task.name != cfg.task.name or cfg.data.format == "prepared"):
            where = key if one.task.name else "'task"
            raise ConfigError(
                f"{where}.shots' is {own.task.shots}, but the training data has no records "
                f"of task.name={task.name} to take them from for 'eval.sets.{name}': set it to 0"
            )
        if not one.task.name:
            continue
        if lack := _lacks(cfg, task) or _lacks_parameters(own, there):
            fits = [other.name for other in TASKS.values() if not _lacks(cfg, other) and _has_no_head(cfg, other)]
            headless = ", ".join(fits) or "none without a head"
            raise ConfigError(
                f"{key}.name' is {task.name}, which {lack}; expected {cfg.task.name} with the head that is trained, or "
                f"a task without a head: {headless}"
            )
        try:
            fit(own)
            if tokenizer:
                task.check_tokenizer(own, tokenizer)
        except ConfigError as error:
            raise ConfigError(f"{key}': {error}") from None


def _sees_itself(cfg: Config) -> bool:
    """Whether a head reads the first position, which sees no other."""
    return cfg.model.pool in ("first", "cls") and cfg.model.kind in ("decoder", "prefix_decoder")


def _lacks(cfg: Config, task: Task) -> str:
    """What a run lacks for being evaluated on another task, whatever its options; '' = nothing."""
    own = task_of(cfg)
    if cfg.model.kind not in task.models:
        return f"does not support model.kind={cfg.model.kind}"
    if (task.texts is None) != (own.texts is None) or task.vocabulary is not own.vocabulary:
        return f"reads other data than task.name={own.name}: their tokenizers differ"
    if task.needs_start and not own.needs_start:
        return "compares with the parameters at the start of a run, which this run does not keep"
    return ""


def _has_no_head(cfg: Config, task: Task) -> bool:
    return task.head(dataclasses.replace(cfg, task=task.options(name=task.name))) is None


def _lacks_parameters(own: Config, there: dict[str, Any]) -> str:
    """Which parameters a set's task needs and the run does not have; '' = none."""
    model = program.make_model(own, jnp.float32)
    needed = param_paths.flatten(jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0))))
    missing = [f"{path} {leaf.shape}" for path, leaf in needed.items() if there.get(path) != leaf.shape]
    return f"needs parameters that this run's model does not have ({', '.join(missing)})" if missing else ""
