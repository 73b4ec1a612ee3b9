"""Checks across sections of a config: values that are valid each, but contradict each other."""

import importlib.util
import re

from lm.config import Config, GenerateConfig, LossConfig, schema
from lm.config.schema import ConfigError
from lm.data import augment
from lm.tasks import columns_of_batch, task_of


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
    if head and head.kind != "token" and cfg.model.pool == "first" and cfg.model.kind in ("decoder", "prefix_decoder"):
        raise ConfigError(
            f"'model.pool' is first, but the first position of a {cfg.model.kind} sees only itself; use last or mean"
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
