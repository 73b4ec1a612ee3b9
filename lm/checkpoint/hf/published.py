"""A published model as something that a run can start from: its shape, and its parameters read to where they belong."""

import dataclasses
import functools
import itertools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import param_paths
from lm.checkpoint.hf import adapter as adapter_lib
from lm.checkpoint.hf import families, files, gguf
from lm.checkpoint.hf.families import Family, Tensor
from lm.checkpoint.hf.files import Tensors
from lm.checkpoint.store import CheckpointError, fingerprints, named_leaves
from lm.config import AdapterConfig, Config, ModelConfig
from lm.config.schema import ConfigError
from lm.config.sections import TaskConfig
from lm.data import published_tokenizer
from lm.data.tokenizer_protocol import Tokenizer
from lm.models import registry
from lm.types import Head, ModelFns

PREFIX = "hf:"  # of `init_from`
_GENERATION = "generation_config.json"
_ROWS = 4096  # of two tensors that are compared at once


@dataclasses.dataclass(frozen=True)
class _ImageTask(TaskConfig):
    """What a model of images reads of a task."""

    image_shape: tuple[int, int, int] = (0, 0, 0)


@dataclasses.dataclass(frozen=True)
class Published:
    """A published model whose files were checked against the table of its family; no tensor is read yet.

    Attributes:
      tensors: the files.
      family: the family.
      model: the shape of the run's model, resolved; with more rows of vocabulary than the files have, if it asks for
        them.
      vocab_size: rows of vocabulary in the files.
      table: parameter -> its entry in the family's table, with the names that these files use.
      shapes: parameter -> shape.
      adapter: LoRA that is added to it, by a folder of `peft`; None = none.
      base_path: the published model without it.
      fingerprints: parameter -> the fingerprint that the base must have, as far as the adapter's folder says.
      task: option -> value, of a task on images; {} for a model of text.
      says_pixels: whether the folder says how pixels are normalised.
    """

    tensors: Tensors
    family: Family
    model: ModelConfig
    vocab_size: int
    table: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    adapter: AdapterConfig | None
    base_path: Path
    fingerprints: dict[str, int]
    task: dict[str, Any] = dataclasses.field(default_factory=dict)
    says_pixels: bool = False

    @property
    def path(self) -> Path:
        """The folder, or the GGUF file."""
        return self.tensors.path

    @property
    def tokenizer_path(self) -> Path:
        """Where its tokenizer is: with the adapter, if there is one, else with the base."""
        return self.path if self.adapter and published_tokenizer.has_files(self.path) else self.base_path

    @property
    def label(self) -> str:
        """Its name in the parameter table."""
        return f"{PREFIX}{self.path.name}"

    @property
    def info(self) -> dict[str, Any]:
        """The parameters it has, in the form of `lm.checkpoint.Saved`."""
        return {"arrays": {f"params/{path}": {"shape": list(self.shapes[path])} for path in self.table}}

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises ConfigError if the model's decoder starts from another id than the tokenizer's, or its padding is one.

        The start of an encoder-decoder's decoder is what config.json says, else generation_config.json, else the
        padding. A RoBERTa's padding says from which row its positions count.
        """
        theirs, where = self.tensors.config, self.tensors.config_path
        if self.model.kind == "encoder_decoder":
            start, key = theirs.get("decoder_start_token_id"), "decoder_start_token_id"
            if start is None and (where.parent / _GENERATION).is_file():
                start = files.read_json(where.parent, _GENERATION).get(key)
                where = where.parent / _GENERATION if start is not None else where
            if start is None:
                start, key = theirs.get("pad_token_id", 0), "no decoder_start_token_id, so that pad_token_id"
            if start != tokenizer.bos_id:
                raise ConfigError(
                    f"{where}: {key} is {start!r}, but decoders here start from id "
                    f"{tokenizer.bos_id}, {tokenizer.piece(tokenizer.bos_id)!r}: the tokenizer's cls_token, else its "
                    "bos_token, else its pad_token; name the token of that id as cls_token in tokenizer_config.json"
                )
        if self.model.unused_positions not in (0, tokenizer.pad_id + 1):
            raise ConfigError(
                f"{where}: positions count from the row after pad_token_id, {self.model.unused_positions - 1}, but the "
                f"tokenizer pads with id {tokenizer.pad_id}, {tokenizer.piece(tokenizer.pad_id)!r}, so that the run "
                "could not be exported; name the token of that id as pad_token in tokenizer_config.json"
            )

    def report(self) -> str:
        """What the shape of a run's model is, as read from config.json, for the console."""
        usual = families.differences(self.model, ModelConfig())
        taken = ", ".join(f"{key}={mine!r}" for key, (mine, _) in usual.items())
        lines = [f"  model.* from {self.tensors.config_path}, a {self.family.model_type}: {taken}; others: defaults"]
        if self.task:
            lines.append("  task.* from it: " + ", ".join(f"{key}={value!r}" for key, value in self.task.items()))
            rows = ", ".join(f"model.{key}={getattr(self.model, key)!r}" for key in families.PIXELS)
            where = (
                f"from {self.base_path / families.PREPROCESSOR}, which may resize images: here they must have the size"
            )
            lines.append(f"  {rows} {where if self.says_pixels else f'as in the config: no {families.PREPROCESSOR}'}")
        if self.adapter:
            own = f"rank {self.adapter.rank}, alpha {self.adapter.alpha:g}, on {self.adapter.targets}"
            lines.append(f"  adapter.* from {self.path / adapter_lib.CONFIG}: LoRA of {own}")
        if unknown := families.not_read(self.family, self.tensors.config):
            lines.append(f"  keys of it that are not read: {', '.join(unknown)}")
        return "\n".join(lines)


