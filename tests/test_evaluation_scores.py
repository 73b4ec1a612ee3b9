"""lm/evaluation/scores.py against the libraries and scripts that publish them, and degenerate inputs."""

import collections
import json
import re
import string
import subprocess
import sys
from typing import get_args, get_type_hints

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.config.schema import ConfigError
from lm.evaluation import scores
from lm.tasks.seq2seq import TranslationOptions

PAIRS = st.integers(2, 4).flatmap(
    lambda classes: st.tuples(
        st.just(classes), st.lists(st.tuples(*[st.integers(0, classes - 1)] * 2), min_size=1, max_size=20)
    )
)


@given(PAIRS)
def test_classification_equals_scikit_learn(drawn):
    metrics = pytest.importorskip("sklearn.metrics")
    classes, pairs = drawn
    labels, predictions = np.array(pairs).T
    found = scores.classification(labels, predictions, classes)
    average = "binary" if classes == 2 else "macro"
    expected = metrics.f1_score(labels, predictions, average=average, zero_division=0)
    assert found["f1"] == pytest.approx(expected)
    if len({*labels, *predictions}) > 1:  # otherwise scikit-learn warns, and gives 0 too
        assert found["matthews"] == pytest.approx(metrics.matthews_corrcoef(labels, predictions))
    assert scores.accuracy(labels, predictions) == pytest.approx(metrics.accuracy_score(labels, predictions))


def test_macro_f1_is_over_the_classes_that_occur():
    """42 of 50 labels occur: a perfect classifier has 1.0. A class that is only predicted counts, as 0."""
    labels = np.arange(42).repeat(3)
    assert scores.classification(labels, labels, 50)["f1"] == 1.0
    once_wrong = np.append(labels, 0), np.append(labels, 49)
    f1_of_0 = 2 * 3 / (4 + 3)
    assert scores.classification(*once_wrong, 50)["f1"] == pytest.approx((41 + f1_of_0) / 43)


def test_degenerate_classes_have_defined_scores():
    ones, zeros = np.ones(4, int), np.zeros(4, int)
    assert scores.classification(ones, ones, 2) == {"f1": 1.0, "matthews": 0.0}
    assert scores.classification(ones, zeros, 2) == {"f1": 0.0, "matthews": 0.0}
    assert scores.classification(zeros, zeros, 3) == {"f1": 1.0, "matthews": 0.0}
    assert scores.classification(zeros[:0], zeros[:0], 3) == {"f1": 0.0, "matthews": 0.0}
    assert scores.accuracy(ones[:0], ones[:0]) == 0.0


def test_regression_by_the_definitions_and_where_undefined():
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
    """Entities as conlleval finds them, over tags in the letters of IOBES."""
    found, begin = set(), None
    for i, tag in enumerate([*tags, "O"]):
        before = tags[i - 1] if i else "O"
        goes_on = tag[0] in "IE" and before[0] in "BI" and before[1:] == tag[1:]
        if begin is not None and not goes_on:
            found.add((begin, i, before[2:]))
            begin = None
        if tag != "O" and not goes_on:
            begin = i
    return found


def strict_spans(tags, scheme):
    """By trying every span: its tags are an entity as the scheme writes it, and it is not a part of a longer one."""
    found = set()
    for begin in range(len(tags)):
        for end in range(begin + 1, len(tags) + 1):
            types, letters = {tag[2:] for tag in tags[begin:end]}, "".join(tag[0] for tag in tags[begin:end])
            goes_on = end < len(tags) and tags[end] == f"I-{tags[begin][2:]}"
            match scheme:
                case "IOB1":
                    before = tags[begin - 1] if begin else "O"
                    begins = letters[0] == ("B" if before[2:] == tags[begin][2:] else "I")
                    is_one = begins and set(letters[1:]) <= {"I"} and not goes_on
                case "IOB2":
                    is_one = letters[0] == "B" and set(letters[1:]) <= {"I"} and not goes_on
                case "IOBES":
                    is_one = bool(re.fullmatch("S|BI*E", letters))
            if is_one and len(types) == 1 and tags[begin] != "O":
                found.add((begin, end, tags[begin][2:]))
    return found


def f1_of(truth, said):
    precision = len(truth & said) / len(said) if said else 0.0
    recall = len(truth & said) / len(truth) if truth else 0.0
    return precision, recall, 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def both_sides(sentences, found_in):
    return (
        {(i, *span) for i, pairs in enumerate(sentences) for span in found_in([p[side] for p in pairs])}
        for side in (0, 1)
    )


def pairs_of_tags(*tags):
    pair = st.tuples(*[st.sampled_from(["O", "O", *tags])] * 2)
    return st.lists(st.lists(pair, min_size=1, max_size=8), min_size=1, max_size=4)


IOB, ENDS = ("B-X", "I-X", "B-Y", "I-Y"), ("E-X", "S-X", "E-Y", "S-Y")


