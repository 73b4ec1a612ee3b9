"""Shuffle, curriculum and mixture: which row of which source each example of the training stream is.

All are pure functions of a seed and the example's index, take and return arrays of indices, keep no state and cost the
same at any index; so a run can continue at any example, with any batch size and any number of hosts.
"""

import functools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

Order = Callable[[np.ndarray], np.ndarray]  # indices of examples in a stream, int64 [B] -> rows, int64 [B]

_FIRST_SHARE = 0.01  # share of the rows that the first examples are drawn from (Platanios et al. 2019, section 4)
_ROUNDS = 6  # of the Feistel network; four are pseudorandom (Luby and Rackoff 1988), but not for domains of few bits
_MAX_DENOMINATOR = 10**9  # of a share, so that the products below stay within int64


def epochs(num_rows: int, seed: int, stream: int = 0) -> Order:
    """Endless shuffle: epoch e, of `num_rows` examples, is a permutation of the rows fixed by (seed, stream, e)."""

    def order(index_B: np.ndarray) -> np.ndarray:
        epoch_B, place_B = np.divmod(index_B, num_rows)
        row_B = np.empty_like(index_B)
        for epoch in np.unique(epoch_B).tolist():
            here = epoch_B == epoch
            row_B[here] = permuted(place_B[here], num_rows, _round_keys(seed % 2**64, stream, epoch))
        return row_B

    return order


def permuted(index_B: np.ndarray, size: int, keys: Sequence[np.uint64]) -> np.ndarray:
    """Images of the indices under a keyed permutation of [0, size), int64 [B].

    A Feistel network on pairs of numbers below about sqrt(size), with addition modulo their ranges, permutes a domain
    slightly larger than `size`. Results outside [0, size) are permuted again until they are inside (cycle walking),
    which gives a permutation of [0, size) (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
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
    """Hashes each number: the finalizer of SplitMix64 (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@functools.lru_cache(maxsize=64)
def _round_keys(seed: int, stream: int, epoch: int) -> tuple[np.uint64, ...]:
    return tuple(np.random.SeedSequence([seed, stream, epoch]).generate_state(_ROUNDS, np.uint64))


def easy_first(difficulty_R: np.ndarray, seed: int, until: int, then: Order) -> Order:
    """A curriculum: the first `until` examples come from a growing share of the easiest rows, later ones from `then`.

    Example g < until is drawn at random from the ceil(`competence`(g / until) * R) easiest rows. Example until + i is
    example i of `then`.

    Args:
      difficulty_R: one number for each row; ties are broken by row number.
      seed: of the random draws.
      until: length of the curriculum, in examples.
      then: the order of the examples after it.
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
    """Share of the rows that are drawn from, sqrt(c0^2 + (1 - c0^2) * progress) (Platanios et al. 2019, equation 8)."""
    return min(1.0, math.sqrt(_FIRST_SHARE**2 + (1 - _FIRST_SHARE**2) * progress))


class Mixture(NamedTuple):
    """Mixing weights of several streams, by stage of the run.

    Attributes:
      starts: first example of each stage, beginning with 0.
      weights: for each stage, the weight of each stream; they need not add up to 1.
    """

    starts: tuple[int, ...]
    weights: tuple[tuple[Fraction, ...], ...]


def mixed(mixture: Mixture, index_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(stream, index in that stream) of each example, both int64 [B].

    The mixture is deterministic: among the first n examples of a stage, each stream has its share to within one example
    for each stream before it; of two streams, the second has exactly floor(n * share). Worked, weights 3 and 2:

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
    """How many of the first `index` examples come from each stream."""
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
    """(stream, its share of what the later streams leave), last stream first; so the first stream's share is 1."""
    shares = [weights[k] / total if (total := sum(weights[: k + 1])) else Fraction(0) for k in range(len(weights))]
    shares[0] = Fraction(1)
    return [(k, shares[k].limit_denominator(_MAX_DENOMINATOR)) for k in reversed(range(len(weights)))]


def _floor_times(number_B: np.ndarray, share: Fraction) -> np.ndarray:
    """floor(number * share), exact."""
    whole, rest = np.divmod(number_B, share.denominator)
    return whole * share.numerator + rest * share.numerator // share.denominator