def open_model(path: Any, model: ModelConfig | None = None) -> Published:
    """Opens a published model, and checks names and shapes of all its tensors.

    Args:
      path: a folder, a GGUF file, or OWNER/NAME in the hub's cache; or a folder of `peft`, with LoRA for the published
        model that it names or, as 'FOLDER,BASE', for this one.
      model: the `model` of the run's config; None = as the folder has it.

    Raises:
      CheckpointError: the folder is no model of a supported family, or its files are damaged or do not fit config.json.
      ConfigError: the run's config asks for another model.
    """
    folder, base = parts(str(path))
    path = files.locate(folder) or Path(folder)
    path = path if path.suffix == ".gguf" else files.snapshot(path)
    if (path / adapter_lib.CONFIG).exists() or base:
        adapter = adapter_lib.open_folder(path, base)
        return _with_adapter(_open_whole(adapter.base, model), adapter)
    return _open_whole(path, model)


def parts(path: str) -> tuple[str, str]:
    """(FOLDER, BASE) of 'FOLDER,BASE'; (path, '') of a path without a base, also of one that has a comma."""
    folder, _, base = (path, "", "") if files.locate(path) else path.partition(",")
    return folder, base


def _open_whole(path: Path, model: ModelConfig | None) -> Published:
    """As `open_model`, of a folder that has the whole model."""
    tensors = gguf.open_file(path) if path.suffix == ".gguf" else files.open_folder(path)
    where = tensors.config_path
    family = families.of_config(tensors.config, where)
    there = families.model_of(family, tensors.config, where)
    task, pixels = {}, {}
    if there.kind in families.IMAGE_MODELS:
        task = families.images_of(tensors.config, there, where)
        if (where.parent / families.PREPROCESSOR).is_file():
            found = files.read_json(where.parent, families.PREPROCESSOR)
            pixels = families.pixels_of(found, where.parent / families.PREPROCESSOR)
        elif model:
            pixels = {key: getattr(model, key) for key in families.PIXELS}
        if (count := len(pixels.get("pixel_mean", (0,)))) not in (1, channels := task["image_shape"][2]):
            raise CheckpointError(
                f"{where}: num_channels is {channels}, but pixels are normalised by {count} values, of "
                f"{families.PREPROCESSOR} or model.pixel_mean; expected one for each channel"
            )
    there = dataclasses.replace(there, **pixels)
    try:
        shapes = _parameters(there, task)
    except (TypeError, ValueError, ArithmeticError) as error:  # sizes that fit no array
        raise CheckpointError(f"{where}: {error}") from None
    table, shapes = _check(tensors, family, there, shapes)
    wanted = there if model is None else families.adopt(model, there, tensors.path)
    says = (where.parent / families.PREPROCESSOR).is_file()
    return Published(tensors, family, wanted, there.vocab_size, table, shapes, None, tensors.path, {}, task, says)


