"""A trained run in use: predictions for records, in their order; generated texts, logits and embeddings.

Rows are spread over the devices, each of which holds all parameters; the number of devices and the size of a batch
change no prediction. Sampled texts (temperature above 0) depend on the size of a batch.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lm import checkpoint, checks, eval_sets, input_pipeline, losses, param_paths, program, step
from lm import run as run_lib
from lm.config import Config, DataConfig, MeshConfig, schema
from lm.config.schema import ConfigError
from lm.data import labels, loader, packing, splits
from lm.data.example import Columns, Example, Row
from lm.data.readers import fields, registry
from lm.data.readers.fields import BadRecord
from lm.data.record import DataError, Fault, Record, Wanted
from lm.decoding import beam_search, sampling
from lm.evaluation import evaluate, metrics
from lm.files import write_atomic
from lm.parallel import mesh as mesh_lib
from lm.parallel import sharding
from lm.tasks import TASKS, base, columns_of_batch, sentence_embeddings, task_of
from lm.tracking.files import finite
from lm.types import Batch, ModelFns, Outputs, Params

_BATCHES_AT_ONCE = 4  # of records, whose rows are made and computed together
_NOT_COUNTED = ("documents", "examples")  # counts that every record has
_TABLE_ROWS = 1024  # of a Parquet file that are written together
_SUM, _WEIGHT = "sum of ", "weight of "


class Generated(NamedTuple):
    """A generated text.

    Attributes:
      text: cut before the first stop string.
      token_ids: as they were generated, with the one that ended the text: a stop id, or the one that completed a stop
        string.
      log_probs: log P of each of these ids given those before it, in nats: the model's own, before the repetition
        penalty, temperature and masks. Of beam search their sum, divided by the length penalty, is the score, if there
        is no repetition penalty.
    """

    text: str
    token_ids: list[int]
    log_probs: list[float]


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A trained run, from `load`.

    Attributes:
      name: 'RUN@STEP'.
      fingerprint: of all arrays of the checkpoint, hexadecimal.
      config: of the run, resolved; of a set of another task, see `on_set`.
      run_config: of the run, resolved.
      model: its functions.
      params: its parameters, on the first device; the moving average if the run keeps one.
      start: the trained parameters as they were at the start of the run, if the task's loss reads them.
      tokenizer: None if the task reads no text.
      batch_size: rows that are computed together.
      mesh: the devices.
    """

    name: str
    fingerprint: str
    config: Config
    run_config: Config
    model: ModelFns
    params: Params
    start: Params | None
    tokenizer: Any
    batch_size: int
    mesh: Mesh

    def predict(self, records: Iterable[Mapping[str, Any] | str], *, beams: int = 4) -> list[dict[str, Any]]:
        """A prediction for each record, in their order; see `predictions`.

        Args:
          records: with the fields of the task, see docs/formats.md; what is to be predicted may be missing. A text
            stands for {"text": ...}.
          beams: of translations; 1 = greedy.

        Raises:
          DataError: a record cannot be read.
        """
        return list(predictions(self, given_records(self, records), beams=beams))

    @overload
    def generate(
        self, texts: Sequence[str], *, samples: None = None, log_probs: Literal[False] = False, **options: Any
    ) -> list[str]: ...

    @overload
    def generate(
        self, texts: Sequence[str], *, samples: None = None, log_probs: Literal[True], **options: Any
    ) -> list[Generated]: ...

    @overload
    def generate(
        self, texts: Sequence[str], *, samples: int, log_probs: Literal[False] = False, **options: Any
    ) -> list[list[str]]: ...

    @overload
    def generate(
        self, texts: Sequence[str], *, samples: int, log_probs: Literal[True], **options: Any
    ) -> list[list[Generated]]: ...

    def generate(
        self,
        texts: Sequence[str],
        *,
        samples: int | None = None,
        log_probs: bool = False,
        seed: int = 0,
        beams: int | None = None,
        alpha: float | None = None,
        **changes: Any,
    ) -> Any:
        """Continues, answers or translates each text, in the form of the run's task.

        Args:
          texts: the start of a document, a user's turn, or a text to translate.
          samples: a list of so many for each text instead of one: drawn independently, or, of beam search, the best,
            best first.
          log_probs: whether to return a `Generated` instead of each text.
          seed: of the sampling.
          beams: of beam search, 1 = greedy; 0 = sampling. None = 4 for translations, sampling for other tasks.
          alpha: length penalty of beam search, see `lm.decoding.beam_search.search`; None = 0.6.
          **changes: keys of `generate` of the config: max_new_tokens, min_new_tokens, stop, temperature, top_k, top_p,
            repetition_penalty, symbols.

        Raises:
          ConfigError: the model does not generate text, a key is unknown or has no effect, or a text leaves no room for
            what follows.
        """
        cfg = sampling.changed(self.config, changes)
        sampling.check_kind(cfg)
        if beams is None:
            beams = 4 if task_of(cfg).answers_with_text else 0
        sampling.check_options(cfg, changes, beams=beams, samples=samples, alpha=alpha)
        prompts = [sampling.encode_prompt(text, self.tokenizer, cfg) for text in texts]
        loaded = dataclasses.replace(self, config=cfg)
        made = continued(loaded, prompts, count=samples or 1, log_probs=log_probs, seed=seed, beams=beams, alpha=alpha)
        found = [each if log_probs else [one.text for one in each] for each in made]
        return found if samples else [each[0] for each in found]

    def logits(self, records: Iterable[Mapping[str, Any] | str]) -> list[np.ndarray]:
        """Logits of each record, float32: of the classes, [C], or [n, C] for a model that labels tokens; of the next
        token at each of the n positions, [n, V], for a model that predicts tokens.

        Raises:
          ConfigError: a row of the task has several sequences, whose logits are not those of one record.
        """
        cfg, task = self.config, task_of(self.config)
        shape, _ = _rows_for("logits", cfg).columns.get("tokens", ((0,), None))
        if len(shape) != 1 or task.couples_rows:
            raise ConfigError(f"task.name={task.name} compares sequences: it has no logits of a record; use predict")
        found = []
        for _, examples, outputs, _ in _computed(self, given_records(self, records), "logits"):
            real = [outputs["real"][i].astype(bool) for i in range(len(examples))]
            each = [x if x.ndim == 1 else x[keep] for x, keep in zip(outputs["logits"], real, strict=True)]
            found.append(each[0] if len(each) == 1 else np.concatenate(each) if each else np.zeros((0, 0), np.float32))
        return found

    def embed(self, texts: Iterable[Mapping[str, Any] | str]) -> np.ndarray:
        """Embeddings, float32 [N, D]: the last hidden states of each text, pooled as `model.pool` says; their mean, if
        the model has no head on a whole row. Not normalised.

        Args:
          texts: texts, or records with a 'text' or an 'image'.

        Raises:
          ConfigError: the model is not a decoder, an encoder or a ViT of text or images.
        """
        found = [each.embedding for each in embeddings(self, given_records(self, texts))]
        return np.stack(found) if found else np.zeros((0, self.config.model.embed_dim), np.float32)

    @functools.cached_property
    def steps(self) -> dict[str, Any]:
        """Name of a function of rows -> that function, jitted; of those that were used."""
        return {}

    @functools.cached_property
    def everywhere(self) -> "State":
        """The parameters and their start, on every device."""
        return jax.device_put({"params": self.params, "start": self.start}, sharding.replicated(self.mesh))

    @functools.cached_property
    def shots(self) -> dict[str, Any]:
        """The fields that the task gives to held-out records: some of the run's training records, for prompts."""
        cfg, task, trained = self.config, task_of(self.config), self.run_config
        if not task.held_out or not cfg.task.shots:
            return {}
        # Those that training has for a set, see `input_pipeline.build`: `cfg.data` may name the set itself.
        found = input_pipeline.load(trained.data, task_of(trained).wanted(trained))
        return input_pipeline.fields_of_held_out(found, cfg)


