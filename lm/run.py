"""From a config to the objects of a run: `plan` checks it without data, `prepare` reads the data and makes the steps.

The only place where config becomes objects: which task, model, optimizer and mesh a run has is decided here, by values.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from lm import checkpoint, checks, compilation_cache, config, eval_sets, input_pipeline, lease, param_paths, replay
from lm import program as program_lib
from lm.checkpoint import CheckpointError, hf, init_from, resume
from lm.config import Config, DataConfig, MeshConfig, schema
from lm.config.schema import ConfigError
from lm.data import loader
from lm.data.readers import registry
from lm.data.record import Record
from lm.data.tokenizer import Tokenizer
from lm.decoding import sampling
from lm.evaluation import flops, metrics
from lm.files import write_atomic
from lm.models import adapters, transformer
from lm.optim import trainable
from lm.optim.trainable import Selection
from lm.parallel import mesh as mesh_lib
from lm.parallel import sharding
from lm.program import Program
from lm.tasks import TASKS, base, build_saved_config, columns_of_batch, task_of
from lm.types import Batch, ModelFns

_POSITIONS = ("embed/positions", "decoder_positions")  # tables that model.position=fixed does not train


class Plan(NamedTuple):
    """What is known of a run, and has been checked, before data is read or a device is touched.

    Attributes:
      cfg: the config with its open values filled in: sizes of the model, `data.overlong`.
      abstract_params: shapes and dtypes of all parameters.
      logical_axes: path -> logical axis names.
      selection: which parameters are trained, and how; the steps at which they start wait for the run's length.
      tokenizer: None where the run has yet to train one, or reads no text.
      init: the checkpoint or the published model that `init_from` names, or None.
      origin_of: path -> array of that checkpoint, or None = initialised.
      words: its tables of ids, which may have another number of rows.
      published_vocab: rows of those tables that came from a published model, at first or by way of other runs, or 0.
      published_adapter: whether `config.adapter` came from the published model of `init_from`, not from the config.
      unused: parameters of that checkpoint that this run does not read.
      anchored: path -> whether the state keeps its initial value, for the optimizer or the loss; None = neither asks.
      replay: the data that `data.replay` draws from, or None.
    """

    cfg: Config
    abstract_params: Any
    logical_axes: dict[str, Any]
    selection: Selection
    tokenizer: Tokenizer | None
    init: init_from.Source | None
    origin_of: dict[str, str | None]
    words: init_from.Tables
    published_vocab: int
    published_adapter: bool
    unused: list[str]
    anchored: dict[str, bool] | None
    replay: DataConfig | None


class Run(NamedTuple):
    """A run that is ready to start: its plan, its data and its step functions on the devices; no parameters yet.

    Attributes:
      plan: with the run's tokenizer, trained where there was none.
      mesh: the devices.
      program: the model, the optimizer and the jitted steps.
      data: packed rows.
      prompts: text of `generate.prompts` -> its ids.
      every: 'eval' and 'checkpoint' -> number of steps between two of them, 0 = never.
    """

    plan: Plan
    mesh: Mesh
    program: Program
    data: loader.Data
    prompts: dict[str, list[int]]
    every: dict[str, int]

    @property
    def cfg(self) -> Config:
        """The resolved config."""
        return self.plan.cfg


def plan(cfg: Config, workdir: Path | None) -> Plan:
    """Resolves a config and checks all that can be checked without data.

    Args:
      cfg: from `lm.config.build`.
      workdir: the run's folder; None for a run that is only inspected.

    Raises:
      ConfigError: rules, sizes, tokenizer or checkpoint that do not fit.
      CheckpointError: `init_from` names no checkpoint.
    """
    if workdir:
        check_workdir(workdir)
    # Once a run has a checkpoint of its own it no longer needs the one it was initialised from.
    own = checkpoint.list_saved(workdir) if workdir else []
    init = init_from.choose(cfg.init_from, cfg.model) if cfg.init_from and not own else None
    cfg = _published_shape(cfg, own, init)
    checks.fit(cfg)
    overlong: Any = task_of(cfg).overlong[0] if cfg.data.overlong == "auto" else cfg.data.overlong
    data = dataclasses.replace(cfg.data, overlong=overlong)
    found = _find_tokenizer(cfg, workdir if own else None, init) if task_of(cfg).texts else None
    if found and isinstance(init, hf.Published):
        init.check_tokenizer(found)
    vocab_size = found.vocab_size if found else cfg.tokenizer.vocab_size + cfg.tokenizer.extra_ids
    if isinstance(init, hf.Published) and vocab_size > cfg.model.vocab_size:  # by `tokenizer.extra_ids`
        cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=vocab_size))
    longest = max(cfg.data.seq_len, cfg.data.target_len)
    resolved = transformer.resolve(cfg.model, vocab_size=vocab_size, seq_len=longest)
    cfg = dataclasses.replace(cfg, model=resolved, data=data)
    model = program_lib.make_model(cfg, jnp.float32)
    abstract = jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)))
    adapters.check(cfg.adapter, param_paths.flatten(abstract))
    checks.sets_fit(cfg, abstract, found)
    selection = trainable.resolve(cfg.optim, abstract, total_steps=1)  # its length waits for the data's size
    if cfg.model.position == "fixed" and (
        moved := [path for path in _POSITIONS if any(selection.decayed.get(path, ()))]
    ):
        raise ConfigError(
            f"'optim.decay_rules' let '{moved[0]}' decay, which does not learn with model.position=fixed; add the rule "
            f"('{moved[0]}', False) before the others"
        )
    anchored = _anchored(cfg, abstract)
    logical_axes = param_paths.flatten(model.logical_axes())
    words = init_from.NO_TABLES
    if isinstance(init, hf.Published):
        words = init_from.tables(logical_axes, init.vocab_size, cfg.model.vocab_size)
    elif init and found:
        there = build_saved_config(init.info["config"]).tokenizer
        words = init_from.tables(logical_axes, vocab_size - cfg.tokenizer.extra_ids + there.extra_ids, vocab_size)
    origin_of, unused = init_from.sources(abstract, cfg.init_rules, init, words) if init else ({}, [])
    published_vocab, published_adapter = _published(own, init)
    keeps_tables = init is None or any(origin_of.get(path) for path in words.axes)
    return Plan(
        cfg=cfg,
        abstract_params=abstract,
        logical_axes=logical_axes,
        selection=selection,
        tokenizer=found,
        init=init,
        origin_of=origin_of,
        words=words,
        published_vocab=min(published_vocab, cfg.model.vocab_size) if keeps_tables else 0,
        published_adapter=published_adapter,
        unused=unused,
        anchored=anchored,
        replay=replay.source(cfg, workdir, init),
    )


def check_workdir(workdir: Path) -> None:
    """Raises ConfigError for a run's folder that is a URL or a file."""
    if ":/" in str(workdir) or workdir.is_file():
        raise ConfigError(f"--workdir={workdir}: expected a folder, local or mounted (NFS, gcsfuse)")


