"""Run directories as the only database of a study: which trials are done, failed or missing is read from them alone.

A trial is the run in ROOT/HASH. Beside the files of every run it has `trial.json`, written before it starts: its arm,
override, config and hash, and the commits at which it was started; `log.txt`, what the run printed; and, where it
ended with an error, `failure.json`.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lm import config as config_lib
from lm.config import Config, flatten, schema
from lm.config.schema import ConfigError
from lm.study.definition import OF_TEST, Study, Trial, hash_of
from lm.tasks import build_saved_config
from lm.tracking import environment, files, run_state
from lm.tracking.files import RunFileError

FAILURE, LOG, RECORD = run_state.FAILURE, run_state.LOG, run_state.RECORD
# How a trial's process, or its part of one, ended.
DONE, STOPPED, ELSEWHERE = "done", "was stopped; the same command resumes it", "is run by another process"
State = run_state.State | Literal["missing"]

# Keys that a trial may leave open, as 0 or 'auto', and that its run fills in.
_OPEN = (
    *(f"model.{key}" for key in ("vocab_size", "max_len", "num_kv_heads", "head_dim", "mlp_dim")),
    *(f"model.decoder_{key}" for key in ("layers", "dim", "heads", "mlp_dim")),
    "data.overlong",
)
# Keys that a run may be resumed with and that change its figures.
_OF_FIGURES = ("eval.", "checkpoint.best_metric", "checkpoint.keep_best", "model.init")

# Parts of the keys of summary.json that differ between two equal runs.
_ABOUT_SPEED = ("trials_at_once", "seconds", "tokens_per_second", "input_bound", "mfu", "goodput", "versions")


@dataclasses.dataclass(frozen=True)
class Record:
    """What trial.json says: the arm, the hash and the config that the run was started with, and at which commits."""

    arm: str
    hash: str
    config: Config
    commits: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What is known of a trial's run.

    Attributes:
      folder: of the run; it need not exist.
      state: 'interrupted' has begun and can be resumed; 'damaged' has files that cannot be trusted.
      why: of a failed or damaged one.
      summary: of a run that is done.
      commits: at which it was started.
    """

    folder: Path
    state: State
    why: str = ""
    summary: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    commits: tuple[str, ...] = ()