def load(name: str, *, batch_size: int = 0, devices: Sequence[Any] | None = None) -> LoadedModel:
    """Loads a trained run.

    Args:
      name: 'RUN', 'RUN@best' or 'RUN@STEP'.
      batch_size: rows that are computed together, rounded up to a multiple of the number of devices; 0 = as many as in
        an evaluation of the run.
      devices: None = all.

    Raises:
      CheckpointError: no such checkpoint, or a damaged one.
    """
    saved, (cfg, model, params, tokenizer) = run_lib.load_checkpoint(name)
    whole = f"{saved.path.parent.parent}@{saved.step}"
    mesh = mesh_lib.make_mesh(MeshConfig(), list(devices) if devices else None)
    rows = batch_size or program.eval_batch_size(cfg)
    start = _start(saved, params) if task_of(cfg).needs_start else None
    arrays = json.dumps(saved.info["arrays"], sort_keys=True).encode()
    fingerprint = hashlib.sha256(arrays).hexdigest()[:16]
    return LoadedModel(
        whole, fingerprint, cfg, cfg, model, params, start, tokenizer, -(-rows // mesh.size) * mesh.size, mesh
    )


def on_set(loaded: LoadedModel, cfg: Config, name: str) -> tuple[LoadedModel, DataConfig]:
    """The model as it is evaluated on a named set, with the set's task if it has one, and the data of the set.

    Args:
      loaded: the model.
      cfg: of the run whose `eval.sets` has the set; of this model's run, or of one that it is compared with.
      name: of the set; `valid` is also `data.eval_path`.

    Raises:
      ConfigError: there is no such set, or its task does not fit the model.
    """
    data = eval_sets.config_of(cfg, name).data
    read = {key: getattr(data, key) for key in ("path", "format", "rename", "separator", "encoding")}
    one = dataclasses.replace(eval_sets.of_files(cfg)[name], split=data.eval_path, **read)
    sections: dict[str, Any] = {
        "data": dataclasses.replace(loaded.config.data, eval_path=""),
        "eval": dataclasses.replace(loaded.config.eval, sets=((name, one),)),
    }
    whole = dataclasses.replace(loaded.config, **sections)
    checks.sets_fit(whole, loaded.params, loaded.tokenizer)
    own = eval_sets.config_of(whole, name)
    if not one.task.name:
        return loaded, own.data
    model = program.make_model(own, program.compute_dtype(own.model.dtype, loaded.mesh))
    return dataclasses.replace(loaded, config=own, model=model), own.data


def _start(saved: checkpoint.Saved, params: Params) -> Params:
    """`TrainState.start` of a checkpoint, on the device of its parameters."""
    flat = {f"start/{path}": leaf for path, leaf in param_paths.flatten(params).items()}
    kept = {
        name: jax.ShapeDtypeStruct(tuple(about["shape"]), leaf.dtype, sharding=leaf.sharding)
        for name, leaf in flat.items()
        if (about := saved.info["arrays"].get(name))
    }
    return checkpoint.load(saved, param_paths.unflatten(kept))["start"]


def wanted_to_predict(cfg: Config) -> Wanted:
    """How readers interpret records that are to be predicted: what is right may be missing."""
    task = task_of(cfg)
    return task.wanted(cfg)._replace(may_lack=base.unread(task))


def given_records(loaded: LoadedModel, records: Iterable[Mapping[str, Any] | str]) -> Iterator[Record]:
    """Checks records that are given in Python. Raises DataError, with the number of the record, as readers do."""
    wanted = wanted_to_predict(loaded.config)
    for number, given in enumerate(records):
        record = {"text": given} if isinstance(given, str) else dict(given)
        place = {"source": record.pop("source", f"record {number}")}
        try:
            has_items = "items" in wanted.fields and "items" in record  # which no reader makes of one record
            if not has_items and not isinstance(record.get("image"), np.ndarray):
                record = fields.normalise(record, {}, wanted)
        except BadRecord as error:
            raise DataError(f"{place['source']}: {error.args[0]}: {error.args[1]}") from None
        found = labels.checked(record | place, wanted)
        if isinstance(found, Fault):
            raise DataError(f"{found.where}: {found.kind}: {found.message}")
        yield found  # type: ignore[misc]


def predictions(
    loaded: LoadedModel,
    records: Iterable[Record],
    *,
    first: int = 0,
    beams: int = 4,
    alpha: float = beam_search.ALPHA,
) -> Iterator[dict[str, Any]]:
    """Yields a prediction for each record, in their order, holding a few batches of records at a time.

    Each has the record's 'number' (from 0), 'source', 'identity' (a hash of its content) and fields ('record', without
    images); 'prediction', with what else the task says; and 'counts', if the record was cut. A record that makes no
    row, such as an empty document, has the prediction None.

    Args:
      loaded: the model.
      records: as `registry.stream` yields them.
      first: number of the first of them.
      beams: of translations.
      alpha: length penalty of translations, see `lm.decoding.beam_search.search`.

    Raises:
      ConfigError: a record lacks a field that the task reads.
      DataError: the tokenizer or the task cannot read a record.
    """
    cfg, task, predictor = loaded.config, task_of(loaded.config), task_of(loaded.config).predictor
    if task.answers_with_text:
        check_search(loaded, beams)
        for some in _groups(loaded, records, base.unread(task)):
            sources = [_source(record["text"], loaded) for record in some]
            translated = continued(loaded, [ids for ids, _ in sources], beams=beams, alpha=alpha)
            for record, (best,), (_, counts) in zip(some, translated, sources, strict=True):
                kept: dict[str, Any] = {"counts": counts} if counts else {}
                yield {"number": first} | asked(record) | {"prediction": best.text} | kept
                first += 1
        return
    name = "predict" if predictor else "measure"
    for record, made, outputs, counts in _computed(loaded, records, name, first):
        if not made:
            said = {"prediction": None}
        elif predictor:
            meta = [example.meta for example in made]
            said = predictor.prediction(outputs, meta, record, cfg, loaded.tokenizer)
        else:
            said = _measured(outputs, cfg)
        kept = {key: count for key, count in counts.items() if count and key not in _NOT_COUNTED}
        yield {"number": first} | asked(record) | said | ({"counts": kept} if kept else {})
        first += 1


def asked(record: Record) -> dict[str, Any]:
    """What a prediction says of its record: 'source', 'identity' and the fields ('record'), without images."""
    shown = {
        key: value
        for key, value in record.items()
        if key not in (*splits.NOT_CONTENT, "shots") and not isinstance(value, np.ndarray | bytes)
    }
    return {"source": str(record["source"]), "identity": identity(record), "record": shown}


def check_search(loaded: LoadedModel, beams: int) -> None:
    """Raises ConfigError if the texts of a task that answers with text cannot be searched for with so many beams."""
    if task_of(loaded.config).answers_with_text:
        if beams < 1:
            raise ConfigError(f"'beams' is {beams}: predictions are searched for; expected at least 1, which is greedy")
        sampling.check_options(loaded.config, (), beams=beams)


def as_line(said: Any) -> str:
    """A line of JSON; numbers that are not finite, which JSON does not have, become null."""
    return json.dumps(finite(said), ensure_ascii=False, allow_nan=False) + "\n"


def identity(record: Record) -> str:
    """A hash of a record's content, by which a prediction is matched with its record."""
    return splits.digest({key: value for key, value in record.items() if key != "shots"})[:12].hex()


def _measured(outputs: Outputs, cfg: Config) -> dict[str, Any]:
    """The task's own metrics of one record; 'prediction' is the mean log-likelihood, or the loss if it has none."""
    sums = sums_of(outputs)
    values = metrics.finalize(sums, task_of(cfg).has_perplexity)
    said = -values["nll"] if "nll" in values else values.get("loss")
    return {"prediction": said, "metrics": values, "weight": sums["loss"][1]}


def sums_of(outputs: Outputs) -> metrics.Sums:
    """Metric -> (sum, weight) over rows that the step 'measure' computed, in float64."""
    names = [name.removeprefix(_SUM) for name in outputs if name.startswith(_SUM)]
    return {
        name: tuple(float(outputs[kind + name].astype(np.float64).sum()) for kind in (_SUM, _WEIGHT))  # type: ignore
        for name in names
    }


def is_sum(name: str) -> bool:
    """Whether an output of the step 'measure' is of `sums_of`, and none of the task's loss."""
    return name.startswith((_SUM, _WEIGHT))


# Rows -----------------------------------------------------------------------------------------------------------------


class Embedded(NamedTuple):
    """The embedding of a record, float32 [D], how many ids it was computed from, and what was cut, as counts.

    Of an image, the ids are 0.
    """

    embedding: np.ndarray
    ids: int
    counts: Counter[str]


def embeddings(loaded: LoadedModel, records: Iterable[Record]) -> Iterator[Embedded]:
    """Yields the embedding of each record. Raises as `LoadedModel.embed` does."""
    for _, (example,), outputs, counts in _computed(loaded, records, "embed"):
        yield Embedded(outputs["embedding"][0], len(example.columns.get("tokens", ())), counts)


def check_embeds(cfg: Config) -> None:
    """Raises ConfigError if a model of this config has no embeddings."""
    _rows_to_embed(cfg)


class _Rows(NamedTuple):
    """How records become rows for one of `_STEPS`.

    Attributes:
      examples: (record, tokenizer, config, counts) -> its rows.
      columns: of the rows.
      may_lack: fields of the task that are not read.
      is_whole: whether the task's random transform follows, as in an evaluation.
    """

    examples: Callable[[Record, Any, Config, Counter[str]], list[Example]]
    columns: Columns
    may_lack: tuple[str, ...]
    is_whole: bool = False


def _rows_for(name: str, cfg: Config) -> _Rows:
    task = task_of(cfg)
    if name == "embed":
        return _rows_to_embed(cfg)
    if name == "measure" or task.predictor is None:

        def examples(record: Record, tokenizer: Any, cfg: Config, counts: Counter[str]) -> list[Example]:
            return list(input_pipeline.make_examples(task, [record], tokenizer, cfg, counts))

        return _Rows(examples, task.columns(cfg), (), is_whole=True)
    return _Rows(task.predictor.examples, task.predictor.columns(cfg), task.predictor.unread)


def _rows_to_embed(cfg: Config) -> _Rows:
    task = task_of(cfg)
    if cfg.model.kind == "vit" and task.predictor:
        return _Rows(task.predictor.examples, task.predictor.columns(cfg), task.predictor.unread)
    if cfg.model.kind not in base.TEXT_MODELS or task.vocabulary is not base.SENTENCEPIECE:
        raise ConfigError(
            f"a model of task.name={task.name} and model.kind={cfg.model.kind} has no embeddings of texts or images; "
            f"expected a model of the kinds {', '.join(base.TEXT_MODELS)} for texts, or a vit for images"
        )
    others = tuple(name for name in task.fields if name != "text")
    return _Rows(sentence_embeddings.one_sentence, sentence_embeddings.one_sentence_columns(cfg), others)


def measured(
    loaded: LoadedModel, records: Iterable[Record]
) -> Iterator[tuple[Record, list[Example], Outputs, Counter[str]]]:
    """(record, its examples, outputs of its rows, counts) of records with all fields of the task.

    The outputs are those of the task's loss, by which `Task.scores` scores them, and the sums of each row (`sums_of`).
    """
    return _computed(loaded, records, "measure")


def _computed(
    loaded: LoadedModel, records: Iterable[Record], name: str, first: int = 0
) -> Iterator[tuple[Record, list[Example], Outputs, Counter[str]]]:
    """For each record: its examples, the outputs of their rows, and what was counted while they were made."""
    cfg = loaded.config
    rows = _rows_for(name, cfg)
    more = loaded.shots if name != "embed" else {}
    for some in _groups(loaded, records, rows.may_lack):
        some = [record | more for record in some]
        counts = [Counter[str]() for _ in some]
        made = [
            rows.examples({"identity": identity(record), **record}, loaded.tokenizer, cfg, own)
            for record, own in zip(some, counts, strict=True)
        ]
        places = [(first + i, k) for i, examples in enumerate(made) for k in range(len(examples))]
        outputs = _outputs(loaded, name, list(itertools.chain(*made)), places, rows) if places else {}
        at = 0
        for record, examples, own in zip(some, made, counts, strict=True):
            own_rows = slice(at, at + len(examples))
            yield record, examples, {key: x[own_rows] for key, x in outputs.items()}, own
            at += len(examples)
        first += len(some)


def _outputs(
    loaded: LoadedModel,
    name: str,
    examples: list[Example],
    places: list[tuple[int, int]],
    rows_for: _Rows,
) -> Outputs:
    """What the function `name` of rows gives for each example, in a row of its own.

    Args:
      loaded: the model.
      name: in `LoadedModel.steps`.
      examples: R of them.
      places: of each, the number of its record and its number in the record, which seed random transforms.
      rows_for: how the examples were made.
    """
    cfg, task, stored = loaded.config, task_of(loaded.config), rows_for.columns
    padded = dataclasses.replace(cfg.data, packing="pad")
    rows, _ = packing.pack(examples, stored, padded)
    columns = stored
    if rows_for.is_whole and task.transform:
        columns = columns_of_batch(task, cfg)
        finished = [_transformed(loaded, rows, stored, i, place) for i, place in enumerate(places)]
        rows = {key: np.stack([row[key] for row in finished]) for key in columns}
    part = loader.Part(*loader.in_memory(rows), [], stored, columns)
    size = loaded.batch_size
    batches = loader.eval_batches(part, batch_size=size, local_rows=np.arange(size), max_tokens=0, seq_len=1)
    # Without a mesh, the layout of all arrays follows from that of the rows.
    context = jax.set_mesh(loaded.mesh) if loaded.mesh.size == 1 else contextlib.nullcontext()
    if name not in loaded.steps:
        loaded.steps[name] = jax.jit(_STEPS[name](loaded))
    run_step = loaded.steps[name]
    with context:
        place = run_lib.placer(loaded.mesh, size)
        return evaluate.evaluate(run_step, loaded.everywhere, place, batches, len(examples))[1]


def _transformed(loaded: LoadedModel, rows: Row, stored: Columns, at: int, place: tuple[int, int]) -> Row:
    """A row after the task's random transform; the 'other' row of the task is the row itself."""
    task = task_of(loaded.config)
    row = {key: rows[key][at].astype(dtype) for key, (_, dtype) in stored.items()}
    if task.draws_other:
        row |= {f"other_{key}": x for key, x in row.items()}
    assert task.transform is not None
    return task.transform(row, np.random.default_rng([0, *place]), loaded.tokenizer, loaded.config)


# Files ----------------------------------------------------------------------------------------------------------------


def write_predictions(
    loaded: LoadedModel, data: DataConfig, out: Path, *, beams: int = 4, note: Callable[[str], None] = lambda _: None
) -> Counter[str]:
    """Writes the predictions of all records of a file: one JSON object a line, or, for a name in .parquet, a table.

    They are written to 'OUT.part' as they come, which is renamed when it is whole. If that file is there, the same call
    goes on behind its last whole line, after it has checked that the lines are those of the records.

    Args:
      loaded: the model.
      data: from `eval_sets.data_at`.
      out: the file.
      beams: of translations.
      note: called with messages for the console.

    Returns:
      'records'; 'without_prediction', those whose prediction is None; and the counts of records that were cut.

    Raises:
      DataError: a record is bad; found before anything is computed.
      ConfigError: `out` is there already, or a part of it by another model or of other records.
    """
    check_search(loaded, beams)
    part, about_part = (out.with_name(f"{out.name}.part{suffix}") for suffix in ("", ".json"))
    if out.exists():
        raise ConfigError(f"{out} is there already; remove it, or give another file")
    if is_table := out.suffix == ".parquet":
        _parquet()
    wanted = wanted_to_predict(loaded.config)
    total = 0
    for record in registry.stream(data, wanted, note):
        base.check_fields(task_of(loaded.config), [record], TASKS, wanted.may_lack)
        total += 1
    if not total:
        raise DataError(f"data path '{data.path}': no record; expected at least one")
    note(f"{total:,} records in {data.path}")
    about = {"model": loaded.name, "checkpoint": loaded.fingerprint, "beams": beams, "data": schema.to_dict(data)}
    if task_of(loaded.config).answers_with_text:
        about["generate"] = schema.to_dict(loaded.config.generate)
    about = json.loads(json.dumps(about))
    if part.exists() and (not about_part.exists() or json.loads(about_part.read_text()) != about):
        raise ConfigError(f"{part} was begun with another model, file or option; remove it to begin anew")
    write_atomic(about_part, json.dumps(about, indent=1))
    records = registry.stream(data, wanted)
    counts = Counter[str](records=total)
    with part.open("a+b") as file:
        done = _verify(file, records, part, counts)
        if done:
            note(f"{done:,} of them are in {part}: going on behind them")
        shown = input_pipeline.progress(records, "predicting", total, done)
        for said in map(finite, predictions(loaded, shown, first=done, beams=beams)):
            _count(said, counts)
            file.write(as_line(said).encode())
            if (said["number"] + 1) % (_BATCHES_AT_ONCE * loaded.batch_size) == 0:
                file.flush()
        file.flush()
        os.fsync(file.fileno())
    if is_table:
        _write_table(part, out)
        part.unlink()
    else:
        part.replace(out)
    about_part.unlink()
    return counts


def _count(said: dict[str, Any], counts: Counter[str]) -> None:
    counts.update(said.get("counts", {}))
    counts["without_prediction"] += said["prediction"] is None


def _verify(file: Any, records: Iterator[Record], path: Path, counts: Counter[str]) -> int:
    """Takes the records that are in a part file, cuts a line that was not finished, and returns how many there are."""
    file.seek(0)
    done, end = 0, 0
    for line in file:
        if not line.endswith(b"\n"):
            break
        record = next(records, None)
        try:
            said = json.loads(line)
            is_of_record = record is not None and (said["number"], said["identity"]) == (done, identity(record))
            _count(said, counts)
        except (ValueError, KeyError, TypeError):
            is_of_record = False
        if not is_of_record:
            raise ConfigError(
                f"{path}:{done + 1}: not the prediction of record {done}: the data has changed, or the file is "
                "damaged; remove it to begin anew"
            )
        done, end = done + 1, end + len(line)
    file.truncate(end)
    return done


def _parquet() -> Any:
    try:
        from pyarrow import parquet
    except ImportError:
        raise ConfigError("writing .parquet needs the package pyarrow: pip install -e '.[parquet]'") from None
    return parquet


def _write_table(lines: Path, out: Path) -> None:
    """Writes JSON Lines as Parquet: first the types of all columns are found, then the rows are written in groups."""
    import pyarrow

    def groups() -> Iterator[list[dict[str, Any]]]:
        with lines.open("rb") as file:
            for some in _chunks(file, _TABLE_ROWS):
                yield [_without_empty(json.loads(line)) for line in some]

    def types(rows: list[dict[str, Any]]) -> Any:
        names = dict.fromkeys(name for row in rows for name in row)  # pyarrow itself looks at the first row alone
        return pyarrow.table({name: [row.get(name) for row in rows] for name in names}).schema

    whole = pyarrow.unify_schemas([types(rows) for rows in groups()], promote_options="permissive")
    scratch = out.with_name(f"{out.name}.tmp")
    with _parquet().ParquetWriter(scratch, whole) as writer:
        for rows in groups():
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=whole))
    scratch.replace(out)


