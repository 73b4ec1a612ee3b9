"""Runs the trials of a study on this machine, one process after another.

Trials that differ in numbers alone are trained side by side in one process (`lm.study.group`), any other in one of its
own. A trial that is done is not run again, and one that was killed resumes. One that ends with an error is listed and
does not stop the others. The same command can run several times at once: the lease of a run's folder gives each trial
one owner, and whoever finds a trial taken goes on with the next.
"""

import dataclasses
import fnmatch
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm import command_line, lease, preemption, run
from lm.config import Config
from lm.config.schema import ConfigError
from lm.evaluation import flops
from lm.study import group, recorded, runs
from lm.study.definition import Study, Trial, hash_of
from lm.study.runs import Outcome

Say = Callable[[str], None]

_ROOT = Path(__file__).resolve().parents[2]
_ELSEWHERE = (lease.Held.exit_status, lease.Lost.exit_status)
_STOPPED = (preemption.Preempted.exit_status, 128 + signal.SIGINT, 128 + signal.SIGTERM)


def select(study: Study, patterns: Sequence[str]) -> list[Trial]:
    """The trials to run, one for each run: those of which one pattern fits the arm, 'ARM, seed N', or the hash.

    Args:
      patterns: with * and ?; none = all trials.

    Raises:
      ConfigError: no trial fits a pattern.
    """
    trials = list(study.runs.values())
    for pattern in patterns:
        if not any(_fits(trial, pattern) for trial in study.trials):
            raise ConfigError(f"--only={pattern}: no trial fits; arms are {'; '.join(study.arms)}")
    wanted = {trial.hash for trial in study.trials if any(_fits(trial, pattern) for pattern in patterns)}
    return [trial for trial in trials if trial.hash in wanted or not patterns]


def _fits(trial: Trial, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in (trial.arm, str(trial), trial.hash))


def train_flops(config: Config) -> float | None:
    """Model FLOPs of a run; None where they are not known before its data is read, or for this kind of model.

    Raises:
      ConfigError, CheckpointError: as `lm.run.plan`, which checks the config as the run's start does.
    """
    cfg = run.plan(config, None).cfg
    total = cfg.train.total
    if total.epochs or not run.predicts_tokens(cfg):
        return None
    size = {"batch_size": cfg.data.batch_size, "seq_len": cfg.data.seq_len, "epoch_examples": 0}
    a_token = flops.train_flops_per_token(cfg.model, cfg.data.seq_len, cfg.model.vocab_size)
    tokens = total.to_steps("train.total", **size) * cfg.data.batch_size * cfg.data.seq_len
    return None if a_token is None else a_token * tokens


def plan(trials: Iterable[Trial]) -> dict[str, float | None]:
    """Hash -> FLOPs of each trial, all of them checked. Those that differ only in their seed are planned once.

    Raises:
      ConfigError: a trial cannot run; names it.
    """
    known: dict[str, float | None] = {}
    out = {}
    for trial in trials:
        key = hash_of(dataclasses.replace(trial.config, seed=0))
        if key not in known:
            try:
                known[key] = train_flops(trial.config)
            except (ValueError, RuntimeError) as error:
                if not command_line.is_expected(error):
                    raise
                raise ConfigError(f"{trial}: {error}") from None
        out[trial.hash] = known[key]
    return out


