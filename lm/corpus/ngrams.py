"""64-bit hashes of the words and n-grams of many texts at once.

Shape letters: T texts, W words, G n-grams. Hashes are the same on every machine and in every run. Two different n-grams
collide with a probability of about 2^-64.
"""

import functools
from collections.abc import Iterator, Sequence

import numpy as np

_BASE = 0x9E3779B97F4A7C15  # odd, and therefore invertible modulo 2^64
_BATCH_BYTES = 1 << 20  # of text hashed at a time, with about 40 times as much scratch memory


def mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al. 2014), a bijection of uint64 in which every bit affects all others."""
    x = (x ^ (x >> 30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> 27)) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> 31)


def word_hashes(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(hash of each word, uint64 [W]; index of its text, int64 [W]), in order.

    Words are runs of letters and digits, lower-cased; all other characters separate words. A character that UTF-8
    encodes in three or four bytes (Chinese, Thai, Devanagari) is a word of its own: such scripts may not use spaces.
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
    """(hash of each n-gram of words, uint64 [G]; index of its text, int64 [G]), in order.

    n-grams do not cross texts. n-grams of different n have different hashes.
    """
    return next(of_lengths(hash_W, text_W, [n]))


def of_lengths(
    hash_W: np.ndarray, text_W: np.ndarray, lengths: Sequence[int]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`ngrams` for each of several increasing lengths; longer n-grams are hashed from shorter ones."""
    sum_W = np.zeros_like(hash_W)
    for n in range(1, max(lengths, default=0) + 1):
        count = max(0, len(hash_W) - n + 1)
        sum_W = sum_W[:count] * np.uint64(_BASE)
        sum_W += hash_W[n - 1 :]
        if n in lengths:
            is_whole = text_W[:count] == text_W[n - 1 :]
            yield mix(sum_W[is_whole]), text_W[:count][is_whole]


def _pieces(text: bytes) -> Iterator[bytes]:
    """Splits a long text into pieces, at spaces."""
    while (cut := text.find(b" ", _BATCH_BYTES)) >= 0:
        yield text[:cut]
        text = text[cut:]
    yield text


def _hash_batch(batch: list[tuple[int, bytes]], hashes: list[np.ndarray], owners: list[np.ndarray]) -> None:
    """Appends the hashes and texts of the words in a batch of (index of the text, piece of it)."""
    raw_N = np.frombuffer(b"".join(piece + b"\n" for _, piece in batch), np.uint8)
    start_W, end_W = _word_bounds(raw_N)
    powers_N, inverses_N = _powers(1 << len(raw_N).bit_length())
    # prefix[i] = sum of byte[j] * base^j over j < i. A word's hash is a difference of two, divided by base^start.
    prefix = np.zeros(len(raw_N) + 1, np.uint64)
    np.cumsum((raw_N.astype(np.uint64) + np.uint64(1)) * powers_N[: len(raw_N)], out=prefix[1:])
    hashes.append(mix((prefix[end_W] - prefix[start_W]) * inverses_N[start_W]))
    piece_ends = np.cumsum([len(piece) + 1 for _, piece in batch])
    owner = np.array([text for text, _ in batch], np.int64)
    owners.append(owner[np.searchsorted(piece_ends, start_W, side="right")])


def _word_bounds(raw_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Start and (exclusive) end of each word, int64 [W] each; the last byte of `raw_N` must not be in a word."""
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