def _published_shape(cfg: Config, own: Sequence[checkpoint.Saved], init: init_from.Source | None) -> Config:
    """The config with the model's shape from the published model that `init_from` names; any other as it is.

    Args:
      cfg: the run's config.
      own: the run's own checkpoints; once it has some, they have the shape.
      init: what `init_from` names; None where the run has begun.

    Raises:
      ConfigError: the config sets another shape, or one of its keys contradicts this one.
    """
    if not cfg.init_from.startswith(hf.PREFIX):
        return cfg
    if isinstance(init, hf.Published):
        model, adapter, where, task = init.model, init.adapter, cfg.init_from, init.task
    else:
        readable = [saved for saved in own if "unreadable" not in saved.info]
        if not readable:
            return cfg
        there = readable[-1]
        saved = build_saved_config(there.info["config"])
        where = str(there.path)
        model = hf.adopt(cfg.model, saved.model, where)
        task = {key: getattr(saved.task, key) for key in ("image_shape", "target") if hasattr(saved.task, key)}
        adapter = saved.adapter if _published(own, init)[1] else None
    if adapter:
        cfg = dataclasses.replace(cfg, adapter=hf.adopt_adapter(cfg.adapter, adapter, where))
    cfg = dataclasses.replace(cfg, model=model, task=hf.adopt_task(cfg.task, task, where))
    config.check(cfg)
    return cfg


