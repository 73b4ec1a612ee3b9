"""Made-up studies, and run directories with made-up figures, for the tests of studies."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lm.config import schema
from lm.study import definition, runs
from lm.study.definition import Study, Trial
from lm.tracking import files

ROOT = Path(__file__).resolve().parents[1]
RECIPE = str(ROOT / "configs" / "quickstart_pretrain.py")


def make_study(overrides: list[dict[str, Any]], tables: Any = (), claims: Any = (), recipe: str = RECIPE) -> Study:
    return Study("made", "What is better?\n\nMore.", definition.make_trials(recipe, overrides), tables, claims)


def write_run(root: Path, trial: Trial, summary: Mapping[str, Any], steps: tuple[int, ...] = (0, 10, 20)) -> Path:
    """A run that is done, whose evaluations all have the figures of its summary."""
    folder = root / trial.hash
    folder.mkdir(parents=True)
    runs.write_record(folder, trial, "abc123")
    rows = files.RowFile(folder / "metrics.jsonl")
    for step in steps:
        rows.append({"step": step, "split": "eval", "seconds": step / 2, **summary})
    rows.close()
    files.write_document(folder / "config.json", schema.to_dict(trial.config))
    files.write_document(folder / "summary.json", {**summary, "seconds": 12.5, "versions": {"jax": "1"}})
    return folder


def write_runs(root: Path, study: Study, figures: Callable[[Trial], Mapping[str, Any] | None]) -> None:
    """The runs of a study; those of which `figures` is None stay missing."""
    for trial in study.runs.values():
        if (summary := figures(trial)) is not None:
            write_run(root, trial, summary)
