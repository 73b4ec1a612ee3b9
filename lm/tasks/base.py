"""The `Task` type: everything that a training objective needs, from the records it reads to the scores it reports."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from lm.config import Config, TaskConfig, TokenizerConfig
from lm.config.schema import ConfigError, nearest
from lm.data import splits
from lm.data import tokenizer as sentencepiece
from lm.data.example import Columns, Example, Row, Rows
from lm.data.record import DataError, Record, Wanted
from lm.evaluation import metrics
from lm.types import Apply, Batch, Head, LossFn, LossFnWithStart, Outputs, Params

TEXT_MODELS = ("decoder", "prefix_decoder", "encoder")
TOKEN_LOSS = ("z_loss", "label_smoothing", "chunk_len")  # keys of LossConfig that the token cross-entropy reads


class Vocabulary(NamedTuple):
    """How a task's tokenizer, or the vocabulary in its place, is found, trained and loaded.

    Attributes:
      find: folder of a run or of prepared data -> the path of what is loaded from it, whether or not it exists.
      train: (output of `Task.texts` over the training records, config) -> a `Tokenizer` or an object like it.
      load: path -> the same object, read from its file.
    """

    find: Callable[[Any], Any]
    train: Callable[[Iterable[str], TokenizerConfig], Any]
    load: Callable[[Any], Any]


SENTENCEPIECE = Vocabulary(
    sentencepiece.find,
    lambda texts, cfg: sentencepiece.train(texts, cfg.vocab_size, cfg.train_bytes),
    sentencepiece.load,
)


class Predictor(NamedTuple):
    """How a trained model predicts a record, without knowing what is right. Rows are not packed.

    Attributes:
      unread: fields of `Task.fields` that it does not read: a record to predict may lack them.
      examples: (record, tokenizer, config, counts) -> its rows, as the model gets them: no random transform follows.
      columns: config -> {name: (shape, dtype)} of the rows.
      outputs: (apply, config, tokenizer) -> (params, batch) -> name -> [B, ...], for each row.
      prediction: (outputs of the rows of one record, at least one, `Example.meta` of each row, record, config,
        tokenizer) -> 'prediction' and what else is to be said, as JSON.
    """

    unread: tuple[str, ...]
    examples: Callable[[Record, Any, Config, Counter[str]], list[Example]]
    columns: Callable[[Config], Columns]
    outputs: Callable[[Apply, Config, Any], Callable[[Params, Batch], dict[str, jax.Array]]]
    prediction: Callable[[Outputs, list[Any], Record, Config, Any], dict[str, Any]]


# Chosen examples, int64 [n], -> the scores of these; an example that is chosen twice counts twice.
Scorer = Callable[[np.ndarray], dict[str, float]]


class Task(NamedTuple):
    """A task. Functions that take a config find the task's options in `config.task`.

    Attributes:
      name: `task.name` of the config.
      models: supported values of `model.kind`.
      fields: fields that every record must have.
      examples: (record, tokenizer, config, counts) -> its examples.
      columns: config -> {name: (shape, dtype)} of stored rows, after packing.
      texts: record -> its texts, for training a tokenizer; None = the task reads no text and has no tokenizer.
      loss: (apply, config, tokenizer) -> (params, batch, rng) -> LossTerms.
      loss_unit: unit of the loss, and of the nll if there is one.
      legend: one sentence that explains to a person looking at a row what the model learns from it.
      options: dataclass of the keys of `config.task`.
      least_len: the fewest positions of a row, `data.seq_len`, that hold one token of text, or one item, and the marks
        at the ends of a row; 0 = the task's rows are not sequences.
      check: config -> None; raises ConfigError if options or other keys contradict each other.
      wanted: config -> the form in which readers return labels and images.
      packing: supported values of `data.packing`.
      overlong: supported values of `data.overlong`; "auto" means the first of them.
      transform: (row, rng, tokenizer, config) -> row: random transform, drawn anew each time a row is used.
      batch_columns: config -> the columns after `transform`; None = the same as `columns`.
      draws_other: `transform` also gets the columns of a random other row, named 'other_...'.
      augments: `transform` applies `data.augment` itself; the input pipeline must not.
      vocabulary: how the tokenizer is trained and loaded.
      check_tokenizer: (config, tokenizer) -> None; raises ConfigError if the tokenizer lacks what the task needs.
      held_out: (training records, config) -> fields that all held-out records get, such as few-shot examples.
      lacks: (packed rows of a split, config) -> a sentence that says what the task needs and the rows lack (a second
        document, a second label); '' = nothing. Training rows that lack it are refused, held-out rows are counted.
      head: config -> the output layer that the task needs; None = the model predicts tokens.
      scores: (outputs, meta of the rows, config) -> metrics computed over all held-out rows at once.
      score_names: config -> names of those metrics.
      scorer: (outputs, meta, config) -> (number of examples, `Scorer` whose scores of all of them are those of
        `scores`), for examples of several rows; None = every row is an example.
      predictor: how a record is predicted; None = by the text that answers it (`answers_with_text`), else by the loss
        of its rows, such as the log-likelihood of a text.
      answers_with_text: field that the task's generated text is to equal, such as the target of a translation; '' =
        none.
      loss_options: keys of `LossConfig` that the loss reads.
      balances_experts: the loss includes that of the router, without which experts are not trained evenly.
      predicts_every_position: the loss reads the logits of every position of a packed row.
      couples_rows: the loss of a row depends on the other rows, so a batch cannot be split into micro-batches.
      needs_start: the loss also reads the parameters at the start of the run: the function that `loss` returns takes
        them as a fourth argument, (params, batch, rng, start). The state keeps a copy of the trained ones.
      has_perplexity: exp(nll) is the perplexity of a language model.
      unit_of: (config, prefix of a metric) -> the unit of its loss, if it differs from `loss_unit`.
      view_names: config -> names of the views, for rows of several sequences side by side; () = the views are
        numbered.
      prompt: (text, tokenizer) -> the ids that generation starts from; None = the task does not generate text.
      ends: tokenizer -> ids that end a generated text.
      generates: control symbols that its generated texts may contain, besides those of `generate.symbols`.
    """

    name: str
    models: tuple[str, ...]
    fields: tuple[str, ...]
    examples: Callable[[Record, Any, Config, Counter[str]], list[Example]]
    columns: Callable[[Config], Columns]
    texts: Callable[[Record], Iterator[str]] | None
    loss: Callable[[Apply, Config, Any], LossFn | LossFnWithStart]
    loss_unit: str
    legend: str = "A token is trained when the model learns to predict it from those before it."
    options: type = TaskConfig
    least_len: int = 2
    check: Callable[[Config], None] = lambda cfg: None
    wanted: Callable[[Config], Wanted] = lambda cfg: Wanted(cfg.task.name)
    packing: tuple[str, ...] = ("pad",)
    overlong: tuple[str, ...] = ("truncate",)
    transform: Callable[[Row, np.random.Generator, Any, Config], Row] | None = None
    batch_columns: Callable[[Config], Columns] | None = None
    draws_other: bool = False
    augments: bool = False
    vocabulary: Vocabulary = SENTENCEPIECE
    check_tokenizer: Callable[[Config, Any], None] = lambda cfg, tokenizer: None
    held_out: Callable[[Sequence[Record], Config], dict[str, Any]] | None = None
    lacks: Callable[[Rows, Config], str] | None = None
    head: Callable[[Config], Head | None] = lambda cfg: None
    scores: Callable[[Outputs, list[Any], Config], dict[str, float]] | None = None
    score_names: Callable[[Config], tuple[str, ...]] = lambda cfg: ()
    scorer: Callable[[Outputs, list[Any], Config], tuple[int, Scorer]] | None = None
    predictor: Predictor | None = None
    answers_with_text: str = ""
    loss_options: tuple[str, ...] = ()
    balances_experts: bool = False
    predicts_every_position: bool = False
    couples_rows: bool = False
    needs_start: bool = False
    has_perplexity: bool = False
    unit_of: Callable[[Config, str], str] | None = None
    view_names: Callable[[Config], tuple[str, ...]] = lambda cfg: ()
    prompt: Callable[[str, Any], list[int]] | None = None
    ends: Callable[[Any], tuple[int, ...]] = lambda tokenizer: (tokenizer.eos_id,)
    generates: tuple[str, ...] = ()


def columns_of_batch(task: Task, cfg: Config) -> Columns:
    """The columns of a batch of `task`, except 'row_weights' and 'example_index', which every batch has."""
    return (task.batch_columns or task.columns)(cfg)


def loss_unit(task: Task, cfg: Config, prefix: str = "") -> str:
    """The unit of the task's loss or, given the prefix of one part's metrics, of that part's loss."""
    return task.unit_of(cfg, prefix) if task.unit_of and prefix else task.loss_unit


