"""lm/data/sampler.py: which row an example is, against counting by hand."""

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.data import sampler


@given(percent=st.integers(1, 99), start=st.integers(0, 10**12))
def test_two_streams_are_mixed_exactly(percent, start):
    share = Fraction(str(percent / 100))
    assert share == Fraction(percent, 100)  # 0.29 is not the nearest binary fraction
    mixture = sampler.Mixture((0,), ((1 - share, share),))
    stream_B, place_B = sampler.mixed(mixture, np.arange(250))
    nexts = [0, 0]
    for g in range(250):
        assert place_B[g] == nexts[stream_B[g]]
        nexts[stream_B[g]] += 1
        assert nexts[1] == (g + 1) * percent // 100
    assert sampler.mixed(mixture, np.arange(start, start + 100))[0].sum() == percent  # any 100 in a row, wherever


def test_worked_example_of_a_mixture():
    stream_B, place_B = sampler.mixed(sampler.Mixture((0,), ((Fraction(3), Fraction(2)),)), np.arange(8))
    assert stream_B.tolist() == [0, 0, 1, 0, 1, 0, 0, 1]
    assert place_B.tolist() == [0, 1, 0, 2, 1, 3, 4, 2]


@given(
    stages=st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any), min_size=1, max_size=3),
    lengths=st.lists(st.integers(0, 150), min_size=2, max_size=2),
    order_seed=st.integers(0, 99),
)
def test_each_stage_gives_streams_their_shares_and_uses_every_index_once(stages, lengths, order_seed):
    starts = [0, *np.cumsum(lengths).tolist()][: len(stages)]
    mixture = sampler.Mixture(tuple(starts), tuple(tuple(Fraction(w, 10) for w in weights) for weights in stages))
    stream_B, place_B = sampler.mixed(mixture, np.arange(500))
    for stream in range(3):
        assert place_B[stream_B == stream].tolist() == list(range((stream_B == stream).sum()))
    for n in (0, 1, *starts, 77, 500):
        assert sampler.counts(mixture, n) == np.bincount(stream_B[:n], minlength=3).tolist()
    for start, end, weights in zip(starts, [*starts[1:], 500], stages, strict=True):
        given_out = np.array([np.bincount(stream_B[start:n], minlength=3) for n in range(start, end)]).reshape(-1, 3)
        expected = np.arange(len(given_out))[:, None] * np.array(weights) / sum(weights)
        assert (abs(given_out - expected) < 2).all()
        assert not given_out[:, np.array(weights) == 0].any()
    anyhow = np.random.default_rng(order_seed).permutation(500)
    for whole, alone in zip((stream_B, place_B), sampler.mixed(mixture, anyhow), strict=True):
        np.testing.assert_array_equal(alone, whole[anyhow])


@given(num_rows=st.integers(1, 5000), seed=st.integers(-5, 2**31), epoch=st.integers(0, 2**40))
def test_every_epoch_is_a_permutation(num_rows, seed, epoch):
    index = epoch * num_rows + np.arange(num_rows)
    rows = sampler.epochs(num_rows, seed)(index)
    assert np.array_equal(np.sort(rows), np.arange(num_rows))
    some = np.random.default_rng(0).integers(0, num_rows, 5)
    assert sampler.epochs(num_rows, seed)(index[some]).tolist() == rows[some].tolist()


def test_permutations_of_few_rows_are_uniform():
    """Chi-square over the 24 permutations of four rows, the smallest network that walks."""
    found = Counter(tuple(sampler.epochs(4, seed)(np.arange(4)).tolist()) for seed in range(4800))
    assert len(found) == 24
    assert sum((count - 200) ** 2 / 200 for count in found.values()) < 50  # 23 degrees of freedom: p > 0.001


def test_neighbouring_rows_and_epochs_are_uncorrelated():
    rows = sampler.epochs(10**9, 7)(np.arange(20_000))
    assert len(set(rows.tolist())) == 20_000
    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 0.03 and abs(rows.mean() / 5e8 - 1) < 0.02
    again = sampler.epochs(10**9, 7)(10**9 + np.arange(20_000))
    assert abs(np.corrcoef(rows, again)[0, 1]) < 0.03


def test_streams_are_shuffled_differently():
    own, other = (sampler.epochs(40, 3, stream)(np.arange(80)).tolist() for stream in (0, 1))
    for rows in (own, other):
        assert sorted(rows[:40]) == sorted(rows[40:]) == list(range(40)) and rows[:40] != rows[40:]
    assert own != other and other != sampler.epochs(40, 4, 1)(np.arange(80)).tolist()


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=40),
    until=st.integers(1, 10**6),
    seed=st.integers(-5, 2**31),
    data=st.data(),
)
def test_curriculum_draws_from_the_easiest_share(lengths, until, seed, data):
    rows_of = sampler.easy_first(np.array(lengths), seed, until, lambda index_B: -1 - index_B)
    easiest = sorted(range(len(lengths)), key=lambda row: (lengths[row], row))
    early = np.array(data.draw(st.lists(st.integers(0, until - 1), max_size=9)), np.int64)
    found = rows_of(np.append(early, until + np.arange(3))).tolist()
    for g, row in zip(early.tolist(), found, strict=False):
        share = math.sqrt(0.01**2 + (1 - 0.01**2) * g / until)
        assert row in easiest[: math.ceil(share * len(lengths))]
        assert row == rows_of(np.array([g]))[0]
    assert found[len(early) :] == [-1, -2, -3]


def test_curriculum_draws_uniformly_from_the_share():
    rows, until = 50, 40_000
    lengths = np.random.default_rng(0).permutation(rows)
    rows_of = sampler.easy_first(lengths, 0, until, lambda index_B: index_B)
    early = Counter(lengths[rows_of(np.arange(9_900, 10_100))].tolist())  # half of the rows: sqrt(1/4)
    assert max(early) in (24, 25) and len(early) > 23
    drawn = Counter(rows_of(np.arange(until - 1500, until)).tolist())  # all of the rows
    assert len(drawn) == rows and all(12 < count < 48 for count in drawn.values())
    other_seed = sampler.easy_first(lengths, 1, until, lambda index_B: index_B)
    some = np.arange(30_000, 30_020)
    assert rows_of(some).tolist() != other_seed(some).tolist()


@pytest.mark.parametrize(("progress", "share"), [(0.0, 0.01), (1.0, 1.0), (0.25, math.sqrt(0.0001 + 0.9999 / 4))])
def test_competence_follows_the_paper(progress, share):
    assert sampler.competence(progress) == pytest.approx(share)
