"""Questions whose answer is a span of a context, or none (SQuAD v1.1 and v2.0, Rajpurkar et al. 2016, 2018): windows,
and spans back to text."""

import dataclasses
import itertools
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm import losses
from lm.config import Config
from lm.config.schema import ConfigError
from lm.data.example import Columns, Example, Rows
from lm.data.record import DataError, Record
from lm.data.tokenizer import Tokenizer
from lm.evaluation import scores
from lm.tasks.base import Task, field_texts, sequence_columns
from lm.types import Apply, Batch, Head, LossFn, LossTerms, Params

MAX_ANSWER_TOKENS = 30  # as BERT's run_squad.py


@dataclasses.dataclass(frozen=True)
class SpanQaOptions:
    """Options of span question answering."""

    name: str = "span_qa"
    # With unanswerable questions: the answer is '' where the score of none is above the best span's by more.
    null_threshold: float = 0.0


class Window(NamedTuple):
    """What scoring needs of a row.

    Attributes:
      identity: of the question.
      question: as asked; cut, perhaps, in the row.
      context: the whole text that is asked about.
      answers: the accepted ones; none where the context does not answer the question.
      offsets_Lx2: int32, the characters [start, end) of the context at each position; (0, 0) where there are none.
    """

    identity: str
    question: str
    context: str
    answers: list[str]
    offsets_Lx2: np.ndarray


class Answer(NamedTuple):
    """A possible answer: the sum of its two logits, its characters [start, end) of the context, and these as text."""

    score: float
    start: int
    end: int
    text: str


