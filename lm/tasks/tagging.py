"""Tagging of words: parts of speech, and named entities (Ramshaw and Marcus 1995)."""

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm import losses
from lm.config import Config, schema
from lm.data.example import Columns, Example, Rows
from lm.data.record import DataError, Record
from lm.data.tokenizer import Tokenizer
from lm.evaluation import entity_tags, scores
from lm.tasks.base import (
    Predictor,
    Scorer,
    Task,
    check_labels,
    field_texts,
    head_outputs,
    label_index,
    probabilities,
    sequence_columns,
)
from lm.types import Apply, Batch, Head, LossFn, LossTerms, Outputs, Params

_WORD = re.compile(r"\w+|[^\w\s]")  # a run of letters and digits, or one other character


@dataclasses.dataclass(frozen=True)
class TaggingOptions:
    """Options of tagging."""

    name: str = "tagging"
    labels: tuple[str, ...] = schema.about_data(())  # all labels; the index of a label is its position here
    # The scheme of entity tags, see lm.evaluation.entity_tags; auto = inferred from the letters of the labels, and IOB1
    # or IOB2 from the held-out tags; none = only words are scored.
    entity_scheme: Literal["auto", "none", "IOB1", "IOB2", "IOBES", "BILOU"] = schema.scoring_only("auto")


class Part(NamedTuple):
    """The words of a sentence that are in one row.

    Attributes:
      tokens: int32 [n], with [CLS] and [SEP].
      places_W: int64, the position at which each of the words begins.
      words_W: int64, their indices in the sentence.
    """

    tokens: np.ndarray
    places_W: np.ndarray
    words_W: np.ndarray


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
    label_W = np.array([label_index(tag, record, cfg) for tag in record["tags"]], np.int32)
    if tag_of := entity_tags.read(cfg.task.labels, _scheme(cfg)):
        schemes = entity_tags.strict_schemes(tag_of.values(), _scheme(cfg))
        found = entity_tags.faults([tag_of[tag] for tag in record["tags"]], schemes)
        counts.update({name: number for name, number in found.items() if number})
    examples = []
    for part in sentence_parts(record, tokenizer, cfg, counts):
        label_L = np.full(cfg.data.seq_len, -1, np.int32)
        label_L[part.places_W] = label_W[part.words_W]
        examples.append(Example({"tokens": part.tokens, "labels": label_L}, (record["identity"], _joined(record))))
    return examples


def untagged_words(record: Record, tokenizer: Tokenizer, cfg: Config, counts: Counter[str]) -> list[Example]:
    """The rows of `tagged_words` without labels; their meta says where which words begin."""
    parts = sentence_parts(record, tokenizer, cfg, counts)
    return [Example({"tokens": part.tokens}, (part.places_W, part.words_W)) for part in parts]


def _joined(record: Record) -> str:
    return " ".join(record["words"])


def sentence_parts(record: Record, tokenizer: Tokenizer, cfg: Config, counts: Counter[str]) -> list[Part]:
    """Splits the words of a sentence into rows, see `tagged_words`."""
    words, room = record["words"], cfg.data.seq_len - 2
    text = _joined(record)
    ids, offsets = tokenizer.encode_with_offsets(text)
    size_W = np.array([len(word) for word in words])
    place_W = np.cumsum(size_W + 1) - size_W - 1
    starts, ends = np.array(offsets, int).reshape(-1, 2).T
    token_W = np.searchsorted(ends, place_W, side="right")  # the first token with a character of the word
    end_W = np.searchsorted(starts, place_W + size_W, side="left")  # one past the last
    word_W = np.flatnonzero(token_W < end_W)
    if lost := len(words) - len(word_W):
        counts["words_without_token"] += lost
    token_W, end_W = token_W[word_W], end_W[word_W]
    if (clash := np.flatnonzero(np.diff(token_W) == 0)).size:
        both = " and ".join(repr(words[i]) for i in word_W[clash[0] : clash[0] + 2])
        raise DataError(f"{record['source']}: the words {both} begin in one token, which can have one tag only")

    parts, first = list[Part](), 0
    while first < len(word_W):
        # The first row has the space that a tokenizer puts before a text, if that leaves room for the word.
        start = token_W[first] if first or token_W[0] >= room else 0
        behind = max(first + 1, int(np.searchsorted(end_W, start + room, side="right")))
        end = min(end_W[behind - 1], start + room)
        if end < end_W[behind - 1]:
            counts["word_cut"] += 1
        tokens = np.array([tokenizer.bos_id, *ids[start:end], tokenizer.eos_id], np.int32)
        parts.append(Part(tokens, 1 + token_W[first:behind] - start, word_W[first:behind]))
        first = behind
    if len(parts) > 1:
        counts["sentence_cut"] += 1
    return parts


def entity_spans(record: Record, tokenizer: Tokenizer, cfg: Config, counts: Counter[str]) -> list[Example]:
    """Converts a text with character spans to words (runs of letters and digits; any other character) with BIO tags.

    A word gets the tag of a span that contains any of its characters: a span that begins or ends inside a word is
    extended to whole words (counted as 'entity_grown'). If spans share a word, the first is kept, or the longest of
    those that begin together; the others, and spans of only white space, are counted as 'entity_dropped'.

    Raises:
      DataError: as `tagged_words`, for the tags 'B-label' and 'I-label'.
    """
    words, matches = _words_of(record)
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
    return tagged_words(words | {"tags": tags}, tokenizer, cfg, counts)


