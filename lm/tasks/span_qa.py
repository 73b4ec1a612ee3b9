"""Extractive question answering (SQuAD v1.1 and v2.0, Rajpurkar et al. 2016, 2018): the answer is a span of a context,
or there is none."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm import losses
from lm.config import Config, schema
from lm.data.example import Columns, Example, Rows
from lm.data.record import DataError, Record
from lm.data.tokenizer import Tokenizer
from lm.evaluation import scores
from lm.tasks.base import Predictor, Scorer, Task, field_texts, holds_pair, sequence_columns
from lm.types import Apply, Batch, Head, LossFn, LossTerms, Outputs, Params

MAX_ANSWER_TOKENS = 30  # as BERT's run_squad.py


@dataclasses.dataclass(frozen=True)
class SpanQaOptions:
    """Options of span question answering."""

    name: str = "span_qa"
    # For unanswerable questions: answer '' if the no-answer score exceeds the best span's by more than this.
    null_threshold: float = schema.scoring_only(0.0)


class Window(NamedTuple):
    """What scoring needs to know about a row.

    Attributes:
      identity: identity of the question.
      question: the whole question, which the row may have cut.
      context: the whole context.
      answers: the accepted answers; () if the question is unanswerable.
      offsets_Lx2: int32, the characters [start, end) of the context at each position; (0, 0) elsewhere.
    """

    identity: str
    question: str
    context: str
    answers: list[str]
    offsets_Lx2: np.ndarray


class Answer(NamedTuple):
    """A candidate answer: the sum of its two logits, its characters [start, end) of the context, and its text."""

    score: float
    start: int
    end: int
    text: str


def windows(record: Record, tokenizer: Tokenizer, cfg: Config, counts: Counter[str]) -> list[Example]:
    """[CLS] question [SEP] window of the context [SEP], one example a window; type_ids are 1 from the window on.

    After the question is the tokenizer's separator: one [SEP], of a RoBERTa two.

    `labels` are the positions of the first and the last token of the first answer, or (0, 0), which is [CLS], in a
    window that does not hold all of it, and in all windows of a question without an answer. A window begins half a
    window after the one before it. Worked, for a question q, a context a b c d with the answer 'b c', seq_len 6:

        tokens  [CLS] q [SEP] a b [SEP]   [CLS] q [SEP] b c [SEP]   [CLS] q [SEP] c d [SEP]
        labels  0 0                       3 4                       0 0

    Counts: question_cut (to half of the room), context_cut (into windows), answer_in_no_window (the answer is longer
    than half a window and no window holds it, or the tokenizer removes it: all windows are labelled unanswerable),
    without_answer (unanswerable questions).
    """
    holds_pair(cfg, tokenizer)
    seq_len = cfg.data.seq_len
    question, separator = tokenizer.encode(record["question"]), tokenizer.separator_ids
    most = (seq_len - 2 - len(separator)) // 2
    if len(question) > most:
        counts["question_cut"] += 1
        question = question[:most]
    prefix = [tokenizer.bos_id, *question, *separator]
    ids, offsets = tokenizer.encode_with_offsets(record["context"])
    offsets_Nx2 = np.array(offsets, np.int32).reshape(-1, 2)
    answers = record.get("answers", [])  # a question to predict may lack them, see `unanswered_windows`
    has_answer = bool(answers)
    first, last = _tokens_of(answers[0], offsets_Nx2) if has_answer else (-1, -1)

    room = seq_len - len(prefix) - 1
    stride = max(1, room // 2)
    of_record = record["identity"], record["question"], record["context"]
    texts = [answer["text"] for answer in answers]
    examples = []
    for start in range(0, max(1, len(ids) - room + stride), stride):
        inside = ids[start : start + room]
        to_row = len(prefix) - start
        holds_answer = start <= first <= last < start + len(inside)
        columns = {
            "tokens": np.array([*prefix, *inside, tokenizer.eos_id], np.int32),
            "type_ids": np.array([0] * len(prefix) + [1] * (len(inside) + 1), np.int32),
            "labels": np.array([first + to_row, last + to_row] if holds_answer else [0, 0], np.int32),
        }
        offsets_Lx2 = np.zeros((seq_len, 2), np.int32)
        offsets_Lx2[len(prefix) : len(prefix) + len(inside)] = offsets_Nx2[start : start + room]
        examples.append(Example(columns, Window(*of_record, texts, offsets_Lx2)))
    if len(examples) > 1:
        counts["context_cut"] += 1
    if not has_answer:
        counts["without_answer"] += 1
    elif not any(example.columns["labels"].any() for example in examples):
        counts["answer_in_no_window"] += 1
    return examples


def unanswered_windows(record: Record, tokenizer: Tokenizer, cfg: Config, counts: Counter[str]) -> list[Example]:
    """The rows of `windows` without labels."""
    cut = Counter[str]()
    question = {name: value for name, value in record.items() if name != "answers"}
    made = windows(question, tokenizer, cfg, cut)
    counts.update({name: cut[name] for name in ("question_cut", "context_cut") if cut[name]})
    return [
        Example({name: x for name, x in example.columns.items() if name != "labels"}, example.meta) for example in made
    ]


def span_outputs(apply: Apply, cfg: Config, tokenizer: Tokenizer) -> Callable[[Params, Batch], dict[str, jax.Array]]:
    """'span_logits', as from `span_loss`."""
    del cfg

    def outputs(params: Params, batch: Batch) -> dict[str, jax.Array]:
        allowed_BxL = _may_be_answer(batch, tokenizer)
        return {"span_logits": jnp.where(allowed_BxL[..., None], apply(params, batch).head, losses.MASKED_LOGIT)}

    return outputs


def best_span(outputs: Outputs, meta: list[Any], record: Record, cfg: Config, tokenizer: Any) -> dict[str, Any]:
    """The best text and its place in the context; 'has_answer' says whether it is better than none, see `score`."""
    ((_, answers),) = best_answers(outputs["span_logits"], meta, count=1)
    null = float(outputs["span_logits"][:, 0].astype(np.float64).sum(axis=-1).min())
    if not answers:
        return {"prediction": "", "no_answer_score": null, "has_answer": False}
    best = answers[0]
    has_answer = null - best.score <= cfg.task.null_threshold
    said = {"prediction": best.text, "start": best.start, "end": best.end, "score": best.score}
    return said | {"no_answer_score": null, "has_answer": has_answer}


def _may_be_answer(batch: Batch, tokenizer: Tokenizer) -> jax.Array:
    """bool [B, L]: the positions of the context, and [CLS]."""
    is_context_BxL = (batch["type_ids"] == 1) & (batch["tokens"] != tokenizer.eos_id)
    is_first_BxL = jax.lax.broadcasted_iota(jnp.int32, is_context_BxL.shape, 1) == 0
    return is_context_BxL | is_first_BxL


def _tokens_of(answer: dict[str, Any], offsets_Nx2: np.ndarray) -> tuple[int, int]:
    """The first and the last token with a character of the answer."""
    start, end = answer["answer_start"], answer["answer_start"] + len(answer["text"])
    first = np.searchsorted(offsets_Nx2[:, 1], start, side="right")
    last = np.searchsorted(offsets_Nx2[:, 0], end, side="left") - 1
    return int(first), int(last)


def best_answers(span_logits_RxLx2: np.ndarray, meta: list[Window], count: int) -> list[tuple[Window, list[Answer]]]:
    """For each question, its first window and the `count` best answers over all its windows, best first.

    The windows of a question are adjacent rows with the same identity. A span lies in the context, has at most
    `MAX_ANSWER_TOKENS` tokens and is not all white space, which is trimmed off its ends. Scores are compared across a
    question's windows without normalisation, as in Devlin et al. (2019).

    Args:
      span_logits_RxLx2: float32, logits of starts and ends.
      meta: the window of each row.
      count: answers to return for a question.
    """
    best = []
    for rows in _questions(meta):
        found: dict[tuple[int, int], Answer] = {}
        for row in rows:
            for answer in _answers_in(span_logits_RxLx2[row], meta[row], count):
                place = answer.start, answer.end  # the same characters may be in several windows
                found[place] = max(answer, found.get(place, answer))
        best.append((meta[rows[0]], sorted(found.values(), reverse=True)[:count]))
    return best


def _questions(meta: list[Window]) -> list[list[int]]:
    """The rows of each question: runs of adjacent rows, since two sources of a mixture may share a question."""
    return [list(rows) for _, rows in itertools.groupby(range(len(meta)), key=lambda row: meta[row].identity)]


def _answers_in(logits_Lx2: np.ndarray, window: Window, count: int) -> list[Answer]:
    """The best answers in one window, from a table [n, m] of scores by first token and length."""
    position_n = np.flatnonzero(window.offsets_Lx2[:, 1])
    offsets_nx2 = window.offsets_Lx2[position_n]
    is_blank_n = np.array([window.context[start:end].isspace() for start, end in offsets_nx2])
    start_n, end_n = np.where(is_blank_n[:, None], -np.inf, logits_Lx2[position_n].astype(np.float64)).T
    behind_m = np.full(MAX_ANSWER_TOKENS - 1, -np.inf)
    score_nxm = start_n[:, None] + np.lib.stride_tricks.sliding_window_view(
        np.append(end_n, behind_m), len(behind_m) + 1
    )
    flat = score_nxm.ravel()
    best = np.argpartition(-flat, count)[:count] if count < len(flat) else np.arange(len(flat))
    answers = []
    for first, more in (divmod(int(i), MAX_ANSWER_TOKENS) for i in best if np.isfinite(flat[i])):
        start, end = int(offsets_nx2[first, 0]), int(offsets_nx2[first + more, 1])
        text = window.context[start:end]
        start, end = start + len(text) - len(text.lstrip()), end - len(text) + len(text.rstrip())
        answers.append(Answer(float(score_nxm[first, more]), start, end, text.strip()))
    return answers


def score(outputs: dict[str, np.ndarray], meta: list[Window], cfg: Config) -> dict[str, float]:
    """`question_scorer` of all questions.

    Raises:
      DataError: `checkpoint.best_metric` needs held-out questions of a kind that there are none of.
    """
    number, of_questions = question_scorer(outputs, meta, cfg)
    found = of_questions(np.arange(number))
    wanted = cfg.checkpoint.best_metric
    if wanted in score_names(cfg) and wanted not in found and not (cfg.data.mixture or cfg.data.replay):
        kind = "answerable" if wanted.startswith("HasAns") else "unanswerable"
        raise DataError(f"'checkpoint.best_metric' is {wanted}, but no held-out question is {kind}; set another metric")
    return found


def question_scorer(outputs: dict[str, np.ndarray], meta: list[Window], cfg: Config) -> tuple[int, Scorer]:
    """`scores.answers` of the best answer to each question; outputs 'span_logits', float32 [R, L, 2].

    If a held-out question is unanswerable, `scores.answers_or_none`, as in BERT's run_squad.py with
    version_2_with_negative: the no-answer score is that of [CLS] as a span, the lowest over the question's windows.
    Otherwise every question gets an answer, as in SQuAD v1.1.
    """
    best = best_answers(outputs["span_logits"], meta, count=1)
    said = [answers[0].text if answers else "" for _, answers in best]
    accepted = [window.answers for window, _ in best]
    null_R = outputs["span_logits"][:, 0].astype(np.float64).sum(axis=-1)
    null_Q = np.array([np.min(null_R[rows]) for rows in _questions(meta)])
    margins_Q = null_Q - [answers[0].score if answers else -np.inf for _, answers in best]
    margins_Q = np.where(np.isnan(margins_Q), np.inf, margins_Q)  # the model has diverged
    all_have_one = all(accepted)

    def of_questions(chosen: np.ndarray) -> dict[str, float]:
        both = [said[i] for i in chosen], [accepted[i] for i in chosen]
        if all_have_one:
            return scores.answers(*both)
        return scores.answers_or_none(*both, margins_Q[chosen], cfg.task.null_threshold)

    return len(best), of_questions


_OF_ANSWERS_OR_NONE = (
    *("HasAns_exact", "HasAns_f1", "NoAns_exact", "NoAns_f1"),
    *("best_exact", "best_exact_thresh", "best_f1", "best_f1_thresh"),
)


def score_names(cfg: Config) -> tuple[str, ...]:
    """The names of `score`; all but the first two are reported only if a held-out question is unanswerable."""
    del cfg
    return ("exact_match", "f1", *_OF_ANSWERS_OR_NONE)


def _window_columns(cfg: Config) -> Columns:
    return sequence_columns(("tokens", "type_ids"), cfg.data.seq_len)


def _columns(cfg: Config) -> Columns:
    return _window_columns(cfg) | {"labels": ((2,), np.int32)}


def _lacks(rows: Rows, cfg: Config) -> str:
    return "" if rows["labels"].any() else "no window holds an answer; expected some"


def span_loss(apply: Apply, cfg: Config, tokenizer: Tokenizer) -> LossFn:
    """Cross-entropy of the positions of the answer's first and last token; both are [CLS] if a window has no answer."""
    del cfg

    def loss_fn(params: Params, batch: Batch, rng: jax.Array | None) -> LossTerms:
        logits_BxLx2 = apply(params, batch, rng=rng).head
        return losses.span_cross_entropy(
            logits_BxLx2, batch["labels"], _may_be_answer(batch, tokenizer), batch["row_weights"]
        )

    return loss_fn


SPAN_QA = Task(
    name="span_qa",
    models=("encoder",),
    fields=("question", "context", "answers"),
    examples=windows,
    columns=_columns,
    texts=field_texts("question", "context"),
    loss=span_loss,
    loss_unit="nats per window",
    legend="The model learns where the answer begins and ends; its tokens are marked.",
    options=SpanQaOptions,
    least_len=5,
    check_tokenizer=holds_pair,
    lacks=_lacks,
    head=lambda cfg: Head("token", 2),
    scores=score,
    score_names=score_names,
    scorer=question_scorer,
    predictor=Predictor(("answers",), unanswered_windows, _window_columns, span_outputs, best_span),
)
