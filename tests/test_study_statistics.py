"""Intervals and tests: published data, statsmodels where it is installed, and simulations with planted effects."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lm.study.statistics import ALPHA, POWER, detectable, difference, holm, mean_over_seeds, power

SIMULATIONS = 10_000

# Student 1908, additional hours of sleep with two drugs; the figures are those of R 4.3's t.test(extra ~ group).
FIRST = np.array([0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0])
SECOND = np.array([1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4])


@pytest.mark.parametrize(
    ("test", "df", "p", "low", "high"),
    [
        ("paired", 9, 0.002832890, -2.4598858, -0.7001142),
        ("Welch", 17.776474, 0.079394, -3.3654832, 0.2054832),
    ],
)
def test_tests_give_the_published_figures_of_students_sleep_data(test, df, p, low, high):
    found = difference(FIRST, SECOND, test)
    assert found.mean == pytest.approx(-1.58)
    assert found.df == pytest.approx(df, rel=1e-6)
    assert found.p == pytest.approx(p, rel=1e-4)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-6)
    assert found.se == pytest.approx((found.high - found.mean) / stats.t.ppf(0.975, df), rel=1e-6)


def test_the_interval_is_students():
    found = mean_over_seeds(FIRST)
    half = 2.262157 * FIRST.std(ddof=1) / math.sqrt(10)  # t(0.975, 9), from tables
    assert (found.mean, found.sd) == pytest.approx((0.75, 1.789010), abs=1e-6)
    assert (found.low, found.high) == pytest.approx((0.75 - half, 0.75 + half), abs=1e-5)


def test_one_seed_has_a_mean_and_no_interval():
    found = mean_over_seeds(np.array([3.0]))
    assert found.mean == 3 and math.isnan(found.sd) and math.isnan(found.low)


@pytest.mark.parametrize("test", ["paired", "Welch"])
def test_values_without_spread_have_no_test(test):
    found = difference(np.full(5, 0.3), np.full(5, 0.2), test)
    assert found.mean == pytest.approx(0.1) and math.isnan(found.p) and math.isnan(found.low)
    assert math.isnan(detectable(float(found.se), 4))


def test_holm_gives_the_figures_of_r():
    # p.adjust(c(.01, .02, .03, .04, .05), "holm"), and its example in the docstring
    np.testing.assert_allclose(holm(np.array([0.01, 0.02, 0.03, 0.04, 0.05])), [0.05, 0.08, 0.09, 0.09, 0.09])
    np.testing.assert_allclose(holm(np.array([0.01, 0.04, 0.03])), [0.03, 0.06, 0.06])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_rejects_as_its_steps_say(p):
    """Holm 1979, section 3: from the smallest on, reject while p <= alpha / (number of tests left)."""
    order, rejected = sorted(range(len(p)), key=p.__getitem__), set()
    for done, which in enumerate(order):
        if p[which] * (len(p) - done) > ALPHA:
            break
        rejected.add(which)
    assert set(np.flatnonzero(holm(np.array(p)) <= ALPHA).tolist()) == rejected


def test_a_test_that_cannot_be_done_counts_in_the_family():
    np.testing.assert_allclose(holm(np.array([0.02, np.nan])), [0.04, 1.0])


def test_holm_and_power_are_those_of_statsmodels():
    pytest.importorskip("statsmodels", reason="statsmodels is not installed")
    from statsmodels.stats.multitest import multipletests
    from statsmodels.stats.power import TTestPower

    rng = np.random.default_rng(0)
    for number in (1, 2, 7, 40):
        p = rng.random(number) ** 3
        np.testing.assert_allclose(holm(p), multipletests(p, method="holm")[1], rtol=1e-12)
    for seeds in (3, 5, 10):
        for effect in (0.5, 1.5):
            wanted = TTestPower().power(effect, seeds, ALPHA)
            assert power(effect * math.sqrt(seeds), seeds - 1) == pytest.approx(wanted, rel=1e-9)
        wanted = TTestPower().solve_power(nobs=seeds, alpha=ALPHA, power=POWER)
        assert detectable(1 / math.sqrt(seeds), seeds - 1) == pytest.approx(wanted, rel=1e-6)


def test_power_gives_the_published_figures():
    # Cohen 1988, table 2.3.5: two groups of 64, d = .5, alpha = .05 two-sided: .80; to four digits by G*Power 3.1
    assert power(0.5 * math.sqrt(32), 126) == pytest.approx(0.8015, abs=5e-5)
    assert power(0.0, 4) == pytest.approx(ALPHA, rel=1e-6)


@pytest.mark.parametrize("df", [1, 1.7, 2, 4, 9, 30])
@pytest.mark.parametrize("tests", [1, 20])
def test_the_detectable_difference_is_found_with_its_power(df, tests):
    assert power(detectable(0.1, df, tests) / 0.1, df, ALPHA / tests) == pytest.approx(POWER, rel=1e-6)


# --- simulations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_intervals_cover_the_truth_at_their_level(seeds):
    rng = np.random.default_rng(seeds)
    values = rng.normal(0.7, 0.1, (SIMULATIONS, seeds))
    of_mean = mean_over_seeds(values)
    of_difference = difference(values, rng.normal(0.5, 0.1, (SIMULATIONS, seeds)), "paired")
    assert 0.94 <= np.mean((of_mean.low < 0.7) & (of_mean.high > 0.7)) <= 0.96
    assert 0.94 <= np.mean((of_difference.low < 0.2) & (of_difference.high > 0.2)) <= 0.96


@pytest.mark.parametrize(("test", "seeds"), [("paired", 3), ("paired", 5), ("Welch", 5), ("Welch", 10)])
def test_a_table_of_twenty_null_rows_has_an_error_in_at_most_one_of_twenty(test, seeds):
    values = np.random.default_rng(seeds).normal(size=(SIMULATIONS, 21, seeds))
    p = difference(values[:, 1:], values[:, :1].repeat(20, axis=1), test).p
    corrected = holm(p)
    assert np.mean((corrected < ALPHA).any(axis=1)) <= 0.05
    assert np.mean((p < ALPHA).any(axis=1)) > 0.3  # not corrected


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_planted_effects_are_found_at_the_rate_of_theory(seeds):
    rng = np.random.default_rng(seeds)
    first, second = rng.normal(1.5, 1, (SIMULATIONS, seeds)), rng.normal(0, 1, (SIMULATIONS, seeds))
    # In standard errors of a difference of independent values of SD 1. Welch's degrees of freedom are between those of
    # the smaller arm and those of both, so its power is between the two.
    effect = 1.5 / math.sqrt(2 / seeds)
    few, many = power(effect, seeds - 1), power(effect, 2 * seeds - 2)
    for test, low, high in (("paired", few, few), ("Welch", few, many)):
        found = np.mean(difference(first, second, test).p < ALPHA)
        print(f"{test}, {seeds} seeds: power {found:.3f}, theory {low:.3f} to {high:.3f}")
        margin = 4 * math.sqrt(high * (1 - high) / SIMULATIONS)
        assert low - margin <= found <= high + margin


def test_an_effect_of_the_detectable_size_is_found_four_times_of_five():
    rng, seeds = np.random.default_rng(0), 5
    size = detectable(math.sqrt(2 / seeds), seeds - 1)  # of the true spread
    first, second = rng.normal(size, 1, (SIMULATIONS, seeds)), rng.normal(0, 1, (SIMULATIONS, seeds))
    assert np.mean(difference(first, second, "paired").p < ALPHA) == pytest.approx(POWER, abs=0.016)
