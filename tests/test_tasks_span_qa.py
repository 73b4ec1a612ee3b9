"""lm.tasks.span_qa: from answers to token labels, and from predicted tokens back to characters of the context."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.config import CheckpointConfig, Config, DataConfig
from lm.data import tokenizer
from lm.data.record import DataError
from lm.tasks import span_qa
from tests import toys

PROSE = ["The Panthers defense gave up just 308 points, ranking sixth. Wie viele? "] * 40 + ["naïve 東京 (PD)"] * 3
TOKENIZER = tokenizer.train(PROSE, 330, 1_000_000)
CONTEXT = "The Panthers gave up just 308 points in 東京, ranking sixth in the league."


def config(seq_len: int, **options) -> Config:
    return Config(task=toys.task("span_qa", **options), data=DataConfig(seq_len=seq_len, packing="pad"))


def record(context: str, answer: str, start: int | None = None, question: str = "Wie viele?") -> dict:
    start = context.index(answer) if start is None else start
    answers = [{"text": answer, "answer_start": start}]
    return {"question": question, "context": context, "answers": answers, "source": "file:7", "identity": question}


def make(given: dict, seq_len: int, counts: Counter[str] | None = None) -> list:
    return span_qa.windows(given, TOKENIZER, config(seq_len), Counter() if counts is None else counts)


def gold_logits(made: list, seq_len: int) -> np.ndarray:
    """Logits of a model that has learnt the labels: 10 at each label, 0 elsewhere."""
    logits = np.zeros((len(made), seq_len, 2), np.float32)
    for row, example in enumerate(made):
        for side, position in enumerate(example.columns["labels"]):
            logits[row, position, side] = 10.0
    return logits


def test_a_short_context_is_one_window():
    (made,) = make(record(CONTEXT, "308 points"), 128)
    question, context = TOKENIZER.encode("Wie viele?"), TOKENIZER.encode(CONTEXT)
    bos, eos = TOKENIZER.bos_id, TOKENIZER.eos_id
    assert made.columns["tokens"].tolist() == [bos, *question, eos, *context, eos]
    assert made.columns["type_ids"].tolist() == [0] * (len(question) + 2) + [1] * (len(context) + 1)
    first, last = made.columns["labels"]
    assert TOKENIZER.decode(made.columns["tokens"][first : last + 1]).strip() == "308 points"
    assert made.meta.answers == ["308 points"] and made.meta.identity == "Wie viele?"


@given(data=st.data(), seq_len=st.integers(5, 40))
def test_windows_cover_the_context_and_are_labelled_by_whether_they_hold_the_answer(data, seq_len):
    """By brute force over tokens: a window is labelled if and only if it holds every token of the answer."""
    text = data.draw(st.text(st.sampled_from("ab 東308,\u2581"), min_size=1, max_size=40).filter(str.strip))
    start = data.draw(st.integers(0, len(text) - 1))
    answer = text[start : data.draw(st.integers(start + 1, len(text)))]
    counts: Counter[str] = Counter()
    made = make(record(text, answer, start), seq_len, counts)
    ids, offsets = TOKENIZER.encode_with_offsets(text)
    wanted = [i for i, (first, end) in enumerate(offsets) if first < start + len(answer) and end > start]
    prefix = 2 + min(len(TOKENIZER.encode("Wie viele?")), (seq_len - 3) // 2)
    room = seq_len - prefix - 1
    covered: set[int] = set()
    at = 0
    for example in made:
        tokens = example.columns["tokens"].tolist()
        inside = tokens[prefix:-1]
        here = range(at, at + len(inside))
        assert len(tokens) <= seq_len and inside == ids[at : at + room] and tokens[-1] == TOKENIZER.eos_id
        holds = set(wanted) <= set(here)
        expected = [prefix + wanted[0] - at, prefix + wanted[-1] - at] if holds else [0, 0]
        assert example.columns["labels"].tolist() == expected
        ranges = [(0, 0)] * prefix + [offsets[i] for i in here]
        ranges += [(0, 0)] * (seq_len - len(ranges))
        assert example.meta.offsets_Lx2.tolist() == [list(pair) for pair in ranges]
        covered |= set(here)
        at += max(1, room // 2)
    assert covered == set(range(len(ids))) and len(made[-1].columns["tokens"]) > prefix + 1
    assert len(made) < 2 or at - max(1, room // 2) + room >= len(ids) > at - 2 * max(1, room // 2) + room
    lost = not any(example.columns["labels"].any() for example in made)
    assert counts["answer_in_no_window"] == int(lost)
    assert not lost or len(wanted) > room - room // 2


def test_cuts_are_counted():
    counts: Counter[str] = Counter()
    make(record(CONTEXT, "just 308 points in 東京, ranking", question="Wie viele? " * 9), 20, counts)
    assert counts == {"question_cut": 1, "context_cut": 1, "answer_in_no_window": 1}


def test_the_best_span_equals_that_of_exhaustive_search():
    rng = np.random.default_rng(0)
    given = record(CONTEXT, "308 points")
    for seq_len in (24, 60):
        made = make(given, seq_len)
        logits = rng.normal(size=(len(made), seq_len, 2)).astype(np.float32)
        logits[:, :, 0] -= 0.2 * np.arange(seq_len)  # favours long spans, so that the length limit takes effect
        logits[:, :, 1] += 0.2 * np.arange(seq_len)
        best: dict[str, float] = {}
        for row, example in enumerate(made):
            offsets = example.meta.offsets_Lx2.tolist()
            places = [i for i, (_, end) in enumerate(offsets) if end]
            for i in places:
                for j in (j for j in places if i <= j < i + 30):
                    if CONTEXT[slice(*offsets[i])].strip() and CONTEXT[slice(*offsets[j])].strip():
                        text = CONTEXT[offsets[i][0] : offsets[j][1]].strip()
                        value = float(logits[row, i, 0]) + float(logits[row, j, 1])
                        best[text] = max(best.get(text, -np.inf), value)
        found = span_qa.best_answers(logits, [example.meta for example in made], 5)[0][1]
        expected = sorted(best.items(), key=lambda pair: -pair[1])[:5]
        assert [answer.text for answer in found] == [text for text, _ in expected]
        np.testing.assert_allclose([answer.score for answer in found], [value for _, value in expected], rtol=1e-6)
        assert all(CONTEXT[answer.start : answer.end] == answer.text for answer in found)


@pytest.mark.parametrize("surest", [0, 1])
def test_a_span_in_two_windows_gets_the_better_of_its_scores(surest):
    made = [example for example in make(record(CONTEXT, "308"), 20) if example.columns["labels"].any()]
    assert len(made) == 2
    logits = gold_logits(made, 20) * np.float32([[[1 + (row == surest)]] for row in range(2)])
    best, *_ = span_qa.best_answers(logits, [example.meta for example in made], 3)[0][1]
    assert (best.text, best.score) == ("308", 40.0)


def test_a_question_or_a_separator_is_never_an_answer():
    (made,) = make(record(CONTEXT, "308 points"), 128)
    logits = gold_logits([made], 128)
    logits[:, np.flatnonzero(made.meta.offsets_Lx2[:, 1] == 0)] = 99.0
    assert span_qa.best_answers(logits, [made.meta], 1)[0][1][0].text == "308 points"
    assert span_qa.best_answers(np.full_like(logits, np.nan), [made.meta], 1)[0][1] == []
    assert span_qa.score({"span_logits": np.full_like(logits, np.nan)}, [made.meta], config(128)) == {
        "exact_match": 0.0,
        "f1": 0.0,
    }


def test_scores_count_questions_not_windows():
    one, two = (
        record(CONTEXT, "308 points"),
        record(CONTEXT, "sixth", question="How?"),
    )  # both from one line of a JSON list
    made = [*make(one, 40), *make(two, 40)]
    assert len(made) == 4
    meta, logits = [example.meta for example in made], gold_logits(made, 40)
    best = span_qa.best_answers(logits, meta, 1)
    assert [(window.question, answers[0].text) for window, answers in best] == [
        ("Wie viele?", "308 points"),
        ("How?", "sixth"),
    ]
    assert span_qa.score({"span_logits": logits}, meta, config(40)) == {"exact_match": 1.0, "f1": 1.0}
    shifted = np.roll(logits[:, :, 0], -1, axis=1)  # each answer begins a token early
    found = span_qa.score({"span_logits": np.stack([shifted, logits[:, :, 1]], -1)}, meta, config(40))
    assert found["exact_match"] == 0.0 and 0.0 < found["f1"] < 1.0


# Questions without an answer ------------------------------------------------------------------------------------------


def test_all_windows_of_a_question_without_an_answer_point_at_the_start():
    counts: Counter[str] = Counter()
    made = make(record(CONTEXT, "308") | {"answers": []}, 40, counts)
    assert len(made) == 2 and all(example.columns["labels"].tolist() == [0, 0] for example in made)
    assert counts == {"context_cut": 1, "without_answer": 1}
    assert [example.meta.answers for example in made] == [[], []]


def asked(rng: np.random.Generator, seq_len: int) -> tuple[list, list[list], np.ndarray]:
    """Records with and without an answer, the examples of each, and logits of them all."""
    records = []
    for number in range(6):
        given = record(CONTEXT, str(rng.choice(["308 points", "sixth", "Panthers"])), question=f"{number}?")
        records.append(given | ({"answers": []} if number % 3 == 0 else {}))
    made = [make(given, seq_len) for given in records]
    logits = rng.normal(size=(sum(map(len, made)), seq_len, 2)).astype(np.float32)
    for row, example in enumerate(example for examples in made for example in examples):
        for side, position in enumerate(example.columns["labels"]):
            logits[row, position, side] += rng.uniform(0, 6)
    return records, made, logits


@pytest.mark.parametrize("threshold", [-3.0, 0.0, 2.5])
def test_unanswerable_questions_are_scored_as_in_run_squad(threshold):
    """By brute force over all windows and spans: '' where the lowest score of [CLS] as a span is above the best span's
    by more than the threshold."""
    for seed in range(3):
        records, made, logits = asked(np.random.default_rng(seed), 40)
        assert any(len(examples) > 1 for examples in made)
        row, right, of_answerable = 0, [], []
        for question, examples in zip(records, made, strict=True):
            null, best = np.inf, (-np.inf, "")
            for example in examples:
                x, offsets = logits[row].astype(np.float64), example.meta.offsets_Lx2
                null, row = min(null, x[0, 0] + x[0, 1]), row + 1
                # No answer begins or ends with a white-space token.
                places = np.array([n for n, (a, b) in enumerate(offsets) if CONTEXT[a:b].strip()])
                for i in places:
                    for j in places[(places >= i) & (places < i + 30)]:
                        best = max(best, (x[i, 0] + x[j, 1], CONTEXT[offsets[i, 0] : offsets[j, 1]].strip()))
            said = "" if null - best[0] > threshold else best[1]
            accepted = [answer["text"] for answer in question["answers"]] or [""]
            right.append(said in accepted)
            of_answerable += [right[-1]] if question["answers"] else []
        cfg = config(40, null_threshold=threshold)
        meta = [example.meta for examples in made for example in examples]
        found = span_qa.score({"span_logits": logits}, meta, cfg)
        assert found["exact_match"] == pytest.approx(np.mean(right))
        assert found["HasAns_exact"] == pytest.approx(np.mean(of_answerable))
        assert set(found) == set(span_qa.score_names(cfg))
        if found["best_f1"] == pytest.approx(2 / 6):  # never answering is best
            continue
        better = config(40, null_threshold=found["best_f1_thresh"])
        assert span_qa.score({"span_logits": logits}, meta, better)["f1"] == pytest.approx(found["best_f1"])


def test_if_all_questions_are_answerable_each_gets_an_answer():
    (made,) = make(record(CONTEXT, "308 points"), 128)
    logits = gold_logits([made], 128)
    logits[:, 0] = 99.0  # higher than any span
    cfg = config(128)
    assert span_qa.score({"span_logits": logits}, [made.meta], cfg) == {"exact_match": 1.0, "f1": 1.0}
    best_by = dataclasses.replace(cfg, checkpoint=CheckpointConfig(best_metric="NoAns_f1"))
    with pytest.raises(DataError, match="best_metric' is NoAns_f1, but no held-out question is unanswerable"):
        span_qa.score({"span_logits": logits}, [made.meta], best_by)


def test_repeated_questions_are_scored_separately():
    given = record(CONTEXT, "308 points")
    made = [*make(given | {"identity": "a"}, 128), *make(given | {"identity": "b", "answers": []}, 128)]
    best = span_qa.best_answers(gold_logits(made, 128), [example.meta for example in made], 1)
    assert [window.answers for window, _ in best] == [["308 points"], []]


@pytest.mark.parametrize("language", ["en", "de"])
def test_all_answers_of_xquad_are_recovered_from_perfect_logits(shared_data, language):
    """From the labels and the logits of a perfect model back to the characters of each answer."""
    counts: Counter[str] = Counter()
    exact, inside, total = 0, 0, 0
    for asked in questions(Path(shared_data("xquad") / f"xquad.{language}.json")):
        made = make(asked, 256, counts)
        answer = asked["answers"][0]
        labelled = [example for example in made if example.columns["labels"].any()]
        for example in labelled:
            first, last = example.columns["labels"]
            start, end = example.meta.offsets_Lx2[first, 0], example.meta.offsets_Lx2[last, 1]
            assert TOKENIZER.decode(example.columns["tokens"][first : last + 1]) == asked["context"][start:end]
            # The span is minimal: without its first or last token, part of the answer is missing.
            assert start <= answer["answer_start"] < example.meta.offsets_Lx2[first, 1]
            assert example.meta.offsets_Lx2[last, 0] < answer["answer_start"] + len(answer["text"]) <= end
        if labelled:
            best = span_qa.best_answers(gold_logits(labelled, 256), [example.meta for example in labelled], 1)
            said = best[0][1][0].text if last - first < 30 else answer["text"]
            exact, inside = exact + (said == answer["text"].strip()), inside + (answer["text"].strip() in said)
        total += 1
    assert total == 1190 and counts["answer_in_no_window"] < 12
    assert inside == total - counts["answer_in_no_window"] and exact > 0.95 * total


def questions(path: Path) -> list[dict]:
    """Every answer in the file, including contexts with a byte order mark inside."""
    return [
        asked | {"context": paragraph["context"], "identity": asked["id"]}
        for article in json.loads(path.read_text())["data"]
        for paragraph in article["paragraphs"]
        for asked in paragraph["qas"]
    ]