def about(task: Task, cfg: Config, metric: str) -> metrics.About:
    """Unit and other properties of a metric of this task."""
    return metrics.about(metric, lambda prefix: loss_unit(task, cfg, prefix))


# Columns and texts ----------------------------------------------------------------------------------------------------


def sequence_columns(names: tuple[str, ...], length: int) -> Columns:
    """Columns of `length` positions, with the segment ids and positions that packing adds."""
    dtypes = {"loss_weights": np.float32}
    return {name: ((length,), dtypes.get(name, np.int32)) for name in (*names, "segment_ids", "positions")}


def shifted_columns(cfg: Config) -> Columns:
    """Columns of a task that predicts the next token."""
    return sequence_columns(("tokens", "targets", "loss_weights"), cfg.data.seq_len)


def shifted(ids: list[int], trained: list[bool]) -> dict[str, np.ndarray]:
    """Next-token columns: each id is predicted from those before it. `trained`: whether each id is trained on."""
    return {
        "tokens": np.array(ids[:-1], np.int32),
        "targets": np.array(ids[1:], np.int32),
        "loss_weights": np.array(trained[1:], np.float32),
    }


def whole_row(name: str, ids: np.ndarray, length: int, prefix: str = "") -> Row:
    """Ids as one segment of a row of `length` positions, int32, padded with 0."""
    room = (0, length - len(ids))
    columns = {
        name: ids,
        f"{prefix}segment_ids": np.ones(len(ids)),
        f"{prefix}positions": np.arange(len(ids)),
    }
    return {key: np.pad(column, room).astype(np.int32) for key, column in columns.items()}


