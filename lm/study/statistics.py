"""Intervals and tests over seeds, all from scipy: t intervals, paired and Welch's t tests, power; Holm's correction.

Arrays end in the axis S of seeds; the axes before it, such as simulations, are kept.
"""

import functools
import warnings
from typing import Any, Literal, NamedTuple

import numpy as np

from lm.evaluation.uncertainty import LEVEL

ROUNDING = 1e-12  # relative: a spread below is that of floats, such as of .87 - .82 and .83 - .78
ALPHA = 1 - LEVEL  # a difference is significant where its corrected p is below
POWER = 0.8  # of the smallest detectable difference, after Cohen 1988


class Mean(NamedTuple):
    """Mean over seeds, float64 [...], sample standard deviation, and t interval of `LEVEL`; both NaN for one seed."""

    mean: Any
    sd: Any
    low: Any
    high: Any


class Difference(NamedTuple):
    """Mean difference of two arms, float64 [...], NaN where it cannot be tested.

    Attributes:
      test: 'paired' t test over seeds that both have, or 'Welch'.
      mean: first minus second.
      low, high: the t interval of `LEVEL`.
      p: two-sided, not corrected.
      se: standard error of the mean.
      df: degrees of freedom.
    """

    test: Literal["paired", "Welch"]
    mean: Any
    low: Any
    high: Any
    p: Any
    se: Any
    df: Any


def mean_over_seeds(values_S: np.ndarray) -> Mean:
    """The mean of values over seeds, float64 [..., S], S >= 1, with its interval."""
    from scipy import stats

    mean = values_S.mean(axis=-1)
    if values_S.shape[-1] == 1:
        nan = np.full_like(mean, np.nan)
        return Mean(mean, nan, nan, nan)
    sd, se, df = values_S.std(axis=-1, ddof=1), stats.sem(values_S, axis=-1), values_S.shape[-1] - 1
    has_spread = se > ROUNDING * np.abs(values_S).max(axis=-1)
    sd = np.where(has_spread, sd, 0.0)
    low, high = stats.t.interval(LEVEL, df, mean, np.where(has_spread, se, np.nan))
    return Mean(mean, sd, low, high)


def difference(first_S: np.ndarray, second_S: np.ndarray, test: Literal["paired", "Welch"]) -> Difference:
    """Tests whether two arms have one mean (Student 1908; Welch 1947).

    A difference without any spread over seeds has no test: its p and interval are NaN.

    Args:
      first_S, second_S: float64 [..., S], at least two seeds; with 'paired' those of the same seeds, in one order.
      test: which.
    """
    from scipy import stats

    mean = first_S.mean(axis=-1) - second_S.mean(axis=-1)
    if test == "paired":
        spread = np.ptp(first_S - second_S, axis=-1)
    else:
        spread = np.ptp(first_S, axis=-1) + np.ptp(second_S, axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Precision loss", RuntimeWarning)  # where there is no spread, see below
        if test == "paired":
            found = stats.ttest_rel(first_S, second_S, axis=-1)
        else:
            found = stats.ttest_ind(first_S, second_S, axis=-1, equal_var=False)
        low, high = found.confidence_interval(LEVEL)
        se = (high - low) / 2 / stats.t.ppf((1 + LEVEL) / 2, found.df)
    scale = np.maximum(np.abs(first_S).max(axis=-1), np.abs(second_S).max(axis=-1))
    kept = functools.partial(np.where, spread > ROUNDING * scale)
    low, high, p, se = (kept(each, np.nan) for each in (low, high, found.pvalue, se))
    return Difference(test, mean, low, high, p, se, found.df)


def holm(p_T: np.ndarray) -> np.ndarray:
    """Adjusted p values that keep the error of a whole family of tests below alpha (Holm 1979).

    Worked: p = .01, .04, .03 -> in ascending order times 3, 2, 1: .03, .06, .04; none below one before: .03, .06, .06.

    Args:
      p_T: float64 [..., T], of T tests; NaN = a test that cannot be done, which counts as one with p = 1.
    """
    p_T = np.where(np.isnan(p_T), 1.0, p_T)
    order, number = np.argsort(p_T, axis=-1), p_T.shape[-1]
    ascending = np.take_along_axis(p_T, order, axis=-1) * np.arange(number, 0, -1)
    adjusted = np.empty_like(p_T)
    np.put_along_axis(adjusted, order, np.minimum(np.maximum.accumulate(ascending, axis=-1), 1.0), axis=-1)
    return adjusted


def power(effect: float, df: float, alpha: float = ALPHA) -> float:
    """Probability that a two-sided t test finds an effect, given in standard errors: by the noncentral F of t²."""
    from scipy import stats

    # Of scipy 1.17 the noncentral t is NaN where a tail is tiny, and the noncentral F wrong at exactly 0.
    return float(stats.ncf.sf(stats.t.isf(alpha / 2, df) ** 2, 1, df, max(effect**2, 1e-12)))


def detectable(se: float, df: float, tests: int = 1) -> float:
    """The smallest difference that a test finds with probability `POWER`, given the spread that was measured.

    Args:
      se: standard error of the difference.
      df: degrees of freedom.
      tests: of the family: the first step of Holm's correction tests at alpha / tests.

    Returns:
      NaN where there is no test.
    """
    from scipy import optimize, stats

    if not (np.isfinite(se) and se > 0):
        return float("nan")
    alpha = ALPHA / tests
    highest = 10 * float(stats.t.isf(alpha / 2, df)) + 10
    return float(se) * optimize.brentq(lambda effect: power(effect, df, alpha) - POWER, 0.0, highest)
