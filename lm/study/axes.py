"""Trials from axes: lists of overrides, and the functions that combine them.

An override is a dict of config keys and their values, {"optim.learning_rate": 1e-3}. Two keys are not of the config:
"arm" names the trial's row in the tables, "recipe" replaces the study's recipe. Worked:

    product(arms({"wide": {"model.mlp_dim": 512}, "narrow": {"model.mlp_dim": 128}}), seeds(2)) ->
        [{"arm": "wide", "model.mlp_dim": 512, "seed": 0}, {"arm": "wide", "model.mlp_dim": 512, "seed": 1},
         {"arm": "narrow", "model.mlp_dim": 128, "seed": 0}, {"arm": "narrow", "model.mlp_dim": 128, "seed": 1}]
"""

import builtins
import itertools
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from lm.config.schema import ConfigError

Override = dict[str, Any]


def over(key: str, values: Iterable[Any]) -> list[Override]:
    """One trial for each value of a config key."""
    return [{key: value} for value in values]


def seeds(number: int) -> list[Override]:
    """Seeds 0 to number - 1."""
    return over("seed", range(number))


def arms(named: Mapping[str, Mapping[str, Any]]) -> list[Override]:
    """One trial for each arm: its name -> its overrides."""
    return [{"arm": name, **override} for name, override in named.items()]


def product(*axes: Iterable[Override]) -> list[Override]:
    """Every combination of a trial of each axis; the last axis varies fastest."""
    return [_merged(parts) for parts in itertools.product(*map(list, axes))]


def zip(*axes: Iterable[Override]) -> list[Override]:
    """The first trials of all axes together, then the second ones, ...

    Raises:
      ConfigError: the axes have different lengths.
    """
    listed = [list(axis) for axis in axes]
    if len({len(axis) for axis in listed}) > 1:
        raise ConfigError(f"zip: axes of {', '.join(str(len(axis)) for axis in listed)} trials; expected equal lengths")
    return [_merged(parts) for parts in builtins.zip(*listed, strict=True)]


def chain(*axes: Iterable[Override]) -> list[Override]:
    """The trials of the first axis, then those of the second, ..."""
    return list(itertools.chain(*axes))


def sample(number: int, space: Mapping[str, Any], seed: int = 0) -> list[Override]:
    """Random search: trials whose keys are drawn independently.

    The values of a key depend on the seed and the key alone: another key, or more trials, does not change them.

    Args:
      number: of trials.
      space: config key -> a list to choose from, or a distribution such as `scipy.stats.loguniform(1e-4, 1e-2)`.
      seed: of the draws.
    """
    columns = {}
    for key, choices in space.items():
        rng = np.random.default_rng([seed, zlib.crc32(key.encode())])
        if hasattr(choices, "rvs"):
            columns[key] = [np.asarray(choices.rvs(random_state=rng)).item() for _ in range(number)]
        else:
            columns[key] = [choices[int(rng.integers(len(choices)))] for _ in range(number)]
    return [{key: values[i] for key, values in columns.items()} for i in range(number)]


def when(
    trials: Iterable[Override], condition: Callable[[Override], bool], *axes: Iterable[Override]
) -> list[Override]:
    """The product with `axes` of those trials for which `condition` is true; the others as they are."""
    listed = [list(axis) for axis in axes]
    return [made for trial in trials for made in (product([trial], *listed) if condition(trial) else [trial])]


def _merged(parts: Iterable[Override]) -> Override:
    """One override of several. Raises ConfigError where two of them set a key."""
    merged: Override = {}
    for part in parts:
        if twice := [key for key in part if key in merged]:
            raise ConfigError(
                f"two axes set '{twice[0]}': {merged[twice[0]]!r} and {part[twice[0]]!r}; keep it in one of them"
            )
        merged |= part
    return merged