def _published(own: Sequence[checkpoint.Saved], init: init_from.Source | None) -> tuple[int, bool]:
    """Rows of vocabulary that a run's first model has from a published one, and whether its adapter is that one's.

    `own`, `init`: as `_published_shape`.
    """
    if isinstance(init, hf.Published):
        return init.vocab_size, init.adapter is not None
    known = [saved.info for saved in ([init] if init else own) if "unreadable" not in saved.info]
    info = known[-1] if known else {}
    return info.get("published_vocab", 0), not init and info.get("published_adapter", False)


def predicts_tokens(cfg: Config) -> bool:
    """Whether the model reads rows of tokens, each once, and predicts tokens."""
    task = task_of(cfg)
    shape, _ = columns_of_batch(task, cfg).get("tokens", ((), None))
    return task.head(cfg) is None and len(shape) == 1


def prepare(
    planned: Plan,
    mesh: Mesh,
    note: Callable[[str], None],
    begun: Mapping[str, Any] | None = None,
    like: Run | None = None,
) -> Run:
    """Reads the data and makes the step functions; parameters are made or restored later, and nothing is written.

    Args:
      planned: from `plan`.
      mesh: the devices.
      note: called with messages for the console.
      begun: what the newest checkpoint of this run says of it (`Saved.info`), if there is one.
      like: a run with the same tokenizer whose config differs in `lm.program.NUMBERS` alone: its rows are taken and,
        on the same mesh, its compiled evaluation.

    Raises:
      ConfigError: the mesh divides neither batch nor model, no evaluation has `checkpoint.best_metric`, a stage of the
        mixture has no example, or the processes of the run have read different data.
      DataError: as `lm.input_pipeline.load` and `build`.
    """
    cfg, task = planned.cfg, task_of(planned.cfg)
    program_lib.check_mesh(cfg, mesh, planned.abstract_params, planned.logical_axes)
    found_twice = eval_sets.find(cfg, input_pipeline.by_source(cfg.data).values())
    found = input_pipeline.load(cfg.data, task.wanted(cfg)) if like is None else []
    sets = eval_sets.load(cfg, note) if like is None else {}
    for line in found_twice:
        note(line)
    train: dict[str, list[Record]] = {}
    for name, source in zip(input_pipeline.by_source(cfg.data), found, strict=False):  # `found` is () with `like`
        note(source.report)
        if isinstance(source, registry.Split):
            base.check_fields(task, [*source.train, *source.valid], TASKS)
            train[name] = source.train
    for line in registry.overlap(train, {name: one.records for name, one in sets.items()}):
        note(line)
    planned = planned._replace(tokenizer=like.plan.tokenizer if like else tokenizer_for(planned, found, note))
    tokenizer = planned.tokenizer
    if tokenizer:
        note(f"tokenizer of {tokenizer.vocab_size:,} ids, {tokenizer.hash[:12]}")
        if change := tokenizer.changes_text:
            note(f"the tokenizer changes text, of which it counts the bytes in bits_per_byte: {change}")
    prompts = {prompt: sampling.encode_prompt(prompt, tokenizer, cfg) for prompt in cfg.generate.prompts if tokenizer}
    checks.sets_fit(cfg, planned.abstract_params, tokenizer)  # a tokenizer that was trained just now
    if like:
        data = input_pipeline.with_fingerprint(like.data, cfg, tokenizer, begun)
    else:
        replayed = replay.load(planned.replay, cfg, note)
        data = input_pipeline.build(cfg, tokenizer, *found, replayed=replayed, begun=begun, sets=sets)
    _check_same_data([data.fingerprint, *data.set_fingerprints.values()])
    if data.easy_first:
        note(f"curriculum: short rows first, in the first {data.easy_first:,} examples")
    for name, counts in data.report.items():
        note(f"{name}: " + ", ".join(f"{key} {round(value, 4):,}" for key, value in counts.items()))

    program = program_lib.make(
        cfg,
        mesh,
        tokenizer,
        abstract_params=planned.abstract_params,
        logical_axes=planned.logical_axes,
        anchored=planned.anchored,
        epoch_examples=data.epoch_examples,
    )
    if like and like.mesh == mesh:
        same = {name: getattr(like.program, name) for name in ("model", "init_state", "eval_step")}
        program = program._replace(**same)
    _check_stages(cfg, data, program.total_steps * cfg.data.batch_size)
    batch = program_lib.abstract_batch(cfg, mesh, program_lib.eval_batch_size(cfg))
    measured, _ = jax.eval_shape(program.eval_step, planned.abstract_params, batch)
    _check_best_metric(cfg, data.rows_of(eval_sets.VALID), [*measured], task.score_names(cfg))
    size = {"batch_size": cfg.data.batch_size, "seq_len": cfg.data.seq_len, "epoch_examples": data.epoch_examples}
    return Run(
        plan=planned,
        mesh=mesh,
        program=program,
        data=data,
        prompts=prompts,
        every={
            "eval": cfg.eval.every.to_steps("eval.every", **size),
            "checkpoint": cfg.checkpoint.every.to_steps("checkpoint.every", **size),
        },
    )