class Pace:
    """How long trials take: seconds of those that were measured, by arm."""

    def __init__(self) -> None:
        self._seconds: dict[str, list[float]] = {}

    @classmethod
    def of(cls, trials: Iterable[Trial], outcomes: Mapping[str, Outcome]) -> "Pace":
        """That of the trials that are done."""
        pace = cls()
        for trial in trials:
            summary = outcomes[trial.hash].summary
            if isinstance(seconds := summary.get("seconds"), int | float):
                pace.add(trial, seconds / summary.get("trials_at_once", 1))
        return pace

    def add(self, trial: Trial, seconds: float) -> None:
        """Takes the seconds of a run."""
        self._seconds.setdefault(trial.arm, []).append(seconds)

    def estimate(self, trials: Iterable[Trial]) -> float | None:
        """Seconds that trials will take: the mean of their arm, or of all where none of it was measured; None = ?"""
        every = [value for values in self._seconds.values() for value in values]
        if not every:
            return None
        each = (self._seconds.get(trial.arm, every) for trial in trials)
        return sum(sum(values) / len(values) for values in each)

    def in_words(self, trials: Sequence[Trial]) -> str:
        """'3 left, about 0:01:10'; the time is not known before one was measured."""
        seconds = self.estimate(trials)
        about = "the first will tell how long they take" if seconds is None else f"about {runs.duration(seconds)}"
        return f"{len(trials)} left, {about}" if trials else "none left"


def run_all(
    study: Study,
    trials: Sequence[Trial],
    root: Path,
    *,
    environment: Mapping[str, str],
    retry_failed: bool,
    say: Say,
    at_once: int,
) -> dict[str, Outcome]:
    """Runs those of `trials` that are not done.

    Args:
      study: that they are of.
      trials: from `select`.
      root: the folder of the runs.
      environment: of the processes.
      retry_failed: also run those that failed.
      say: progress.
      at_once: trials to train side by side where they differ in numbers alone; 0 = as many as the machine allows, 1 = a
        process for each trial.

    Returns:
      Hash -> outcome of each of `trials`, as it is at the end.
    """
    outcomes, _ = runs.find(study, root)
    todo, pace = to_run(trials, outcomes, retry_failed), Pace.of(trials, outcomes)
    failures = {trial.hash: runs.failure_time(outcomes[trial.hash].folder) for trial in todo}
    begun = 0
    for batch in batches(todo, at_once):
        fresh = []
        for trial in batch:
            folder, before = outcomes[trial.hash].folder, outcomes[trial.hash].state
            now = runs.look(folder).state
            has_changed = now != before or runs.failure_time(folder) != failures[trial.hash]
            if has_changed and now in ("done", "running", "failed"):
                begun += 1
                say(f"[{begun}/{len(todo)}] {trial}: {now}, by another process")
            else:
                fresh.append(trial)
        if not fresh:
            continue
        folders = [outcomes[trial.hash].folder for trial in fresh]
        began = time.monotonic()
        if len(batch) > 1:
            say(f"[{begun + len(fresh)}/{len(todo)}] {len(fresh)} trials in one process, in {root}")
            how = run_together(study, fresh, folders, environment, at_once)
            if how != group.DOES_NOT_FIT:
                begun += len(fresh)
                if how:
                    say(f"the process of these trials {how}")
                for trial, folder in zip(fresh, folders, strict=True):
                    if runs.look(folder).state == "done":
                        pace.add(trial, (time.monotonic() - began) / len(fresh))
                continue
            say(how)
        for trial, folder in zip(fresh, folders, strict=True):
            begun += 1
            began = time.monotonic()
            verb = "starts" if outcomes[trial.hash].state == "missing" else "resumes"
            say(f"[{begun}/{len(todo)}] {trial}: {verb} in {folder}; {pace.in_words(todo[begun - 1 :])}")
            how = run_one(trial, folder, environment)
            if how == runs.DONE:
                pace.add(trial, time.monotonic() - began)
            say(f"[{begun}/{len(todo)}] {trial}: {how} after {runs.duration(time.monotonic() - began)}")
    outcomes, _ = runs.find(study, root)
    return {trial.hash: outcomes[trial.hash] for trial in trials}


def to_run(trials: Iterable[Trial], outcomes: Mapping[str, Outcome], retry_failed: bool) -> list[Trial]:
    """Those of the trials that a sweep starts or resumes."""
    states = ("missing", "interrupted", "running", *(["failed"] if retry_failed else []))
    return [trial for trial in trials if outcomes[trial.hash].state in states]


