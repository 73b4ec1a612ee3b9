"""Tagging of words: parts of speech, and named entities (Ramshaw and Marcus 1995)."""

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lm import losses
from lm.config import Config, schema
from lm.data.example import Columns, Example, Rows
from lm.data.record import DataError, Record
from lm.data.tokenizer import Tokenizer
from lm.evaluation import entity_tags, scores
from lm.tasks.base import Task, check_labels, field_texts, label_index, sequence_columns
from lm.types import Apply, Batch, Head, LossFn, LossTerms, Params

_WORD = re.compile(r"\w+|[^\w\s]")  # a run of letters and digits, or one other character


@dataclasses.dataclass(frozen=True)
class TaggingOptions:
    """Options of tagging."""

    name: str = "tagging"
    labels: tuple[str, ...] = schema.about_data(())  # all labels; the index of a label is its position here
    # The scheme of entity tags, see lm.evaluation.entity_tags; auto = inferred from the letters of the labels, and IOB1
    # or IOB2 from the held-out tags; none = only words are scored.
    entity_scheme: Literal["auto", "none", "IOB1", "IOB2", "IOBES", "BILOU"] = schema.scoring_only("auto")


def tagged_words(record: Record, tokenizer: Tokenizer, cfg: Config, counts: Counter[str]) -> list[Example]:
    """[CLS], the words joined by spaces, [SEP]; the token in which a word begins has its label, others -1.

    Worked, for pieces 'Par', 'kinson', "'", ' s', seq_len 8, labels (O, B, I):

        words    Parkinson  '  s      tags  B  I  I
        tokens   [CLS] Par kinson ' s [SEP]
        labels     -1   1    -1   2 2  -1   -1 -1

    Longer than seq_len: split before words, so that each word is in one part (counted as 'sentence_cut'). The end of a
    word longer than a whole row is cut ('word_cut'). A word that the tokenizer removes, such as a control character,
    has no place for its tag and is left out ('words_without_token'). Entity tags are kept as they are; violations of
    their scheme are counted, see `entity_tags.faults`.

    Raises:
      DataError: a tag is not in `task.labels`, or two words begin in one token.
    """
    words, room = record["words"], cfg.data.seq_len - 2
    label_W = np.array([label_index(tag, record, cfg) for tag in record["tags"]], np.int32)
    if tag_of := entity_tags.read(cfg.task.labels, _scheme(cfg)):
        schemes = entity_tags.strict_schemes(tag_of.values(), _scheme(cfg))
        found = entity_tags.faults([tag_of[tag] for tag in record["tags"]], schemes)
        counts.update({name: number for name, number in found.items() if number})
    text = " ".join(words)
    ids, offsets = tokenizer.encode_with_offsets(text)
    size_W = np.array([len(word) for word in words])
    place_W = np.cumsum(size_W + 1) - size_W - 1
    starts, ends = np.array(offsets, int).reshape(-1, 2).T
    token_W = np.searchsorted(ends, place_W, side="right")  # the first token with a character of the word
    end_W = np.searchsorted(starts, place_W + size_W, side="left")  # one past the last
    if not (has_token_W := token_W < end_W).all():
        counts["words_without_token"] += int(np.count_nonzero(~has_token_W))
        words = list(itertools.compress(words, has_token_W))
        label_W, token_W, end_W = (of_words[has_token_W] for of_words in (label_W, token_W, end_W))
    if (clash := np.flatnonzero(np.diff(token_W) == 0)).size:
        both = " and ".join(map(repr, words[clash[0] : clash[0] + 2]))
        raise DataError(f"{record['source']}: the words {both} begin in one token, which can have one tag only")

    examples, first = [], 0
    while first < len(words):
        start = token_W[first] if first else 0  # with the space that a tokenizer puts before a text
        behind = max(first + 1, int(np.searchsorted(end_W, start + room, side="right")))
        end = min(end_W[behind - 1], start + room)
        if end < end_W[behind - 1]:
            counts["word_cut"] += 1
        label_L = np.full(cfg.data.seq_len, -1, np.int32)
        label_L[1 + token_W[first:behind] - start] = label_W[first:behind]
        tokens = np.array([tokenizer.bos_id, *ids[start:end], tokenizer.eos_id], np.int32)
        examples.append(Example({"tokens": tokens, "labels": label_L}, (record["identity"], text)))
        first = behind
    if len(examples) > 1:
        counts["sentence_cut"] += 1
    return examples


def entity_spans(record: Record, tokenizer: Tokenizer, cfg: Config, counts: Counter[str]) -> list[Example]:
    """Converts a text with character spans to words (runs of letters and digits; any other character) with BIO tags.

    A word gets the tag of a span that contains any of its characters: a span that begins or ends inside a word is
    extended to whole words (counted as 'entity_grown'). If spans share a word, the first is kept, or the longest of
    those that begin together; the others, and spans of only white space, are counted as 'entity_dropped'.

    Raises:
      DataError: as `tagged_words`, for the tags 'B-label' and 'I-label'.
    """
    matches = list(_WORD.finditer(record["text"]))
    if not matches:
        counts["dropped_empty"] += 1
        return []
    start_W, end_W = (np.array([place(match) for match in matches]) for place in (re.Match.start, re.Match.end))
    tags = [entity_tags.OUTSIDE] * len(matches)
    for entity in sorted(record["entities"], key=lambda entity: (entity["start"], -entity["end"])):
        first = int(np.searchsorted(end_W, entity["start"], side="right"))
        last = int(np.searchsorted(start_W, entity["end"], side="left"))  # exclusive
        if first >= last or tags[first:last] != [entity_tags.OUTSIDE] * (last - first):
            counts["entity_dropped"] += 1
            continue
        covered = record["text"][start_W[first] : end_W[last - 1]]
        if len(covered) > len(record["text"][entity["start"] : entity["end"]].strip()):
            counts["entity_grown"] += 1
        tags[first:last] = [f"B-{entity['label']}", *[f"I-{entity['label']}"] * (last - first - 1)]
    words = [match.group() for match in matches]
    place = {key: record[key] for key in ("source", "identity")}
    return tagged_words({"words": words, "tags": tags, **place}, tokenizer, cfg, counts)


