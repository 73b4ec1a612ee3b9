"""Search: trials that are drawn one after another, from what the earlier ones have shown.

    SEARCH = Search("nll", 30, {"optim.learning_rate": log_uniform(1e-4, 1e-2), "model.num_layers": integer(2, 8)})

stands in study.py in the place of trials(). What was tried is read from the run directories each time that a trial is
drawn; there is no other memory. So a search that was killed goes on, and several workers see each other's trials.
Draws are random, or by Optuna's TPE (Bergstra et al., 2011), which is installed by the extra `search`.
"""

import dataclasses
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from lm.config.schema import ConfigError
from lm.evaluation import metrics
from lm.study.axes import Override


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included; drawn evenly, or evenly in their logarithm."""

    low: float
    high: float
    is_integer: bool = False
    is_log: bool = False

    def __post_init__(self) -> None:
        if not self.low < self.high or (self.is_log and self.low <= 0):
            above = ", above 0" if self.is_log else ""
            raise ConfigError(f"a range from {self.low} to {self.high}: expected two numbers, the lesser first{above}")

    def ends(self) -> tuple[Any, ...]:
        """Its least and its greatest value."""
        return self.low, self.high

    def draw(self, rng: np.random.Generator) -> Any:
        """A random value."""
        margin = 0.5 if self.is_integer else 0.0
        low, high = self.low - margin, self.high + margin
        value = math.exp(rng.uniform(math.log(low), math.log(high))) if self.is_log else rng.uniform(low, high)
        return min(max(round(value), self.low), self.high) if self.is_integer else float(value)


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of several values: numbers, texts or bools."""

    values: tuple[Any, ...]

    def ends(self) -> tuple[Any, ...]:
        """All of them."""
        return self.values

    def draw(self, rng: np.random.Generator) -> Any:
        """A random one."""
        return self.values[int(rng.integers(len(self.values)))]


def uniform(low: float, high: float) -> Range:
    """Real numbers, drawn evenly."""
    return Range(float(low), float(high))


def log_uniform(low: float, high: float) -> Range:
    """Real numbers, drawn evenly in their logarithm."""
    return Range(float(low), float(high), is_log=True)


def integer(low: int, high: int) -> Range:
    """Whole numbers, drawn evenly."""
    return Range(int(low), int(high), is_integer=True)


def choice(*values: Any) -> Choice:
    """One of these values."""
    return Choice(values)


@dataclasses.dataclass(frozen=True)
class Search:
    """What is searched for, and where.

    Attributes:
      metric: key of summary.json, such as 'best.nll'; whether less is better is known of it.
      trials: how many, those that fail too.
      space: config key -> the values it may have.
      fixed: keys that all trials have beside them.
      sampler: 'random', or 'tpe', which needs Optuna.
      seed: of the draws.
    """

    metric: str
    trials: int
    space: Mapping[str, Range | Choice]
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sampler: Literal["random", "tpe"] = "tpe"
    seed: int = 0


class Seen(NamedTuple):
    """A trial that was drawn: its values of the space, and its result; None = it has none.

    A trial that is neither over nor failed counts as running: its result is still to come.
    """

    params: Mapping[str, Any]
    state: Literal["done", "running", "failed"]
    value: float | None = None


def check(search: Search) -> list[Override]:
    """Trials at the ends of the space, for their configs to be checked.

    Raises:
      ConfigError: the metric, a key, a choice, the sampler or the number of trials is wrong, or Optuna is needed and
        missing.
    """
    if not metrics.is_known(search.metric.rpartition(".")[2]):
        raise ConfigError(f"SEARCH: whether more or less of '{search.metric}' is better is not known")
    if search.trials < 1 or not search.space:
        raise ConfigError("SEARCH: expected trials of at least 1, and a space with a key")
    if twice := sorted(search.space.keys() & search.fixed.keys()):
        raise ConfigError(f"SEARCH: '{twice[0]}' is in its space and fixed; keep it in one of them")
    for key, values in search.space.items():
        if isinstance(values, Choice):
            _check_choice(key, values)
    if search.sampler == "tpe":
        _optuna()
    elif search.sampler != "random":
        raise ConfigError(f"SEARCH: sampler {search.sampler!r}; expected 'random' or 'tpe'")
    first = {key: values.ends()[0] for key, values in search.space.items()}
    return [{**search.fixed, **first, key: value} for key, values in search.space.items() for value in values.ends()]


def _check_choice(key: str, given: Choice) -> None:
    """Raises ConfigError unless JSON gives the values back as they are: drawn trials are read from it."""
    if not given.values:
        raise ConfigError(f"SEARCH: '{key}' has no choice; expected one value or more")
    for value in given.values:
        if not isinstance(value, bool | int | float | str) or (isinstance(value, float) and not math.isfinite(value)):
            raise ConfigError(f"SEARCH: '{key}' has a choice {value!r}; expected a bool, a finite number or a string")


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise ConfigError(
            "SEARCH: the sampler 'tpe' needs Optuna: pip install -e '.[search]'; or set sampler='random'"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def random_draw(search: Search, number: int) -> dict[str, Any]:
    """The values of the random draw of a number: a key's depend on the seed, the number and the key alone."""
    rngs = {key: np.random.default_rng([search.seed, number, zlib.crc32(key.encode())]) for key in search.space}
    return {key: values.draw(rngs[key]) for key, values in search.space.items()}


def suggest(search: Search, seen: Sequence[Seen]) -> dict[str, Any]:
    """The values of the next trial: a function of the search and of what was seen, in its order."""
    if search.sampler == "random":
        return random_draw(search, len(seen))
    optuna = _optuna()
    less = metrics.about(search.metric.rpartition(".")[2]).less_is_better
    # Running trials count as bad ones (constant liar), so that workers do not draw the same values at once.
    sampler = optuna.samplers.TPESampler(seed=search.seed + len(seen), constant_liar=True)
    study = optuna.create_study(sampler=sampler, direction="minimize" if less else "maximize")
    distributions = {key: _distribution(optuna, values) for key, values in search.space.items()}
    states = optuna.trial.TrialState
    for each in seen:
        state = {"done": states.COMPLETE, "running": states.RUNNING, "failed": states.FAIL}[each.state]
        trial = optuna.trial.create_trial(
            state=state, value=each.value, params=dict(each.params), distributions=distributions
        )
        study.add_trial(trial)
    return dict(study.ask(distributions).params)


def _distribution(optuna: Any, values: Range | Choice) -> Any:
    if isinstance(values, Choice):
        return optuna.distributions.CategoricalDistribution(values.values)
    if values.is_integer:
        return optuna.distributions.IntDistribution(int(values.low), int(values.high), log=values.is_log)
    return optuna.distributions.FloatDistribution(values.low, values.high, log=values.is_log)
