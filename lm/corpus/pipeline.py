"""Raw text to prepared shards: a job from its first stage to its last, and what it leaves to be read."""

import fcntl
import functools
import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from lm.config import Config, older, schema
from lm.config.schema import ConfigError
from lm.corpus import artifacts, data_card, shard_writer, stages
from lm.corpus.filters import FILTERS
from lm.corpus.stages import CONTAMINATED, EXACT, NEAR, PARTS, Job
from lm.corpus.workers import JobError, Runner
from lm.data import shards, tokenizer
from lm.data.readers import paths, registry
from lm.data.record import DataError, Fault
from lm.tasks import TASKS

# Tasks that read text alone, and whose rows shards can hold.
_TASKS = ("causal_lm", "prefix_lm", "masked_lm", "span_corruption")
_UNMADE_WORK = ".work."  # begins the name of what a kill leaves while the folder is made
# Keys of the config that decide what a prepared folder holds.
_DATA_KEYS = (
    *("format", "path", "eval_path", "eval_fraction", "encoding", "separator", "rename"),
    "seq_len",
)


class Plan(NamedTuple):
    """A job that was checked.

    Attributes:
      job: what is to be done.
      groups: of units of data, for the stage that reads.
      settings: all that decides the bytes of the folder, by key.
      note: what a person should know before it starts, or ''.
    """

    job: Job
    groups: list[tuple[int, list[registry.Unit]]]
    settings: dict[str, Any]
    note: str


