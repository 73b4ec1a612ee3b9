"""lm.scores against the libraries and scripts that publish them, and defined numbers for degenerate inputs."""

import collections
import re
import string
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm import scores
from lm.schema import ConfigError

PAIRS = st.integers(2, 4).flatmap(
    lambda classes: st.tuples(
        st.just(classes), st.lists(st.tuples(*[st.integers(0, classes - 1)] * 2), min_size=1, max_size=20)
    )
)


@given(PAIRS)
def test_classification_is_that_of_scikit_learn(drawn):
    metrics = pytest.importorskip("sklearn.metrics")
    classes, pairs = drawn
    labels, predictions = np.array(pairs).T
    found = scores.classification(labels, predictions, classes)
    average = "binary" if classes == 2 else "macro"
    expected = metrics.f1_score(labels, predictions, labels=range(classes), average=average, zero_division=0)
    assert found["f1"] == pytest.approx(expected)
    if len({*labels, *predictions}) > 1:  # else scikit-learn warns, and says 0 as well
        assert found["matthews"] == pytest.approx(metrics.matthews_corrcoef(labels, predictions))
    assert scores.accuracy(labels, predictions) == pytest.approx(metrics.accuracy_score(labels, predictions))


def test_degenerate_classes_have_defined_scores():
    ones, zeros = np.ones(4, int), np.zeros(4, int)
    assert scores.classification(ones, ones, 2) == {"f1": 1.0, "matthews": 0.0}
    assert scores.classification(ones, zeros, 2) == {"f1": 0.0, "matthews": 0.0}
    assert scores.classification(zeros, zeros, 3) == {"f1": pytest.approx(1 / 3), "matthews": 0.0}
    assert scores.accuracy(ones[:0], ones[:0]) == 0.0


