"""A corpus of any size whose faults are known: real text repeated with noise, duplicates and test questions planted."""

import gzip
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

NOISE = (
    0.3  # of the words of each copy: 5 words in a row are kept with a probability of .17, so that copies are not alike
)
EDITS = (0.0025, 0.005, 0.01, 0.015, 0.02)  # share of the words that a planted near duplicate has changed
PLANTED = 0.02  # of the documents, for each of EDITS; half of it for exact duplicates
QUESTIONS = "gsm8k/test.jsonl"


class Truth(NamedTuple):
    """What was planted.

    Attributes:
      exact: places ('file:line') of copies of an earlier document.
      near: place -> (share of words edited, similarity to the document it was made from).
      contaminated: places of documents with a test question in them.
      documents: how many there are.
      megabytes: of text.
    """

    exact: set[str]
    near: dict[str, tuple[float, float]]
    contaminated: set[str]
    documents: int
    megabytes: float


def similarity(a: list[str], b: list[str]) -> float:
    """Jaccard similarity of the sets of 5-word runs, by plain Python."""
    first, second = (set(zip(*(words[i:] for i in range(5)), strict=False)) for words in (a, b))
    return len(first & second) / max(1, len(first | second))


def write(folder: Path, shared: Path, megabytes: float, seed: int = 0) -> Truth:
    """Writes `folder`/*.jsonl, and a test question at most once each."""
    rng = np.random.default_rng(seed)
    pool = _pool(shared)
    vocabulary = sorted({word for text in pool[:2000] for word in text})
    questions = [json.loads(line)["question"].split() for line in (shared / QUESTIONS).read_text().splitlines()]
    truth = Truth(set(), {}, set(), 0, 0.0)
    documents, size, left = 0, 0, iter(questions)
    for number in range(int(np.ceil(megabytes / 64))):
        path = folder / f"part-{number:03}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            line = written = 0
            while written < min(64e6, megabytes * 1e6 - number * 64e6):
                original = _edited(pool[rng.integers(len(pool))], NOISE, vocabulary, rng)
                kind = rng.random()
                copies = [original]
                place = f"{path}:{line + 1 + (kind < (len(EDITS) + 0.5) * PLANTED)}"
                if kind < len(EDITS) * PLANTED:
                    edits = EDITS[int(kind / PLANTED)]
                    copies.append(_edited(original, edits, vocabulary, rng))
                    truth.near[place] = (edits, similarity(original, copies[1]))
                elif kind < (len(EDITS) + 0.5) * PLANTED:
                    copies.append(original)
                    truth.exact.add(place)
                elif kind > 0.999 and (question := next(left, None)):
                    at = int(rng.integers(len(original)))
                    copies = [original[:at] + question + original[at:]]
                    truth.contaminated.add(place)
                for words in copies:
                    text = " ".join(words)
                    file.write(json.dumps({"text": text}) + "\n")
                    line, documents, written = line + 1, documents + 1, written + len(text.encode())
            size += written
    return truth._replace(documents=documents, megabytes=size / 1e6)


def _pool(shared: Path) -> list[list[str]]:
    """Documents of 80 to 1,000 words."""
    texts: list[str] = (shared / "tinystories/sample.txt").read_text().split("<|endoftext|>")
    with gzip.open(shared / "imdb/imdb_train.jsonl.gz", "rt") as file:
        texts += [json.loads(line)["text"] for line in file]
    return [words for words in map(str.split, texts) if 80 <= len(words) <= 1000]


def _edited(words: list[str], share: float, vocabulary: list[str], rng: np.random.Generator) -> list[str]:
    """A copy of which a share of the words, at least one, is another one."""
    count = max(1, round(share * len(words)))
    out = list(words)
    for at, other in zip(
        rng.choice(len(words), count, replace=False), rng.integers(len(vocabulary), size=count), strict=True
    ):
        out[at] = vocabulary[other]
    return out