def text_without_spans(record: Record, tokenizer: Tokenizer, cfg: Config, counts: Counter[str]) -> list[Example]:
    """The rows of `entity_spans` without labels, as `untagged_words`."""
    words, matches = _words_of(record)
    if not matches:
        counts["dropped_empty"] += 1
        return []
    return untagged_words(words, tokenizer, cfg, counts)


def _words_of(record: Record) -> tuple[Record, list[re.Match[str]]]:
    """The words of a text as a record, and where they are."""
    matches = list(_WORD.finditer(record["text"]))
    place = {key: record[key] for key in ("source", "identity")}
    return {"words": [match.group() for match in matches], **place}, matches


def word_tags(outputs: Outputs, meta: list[Any], record: Record, cfg: Config, tokenizer: Any) -> dict[str, Any]:
    """The most likely tag of each word, and its probability; None for a word that the tokenizer removes."""
    del tokenizer
    number = len(record["words"] if "words" in record else _WORD.findall(record["text"]))
    tags: list[str | None] = [None] * number
    shares: list[float | None] = [None] * number
    for row_LxC, (places_W, words_W) in zip(outputs["head"], meta, strict=True):
        for word, logits_C in zip(words_W, row_LxC[places_W], strict=True):
            said = probabilities(logits_C, cfg.task.labels)
            tags[word], shares[word] = said["prediction"], said["probabilities"][said["prediction"]]
    return {"prediction": tags, "probabilities": shares}


def found_spans(outputs: Outputs, meta: list[Any], record: Record, cfg: Config, tokenizer: Any) -> dict[str, Any]:
    """The entities of a text as character spans, and the 'tags' of its words that they are read from.

    They are read as by conlleval: an I- tag that continues no entity of its type begins one.
    """
    tags = word_tags(outputs, meta, record, cfg, tokenizer)["prediction"]
    tag_of = entity_tags.read(cfg.task.labels, _scheme(cfg))
    matches = _WORD.finditer(record["text"])
    spans: list[dict[str, Any]] = []
    before = entity_tags.OUTSIDE
    for match, label in zip(matches, tags, strict=True):
        tag = tag_of.get(label, entity_tags.OUTSIDE)
        if tag[0] in "IE" and before[0] in "BI" and tag[1:] == before[1:]:
            spans[-1]["end"] = match.end()
        elif tag != entity_tags.OUTSIDE:
            spans.append({"start": match.start(), "end": match.end(), "label": tag.partition("-")[2]})
        before = tag
    said = [span | {"text": record["text"][span["start"] : span["end"]]} for span in spans]
    return {"prediction": said, "tags": tags}


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
    """`sentence_scorer` of all sentences."""
    number, of_sentences = sentence_scorer(outputs, meta, cfg)
    return of_sentences(np.arange(number))


def sentence_scorer(outputs: dict[str, np.ndarray], meta: list[Any], cfg: Config) -> tuple[int, Scorer]:
    """'token_accuracy' over words and, if the labels are entity tags, `scores.entities` and `scores.strict_entities`.

    Args:
      outputs: 'label' and 'prediction', int32 [R, L], indices into task.labels; a label of -1 is none.
      meta: for each row, the identity and the text of its sentence; the rows of a sentence are joined, in order.
      cfg: `task` is read.
    """
    is_word_RxL = outputs["label"] >= 0
    expected: list[np.ndarray] = []
    predicted: list[np.ndarray] = []
    rows = zip(meta, is_word_RxL, outputs["label"], outputs["prediction"], strict=True)
    # Only adjacent rows are joined: two sources of a mixture may hold the same sentence.
    for _, of_sentence in itertools.groupby(rows, key=lambda row: row[0][0]):
        parts = list(of_sentence)
        for sentences, side in ((expected, 2), (predicted, 3)):
            sentences.append(np.concatenate([part[side][part[1]] for part in parts]))
    tag_of = entity_tags.read(cfg.task.labels, _scheme(cfg))
    tags = [tag_of[label] for label in cfg.task.labels] if tag_of else []
    as_tags = [[[tags[i] for i in sentence] for sentence in side] for side in (expected, predicted) if tags]
    schemes = entity_tags.strict_schemes(tags, _scheme(cfg)) if tags else ()
    scheme = entity_tags.tell(schemes, as_tags[0]) if schemes else ""

    def of_sentences(chosen: np.ndarray) -> dict[str, float]:
        both = [np.concatenate([side[i] for i in chosen] or [np.zeros(0)]) for side in (expected, predicted)]
        found = {"token_accuracy": scores.accuracy(*both)}
        if tags:
            expected_tags, predicted_tags = ([side[i] for i in chosen] for side in as_tags)
            found |= scores.entities(expected_tags, predicted_tags)
            found |= scores.strict_entities(expected_tags, predicted_tags, scheme) if scheme else {}
        return found

    return len(expected), of_sentences


def _word_columns(cfg: Config) -> Columns:
    return sequence_columns(("tokens",), cfg.data.seq_len)


def _columns(cfg: Config) -> Columns:
    return sequence_columns(("tokens", "labels"), cfg.data.seq_len)


def _word_texts(record: Record) -> Iterator[str]:
    yield _joined(record)


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
    scorer=sentence_scorer,
    predictor=Predictor(("tags",), untagged_words, _word_columns, head_outputs, word_tags),
    loss_options=("label_smoothing",),
)
ENTITIES = TAGGING._replace(
    name="entities",
    fields=("text", "entities"),
    examples=entity_spans,
    texts=field_texts("text"),
    predictor=Predictor(("entities",), text_without_spans, _word_columns, head_outputs, found_spans),
)
