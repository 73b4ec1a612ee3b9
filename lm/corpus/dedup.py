"""Near-duplicate detection: MinHash signatures and locality-sensitive hashing (LSH).

The similarity of two documents is the Jaccard similarity of their sets of 5-word shingles, estimated by the share of
equal rows in their MinHash signatures (Broder 1997). Only documents that agree in one of `BANDS` bands of `BAND_ROWS`
rows are compared (Leskovec et al., Mining of Massive Datasets, section 3.4). Shape letters: D documents, G n-grams,
K rows of a signature, E entries (a band of a document each).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lm.corpus.ngrams import mix

SHINGLE_WORDS = 5
BANDS, BAND_ROWS = 25, 5  # a pair of similarity s shares a band with probability 1 - (1 - s^5)^25: .75 -> .999
ROWS = BANDS * BAND_ROWS
_EMPTY = np.uint32(2**32 - 1)
_LEADERS = 256  # leaders compared in a band at most: bounds the time for a phrase that very many texts share
_COMPARED = 1 << 16  # pairs of signatures in memory at a time


class Pairs(NamedTuple):
    """Near duplicates: id uint64 [P], id of the earlier document uint64 [P], similarity float32 [P]."""

    id_P: np.ndarray
    of_P: np.ndarray
    similarity_P: np.ndarray


def signatures(hash_G: np.ndarray, text_G: np.ndarray, num_texts: int) -> np.ndarray:
    """One-permutation MinHash with optimal densification (Shrivastava 2017), uint16 [D, K].

    Each n-gram falls into one of K bins, and each bin keeps its smallest hash; this needs one hash per n-gram instead
    of K. An empty bin copies a full bin, chosen by a hash of the bin's number. So a row of two signatures agrees with
    a probability equal to the similarity (plus 2^-16), however short the texts are. A text without n-grams gets zeros.
    """
    bin_G = ((hash_G >> 32) * np.uint64(ROWS)) >> 32
    least = np.full(num_texts * ROWS, _EMPTY, np.uint32)
    np.minimum.at(least, text_G * ROWS + bin_G.astype(np.int64), hash_G.astype(np.uint32))
    least_DxK = least.reshape(num_texts, ROWS)
    is_empty_DxK = least_DxK == _EMPTY
    is_empty_DxK[is_empty_DxK.all(axis=1)] = False
    text_E, bin_E = np.nonzero(is_empty_DxK)
    attempt = 0
    while len(text_E):
        attempt += 1
        chosen_E = (mix(bin_E.astype(np.uint64) + np.uint64(attempt << 32)) % np.uint64(ROWS)).astype(np.int64)
        is_full_E = ~is_empty_DxK[text_E, chosen_E]
        least_DxK[text_E[is_full_E], bin_E[is_full_E]] = least_DxK[text_E[is_full_E], chosen_E[is_full_E]]
        text_E, bin_E = text_E[~is_full_E], bin_E[~is_full_E]
    return np.where(least_DxK == _EMPTY, 0, least_DxK & 0xFFFF).astype(np.uint16)


def band_hashes(signature_DxK: np.ndarray) -> np.ndarray:
    """One hash for each band, uint64 [D, BANDS]; the number of the band is part of the hash."""
    rows = signature_DxK.reshape(-1, BANDS, BAND_ROWS).astype(np.uint64)
    hashes = np.broadcast_to(np.arange(1, BANDS + 1, dtype=np.uint64), rows.shape[:2])
    for row in range(BAND_ROWS):
        hashes = mix(hashes ^ (rows[:, :, row] + np.uint64(1 + row << 32)))
    return hashes


def near_duplicates(
    hash_E: np.ndarray, id_E: np.ndarray, fetch: Callable[[np.ndarray], np.ndarray], threshold: float
) -> Pairs:
    """Documents that share a band with an earlier document (one of a smaller id) and are similar to it.

    In each band, the first document is the leader: it is compared with all others, and those similar to it are
    duplicates and removed from the band. The first of the rest is the next leader, and so on, at most `_LEADERS` times.
    Bands are independent, so that the result does not depend on how they are split over calls. Example: a band has
    documents 1, 2, 3, of which 1 and 2 are similar, and 2 and 3. Then 2 is a duplicate of 1; 3 is kept, unless it
    shares with 2 a band that 1 is not in.

    Args:
      hash_E: hashes of bands, uint64 [E].
      id_E: the document of each, uint64 [E].
      fetch: sorted unique ids, uint64 [n] -> signatures [n, K].
      threshold: share of equal rows from which on two documents are similar.
    """
    order = np.lexsort((id_E, hash_E))
    hash_E, id_E = hash_E[order], id_E[order]
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    is_first_E = _starts(hash_E)
    size_E = np.diff(np.append(np.flatnonzero(is_first_E), len(hash_E)))[np.cumsum(is_first_E) - 1]
    hash_E, id_E = hash_E[size_E > 1], id_E[size_E > 1]
    candidates = np.unique(id_E)
    signature_CxK = fetch(candidates)
    at_E = np.searchsorted(candidates, id_E)
    for _ in range(_LEADERS):
        is_first_E = _starts(hash_E)
        leader_E = at_E[np.flatnonzero(is_first_E)][np.cumsum(is_first_E) - 1]
        similarity_E = _agreement(signature_CxK, at_E, leader_E)
        is_near_E = (similarity_E >= threshold) & ~is_first_E
        found.append((at_E[is_near_E], leader_E[is_near_E], similarity_E[is_near_E]))
        rest = ~is_near_E & ~is_first_E
        hash_E, at_E = hash_E[rest], at_E[rest]
    parts = [np.concatenate(part) for part in zip(*found, strict=True)]
    return _first_of_each(Pairs(candidates[parts[0]], candidates[parts[1]], parts[2].astype(np.float32)))


def _starts(hash_E: np.ndarray) -> np.ndarray:
    """bool [E]: whether an entry is the first of its band; entries of a band are adjacent."""
    return np.append(np.ones(min(1, len(hash_E)), bool), hash_E[1:] != hash_E[:-1])


def _agreement(signature_CxK: np.ndarray, a_E: np.ndarray, b_E: np.ndarray) -> np.ndarray:
    """Share of equal rows, float32 [E]."""
    shares = [np.zeros(0, np.float32)]
    for start in range(0, len(a_E), _COMPARED):
        pairs = slice(start, start + _COMPARED)
        shares.append((signature_CxK[a_E[pairs]] == signature_CxK[b_E[pairs]]).mean(axis=1, dtype=np.float32))
    return np.concatenate(shares)


def _first_of_each(pairs: Pairs) -> Pairs:
    """Each document once, paired with the earliest document that it is similar to."""
    order = np.lexsort((pairs.of_P, pairs.id_P))
    _, first = np.unique(pairs.id_P[order], return_index=True)
    return Pairs(*(column[order][first] for column in pairs))
