"""Classification by prompting: a template makes a prompt, and the likelihoods of the label words are compared.

A template such as '{text} It was {label:bad|good}.' is filled in with the record's fields and, at '{label}', with one
word for each of `task.labels`, in that order; a plain '{label}' stands for the labels themselves.
"""

import dataclasses
import hashlib
import itertools
import string
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lm import losses
from lm.config import Config, schema
from lm.config.schema import ConfigError, nearest
from lm.data.example import Columns, Example
from lm.data.record import DataError, Record, Wanted
from lm.data.tokenizer import Tokenizer
from lm.tasks.base import Predictor, Task, check_labels, field_texts, label_index, one_label, views_as_rows
from lm.tasks.classification import class_score_names, class_scores, likely_label
from lm.tasks.language_modelling import log_likelihood
from lm.types import Apply, Batch, LossFn, LossTerms, Params

_FIELDS = ("text", "text_pair", "label")
_BETWEEN_SHOTS = "\n\n"


class Template(NamedTuple):
    """A parsed template.

    Attributes:
      before: (literal text, name of the field after it or '') pairs, up to the label.
      words: one for each label, in the order of `task.labels`.
      after: literal text after the label, used only in shots.
    """

    before: tuple[tuple[str, str], ...]
    words: tuple[str, ...]
    after: str


@dataclasses.dataclass(frozen=True)
class PromptingOptions:
    """Options of classification by prompts."""

    name: str = "prompting"
    labels: tuple[str, ...] = schema.about_data(())  # all labels; the index of a label is its position here
    templates: tuple[str, ...] = schema.about_data(())  # '{text} It was {label:bad|good}.', a word for each of `labels`
    shots: int = schema.about_data(0)  # this many training examples precede each held-out prompt


def check(cfg: Config) -> None:
    """Raises ConfigError, naming the key, for labels, templates or shots that cannot be used."""
    check_labels(cfg)
    options = cfg.task
    if not options.templates:
        raise ConfigError("'task.templates' is empty; task.name=prompting needs one, such as '{text} It was {label}.'")
    if len(options.labels) < 2:
        raise ConfigError(f"'task.labels' is {options.labels}; task.name=prompting chooses between two or more")
    if options.shots < 0:
        raise ConfigError(f"'task.shots' must not be negative, got {options.shots}")
    for i, template in enumerate(options.templates):
        parse(template, f"'task.templates[{i}]'", options.labels)


