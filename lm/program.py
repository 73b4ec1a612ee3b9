"""The step functions of a run and the shapes of their arguments: everything needed to compile them without data.

`lm.run` makes them for a run, `lm.planner` for devices that this machine does not have.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm import optim, param_paths, step
from lm.config import Config, OptimConfig
from lm.config.schema import ConfigError
from lm.models import registry
from lm.optim import mup, trainable
from lm.parallel import sharding
from lm.tasks import columns_of_batch, task_of
from lm.types import LENGTH_KEYS, Batch, ModelFns, Params, TrainState

# Keys of the config that are no more than numbers in a training step, and read by nothing else that is compiled. Runs
# that differ in these alone can share one compiled step, which takes their values as arguments. `b1` and `b2` are none
# of them: 1 - b2 of an argument is rounded in float32, for 0.9999 by 2e-4 of its value.
NUMBERS = ("seed", "optim.learning_rate", "optim.end_lr_ratio", "optim.eps", "optim.weight_decay")


class Program(NamedTuple):
    """The functions of a run and the layout of its state.

    Attributes:
      model: functions of the model.
      optimizer: the optimizer, with its full schedule.
      total_steps: number of steps of the run.
      state_shardings: sharding of each leaf of a `TrainState`.
      abstract_state: shapes, dtypes and shardings of the state.
      init_state: params -> the state before the first step.
      step_with: (numbers, state, batch) -> (state, metrics), not jitted: a training step with other values, also traced
        ones, of some keys of `NUMBERS`.
      train_step: (state, batch) -> (state, metrics), jitted; the state is donated.
      eval_step: (params, batch, start) -> (metrics, outputs), jitted; start as in `TrainState`.
    """

    model: ModelFns
    optimizer: optim.Optimizer
    total_steps: int
    state_shardings: Any
    abstract_state: TrainState
    init_state: Callable[[Any], TrainState]
    step_with: Callable[[Mapping[str, Any], TrainState, Any], Any]
    train_step: Any
    eval_step: Any


def with_numbers(cfg: Config, numbers: Mapping[str, Any]) -> Config:
    """The config with other values, which may be traced, of some keys of `NUMBERS`."""
    optim_values = {key.removeprefix("optim."): value for key, value in numbers.items() if key != "seed"}
    return dataclasses.replace(
        cfg, seed=numbers.get("seed", cfg.seed), optim=dataclasses.replace(cfg.optim, **optim_values)
    )


def make(
    cfg: Config,
    mesh: Mesh,
    tokenizer: Any,
    *,
    abstract_params: Params,
    logical_axes: Mapping[str, sharding.LogicalAxes],
    anchored: Mapping[str, bool] | None,
    epoch_examples: int,
) -> Program:
    """Makes the step functions, without compiling, allocating an array or touching a device.

    Args:
      cfg: resolved.
      mesh: the devices; abstract ones will do.
      tokenizer: the run's; the planner passes a stand-in with the same number of ids.
      abstract_params: shapes and dtypes of all parameters.
      logical_axes: path -> logical axis names.
      anchored: see `lm.step.init_state`.
      epoch_examples: rows of an epoch, for durations in epochs.

    Raises:
      ConfigError, ValueError: as `lm.optim.build`.
    """
    size = {"batch_size": cfg.data.batch_size, "seq_len": cfg.data.seq_len, "epoch_examples": epoch_examples}
    total_steps = cfg.train.total.to_steps("train.total", **size)
    warmup_steps = cfg.optim.warmup.to_steps("optim.warmup", **size)
    decay_steps = cfg.optim.decay.to_steps("optim.decay", **size)

    def make_optimizer(cfg: OptimConfig) -> optim.Optimizer:
        return optim.build(
            cfg,
            abstract_params,
            total_steps=total_steps,
            warmup_steps=warmup_steps,
            decay_steps=decay_steps,
            scales=scales,
        )

    scales = mup.direction_scales(cfg.optim.name, logical_axes, mup.width_ratio(cfg.model))
    optimizer = make_optimizer(cfg.optim)
    model = make_model(cfg, compute_dtype(cfg.model.dtype, mesh))
    loss_fn, needs_start = task_of(cfg).loss(model.apply, cfg, tokenizer), task_of(cfg).needs_start

    def step_with(numbers: Mapping[str, Any], state: TrainState, batch: Batch) -> tuple[TrainState, step.Metrics]:
        its = with_numbers(cfg, numbers)
        return step.train_step(
            state,
            batch,
            loss_fn=loss_fn,
            optimizer=make_optimizer(its.optim) if numbers else optimizer,
            seed=its.seed,
            micro_batches=cfg.train.micro_batches,
            ema_decay=cfg.optim.ema_decay,
            mixout=cfg.optim.mixout,
            needs_start=needs_start,
        )

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, step.Metrics]:
        return step_with({}, state, batch)

    use_ema = cfg.optim.ema_decay > 0
    init_state = functools.partial(step.init_state, optimizer=optimizer, use_ema=use_ema, anchored=anchored)
    shardings = _state_shardings(optimizer, mesh, abstract_params, logical_axes, anchored, use_ema)
    shapes = jax.eval_shape(init_state, abstract_params)
    everywhere = sharding.replicated(mesh)
    return Program(
        model=model,
        optimizer=optimizer,
        total_steps=total_steps,
        state_shardings=shardings,
        abstract_state=jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes, shardings
        ),
        init_state=init_state,
        step_with=step_with,
        train_step=jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, everywhere)),
        eval_step=make_eval_step(cfg, mesh, model, tokenizer),
    )


def make_eval_step(cfg: Config, mesh: Mesh, model: ModelFns, tokenizer: Any) -> Any:
    """(params, batch, start) -> (metrics, outputs), jitted, of the task of `cfg`; the model has that task's head."""
    loss_fn, needs_start = task_of(cfg).loss(model.apply, cfg, tokenizer), task_of(cfg).needs_start
    eval_step = functools.partial(step.eval_step, loss_fn=loss_fn, needs_start=needs_start)
    return jax.jit(eval_step, out_shardings=sharding.replicated(mesh))


