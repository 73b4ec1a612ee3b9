"""A study: its trials, tables and claims, read from `experiments/NAME/study.py` and checked before anything runs.

RECIPE = "configs/NAME.py"  # or configs/NAME.py:argument
TABLES = (Table("accuracy", baseline="head"),)
CLAIMS = (better("lora", "head", "accuracy"),)
def trials():
    return product(arms({"head": {...}, "lora": {...}}), seeds(5))
"""

import copy
import dataclasses
import functools
import hashlib
import importlib.util
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from lm.config import Config, flatten, schema
from lm.config.schema import ConfigError
from lm.evaluation import metrics
from lm.study.axes import Override
from lm.study.search import Search, check
from lm.tasks import build_config, default_config

_NOT_CONFIG = ("arm", "recipe")  # keys of an override


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of a study.

    Attributes:
      arm: its row in the tables: runs of an arm differ only in their seed.
      seed: of the config.
      recipe: as --config takes it.
      override: as the study gives it.
      config: what the run is started with.
      hash: of `config`; names the run's folder.
    """

    arm: str
    seed: int
    recipe: str
    override: Override
    config: Config
    hash: str

    def __str__(self) -> str:
        return f"{self.arm}, seed {self.seed}"


@dataclasses.dataclass(frozen=True)
class Table:
    """A table to report: arms by a metric, each compared with a baseline. Its tests are corrected together.

    Attributes:
      metric: key of summary.json; 'test.accuracy' is inside 'test'.
      baseline: the arm that the others are compared with, or arm -> its own; '' = compare none.
      arms: its rows; () = all arms.
      title: '' = what the metric is called.
    """

    metric: str
    baseline: str | Mapping[str, str] = ""
    arms: tuple[str, ...] = ()
    title: str = ""

    def baseline_of(self, arm: str) -> str:
        """The arm that a row is compared with; '' = none."""
        found = self.baseline if isinstance(self.baseline, str) else self.baseline.get(arm, "")
        return "" if found == arm else found


@dataclasses.dataclass(frozen=True)
class Claim:
    """'`first` is better than `second` by `metric`': data reproduces it, contradicts it, or leaves it undecided."""

    first: str
    second: str
    metric: str

    def __str__(self) -> str:
        return f"{self.first} is better than {self.second} by {self.metric}"


def better(first: str, second: str, metric: str) -> Claim:
    """The claim that an arm is better than another; `lm.evaluation.metrics` knows whether less is better."""
    return Claim(first, second, metric)


@dataclasses.dataclass(frozen=True)
class Study:
    """A study, checked.

    Attributes:
      name: of its folder.
      about: its docstring.
      trials: in their order; no two of an arm have one config. Those of a search are found by `lm.study.searching`.
      tables, claims: what to report.
      recipe: as --config takes it.
      search: from which trials are drawn; None = they are given.
    """

    name: str
    about: str
    trials: tuple[Trial, ...]
    tables: tuple[Table, ...]
    claims: tuple[Claim, ...]
    recipe: str = ""
    search: Search | None = None

    @property
    def arms(self) -> list[str]:
        """Names of the arms, in their order."""
        return list(dict.fromkeys(trial.arm for trial in self.trials))

    @property
    def runs(self) -> dict[str, Trial]:
        """Hash -> the first of the trials that share this run."""
        first: dict[str, Trial] = {}
        for trial in self.trials:
            first.setdefault(trial.hash, trial)
        return first


def load(folder: Path) -> Study:
    """The study in a folder.

    Raises:
      ConfigError: it is none, or a trial, table or claim has a mistake; names the trial and the key.
    """
    path = folder / "study.py"
    if not path.is_file():
        raise ConfigError(f"{folder}: expected the folder of a study, with a file study.py")
    module = _module(path)
    search: Search | None = getattr(module, "SEARCH", None)
    for name in ("RECIPE", *([] if search else ["trials"])):
        if not hasattr(module, name):
            what = "a study has RECIPE and trials() or SEARCH, and may have TABLES and CLAIMS"
            raise ConfigError(f"{path} has no {name}; {what}")
    if search and hasattr(module, "trials"):
        raise ConfigError(f"{path} has both SEARCH and trials(); keep one of them")
    tables, claims = tuple(getattr(module, "TABLES", ())), tuple(getattr(module, "CLAIMS", ()))
    if search:
        for override in check(search):
            make_trials(module.RECIPE, [override])
        tables = tables or (Table(search.metric),)
    trials = () if search else make_trials(module.RECIPE, module.trials())
    about = (module.__doc__ or "").strip()
    study = Study(folder.resolve().name, about, trials, tables, claims, module.RECIPE, search)
    named = {f"TABLES[{i}]": [*t.arms, *_baselines(t)] for i, t in enumerate(tables)}
    named |= {f"CLAIMS[{i}]": [claim.first, claim.second] for i, claim in enumerate(claims)}
    measured = {f"TABLES[{i}]": t.metric for i, t in enumerate(tables) if t.baseline}
    measured |= {f"CLAIMS[{i}]": claim.metric for i, claim in enumerate(claims)}
    for where, metric in measured.items():
        if not metrics.is_known(metric.rpartition(".")[2]):
            raise ConfigError(f"{path}: {where}: whether more or less of '{metric}' is better is not known")
    for where, arms in named.items():
        for arm in arms:
            if arm not in study.arms:
                hint = schema.nearest(arm, study.arms)
                raise ConfigError(f"{path}: {where}: no arm '{arm}'{hint}; there are {'; '.join(study.arms)}")
    return study


def _baselines(table: Table) -> list[str]:
    if isinstance(table.baseline, str):
        return [table.baseline] if table.baseline else []
    return [*table.baseline, *table.baseline.values()]


def make_trials(recipe: str, overrides: Iterable[Override]) -> tuple[Trial, ...]:
    """The trials of overrides, each with its config.

    Raises:
      ConfigError: a key, value or recipe that is wrong; names the trial. Or two trials of an arm have one config.
    """
    given = list(overrides)
    if not given:
        raise ConfigError("trials() yields no trial")
    recipes = [override.get("recipe", recipe) for override in given]
    configs = []
    for number, override in enumerate(given):
        try:
            configs.append(configure(recipes[number], override))
        except ConfigError as error:
            raise ConfigError(f"trial {number + 1} of {len(given)}, {in_words(override)}: {error}") from None
    names = _arm_names(given)
    trials, numbers, seeds = [], dict[tuple[str, str], int](), dict[tuple[str, int], int]()
    for number, parts in enumerate(zip(names, recipes, given, configs, strict=True)):
        name, its_recipe, override, config = parts
        trial = Trial(name, config.seed, its_recipe, override, config, hash_of(config))
        first = numbers.setdefault((name, trial.hash), number + 1)
        if first != number + 1:
            raise ConfigError(f"trials {first} and {number + 1} are the same: {in_words(override)}; remove one")
        first = seeds.setdefault((name, config.seed), number + 1)
        if first != number + 1:
            raise ConfigError(
                f"trials {first} and {number + 1} are both '{trial}', with different configs; rename one arm"
            )
        trials.append(trial)
    return tuple(trials)


def configure(recipe: str, override: Mapping[str, Any]) -> Config:
    """The config of a recipe, FILE.py or FILE.py:argument, with the keys of an override. Raises ConfigError."""
    source = copy.deepcopy(_recipe(recipe))
    for key, value in override.items():
        if key in _NOT_CONFIG:
            continue
        *sections, name = key.split(".")
        inner = source
        for depth, section in enumerate(sections):
            if not isinstance(inner.get(section), dict):
                found = ".".join(sections[: depth + 1])
                raise ConfigError(f"unknown config key '{key}': there is no section '{found}'")
            inner = inner[section]
        if isinstance(inner.get(name), dict):
            first = next(iter(inner[name]), "KEY")
            raise ConfigError(f"'{key}' is a section of the config: set its keys, such as '{key}.{first}'")
        inner[name] = value
    return build_config(source)


@functools.cache
def _recipe(recipe: str) -> dict[str, Any]:
    """The nested dict of a recipe, which is read once."""
    path, _, argument = recipe.partition(":")
    if not Path(path).is_file():
        raise ConfigError(f"no recipe {path}; expected the path of a file such as configs/sst2.py, from this folder")
    module = _module(Path(path))
    made = module.get_config(argument) if argument else module.get_config()
    return made.to_dict()


def _module(path: Path) -> ModuleType:
    """The module in a file."""
    spec = importlib.util.spec_from_file_location(f"lm_study_{path.resolve().parent.name}_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _arm_names(overrides: Sequence[Override]) -> list[str]:
    """The arm of each trial: its "arm", and the keys that differ between trials of that name, except the seed."""
    groups: dict[str, list[Override]] = {}
    for override in overrides:
        groups.setdefault(override.get("arm", ""), []).append(override)
    varied = {}
    for name, group in groups.items():
        keys = dict.fromkeys(key for override in group for key in override)
        missing = object()
        varied[name] = [
            key
            for key in keys
            if key not in ("arm", "seed")
            and any(override.get(key, missing) != group[0].get(key, missing) for override in group)
        ]
    names = []
    for override in overrides:
        name = override.get("arm", "")
        differs = {key: override[key] for key in varied[name] if key in override}
        names.append(", ".join(filter(None, (name, in_words(differs)))) or "all")
    return names


def in_words(override: Mapping[str, Any]) -> str:
    """'key=value, key=value'."""
    return ", ".join(f"{key}={value}" for key, value in override.items())


OF_TEST = "eval.sets.test."  # begins the keys of a set that no run reads


def hash_of(config: Config) -> str:
    """Names the run of a config: 16 hex digits of the SHA-256 of its keys and values.

    Only keys that differ from their defaults count, so that a key that a later version adds changes no name. A default
    that a later version changes is seen when the run is read, as its whole config is beside it. The set `test`, which
    no run reads, does not count: it can be added to a study that has runs.
    """
    usual = defaults(config.task.name)
    changed = {key: value for key, value in flatten(schema.to_dict(config)) if value != usual.get(key)}
    changed = {key: value for key, value in changed.items() if not key.startswith(OF_TEST)}
    text = json.dumps({"task": config.task.name, **changed}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def defaults(task: str) -> dict[str, Any]:
    """Config key -> its default, for a task."""
    return dict(flatten(default_config(task).to_dict()))