@given(pairs_of_tags(*IOB) | pairs_of_tags(*IOB, *ENDS))
def test_entities_are_counted_as_conlleval_counts_them(sentences):
    pytest.importorskip("seqeval")
    expected, predicted = ([[pair[side] for pair in sentence] for sentence in sentences] for side in (0, 1))
    names = ("entity_precision", "entity_recall", "entity_f1")
    wanted = dict(zip(names, map(pytest.approx, f1_of(*both_sides(sentences, spans))), strict=True))
    assert scores.entities(expected, predicted) == wanted


def as_iob1(tags):
    """With I- for a B- that IOB1 would not have: what seqeval makes of the words behind one is its own choice."""
    pairs = zip(["O", *tags], tags, strict=False)
    return [f"I{tag[1:]}" if tag[0] == "B" and before[1:] != tag[1:] else tag for before, tag in pairs]


@given(st.data(), st.sampled_from(["IOB1", "IOB2", "IOBES"]))
def test_strict_entities_follow_the_scheme(data, scheme):
    """By brute force over spans."""
    pytest.importorskip("seqeval")
    sentences = data.draw(pairs_of_tags(*IOB, *ENDS) if scheme == "IOBES" else pairs_of_tags(*IOB))
    if scheme == "IOB1":
        sentences = [list(zip(*map(as_iob1, zip(*pairs, strict=True)), strict=True)) for pairs in sentences]
    expected, predicted = ([[pair[side] for pair in sentence] for sentence in sentences] for side in (0, 1))
    _, _, f1 = f1_of(*both_sides(sentences, lambda tags: strict_spans(tags, scheme)))
    assert scores.strict_entities(expected, predicted, scheme) == {"entity_f1_strict": pytest.approx(f1)}


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
def test_answers_are_scored_as_by_the_squad_script(pairs):
    said, references = zip(*pairs, strict=True)
    found = scores.answers(said, references)
    exact = [max(normalize_answer(p) == normalize_answer(r) for r in refs) for p, refs in pairs]
    overlap = [max(f1_score(p, r) for r in refs) for p, refs in pairs]
    assert found == {"exact_match": pytest.approx(np.mean(exact)), "f1": pytest.approx(np.mean(overlap))}


def test_answers_worked():
    assert scores.answers(["the Cat sat."], [["dog", "cat sat"]]) == {"exact_match": 1.0, "f1": 1.0}
    assert scores.answers(["black cat"], [["cat"]]) == {"exact_match": 0.0, "f1": pytest.approx(2 / 3)}
    assert scores.answers([], []) == {"exact_match": 0.0, "f1": 0.0}


def f1_v2(prediction, reference):
    """compute_f1 of SQuAD v2.0's script: two texts without words match."""
    if not normalize_answer(prediction) or not normalize_answer(reference):
        return float(normalize_answer(prediction) == normalize_answer(reference))
    return f1_score(prediction, reference)


def squad_v2(pairs, margins, threshold):
    """What evaluate-v2.0.py prints, with the margins as its na-probs, question by question and from 0 to 1."""
    raw, found = [], {}
    for said, answers in pairs:
        gold = [text for text in answers if normalize_answer(text)] or [""]
        exact = max(float(normalize_answer(said) == normalize_answer(text)) for text in gold)
        raw.append((exact, max(f1_v2(said, text) for text in gold)))
    has = [bool(answers) for _, answers in pairs]
    for k, name in enumerate(("exact", "f1")):
        given_ = [float(not h) if m > threshold else r[k] for r, h, m in zip(raw, has, margins, strict=True)]
        found["exact_match" if name == "exact" else name] = sum(given_) / len(pairs)
        for group, wanted in (("HasAns", True), ("NoAns", False)):
            own = [value for value, h in zip(given_, has, strict=True) if h == wanted]
            if own:
                found[f"{group}_{name}"] = sum(own) / len(own)
        best = now = sum(not h for h in has)
        where = 0.0
        for i in sorted(range(len(pairs)), key=lambda i: margins[i]):
            now += raw[i][k] if has[i] else -float(bool(pairs[i][0]))
            if now > best:
                best, where = now, margins[i]
        found[f"best_{name}"], found[f"best_{name}_thresh"] = best / len(pairs), where
    return found


QUESTION = st.tuples(ANSWER, st.lists(ANSWER.filter(bool), max_size=2), st.floats(-9, 9))


@given(st.lists(QUESTION, min_size=1, max_size=6, unique_by=lambda asked: asked[2]), st.floats(-9, 9))
def test_answers_or_none_are_scored_as_by_the_squad_v2_script(asked, threshold):
    pairs, margins = [(said, answers) for said, answers, _ in asked], [margin for _, _, margin in asked]
    found = scores.answers_or_none(*zip(*pairs, strict=True), np.array(margins), threshold)
    wanted = squad_v2(pairs, margins, threshold)
    assert found == {name: pytest.approx(value) for name, value in wanted.items()}


