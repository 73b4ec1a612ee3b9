"""Initialises a run with the parameters of another, or of a published model. Rules over parameter paths say which are
read and from where."""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm import param_paths
from lm.checkpoint import hf, store
from lm.checkpoint.store import CheckpointError, Saved
from lm.config import ModelConfig, schema
from lm.config.schema import ConfigError, nearest
from lm.types import ModelFns, Params

KEEP, REINIT = "keep", "reinit"
Source = Saved | hf.Published


def choose(name: str, model: ModelConfig) -> Source:
    """What `init_from` names: a run's checkpoint, or with 'hf:FOLDER' a published model.

    Args:
      name: the value of `init_from`.
      model: the section of the new run's config, which a published model must not contradict.

    Raises:
      CheckpointError, ConfigError: as `lm.checkpoint.choose` and `lm.checkpoint.hf.open_model`.
    """
    try:
        if name.startswith(hf.PREFIX):
            return hf.open_model(name.removeprefix(hf.PREFIX), model)
        return store.choose(name)
    except CheckpointError as error:
        raise CheckpointError(f"'init_from' is {name}: {error}") from None


class Tables(NamedTuple):
    """The parameters that have a row for each id, and the ids of the checkpoint's tokenizer and of this run's.

    Attributes:
      axes: path -> the axis of its ids.
      old: number of ids that the checkpoint was trained with.
      new: number of ids now, of which the first `old` stand for the same text.
    """

    axes: dict[str, int]
    old: int
    new: int

    def resized(self, path: str, there: tuple[int, ...], here: tuple[int, ...]) -> bool:
        """Whether rows of a table are added, begin anew, or are left out; other differences of shapes do not fit."""
        axis = self.axes.get(path)
        if axis is None or len(there) != len(here):
            return False
        others_agree = there[:axis] + there[axis + 1 :] == here[:axis] + here[axis + 1 :]
        return others_agree and (there != here or self.new > self.old)


NO_TABLES = Tables({}, 0, 0)


def tables(logical_axes: Mapping[str, tuple[Any, ...]], old: int, new: int) -> Tables:
    """`Tables` of a model whose logical axes these are."""
    return Tables({path: axes.index("vocab") for path, axes in logical_axes.items() if "vocab" in axes}, old, new)


def resize(table: jax.Array, axis: int, rows: int, old: int) -> jax.Array:
    """A table with `rows` rows along `axis`: its first `old`, as far as they are used, then their mean repeated.

    Rows that begin as the mean are about as likely to be predicted as an average id, and so change the model's other
    predictions little (Hewitt 2021, 'Initializing new word embeddings for pretrained language models').
    """
    kept = jax.lax.slice_in_dim(table, 0, min(old, rows), axis=axis)
    shape = (*table.shape[:axis], rows - kept.shape[axis], *table.shape[axis + 1 :])
    return jnp.concatenate([kept, jnp.broadcast_to(kept.mean(axis, keepdims=True), shape)], axis)


def sources(
    abstract: Params, rules: tuple[tuple[str, str], ...], saved: Source, words: Tables = NO_TABLES
) -> tuple[dict[str, str | None], list[str]]:
    """Decides where each parameter comes from, without reading an array.

    Args:
      abstract: the new model's parameters as `jax.ShapeDtypeStruct`.
      rules: ordered (regex over the new path, action). 'keep' reads the same path, 'reinit' initialises the parameter,
        anything else is the old path to read, in which \\1 stands for the regex's first group. Example, an encoder from
        a decoder: (r'encoder/(.*)', r'decoder/\\1').
      saved: the checkpoint.
      words: the tables that may have another number of rows there.

    Returns:
      (new path -> name of the array in the checkpoint, or None = initialised; old parameters that are not used). An
      averaged parameter ('ema/...', perhaps of the last layers only) is preferred: the old run was evaluated with it.

    Raises:
      ConfigError: a rule matches nothing, or reads a parameter that the checkpoint lacks or has in another shape.
    """
    flat = param_paths.flatten(abstract)
    known = saved.info.get("arrays", {})
    actions = param_paths.match_rules(rules, list(flat), "init_rules")
    out: dict[str, str | None] = {}
    for path, action in actions.items():
        if action == REINIT:
            out[path] = None
            continue
        matched = next(found for pattern, _ in rules if (found := re.fullmatch(pattern, path)))
        try:
            old = path if action == KEEP else matched.expand(action)
        except (re.error, IndexError) as error:
            raise ConfigError(f"'init_rules': {action!r} is no path to read '{path}' from: {error}") from None
        whole = f"params/{old}"
        if whole not in known:
            olds = [n.removeprefix("params/") for n in known if n.startswith("params/")]
            raise ConfigError(
                f"'init_from': {saved.path} has no parameter '{old}' for '{path}'{nearest(old, olds)}; add the rule "
                f"('{path}', '{REINIT}') or ('{path}', OLD_PATH) to 'init_rules'"
            )
        there = tuple(known[whole]["shape"])
        if there != flat[path].shape and not words.resized(path, there, flat[path].shape):
            raise ConfigError(
                f"'init_from': '{path}' has shape {flat[path].shape}, {saved.path} has {there}; "
                f"make the models agree or add the rule ('{path}', '{REINIT}') to 'init_rules'"
            )
        out[path] = f"ema/{old}" if f"ema/{old}" in known else whole
    used = {name.split("/", 1)[1] for name in out.values() if name}
    unused = [n.removeprefix("params/") for n in known if n.startswith("params/")]
    return out, sorted(set(unused) - used)


