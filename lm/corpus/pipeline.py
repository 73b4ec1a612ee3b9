"""Prepares raw text as shards: plans a job, runs its stages, and writes the index and data card."""

import functools
import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from lm import lease
from lm.config import Config, older, schema
from lm.config.schema import ConfigError
from lm.corpus import artifacts, data_card, shard_writer, stages
from lm.corpus.filters import FILTERS
from lm.corpus.stages import CONTAMINATED, EXACT, NEAR, PARTS, Job
from lm.corpus.workers import Runner
from lm.data import shards, tokenizer
from lm.data.example import Columns
from lm.data.readers import paths, registry
from lm.data.record import DataError, Fault

# Tasks that read only text, and whose rows can be stored in shards.
_TASKS = ("causal_lm", "prefix_lm", "masked_lm", "span_corruption")
_PARTIAL_WORK = ".work."  # prefix of the temporary folder that a kill leaves while `work` is created
# Config keys that determine the content of a prepared folder.
_DATA_KEYS = (
    *("format", "path", "eval_path", "eval_fraction", "encoding", "separator", "rename"),
    "seq_len",
)


class Plan(NamedTuple):
    """A checked job.

    Attributes:
      job: what to prepare.
      groups: (number, files) of each unit of the `read` stage.
      settings: everything that determines the bytes of the folder.
      note: a message for the user before the job starts, or ''.
    """

    job: Job
    groups: list[tuple[int, list[registry.Unit]]]
    settings: dict[str, Any]
    note: str


class Stage(NamedTuple):
    """A stage of a job: its units, the function that runs a unit, and the path of a unit's output."""

    name: str
    units: Callable[[Job], Sequence[Any]]
    run: Callable[[Job, Any], None]
    output: Callable[[Job, Any], Path]