def _check_same_data(fingerprints: Sequence[str]) -> None:
    """With several processes: raises ConfigError on all of them unless all have packed the same rows."""
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    mine = np.frombuffer(bytes.fromhex("".join(fingerprints)), np.uint8)
    everyones = np.asarray(multihost_utils.process_allgather(mine))
    if different := [i for i, theirs in enumerate(everyones) if not np.array_equal(theirs, everyones[0])]:
        raise ConfigError(
            f"processes {different} have other data, or another tokenizer, than process 0: all must read the same "
            "files; check 'data.path' and 'tokenizer.path' on their hosts"
        )


def _check_stages(cfg: Config, data: loader.Data, total_examples: int) -> None:
    """Raises ConfigError if a stage of `data.mixture` is so short that no example of the run is in it."""
    starts = data.mixture(total_examples).starts
    for (share, _), start, end in zip(data.stages, starts, (*starts[1:], total_examples), strict=True):
        if start >= end:
            raise ConfigError(
                f"'data.mixture': the stage that begins at {share} of the run has none of its {total_examples:,} "
                "examples; move it, or train longer"
            )


def _check_best_metric(cfg: Config, sources: Iterable[str], measured: Sequence[str], scores: Sequence[str]) -> None:
    """Raises ConfigError where no evaluation of the set `valid` will report `checkpoint.best_metric`.

    Args:
      cfg: resolved.
      sources: of the rows of that set.
      measured: metrics of the evaluation step.
      scores: metrics of the task's scores.
    """
    known = [*metrics.finalize(dict.fromkeys(measured, (1.0, 1.0)), task_of(cfg).has_perplexity), *scores]
    known = sorted({f"{prefix}_{name}" if prefix else name for prefix in ("", *sources) for name in known})
    if cfg.checkpoint.best_metric not in known:
        wanted = cfg.checkpoint.best_metric
        only = " of the set 'valid', which alone decides" if "/" in wanted else ""
        hint = schema.nearest(wanted, known)
        raise ConfigError(f"'checkpoint.best_metric': no metric '{wanted}'{only}{hint}; there are {', '.join(known)}")


def tokenizer_for(
    planned: Plan, found: Sequence[input_pipeline.Found], note: Callable[[str], None] = lambda _: None
) -> Tokenizer | None:
    """The run's tokenizer, trained on the training records where there is none yet; None where the task reads no text.

    Every process trains it, instead of one that sends it to the others: an error is then raised by all of them, and
    the result, a function of the texts, is the same.
    """
    task, cfg = task_of(planned.cfg), planned.cfg.tokenizer
    if task.texts is None or planned.tokenizer:
        return planned.tokenizer
    note(f"training a tokenizer of {cfg.vocab_size:,} ids")
    records = itertools.chain.from_iterable(split.train for split in found if isinstance(split, registry.Split))
    texts = itertools.chain.from_iterable(map(task.texts, records))
    trained = dataclasses.replace(task.vocabulary.train(texts, cfg), extra_ids=cfg.extra_ids)
    task.check_tokenizer(planned.cfg, trained)
    return trained