def test_answers_or_none_worked():
    """Two questions with an answer, right and half right; two without, one of which is answered nevertheless."""
    said, accepted = ["cat", "black dog", "fish", "bird"], [["the cat"], ["dog", "a dog"], [], []]
    found = scores.answers_or_none(said, accepted, np.array([-2.0, 1.0, -1.0, 3.0]), 0.0)
    assert found == {
        **{"exact_match": 0.5, "f1": 0.5, "HasAns_exact": 0.5, "HasAns_f1": 0.5, "NoAns_exact": 0.5, "NoAns_f1": 0.5},
        **{"best_exact": 0.75, "best_exact_thresh": -2.0, "best_f1": 0.75, "best_f1_thresh": -2.0},
    }
    only = scores.answers_or_none(["cat"], [[]], np.array([0.5]), 0.0)
    assert "HasAns_f1" not in only and only["NoAns_f1"] == only["best_f1"] == 1.0 and only["best_f1_thresh"] == 0.0


def test_a_threshold_cannot_separate_equal_margins():
    found = scores.answers_or_none(["cat", "dog"], [["cat"], []], np.array([1.0, 1.0]), 0.0)
    assert found["best_f1"] == found["f1"] == 0.5


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


@pytest.mark.parametrize("tokenizer", ["13a", "zh"])
def test_bleu_equals_sacrebleu_with_its_tokenizer_and_signature(tokenizer, tmp_path):
    pytest.importorskip("sacrebleu")
    said, references = ["我今天去北京看朋友。", "猫坐在垫子上"], ["我今天到北京看朋友。", "猫正坐在垫子上"]
    for name, texts in (("said", said), ("references", references)):
        (tmp_path / name).write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    command = ["-m", "sacrebleu", str(tmp_path / "references"), "-i", str(tmp_path / "said"), "-tok", tokenizer]
    command += ["-m", "bleu", "chrf", "-w", "9"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
    bleu, chrf = json.loads(done.stdout)
    found = scores.translation(said, references, tokenizer)
    assert found == {"bleu": pytest.approx(bleu["score"]), "chrf": pytest.approx(chrf["score"])}
    assert scores.translation_signatures(tokenizer) == {"bleu": bleu["signature"], "chrf": chrf["signature"]}
    assert (found["bleu"] > 40) == (tokenizer != "13a")  # which counts each sentence as one word


def test_the_bleu_tokenizer_depends_on_the_target_language():
    spaced, chinese, korean, thai = ["Ein Hund, 東京."], ["猫坐在垫子上。"], ["서울에 간다."], ["ฉันไปโรงเรียน"]
    for code, texts, tokenizer in (
        *(("de", spaced, "13a"), ("", spaced, "13a"), ("zh", chinese, "zh"), ("zh-CN", chinese, "zh")),
        *(("ja", chinese, "ja-mecab"), ("jpn_Jpan", chinese, "ja-mecab"), ("test.ko", korean, "ko-mecab")),
        *(("kor_Hang", korean, "ko-mecab"), ("ja", [], "ja-mecab")),
    ):
        assert scores.bleu_tokenizer("auto", code, texts) == tokenizer
        assert scores.bleu_tokenizer("flores200", code, texts) == "flores200"
    for texts in (chinese, korean, thai):
        with pytest.raises(ConfigError, match=r"\(language 'ref'\).*'task.bleu_tokenizer'.*flores200"):
            scores.bleu_tokenizer("auto", "ref", texts)


def test_missing_packages_of_a_bleu_tokenizer_are_named(monkeypatch, tmp_path):
    sacrebleu = pytest.importorskip("sacrebleu")
    known = set(get_args(get_type_hints(TranslationOptions)["bleu_tokenizer"]))
    assert known == {*sacrebleu.BLEU.TOKENIZERS, "auto"} - {"spm"}  # spm is flores101 by an older name
    for name, module in (("ja", "tokenizer_ja_mecab"), ("ko", "tokenizer_ko_mecab")):
        monkeypatch.setattr(f"sacrebleu.tokenizers.{module}.MeCab", None)
        with pytest.raises(ConfigError, match=rf"{name}-mecab needs more packages: pip install 'sacrebleu\[{name}\]'"):
            scores.translation_signatures(f"{name}-mecab")

    def no_network(*_):
        raise OSError("no network")

    monkeypatch.setattr("sacrebleu.tokenizers.tokenizer_spm.SACREBLEU_DIR", str(tmp_path))
    monkeypatch.setattr("sacrebleu.tokenizers.tokenizer_spm.download_file", no_network)
    with pytest.raises(ConfigError, match=rf"flores200 needs .* at {tmp_path}/models/flores200.*no network.*https://"):
        scores.translation_signatures("flores200")


def test_a_missing_library_is_named_with_the_extra_that_installs_it(monkeypatch):
    for name in ("seqeval", "seqeval.metrics", "seqeval.metrics.sequence_labeling", "sacrebleu"):
        monkeypatch.setitem(sys.modules, name, None)
    for call, package in (
        (lambda: scores.entities([["O"]], [["O"]]), "seqeval"),
        (lambda: scores.translation(["a"], ["a"]), "sacrebleu"),
    ):
        with pytest.raises(ConfigError, match=rf"needs the package {package} .*pip install -e '\.\[scores\]'"):
            call()


def test_optional_libraries_are_imported_only_when_needed():
    names = ("sklearn", "seqeval", "sacrebleu", "scipy")
    code = f"import lm.evaluation.scores, sys; print([m for m in {names} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
