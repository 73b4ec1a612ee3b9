"""A small made-up vocabulary, and packed rows of it, for tests of tasks that hide some of a row."""

import dataclasses
from typing import Any

import numpy as np
from hypothesis import strategies as st

from lm.data.example import Row

WORDS = ["\u2581the", "\u2581cat", "\u2581sat", "s", "ing", "\u2581", "<0x0A>", "<0xC3>", "\u2581on", "mat", "."]


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Four control symbols, `WORDS`, the mask, sentinels: what transforms read of a tokenizer."""

    sentinels: int = 40
    bos_id: int = 1
    eos_id: int = 2

    @property
    def is_control_V(self) -> np.ndarray:
        ids = np.arange(self.vocab_size)
        return (ids < 4) | (ids >= self.mask_id)

    @property
    def separator_ids(self) -> list[int]:
        return [self.eos_id]

    @property
    def mask_id(self) -> int:
        return 4 + len(WORDS)

    @property
    def sentinel_ids(self) -> np.ndarray:
        return np.arange(self.mask_id + 1, self.vocab_size, dtype=np.int32)

    @property
    def vocab_size(self) -> int:
        return self.mask_id + 1 + self.sentinels

    def piece(self, token_id: int) -> str:
        return WORDS[token_id - 4] if 4 <= token_id < self.mask_id else f"<{token_id}>"


TOKENIZER = Pieces()


def packed(lengths: list[int], seq_len: int, seed: int) -> Row:
    """Documents of BOS and words, then padding whose tokens could be words; in the narrow dtypes of stored rows."""
    rng = np.random.default_rng(seed)
    tokens, segments, positions = (np.full(seq_len, value, np.uint8) for value in (5, 0, 0))
    at = 0
    for number, length in enumerate(lengths, 1):
        tokens[at : at + length] = [1, *rng.integers(4, 4 + len(WORDS), length - 1)]
        segments[at : at + length], positions[at : at + length] = number, np.arange(length)
        at += length
    return {"tokens": tokens, "segment_ids": segments, "positions": positions, "example_index": np.array(7)}


def document_lengths(max_len: int) -> Any:
    """Strategy: lengths of one to five documents that fill at most `max_len` positions."""
    return st.lists(st.integers(1, 12), min_size=1, max_size=5).filter(lambda lengths: sum(lengths) <= max_len)