def _find_tokenizer(cfg: Config, workdir: Path | None, init: init_from.Source | None) -> Tokenizer | None:
    """The run's own tokenizer, else `tokenizer.path`, else that of `init_from`; refuses two that differ.

    Args:
      cfg: of the run.
      workdir: the run's folder; None before its first checkpoint, as a tokenizer left there by a start that failed may
        be of another config.
      init: the checkpoint that `init_from` names.

    Raises:
      ConfigError: naming both files, or the run whose tokenizer is missing.
    """
    vocabulary = task_of(cfg).vocabulary
    candidates: list[Any] = []
    if workdir:
        candidates.append(_tokenizer_path(checkpoint.list_saved(workdir), workdir, vocabulary.find))
    if cfg.tokenizer.path:
        candidates.append(epath.Path(cfg.tokenizer.path))
        if not candidates[-1].exists():
            expected = "the file or folder of a tokenizer, such as RUN/tokenizer.model"
            raise ConfigError(f"'tokenizer.path': no file {cfg.tokenizer.path}; expected {expected}")
    if cfg.data.format == "prepared":
        candidates += [
            vocabulary.find(epath.Path(source.path).expanduser())
            for source in input_pipeline.by_source(cfg.data).values()
        ]
        if missing := [path for path in candidates if not path.exists()]:
            raise ConfigError(f"no {missing[0]}: the prepared data cannot be read without its tokenizer; put it back")
    if isinstance(init, checkpoint.Saved):
        candidates.append(_tokenizer_path([init], init.path.parent.parent, vocabulary.find))
    elif init and not cfg.tokenizer.path:
        candidates.append(epath.Path(init.tokenizer_path))
    found = {path: vocabulary.load(path) for path in candidates if path.exists()}
    if (init or workdir) and not found:
        raise ConfigError(f"no {candidates[-1]}: the checkpoint cannot be used without its tokenizer; put it back")
    hashes = {str(path): each.hash for path, each in found.items()}
    if isinstance(init, checkpoint.Saved):
        hashes[str(init.path)] = init.info.get("tokenizer_hash", "")
    if len(set(hashes.values())) > 1:
        listed = "\n".join(f"  {sha[:12]}  {path}" for path, sha in hashes.items())
        raise ConfigError(
            f"the tokenizers differ, so that the same ids would stand for different text:\n{listed}\n"
            "use one of them everywhere"
        )
    chosen = next(iter(found.values()), None)
    if chosen is None:
        return None
    if cfg.tokenizer.chat_template and not workdir:  # a run that has begun keeps its own copy
        chosen = _with_chat_template(chosen, epath.Path(cfg.tokenizer.chat_template))
    chosen = dataclasses.replace(chosen, extra_ids=cfg.tokenizer.extra_ids)
    task_of(cfg).check_tokenizer(cfg, chosen)
    return chosen


def _with_chat_template(tokenizer: Any, path: Any) -> Any:
    """The tokenizer with the chat template of a file. Raises ConfigError if that cannot be."""
    if not hasattr(tokenizer, "with_chat_template"):
        raise ConfigError(
            f"'tokenizer.chat_template' is {path}, but a tokenizer that this project trained writes turns with its own "
            "symbols; set it to ''"
        )
    try:
        return tokenizer.with_chat_template(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"'tokenizer.chat_template': {path} cannot be read: {error}; give a .jinja file") from None


def _tokenizer_path(saved: Sequence[checkpoint.Saved], workdir: Any, find: Callable[[Any], Any]) -> Any:
    """Where to read a run's tokenizer: its folder or, if a file is missing or damaged, the newest checkpoint with it.

    Args:
      saved: checkpoints of the run, ascending; those of older versions have no tokenizer, and are no help.
      workdir: the run's folder.
      find: of `lm.tasks.base.Vocabulary`.
    """
    for each in reversed(saved):
        names = each.info.get("files", {})
        try:
            contents = {name: checkpoint.read_file(each, name) for name in names}
        except CheckpointError:
            continue
        wrong = [name for name in names if not _has_content(workdir / name, contents[name])]
        if wrong:
            found = f"not the one saved with step {each.step}" if (workdir / wrong[0]).exists() else "missing"
            checkpoint.warn(f"{workdir / wrong[0]} is {found}; it is read from {each.path}")
        if names:
            return find(each.path if wrong else workdir)
    return find(workdir)