class Stage(NamedTuple):
    """One stage of a job: its units, what makes a unit's output, and where that is."""

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
    """Checks all that can be checked before anything is read, and reads the evaluation files.

    Args:
      cfg: a recipe; its `data` and `tokenizer` say what is to be prepared.
      folder: to write to, and nowhere else; new, or of the same job.
      evaluation: files, folders or globs whose text is to be kept out.
      ngram, filters, near, shard_bytes: see `stages.Job`.

    Raises:
      ConfigError: a setting that preparing data cannot follow; a folder of another job, with the difference.
      DataError: a path names nothing, or an evaluation file cannot be used.
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
        raise ConfigError("the tokenizer of 'init_from' is to be used: set tokenizer.path=RUN/tokenizer.model")
    words = tokenizer.load(cfg.tokenizer.path) if cfg.tokenizer.path else None
    units = registry.find(cfg.data)
    looked_for = [file for path in evaluation for file in paths.find_files(path, ("",))]
    block_bytes = max(1, shard_bytes // 2)
    groups = [stages.group_units(part, block_bytes) for part in (units.valid, units.train)]
    job = Job(
        folder=folder,
        cfg=cfg,
        num_groups=sum(map(len, groups)),
        held_groups=len(groups[0]),
        evaluation=tuple(map(str, looked_for)),
        ngram=ngram,
        filters=tuple(filters),
        near=near,
        block_bytes=block_bytes,
        shard_bytes=shard_bytes,
    )
    settings = {
        "packing": cfg.data.packing,
        "task": {"name": cfg.task.name},
        "data": {name: getattr(cfg.data, name) for name in _DATA_KEYS},
        "tokenizer": {**schema.to_dict(cfg.tokenizer), "hash": words.hash if words else ""},
        "prepare": {"ngram": ngram, "filters": job.filters, "near": near, "shard_bytes": shard_bytes},
        "evaluation": {str(file): _state(file) for file in looked_for},
        "files": {str(unit): _state(unit) for unit in (*units.valid, *units.train)},
    }
    held = stages.evaluation(job.evaluation, ngram)
    note = f"evaluation files: {len(held.files)}, of {held.texts:,} texts; {held.unchecked:,} too short to look for"
    notes = [note] * bool(held.files) + registry.left_out(cfg.data, [*units.train, *units.valid])
    numbered = list(enumerate(groups[0] + groups[1]))
    return Plan(job, numbered, json.loads(json.dumps(settings)), "\n".join(notes))


def _state(unit: registry.Unit) -> list[int]:
    """Size and time of change of its files, to see that they are the same when a job goes on."""
    found = [file.stat() for file in paths.files_of(unit)]
    return [value for stat in found for value in (stat.length, int(stat.mtime))]


def run(planned: Plan, runner: Runner, progress: Callable[[str, int, int, float], None]) -> dict[str, Any]:
    """Does what is left of a job, and returns the index of the prepared folder.

    Args:
      planned: from `plan`.
      runner: see `lm.corpus.workers`.
      progress: called with a stage, its units done, all of them, and the seconds that the last one took (0: it was
        there already).

    Raises:
      ConfigError: the folder is of another job, or of none.
      DataError: see `stages.read`; or nothing is left to train on, or to hold out.
      JobError: another process is at it, or a worker ended.
    """
    job = planned.job
    if _is_finished(planned):
        shutil.rmtree(job.work, ignore_errors=True)
        return shards.read_index(epath.Path(job.folder))
    with (job.work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go however this process ends
        except BlockingIOError:
            raise JobError(f"--out={job.folder}: another process prepares it; wait for it, or stop it") from None
        index = _run(planned, runner, progress)
    shutil.rmtree(job.work)
    return index


def _run(planned: Plan, runner: Runner, progress: Callable[[str, int, int, float], None]) -> dict[str, Any]:
    job = planned.job
    faults: list[Fault] = []
    for stage in _stages(planned.groups):
        units = stage.units(job)
        left = [unit for unit in units if not stage.output(job, unit).exists()]
        progress(stage.name, len(units) - len(left), len(units), 0.0)
        for done, seconds in enumerate(runner(functools.partial(stage.run, job), left), len(units) - len(left) + 1):
            progress(stage.name, done, len(units), seconds)
        if stage.name == "read":
            faults = _faults(job)
        if stage.name == "measure":
            shard_writer.shard_names(job)  # an error where a part has no document, before the slow stages
    _check_files(planned)
    return _finish(planned, faults)


def _check_files(planned: Plan) -> None:
    """Raises DataError where a file changed since the job began: some of it may have been read before, some after."""
    was = planned.settings["files"]
    for unit in (unit for _, units in planned.groups for unit in units):
        now = _state(unit) if all(file.exists() for file in paths.files_of(unit)) else "gone"
        if was[str(unit)] != now:
            raise DataError(f"{unit} changed while it was prepared (size, time: {was[str(unit)]} -> {now}); start anew")


def _stages(groups: list[tuple[int, list[registry.Unit]]]) -> tuple[Stage, ...]:
    def below(stage: str) -> Callable[[Job, Any], Path]:
        return lambda job, unit: job.work / stage / (unit if isinstance(unit, str) else f"{unit[0]:08}")

    return (
        Stage("read", lambda job: groups, stages.read, below("read")),
        Stage("measure", stages.blocks, stages.measure, below("measure")),
        Stage("match", stages.match_ranges, stages.match, below("match")),
        Stage(
            "tokenizer",
            lambda job: ["tokenizer.model"],
            shard_writer.make_tokenizer,
            lambda job, name: job.folder / name,
        ),
        Stage("write", shard_writer.shard_names, shard_writer.write, below("write")),
    )


def _is_finished(planned: Plan) -> bool:
    """Whether the folder is there and whole; makes it if it is new. Raises ConfigError where it is something else."""
    folder, work = planned.job.folder, planned.job.work
    finished = (folder / shards.INDEX).exists()
    if finished or work.exists():
        there = shards.read_index(epath.Path(folder))["settings"] if finished else _settings(work)
        old, new = dict(schema.flatten(older.upgrade_prepared(there))), dict(schema.flatten(planned.settings))
        if changed := sorted(key for key in old | new if old.get(key) != new.get(key)):
            lines = [
                f"  {key}: {old.get(key, 'not there')} in the folder, {new.get(key, 'not there')} now"
                for key in changed
            ]
            raise ConfigError(
                f"--out={folder} was prepared with other settings; give another folder, or delete it\n"
                + "\n".join(lines[:20] + ["  ..."] * (len(lines) > 20))
            )
        return finished
    left = [path for path in folder.iterdir() if path.name.startswith(_UNMADE_WORK)] if folder.exists() else []
    if folder.exists() and len(left) < len(list(folder.iterdir())):
        raise ConfigError(f"--out={folder} holds other files; expected a new or empty folder")
    for scratch in left:
        shutil.rmtree(scratch)
    artifacts.write(work, {}, planned.settings)
    return False


def _settings(work: Path) -> Any:
    """Of the job that a folder `work` is of. Raises ConfigError where it is of none."""
    try:
        return artifacts.info(work)
    except FileNotFoundError:
        raise ConfigError(f"--out={work.parent} holds other files; expected a new or empty folder") from None


def _faults(job: Job) -> list[Fault]:
    """All bad records. Raises DataError where there are more than data.max_bad_records."""
    infos = (artifacts.info(job.work / "read" / f"{group:08}") for group in range(job.num_groups))
    faults = [Fault(*fault) for found in infos for fault in found["faults"]]
    stages.check_faults(faults, job.cfg.data.max_bad_records)
    return faults


# What is left to be read ----------------------------------------------------------------------------------------------


def _finish(planned: Plan, faults: list[Fault]) -> dict[str, Any]:
    """Writes removed.jsonl, the data card and, last, the index. Raises DataError where a part is empty."""
    job = planned.job
    names = shard_writer.shard_names(job)
    infos = [artifacts.info(job.work / "write" / name) for name in names]
    parts: dict[str, list[dict[str, Any]]] = {part: [] for part in PARTS}
    for name, info in zip(names, infos, strict=True):
        parts[name.partition("-")[0]] += [info["entry"]] if info["entry"] else []
    statistics = _statistics(job, infos, parts, faults)
    if empty := [part for part in PARTS if not parts[part]]:
        raise DataError(f"no {empty[0]} document is left: all are duplicates of others; give more data")
    with (job.folder / "removed.jsonl.tmp").open("wb") as file:
        for fault in faults:
            line = {"source": fault.where, "why": fault.kind, "message": fault.message}
            file.write((json.dumps(line, ensure_ascii=False) + "\n").encode(errors="replace"))
        for name in names:
            file.write(artifacts.array(job.work / "write" / name, "removed").tobytes())
    (job.folder / "removed.jsonl.tmp").replace(job.folder / "removed.jsonl")
    columns = TASKS[job.cfg.task.name].columns(job.cfg)
    index = {
        "parts": parts,
        "layout": {"length": columns["tokens"][0][0], "shifted": "targets" in columns},
        "tokenizer_hash": tokenizer.load(job.folder / "tokenizer.model").hash,
        "settings": planned.settings,
        "statistics": statistics,
    }
    data_card.write(job.folder, index)
    shards.write_index(job.folder, index)
    return index


def _statistics(
    job: Job, infos: list[dict[str, Any]], parts: Mapping[str, list[dict[str, Any]]], faults: list[Fault]
) -> dict[str, Any]:
    """What was read, what went and why, what is there. Raises RuntimeError if that does not add up."""
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