def field_texts(*names: str) -> Callable[[Record], Iterator[str]]:
    """A function: record -> the texts of those of the named fields that it has."""
    return lambda record: (record[name] for name in names if name in record)


# Labels ---------------------------------------------------------------------------------------------------------------


def check_labels(cfg: Config) -> None:
    """Raises ConfigError if `task.labels` is empty or lists a label twice."""
    labels = cfg.task.labels
    if not labels:
        raise ConfigError(f"'task.labels' is empty; expected every label in the data of task.name={cfg.task.name}")
    if len(set(labels)) != len(labels):
        raise ConfigError(f"'task.labels' names a label twice: {labels}")


def label_index(label: str, record: Record, cfg: Config) -> int:
    """The index of a label in `task.labels`. Raises DataError, naming the record, if it is not listed."""
    labels = cfg.task.labels
    if label not in labels:
        raise DataError(
            f"{record['source']}: unknown label {label!r}{nearest(label, labels)}; task.labels has {', '.join(labels)}"
        )
    return labels.index(label)


def one_label(rows: Rows, names: Sequence[str] = ()) -> str:
    """For `Task.lacks`: refuses rows that all have the same 'labels': there is nothing to learn or to score."""
    found = np.unique(rows["labels"])
    if len(found) != 1:
        return ""
    shown = repr(names[int(found[0])]) if names else f"{found[0]:g}"
    return f"all {len(rows['labels']):,} rows have the label {shown}; expected two or more"


def check_mask_token(cfg: Config) -> None:
    """Raises ConfigError unless `task.mask_rate` is in (0, 1) and a tokenizer that this run trains will have a mask.

    Of a tokenizer that there is already, `has_mask_token` is asked.
    """
    check_mask_rate(cfg)
    if cfg.tokenizer.extra_ids < 1 and trains_tokenizer(cfg):
        raise ConfigError(
            f"'tokenizer.extra_ids' is {cfg.tokenizer.extra_ids}, but task.name={cfg.task.name} needs 1, the mask"
        )


def holds_pair(cfg: Config, tokenizer: Any) -> None:
    """For `Task.check_tokenizer`: raises ConfigError if a row does not hold a token of both texts of a pair."""
    least = 4 + len(tokenizer.separator_ids)  # [CLS] A, the separator, B [SEP]
    if cfg.data.seq_len < least:
        raise ConfigError(
            f"'data.seq_len' is {cfg.data.seq_len}; task.name={cfg.task.name} expects at least {least} with this "
            f"tokenizer, which puts {len(tokenizer.separator_ids)} ids between the two texts of a row"
        )