def _has_content(path: Any, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() == content


def _anchored(cfg: Config, abstract_params: Any) -> dict[str, bool] | None:
    """Of which parameters the state keeps the initial values.

    Of all of them, where the task's loss reads them; else of those that `l2_sp` and `mixout` pull back: those read from
    `init_from`, not a newly initialised head.

    A function of the config alone, so that a resumed run, which no longer reads `init_from`, agrees.

    Raises:
      ConfigError: `init_rules` that do not fit; nothing to pull back to; the optimizer pulls back beside the loss.
    """
    actions = param_paths.match_rules(cfg.init_rules, list(param_paths.flatten(abstract_params)), "init_rules")
    wanted = [f"'optim.{name}'" for name, value in (("l2_sp", cfg.optim.l2_sp), ("mixout", cfg.optim.mixout)) if value]
    if task_of(cfg).needs_start:
        if wanted:
            raise ConfigError(
                f"{wanted[0]} is set, but the loss of task.name={cfg.task.name} already compares with the initial "
                "parameters; set it to 0"
            )
        return dict.fromkeys(actions, True)
    if not wanted:
        return None
    anchored = {path: bool(cfg.init_from) and action != init_from.REINIT for path, action in actions.items()}
    if not any(anchored.values()):
        raise ConfigError(
            f"{wanted[0]} pulls parameters back to their values in 'init_from', but no parameter is read from there: "
            f"set 'init_from', or {wanted[0]} to 0"
        )
    return anchored


class Stream(NamedTuple):
    """The training examples of a run, counted from its first step.

    Attributes:
      start_step: the first step to take from the stream.
      start_example: the examples consumed before it.
      batch_size: examples of each step from then on; those before may have had another size.
      total_examples: of the whole run, which says where the later stages of a mixture begin.
      offsets: see `lm.data.loader.offsets`.
    """

    start_step: int
    start_example: int
    batch_size: int
    total_examples: int
    offsets: tuple[int, ...] = ()

    def consumed_by(self, step: int) -> int:
        """Examples consumed when `step` steps are done."""
        return self.start_example + (step - self.start_step) * self.batch_size


def training_stream(run: Run, start_step: int = 0, position: resume.Position = resume.START) -> Stream:
    """The stream of a run from a position in it."""
    batch_size = run.cfg.data.batch_size
    total = position.example + (run.program.total_steps - start_step) * batch_size
    offsets: tuple[int, ...] = ()
    if position.sources is not None:
        offsets = loader.offsets(run.data, position.sources, position.example, total)
    return Stream(start_step, position.example, batch_size, total, offsets)


def train_batches(run: Run, stream: Stream | None = None) -> loader.PrefetchIterator:
    """This process's rows of the training batches; None = those of a run from its start."""
    stream = stream or training_stream(run)
    return loader.train_batches(
        run.data,
        batch_size=stream.batch_size,
        start_example=stream.start_example,
        local_rows=sharding.local_rows(run.mesh, stream.batch_size),
        seed=run.cfg.seed,
        total_examples=stream.total_examples,
        offsets=stream.offsets,
    )


def consumed(run: Run, stream: Stream, step: int) -> dict[str, dict[str, float]]:
    """Source -> examples, tokens (positions of their rows) and epochs that the first `step` steps took from it."""
    used = loader.consumed(run.data, stream.consumed_by(step), stream.total_examples, stream.offsets)
    return {name: {**each, "tokens": each["examples"] * run.cfg.data.seq_len} for name, each in used.items()}


def eval_rows(run: Run, part: loader.Part) -> tuple[np.ndarray, Any]:
    """The held-out rows that an evaluation reads, int64 [n], and this process's rows of the batches of them."""
    limits = {"max_tokens": run.cfg.eval.max_tokens, "seq_len": run.cfg.data.seq_len}
    batch_size = program_lib.eval_batch_size(run.cfg)
    local_rows = sharding.local_rows(run.mesh, batch_size)
    batches = loader.eval_batches(part, batch_size=batch_size, local_rows=local_rows, **limits)
    return loader.eval_row_ids(part, **limits), batches


def flops_per_token(run: Run) -> dict[str, float | None]:
    """Model FLOPs of training on a token, with attention counted in full ('mfu') or as its causal half ('mfu_causal').

    Empty for models that do not predict a token at each position, or compute a position more than once.
    """
    cfg, tokenizer = run.cfg, run.plan.tokenizer
    if tokenizer is None or not predicts_tokens(cfg):
        return {}
    return {
        name: flops.train_flops_per_token(cfg.model, cfg.data.seq_len, tokenizer.vocab_size, causal_half=half)
        for name, half in (("mfu", False), ("mfu_causal", True))
    }


def placer(mesh: Mesh, batch_size: int) -> Callable[[dict[str, np.ndarray]], Batch]:
    """A function that makes global arrays of this process's rows of a batch."""
    rows = sharding.local_rows(mesh, batch_size)
    return lambda batch: sharding.to_global(batch, rows, batch_size, mesh)


def load_model(name: str) -> tuple[Config, ModelFns, Any, Any]:
    """A trained model: its config, functions, parameters (the average where the run keeps one) and tokenizer (None
    where its task reads no text), on one device.

    Args:
      name: 'RUN', 'RUN@best' or 'RUN@STEP'.

    Raises:
      CheckpointError: no such checkpoint, or none of those that the name stands for can be read.
    """
    return load_checkpoint(name)[1]


def load_checkpoint(name: str) -> tuple[checkpoint.Saved, tuple[Config, ModelFns, Any, Any]]:
    """The checkpoint that `name` stands for, and its model, as `load_model`."""

    def read(saved: checkpoint.Saved) -> tuple[Config, ModelFns, Any, Any]:
        cfg = build_saved_config(saved.info["config"])
        compilation_cache.use("auto")  # what a run says of itself is not where code is read from
        exactly = f"{saved.path.parent.parent}@{saved.step}"
        changes: dict[str, Any] = {"init_from": exactly, "init_rules": ((".*", init_from.KEEP),)}
        planned, model, params = init_model(dataclasses.replace(cfg, **changes))
        return cfg, model, params, planned.tokenizer

    chosen = checkpoint.choose(name)
    return checkpoint.first_readable([chosen, *chosen.fallbacks], read)


def init_model(cfg: Config) -> tuple[Plan, ModelFns, Any]:
    """The model of a config, its parameters initialised or read as `init_from` and `init_rules` say, on one device.

    Raises:
      ConfigError, CheckpointError: as `plan`; a damaged checkpoint.
    """
    # Copies of both lie in a run's folder; a published model's folder may have neither.
    own: dict[str, Any] = {} if cfg.init_from.startswith(hf.PREFIX) else {"path": "", "chat_template": ""}
    planned = plan(dataclasses.replace(cfg, tokenizer=dataclasses.replace(cfg.tokenizer, **own)), None)
    mesh = mesh_lib.make_mesh(MeshConfig(), jax.devices()[:1])
    replicated = sharding.replicated(mesh)
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated), planned.abstract_params
    )
    model = program_lib.make_model(planned.cfg, program_lib.compute_dtype(cfg.model.dtype, mesh))
    params, _ = init_from.initialize(model, abstract, cfg.seed, planned.init, planned.origin_of, planned.words)
    return planned, model, params