def windows(record: Record, tokenizer: Tokenizer, cfg: Config, counts: Counter[str]) -> list[Example]:
    """[CLS] question [SEP] window of the context [SEP], one example a window; type_ids are 1 from the window on.

    `labels` are the positions of the first and the last token of the first answer, or (0, 0), which is [CLS], in a
    window that does not hold all of it, and in all windows of a question without an answer. A window begins half a
    window after the one before it. Worked, for a question q, a context a b c d with the answer 'b c', seq_len 6:

        tokens  [CLS] q [SEP] a b [SEP]   [CLS] q [SEP] b c [SEP]   [CLS] q [SEP] c d [SEP]
        labels  0 0                       3 4                       0 0

    Counted: question_cut (to half of the room), context_cut (in windows), answer_in_no_window (longer than half a
    window: all of its windows say that there is no answer), without_answer (questions that have none).

    Raises:
      ConfigError: `data.seq_len` leaves no room.
    """
    seq_len = cfg.data.seq_len
    if seq_len < 5:
        raise ConfigError(f"'data.seq_len' ({seq_len}) must be at least 5 for [CLS] question [SEP] context [SEP]")
    question = tokenizer.encode(record["question"])
    if len(question) > (seq_len - 3) // 2:
        counts["question_cut"] += 1
        question = question[: (seq_len - 3) // 2]
    prefix = [tokenizer.bos_id, *question, tokenizer.eos_id]
    ids, offsets = tokenizer.encode_with_offsets(record["context"])
    offsets_Nx2 = np.array(offsets, np.int32)
    has_answer = bool(record["answers"])
    first, last = _tokens_of(record["answers"][0], offsets_Nx2) if has_answer else (-1, -1)

    room = seq_len - len(prefix) - 1
    stride = max(1, room // 2)
    of_record = record["identity"], record["question"], record["context"]
    texts = [answer["text"] for answer in record["answers"]]
    examples = []
    for start in range(0, max(1, len(ids) - room + stride), stride):
        inside = ids[start : start + room]
        to_row = len(prefix) - start
        holds_answer = start <= first and last < start + len(inside)
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


def _tokens_of(answer: dict[str, Any], offsets_Nx2: np.ndarray) -> tuple[int, int]:
    """The first and the last token that hold a character of the answer."""
    start, end = answer["answer_start"], answer["answer_start"] + len(answer["text"])
    first = np.searchsorted(offsets_Nx2[:, 1], start, side="right")
    last = np.searchsorted(offsets_Nx2[:, 0], end, side="left") - 1
    return int(first), int(last)


def best_answers(span_logits_RxLx2: np.ndarray, meta: list[Window], count: int) -> list[tuple[Window, list[Answer]]]:
    """Of each question its first window, and its `count` best answers over all of its windows, the best first.

    Windows of one question are adjacent rows of one identity. A span lies in the context, has at most
    `MAX_ANSWER_TOKENS` tokens and holds more than white space, which is trimmed off its ends. Scores of one question's
    windows are compared as they are, as in Devlin et al. (2019).

    Args:
      span_logits_RxLx2: float32, of starts and ends.
      meta: of each row.
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
    """The rows of each question. Adjacent ones alone: two sources of a mixture may ask the same."""
    return [list(rows) for _, rows in itertools.groupby(range(len(meta)), key=lambda row: meta[row].identity)]


def _answers_in(logits_Lx2: np.ndarray, window: Window, count: int) -> list[Answer]:
    """The best answers of one window, from a table [n, m] of first tokens and lengths."""
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
    """`scores.answers` of the best answer to each question; outputs 'span_logits', float32 [R, L, 2].

    Where a held-out question has no answer, `scores.answers_or_none`, as in BERT's run_squad.py with
    version_2_with_negative: the score of no answer is that of [CLS] as a span, the lowest of the question's windows.
    Without such a question some answer is always given, as in SQuAD v1.1.

    Raises:
      DataError: `checkpoint.best_metric` is one of questions without an answer, and there are none.
    """
    best = best_answers(outputs["span_logits"], meta, count=1)
    said = [answers[0].text if answers else "" for _, answers in best]
    accepted = [window.answers for window, _ in best]
    if all(accepted):
        found = scores.answers(said, accepted)
    else:
        null_R = outputs["span_logits"][:, 0].astype(np.float64).sum(axis=-1)
        null_Q = np.array([np.min(null_R[rows]) for rows in _questions(meta)])
        margins_Q = null_Q - [answers[0].score if answers else -np.inf for _, answers in best]
        margins_Q = np.where(np.isnan(margins_Q), np.inf, margins_Q)  # of a model that has diverged
        found = scores.answers_or_none(said, accepted, margins_Q, cfg.task.null_threshold)
    wanted = cfg.checkpoint.best_metric
    if wanted in score_names(cfg) and wanted not in found and not (cfg.data.mixture or cfg.data.replay):
        kind = "with" if wanted.startswith("HasAns") else "without"
        raise DataError(f"'checkpoint.best_metric' is {wanted}, but no held-out question is one {kind} an answer")
    return found


_OF_ANSWERS_OR_NONE = (
    *("HasAns_exact", "HasAns_f1", "NoAns_exact", "NoAns_f1"),
    *("best_exact", "best_exact_thresh", "best_f1", "best_f1_thresh"),
)


def score_names(cfg: Config) -> tuple[str, ...]:
    """What `score` gives; all but the first two only where a held-out question has no answer."""
    del cfg
    return ("exact_match", "f1", *_OF_ANSWERS_OR_NONE)


def _columns(cfg: Config) -> Columns:
    return sequence_columns(("tokens", "type_ids"), cfg.data.seq_len) | {"labels": ((2,), np.int32)}


def _lacks(rows: Rows, cfg: Config) -> str:
    return "" if rows["labels"].any() else "no window holds an answer; expected some"


def span_loss(apply: Apply, cfg: Config, tokenizer: Tokenizer) -> LossFn:
    """Cross-entropy of the first and the last token of the answer in a window, [CLS] for both where it has none."""
    del cfg

    def loss_fn(params: Params, batch: Batch, rng: jax.Array | None) -> LossTerms:
        logits_BxLx2 = apply(params, batch, rng=rng).head
        is_context_BxL = (batch["type_ids"] == 1) & (batch["tokens"] != tokenizer.eos_id)
        is_first_BxL = jax.lax.broadcasted_iota(jnp.int32, is_context_BxL.shape, 1) == 0
        return losses.span_cross_entropy(
            logits_BxLx2, batch["labels"], is_context_BxL | is_first_BxL, batch["row_weights"]
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
    legend="The model learns where the answer begins and ends; its tokens are noted.",
    options=SpanQaOptions,
    lacks=_lacks,
    head=lambda cfg: Head("token", 2),
    scores=score,
    score_names=score_names,
)