def _without_empty(value: Any) -> Any:
    """The value with None in the place of objects without a key, which Parquet does not have."""
    if isinstance(value, dict):
        return {key: _without_empty(item) for key, item in value.items()} or None
    return [_without_empty(item) for item in value] if isinstance(value, list) else value


# Functions of rows: LoadedModel -> (params, batch) -> ({}, name -> [B, ...]) ---------------

State = dict[str, Any]  # "params" and "start" of a `LoadedModel`
RowStep = Callable[[State, Batch], tuple[dict[str, Any], dict[str, jax.Array]]]


def _predict_step(loaded: LoadedModel) -> RowStep:
    predictor = task_of(loaded.config).predictor
    assert predictor is not None
    outputs = predictor.outputs(loaded.model.apply, loaded.config, loaded.tokenizer)
    return lambda state, batch: ({}, outputs(state["params"], batch))


def _embed_step(loaded: LoadedModel) -> RowStep:
    cfg = loaded.config
    head = task_of(cfg).head(cfg)
    if head is None or head.kind == "token":
        cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, pool="mean"))
    outputs = sentence_embeddings.embedding_outputs(loaded.model.apply, cfg, loaded.tokenizer)
    return lambda state, batch: ({}, outputs(state["params"], batch))


def _logits_step(loaded: LoadedModel) -> RowStep:
    cfg, tokenizer = loaded.config, loaded.tokenizer

    def run(state: State, batch: Batch) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        out = loaded.model.apply(state["params"], batch)
        real_BxL = batch["segment_ids"] if "tokens" in batch else jnp.ones(out.hidden_BxLxD.shape[:2], jnp.int32)
        if out.head is not None:
            return {}, {"logits": out.head, "real": real_BxL}
        size = tokenizer.vocab_size
        logits_BxLxV = losses.logits(
            out.pre_logits_BxLxD, out.unembed_DxV, vocab_size=size, softcap=cfg.model.logit_softcap
        )
        return {}, {"logits": logits_BxLxV[..., :size], "real": real_BxL}

    return run