def test_regression_by_the_definitions_and_where_they_end():
    rng = np.random.default_rng(0)
    x = rng.normal(size=30)
    y = np.round(x + rng.normal(size=30))  # with ties
    found = scores.regression(x.astype(np.float32), y.astype(np.float32))
    ranks = [np.array([(a > of).mean() + (a == of).mean() / 2 for a in of]) for of in (x, y)]
    assert found["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1], rel=1e-5)
    assert found["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1], rel=1e-5)
    for same in (x, np.full(30, np.nan), x[:1], x[:0]):
        constant = np.full(len(same), 2.0)
        assert scores.regression(constant, same) == {"pearson": 0.0, "spearman": 0.0}


def spans(tags):
    """Entities as conlleval finds them, by its rules for when a chunk begins, over (prefix, type) pairs."""
    found, begin = set(), None
    for i, tag in enumerate([*tags, "O"]):
        before = tags[i - 1] if i else "O"
        goes_on = tag.startswith("I-") and before != "O" and before[2:] == tag[2:]
        if begin is not None and not goes_on:
            found.add((begin, i, before[2:]))
            begin = None
        if tag != "O" and not goes_on:
            begin = i
    return found


TAGS = st.lists(st.tuples(*[st.sampled_from(["O", "O", "B-X", "I-X", "B-Y", "I-Y"])] * 2), min_size=1, max_size=8)


@given(st.lists(TAGS, min_size=1, max_size=4))
def test_entities_are_counted_as_conlleval_counts_them(sentences):
    pytest.importorskip("seqeval")
    expected, predicted = ([[pair[side] for pair in sentence] for sentence in sentences] for side in (0, 1))
    found = scores.entities(expected, predicted)
    truth, said = ({(i, *span) for i, tags in enumerate(of) for span in spans(tags)} for of in (expected, predicted))
    precision = len(truth & said) / len(said) if said else 0.0
    recall = len(truth & said) / len(truth) if truth else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    wanted = {"entity_precision": precision, "entity_recall": recall, "entity_f1": f1}
    assert found == {name: pytest.approx(value) for name, value in wanted.items()}


# From the evaluation script of SQuAD v1.1 (rajpurkar.github.io/SQuAD-explorer), as it is but for its layout.


def normalize_answer(s):
    def remove_articles(text):
        return re.sub(r"\b(a|an|the)\b", " ", text)

    def remove_punc(text):
        exclude = set(string.punctuation)
        return "".join(ch for ch in text if ch not in exclude)

    return " ".join(remove_articles(remove_punc(s.lower())).split())


def f1_score(prediction, ground_truth):
    prediction_tokens = normalize_answer(prediction).split()
    ground_truth_tokens = normalize_answer(ground_truth).split()
    common = collections.Counter(prediction_tokens) & collections.Counter(ground_truth_tokens)
    num_same = sum(common.values())
    if num_same == 0:
        return 0
    precision = 1.0 * num_same / len(prediction_tokens)
    recall = 1.0 * num_same / len(ground_truth_tokens)
    return (2 * precision * recall) / (precision + recall)


ANSWER = st.lists(st.sampled_from(["The", "a", "an", "cat", "Cat's", "sat.", "308", "-", "\n", "Ärzte", "“x”"])).map(
    " ".join
)


@given(st.lists(st.tuples(ANSWER, st.lists(ANSWER, min_size=1, max_size=3)), min_size=1, max_size=4))
def test_answers_are_scored_as_by_the_script_of_squad(pairs):
    said, references = zip(*pairs, strict=True)
    found = scores.answers(said, references)
    exact = [max(normalize_answer(p) == normalize_answer(r) for r in refs) for p, refs in pairs]
    overlap = [max(f1_score(p, r) for r in refs) for p, refs in pairs]
    assert found == {"exact_match": pytest.approx(np.mean(exact)), "f1": pytest.approx(np.mean(overlap))}


def test_answers_worked():
    assert scores.answers(["the Cat sat."], [["dog", "cat sat"]]) == {"exact_match": 1.0, "f1": 1.0}
    assert scores.answers(["black cat"], [["cat"]]) == {"exact_match": 0.0, "f1": pytest.approx(2 / 3)}
    assert scores.answers([], []) == {"exact_match": 0.0, "f1": 0.0}


def test_translation():
    """BLEU by its definition on a pair with no smoothing to do, chrF of what shares nothing and everything."""
    pytest.importorskip("sacrebleu")
    said, reference = "the quick brown fox jumped over the dog", "the quick brown fox jumps over the lazy dog"
    precisions = [7 / 8, 4 / 7, 2 / 6, 1 / 5]
    bleu = np.exp(1 - 9 / 8) * np.prod(precisions) ** 0.25
    assert scores.translation([said], [reference])["bleu"] == pytest.approx(100 * bleu)
    assert scores.translation([reference], [reference]) == {"bleu": pytest.approx(100), "chrf": pytest.approx(100)}
    assert scores.translation(["xyz"], ["abc"]) == {"bleu": 0.0, "chrf": 0.0}
    assert scores.translation([""], ["abc"]) == {"bleu": 0.0, "chrf": 0.0}
    assert scores.translation([], []) == {"bleu": 0.0, "chrf": 0.0}


def test_a_missing_library_is_named_with_the_extra_that_brings_it(monkeypatch):
    for name in ("seqeval", "seqeval.metrics", "seqeval.metrics.sequence_labeling", "sacrebleu"):
        monkeypatch.setitem(sys.modules, name, None)
    for call, package in (
        (lambda: scores.entities([["O"]], [["O"]]), "seqeval"),
        (lambda: scores.translation(["a"], ["a"]), "sacrebleu"),
    ):
        with pytest.raises(ConfigError, match=rf"needs the package {package} .*pip install 'lm\[scores\]'"):
            call()


def test_nothing_of_the_extra_is_imported_before_it_is_needed():
    code = "import lm.scores, sys; print([m for m in ('sklearn', 'seqeval', 'sacrebleu', 'scipy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
