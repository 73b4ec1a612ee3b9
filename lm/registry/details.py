"""One run in detail, and the differences between several, as text. What cannot be read is one line beside the rest."""

import contextlib
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm import checkpoint, terminal
from lm.checkpoint import CheckpointError
from lm.config import Config, flatten, schema
from lm.config.schema import ConfigError
from lm.evaluation import metrics
from lm.registry import listing
from lm.registry.listing import Entry
from lm.study import definition
from lm.tasks import build_saved_config
from lm.tracking import environment, files, run_state
from lm.tracking.files import RunFileError

_LOG_LINES = 12
_RESULTS = ("steps", "tokens", "seconds", "tokens_per_second", "parameters", "trained_parameters", "mfu")


def open_run(folder: Path) -> tuple[Entry, list[str]]:
    """The run in a folder, and what is wrong with its files. Raises ConfigError where there is none."""
    found = listing.find(folder)
    if [entry.folder for entry in found.entries] != [folder]:
        below = f"; there are {len(found.entries)} runs below it" if found.entries else ""
        raise ConfigError(f"{folder}: expected the folder of a run, with config.json or metrics.jsonl{below}")
    return found.entries[0], found.notes


def saved_config(entry: Entry) -> Config | None:
    """The config of a run: of config.json, or else the one that its trial was given; None = it has none.

    Raises:
      ConfigError, RunFileError: it cannot be read.
    """
    content = listing.read_config(entry.folder)
    if not content:
        content = files.read_document(entry.folder / run_state.RECORD).get("config", {})
    try:
        return build_saved_config(content) if content else None
    except (ConfigError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{entry.folder}: its config cannot be read: {run_state.in_words(error)}") from None


def settings_of(config: Config | None) -> dict[str, Any]:
    """Key of a config -> value, all of them, also those that are newer than its run; {} = there is no config."""
    return dict(flatten(schema.to_dict(config))) if config else {}


def show(folder: Path) -> tuple[str, list[str]]:
    """A run: state, changes of the config, data, metrics, checkpoints, versions, error.

    Returns:
      The text, and a line for each thing that is wrong with its files.

    Raises:
      ConfigError: there is no run.
    """
    entry, wrong = open_run(folder)
    values = listing.Values([entry])
    cells = [(key, listing.cell(entry, key, values)) for key in listing.COLUMNS]
    parts = ["\n".join(f"{key + ':':8}{terminal.one_line(cell)}" for key, cell in cells if cell)]
    if entry.why:
        parts.append(f"{entry.state}: {entry.why}")
    settings: dict[str, Any] = {}
    figures: Mapping[str, Any] = {}
    with _noted(wrong):
        settings = settings_of(saved_config(entry))
        usual = definition.defaults(str(settings["task.name"])) if settings else {}
        changed = [(key, value, usual.get(key)) for key, value in settings.items() if value != usual.get(key)]
        parts.append(_titled("Config", terminal.table(("key", "value", "default"), changed)))
    with _noted(wrong):
        figures = listing.figures_of(entry)
    parts.append(_titled("Data", _data(settings, figures)))
    with _noted(wrong):
        parts.append(_titled("Metrics", _metrics(figures)))
    with _noted(wrong):
        parts.append(_titled("Checkpoints", _checkpoints(entry)))
    with _noted(wrong):
        parts.append(_titled("Versions", _versions(entry, figures)))
    if entry.state in ("failed", "interrupted"):
        parts.append(_titled(f"Last lines of {run_state.LOG}", _log(entry.folder / run_state.LOG)))
    return "\n\n".join(part for part in parts if part), list(dict.fromkeys(wrong))


@contextlib.contextmanager
def _noted(wrong: list[str]) -> Iterator[None]:
    """Turns an error of a run's files into a line of `wrong`."""
    try:
        yield
    except (CheckpointError, ConfigError, RunFileError) as error:
        wrong.append(str(error))


def _titled(title: str, text: str) -> str:
    return f"{title}\n{text}" if text else ""


def _data(settings: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    """Where the records come from, and how many were used."""
    names = ("data.format", "data.path", "data.mixture", "data.eval_path", "data.seq_len", "data.batch_size")
    rows = [(key, settings[key]) for key in (*names, "init_from", "tokenizer.path") if settings.get(key)]
    rows += [(key, f"{figures[key]:,}") for key in ("tokens",) if isinstance(figures.get(key), int)]
    rows += [(f"sources.{key}", value) for key, value in flatten(_part(figures, "sources"))]
    return terminal.table(("", ""), rows).lstrip("\n") if rows else ""


def _part(figures: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = figures.get(key)
    return value if isinstance(value, Mapping) else {}


def _metrics(figures: Mapping[str, Any]) -> str:
    """The metrics before training, at its end, at the best evaluation and on the test set; then the other figures."""
    columns = {name: _part(figures, name) for name in ("before", "best", "test")}
    columns = {"before": columns["before"], "last": figures, "best": columns["best"], "test": columns["test"]}
    names = dict.fromkeys(
        name for column in columns.values() for name in column if metrics.is_known(name) and name not in _RESULTS
    )
    used = {title: column for title, column in columns.items() if any(name in column for name in names)}
    rows = [[name, *(number(column.get(name)) for column in used.values())] for name in names]
    text = terminal.table(["", *used], rows, range(1, 5)) if rows else ""
    others = [f"{name} {number(figures[name])}" for name in _RESULTS if figures.get(name) is not None]
    return "\n".join(filter(None, (text, "  ".join(others))))


def number(value: Any) -> str:
    """A figure as text."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e5 else f"{value:.5g}"
    return f"{value:,}" if type(value) is int else "" if value is None else str(value)


def _checkpoints(entry: Entry) -> str:
    """The steps that are saved, the best and the newest of them, and what cannot be read."""
    saved = checkpoint.list_saved(entry.folder)
    if not saved:
        return "none"
    best = best_step(entry.folder)
    rows = []
    for each in saved:
        marks = [name for name, is_it in (("best", each.step == best), ("latest", each is saved[-1])) if is_it]
        value = each.metrics.get(entry.best_metric)
        size = listing.in_bytes(listing.size_of(os.fspath(each.path)))
        rows.append((each.step, ", ".join(marks), number(value), size, each.info.get("unreadable", "")))
    return terminal.table(("step", "", entry.best_metric, "size", ""), rows, (0, 2, 3))


def best_step(folder: Path) -> int | None:
    """The step that RUN@best names; None where no checkpoint was evaluated."""
    with contextlib.suppress(CheckpointError):
        return checkpoint.choose(f"{folder}@best", lambda _: None).step
    return None


def _versions(entry: Entry, figures: Mapping[str, Any]) -> str:
    """How a run was last started and at which commit; the commits of a trial's starts; the versions of what it used."""
    started = files.read_document(entry.folder / environment.ENVIRONMENT)
    record = files.read_document(entry.folder / run_state.RECORD)
    commits = record.get("commits")
    lines = [f"commit {', '.join(map(str, commits))}"] if isinstance(commits, list) and any(commits) else []
    lines += _started(started)
    used = ", ".join(f"{name} {version}" for name, version in _part(figures, "versions").items())
    return "\n".join([*lines, *([used] if used else [])])


def _started(started: Mapping[str, Any]) -> list[str]:
    """Lines of what environment.json says of a run's last start."""
    if not started:
        return []
    git, command, earlier = _part(started, "git"), started.get("command"), started.get("earlier")
    lines = [f"started {started.get('began')} on {started.get('host')}"]
    if isinstance(earlier, list) and earlier:
        lines[0] += f", {len(earlier):,} earlier starts"
    if git:
        changes = "" if git.get("dirty") is False else " with changes that git failed to tell"
        changes = f" with changes, see {environment.DIFF}" if "diff_is_cut" in git else changes
        lines.append(f"commit {git.get('commit')} of {git.get('repository')}{changes}")
    if isinstance(command, list):
        lines.append(f"command {shlex.join(map(str, command))}")
    return [terminal.one_line(line) for line in lines]


def _log(path: Path) -> str:
    """The end of what a trial has printed; '' where there is no log."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - (1 << 14)))
        lines = file.read().decode(errors="replace").splitlines()
        written = [terminal.one_line(line)[:400] for line in lines if line.strip()]
        return "\n".join(written[-_LOG_LINES:])
    return ""


def diff(folders: Sequence[Path]) -> tuple[str, list[str]]:
    """The keys of the config in which runs differ, side by side, and their figures below.

    Returns:
      The text, and a line for each thing that is wrong with their files.

    Raises:
      ConfigError: a folder has no run.
    """
    wrong = list[str]()
    names, configs, figures = [], [], []
    for folder in folders:
        entry, notes = open_run(folder)
        wrong += notes
        names.append(str(folder))
        configs.append(dict[str, Any]())
        figures.append(dict[str, Any]())
        with _noted(wrong):
            configs[-1] = settings_of(saved_config(entry))
        with _noted(wrong):
            figures[-1] = dict(flatten(listing.figures_of(entry)))
    keys = dict.fromkeys(key for settings in configs for key in settings)
    absent = object()
    differ = [key for key in keys if len({repr(settings.get(key, absent)) for settings in configs}) > 1]
    rows = [[key, *(str(settings.get(key, "")) for settings in configs)] for key in differ]
    parts = [terminal.table(["config", *names], rows) if rows else "the configs are the same"]
    shown = dict.fromkeys(key for each in figures for key in each if is_result(key))
    rows = [[key, *(number(each.get(key)) for each in figures)] for key in shown]
    if rows:
        parts.append(terminal.table(["figures", *names], rows, range(1, len(names) + 1)))
    return "\n\n".join(parts), list(dict.fromkeys(wrong))


def is_result(key: str) -> bool:
    """Whether a figure of summary.json says how good or how fast a run was."""
    parent, _, name = key.rpartition(".")
    return parent in ("", "best", "test") and (metrics.is_known(name) or (name in _RESULTS and not parent))
