"""From config to objects: the only place where they meet. What is built is decided by values, never by the caller."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm import checkpoint, config, generate, metrics, objectives, optim, schema, sharding, step, transfer, trees
from lm.config import Config, MeshConfig
from lm.data import examples, pipeline, sources, tokenizer
from lm.data.tokenizer import Tokenizer
from lm.models import transformer
from lm.schema import ConfigError
from lm.types import Batch, ModelFns, TrainState

TOKENIZER_FILE = "tokenizer.model"


class Plan(NamedTuple):
    """What can be known, and refused, before data is read or a device is touched.

    Attributes:
      cfg: the config with the model's open sizes filled in.
      abstract_params: shapes and dtypes of all parameters.
      logical_axes: path -> logical axis names.
      tokenizer: the tokenizer, or None when this run is to train one.
      optimizer: its rules resolved over the parameters; its schedule is a stand-in until the data's size is known.
      init: the checkpoint that `init_from` names, or None.
      origin_of: path -> array of that checkpoint, or None = initialised.
      unused: parameters of that checkpoint that this run leaves behind.
    """

    cfg: Config
    abstract_params: Any
    logical_axes: dict[str, Any]
    tokenizer: Tokenizer | None
    optimizer: optim.Optimizer
    init: checkpoint.Saved | None
    origin_of: dict[str, str | None]
    unused: list[str]


class Run(NamedTuple):
    """Everything `lm.train` works with.

    Attributes:
      cfg: the resolved config.
      mesh: the devices.
      model: functions of the model.
      tokenizer: of this run.
      prompts: text of `generate.prompts` -> its ids.
      data: packed rows.
      optimizer: with its real schedule.
      total_steps: of the run.
      every: 'eval' and 'checkpoint' -> steps between two, 0 = never.
      state_shardings: where each leaf of a `TrainState` lies.
      abstract_state: shapes, dtypes and shardings of the state.
      train_step: (state, batch) -> (state, metrics), jitted; the state is donated.
      eval_step: (params, batch) -> metrics, jitted.
    """

    cfg: Config
    mesh: Mesh
    model: ModelFns
    tokenizer: Tokenizer
    prompts: dict[str, list[int]]
    data: pipeline.Data
    optimizer: optim.Optimizer
    total_steps: int
    every: dict[str, int]
    state_shardings: Any
    abstract_state: TrainState
    train_step: Any
    eval_step: Any


def plan(cfg: Config, workdir: Path | None) -> Plan:
    """Checks what can be checked without data.

    Args:
      cfg: from `lm.config.build`.
      workdir: the run's folder; None = a run that is only looked at.

    Raises:
      ConfigError: rules, sizes, tokenizer or checkpoint that do not fit.
      CheckpointError: `init_from` names no checkpoint.
    """
    if workdir and (":/" in str(workdir) or workdir.is_file()):
        raise ConfigError(f"--workdir={workdir}: expected a folder, local or mounted (NFS, gcsfuse)")
    # A run that has begun no longer needs the one it came from.
    has_begun = workdir and any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*"))
    init = checkpoint.choose(cfg.init_from) if cfg.init_from and not has_begun else None
    found = _find_tokenizer(cfg, workdir if has_begun else None, init)
    vocab_size = found.vocab_size if found else cfg.tokenizer.vocab_size
    resolved = transformer.resolve(cfg.model, vocab_size=vocab_size, seq_len=cfg.data.seq_len)
    cfg = dataclasses.replace(cfg, model=resolved)
    model = transformer.decoder(cfg.model, jnp.float32)
    abstract = jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)))
    # Rules are checked now, on a schedule that always fits; the real one waits for the data's size.
    rules_only = dataclasses.replace(cfg.optim, schedule="constant")
    optimizer = optim.build(rules_only, abstract, total_steps=1, warmup_steps=0, decay_steps=0)
    trees.match_rules(cfg.init_rules, list(trees.flatten(abstract)), "init_rules")
    origin_of, unused = transfer.sources(abstract, cfg.init_rules, init) if init else ({}, [])
    axes = trees.flatten(model.logical_axes())
    return Plan(cfg, abstract, axes, found, optimizer, init, origin_of, unused)


def run(planned: Plan, workdir: Path, mesh: Mesh, note: Callable[[str], None]) -> Run:
    """Reads the data and makes everything the loop needs; no parameter yet.

    Args:
      planned: from `plan`.
      workdir: the run's folder; a tokenizer that is trained or found is written there.
      mesh: the devices.
      note: called with what a person should read.
    """
    cfg = planned.cfg
    check_mesh(planned, mesh)
    split = sources.load(cfg.data)
    note(split.report)
    examples.check_task([*split.train, *split.valid], cfg.data)
    words = make_tokenizer(planned, split, workdir, note)
    prompts = {prompt: generate.encode_prompt(prompt, words, cfg) for prompt in cfg.generate.prompts}
    data = pipeline.build(cfg, words, split)
    check_same_data(data)
    for name, counts in data.report.items():
        note(f"{name}: " + ", ".join(f"{key} {round(value, 4):,}" for key, value in counts.items()))

    size: dict[str, Any] = {"batch_size": cfg.data.batch_size, "seq_len": cfg.data.seq_len}
    size["epoch_examples"] = len(data.train["tokens"])
    total_steps = cfg.train.total.to_steps(**size)
    optimizer = optim.build(
        cfg.optim,
        planned.abstract_params,
        total_steps=total_steps,
        warmup_steps=cfg.optim.warmup.to_steps(**size),
        decay_steps=cfg.optim.decay.to_steps(**size),
    )
    model = transformer.decoder(cfg.model, compute_dtype(cfg.model.dtype, mesh))
    loss_fn = objectives.OBJECTIVES[cfg.objective](model.apply, cfg, words)
    train_step = functools.partial(
        step.train_step,
        loss_fn=loss_fn,
        optimizer=optimizer,
        seed=cfg.seed,
        micro_batches=cfg.train.micro_batches,
        ema_decay=cfg.optim.ema_decay,
    )
    state_shardings = _state_shardings(planned, optimizer, mesh, use_ema=cfg.optim.ema_decay > 0)
    shapes = jax.eval_shape(
        functools.partial(step.init_state, optimizer=optimizer, use_ema=cfg.optim.ema_decay > 0),
        planned.abstract_params,
    )
    abstract_state = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes, state_shardings
    )
    everywhere = sharding.replicated(mesh)
    eval_step = functools.partial(step.eval_step, loss_fn=loss_fn)
    check_metric(cfg, eval_step, planned.abstract_params, abstract_batch(cfg, mesh, eval_batch_size(cfg)))
    return Run(
        cfg=cfg,
        mesh=mesh,
        model=model,
        tokenizer=words,
        prompts=prompts,
        data=data,
        optimizer=optimizer,
        total_steps=total_steps,
        every={"eval": cfg.eval.every.to_steps(**size), "checkpoint": cfg.checkpoint.every.to_steps(**size)},
        state_shardings=state_shardings,
        abstract_state=abstract_state,
        train_step=jax.jit(train_step, donate_argnums=0, out_shardings=(state_shardings, everywhere)),
        eval_step=jax.jit(eval_step, out_shardings=everywhere),
    )


def check_metric(cfg: Config, eval_step: Callable[..., Any], params: Any, batch: Any) -> None:
    """Refuses a `checkpoint.best_metric` that no evaluation will have, before anything is compiled."""
    measured = jax.eval_shape(eval_step, params, batch)
    names = sorted(metrics.finalize(dict.fromkeys(measured, (1.0, 1.0))))
    if cfg.checkpoint.best_metric not in names:
        wanted = cfg.checkpoint.best_metric
        hint = schema.nearest(wanted, names)
        raise ConfigError(f"'checkpoint.best_metric': no metric '{wanted}'{hint}; there are {', '.join(names)}")


def check_mesh(planned: Plan, mesh: Mesh) -> None:
    """Refuses a mesh that the batch or the model cannot be split over.

    Raises:
      ConfigError: naming the key and the number that it must be a multiple of.
    """
    cfg, shards = planned.cfg, sharding.batch_shards(mesh)
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
    if cfg.model.num_kv_heads % mesh.shape["tensor"]:
        raise ConfigError(
            f"mesh.tensor={mesh.shape['tensor']} does not divide {cfg.model.num_kv_heads} key/value heads"
        )
    flat = trees.flatten(planned.abstract_params)
    sharding.check_divisible({path: leaf.shape for path, leaf in flat.items()}, planned.logical_axes, mesh)


def eval_batch_size(cfg: Config) -> int:
    """Rows of an evaluation batch."""
    return cfg.eval.batch_size or cfg.data.batch_size


def abstract_batch(cfg: Config, mesh: Mesh, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and sharding of a batch of `rows` rows."""
    where = sharding.batch_sharding(mesh)
    shape = (rows, cfg.data.seq_len)
    dtypes = {"tokens": jnp.int32, "targets": jnp.int32, "loss_weights": jnp.float32}
    dtypes |= {"segment_ids": jnp.int32, "positions": jnp.int32}
    batch = {key: jax.ShapeDtypeStruct(shape, dtype, sharding=where) for key, dtype in dtypes.items()}
    return batch | {"example_index": jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=where)}