def check_new(out: Path) -> None:
    """Raises ConfigError for a file, or a folder that holds more than a lease."""
    if out.is_file() or any(not lease.is_lease(path.name) for path in out.glob("*")):
        raise ConfigError(f"{out} exists already; name a new folder")


def write_checkpoint(
    out: Path,
    cfg: Config,
    params: Any,
    tokenizer: Tokenizer | None,
    step: int,
    info: Mapping[str, Any],
    metrics: Mapping[str, float] | None = None,
) -> int:
    """Writes a new run folder with one checkpoint, of parameters alone.

    Args:
      out: the folder.
      cfg: the config of the run.
      params: its parameters.
      tokenizer: its tokenizer, if it has one.
      step: of the checkpoint.
      info: what the checkpoint says beside the config: 'tokenizer_hash', 'data'.
      metrics: of an evaluation of these parameters.

    Returns:
      The size of the parameters, in bytes.

    Raises:
      ConfigError: the folder holds something already.
    """
    files = tokenizer.saved_files if tokenizer else {}
    with lease.hold(out) as check_lease:
        check_new(out)
        if tokenizer:
            tokenizer.save(out / tokenizer.file)
        write_atomic(out / "config.json", config.to_json(cfg))
        with checkpoint.Checkpoints(out, cfg.checkpoint, check_lease=check_lease) as saves:
            saves.save(step, {"params": params}, {**info, "config": schema.to_dict(cfg)}, metrics, files)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))
