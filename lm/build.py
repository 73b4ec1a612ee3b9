"""From config to objects: the only place where they meet. What is built is decided by values, never by the caller."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from lm import checkpoint, checks, input_pipeline, optim, param_paths, program, replay
from lm.checkpoint import CheckpointError, init_from, resume
from lm.config import Config, DataConfig, MeshConfig
from lm.config.schema import ConfigError
from lm.data import loader
from lm.data.readers import registry
from lm.data.tokenizer import Tokenizer
from lm.decoding import sampling
from lm.models import adapters, transformer
from lm.parallel import mesh as mesh_lib
from lm.parallel import sharding
from lm.tasks import TASKS, base, build_saved_config, columns_of_batch, task_of
from lm.types import Batch, ModelFns, Outputs, TrainState


class Plan(NamedTuple):
    """What can be known, and refused, before data is read or a device is touched.

    Attributes:
      cfg: the config with what it leaves open filled in: sizes of the model, `data.overlong`.
      abstract_params: shapes and dtypes of all parameters.
      logical_axes: path -> logical axis names.
      tokenizer: the tokenizer, or None when this run is to train one.
      optimizer: its rules resolved over the parameters; its schedule is a stand-in until the data's size is known.
      init: the checkpoint that `init_from` names, or None.
      origin_of: path -> array of that checkpoint, or None = initialised.
      unused: parameters of that checkpoint that this run leaves behind.
      anchored: path -> whether the optimizer draws it to the value it starts with; None = `optim` asks for none.
      replay: where the data of the run lies that `data.replay` draws from, or None.
    """

    cfg: Config
    abstract_params: Any
    logical_axes: dict[str, Any]
    tokenizer: Tokenizer | None
    optimizer: optim.Optimizer
    init: checkpoint.Saved | None
    origin_of: dict[str, str | None]
    unused: list[str]
    anchored: dict[str, bool] | None
    replay: DataConfig | None


class Run(NamedTuple):
    """Everything `lm.train` works with.

    Attributes:
      cfg: the resolved config.
      mesh: the devices.
      model: functions of the model.
      tokenizer: of this run; None where the task reads no text.
      prompts: text of `generate.prompts` -> its ids.
      data: packed rows.
      optimizer: with its real schedule.
      total_steps: of the run.
      every: 'eval' and 'checkpoint' -> steps between two, 0 = never.
      state_shardings: where each leaf of a `TrainState` lies.
      abstract_state: shapes, dtypes and shardings of the state.
      init_state: params -> the state before the first step.
      train_step: (state, batch) -> (state, metrics), jitted; the state is donated.
      eval_step: (params, batch) -> (metrics, outputs), jitted.
      score: see `lm.tasks.base.Task.scores`.
      replay: see `Plan`.
    """

    cfg: Config
    mesh: Mesh
    model: ModelFns
    tokenizer: Tokenizer | None
    prompts: dict[str, list[int]]
    data: loader.Data
    optimizer: optim.Optimizer
    total_steps: int
    every: dict[str, int]
    state_shardings: Any
    abstract_state: TrainState
    init_state: Callable[[Any], TrainState]
    train_step: Any
    eval_step: Any
    score: Callable[[Outputs, list[Any], Config], dict[str, float]] | None
    replay: DataConfig | None


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
    init = None
    if cfg.init_from and not has_begun:
        try:
            init = checkpoint.choose(cfg.init_from)
        except CheckpointError as error:
            raise CheckpointError(f"'init_from' is {cfg.init_from}: {error}") from None
    checks.fit(cfg)
    overlong: Any = task_of(cfg).overlong[0] if cfg.data.overlong == "auto" else cfg.data.overlong
    data = dataclasses.replace(cfg.data, overlong=overlong)
    found = _find_tokenizer(cfg, workdir if has_begun else None, init) if task_of(cfg).texts else None
    vocab_size = found.vocab_size if found else cfg.tokenizer.vocab_size + cfg.tokenizer.extra_ids
    longest = max(cfg.data.seq_len, cfg.data.target_len)
    resolved = transformer.resolve(cfg.model, vocab_size=vocab_size, seq_len=longest)
    cfg = dataclasses.replace(cfg, model=resolved, data=data)
    model = program.make_model(cfg, jnp.float32)
    abstract = jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)))
    adapters.check(cfg.adapter, param_paths.flatten(abstract))
    # Rules are checked now, on a schedule that always fits; the real one waits for the data's size.
    rules_only = dataclasses.replace(cfg.optim, schedule="constant")
    optimizer = optim.build(rules_only, abstract, total_steps=1, warmup_steps=0, decay_steps=0)
    anchored = _anchored(cfg, abstract)
    origin_of, unused = init_from.sources(abstract, cfg.init_rules, init) if init else ({}, [])
    axes = param_paths.flatten(model.logical_axes())
    other = replay.source(cfg, workdir, init)
    return Plan(cfg, abstract, axes, found, optimizer, init, origin_of, unused, anchored, other)


def predicts_tokens(cfg: Config) -> bool:
    """Whether the model reads rows of tokens, each once, and predicts tokens."""
    task = task_of(cfg)
    shape, _ = columns_of_batch(task, cfg).get("tokens", ((), None))
    return task.head(cfg) is None and len(shape) == 1


def run(planned: Plan, workdir: Path, mesh: Mesh, note: Callable[[str], None]) -> Run:
    """Reads the data and makes everything the loop needs; no parameter yet.

    Args:
      planned: from `plan`.
      workdir: the run's folder; a tokenizer that is trained or found is written there.
      mesh: the devices.
      note: called with what a person should read.
    """
    cfg, task = planned.cfg, task_of(planned.cfg)
    checks.mesh_divides(cfg, mesh, planned.abstract_params, planned.logical_axes)
    found = input_pipeline.load(cfg.data, task.wanted(cfg))
    for source in found:
        note(source.report)
        if isinstance(source, registry.Split):
            base.check_fields(task, [*source.train, *source.valid], TASKS)
    words = tokenizer_for(planned, found, note)
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
    if words:
        note(f"tokenizer of {words.vocab_size:,} ids, {words.hash[:12]}")
        if jax.process_index() == 0:
            words.save(workdir / tokenizer_file(cfg))
    prompts = {prompt: sampling.encode_prompt(prompt, words, cfg) for prompt in cfg.generate.prompts if words}
    data = input_pipeline.build(cfg, words, *found, replayed=replay.load(planned.replay, cfg, note))
    checks.same_data(data.fingerprint)
    for name, counts in data.report.items():
        note(f"{name}: " + ", ".join(f"{key} {round(value, 4):,}" for key, value in counts.items()))

    made = program.make(
        cfg,
        mesh,
        words,
        abstract_params=planned.abstract_params,
        logical_axes=planned.logical_axes,
        anchored=planned.anchored,
        epoch_examples=data.epoch_examples,
    )
    batch = program.abstract_batch(cfg, mesh, checks.eval_batch_size(cfg))
    checks.metric(cfg, made.eval_step, planned.abstract_params, batch, task.score_names(cfg))
    size = {"batch_size": cfg.data.batch_size, "seq_len": cfg.data.seq_len, "epoch_examples": data.epoch_examples}
    return Run(
        **made._asdict(),
        cfg=cfg,
        mesh=mesh,
        tokenizer=words,
        prompts=prompts,
        data=data,
        every={"eval": cfg.eval.every.to_steps(**size), "checkpoint": cfg.checkpoint.every.to_steps(**size)},
        score=task.scores,
        replay=planned.replay,
    )


def tokenizer_for(
    planned: Plan, found: Sequence[input_pipeline.Found], note: Callable[[str], None] = lambda _: None
) -> Tokenizer | None:
    """The run's tokenizer, trained where there is none yet; None where the task reads no text. Every process trains it:
    an error is then every process's, and the result, a function of the texts, is the same."""
    task, cfg = task_of(planned.cfg), planned.cfg.tokenizer
    if task.texts is None or planned.tokenizer:
        return planned.tokenizer
    note(f"training a tokenizer of {cfg.vocab_size:,} ids")
    records = itertools.chain.from_iterable(split.train for split in found if isinstance(split, registry.Split))
    texts = itertools.chain.from_iterable(map(task.texts, records))
    return dataclasses.replace(task.vocabulary.train(texts, cfg), extra_ids=cfg.extra_ids)