def compute_dtype(name: str, mesh: Mesh) -> Any:
    """'auto' is bfloat16 where the hardware multiplies it natively; CPUs do not."""
    if name == "auto":
        name = "float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16"
    return jnp.dtype(name)


def make_tokenizer(
    planned: Plan, split: sources.Split, workdir: Path, note: Callable[[str], None] = lambda _: None
) -> Tokenizer:
    """The run's tokenizer, written to the run's folder. Every process trains it where there is none: an error is then
    every process's, and the result, a function of the texts, is the same."""
    made = planned.tokenizer
    if made is None:
        note(f"training a tokenizer of {planned.cfg.tokenizer.vocab_size:,} ids")
        cfg = planned.cfg.tokenizer
        made = tokenizer.train(examples.texts(split.train), cfg.vocab_size, cfg.train_bytes)
    note(f"tokenizer of {made.vocab_size:,} ids, {made.hash[:12]}")
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        made.save(workdir / TOKENIZER_FILE)
    return made


def check_same_data(data: pipeline.Data) -> None:
    """With several processes: raises ConfigError on all of them unless all have packed the same rows."""
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    mine = np.frombuffer(bytes.fromhex(data.fingerprint), np.uint8)
    everyones = np.asarray(multihost_utils.process_allgather(mine))
    if different := [i for i, theirs in enumerate(everyones) if not np.array_equal(theirs, everyones[0])]:
        raise ConfigError(f"processes {different} have other data, or another tokenizer, than process 0; see data.path")


