"""Which row each example of the training stream is: pure functions of a seed and the example's index.

All of them take and give arrays of indices, hold no state and cost the same at any index.
"""

import functools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

Order = Callable[[np.ndarray], np.ndarray]  # indices of examples in a stream, int64 [B] -> rows, int64 [B]

_FIRST_SHARE = 0.01  # of the rows, which the first examples are drawn from (Platanios et al. 2019, section 4)
_ROUNDS = 6  # of the Feistel network; four are pseudo-random already (Luby and Rackoff 1988), but not on few bits
_MAX_DENOMINATOR = 10**9  # of a share, so that no product below leaves int64


def epochs(num_rows: int, seed: int, stream: int = 0) -> Order:
    """Epoch e, of `num_rows` examples, is a permutation of the rows that (seed, stream, e) decides."""

    def order(index_B: np.ndarray) -> np.ndarray:
        epoch_B, place_B = np.divmod(index_B, num_rows)
        row_B = np.empty_like(index_B)
        for epoch in np.unique(epoch_B).tolist():
            here = epoch_B == epoch
            row_B[here] = permuted(place_B[here], num_rows, _round_keys(seed % 2**64, stream, epoch))
        return row_B

    return order


def permuted(index_B: np.ndarray, size: int, keys: Sequence[np.uint64]) -> np.ndarray:
    """Where a keyed permutation of [0, size) sends each index, int64 [B].

    A Feistel network on pairs of numbers below about sqrt(size), the halves added modulo their ranges, permutes a few
    numbers more than `size`; what falls outside is sent on until it does not, which leaves a permutation of the rest
    (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    high = np.uint64(math.isqrt(size - 1) + 1)
    low = np.uint64(-(-size // int(high)))
    x = index_B.astype(np.uint64)
    outside = np.arange(len(x))
    while len(outside):
        left, right = np.divmod(x[outside], low)
        for left_key, right_key in zip(keys[::2], keys[1::2], strict=True):
            left = (left + _mixed_bits(right + left_key) % high) % high
            right = (right + _mixed_bits(left + right_key) % low) % low
        x[outside] = moved = left * low + right
        outside = outside[moved >= size]
    return x.astype(np.int64)


def _mixed_bits(x: np.ndarray) -> np.ndarray:
    """A hash of each number: the last steps of SplitMix64 (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@functools.lru_cache(maxsize=64)
def _round_keys(seed: int, stream: int, epoch: int) -> tuple[np.uint64, ...]:
    return tuple(np.random.SeedSequence([seed, stream, epoch]).generate_state(_ROUNDS, np.uint64))


def easy_first(difficulty_R: np.ndarray, seed: int, until: int, then: Order) -> Order:
    """Examples before `until` come from the easiest share of the rows, which grows; those behind it from `then`, anew.

    Example g is drawn at random from the ceil(`competence`(g / until) * R) rows of the smallest difficulty.

    Args:
      difficulty_R: a number a row; of rows alike, the first ones count as easier.
      seed: of what is drawn.
      until: examples.
      then: the order behind them.
    """
    ranked_R = np.argsort(difficulty_R, kind="stable")

    def one(index: int) -> int:
        rng = np.random.default_rng([seed % 2**32, index, 1])
        return int(ranked_R[rng.integers(math.ceil(competence(index / until) * len(ranked_R)))])

    def order(index_B: np.ndarray) -> np.ndarray:
        row_B = then(np.maximum(index_B - until, 0))
        early = np.flatnonzero(index_B < until)
        row_B[early] = [one(index) for index in index_B[early].tolist()]
        return row_B

    return order


def competence(progress: float) -> float:
    """Share of the rows that may be drawn, sqrt(c0^2 + (1 - c0^2) * progress) (Platanios et al. 2019, equation 8)."""
    return min(1.0, math.sqrt(_FIRST_SHARE**2 + (1 - _FIRST_SHARE**2) * progress))


class Mixture(NamedTuple):
    """Which share of the examples comes from which stream, from which example on.

    Attributes:
      starts: first example of each stage; the first one is 0.
      weights: of each stage, of each stream; those of a stage need not add up to 1.
    """

    starts: tuple[int, ...]
    weights: tuple[tuple[Fraction, ...], ...]


def mixed(mixture: Mixture, index_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(stream, index in that stream) of each example, int64 [B] both.

    Of any first n examples of a stage each stream has its share to within one example for each stream before it, and
    of two streams the second has floor(n * share). Worked, weights 3 and 2:

        index       0  1  2  3  4  5  6  7
        stream      0  0  1  0  1  0  0  1
        its index   0  1  0  2  1  3  4  2
    """
    stream_B, place_B = np.zeros_like(index_B), np.empty_like(index_B)
    stage_B = np.searchsorted(mixture.starts, index_B, side="right") - 1
    for stage in np.unique(stage_B).tolist():
        here = np.flatnonzero(stage_B == stage)
        place = index_B[here] - mixture.starts[stage]
        before = counts(mixture, mixture.starts[stage])
        for stream, share in _last_first(mixture.weights[stage]):
            first, behind = _floor_times(place, share), _floor_times(place + 1, share)
            is_here = behind > first
            stream_B[here[is_here]], place_B[here[is_here]] = stream, before[stream] + first[is_here]
            here, place = here[~is_here], (place - first)[~is_here]
    return stream_B, place_B


def counts(mixture: Mixture, index: int) -> list[int]:
    """How many of the examples before `index` each stream gave."""
    total = [0] * len(mixture.weights[0])
    ends = (*mixture.starts[1:], index)
    for start, end, weights in zip(mixture.starts, ends, mixture.weights, strict=True):
        left = np.array([max(0, min(end, index) - start)])
        for stream, share in _last_first(weights):
            given = _floor_times(left, share)
            total[stream] += int(given[0])
            left = left - given
    return total


@functools.lru_cache(maxsize=64)
def _last_first(weights: tuple[Fraction, ...]) -> list[tuple[int, Fraction]]:
    """(stream, its share of what the streams behind it leave over), the last stream first: the first one gets all."""
    shares = [weights[k] / total if (total := sum(weights[: k + 1])) else Fraction(0) for k in range(len(weights))]
    shares[0] = Fraction(1)
    return [(k, shares[k].limit_denominator(_MAX_DENOMINATOR)) for k in reversed(range(len(weights)))]


def _floor_times(number_B: np.ndarray, share: Fraction) -> np.ndarray:
    """floor(number * share), exact."""
    whole, rest = np.divmod(number_B, share.denominator)
    return whole * share.numerator + rest * share.numerator // share.denominator