def _find_tokenizer(cfg: Config, workdir: Path | None, init: checkpoint.Saved | None) -> Tokenizer | None:
    """The run's own, else `tokenizer.path`, else that of `init_from`; refuses two that differ.

    `workdir` is None before the first checkpoint: a file that such a start left behind may be of another config.

    Raises:
      ConfigError: naming both files, or the run whose tokenizer is gone.
    """
    words = task_of(cfg).vocabulary
    candidates: list[Any] = [workdir / words.file] if workdir else []
    if cfg.tokenizer.path:
        candidates.append(epath.Path(cfg.tokenizer.path))
        if not candidates[-1].exists():
            raise ConfigError(f"'tokenizer.path': no file {cfg.tokenizer.path}; expected a {words.file} of a run")
    if cfg.data.format == "prepared":
        candidates += [
            epath.Path(one.path).expanduser() / words.file for one in input_pipeline.by_source(cfg.data).values()
        ]
        if missing := [path for path in candidates if not path.exists()]:
            raise ConfigError(f"no {missing[0]}: what the ids of the prepared data mean is lost; put it back")
    if init:
        candidates.append(init.path.parent.parent / words.file)
    found = {path: words.load(path) for path in candidates if path.exists()}
    if (init or workdir) and not found:
        raise ConfigError(f"no {candidates[-1]}: what the ids of the checkpoint mean is lost; put it back")
    hashes = {str(path): each.hash for path, each in found.items()}
    if init:
        hashes[str(init.path)] = init.info.get("tokenizer_hash", "")
    if len(set(hashes.values())) > 1:
        listed = "\n".join(f"  {sha[:12]}  {path}" for path, sha in hashes.items())
        raise ConfigError(f"the tokenizers differ, so ids would mean other text:\n{listed}\nuse one of them everywhere")
    chosen = next(iter(found.values()), None)
    return chosen and dataclasses.replace(chosen, extra_ids=cfg.tokenizer.extra_ids)


