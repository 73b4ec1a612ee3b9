"""lm/corpus/filters.py: every measure, against values counted by hand, and the bounds."""

import math

import pytest

from lm.corpus import filters
from lm.corpus.filters import FILTERS

# A text, and what the measure of the filter is, counted by hand.
MEASURED = {
    "words": [("one two  three\nfour", 4), ("", 0)],
    "word_length": [("ab abcd", 3), ("", 0)],
    "symbols": [("a # b ... c d… #e", 4 / 7)],
    "bullets": [("- a\n\n  * b\nc\n• d", 3 / 4), ("", 0)],
    "ellipses": [("a...\nb\n\nc…  \nd", 2 / 4)],
    "letters": [("ab 12 a1 -- é", 3 / 5)],
    "placeholder": [("Lorem ipsum, lorem IPSUM", 2)],
    "repeated_lines": [("a\nb\n a \n\na", 2 / 4)],
    "repeated_line_characters": [("abc\nd\nabc", 3 / 7)],
    "top_2gram": [("a b c", 0), ("ab c x ab c yy", 2 * 3 / 9), ("a b a b a bb ccc a bb ccc", 2 * 5 / 16)],
    "repeated_5grams": [("a b c d e f", 0), ("a b c d e x a b c d e", 5 / 11), ("a " * 8, 7 / 8)],
    "repeated_10grams": [("a b c d e f g h i j " * 2, 10 / 20)],
    "stop_words": [("the cat and the dog", 2)],
    "code": [("if (a) { b }", 1)],
}


def test_every_filter_has_a_case():
    assert set(MEASURED) == set(FILTERS)
    assert set(filters.DEFAULT) < set(FILTERS)


@pytest.mark.parametrize(("name", "text", "expected"), [(n, *case) for n, cases in MEASURED.items() for case in cases])
def test_a_measure_equals_the_value_counted_by_hand(name, text, expected):
    assert FILTERS[name].measure(filters.page(text)) == pytest.approx(expected)


def test_bounds_are_inclusive_and_the_first_rejecting_filter_is_returned():
    word = "abcde"
    text = " ".join(word + chr(97 + i // 26) + chr(97 + i % 26) for i in range(50))
    assert filters.rejected_by(text, list(FILTERS)[:-2]) == ""
    assert filters.rejected_by(text.rsplit(" ", 1)[0], list(FILTERS)) == "words"
    assert filters.rejected_by(text, list(FILTERS)) == "stop_words"
    assert filters.rejected_by(text + " the be", list(FILTERS)) == ""
    assert filters.rejected_by("-" * 2000, []) == ""
    assert FILTERS["stop_words"].most == math.inf