def _of_this_code(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that imports `lm` from where this one does, whatever the current folder is."""
    paths = [str(_ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    return {**environment, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}


def batches(trials: Sequence[Trial], at_once: int) -> list[list[Trial]]:
    """The trials of each process, in the order of their first ones."""
    made: dict[str, list[Trial]] = {}
    for trial in trials:
        made.setdefault((at_once != 1 and group.key_of(trial.config)) or trial.hash, []).append(trial)
    return list(made.values())


def run_together(
    study: Study, trials: Sequence[Trial], folders: Sequence[Path], environment: Mapping[str, str], at_once: int
) -> str:
    """Runs trials in one process, which tells how each ends, and waits for it; returns how it ended, '' = well.

    Raises:
      KeyboardInterrupt, SystemExit: as `run_one`.
    """
    commit = runs.commit_of(_ROOT)
    for trial, folder in zip(trials, folders, strict=True):
        folder.mkdir(parents=True, exist_ok=True)
        if lease.holder(folder) != "alive":
            runs.write_record(folder, trial, commit)
    key = group.key_of(trials[0].config)
    keys = group.differing([each.config for each in study.runs.values() if group.key_of(each.config) == key])
    command = [sys.executable, "-m", "lm.study.group", f"--at_once={at_once}", f"--keys={','.join(keys)}"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, env=_of_this_code(environment))
    try:
        process.communicate("".join(f"{folder}\n" for folder in folders))
    except BaseException:
        _stop(process)
        raise
    if process.returncode in (0, *_ELSEWHERE):
        return ""
    if process.returncode == group.DOES_NOT_FIT_STATUS:
        return group.DOES_NOT_FIT
    return _killed(process.returncode) or f"ended with status {process.returncode}"


def run_one(trial: Trial, folder: Path, environment: Mapping[str, str]) -> str:
    """Runs a trial in a process of its own and waits for it; returns how it ended, in words.

    Whether an owner of the folder on another machine, or before this one was restarted, is alive is found out by the
    run itself, which takes a while.

    Raises:
      KeyboardInterrupt, SystemExit: this process was asked to stop; the run has been asked to, and has ended.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if lease.holder(folder) == "alive":
        return runs.ELSEWHERE
    runs.write_record(folder, trial, runs.commit_of(_ROOT))
    (folder / runs.FAILURE).unlink(missing_ok=True)
    with (folder / runs.LOG).open("ab") as log:
        before = log.tell()
        process = subprocess.Popen(command(folder), stdout=log, stderr=log, env=_of_this_code(environment))
        try:
            status = process.wait()
        except BaseException:
            _stop(process)
            raise
    if status == 0:
        return runs.DONE
    if status in _ELSEWHERE:
        return runs.ELSEWHERE
    if killed := _killed(status):
        return killed
    return runs.fail(folder, last_error(folder / runs.LOG, before) or f"status {status}")


def _killed(status: int) -> str:
    """How a process ended that was killed or stopped; '' = it was neither."""
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}; the same command resumes it"
    return runs.STOPPED if status in _STOPPED else ""


def _stop(process: subprocess.Popen[Any]) -> None:
    """Asks a run to save and stop, and waits for it."""
    process.send_signal(signal.SIGTERM)
    process.wait()


def command(folder: Path) -> list[str]:
    """What starts or resumes the recorded trial of a folder."""
    recipe = f"{recorded.__file__}:{folder / runs.RECORD}"
    return [sys.executable, "-m", "lm.main", f"--config={recipe}", f"--workdir={folder}"]


def last_error(log: Path, start: int) -> str:
    """The last line of a log that begins with 'error: ', without that, or else its last line, as of a traceback.

    Args:
      log: its file.
      start: byte after those of earlier processes.
    """
    with log.open("rb") as file:
        file.seek(max(start, os.fstat(file.fileno()).st_size - (1 << 16)))
        lines = file.read().decode(errors="replace").split("\n")
    lines = [line.strip() for line in lines if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or [""])[-1]
