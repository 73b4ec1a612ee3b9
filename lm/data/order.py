"""Which row each example of the training stream is: pure functions of a seed and the example's index."""

import math
from collections.abc import Callable
from fractions import Fraction

import grain
import numpy as np

Order = Callable[[int], int]  # index of an example in a stream -> row

_FIRST_SHARE = 0.01  # of the rows, which the first examples are drawn from (Platanios et al. 2019, section 4)


def epochs(num_rows: int, seed: int, stream: int = 0) -> Order:
    """Epoch e, of `num_rows` examples, is a permutation of the rows that (seed, stream, e) decides."""
    # Grain shuffles epoch e by (seed + e): hashed first, so that the epochs of neighbouring seeds differ.
    entropy = [seed % 2**64, stream] if stream else seed % 2**64
    hashed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    dataset = grain.MapDataset.range(num_rows).shuffle(hashed).repeat(None)
    return lambda index: int(dataset[index])


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

    def order(index: int) -> int:
        if index >= until:
            return then(index - until)
        rng = np.random.default_rng([seed % 2**32, index, 1])
        return int(ranked_R[rng.integers(math.ceil(competence(index / until) * len(ranked_R)))])

    return order


def competence(progress: float) -> float:
    """Share of the rows that may be drawn, sqrt(c0^2 + (1 - c0^2) * progress) (Platanios et al. 2019, equation 8)."""
    return min(1.0, math.sqrt(_FIRST_SHARE**2 + (1 - _FIRST_SHARE**2) * progress))


def mixed(index: int, share: Fraction) -> tuple[int, int]:
    """(stream, index in that stream): of any first n examples, floor(n * share) are of stream 1, the others of 0.

    Worked, share 2/5:

        index       0  1  2  3  4  5  6  7
        stream      0  0  1  0  1  0  0  1
        its index   0  1  0  2  1  3  4  2
    """
    before, after = (n * share.numerator // share.denominator for n in (index, index + 1))
    return (1, before) if after > before else (0, index - before)