def _measure_step(loaded: LoadedModel) -> RowStep:
    """The evaluation step on each row alone: outputs of the task's loss, and the sums and weights of its metrics."""
    cfg = loaded.config
    loss_fn, needs_start = task_of(cfg).loss(loaded.model.apply, cfg, loaded.tokenizer), task_of(cfg).needs_start

    def one(params: Params, start: Params | None, row: Batch) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        batch: Any = jax.tree.map(lambda x: x[None], row)
        sums, outputs = step.eval_step(params, batch, start, loss_fn=loss_fn, needs_start=needs_start)
        return sums, {name: x[0] for name, x in outputs.items()}

    def run(state: State, batch: Batch) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        sums, outputs = jax.vmap(one, (None, None, 0))(state["params"], state["start"], batch)
        kinds = enumerate((_SUM, _WEIGHT))
        return {}, outputs | {f"{kind}{name}": pair[i] for i, kind in kinds for name, pair in sums.items()}

    return run


_STEPS = {"predict": _predict_step, "measure": _measure_step, "logits": _logits_step, "embed": _embed_step}


# Texts ----------------------------------------------------------------------------------------------------------------


def _source(text: str, loaded: LoadedModel) -> tuple[list[int], dict[str, int]]:
    """The ids of a text to translate, and what was cut: with learned positions, what they have no room for."""
    cfg, prompt = loaded.config, task_of(loaded.config).prompt
    assert prompt is not None
    ids = prompt(text, loaded.tokenizer)
    if cfg.model.position != "learned" or len(ids) <= cfg.model.max_len:
        return ids, {}
    return [*ids[: cfg.model.max_len - 1], loaded.tokenizer.eos_id], {"source_cut": 1}