def has_mask_token(cfg: Config, tokenizer: Any) -> None:
    """For `Task.check_tokenizer`: raises ConfigError if the tokenizer has no mask."""
    if not tokenizer.has_mask:
        raise ConfigError(
            f"'tokenizer.extra_ids' is {cfg.tokenizer.extra_ids}, but task.name={cfg.task.name} needs a mask, which "
            "the tokenizer's files lack: set it to at least 1"
        )


def trains_tokenizer(cfg: Config) -> bool:
    """Whether a new run of this config trains its tokenizer, so that all ids beside those of text are `extra_ids`."""
    return not (cfg.tokenizer.path or cfg.init_from or cfg.data.format == "prepared")


def check_mask_rate(cfg: Config) -> None:
    """Raises ConfigError unless `task.mask_rate` is in (0, 1)."""
    if not 0 < cfg.task.mask_rate < 1:
        raise ConfigError(
            f"'task.mask_rate' is {cfg.task.mask_rate}; expected a share in (0, 1): task.name={cfg.task.name} "
            "predicts what is hidden"
        )


def check_fields(
    task: Task, records: Iterable[Record], known: Mapping[str, Task], may_lack: tuple[str, ...] = ()
) -> None:
    """Raises ConfigError if the task cannot read a record; names the record and the tasks that can read it."""
    for record in records:
        if missing := [name for name in task.fields if name not in record and name not in may_lack]:
            fits = [name for name, other in known.items() if all(field in record for field in other.fields)]
            others = f"set task.name={' or '.join(fits)}, or give other data" if fits else "give other data"
            raise ConfigError(
                f"{record['source']}: 'task.name' is {task.name}, which reads '{missing[0]}', but the record has "
                f"{', '.join(sorted(set(record) - {*splits.NOT_CONTENT}))}; {others}"
            )


# Predictions ----------------------------------------------------------------------------------------------------------


def unread(task: Task) -> tuple[str, ...]:
    """Fields of `Task.fields` that a record to predict may lack."""
    return task.predictor.unread if task.predictor else tuple(filter(None, [task.answers_with_text]))


def head_outputs(apply: Apply, cfg: Config, tokenizer: Any) -> Callable[[Params, Batch], dict[str, jax.Array]]:
    """For `Predictor.outputs`: 'head', the output of the model's head."""
    del cfg, tokenizer
    return lambda params, batch: {"head": apply(params, batch).head}


def probabilities(logits_C: np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
    """The most likely label as 'prediction', and the 'probabilities' of all of them.

    Args:
      logits_C: float32, of each label.
      labels: their names.
    """
    exp_C = np.exp(logits_C.astype(np.float64) - logits_C.max())
    shares = dict(zip(labels, (exp_C / exp_C.sum()).tolist(), strict=True))
    return {"prediction": labels[int(logits_C.argmax())], "probabilities": shares}


# Views of a row -------------------------------------------------------------------------------------------------------


def two_views(batch: Batch) -> Batch:
    """Repeats every row, with independent dropout for each copy: [a, b] -> [a, a, b, b]."""
    arrays = cast(dict[str, jax.Array], batch)
    twice = {key: jnp.stack([x, x], axis=1) if x.ndim > 1 else x for key, x in arrays.items()}
    return views_as_rows(cast(Batch, twice), 2)


def views_as_rows(batch: Batch, views: int) -> Batch:
    """Reshapes arrays [B, views, ...] to [B * views, ...], a row's views adjacent; repeats arrays [B] for each view.

    Example indices are made distinct, so that each view has its own dropout mask.
    """
    arrays = cast(dict[str, jax.Array], batch)
    rows = {key: x.reshape(-1, *x.shape[2:]) if x.ndim > 1 else jnp.repeat(x, views) for key, x in arrays.items()}
    index_B = rows["example_index"]
    # Bits 29 and 30 do that; indices of more than 2^29 examples may then share dropout, which does no harm.
    view_B = jnp.arange(index_B.shape[0], dtype=jnp.int32) % views
    return cast(Batch, rows | {"example_index": index_B ^ (view_B << 29)})