def make_model(cfg: Config, dtype: Any) -> ModelFns:
    """The functions of the model that `model.kind` names, with the head that the task needs."""
    return registry.MODELS[cfg.model.kind](cfg, task_of(cfg).head(cfg), dtype)


def eval_batch_size(cfg: Config) -> int:
    """Number of rows of an evaluation batch."""
    return cfg.eval.batch_size or cfg.data.batch_size


def check_mesh(cfg: Config, mesh: Mesh, abstract_params: Any, logical_axes: Mapping[str, sharding.LogicalAxes]) -> None:
    """Refuses a mesh that does not divide the batch or the model.

    Args:
      cfg: resolved.
      mesh: may be abstract.
      abstract_params: shapes and dtypes of all parameters.
      logical_axes: path -> logical axis names.

    Raises:
      ConfigError: names the key, and the number that its value must be a multiple of.
    """
    shards = sharding.batch_shards(mesh)
    parts = shards * cfg.train.micro_batches
    if cfg.data.batch_size % parts:
        raise ConfigError(
            f"'data.batch_size' ({cfg.data.batch_size}) must be a multiple of {parts}: {shards} shards of the mesh x "
            f"train.micro_batches={cfg.train.micro_batches}"
        )
    if eval_batch_size(cfg) % shards:
        raise ConfigError(
            f"'eval.batch_size' ({eval_batch_size(cfg)}) must be a multiple of {shards}, the number of shards of the "
            "mesh"
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


def abstract_batch(cfg: Config, mesh: Mesh, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and sharding of a batch of `rows` rows."""
    columns = columns_of_batch(task_of(cfg), cfg) | {"row_weights": ((), jnp.float32), "example_index": ((), jnp.int32)}

    def abstract(key: str, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=sharding.batch_sharding(mesh, key, 1 + len(shape)))

    return {key: abstract(key, *column) for key, column in columns.items()}


def compute_dtype(name: str, mesh: Mesh) -> Any:
    """The dtype that `model.dtype` stands for on these devices.

    'auto' is bfloat16 on accelerators, and float32 on CPUs, which do not multiply bfloat16 natively. So are 'int8' and
    'fp8', except for the matmuls with the blocks' kernels, see `lm.models.quantization`.
    """
    if name in ("auto", "int8", "fp8"):
        name = "float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16"
    return jnp.dtype(name)


def _state_shardings(
    optimizer: optim.Optimizer,
    mesh: Mesh,
    abstract_params: Params,
    logical_axes: Mapping[str, sharding.LogicalAxes],
    anchored: Mapping[str, bool] | None,
    use_ema: bool,
) -> Any:
    specs = {path: sharding.spec(axes) for path, axes in logical_axes.items()}
    abstract_trained = trainable.trained_part(optimizer.selection, abstract_params)
    trained = param_paths.map_with_path(lambda path, _: specs[path], abstract_trained)
    whole: Any = PartitionSpec()
    tree = TrainState(
        step=whole,
        params=param_paths.unflatten(specs),
        opt_state=optim.state_specs(optimizer, abstract_trained, trained),
        ema=trained if use_ema else None,
        skipped=whole,
        start=param_paths.select(trained, anchored) if anchored else None,
    )
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), tree, is_leaf=lambda x: isinstance(x, PartitionSpec))