def parse(template: str, key: str, labels: tuple[str, ...]) -> Template:
    """Parses a template. Raises ConfigError, naming `key`, unless '{label}' occurs once, after all other fields."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"{key}: {template!r}: {error}; '{{{{' and '}}}}' write braces") from None
    fields = [field for _, field, _, _ in parts if field is not None]
    if any(conversion or (spec and field != "label") for _, field, spec, conversion in parts):
        raise ConfigError(f"{key}: {template!r}: only {{label:...}} may have text after its name: the words")
    for field in fields:
        if field not in _FIELDS:
            known = ", ".join(f"{{{name}}}" for name in _FIELDS)
            hint = nearest(field, _FIELDS)
            raise ConfigError(f"{key}: {template!r} has the field {{{field}}}{hint}; known are {known}")
    if fields.count("label") != 1 or fields[-1] != "label" or "text" not in fields:
        raise ConfigError(f"{key}: {template!r} must have {{text}}, and {{label}} once, after all other fields")
    at = next(i for i, part in enumerate(parts) if part[1] == "label")
    spec = parts[at][2] or ""
    words = tuple(spec.split("|")) if spec else labels
    if len(words) != len(labels) or len(set(words)) != len(words) or not all(words):
        raise ConfigError(
            f"{key}: {template!r} has the words {', '.join(words)}; expected one for each of task.labels, all different"
        )
    before = tuple((literal, field or "") for literal, field, _, _ in [*parts[:at], (parts[at][0], "", "", None)])
    return Template(before, words, "".join(literal for literal, _, _, _ in parts[at + 1 :]))


def shots(train: Sequence[Record], cfg: Config) -> dict[str, Any]:
    """`task.shots` training records, which every held-out record gets as its field 'shots'; {} for none.

    Takes the records with the smallest hashes, from each label in turn, so that counts per label differ by at most one.
    """
    if not cfg.task.shots:  # training records of another task may have no label
        return {}
    by_label: dict[str, list[Record]] = {label: [] for label in cfg.task.labels}
    for record in sorted(train, key=_digest):
        by_label.setdefault(record["label"], []).append(record)
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*by_label.values()))
    chosen = list(itertools.islice((record for record in in_turn if record is not None), cfg.task.shots))
    return {"shots": chosen} if chosen else {}


def prompted_sentences(record: Record, tokenizer: Tokenizer, cfg: Config, counts: Counter[str]) -> list[Example]:
    """The rows of `prompts` with the index of the label. Raises DataError for an unknown label, and as `prompts`."""
    (example,) = prompts(record, tokenizer, cfg, counts)
    return [Example(example.columns | {"labels": np.array(label_index(record["label"], record, cfg), np.int32)})]


def prompts(record: Record, tokenizer: Tokenizer, cfg: Config, counts: Counter[str]) -> list[Example]:
    """The filled-in template once for each label; only the tokens of the label's word count for the loss.

    Each is BOS, the shots of a held-out record, the prompt, the word. A space before the word belongs to the word.
    Longer than seq_len: cut at the left, after BOS, counted as 'prompt_cut'. A hash of the record selects the template,
    which its shots use too.

    Returns:
      One example of tokens, targets and loss_weights [C, L], with segment_ids and positions.

    Raises:
      DataError: the label of a shot is unknown, a field is missing, or a row has no room for the text.
    """
    templates = cfg.task.templates
    number = zlib.crc32(repr([record.get(field) for field in ("text", "text_pair")]).encode()) % len(templates)
    template = parse(templates[number], f"'task.templates[{number}]'", cfg.task.labels)
    shots = [
        _prompt(shot, template) + template.words[label_index(shot["label"], shot, cfg)] + template.after
        for shot in record.get("shots", ())
    ]
    prompt = _BETWEEN_SHOTS.join([*shots, _prompt(record, template)])
    stem = prompt.rstrip(" ")
    space = prompt[len(stem) :]
    prompt_ids, seq_len = tokenizer.encode(stem), cfg.data.seq_len
    shape = (len(cfg.task.labels), seq_len)
    columns = {name: np.zeros(shape, dtype) for name, (_, dtype) in _prompt_columns(cfg).items()}
    words = [tokenizer.encode(space + word) for word in template.words]
    room = seq_len - max(map(len, words))  # the same for all words, so that they follow the same prompt
    after_text = len(tokenizer.encode(template.before[-1][0].rstrip(" ")))
    if room <= after_text:
        raise DataError(
            f"{record['source']}: the words of {template.words} and the template leave no room for the text in "
            f"data.seq_len={seq_len}"
        )
    if len(prompt_ids) > room:
        counts["prompt_cut"] += 1
    for c, word_ids in enumerate(words):
        ids = [tokenizer.bos_id, *prompt_ids[max(0, len(prompt_ids) - room) :], *word_ids]
        n = len(ids) - 1
        columns["tokens"][c, :n], columns["targets"][c, :n] = ids[:-1], ids[1:]
        columns["loss_weights"][c, n - len(word_ids) : n] = 1.0
        columns["segment_ids"][c, :n], columns["positions"][c, :n] = 1, np.arange(n)
    return [Example(columns)]


def _prompt(record: Record, template: Template) -> str:
    for _, field in template.before:
        if field and field not in record:
            raise DataError(f"{record['source']}: a template of task.templates has {{{field}}}, which the record lacks")
    return "".join(literal + (record[field] if field else "") for literal, field in template.before)


def _digest(record: Record) -> bytes:
    return hashlib.sha256(repr([record.get(field) for field in _FIELDS]).encode()).digest()


def _columns(cfg: Config) -> Columns:
    return _prompt_columns(cfg) | {"labels": ((), np.int32)}


def _prompt_columns(cfg: Config) -> Columns:
    shape = (len(cfg.task.labels), cfg.data.seq_len)
    of_label: dict[str, Any] = {name: (shape, np.int32) for name in ("tokens", "targets", "segment_ids", "positions")}
    return of_label | {"loss_weights": (shape, np.float32)}


def label_likelihoods(apply: Apply, cfg: Config, tokenizer: Tokenizer) -> Callable[[Params, Batch], Any]:
    """'head', float32 [B, C]: the log-likelihood of each label's word after the prompt."""

    def outputs(params: Params, batch: Batch) -> dict[str, jax.Array]:
        classes = batch["tokens"].shape[1]
        rows = views_as_rows(batch, classes)
        return {"head": log_likelihood(apply(params, rows), rows, cfg, tokenizer).reshape(-1, classes)}

    return outputs


def verbalizer_loss(apply: Apply, cfg: Config, tokenizer: Tokenizer) -> LossFn:
    """Cross-entropy of the label: a softmax over the log-likelihoods of the label words, each the sum over its tokens
    (Schick and Schütze 2021, section 3.1). Only those tokens count for the loss."""

    def loss_fn(params: Params, batch: Batch, rng: jax.Array | None) -> LossTerms:
        labels_B, classes = batch["labels"], batch["tokens"].shape[1]
        rows = views_as_rows(batch, classes)
        likelihood_R = log_likelihood(apply(params, rows, rng=rng), rows, cfg, tokenizer)
        terms = losses.class_cross_entropy(
            likelihood_R.reshape(-1, classes), labels_B, batch["row_weights"], label_smoothing=cfg.loss.label_smoothing
        )
        return terms._replace(outputs=terms.outputs | {"label": labels_B})

    return loss_fn


PROMPTING = Task(
    name="prompting",
    models=("decoder",),
    fields=("text", "label"),
    examples=prompted_sentences,
    columns=_columns,
    texts=field_texts("text", "text_pair"),
    loss=verbalizer_loss,
    loss_unit="nats per example",
    options=PromptingOptions,
    check=check,
    wanted=lambda cfg: Wanted(cfg.task.name, "class", cfg.task.labels),
    held_out=shots,
    lacks=lambda rows, cfg: one_label(rows, cfg.task.labels),
    scores=class_scores,
    score_names=class_score_names,
    predictor=Predictor(("label",), prompts, _prompt_columns, label_likelihoods, likely_label),
    view_names=lambda cfg: cfg.task.labels,
    loss_options=("label_smoothing",),
)