def _find_tokenizer(cfg: Config, workdir: Path | None, init: checkpoint.Saved | None) -> Tokenizer | None:
    """The run's own, else `tokenizer.path`, else that of `init_from`; refuses two that differ.

    `workdir` is None before the first checkpoint: a file that such a start left behind may be of another config.

    Raises:
      ConfigError: naming both files, or the run whose tokenizer is gone.
    """
    candidates: list[Any] = [workdir / TOKENIZER_FILE] if workdir else []
    if cfg.tokenizer.path:
        candidates.append(epath.Path(cfg.tokenizer.path))
        if not candidates[-1].exists():
            raise ConfigError(f"'tokenizer.path': no file {cfg.tokenizer.path}; expected a SentencePiece .model")
    if init:
        candidates.append(init.path.parent.parent / TOKENIZER_FILE)
    found = {path: tokenizer.load(path) for path in candidates if path.exists()}
    if (init or workdir) and not found:
        raise ConfigError(f"no {candidates[-1]}: what the ids of the checkpoint mean is lost; put it back")
    hashes = {str(path): words.hash for path, words in found.items()}
    if init:
        hashes[str(init.path)] = init.info.get("tokenizer_hash", "")
    if len(set(hashes.values())) > 1:
        listed = "\n".join(f"  {sha[:12]}  {path}" for path, sha in hashes.items())
        raise ConfigError(f"the tokenizers differ, so ids would mean other text:\n{listed}\nuse one of them everywhere")
    return next(iter(found.values()), None)


def _state_shardings(planned: Plan, optimizer: optim.Optimizer, mesh: Mesh, *, use_ema: bool) -> Any:
    specs = {path: sharding.spec(axes) for path, axes in planned.logical_axes.items()}
    trained = {path: spec for path, spec in specs.items() if optimizer.trained[path]}
    abstract_trained, _ = trees.split(planned.abstract_params, optimizer.trained)
    whole: Any = PartitionSpec()
    tree = TrainState(
        step=whole,
        params=trees.unflatten(specs),
        opt_state=optim.state_specs(optimizer, abstract_trained, trees.unflatten(trained)),
        ema=trees.unflatten(trained) if use_ema else None,
        skipped=whole,
    )
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), tree, is_leaf=lambda x: isinstance(x, PartitionSpec))


def data_iterator(run: Run, start_example: int) -> Any:
    """This process's part of the training batches, from a position in the stream."""
    rows = sharding.local_rows(run.mesh, run.cfg.data.batch_size)
    return pipeline.train_batches(
        run.data,
        batch_size=run.cfg.data.batch_size,
        start_example=start_example,
        local_rows=rows,
        seed=run.cfg.seed,
    )


def eval_iterator(run: Run) -> Any:
    """This process's part of the held-out batches."""
    size = eval_batch_size(run.cfg)
    rows = sharding.local_rows(run.mesh, size)
    return pipeline.eval_batches(run.data.valid, batch_size=size, local_rows=rows, max_tokens=run.cfg.eval.max_tokens)


def placer(mesh: Mesh, batch_size: int) -> Callable[[dict[str, np.ndarray]], Batch]:
    """Makes global arrays of this process's rows of a batch."""
    rows = sharding.local_rows(mesh, batch_size)
    return lambda batch: sharding.to_global(batch, rows, batch_size, mesh)


def load_run(name: str) -> tuple[Config, ModelFns, Any, Tokenizer]:
    """A trained model to use: its config, functions, parameters (averaged where the run averaged) and tokenizer.

    Args:
      name: 'RUN', 'RUN@best' or 'RUN@STEP'.

    Raises:
      CheckpointError: no such checkpoint, or a damaged one.
    """
    saved = checkpoint.choose(name)
    cfg = config.build(saved.info["config"])
    own = dataclasses.replace(cfg.tokenizer, path="")  # it has been copied to the run's folder
    changes: dict[str, Any] = {"init_from": name, "init_rules": ((".*", transfer.KEEP),), "tokenizer": own}
    planned = plan(dataclasses.replace(cfg, **changes), None)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    where = sharding.replicated(mesh)
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), planned.abstract_params
    )
    model = transformer.decoder(cfg.model, compute_dtype(cfg.model.dtype, mesh))
    params, _ = transfer.initialize(model, abstract, cfg.seed, saved, planned.origin_of)
    assert planned.tokenizer is not None  # a checkpoint without one has been refused
    return cfg, model, params, planned.tokenizer
