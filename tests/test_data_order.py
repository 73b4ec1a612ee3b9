"""lm/data/order.py: which row an example is, against counting by hand."""

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.data import order


@given(percent=st.integers(0, 99), start=st.integers(0, 10**12))
def test_streams_are_mixed_exactly(percent, start):
    share = Fraction(str(percent / 100))
    assert share == Fraction(percent, 100)  # 0.29 is not the nearest binary fraction
    nexts = [0, 0]
    for g in range(250):
        stream, index = order.mixed(g, share)
        assert index == nexts[stream]
        nexts[stream] += 1
        assert nexts[1] == (g + 1) * percent // 100
    counted = Counter(order.mixed(g, share)[0] for g in range(start, start + 100))
    assert counted[1] == percent  # any 100 in a row, wherever


def test_each_stream_has_an_order_of_its_own():
    own, other = ([order.epochs(40, 3, stream)(i) for i in range(80)] for stream in (0, 1))
    for rows in (own, other):
        assert sorted(rows[:40]) == sorted(rows[40:]) == list(range(40)) and rows[:40] != rows[40:]
    assert own != other and other != [order.epochs(40, 4, 1)(i) for i in range(80)]


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=40),
    until=st.integers(1, 10**6),
    seed=st.integers(-5, 2**31),
    data=st.data(),
)
def test_examples_come_from_the_easiest_share(lengths, until, seed, data):
    row_of = order.easy_first(np.array(lengths), seed, until, lambda index: -1 - index)
    easiest = sorted(range(len(lengths)), key=lambda row: (lengths[row], row))
    for g in data.draw(st.lists(st.integers(0, until - 1), max_size=9)):
        share = math.sqrt(0.01**2 + (1 - 0.01**2) * g / until)
        assert row_of(g) in easiest[: math.ceil(share * len(lengths))]
        assert row_of(g) == order.easy_first(np.array(lengths), seed, until, row_of)(g)
    assert [row_of(until + i) for i in range(3)] == [-1, -2, -3]


def test_every_row_of_the_share_is_drawn_alike():
    rows, until = 50, 40_000
    lengths = np.random.default_rng(0).permutation(rows)
    row_of = order.easy_first(lengths, 0, until, lambda index: index)
    early = Counter(int(lengths[row_of(g)]) for g in range(9_900, 10_100))  # half of the rows: sqrt(1/4)
    assert max(early) in (24, 25) and len(early) > 23
    drawn = Counter(row_of(g) for g in range(until - 1500, until))  # all of the rows
    assert len(drawn) == rows and all(12 < count < 48 for count in drawn.values())
    other_seed = order.easy_first(lengths, 1, until, lambda index: index)
    assert [row_of(g) for g in range(30_000, 30_020)] != [other_seed(g) for g in range(30_000, 30_020)]


@pytest.mark.parametrize(("progress", "share"), [(0.0, 0.01), (1.0, 1.0), (0.25, math.sqrt(0.0001 + 0.9999 / 4))])
def test_competence_is_the_papers(progress, share):
    assert order.competence(progress) == pytest.approx(share)
