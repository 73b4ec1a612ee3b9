"""Quality filters: each is a measure of a document and the range of values in which the document is kept.

The thresholds are those of Gopher (Rae et al. 2021, appendix A.1, 'Quality filtering' and 'Repetition removal') and C4
(Raffel et al. 2020, section 2.2). They suit prose in languages that separate words by spaces.
"""

import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Page(NamedTuple):
    """A document, its white-space-separated words, and its non-empty stripped lines."""

    text: str
    words: list[str]
    lines: list[str]


class Filter(NamedTuple):
    """Keeps the documents whose measure is between `least` and `most`, inclusive."""

    measure: Callable[[Page], float]
    least: float
    most: float


STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))  # Gopher's
_BULLETS = ("•", "‣", "●", "-", "*")
_ELLIPSES = ("...", "…")


def page(text: str) -> Page:
    """Splits a document."""
    return Page(text, text.split(), [line for line in map(str.strip, text.split("\n")) if line])


def rejected_by(text: str, names: Sequence[str]) -> str:
    """Name of the first filter that rejects the text; '' if all accept it."""
    document = page(text)
    for name in names:
        rule = FILTERS[name]
        if not rule.least <= rule.measure(document) <= rule.most:
            return name
    return ""


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _mean_word_length(page: Page) -> float:
    return _share(sum(map(len, page.words)), len(page.words))


def _symbols(page: Page) -> float:
    """Hash signs and ellipses per word."""
    return _share(page.text.count("#") + sum(map(page.text.count, _ELLIPSES)), len(page.words))


def _bullets(page: Page) -> float:
    return _share(sum(line.startswith(_BULLETS) for line in page.lines), len(page.lines))


def _ellipses(page: Page) -> float:
    return _share(sum(line.endswith(_ELLIPSES) for line in page.lines), len(page.lines))


def _words_with_letters(page: Page) -> float:
    return _share(sum(word.isalpha() or any(map(str.isalpha, word)) for word in page.words), len(page.words))


def _stop_words(page: Page) -> float:
    return len(STOP_WORDS.intersection(page.words))


def _repeated_lines(page: Page) -> float:
    return _share(len(page.lines) - len(set(page.lines)), len(page.lines))


def _repeated_line_characters(page: Page) -> float:
    whole = sum(map(len, page.lines))
    return _share(whole - sum(map(len, set(page.lines))), whole)


def _top_ngram(n: int, page: Page) -> float:
    """Share of the words' characters covered by the most frequent n-gram of words; 0 if no n-gram occurs twice."""
    counts = Counter(zip(*(page.words[i:] for i in range(n)), strict=False))
    most = max(counts.values(), default=0)
    if most < 2:
        return 0.0
    longest = max(sum(map(len, run)) for run, count in counts.items() if count == most)
    return _share(longest * most, sum(map(len, page.words)))


def _repeated_ngrams(n: int, page: Page) -> float:
    """Share of the words' characters in n-grams that occurred before, each character counted once."""
    runs = list(zip(*(page.words[i:] for i in range(n)), strict=False))
    if len(set(runs)) == len(runs):
        return 0.0
    seen: set[tuple[str, ...]] = set()
    repeated = covered_to = 0
    for i, run in enumerate(runs):
        if run in seen:
            repeated += sum(map(len, page.words[max(i, covered_to) : i + n]))
            covered_to = i + n
        seen.add(run)
    return _share(repeated, sum(map(len, page.words)))


def _placeholder(page: Page) -> float:
    return page.text.lower().count("lorem ipsum")


# In the order in which they are applied: cheap ones first.
FILTERS: dict[str, Filter] = {
    "words": Filter(lambda page: len(page.words), 50, 100_000),  # Gopher
    "word_length": Filter(_mean_word_length, 3, 10),  # Gopher
    "symbols": Filter(_symbols, 0, 0.1),  # Gopher
    "bullets": Filter(_bullets, 0, 0.9),  # Gopher
    "ellipses": Filter(_ellipses, 0, 0.3),  # Gopher
    "letters": Filter(_words_with_letters, 0.8, 1),  # Gopher
    "placeholder": Filter(_placeholder, 0, 0),  # C4
    "repeated_lines": Filter(_repeated_lines, 0, 0.3),  # Gopher
    "repeated_line_characters": Filter(_repeated_line_characters, 0, 0.2),  # Gopher
    "top_2gram": Filter(functools.partial(_top_ngram, 2), 0, 0.2),  # Gopher
    "repeated_5grams": Filter(functools.partial(_repeated_ngrams, 5), 0, 0.15),  # Gopher
    "repeated_10grams": Filter(functools.partial(_repeated_ngrams, 10), 0, 0.1),  # Gopher
    "stop_words": Filter(_stop_words, 2, math.inf),  # Gopher, English
    "code": Filter(lambda page: page.text.count("{"), 0, 0),  # C4: a brace suggests source code
}
# Filters for any language that separates words by spaces.
DEFAULT = tuple(name for name in FILTERS if name not in ("stop_words", "code"))