def initialize(
    model: ModelFns,
    abstract: Params,
    seed: int,
    saved: Source | None,
    origin_of: dict[str, str | None],
    words: Tables = NO_TABLES,
    say: Callable[[str], None] = store.warn,
) -> tuple[Params, dict[str, str]]:
    """Reads the parameters that come from a checkpoint, or from one of its fallbacks, and initialises the others.

    Args:
      model: the new model.
      abstract: its parameters as `jax.ShapeDtypeStruct` with shardings.
      seed: of the initialiser.
      saved: the checkpoint; None = all parameters are initialised.
      origin_of: as `sources` returns it; ignored without a checkpoint.
      words: the tables whose rows are added or left out, see `resize`.
      say: called with a line for each checkpoint that was passed over.

    Returns:
      (parameters, path -> where its value came from, for the parameter table).

    Raises:
      CheckpointError: the checkpoint is damaged, or no parameter is read from it.
    """
    flat = param_paths.flatten(abstract)
    fresh = tuple(path for path in flat if saved is None or origin_of[path] is None)
    made = {}
    if fresh:
        shardings = {path: flat[path].sharding for path in fresh}
        made = jax.jit(_some_of(model.init, fresh), out_shardings=shardings)(jax.random.key(seed))
    origin = {path: "initialised" for path in fresh}
    if saved is None:
        return param_paths.unflatten(made), origin
    names = {path: name for path, name in origin_of.items() if name is not None}
    if not names:
        raise CheckpointError(f"'init_rules' read no parameter from {saved.path}: change them, or set init_from=''")
    known, wanted = saved.info["arrays"], {}
    for path, name in names.items():
        shape, like = tuple(known[name]["shape"]), flat[path]
        is_resized = words.resized(path, shape, like.shape)
        wanted[name] = jax.ShapeDtypeStruct(shape, like.dtype, sharding=_fitting(like.sharding, shape))
        if shape != like.shape and not is_resized:  # the average is of the last layers only
            wanted[name.replace("ema/", "params/", 1)] = like
    tree = param_paths.unflatten(wanted)
    used: Source = saved
    if isinstance(saved, Saved):
        used, state = store.first_readable([saved, *saved.fallbacks], lambda each: store.load(each, tree), say)
    else:
        state = hf.load(saved, tree)
    read = param_paths.flatten(state)

    def value(path: str, name: str) -> jax.Array:
        like = flat[path]
        if words.resized(path, read[name].shape, like.shape):
            options: dict[str, Any] = {"axis": (axis := words.axes[path]), "rows": like.shape[axis], "old": words.old}
            return jax.jit(functools.partial(resize, **options), out_shardings=like.sharding)(read[name])
        if read[name].shape == flat[path].shape:
            return read[name]
        whole = param_paths.replace_last(read[name.replace("ema/", "params/", 1)], read[name])
        return jax.device_put(whole, flat[path].sharding)

    for path, name in names.items():
        kind, old = name.split("/", 1)
        origin[path] = used.label + (" ema" if kind == "ema" else "") + (f" {old}" if old != path else "")
        if words.resized(path, tuple(known[name]["shape"]), flat[path].shape):
            rows = flat[path].shape[words.axes[path]]
            origin[path] += (
                f", rows {words.old:,} to {rows:,} their mean" if rows > words.old else f", first {rows:,} rows"
            )
    return param_paths.unflatten(made | {path: value(path, name) for path, name in names.items()}), origin


@functools.lru_cache(maxsize=4)
def _some_of(
    init: Callable[[jax.Array], Params], paths: tuple[str, ...]
) -> Callable[[jax.Array], dict[str, jax.Array]]:
    """(key) -> the parameters at some paths. The same function for the same model, so that it is compiled once."""
    return lambda key: {path: leaf for path, leaf in param_paths.flatten(init(key)).items() if path in paths}


def _fitting(sharding: Any, shape: tuple[int, ...]) -> Any:
    """The sharding, or none of the axes where it does not divide the shape."""
    try:
        sharding.shard_shape(shape)
    except ValueError:
        return jax.sharding.NamedSharding(sharding.mesh, jax.P())
    return sharding


def describe(
    origin_of: dict[str, str | None], unused: list[str], saved: Source, old: ModelConfig, model: ModelConfig
) -> str:
    """A report for the console: the parameters that are read, initialised and not used, and other model differences.

    Models of the same shapes may compute different functions, so each key that differs between the checkpoint's model
    `old` and `model` is named.
    """
    read = sum(name is not None for name in origin_of.values())
    fresh = [path for path, name in origin_of.items() if name is None]
    lines = [f"init_from {saved.path}: {read} parameters read"]
    if fresh:
        lines.append(f"  initialised ({len(fresh)}): {', '.join(fresh)}")
    if unused:
        lines.append(f"  not used ({len(unused)}): {', '.join(unused)}")
    if isinstance(saved, hf.Published):
        lines.append(saved.report())
    there = schema.to_dict(old)
    for key, now in schema.to_dict(model).items():
        if there[key] != now:
            lines.append(f"  model.{key}: {there[key]!r} there, {now!r} here")
    return "\n".join(lines)