def _anchored(cfg: Config, abstract_params: Any) -> dict[str, bool] | None:
    """Which parameters `to_init` and `mixout` draw back: those that came from `init_from`; a new head starts nowhere.

    A function of the config alone, so that a resumed run, which no longer looks at `init_from`, agrees.

    Raises:
      ConfigError: `init_rules` that do not fit; nothing to be drawn to.
    """
    actions = param_paths.match_rules(cfg.init_rules, list(param_paths.flatten(abstract_params)), "init_rules")
    wanted = [
        f"'optim.{name}'" for name, value in (("to_init", cfg.optim.to_init), ("mixout", cfg.optim.mixout)) if value
    ]
    if not wanted:
        return None
    anchored = {path: bool(cfg.init_from) and action != init_from.REINIT for path, action in actions.items()}
    if not any(anchored.values()):
        raise ConfigError(f"{wanted[0]} draws parameters to where 'init_from' had them, but nothing comes from one")
    return anchored


class Stream(NamedTuple):
    """The training examples of a run: how many there are to be, and `lm.data.loader.offsets`."""

    total_examples: int
    offsets: tuple[int, ...] = ()


def stream(run: Run, start_step: int, at: resume.Position) -> Stream:
    """From where a state is: the steps that are left are of `data.batch_size`, whatever those before were."""
    total = at.example + (run.total_steps - start_step) * run.cfg.data.batch_size
    if at.sources is None:
        return Stream(total)
    return Stream(total, loader.offsets(run.data, at.sources, at.example, total))