def _with_adapter(base: Published, adapter: adapter_lib.Adapter) -> Published:
    """A published model with LoRA, and with the heads of the adapter's folder instead of its own."""
    own = adapter.tensors
    cfg, table, shapes = adapter_lib.table(adapter, base.family, base.model, base.shapes)
    missing, used = _match(own, table, shapes, set(own.shapes), base.family)
    if missing:
        path = min(missing)
        raise CheckpointError(
            f"{own.path / adapter_lib.WEIGHTS} has no tensor '{table[path].name.format(0)}'; copy the folder again"
        )
    _refuse_unexpected(own, set(own.shapes) - used, base.family)

    def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
        return (own if name in own.shapes else base.tensors).read(name, index)

    tensors = dataclasses.replace(base.tensors, path=own.path, read=read)
    return dataclasses.replace(
        base,
        tensors=tensors,
        table=base.table | table,
        shapes=base.shapes | shapes,
        adapter=cfg,
        fingerprints=adapter.fingerprints,
    )


def functions(model: ModelConfig, task: dict[str, Any], head: Head | None = None) -> ModelFns:
    """The functions of a model, float32; `task`: `Published.task`."""
    own = _ImageTask(image_shape=task["image_shape"]) if task else TaskConfig()
    return registry.MODELS[model.kind](Config(model=model, task=own), head, jnp.float32)


