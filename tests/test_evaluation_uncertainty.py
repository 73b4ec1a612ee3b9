"""lm/evaluation/uncertainty.py against scikit-learn, scipy and the definitions."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.evaluation import scores, uncertainty


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1))
def test_the_table_of_classes_equals_scikit_learn(pairs):
    metrics = pytest.importorskip("sklearn.metrics")
    labels, said = np.array(pairs).T
    names = ("a", "b", "c", "d")
    found = uncertainty.class_table(labels, said, names)
    expected = metrics.precision_recall_fscore_support(labels, said, labels=range(4), zero_division=0)
    columns = zip(*(found["classes"][name].values() for name in names), strict=True)
    for column, wanted in zip(columns, expected, strict=True):
        assert list(column) == pytest.approx(wanted.tolist())
    assert found["confusion"] == metrics.confusion_matrix(labels, said, labels=range(4)).tolist()


def test_the_interval_of_a_mean_is_that_of_its_standard_error():
    values = np.random.default_rng(1).normal(size=400)
    found = uncertainty.resampled(lambda chosen: {"mean": float(values[chosen].mean())}, 400, range(2000), seed=0)
    low, high = uncertainty.interval(found["mean"])
    half = 1.96 * values.std() / math.sqrt(400)
    assert low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_two_models_are_scored_on_the_same_resamples():
    values = np.random.default_rng(1).normal(size=30)
    both = [
        uncertainty.resampled(lambda chosen, add=add: {"mean": float(values[chosen].mean() + add)}, 30, range(50), 7)
        for add in (0.0, 2.0)
    ]
    assert both[1]["mean"] - both[0]["mean"] == pytest.approx(np.full(50, 2.0))


def test_a_score_that_some_resamples_lack_is_left_out_of_the_interval():
    assert uncertainty.interval(np.array([1.0, np.nan, 3.0])) == pytest.approx((1.05, 2.95))
    assert all(map(math.isnan, uncertainty.interval(np.array([np.nan]))))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1))
def test_mcnemar_is_the_binomial_test_of_the_differing_examples(pairs):
    first, second = np.array(pairs, bool).T
    found = uncertainty.mcnemar(first, second)
    b, c = sum(x and not y for x, y in pairs), sum(y and not x for x, y in pairs)
    tail = sum(math.comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c)
    assert (found["only_first"], found["only_second"]) == (b, c)
    assert found["p_value"] == pytest.approx(min(1.0, 2 * tail) if b != c else 1.0)


def test_calibration_worked():
    """Two bins: 0.61 and 0.63 in (9/15, 10/15], of which one is right; 1.0 in the last one, right."""
    found = uncertainty.calibration(np.array([0.61, 0.63, 1.0]), np.array([True, False, True]))
    assert found["ece"] == pytest.approx(2 / 3 * 0.12)
    assert [(one["count"], one["accuracy"]) for one in found["bins"]] == [(2, 0.5), (1, 1.0)]
    assert found["bins"][0]["from"] == pytest.approx(9 / 15) and found["bins"][1]["to"] == 1.0


@given(st.lists(st.tuples(st.floats(0.01, 1.0), st.booleans()), min_size=1))
def test_calibration_by_its_definition(pairs):
    confidence, right = (np.array(column) for column in zip(*pairs, strict=True))
    expected = 0.0
    for m in range(15):
        inside = (confidence > m / 15) & (confidence <= (m + 1) / 15)
        if inside.any():
            expected += abs(right[inside].mean() - confidence[inside].mean()) * inside.mean()
    assert uncertainty.calibration(confidence, right)["ece"] == pytest.approx(expected)


def test_bleu_and_chrf_of_chosen_sentences_are_those_of_the_corpus():
    sacrebleu = pytest.importorskip("sacrebleu")
    said = ["the cat sat on the mat", "a dog", "it is raining today", "no"]
    right = ["the cat sat on a mat", "the dog ran", "it rains today", "yes"]
    score = scores.translation_scorer(said, right)
    for chosen in ([0, 1, 2, 3], [0, 0, 2], [3, 1]):
        texts = [said[i] for i in chosen], [[right[i] for i in chosen]]
        found = score(np.array(chosen))
        assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(*texts).score)
        assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(*texts).score)
