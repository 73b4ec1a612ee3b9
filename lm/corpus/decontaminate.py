"""Decontamination: finds documents that share an n-gram of words with evaluation files (Brown et al. 2020, app. C).

An evaluation text of fewer than n words is matched as a whole. Shape letters: G n-grams of the evaluation files.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from lm.corpus import ngrams
from lm.data.readers import text as records
from lm.data.readers.fields import BadRecord
from lm.data.record import DataError

LEAST_WORDS = 8  # shorter texts match too many documents by chance; the same limit as GPT-3's


class Evaluation(NamedTuple):
    """The n-grams of evaluation files.

    Attributes:
      files: their paths.
      hash_G: uint64, sorted; an n-gram of several files occurs several times.
      file_G: index into `files` of each n-gram.
      seen: bool [2^k], a prefilter: whether any n-gram has these first k bits.
      lengths: the n for which there are n-grams, increasing.
      texts: number of texts read.
      unchecked: number of texts shorter than `LEAST_WORDS` words, which are not searched for.
    """

    files: tuple[str, ...]
    hash_G: np.ndarray
    file_G: np.ndarray
    seen: np.ndarray
    lengths: tuple[int, ...]
    texts: int
    unchecked: int


def read(paths: Sequence[epath.Path], n: int) -> Evaluation:
    """Reads evaluation files: all strings of .json and .jsonl files, and all tab-separated fields of other files.

    Raises:
      DataError: a file cannot be read, is not UTF-8 or malformed JSON, or has no text of `LEAST_WORDS` words.
    """
    hashes, files, lengths = [np.zeros(0, np.uint64)], [np.zeros(0, np.int32)], set[int]()
    texts = unchecked = 0
    for number, path in enumerate(paths):
        found = [text for text in _texts(path) if text.strip()]
        hash_W, text_W = ngrams.word_hashes(found)
        size_T = np.bincount(text_W, minlength=len(found))
        texts, unchecked = texts + len(found), unchecked + int(np.count_nonzero(size_T < LEAST_WORDS))
        before = len(hashes)
        for length in range(min(LEAST_WORDS, n), n + 1):
            is_chosen_T = size_T >= n if length == n else size_T == length
            is_chosen_W = is_chosen_T[text_W]
            hash_G, _ = ngrams.ngrams(hash_W[is_chosen_W], text_W[is_chosen_W], length)
            if len(hash_G):
                hashes.append(np.unique(hash_G))
                files.append(np.full(len(hashes[-1]), number, np.int32))
                lengths.add(length)
        if len(hashes) == before:
            raise DataError(f"{path}: found no text of {LEAST_WORDS} words or more, expected an evaluation file")
    hash_G, file_G = np.concatenate(hashes), np.concatenate(files)
    order = np.lexsort((file_G, hash_G))
    names = tuple(map(str, paths))
    bits = 4 + len(hash_G).bit_length()
    seen = np.zeros(1 << bits, bool)
    seen[hash_G >> np.uint64(64 - bits)] = True
    return Evaluation(names, hash_G[order], file_G[order], seen, tuple(sorted(lengths)), texts, unchecked)


def matches(evaluation: Evaluation, hash_W: np.ndarray, text_W: np.ndarray) -> dict[int, Counter[str]]:
    """Texts that share an n-gram with an evaluation file: index of the text -> file -> number of shared n-grams.

    Args:
      evaluation: from `read`.
      hash_W, text_W: from `ngrams.word_hashes`.
    """
    found: dict[int, Counter[str]] = {}
    shift = np.uint64(65 - len(evaluation.seen).bit_length())
    for hash_N, text_N in ngrams.of_lengths(hash_W, text_W, evaluation.lengths):
        is_seen_N = evaluation.seen[hash_N >> shift]
        hash_N, text_N = hash_N[is_seen_N], text_N[is_seen_N]
        first_N, last_N = (np.searchsorted(evaluation.hash_G, hash_N, side) for side in ("left", "right"))
        for text, first, last in zip(text_N.tolist(), first_N.tolist(), last_N.tolist(), strict=True):
            if first < last:
                names = (evaluation.files[i] for i in evaluation.file_G[first:last])
                found.setdefault(text, Counter()).update(names)
    return found


def _texts(path: epath.Path) -> Iterator[str]:
    name = records.unpacked_name(path)
    if name.endswith(".json"):
        yield from _strings(_json(records.read_utf8(path), f"{path}"))
        return
    for number, line in enumerate(records.lines(path), 1):
        place = f"{path}:{number}"
        if name.endswith(".jsonl"):
            yield from _strings(_json(line, place)) if line.strip() else ()
        else:
            yield from _decode(line, place).split("\t")


def _json(content: bytes, place: str) -> Any:
    try:
        return json.loads(_decode(content, place))
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{place}: malformed JSON ({error}); expected JSON, by the name of the file") from None


def _decode(content: bytes, place: str) -> str:
    try:
        return records.decode(content)
    except BadRecord as error:
        raise DataError(f"{place}: {error.args[0]}: {error.args[1]}") from None


def _strings(value: Any) -> Iterator[str]:
    """All strings in a JSON value, except the keys of objects."""
    if isinstance(value, str):
        yield value.encode(errors="replace").decode()  # JSON can escape lone surrogates, which UTF-8 cannot encode
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)