def _parameters(model: ModelConfig, task: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Parameter -> shape."""
    fns = functions(model, task)
    abstract = jax.eval_shape(fns.init, jax.eval_shape(lambda: jax.random.key(0)))
    return {path: leaf.shape for path, leaf in param_paths.flatten(abstract).items()}


def _check(
    tensors: Tensors, family: Family, model: ModelConfig, shapes: dict[str, tuple[int, ...]]
) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]:
    """The family's table with the names of these files, and the shapes of its parameters; without the parameters that
    the files lack, with those of a task's head that they have.

    Raises:
      CheckpointError: a tensor that no parameter takes, one of another shape, some layers' tensors of a parameter are
        missing, or a tensor differs from the one that it repeats, such as a head from the embedding it is tied to.
    """
    table = {entry.path: entry for entry in family.tensors(model)}
    assert table.keys() == shapes.keys(), sorted(table.keys() ^ shapes.keys())
    found = {name for name in tensors.shapes if not re.fullmatch(family.ignored, name)}
    for entry in family.optional:
        if _named(entry, family, found).name in found:
            table[entry.path] = entry
    table = {path: _named(entry, family, found) for path, entry in table.items()}
    shapes = shapes | {
        path: tensors.shapes[entry.name][:: -1 if entry.transposed else 1]
        for path, entry in table.items()
        if path not in shapes
    }
    missing, used = _match(tensors, table, shapes, found, family)
    for name, path in family.repeats.items():
        if name in found - used and path in table.keys() - missing:
            _check_repeated(tensors, name, table[path].name, family)
            used.add(name)
    _refuse_unexpected(tensors, found - used, family)
    return {path: entry for path, entry in table.items() if path not in missing}, shapes


def _match(
    tensors: Tensors,
    table: dict[str, Tensor],
    shapes: dict[str, tuple[int, ...]],
    found: set[str],
    family: Family,
) -> tuple[set[str], set[str]]:
    """Parameters of the table of which there is no tensor, and the tensors of the others.

    Raises:
      CheckpointError: some layers of a parameter are missing, or a tensor has another shape.
    """
    missing, used = set(), set()
    for path, entry in table.items():
        shape = shapes[path][1:] if "{}" in entry.name else shapes[path]
        # One more than there are is enough to find one that is absent, however many config.json asks for.
        names = list(itertools.islice(_names(entry, shapes[path]), len(found) + 1))
        absent = [name for name in names if name not in found]
        if len(absent) == len(names):
            missing.add(path)
            continue
        if absent:
            raise CheckpointError(
                f"{tensors.path} has no tensor '{absent[0]}', which a {family.model_type} of {shapes[path][0]} "
                "layers has; download it again"
            )
        for name in names:
            expected = entry.file_shape(shape)
            if tensors.shapes[name] != expected:
                raise CheckpointError(
                    f"{tensors.places[name]} has shape {list(tensors.shapes[name])}; the sizes in "
                    f"{tensors.config_path.name} need {list(expected)}"
                )
            used.add(name)
    return missing, used


def _refuse_unexpected(tensors: Tensors, left: set[str], family: Family) -> None:
    """Raises CheckpointError if any tensor is left that no parameter takes."""
    if left:
        raise CheckpointError(
            f"{tensors.places[min(left)]} is no tensor of a {family.model_type} as {tensors.config_path.name} "
            f"describes it ({len(left)} such tensors)"
        )


def _named(entry: Tensor, family: Family, found: set[str]) -> Tensor:
    """The entry with the name that its tensor has in files with the tensors `found`."""
    name = entry.name
    if not any(each.startswith(family.prefix) for each in found):  # saved without a head
        name = name.removeprefix(family.prefix)
    for now, before in family.older.items():
        if not any(now in each for each in found):
            name = name.replace(now, before)
    return entry._replace(name=name)


def _check_repeated(tensors: Tensors, name: str, first: str, family: Family) -> None:
    """Raises CheckpointError for a tensor that is not that of the name `first`, to which config.json ties it."""
    may_differ = family.keys.get("tie_word_embeddings") == "tie_embeddings"
    rows, *others = shape = tensors.shapes[first]

    def same(start: int) -> bool:
        part = (slice(start, min(start + _ROWS, rows)), *(slice(0, size) for size in others))
        one, two = (tensors.read(each, part).astype(np.float32) for each in (name, first))
        return np.array_equal(one, two, equal_nan=True)

    if tensors.shapes[name] != shape or not all(map(same, range(0, rows, _ROWS))):
        raise CheckpointError(
            f"{tensors.places[name]} differs from '{first}', to which {tensors.config_path} ties it; "
            + ("set its tie_word_embeddings to false" if may_differ else "download the files of one model again")
        )


def _names(entry: Tensor, shape: tuple[int, ...]) -> Any:
    """The tensors of a parameter, in the order of its layers."""
    return (entry.name.format(layer) for layer in range(shape[0])) if "{}" in entry.name else iter([entry.name])


def load(published: Published, abstract: Any) -> Any:
    """Reads parameters, each device only its own slices.

    Args:
      published: from `open_model`.
      abstract: {'params': parameters}, a nested dict of `jax.ShapeDtypeStruct` with shardings.

    Raises:
      CheckpointError: a tensor has a dtype that is not read, or is not that of the base of an adapter.
    """

    def one(name: str, leaf: Any) -> jax.Array:
        path = name.removeprefix("params/")
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, functools.partial(_slice, published, path))

    leaves = {name: one(name, leaf) for name, leaf in named_leaves(abstract).items()}
    expected = {path: value for path, value in published.fingerprints.items() if f"params/{path}" in leaves}
    found = fingerprints({path: leaves[f"params/{path}"] for path in expected})
    if wrong := [path for path, value in expected.items() if int(found[path]) != value]:
        raise CheckpointError(
            f"{published.base_path} is not the base of {published.path}: '{wrong[0]}' differs ({len(wrong)} of "
            f"{len(expected)} parameters); name the right one as {published.path},BASE"
        )
    return param_paths.unflatten(leaves)


def _slice(published: Published, path: str, index: tuple[slice, ...]) -> np.ndarray:
    """A slice of a parameter, float32."""
    shape, entry = published.shapes[path], published.table[path]
    whole = tuple(slice(*each.indices(size)[:2]) for each, size in zip(index, shape, strict=True))
    out = np.empty([each.stop - each.start for each in whole], np.float32)
    if "{}" not in entry.name:
        _fill(published, entry, entry.name, whole, shape, out)
        return out
    for row, layer in enumerate(range(whole[0].start, whole[0].stop)):
        _fill(published, entry, entry.name.format(layer), whole[1:], shape[1:], out[row])
    return out


def _fill(
    published: Published, entry: Tensor, name: str, index: tuple[slice, ...], shape: tuple[int, ...], out: np.ndarray
) -> None:
    """Reads slices of one tensor into `out`."""
    out[...] = entry.from_file(published.tensors.read(name, entry.file_index(index, shape)), index)