def read_record(path: Path) -> Record:
    """Reads a trial.json of this or an older version. Raises RunFileError."""
    content = files.read_document(path)
    try:
        config = build_saved_config(content["config"])
        return Record(str(content["arm"]), str(content["hash"]), config, tuple(map(str, content["commits"])))
    except (ConfigError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise RunFileError(f"{path} is no record of a trial: {type(error).__name__} {error}") from None


def write_record(folder: Path, trial: Trial, commit: str) -> None:
    """Writes trial.json; the commits of earlier starts stay. Raises RunFileError."""
    path = folder / RECORD
    earlier = read_record(path).commits if path.exists() else ()
    if commit in earlier:
        return
    content = {
        "arm": trial.arm,
        "hash": trial.hash,
        "recipe": trial.recipe,
        "override": trial.override,
        "commits": list(dict.fromkeys((*earlier, commit))),
        "config": schema.to_dict(trial.config),
    }
    files.write_document(path, content)


def failure_time(folder: Path) -> int:
    """When the run in a folder failed, in ns; 0 = it has not."""
    try:
        return (folder / FAILURE).stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def fail(folder: Path, error: str) -> str:
    """Writes failure.json unless the run has done so; returns how the trial ended, in words. Raises RunFileError."""
    if not (folder / FAILURE).exists():
        files.write_document(folder / FAILURE, {"error": error})
    return f"failed: {error}"


def find(study: Study, root: Path) -> tuple[dict[str, Outcome], list[str]]:
    """Reads the run directories of a study.

    Returns:
      Hash of each trial -> what is known of its run, and remarks: runs of trials that the study no longer has, copies,
      folders that cannot be read.
    """
    found: dict[str, list[Outcome]] = {}
    remarks = []
    for path in sorted(root.glob(f"*/{RECORD}")):
        folder = path.parent
        try:
            record = read_record(path)
        except RunFileError as error:
            if folder.name not in study.runs:
                remarks.append(f"{error}; its run is left out")
                continue
            found.setdefault(folder.name, []).append(Outcome(folder, "damaged", f"{error}; delete {path}"))
            continue
        # A default that has become what the study sets, or the other way round, changes the hash and not the config.
        trial = study.runs.get(hash_of(record.config)) or study.runs.get(record.hash)
        if trial is None:
            remarks.append(
                f"{folder} is a run of '{record.arm}', seed {record.config.seed}, with a config that the study no "
                "longer has; it is left out. Delete it, or bring the trial back"
            )
        elif changes := [each for each in config_lib.diff(record.config, trial.config).items() if _counts(each[0])]:
            key, (old, new) = changes[0]
            what = f"its config has {key}={old}, the trial {key}={new}: the default has changed since"
            found.setdefault(trial.hash, []).append(
                Outcome(folder, "damaged", f"{what}; move the folder away, or set the key in the study", {})
            )
        else:
            outcome = look(folder, record.commits)
            if outcome.state == "done" and (what := difference_from(folder, trial.config)):
                outcome = Outcome(folder, "damaged", f"{what}; move the folder away, or change the study")
            found.setdefault(trial.hash, []).append(outcome)
    outcomes = {}
    for name in study.runs:
        outcomes[name], remark = _one_of(found.get(name, []), root / name)
        remarks += remark
    return outcomes, remarks


def look(folder: Path, commits: tuple[str, ...] = ()) -> Outcome:
    """The state of a run that has a record, whose commits are given."""
    found = run_state.look(folder)
    hint = "; delete that file, and the sweep makes it again" if found.state == "damaged" else ""
    return Outcome(folder, found.state, found.why + hint, found.summary, commits)


def difference_from(folder: Path, planned: Config) -> str:
    """How the config of a run's last start, its config.json, differs from the one planned; '' = in nothing that counts.

    A run's config has the sizes and the choices that the planned one leaves open.
    """
    try:
        if not (content := files.read_document(folder / "config.json")):
            return "it has no config.json"
        ran = build_saved_config(content)
    except (ConfigError, RunFileError, AttributeError, KeyError, TypeError, ValueError) as error:
        return f"its config.json cannot be read ({type(error).__name__} {error})"
    for key, (was, now) in config_lib.diff(planned, ran).items():
        is_open = key in _OPEN and was in (0, "auto")
        is_published = key.startswith(("model.", "adapter.")) and planned.init_from.startswith("hf:")
        if not (is_open or is_published or _is_free(key)):
            return f"its last start had {key}={now}, planned is {was}"
    return ""


def _is_free(key: str) -> bool:
    """Whether a key changes no figure of a run, such as mesh.data, model.remat or eval.batch_size."""
    may_change = any(key == each or key.startswith(f"{each}.") for each in config_lib.RESUMABLE)
    return may_change and (key == "eval.batch_size" or not key.startswith(_OF_FIGURES) or not _counts(key))


def _counts(key: str) -> bool:
    """Whether a key is of the config by which runs are told apart."""
    return not key.startswith(OF_TEST)


def _one_of(copies: list[Outcome], folder: Path) -> tuple[Outcome, list[str]]:
    """The outcome of a trial that may have several folders, as after runs of two machines were put together."""
    if not copies and (folder / RECORD).exists():
        why = f"{folder} has the run of another trial, as a default has changed since it began; rename the folder"
        return Outcome(folder, "damaged", why), []
    if not copies:
        return Outcome(folder, "missing"), []
    done = [each for each in copies if each.state == "done"]
    for other in done[1:]:
        first_figures, other_figures = (results(each.summary) for each in (done[0], other))
        # Of what both have: another version of the code may write more or fewer keys.
        differ = [key for key in first_figures.keys() & other_figures if first_figures[key] != other_figures[key]]
        if differ:
            key = min(differ)
            why = (
                f"two runs of one config differ: {key} is {first_figures[key]} in {done[0].folder} and "
                f"{other_figures[key]} in {other.folder}; find out why, and delete the wrong one"
            )
            return Outcome(done[0].folder, "damaged", why), []
    chosen = (done or sorted(copies, key=lambda each: each.folder != folder))[0]
    others = [str(each.folder) for each in copies if each is not chosen]
    return chosen, [f"{chosen.folder} is used; {', '.join(others)} has the same config"] if others else []


def results(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a summary that two runs of one config share: all but those about speed."""
    return {
        key: value
        for key, value in flatten(summary)
        if not any(part.startswith(_ABOUT_SPEED) for part in key.split("."))
    }


def duration(seconds: float) -> str:
    """'H:MM:SS'."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def commit_of(folder: Path) -> str:
    """The git commit of a folder, with '+' where files differ from it, '?' where git fails to say; '' where there is
    none."""
    code = environment.code_in(folder)
    return code.commit[:12] + {True: "+", False: "", None: "?"}[code.dirty] if code else ""