def _scheme(cfg: Config) -> str:
    """`task.entity_scheme`; for character spans, 'auto' is the scheme that `entity_spans` writes."""
    is_written_here = cfg.task.name == "entities" and cfg.task.entity_scheme == "auto"
    return "IOB2" if is_written_here else cfg.task.entity_scheme


def score_names(cfg: Config) -> tuple[str, ...]:
    """The names of `score`. Raises ConfigError if labels that look like entity tags follow no known scheme."""
    tag_of = entity_tags.read(cfg.task.labels, _scheme(cfg))
    if not tag_of:
        return ("token_accuracy",)
    is_strict = entity_tags.strict_schemes(tag_of.values(), _scheme(cfg))
    return ("token_accuracy", "entity_f1", "entity_precision", "entity_recall", *["entity_f1_strict"] * bool(is_strict))


def score(outputs: dict[str, np.ndarray], meta: list[Any], cfg: Config) -> dict[str, float]:
    """'token_accuracy' over words and, if the labels are entity tags, `scores.entities` and `scores.strict_entities`.

    Args:
      outputs: 'label' and 'prediction', int32 [R, L], indices into task.labels; a label of -1 is none.
      meta: for each row, the identity and the text of its sentence; the rows of a sentence are joined, in order.
      cfg: `task` is read.
    """
    is_word_RxL = outputs["label"] >= 0
    found = {"token_accuracy": scores.accuracy(*(outputs[name][is_word_RxL] for name in ("label", "prediction")))}
    tag_of = entity_tags.read(cfg.task.labels, _scheme(cfg))
    if not tag_of:
        return found
    tags = [tag_of[label] for label in cfg.task.labels]
    expected: list[list[str]] = []
    predicted: list[list[str]] = []
    rows = zip(meta, is_word_RxL, outputs["label"], outputs["prediction"], strict=True)
    # Only adjacent rows are joined: two sources of a mixture may hold the same sentence.
    for _, of_sentence in itertools.groupby(rows, key=lambda row: row[0][0]):
        parts = list(of_sentence)
        for sentences, side in ((expected, 2), (predicted, 3)):
            sentences.append([tags[i] for part in parts for i in part[side][part[1]]])
    found |= scores.entities(expected, predicted)
    if schemes := entity_tags.strict_schemes(tags, _scheme(cfg)):
        found |= scores.strict_entities(expected, predicted, entity_tags.tell(schemes, expected))
    return found


def _columns(cfg: Config) -> Columns:
    return sequence_columns(("tokens", "labels"), cfg.data.seq_len)


def _word_texts(record: Record) -> Iterator[str]:
    yield " ".join(record["words"])


def _lacks(rows: Rows, cfg: Config) -> str:
    found = np.unique(rows["labels"])
    found = found[found >= 0]
    return f"all words have the tag {cfg.task.labels[found[0]]!r}; expected two or more" if len(found) == 1 else ""


def tagging_loss(apply: Apply, cfg: Config, tokenizer: Any) -> LossFn:
    """Cross-entropy over `task.labels`, one label a word, at the position where the word begins."""
    del tokenizer

    def loss_fn(params: Params, batch: Batch, rng: jax.Array | None) -> LossTerms:
        logits_BxLxC = apply(params, batch, rng=rng).head
        labels_BxL = batch["labels"]
        is_word_BxL = (labels_BxL >= 0) & (batch["segment_ids"] > 0)
        weights_BxL = jnp.where(is_word_BxL, batch["row_weights"][:, None], 0.0)
        smoothing = cfg.loss.label_smoothing
        terms = losses.class_cross_entropy(logits_BxLxC, labels_BxL, weights_BxL, label_smoothing=smoothing)
        return terms._replace(outputs=terms.outputs | {"label": labels_BxL})

    return loss_fn


TAGGING = Task(
    name="tagging",
    models=("encoder",),
    fields=("words", "tags"),
    examples=tagged_words,
    columns=_columns,
    texts=_word_texts,
    loss=tagging_loss,
    loss_unit="nats per word",
    legend="A token is trained when the model learns its tag, shown with it.",
    options=TaggingOptions,
    least_len=3,
    check=check_labels,
    lacks=_lacks,
    head=lambda cfg: Head("token", len(cfg.task.labels)),
    scores=score,
    score_names=score_names,
    loss_options=("label_smoothing",),
)
ENTITIES = TAGGING._replace(
    name="entities", fields=("text", "entities"), examples=entity_spans, texts=field_texts("text")
)
