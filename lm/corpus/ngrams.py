"""Words and runs of words of many texts at once, as 64-bit hashes.

Shape letters: T texts, W words, G n-grams. A hash is the same on every machine and in every run; two different n-grams
share one with a probability of about 2^-64.
"""

import functools
from collections.abc import Iterator, Sequence

import numpy as np

_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_BATCH_BYTES = 1 << 20  # hashed at a time: a byte needs about 40 bytes of scratch


def mix(x: np.ndarray) -> np.ndarray:
    """A bijection of uint64 that spreads every bit over all others (splitmix64's: Steele et al. 2014)."""
    x = (x ^ (x >> 30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> 27)) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> 31)


def word_hashes(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(hash of each word, uint64 [W]; the text it is in, int64 [W]), in the order they stand.

    Words are runs of letters and digits, lower-cased; all else is between them. A character of a script that UTF-8
    spells in three or four bytes (Chinese, Thai, Devanagari) is a word of its own, as those may not use spaces.
    """
    hashes, owners = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    batch: list[tuple[int, bytes]] = []
    size = 0
    for i, text in enumerate(texts):
        for piece in _pieces(text.lower().encode()):
            batch.append((i, piece))
            size += len(piece)
            if size >= _BATCH_BYTES:
                _hash_batch(batch, hashes, owners)
                batch, size = [], 0
    _hash_batch(batch, hashes, owners)
    return np.concatenate(hashes), np.concatenate(owners)


def ngrams(hash_W: np.ndarray, text_W: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(hash of each run of `n` words of one text, uint64 [G]; the text it is in, int64 [G]), in order.

    Hashes of runs of different n are different too.
    """
    return next(of_lengths(hash_W, text_W, [n]))


def of_lengths(
    hash_W: np.ndarray, text_W: np.ndarray, lengths: Sequence[int]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What `ngrams` gives for each of the lengths, which increase; a longer run is hashed from a shorter one."""
    sum_W = np.zeros_like(hash_W)
    for n in range(1, max(lengths, default=0) + 1):
        count = max(0, len(hash_W) - n + 1)
        sum_W = sum_W[:count] * np.uint64(_BASE)
        sum_W += hash_W[n - 1 :]
        if n in lengths:
            is_whole = text_W[:count] == text_W[n - 1 :]
            yield mix(sum_W[is_whole]), text_W[:count][is_whole]


def _pieces(text: bytes) -> Iterator[bytes]:
    """A long text in parts, cut at spaces."""
    while (cut := text.find(b" ", _BATCH_BYTES)) >= 0:
        yield text[:cut]
        text = text[cut:]
    yield text


def _hash_batch(batch: list[tuple[int, bytes]], hashes: list[np.ndarray], owners: list[np.ndarray]) -> None:
    """Adds what `word_hashes` gives of (text, part of it) pairs."""
    raw_N = np.frombuffer(b"".join(piece + b"\n" for _, piece in batch), np.uint8)
    start_W, end_W = _word_bounds(raw_N)
    powers_N, inverses_N = _powers(1 << len(raw_N).bit_length())
    # prefix[i] is the sum of byte j * base^j over j < i; a word's is the difference of two, moved to start at base^0.
    prefix = np.zeros(len(raw_N) + 1, np.uint64)
    np.cumsum((raw_N.astype(np.uint64) + np.uint64(1)) * powers_N[: len(raw_N)], out=prefix[1:])
    hashes.append(mix((prefix[end_W] - prefix[start_W]) * inverses_N[start_W]))
    piece_ends = np.cumsum([len(piece) + 1 for _, piece in batch])
    owner = np.array([text for text, _ in batch], np.int64)
    owners.append(owner[np.searchsorted(piece_ends, start_W, side="right")])


def _word_bounds(raw_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where words start and end (exclusive), int64 [W] each; `raw_N` ends in a byte that is in no word."""
    in_word_N = _IN_WORD[raw_N]
    in_word_N[np.flatnonzero(raw_N == 0xE2)[:, None] + np.arange(3)] = (
        False  # U+2000 to U+2FFF: quotes, dashes, symbols
    )
    wide = np.flatnonzero((raw_N >= 0xE0) & in_word_N)
    starts_N = in_word_N.copy()
    starts_N[1:] &= ~in_word_N[:-1]
    starts_N[wide] = True
    behind = wide + np.where(raw_N[wide] >= 0xF0, 4, 3)
    starts_N[behind] = in_word_N[behind]
    ends_N = in_word_N[:-1] & (~in_word_N[1:] | starts_N[1:])
    return np.flatnonzero(starts_N), np.flatnonzero(ends_N) + 1


def _in_word() -> np.ndarray:
    table = np.zeros(256, bool)
    table[0x80:] = True
    table[[byte for byte in range(0x80) if chr(byte).isalnum()]] = True
    return table


_IN_WORD = _in_word()


@functools.lru_cache(maxsize=4)
def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """_BASE^i and _BASE^-i modulo 2^64, uint64 [count]."""
    bases = _BASE, pow(_BASE, -1, 2**64)
    powers, inverses = (np.cumprod(np.full(count, base, np.uint64)) * np.uint64(pow(base, -1, 2**64)) for base in bases)
    return powers, inverses
