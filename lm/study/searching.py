"""The trials of a search: read from the run directories, drawn, and run one after another."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from lm import lease
from lm.config import flatten, schema
from lm.config.schema import ConfigError
from lm.study import runs
from lm.study.axes import Override
from lm.study.definition import Study, Trial, make_trials
from lm.study.search import Choice, Search, Seen, random_draw, suggest
from lm.tracking import files
from lm.tracking.files import RunFileError

_DRAWING = ".search"  # the folder, beside the runs, whose lease a worker holds while it draws a trial
_WAIT_SECONDS = 0.2
_ATTEMPTS = 1000  # to draw a trial that was not tried before


def with_known(study: Study, root: Path) -> Study:
    """The study with the trials that were drawn so far, in the order of their hashes; itself where it has no search."""
    if study.search is None:
        return study
    keys = {*study.search.space, *study.search.fixed}
    overrides: dict[str, Override] = {}
    for path in sorted(root.glob(f"*/{runs.RECORD}")):
        try:
            override = files.read_document(path).get("override")
        except RunFileError:
            continue  # `runs.find` names it
        if isinstance(override, dict) and override.keys() == keys and _is_within(study.search, override):
            known = {**override, **study.search.fixed}  # JSON has turned tuples into lists
            overrides.setdefault(repr(sorted(known.items())), known)
    trials = make_trials(study.recipe, overrides.values()) if overrides else ()
    return dataclasses.replace(study, trials=trials)


def _is_within(search: Search, override: Override) -> bool:
    """Whether a trial, read from its JSON, is of this search, and not of one whose space or fixed keys were changed
    since."""
    if any(override[key] != files.finite(value) for key, value in search.fixed.items()):
        return False
    for key, values in search.space.items():
        value = override[key]
        if isinstance(values, Choice):
            is_inside = value in values.values
        else:
            is_inside = isinstance(value, int | float) and values.low <= value <= values.high
        if not is_inside:
            return False
    return True


def seen_of(study: Study, outcomes: Mapping[str, runs.Outcome]) -> list[Seen]:
    """What the trials of a search have shown. One that is done without a finite result counts as failed.

    Raises:
      ConfigError: one that is done has no such metric.
    """
    assert study.search is not None
    seen, metric = [], study.search.metric
    for trial in study.trials:
        outcome = outcomes[trial.hash]
        params = {key: trial.override[key] for key in study.search.space}
        figures = dict(flatten(outcome.summary))
        value = figures.get(metric)
        if outcome.state in ("failed", "damaged"):
            seen.append(Seen(params, "failed"))
        elif outcome.state != "done":
            seen.append(Seen(params, "running"))
        elif metric not in figures and metric not in figures.get("not_finite", ()):
            known = sorted(key for key, figure in figures.items() if type(figure) in (int, float))
            raise ConfigError(
                f"SEARCH: {outcome.folder} is done and has no metric '{metric}'{schema.nearest(metric, known)}; "
                f"there are {', '.join(known)}"
            )
        elif isinstance(value, int | float) and math.isfinite(value):
            seen.append(Seen(params, "done", float(value)))
        else:
            seen.append(Seen(params, "failed"))
    return seen


def run(study: Study, root: Path, run_one: Callable[[Trial, Path], str], say: Callable[[str], None]) -> Study:
    """Draws and runs trials until there are as many as the search wants; first resumes those that were interrupted.

    Args:
      study: with a search.
      root: the folder of the runs.
      run_one: runs a trial in a folder, and returns how it ended.
      say: progress.

    Returns:
      The study with all its trials.
    """
    search = study.search
    assert search is not None
    root.mkdir(parents=True, exist_ok=True)
    tried = set[str]()
    while True:
        with _alone(root):
            study = with_known(study, root)
            outcomes, _ = runs.find(study, root)
            left = [t for t in study.trials if outcomes[t.hash].state in ("interrupted", "missing")]
            resumed = next((trial for trial in left if trial.hash not in tried), None)
            if resumed is None and len(study.trials) >= search.trials:
                return study
            trial = resumed or _drawn(study, outcomes)
            folder = outcomes[trial.hash].folder if resumed else root / trial.hash
            folder.mkdir(exist_ok=True)
            runs.write_record(folder, trial, runs.commit_of(Path(__file__).parent))
        tried.add(trial.hash)
        number = len(study.trials) + (resumed is None)
        say(f"[{number}/{search.trials}] {'resumes' if resumed else 'starts'} {trial} in {folder}")
        say(f"[{number}/{search.trials}] {trial}: {run_one(trial, folder)}")


def _drawn(study: Study, outcomes: Mapping[str, runs.Outcome]) -> Trial:
    """The next trial. A draw that was tried before, as in a small space, is replaced by a random one that was not.

    Raises:
      ConfigError: the space has no value left.
    """
    search = study.search
    assert search is not None
    seen, known = seen_of(study, outcomes), {trial.hash for trial in study.trials}
    tried = [each.params for each in seen]
    for attempt in range(_ATTEMPTS):
        params = random_draw(search, len(seen) + 1000 * attempt) if attempt else suggest(search, seen)
        if params in tried:
            continue
        (trial,) = make_trials(study.recipe, [{**search.fixed, **params}])
        if trial.hash not in known:
            return dataclasses.replace(trial, arm=", ".join(f"{key}={value}" for key, value in params.items()))
    raise ConfigError(
        f"SEARCH: {len(known)} trials, and {_ATTEMPTS} more draws gave no new one: the space has no value left"
    )


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Waits until no other worker of this search draws a trial, and keeps them waiting while its block runs."""
    while True:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(lease.hold(root / _DRAWING))
            except lease.Held:
                time.sleep(_WAIT_SECONDS)
                continue
            yield
            return
