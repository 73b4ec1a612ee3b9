"""Named evaluation sets: the config by which each is read, packed and scored, its records, and what its metrics are
called.

The set `valid` decides checkpoints and early stopping. It is that of `eval.sets` or of `data.eval_path`; without both,
what `data` holds out of its training records. The set `test` is read by tools/evaluate.py alone: a run only looks
whether it is there, so that nothing can be selected by it. All others are evaluated together with `valid`.

A metric of `valid` has its own name, 'loss'; one of another set has the set's name before it, 'wiki/loss'.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from lm.config import Config, DataConfig, EvalSetConfig, GenerateConfig, LossConfig, schema
from lm.config.schema import NEVER, ConfigError, nearest
from lm.data import splits
from lm.data.readers import registry
from lm.data.record import DataError, Record
from lm.tasks import TASKS, base, build_config, task_of

VALID, TEST = "valid", "test"


class Found(NamedTuple):
    """The records of a set, each with a unique `identity`, and the sha256 (hex) of their content in order."""

    records: list[Record]
    fingerprint: str


def of_files(cfg: Config) -> dict[str, EvalSetConfig]:
    """Name -> set, of all sets that are files of their own; `data.eval_path` is the one named `valid`."""
    data, sets = cfg.data, dict(cfg.eval.sets)
    if data.eval_path and data.format == "tfds":
        sets[VALID] = EvalSetConfig(path=data.path, split=data.eval_path)
    elif data.eval_path:
        sets[VALID] = EvalSetConfig(path=data.eval_path)
    return sets


def to_read(cfg: Config) -> list[str]:
    """Names of the sets of `eval.sets` that a run reads."""
    return [name for name, _ in cfg.eval.sets if name != TEST]


def to_evaluate(cfg: Config) -> list[str]:
    """Names of the sets of each evaluation of a run, `valid` first."""
    return [VALID, *(name for name in to_read(cfg) if name != VALID)]


def config_of(cfg: Config, name: str) -> Config:
    """The config under which a set is read, packed and scored: the run's, with `data` and, if it has one, its task.

    Of the sections that another task reads in its own way it has the run's values as far as the task supports them.

    Args:
      cfg: of the run.
      name: of the set.

    Raises:
      ConfigError: there is no such set of files, or one of its keys does not fit the data.
    """
    sets = of_files(cfg)
    if name not in sets:
        own = " (what the run holds out of 'data.path' is not a file that can be named)" if name == VALID else ""
        known = ", ".join(sets) or "none"
        raise ConfigError(f"no set '{name}' in 'eval.sets'{nearest(name, sets)}; there are: {known}{own}")
    one = sets[name]
    changes: dict[str, Any] = {"max_bad_records": cfg.data.max_bad_records, "eval_path": one.split}
    given = {key: getattr(one, key) for key in ("format", "rename", "separator", "encoding")}
    if one.format:  # the names of fields and the separator of the run's data are of its own format
        changes |= {key: getattr(DataConfig, key) for key in given}
    with _naming(name):
        data = data_at(cfg, one.path, **changes | {key: value for key, value in given.items() if value})
    whole = dataclasses.replace(cfg, data=data, eval=dataclasses.replace(cfg.eval, sets=()))
    if not one.task.name:
        return whole
    task = TASKS[one.task.name]
    packing: Any = data.packing if data.packing in task.packing else task.packing[0]
    overlong: Any = task.overlong[0]
    read = (*task.loss_options, "chunk_len")
    return dataclasses.replace(
        whole,
        task=one.task,
        data=dataclasses.replace(data, packing=packing, overlong=overlong, augment=(), curriculum=NEVER),
        loss=LossConfig(**{key: value for key, value in schema.to_dict(cfg.loss).items() if key in read}),
        train=dataclasses.replace(cfg.train, micro_batches=1),
        generate=GenerateConfig(),
    )


def data_at(cfg: Config, path: str, **changes: Any) -> DataConfig:
    """`config.data` of a run for reading another file: its format and names of fields, unless `changes` has others.

    Args:
      cfg: of the run.
      path: what is read.
      **changes: 'format', and other keys of `data`. The run's `rename`, `separator` and `encoding` are of its own
        format.

    Raises:
      ConfigError: the run's format is not one of files of records, and `changes` names none; an unknown format.
    """
    values = schema.to_dict(cfg.data) | {"max_records": 0, "max_bad_records": 0, "eval_path": "", "replay": 0.0}
    values["eval_fraction"] = cfg.data.eval_fraction or DataConfig.eval_fraction  # of no effect, but 0 is refused
    if changes.get("format", cfg.data.format) != cfg.data.format:
        values |= {"rename": (), "separator": "", "encoding": DataConfig.encoding}
    whole = schema.to_dict(dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, sets=())))
    data = build_config(whole | {"data": values | {"mixture": (), "path": path} | changes}).data
    if data.format not in (*registry.FORMATS, "interactions"):
        raise ConfigError(
            f"the run's 'data.format' is {data.format}, in which no file can be given; set --format to one of "
            f"{', '.join(registry.FORMATS)}"
        )
    if data.eval_path and data.format != "tfds":
        raise ConfigError(f"--split={data.eval_path} is of --format=tfds; with {data.format}, --path names the file")
    return data


def find(cfg: Config, trained_on: Iterable[DataConfig]) -> list[str]:
    """Looks for the files of all sets of `eval.sets`, without opening one.

    Args:
      cfg: of the run.
      trained_on: the data of each of its sources.

    Returns:
      Lines about files that are named twice: by two sets, or by a set and the data of a source, of which some may be
      held out.

    Raises:
      DataError: a set names no file.
    """
    owners: dict[str, list[str]] = {}
    for name, _ in cfg.eval.sets:
        with _naming(name):
            for unit in registry.units(config_of(cfg, name).data):
                owners.setdefault(registry.real(unit), []).append(f"eval.sets.{name}")
    for data in trained_on if owners else ():
        units, held_out = registry.of_files(data), "data.eval_path" if data.eval_path else "what data.path holds out"
        for name, some in (("the training data", units.train), (held_out, units.valid)):
            for place in map(registry.real, some):
                if place in owners:
                    owners[place].append(name)
    return [f"warning: {place} is in {' and in '.join(names)}" for place, names in owners.items() if len(names) > 1]


def load(cfg: Config, note: Callable[[str], None] = lambda _: None) -> dict[str, Found]:
    """Reads the sets of `eval.sets`, all but `test`.

    Args:
      cfg: of the run.
      note: called with lines about what was read.

    Raises:
      DataError: a file cannot be read or has no record.
      ConfigError: the task of a set cannot read its records.
    """
    found = {}
    for name in to_read(cfg):
        own = config_of(cfg, name)
        task = task_of(own)
        with _naming(name):
            notes: list[str] = []
            records = list(registry.stream(own.data, task.wanted(own), notes.append))
            if not records:
                raise DataError(f"data path '{own.data.path}': no record; expected at least one")
            base.check_fields(task, records, TASKS)
        splits.identify(records)
        for line in (f"{len(records):,} records of {own.data.path}", *notes):
            note(f"eval.sets.{name}: {line}")
        found[name] = Found(records, splits.fingerprint(own.data.format, records))
    return found


def loss_unit(cfg: Config, prefix: str) -> str:
    """The unit of a loss of the run, by what stands before its name: '', 'PART', 'SET/' or 'SET/PART'."""
    name, slash, part = prefix.rpartition("/")
    own = dict(cfg.eval.sets).get(name)
    cfg = dataclasses.replace(cfg, task=own.task) if slash and own and own.task.name else cfg
    return base.loss_unit(task_of(cfg), cfg, part)


def named(name: str, values: Mapping[str, float]) -> dict[str, float]:
    """The metrics of a set by the names that they have beside those of the other sets."""
    return {metric if name == VALID else f"{name}/{metric}": value for metric, value in values.items()}


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Names the set in an error of its block."""
    try:
        yield
    except (ConfigError, DataError) as error:
        raise type(error)(f"'eval.sets.{name}': {error}") from None