def continued(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    *,
    beams: int,
    count: int = 1,
    log_probs: bool = False,
    seed: int = 0,
    alpha: float | None = None,
) -> list[list[Generated]]:
    """`count` texts for each prompt; translations on one line each.

    Prompts of like length are continued together: a prompt is padded alike, whatever its neighbours are.
    """
    cfg, tokenizer, rows = loaded.config, loaded.tokenizer, loaded.batch_size

    def of(chosen: list[int]) -> Iterable[list[sampling.Generated]]:
        some = [prompts[i] for i in chosen]
        if beams:
            penalty = beam_search.ALPHA if alpha is None else alpha
            sizes = {"beams": beams, "count": count, "rows_multiple": rows}
            return beam_search.search(loaded.model, loaded.params, some, cfg, tokenizer, alpha=penalty, **sizes)
        some = [prompt for prompt in some for _ in range(count)]
        key = jax.random.fold_in(jax.random.key(seed), chosen[0])
        made = sampling.sample(
            loaded.model, loaded.params, some, key, cfg, tokenizer, rows_multiple=rows, log_probs=log_probs
        )
        return _chunks(made, count)

    def finished(one: sampling.Generated) -> Generated:
        return Generated(on_one_line(sampling.text_of(one.ids, tokenizer, cfg), cfg), *one)

    padded = [-(-len(prompt) // sampling.PROMPT_STEP) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: padded[i])
    texts: list[list[Generated]] = [[] for _ in prompts]
    for _, group in itertools.groupby(order, key=lambda i: padded[i]):
        for chosen in _chunks(group, rows if beams else max(1, rows // count)):
            for i, made in zip(chosen, of(chosen), strict=True):
                texts[i] = [finished(one) for one in made]
    return texts


def on_one_line(text: str, cfg: Config) -> str:
    """A generated text; of a task that answers with text, such as a translation, on one line."""
    return " ".join(text.split()) if task_of(cfg).answers_with_text else text


def _groups(loaded: LoadedModel, records: Iterable[Record], may_lack: tuple[str, ...]) -> Iterator[list[Record]]:
    """The records that are held at once. Raises ConfigError if one lacks a field that is read."""
    for some in _chunks(records, _BATCHES_AT_ONCE * loaded.batch_size):
        base.check_fields(task_of(loaded.config), some, TASKS, may_lack)
        yield some


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    items = iter(items)
    while some := list(itertools.islice(items, size)):
        yield some
