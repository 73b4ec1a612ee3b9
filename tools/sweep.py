"""Runs the trials of a study, each as a run of its own; then `python tools/report.py` makes its tables.

    python tools/sweep.py experiments/NAME [--dry_run] [--only='lora*'] [--runs=DIR] [--retry_failed]

Prints the trials, their FLOPs and the time that they will take, then runs those that are not done. docs/studies.md
explains how a study is written.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from absl import flags

from lm import command_line
from lm.terminal import say, stop

_DRY = flags.DEFINE_bool("dry_run", False, "Print the trials and their cost; run none.")
_ONLY = flags.DEFINE_multi_string("only", [], "Run trials whose arm, 'ARM, seed N' or hash fits, with * and ?.")
_RUNS = flags.DEFINE_string("runs", "", "Folder of the runs; '' = runs/NAME.")
_AT_ONCE = flags.DEFINE_integer(
    "at_once",
    0,
    "Trials that differ in numbers alone train side by side, N at once; 0 = as the machine allows, 1 = none.",
)
_RETRY = flags.DEFINE_bool("retry_failed", False, "Run those again that ended with an error.")


def main(argv: list[str]) -> None:
    """Runs a study; status 1 if a trial failed."""
    (folder,) = command_line.arguments(argv, "experiments/NAME")
    environment = dict(os.environ)
    os.environ["JAX_PLATFORMS"] = "cpu"  # this process plans; the accelerators are for its runs
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with command_line.one_line_errors():
        sweep(Path(folder), environment)


def sweep(folder: Path, environment: dict[str, str]) -> None:
    """Shows what there is to do, does it, and lists what failed."""
    from lm import study as study_lib
    from lm.study import runs
    from lm.study import sweep as sweep_lib

    study = study_lib.load(folder)
    root = Path(_RUNS.value or f"runs/{study.name}").absolute()
    if study.search:
        search(study, root, environment)
        return
    trials = sweep_lib.select(study, _ONLY.value)
    outcomes, remarks = runs.find(study, root)
    todo = sweep_lib.to_run(trials, outcomes, _RETRY.value)
    flops = sweep_lib.plan(todo)
    width = max(len(str(trial)) for trial in trials)
    for trial in trials:
        cost = flops.get(trial.hash)
        shown = f"{cost:9.2e} FLOPs" if cost else "" if trial.hash not in flops else "FLOPs not known"
        say(f"{trial.hash}  {trial!s:{width}}  {outcomes[trial.hash].state:11}  {shown}".rstrip())
    for remark in remarks:
        say(f"note: {remark}", file=sys.stderr)
    known = [cost for cost in flops.values() if cost]
    total = f"; {sum(known):.2e} FLOPs" + ("" if len(known) == len(flops) else " and more") if known else ""
    pace = sweep_lib.Pace.of(trials, outcomes)
    say(f"{len(trials)} trials in {root}, {len(todo)} to run{total}; {pace.in_words(todo)}")
    if _DRY.value:
        return
    ended = sweep_lib.run_all(
        study,
        trials,
        root,
        environment=environment,
        retry_failed=_RETRY.value,
        say=say,
        at_once=_AT_ONCE.value,
    )
    bad = [(trial, ended[trial.hash]) for trial in trials if ended[trial.hash].state != "done"]
    for trial, outcome in bad:
        why = outcome.why or "the same command resumes it"
        say(f"{outcome.state}: {trial}: {why} ({outcome.folder})", file=sys.stderr)
    if bad:
        failed = sum(outcome.state in ("failed", "damaged") for _, outcome in bad)
        stop(
            f"error: {len(bad)} of {len(trials)} trials are not done, {failed} of them by an error; see log.txt of each"
        )
    say(f"all {len(trials)} trials are done")


def search(study: Any, root: Path, environment: dict[str, str]) -> None:
    """Draws and runs the trials of a search, then prints them all, the best first."""
    from lm.evaluation import metrics
    from lm.study import runs, searching
    from lm.study import sweep as sweep_lib

    if _ONLY.value or _RETRY.value:
        stop("error: --only and --retry_failed select trials that are given; this study draws its own (SEARCH)")
    if not _DRY.value:
        study = searching.run(study, root, lambda trial, folder: sweep_lib.run_one(trial, folder, environment), say)
    study = searching.with_known(study, root)
    outcomes, remarks = runs.find(study, root)
    for remark in remarks:
        say(f"note: {remark}", file=sys.stderr)
    name = study.search.metric.rpartition(".")[2]
    results = list(zip(study.trials, searching.seen_of(study, outcomes), strict=True))
    results.sort(key=lambda pair: -float("inf") if pair[1].value is None else metrics.gain(name, pair[1].value))
    for trial, seen in reversed(results):
        value = outcomes[trial.hash].state if seen.value is None else f"{study.search.metric} {seen.value:.5g}"
        say(f"{trial.hash}  {value}  {trial.arm}  {outcomes[trial.hash].why}".rstrip())
    count = {state: sum(seen.state == state for _, seen in results) for state in ("done", "failed", "running")}
    listed = ", ".join(f"{number} {state}" for state, number in count.items() if number)
    say(f"{len(results)} of {study.search.trials} trials in {root}{': ' if listed else ''}{listed}")
    if not _DRY.value and not count["done"]:
        stop("error: no trial has a result; see log.txt of each")


if __name__ == "__main__":
    command_line.run(main)