def plan(
    cfg: Config,
    folder: Path,
    *,
    evaluation: Sequence[str] = (),
    ngram: int = 13,
    filters: Sequence[str] = (),
    near: float = 0.75,
    shard_bytes: int = 1 << 24,
) -> Plan:
    """Checks the settings before any data is read, and reads the evaluation files.

    Args:
      cfg: a recipe; its `data` and `tokenizer` say what to prepare.
      folder: the output folder: new, or of the same job.
      evaluation: files, folders or globs of evaluation data to decontaminate against.
      ngram, filters, near, shard_bytes: see `stages.Job`.

    Raises:
      ConfigError: a setting that cannot be prepared.
      DataError: a path matches no file, or an evaluation file cannot be used.
    """
    if "://" in str(folder):
        raise ConfigError(f"--out={folder} is a URL; expected a folder, local or mounted (NFS, gcsfuse)")
    if cfg.task.name not in _TASKS:
        raise ConfigError(f"'task.name' is {cfg.task.name}; data is prepared for {', '.join(_TASKS)}")
    if cfg.data.format not in registry.FORMATS:
        raise ConfigError(f"'data.format' is {cfg.data.format}; data is prepared from {', '.join(registry.FORMATS)}")
    for name in filters:
        if name not in FILTERS:
            raise ConfigError(
                f"--filters: no filter '{name}'{schema.nearest(name, FILTERS)}; known: {', '.join(FILTERS)}"
            )
    if cfg.data.max_records:
        raise ConfigError(f"'data.max_records' is {cfg.data.max_records}; expected 0: all records are prepared")
    if cfg.data.mixture:
        raise ConfigError("'data.mixture' names several sources; prepare each by itself, with its 'data.path'")
    if cfg.init_from and not cfg.tokenizer.path:
        raise ConfigError(
            "'init_from' is set, whose tokenizer must be used: set tokenizer.path=RUN/tokenizer.model, or RUN/tokenizer"
        )
    given_tokenizer = tokenizer.load(cfg.tokenizer.path) if cfg.tokenizer.path else None
    units = registry.find(cfg.data)
    evaluation_files = [file for path in evaluation for file in paths.find_files(path, ("",))]
    block_bytes = max(1, shard_bytes // 2)
    groups = [stages.group_units(part, block_bytes) for part in (units.valid, units.train)]
    job = Job(
        folder=folder,
        cfg=cfg,
        num_groups=sum(map(len, groups)),
        held_groups=len(groups[0]),
        evaluation=tuple(map(str, evaluation_files)),
        ngram=ngram,
        filters=tuple(filters),
        near=near,
        tokenizer_file=given_tokenizer.file if given_tokenizer else tokenizer.FILES[0],
        block_bytes=block_bytes,
        shard_bytes=shard_bytes,
    )
    settings = {
        "packing": cfg.data.packing,
        "task": {"name": cfg.task.name, "row_length": _columns(cfg)["tokens"][0][0]},
        "data": {name: getattr(cfg.data, name) for name in _DATA_KEYS},
        "tokenizer": {
            **{key: value for key, value in schema.to_dict(cfg.tokenizer).items() if key != "chat_template"},
            "hash": given_tokenizer.hash if given_tokenizer else "",
        },
        "prepare": {"ngram": ngram, "filters": job.filters, "near": near, "shard_bytes": shard_bytes},
        "evaluation": {str(file): _state(file) for file in evaluation_files},
        "files": {str(unit): _state(unit) for unit in (*units.valid, *units.train)},
    }
    held = stages.evaluation(job.evaluation, ngram)
    note = f"evaluation files: {len(held.files)}, of {held.texts:,} texts; {held.unchecked:,} too short to check"
    notes = [note] * bool(held.files) + registry.left_out(cfg.data, [*units.train, *units.valid])
    numbered = list(enumerate(groups[0] + groups[1]))
    return Plan(job, numbered, json.loads(json.dumps(settings)), "\n".join(notes))


def _state(unit: registry.Unit) -> list[int]:
    """Sizes and modification times of a unit's files, to detect changes when a job is resumed."""
    found = [file.stat() for file in paths.files_of(unit)]
    return [value for stat in found for value in (stat.length, int(stat.mtime))]


def run(planned: Plan, runner: Runner, progress: Callable[[str, int, int, float], None]) -> dict[str, Any]:
    """Runs a job, or resumes it, and returns the index of the prepared folder.

    Args:
      planned: from `plan`.
      runner: see `lm.corpus.workers`.
      progress: called with a stage, its finished units, all its units, and the CPU seconds of the last one (0 if it was
        finished before).

    Raises:
      ConfigError: the folder is of a job with other settings, or holds other files.
      DataError: see `stages.read`; or no document is left for a part.
      JobError: a worker ended.
      lm.lease.Held, lm.lease.Lost: another process is running the job, from the start on, or since it took it over.
    """
    job = planned.job
    if not _is_finished(planned) or job.work.exists():
        with lease.hold(job.folder) as check_lease:
            if not _is_finished(planned):  # nor was it meanwhile
                _begin(planned)
                _run(planned, runner, progress, check_lease)
            shutil.rmtree(job.work, ignore_errors=True)
    return shards.read_index(epath.Path(job.folder))


def _run(
    planned: Plan,
    runner: Runner,
    progress: Callable[[str, int, int, float], None],
    check_lease: Callable[[], None],
) -> None:
    job = planned.job
    faults: list[Fault] = []
    for stage in _stages(planned.groups):
        units = stage.units(job)
        pending = [unit for unit in units if not stage.output(job, unit).exists()]
        progress(stage.name, len(units) - len(pending), len(units), 0.0)
        for done, seconds in enumerate(
            runner(functools.partial(stage.run, job), pending), len(units) - len(pending) + 1
        ):
            check_lease()
            progress(stage.name, done, len(units), seconds)
        if stage.name == "read":
            faults = _faults(job)
        if stage.name == "measure":
            shard_writer.shard_names(job)  # raises if a part has no document, before the slow stages
    _check_files(planned)
    check_lease()
    _finish(planned, faults)


def _check_files(planned: Plan) -> None:
    """Raises DataError if a file changed since the job began: the data may be a mix of both versions."""
    was = planned.settings["files"]
    for unit in (unit for _, units in planned.groups for unit in units):
        now = _state(unit) if all(file.exists() for file in paths.files_of(unit)) else "gone"
        if was[str(unit)] != now:
            raise DataError(
                f"{unit} changed while it was prepared (size, time: {was[str(unit)]} -> {now}); start again"
            )


def _stages(groups: list[tuple[int, list[registry.Unit]]]) -> tuple[Stage, ...]:
    def below(stage: str) -> Callable[[Job, Any], Path]:
        return lambda job, unit: job.work / stage / (unit if isinstance(unit, str) else f"{unit[0]:08}")

    return (
        Stage("read", lambda job: groups, stages.read, below("read")),
        Stage("measure", stages.blocks, stages.measure, below("measure")),
        Stage("match", stages.match_ranges, stages.match, below("match")),
        Stage(
            "tokenizer",
            shard_writer.tokenizer_names,
            shard_writer.make_tokenizer,
            lambda job, name: job.folder / name,
        ),
        Stage("write", shard_writer.shard_names, shard_writer.write, below("write")),
    )


def _columns(cfg: Config) -> Columns:
    from lm.tasks import task_of  # imports JAX, which workers that read and match have no need of

    return task_of(cfg).columns(cfg)


def _is_finished(planned: Plan) -> bool:
    """Whether the folder is complete. Raises ConfigError if it is of another job."""
    folder, work = planned.job.folder, planned.job.work
    finished = (folder / shards.INDEX).exists()
    if finished or work.exists():
        existing = shards.read_index(epath.Path(folder))["settings"] if finished else _settings(work)
        old, new = dict(schema.flatten(older.upgrade_prepared(existing))), dict(schema.flatten(planned.settings))
        if "task.row_length" not in old:  # older versions did not write it
            del new["task.row_length"]
        if changed := sorted(key for key in old | new if old.get(key) != new.get(key)):
            lines = [
                f"  {key}: {old.get(key, 'absent')} in the folder, {new.get(key, 'absent')} now" for key in changed
            ]
            raise ConfigError(
                f"--out={folder} was prepared with other settings; give another folder, or delete it\n"
                + "\n".join(lines[:20] + ["  ..."] * (len(lines) > 20))
            )
        return finished
    own = (lease.is_lease(path.name) or path.name.startswith(_PARTIAL_WORK) for path in folder.glob("*"))
    if not all(own):
        raise ConfigError(f"--out={folder} holds other files; expected a new or empty folder")
    return False


def _begin(planned: Plan) -> None:
    """Makes the folder of a new job. Deletes what a kill has left of it."""
    folder, work = planned.job.folder, planned.job.work
    for scratch in folder.glob(f"{_PARTIAL_WORK}*"):
        shutil.rmtree(scratch)
    if not work.exists():
        artifacts.write(work, {}, planned.settings)


def _settings(work: Path) -> Any:
    """Settings of the job that a folder `work` belongs to. Raises ConfigError if it belongs to none."""
    try:
        return artifacts.info(work)
    except FileNotFoundError:
        raise ConfigError(f"--out={work.parent} holds other files; expected a new or empty folder") from None


def _faults(job: Job) -> list[Fault]:
    """All bad records. Raises DataError if there are more than data.max_bad_records."""
    infos = (artifacts.info(job.work / "read" / f"{group:08}") for group in range(job.num_groups))
    faults = [Fault(*fault) for found in infos for fault in found["faults"]]
    stages.check_faults(faults, job.cfg.data.max_bad_records)
    return faults


# Index and statistics -------------------------------------------------------------------------------------------------


def _finish(planned: Plan, faults: list[Fault]) -> None:
    """Writes removed.jsonl, the data card and, last, the index. Raises DataError if a part is empty."""
    job = planned.job
    names = shard_writer.shard_names(job)
    infos = [artifacts.info(job.work / "write" / name) for name in names]
    parts: dict[str, list[dict[str, Any]]] = {part: [] for part in PARTS}
    for name, info in zip(names, infos, strict=True):
        parts[name.partition("-")[0]] += [info["entry"]] if info["entry"] else []
    statistics = _statistics(job, infos, parts, faults)
    if empty := [part for part in stages.parts_with_documents(job) if not parts[part]]:
        raise DataError(f"no {empty[0]} document is left: all are duplicates of others; give more data")
    with (job.folder / "removed.jsonl.tmp").open("wb") as file:
        for fault in faults:
            line = {"source": fault.where, "why": fault.kind, "message": fault.message}
            file.write((json.dumps(line, ensure_ascii=False) + "\n").encode(errors="replace"))
        for name in names:
            file.write(artifacts.array(job.work / "write" / name, "removed").tobytes())
    (job.folder / "removed.jsonl.tmp").replace(job.folder / "removed.jsonl")
    columns = _columns(job.cfg)
    index = {
        "parts": parts,
        "layout": {"length": columns["tokens"][0][0], "shifted": "targets" in columns},
        "tokenizer_hash": tokenizer.load(tokenizer.find(job.folder)).hash,
        "settings": planned.settings,
        "statistics": statistics,
    }
    data_card.write(job.folder, index)
    shards.write_index(job.folder, index)


def _statistics(
    job: Job, infos: list[dict[str, Any]], parts: Mapping[str, list[dict[str, Any]]], faults: list[Fault]
) -> dict[str, Any]:
    """Counts of documents read, dropped by reason, and kept. Raises RuntimeError if they do not add up."""
    read = [artifacts.info(job.work / "read" / f"{group:08}") for group in range(job.num_groups)]
    dropped = {why: [0, 0] for why in (*job.filters, CONTAMINATED, EXACT, NEAR)}
    for info in infos:
        for why, count in info["dropped"].items():
            dropped[why] = [a + b for a, b in zip(dropped[why], count, strict=True)]
    kept = {
        part: {key: sum(entry[key] for entry in entries) for key in ("documents", "bytes", "tokens", "rows")}
        for part, entries in parts.items()
    }
    found = {
        "records": sum(info["documents"] for info in read) + len(faults),
        "faults": dict(Counter(fault.kind for fault in faults)),
        "documents": sum(info["documents"] for info in read),
        "bytes": sum(info["bytes"] for info in read),
        "normalised": sum(info["normalised"] for info in read),
        "dropped": {why: count for why, count in dropped.items() if count[0]},
        "kept": kept,
        "lengths": np.sum([info["lengths"] for info in infos], axis=0).tolist(),
    }
    gone = sum(count for count, _ in dropped.values())
    if found["documents"] != gone + sum(info["documents"] for info in infos):
        raise RuntimeError(f"documents were lost between the stages: {found}")
    return found
