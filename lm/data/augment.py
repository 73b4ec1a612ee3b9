"""Augmentations: small random changes of a training row, drawn anew each time that it is used.

Each is a function (row, rng, strength, tokenizer, config) -> row, pure in its arguments; `rng` depends on the seed and
the global example index alone. `data.augment` names them, with their strengths, in the order they are applied.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from lm.config import Config
from lm.data import images
from lm.data.examples import Row

# Columns that move with the tokens. A task that stores another one for each position cannot be augmented.
MOVED = ("tokens", "segment_ids", "type_ids", "positions")

Augmentation = Callable[[Row, np.random.Generator, float, Any, Config], Row]


def delete(row: Row, rng: np.random.Generator, strength: float, tokenizer: Any, cfg: Config) -> Row:
    """Leaves out each token with probability `strength`; control symbols stay (Wei and Zou 2019)."""
    del cfg
    real = row["segment_ids"] > 0
    dropped = real & ~tokenizer.is_control_V[row["tokens"]] & (rng.random(len(real)) < strength)
    return _keep(row, real & ~dropped)


def swap(row: Row, rng: np.random.Generator, strength: float, tokenizer: Any, cfg: Config) -> Row:
    """Swaps two tokens of a row, `strength` x its tokens times; control symbols stay (Wei and Zou 2019)."""
    del cfg
    tokens = row["tokens"].copy()
    places = np.flatnonzero((row["segment_ids"] > 0) & ~tokenizer.is_control_V[tokens])
    for _ in range(round(strength * len(places)) if len(places) > 1 else 0):
        i, j = rng.choice(places, 2, replace=False)
        tokens[i], tokens[j] = tokens[j], tokens[i]
    return row | {"tokens": tokens}


def cutoff(row: Row, rng: np.random.Generator, strength: float, tokenizer: Any, cfg: Config) -> Row:
    """Leaves out one run of `strength` x the row's tokens; control symbols stay (Shen et al. 2020)."""
    del cfg
    real = row["segment_ids"] > 0
    length = int(real.sum())
    size = round(strength * length)
    start = int(rng.integers(0, length - size + 1))
    inside = (np.arange(len(real)) >= start) & (np.arange(len(real)) < start + size)
    return _keep(row, real & ~(inside & ~tokenizer.is_control_V[row["tokens"]]))


def _keep(row: Row, kept: np.ndarray) -> Row:
    """The row with only those positions, moved together to the left; positions count anew."""
    out = dict(row)
    for name in set(MOVED) - {"positions"}:
        if name in row:
            out[name] = np.zeros_like(row[name])
            out[name][: kept.sum()] = row[name][kept]
    out["positions"] = np.arange(len(kept)) * (out["segment_ids"] > 0)
    return out


AUGMENTATIONS: dict[str, Augmentation] = images.AUGMENTATIONS | {"delete": delete, "swap": swap, "cutoff": cutoff}
