"""What is refused before anything is computed: parts of a config that are each right and do not fit together."""

import importlib.util
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lm import input_pipeline, param_paths
from lm.config import Config, LossConfig, schema
from lm.config.schema import ConfigError
from lm.data import augment
from lm.data.loader import REPLAY
from lm.evaluation import metrics
from lm.parallel import sharding
from lm.tasks import columns_of_batch, task_of
from lm.types import LENGTH_KEYS


def fit(cfg: Config) -> None:
    """Refuses a task, a model and keys that do not fit together, by what the task says of itself.

    Raises:
      ConfigError: naming the two keys, and what would fit.
    """
    task, name = task_of(cfg), cfg.task.name
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
    columns_of_batch(task, cfg)  # refuses what leaves nothing to predict
    task.score_names(cfg)  # refuses labels that cannot be scored
    usual = schema.to_dict(LossConfig())
    for key, value in schema.to_dict(cfg.loss).items():
        # A recipe may leave the size of a chunk for another task: it changes no value.
        if value != usual[key] and key not in (*task.loss_options, "chunk_len"):
            raise ConfigError(f"'loss.{key}' is {value}, but task.name={name} does not read it")
    if task.couples_rows and cfg.train.micro_batches > 1:
        raise ConfigError(f"'train.micro_batches' must be 1: task.name={name} compares all rows of a batch")
    head = task.head(cfg)
    if head and head.kind != "token" and cfg.model.pool == "first" and cfg.model.kind in ("decoder", "prefix_decoder"):
        raise ConfigError(f"'model.pool' is first, which sees nothing else in a {cfg.model.kind}; use last or mean")
    _of_text(cfg)
    if cfg.generate.prompts and (task.prompt is None or head or cfg.model.kind == "encoder"):
        raise ConfigError("'generate.prompts' is set, but this model does not generate text; set it to ()")


def _of_text(cfg: Config) -> None:
    """Refuses what only models of text have, and what experts and 8 bits need."""
    model, is_vision = cfg.model, cfg.model.kind in ("vit", "mae")
    needs = {
        f"'mesh.context' splits the positions of a text; 'model.kind' {model.kind} needs it to be 1": (
            not is_vision or cfg.mesh.context == 1
        ),
        f"'model.experts' is for models of text; 'model.kind' {model.kind} needs it to be (0, 0)": (
            not is_vision or not any(model.experts)
        ),
        f"'model.experts' is {model.experts}: expected (experts, of which 1 or more for each position), or (0, 0)": (
            not any(model.experts) or 0 < model.experts[1] <= model.experts[0]
        ),
        f"'model.mup_base' is for models of text; 'model.kind' {model.kind} needs it to be (0, 0)": (
            not is_vision or not any(model.mup_base)
        ),
        f"'model.dtype' is {model.dtype}, which needs qwix: pip install -e '.[quantization]'": (
            model.dtype not in ("int8", "fp8") or importlib.util.find_spec("qwix") is not None
        ),
        f"'model.dtype' is {model.dtype}, which experts do not have: set auto": (
            model.dtype not in ("int8", "fp8") or not any(model.experts)
        ),
        "'mesh.expert' splits experts, but 'model.experts' is (0, 0): set mesh.fsdp instead": (
            any(model.experts) or cfg.mesh.expert == 1
        ),
    }
    if broken := [message for message, holds in needs.items() if not holds]:
        raise ConfigError(broken[0])


def metric(cfg: Config, eval_step: Callable[..., Any], params: Any, batch: Any, names: tuple[str, ...]) -> None:
    """Refuses a `checkpoint.best_metric` that no evaluation will have, before anything is compiled."""
    measured, _ = jax.eval_shape(eval_step, params, batch)
    known = [*metrics.finalize(dict.fromkeys(measured, (1.0, 1.0)), task_of(cfg).has_perplexity), *names]
    prefixes = [*input_pipeline.by_source(cfg.data), *([REPLAY] if cfg.data.replay else [])]
    known = sorted({f"{prefix}_{name}" if prefix else name for prefix in ("", *prefixes) for name in known})
    if cfg.checkpoint.best_metric not in known:
        wanted = cfg.checkpoint.best_metric
        hint = schema.nearest(wanted, known)
        raise ConfigError(f"'checkpoint.best_metric': no metric '{wanted}'{hint}; there are {', '.join(known)}")


def mesh_divides(cfg: Config, mesh: Mesh, abstract_params: Any, logical_axes: dict[str, Any]) -> None:
    """Refuses a mesh that the batch or the model cannot be split over.

    Raises:
      ConfigError: naming the key and the number that it must be a multiple of.
    """
    shards = sharding.batch_shards(mesh)
    parts = shards * cfg.train.micro_batches
    if cfg.data.batch_size % parts:
        raise ConfigError(
            f"'data.batch_size' ({cfg.data.batch_size}) must be a multiple of {parts}: {shards} parts of the mesh x "
            f"train.micro_batches={cfg.train.micro_batches}"
        )
    if eval_batch_size(cfg) % shards:
        raise ConfigError(
            f"'eval.batch_size' ({eval_batch_size(cfg)}) must be a multiple of {shards}, as the mesh splits"
        )
    for key, (shape, _) in columns_of_batch(task_of(cfg), cfg).items():
        if key in LENGTH_KEYS and shape[-1] % mesh.shape["context"]:
            raise ConfigError(
                f"mesh.context={mesh.shape['context']} does not divide the {shape[-1]} positions of '{key}': change "
                "'data.seq_len' or 'data.target_len'"
            )
    if cfg.model.num_kv_heads % mesh.shape["tensor"]:
        raise ConfigError(
            f"mesh.tensor={mesh.shape['tensor']} does not divide {cfg.model.num_kv_heads} key/value heads"
        )
    flat = param_paths.flatten(abstract_params)
    sharding.check_divisible({path: leaf.shape for path, leaf in flat.items()}, logical_axes, mesh)


def eval_batch_size(cfg: Config) -> int:
    """Rows of an evaluation batch."""
    return cfg.eval.batch_size or cfg.data.batch_size


def same_data(fingerprint: str) -> None:
    """With several processes: raises ConfigError on all of them unless all have packed the same rows."""
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    mine = np.frombuffer(bytes.fromhex(fingerprint), np.uint8)
    everyones = np.asarray(multihost_utils.process_allgather(mine))
    if different := [i for i, theirs in enumerate(everyones) if not np.array_equal(theirs, everyones[0])]:
        raise ConfigError(f"processes {different} have other data, or another tokenizer, than process 0; see data.path")
