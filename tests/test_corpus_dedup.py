"""lm/corpus/dedup.py: MinHash estimates the Jaccard similarity; LSH finds the same pairs as plain Python."""

import numpy as np
import pytest

from lm.corpus import dedup, ngrams


def signed(sets):
    """Signatures of sets of numbers, in place of n-grams."""
    hash_G = ngrams.mix(np.array([x for one in sets for x in one], np.uint64))
    text_G = np.array([i for i, one in enumerate(sets) for _ in one], np.int64)
    return dedup.signatures(hash_G, text_G, len(sets))


def slow_signature(numbers):
    """One-permutation hashing and densification (Shrivastava 2017, algorithm 1), one n-gram and one bin at a time."""
    bins = {}
    for number in numbers:
        value = int(ngrams.mix(np.array([number], np.uint64))[0])
        bin_ = (value >> 32) * dedup.ROWS >> 32
        bins[bin_] = min(bins.get(bin_, 2**32), value % 2**32)
    row = []
    for bin_ in range(dedup.ROWS):
        attempt, chosen = 0, bin_
        while bins and chosen not in bins:
            attempt += 1
            chosen = int(ngrams.mix(np.array([bin_ + (attempt << 32)], np.uint64))[0]) % dedup.ROWS
        row.append(bins.get(chosen, 0) % 2**16)
    return row


def test_signatures_equal_those_of_plain_python():
    rng = np.random.default_rng(0)
    sets = [rng.integers(0, 2**62, size) for size in (1, 2, 0, 5, 60, 125, 400)]
    np.testing.assert_array_equal(signed(sets), [slow_signature(numbers) for numbers in sets])


@pytest.mark.parametrize("size", [6, 60, 600])
def test_the_share_of_equal_rows_estimates_the_similarity(size):
    """The mean over 400 pairs is within 5 standard errors of the truth, for long texts and for short ones."""
    rng = np.random.default_rng(size)
    for share in (0.2, 0.5, 0.8):
        both = round(2 * size * share / (1 + share))
        truth = both / (2 * size - both)
        pairs = [rng.integers(0, 2**62, 2 * size - both) for _ in range(400)]
        a, b = signed([p[:size] for p in pairs]), signed([p[size - both :] for p in pairs])
        estimates = (a == b).mean(axis=1)
        assert abs(estimates.mean() - truth) < 5 * estimates.std() / 20 + 2**-16
        # As 125 independent draws are, but for short texts, whose empty bins copy one another.
        assert size < 600 or estimates.std() < 1.2 * np.sqrt(truth * (1 - truth) / dedup.ROWS)


def slow_pairs(hash_E, id_E, signature_DxK, threshold):
    found = {}
    for value in set(hash_E.tolist()):
        left = sorted(id_E[hash_E == value].tolist())
        while left:
            first, *left = left
            near = [i for i in left if (signature_DxK[i] == signature_DxK[first]).mean() >= threshold]
            for i in near:
                found[i] = min(first, found.get(i, first))
            left = [i for i in left if i not in near]
    return found


def near(signature_DxK, ranges=1, threshold=0.75, monkeypatch=None):
    hash_E = dedup.band_hashes(signature_DxK).ravel()
    id_E = np.repeat(np.arange(len(signature_DxK), dtype=np.uint64), dedup.BANDS)
    found = {}
    for part in range(ranges):
        here = hash_E % np.uint64(ranges) == part
        pairs = dedup.near_duplicates(hash_E[here], id_E[here], lambda ids: signature_DxK[ids.astype(int)], threshold)
        for i, of, similarity in zip(*(column.tolist() for column in pairs), strict=True):
            assert similarity == pytest.approx((signature_DxK[i] == signature_DxK[of]).mean())
            found[i] = min(of, found.get(i, of))
    return found


def families(rng, count):
    """Signatures with many near duplicates, some of them close to the threshold."""
    base = rng.integers(0, 2**16, (count // 6, dedup.ROWS))
    rows = base[rng.integers(0, len(base), count)]
    return np.where(rng.random(rows.shape) < rng.uniform(0, 0.3, (count, 1)), rng.integers(0, 2**16, rows.shape), rows)


def test_near_duplicates_equal_those_of_plain_python(monkeypatch):
    monkeypatch.setattr(dedup, "_COMPARED", 7)
    signature_DxK = families(np.random.default_rng(0), 120).astype(np.uint16)
    hash_E = dedup.band_hashes(signature_DxK).ravel()
    expected = slow_pairs(hash_E, np.repeat(np.arange(120), dedup.BANDS), signature_DxK, 0.75)
    assert 30 < len(expected) < 115
    assert near(signature_DxK) == expected


def test_near_duplicates_do_not_depend_on_how_bands_are_split():
    signature_DxK = families(np.random.default_rng(1), 300).astype(np.uint16)
    assert near(signature_DxK) == near(signature_DxK, ranges=5)


def test_equal_rows_in_different_bands_have_different_hashes():
    assert len(set(dedup.band_hashes(np.zeros((1, dedup.ROWS), np.uint16)).ravel().tolist())) == dedup.BANDS


def test_pairs_share_a_band_with_the_expected_probability():
    """Of 1,000 pairs of similarity s, 1 - (1 - s^5)^25 share a band, within 4 standard errors."""
    rng = np.random.default_rng(2)
    for s in (0.4, 0.6, 0.75):
        a = rng.integers(0, 2**16, (1000, dedup.ROWS)).astype(np.uint16)
        b = np.where(rng.random(a.shape) < s, a, a + 1).astype(np.uint16)
        caught = (dedup.band_hashes(a) == dedup.band_hashes(b)).any(axis=1).mean()
        expected = 1 - (1 - s**dedup.BAND_ROWS) ** dedup.BANDS
        assert abs(caught - expected) < 4 * np.sqrt(expected * (1 - expected) / 1000) + 1e-3


def test_without_documents_there_are_no_pairs():
    assert near(np.zeros((0, dedup.ROWS), np.uint16)) == {}
    assert signed([]).shape == (0, dedup.ROWS)


def test_a_phrase_that_many_texts_share_takes_bounded_time(monkeypatch):
    """Dissimilar texts that share one band are compared with its first few leaders only."""
    monkeypatch.setattr(dedup, "_LEADERS", 3)
    rng = np.random.default_rng(3)
    signature_DxK = rng.integers(0, 2**16, (10, dedup.ROWS)).astype(np.uint16)
    signature_DxK[:, : dedup.BAND_ROWS] = 1
    signature_DxK[8] = signature_DxK[7]
    signature_DxK[8, dedup.BAND_ROWS :: dedup.BAND_ROWS] += 1  # alike, but in no other band
    signature_DxK[9] = signature_DxK[2]
    assert near(signature_DxK) == {9: 2}
    monkeypatch.undo()
    assert near(signature_DxK) == {9: 2, 8: 7}