def data_iterator(run: Run, start_example: int, given: Stream | None = None) -> loader.Ahead:
    """This process's part of the training batches, from a position in the stream; None = of a run from its start."""
    given = given or Stream(run.total_steps * run.cfg.data.batch_size)
    return loader.train_batches(
        run.data,
        batch_size=run.cfg.data.batch_size,
        start_example=start_example,
        local_rows=sharding.local_rows(run.mesh, run.cfg.data.batch_size),
        seed=run.cfg.seed,
        total_examples=given.total_examples,
        offsets=given.offsets,
    )


def consumed(run: Run, examples: int, given: Stream) -> dict[str, dict[str, float]]:
    """Examples, tokens (positions of their rows) and epochs that the first `examples` took from each source."""
    found = loader.consumed(run.data, examples, given.total_examples, given.offsets)
    return {name: {**used, "tokens": used["examples"] * run.cfg.data.seq_len} for name, used in found.items()}


def eval_rows(run: Run, part: loader.Part) -> tuple[np.ndarray, Any]:
    """The held-out rows that an evaluation reads, int64 [n], and this process's part of the batches of them."""
    limits = {"max_tokens": run.cfg.eval.max_tokens, "seq_len": run.cfg.data.seq_len}
    size = checks.eval_batch_size(run.cfg)
    rows = sharding.local_rows(run.mesh, size)
    made = loader.eval_batches(part, batch_size=size, local_rows=rows, **limits)
    return loader.eval_row_ids(part, **limits), made


def tokenizer_file(cfg: Config) -> str:
    """What a run's folder calls its tokenizer."""
    return task_of(cfg).vocabulary.file


def tokenizer_hash(run: Run) -> str:
    """What a checkpoint keeps of the tokenizer, to refuse another one; '' without one."""
    return run.tokenizer.hash if run.tokenizer else ""


def placer(mesh: Mesh, batch_size: int) -> Callable[[dict[str, np.ndarray]], Batch]:
    """Makes global arrays of this process's rows of a batch."""
    rows = sharding.local_rows(mesh, batch_size)
    return lambda batch: sharding.to_global(batch, rows, batch_size, mesh)


def load_run(name: str) -> tuple[Config, ModelFns, Any, Any]:
    """A trained model to use: its config, functions, parameters (averaged where the run averaged) and tokenizer
    (None where its task reads no text).

    Args:
      name: 'RUN', 'RUN@best' or 'RUN@STEP'.

    Raises:
      CheckpointError: no such checkpoint, or a damaged one.
    """
    saved = checkpoint.choose(name)
    cfg = build_saved_config(saved.info["config"])
    changes: dict[str, Any] = {"init_from": name, "init_rules": ((".*", init_from.KEEP),)}
    planned, model, params = read_model(dataclasses.replace(cfg, **changes))
    return cfg, model, params, planned.tokenizer


def read_model(cfg: Config) -> tuple[Plan, ModelFns, Any]:
    """The model of a config with the parameters that its `init_from` and `init_rules` give it, on one device.

    Raises:
      ConfigError, CheckpointError: as `plan`; a damaged checkpoint.
    """
    own = dataclasses.replace(cfg.tokenizer, path="")  # it has been copied to the run's folder
    planned = plan(dataclasses.replace(cfg, tokenizer=own), None)
    mesh = mesh_lib.make_mesh(MeshConfig(), jax.devices()[:1])
    where = sharding.replicated(mesh)
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), planned.abstract_params
    )
    model = program.make_model(planned.cfg, program.compute_dtype(cfg.model.dtype, mesh))
    params, _ = init_from.initialize(model, abstract, cfg.seed, planned.init, planned.origin_of)
    return planned, model, params
