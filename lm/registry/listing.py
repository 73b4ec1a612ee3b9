"""The runs below a folder: found, filtered, sorted, and listed in a table. Imports no JAX.

Run directories are the only database. 10,000 runs take about two seconds on a local disk: of a run that is done three
small files are read, of others the evaluations in metrics.jsonl too. Links are not followed.
"""

import contextlib
import dataclasses
import fnmatch
import math
import os
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from lm import terminal
from lm.config import flatten, older, schema
from lm.config.schema import ConfigError
from lm.evaluation import metrics
from lm.tracking import files, run_state
from lm.tracking.files import RunFileError
from lm.tracking.run_state import STATES, State

COLUMNS = ("name", "arm", "task", "state", "steps", "best", "age", "size")
REMOVED = ".deleted-by-clean"  # ends the name of a run that is being deleted
OF_A_RUN = {"config.json", "metrics.jsonl", run_state.RECORD}  # a folder with one of these is a run
_WRITTEN = {*OF_A_RUN, run_state.SUMMARY, run_state.FAILURE}  # by which the age of a run is told
_SECTIONS = {"model", "train", "data"}  # of the config of a run, also of older versions; others write config.json too
_PROBED, _SLOW_SECONDS = 50, 1e-3  # a file system where these folders take longer each is read by several threads
_THREADS = 32
_CONDITION = re.compile(r"\s*([\w.@/-]+)\s*(<=|>=|!=|=|<|>)\s*(.*?)\s*", re.DOTALL)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_BYTES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}

T = TypeVar("T")
R = TypeVar("R")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A run, as far as a list needs it: configs and summaries of thousands are not kept.

    Attributes:
      folder: of the run.
      name: the folder, from the one that is listed.
      state: `lm.tracking.run_state`.
      why: of a failed or damaged one.
      arm: of the trial of a study; '' = it is none.
      task: its name; '' = not known.
      steps: that were done; None = not known.
      total_steps: that are planned; 0 = not given in steps.
      best_metric: by which its checkpoints are compared.
      best: its best evaluation by that metric; None = there is none.
      best_step: where that was.
      written: when its metrics, config, summary or failure were last written, in seconds since 1970.
      values: key that was asked for -> its value.
    """

    folder: Path
    name: str
    state: State
    why: str = ""
    arm: str | None = None
    task: str | None = None
    steps: int | None = None
    total_steps: int = 0
    best_metric: str = "loss"
    best: float | None = None
    best_step: int | None = None
    written: float = 0.0
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Found(NamedTuple):
    """The runs below a folder, by name, and a line for each thing that is none, or that is damaged."""

    entries: list[Entry]
    notes: list[str]


def find(root: Path, keys: Collection[str] = ()) -> Found:
    """Finds the runs below a folder, or the one that it is.

    Args:
      root: the folder.
      keys: of configs and figures, whose values are wanted.

    Raises:
      ConfigError: there is no such folder, or it is a URL.
    """
    if "://" in str(root) or re.match(r"\w+:/", str(root)):
        raise ConfigError(f"{root}: runs are written to local, NFS or mounted (gcsfuse) folders; give the mounted one")
    if not root.is_dir():
        raise ConfigError(f"{root}: expected a run, or a folder of runs; there is no such folder")
    entries: list[Entry] = []
    notes: list[str] = []
    has_runs: set[str] = set()
    without: list[str] = []
    top = str(root)
    level = [top]
    while level:
        looked = _map(lambda path: _look(path, top, keys), level)
        level = []
        for found in looked:
            notes += found.notes
            level += found.folders
            if found.entry:
                entries.append(found.entry)
                has_runs |= _above(found.path, top)
            elif not found.is_noted:
                without.append(found.path)
    # Of a tree without any run its uppermost folder is named.
    for path in sorted(without):
        if path not in has_runs and (path == top or os.path.dirname(path) in has_runs):
            notes.append(f"{path} has no run: no config.json, metrics.jsonl or trial.json of one")
    return Found(sorted(entries, key=lambda each: natural(each.name)), sorted(notes))


def _above(path: str, root: str) -> set[str]:
    """A folder and those above it, up to `root`."""
    out = {path}
    while path != root:
        path = os.path.dirname(path)
        out.add(path)
    return out


class _Looked(NamedTuple):
    path: str
    entry: Entry | None = None
    folders: Sequence[str] = ()
    notes: Sequence[str] = ()
    is_noted: bool = False  # a note says what it is


def _look(path: str, root: str, keys: Collection[str]) -> _Looked:
    """Reads a folder: a run, or folders that may have some."""
    try:
        with os.scandir(path) as scanned:
            listed = {entry.name: entry for entry in scanned}
    except OSError as error:
        return _Looked(path, notes=[f"{path} cannot be listed: {error.strerror}"], is_noted=True)
    if path != root and path.endswith(REMOVED):
        return _Looked(path, notes=[f"{path} was being deleted; `clean` deletes what is left"], is_noted=True)
    if not listed.keys().isdisjoint(OF_A_RUN):
        return _read(path, root, listed, keys)
    folders, notes = [], []
    for name, entry in listed.items():
        with contextlib.suppress(OSError):
            if name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
            elif entry.is_symlink():
                notes.append(f"{entry.path} is a link, which is not followed")
    return _Looked(path, folders=folders, notes=notes)


def _read(path: str, root: str, listed: Mapping[str, os.DirEntry[str]], keys: Collection[str]) -> _Looked:
    """Reads a run. A file that is damaged is a note, and the rest is there."""
    folder, notes = Path(path), list[str]()
    config, arm = {}, None
    try:
        config = read_config(folder) if "config.json" in listed else {}
        if run_state.RECORD in listed:
            record = files.read_document(folder / run_state.RECORD)
            arm, planned = str(record.get("arm", "")), record.get("config")
            config = config or (planned if isinstance(planned, dict) else {})
    except (RunFileError, ConfigError) as error:
        notes.append(str(error))
    if not notes and config and not config.keys() >= _SECTIONS:
        return _Looked(path, notes=[f"{path} has no run: its config.json is not that of a run"], is_noted=True)
    best_metric = str(value_at(config, "checkpoint.best_metric") or "loss")
    state, why, figures = run_state.RunState("interrupted")
    try:
        state, why, figures = run_state.look(folder, listed.keys())
        if state == "damaged":
            notes.append(why)
        if state != "done" and "metrics.jsonl" in listed:
            figures = figures_so_far(folder, best_metric)
    except RunFileError as error:
        notes.append(str(error))
    except OSError as error:  # deleted meanwhile
        return _Looked(path, notes=[f"{path} cannot be read: {error.strerror}"], is_noted=True)
    if notes:
        state, why = "damaged", notes[0]
    best, best_step = value_at(figures, f"best.{best_metric}"), value_at(figures, "best.step")
    entry = Entry(
        folder,
        path[len(root) :].lstrip("/") if path != root else folder.resolve().name,
        state,
        why,
        arm,
        task=_of_type(str, value_at(config, "task.name")),
        steps=_of_type(int, figures.get("steps")),
        total_steps=_of_type(int, value_at(config, "train.total_steps")) or 0,
        best_metric=best_metric,
        best=float(best) if type(best) in (int, float) else None,
        best_step=_of_type(int, best_step),
        written=written(path, listed),
        values={key: _value(config, figures, key) for key in keys},
    )
    return _Looked(path, entry, notes=notes)


def written(folder: str, names: Collection[str] = _WRITTEN) -> float:
    """When the files that tell the state of a run were last written, in seconds since 1970; 0 = there is none."""
    newest = 0.0
    for name in _WRITTEN.intersection(names):
        with contextlib.suppress(OSError):
            newest = max(newest, os.stat(f"{folder}/{name}", follow_symlinks=False).st_mtime)
    return newest


def _of_type(kind: type[T], value: Any) -> T | None:
    return value if type(value) is kind else None


def _value(saved: Mapping[str, Any], figures: Mapping[str, Any], key: str) -> Any:
    """The value of a key of the config or of the figures; None = the run has none."""
    for tree in (saved, figures):
        if (value := value_at(tree, key)) is not None:
            return value
    section, _, name = key.partition(".")
    if not name or not isinstance(saved.get(section), Mapping) or key in dict(flatten(saved)):
        return None
    from lm.study import definition  # a key that is newer than the run has a default; imports JAX
    from lm.tasks import build_saved_config

    try:
        is_key = key in definition.defaults(str(value_at(saved, "task.name")))
        if not is_key and not key.startswith("eval.sets."):  # the names of sets are the run's own
            return None
        return value_at(schema.to_dict(build_saved_config(saved)), key)
    except (ConfigError, AttributeError, KeyError, TypeError, ValueError):
        return None


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a run's config.json, of an older version in the keys of today; {} = there is none.

    Raises:
      RunFileError: it is damaged.
      ConfigError: it is of an older version, and cannot be understood.
    """
    content = files.read_document(f"{folder}/config.json")
    if not (content.keys() >= _SECTIONS and older.is_older(content)):
        return content
    from lm.tasks import build_saved_config  # imports JAX

    try:
        return schema.to_dict(build_saved_config(content))
    except (ConfigError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{folder / 'config.json'} cannot be read: {type(error).__name__} {error}") from None


def is_run(folder: Path) -> bool:
    """Whether the config in a folder's config.json or trial.json is surely that of a run."""
    for name in ("config.json", run_state.RECORD):
        with contextlib.suppress(RunFileError):
            content = files.read_document(folder / name)
            config = content.get("config") if name == run_state.RECORD else content
            if isinstance(config, dict) and config.keys() >= _SECTIONS:
                return True
    return False


def figures_so_far(folder: Path, best_metric: str) -> dict[str, Any]:
    """What metrics.jsonl tells of a run that is not done, under the keys of summary.json."""
    evaluations, last = files.read_evaluations(folder / "metrics.jsonl")
    figures = {key: value for key, value in (evaluations or [{}])[-1].items() if key not in ("step", "split")}
    figures |= files.first_and_best(evaluations, best_metric)
    return figures | ({"steps": last["step"], "seconds": last["seconds"]} if last else {})


def figures_of(entry: Entry) -> Mapping[str, Any]:
    """The content of summary.json of a run that is done, else its `figures_so_far`. Raises RunFileError."""
    found = run_state.look(entry.folder)
    return found.summary if found.state == "done" else figures_so_far(entry.folder, entry.best_metric)


def value_at(tree: Mapping[str, Any], key: str) -> Any:
    """The value at 'a.b' in nested dicts; None = there is none."""
    value: Any = tree
    for part in key.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(part)
    return None if isinstance(value, dict) else value


def size_of(path: str) -> int:
    """Bytes of the files below a folder. Links are not followed."""
    total = 0
    with contextlib.suppress(OSError), os.scandir(path) as scanned:  # a run may be writing
        for entry in scanned:
            try:
                is_folder = entry.is_dir(follow_symlinks=False)
                total += size_of(entry.path) if is_folder else entry.stat(follow_symlinks=False).st_size
            except OSError:
                continue
    return total


def _map(apply: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """`apply` of each item, in their order; by several threads where the file system, such as NFS, takes its time.

    Elsewhere threads would only wait for each other, as Python runs one at a time.
    """
    began = time.perf_counter()
    out = [apply(item) for item in items[:_PROBED]]
    rest = items[_PROBED:]
    if not rest or time.perf_counter() - began < _PROBED * _SLOW_SECONDS:
        return out + [apply(item) for item in rest]
    with ThreadPoolExecutor(_THREADS) as pool:
        return out + list(pool.map(apply, rest))


def sizes(entries: Sequence[Entry]) -> dict[Path, int]:
    """Folder -> bytes of each run."""
    found = _map(lambda entry: size_of(str(entry.folder)), entries)
    return {entry.folder: size for entry, size in zip(entries, found, strict=True)}


# --- values, conditions, order ------------------------------------------------------------------------------------


class Values:
    """The values of runs by key: a column, or one of the keys that `find` was given."""

    def __init__(self, entries: Sequence[Entry]):
        self._entries, self._sizes = entries, dict[Path, int]()
        self._now = time.time()

    def check(self, key: str) -> None:
        """Raises ConfigError where no run has a value for a key; names the nearest."""
        if key in COLUMNS or not self._entries or any(entry.values[key] is not None for entry in self._entries):
            return
        known = dict.fromkeys(COLUMNS)
        for entry in self._entries[:20]:
            with contextlib.suppress(RunFileError, ConfigError):
                trees = (read_config(entry.folder), figures_of(entry))
                known |= {name: None for tree in trees for name, _ in flatten(tree)}
        where = "a column, a key of the config or a figure of summary.json"
        raise ConfigError(f"no run has '{key}'{schema.nearest(key, known)}; expected {where}")

    def of(self, entry: Entry, key: str) -> Any:
        """The value of a run; None = it has none."""
        if key == "age":
            return self._now - entry.written if entry.written else None
        if key == "size":
            if entry.folder not in self._sizes:
                self._sizes = sizes(self._entries)
            return self._sizes[entry.folder]
        return getattr(entry, key) if key in COLUMNS else entry.values[key]


@dataclasses.dataclass(frozen=True)
class Condition:
    """'KEY OPERATOR VALUE': what a run has to fulfil to be listed."""

    key: str
    operator: str
    value: str

    def holds(self, found: Any) -> bool:
        """Whether a value fulfils it. A run without a value fulfils none."""
        if found is None:
            return False
        wanted = number(self.value, self.key)
        is_number = type(found) in (int, float)
        if self.operator in ("=", "!="):
            if is_number and wanted is not None:
                is_equal = found == wanted
            else:
                text = str(found).lower() if isinstance(found, bool) else str(found)
                is_equal = fnmatch.fnmatchcase(text, self.value.lower() if isinstance(found, bool) else self.value)
            return is_equal == (self.operator == "=")
        if not is_number or wanted is None:
            return False
        return {"<": found < wanted, ">": found > wanted, "<=": found <= wanted, ">=": found >= wanted}[self.operator]


def number(text: str, key: str = "") -> float | None:
    """The number that a text gives; None = it is none. An age has a unit (s, m, h, d, w), a size may have one
    (K, M, G, T).

    Example: '1.5h', 'age' -> 5400.0; '2GB', 'size' -> 2e9.
    """
    factor = 1
    if key == "age":
        if not (match := re.fullmatch(r"(.*?)\s*([smhdw])", text)):
            return None
        text, factor = match[1], _SECONDS[match[2]]
    elif key == "size" and (match := re.fullmatch(r"(.*?)\s*([KMGT]?)B?", text, re.IGNORECASE)):
        text, factor = match[1], _BYTES[match[2].upper()]
    try:
        value = float(text.replace("_", ""))
    except ValueError:
        return None
    return None if math.isnan(value) else value * factor


def condition(text: str) -> Condition:
    """A condition from its text, such as 'optim.name=adam*' or 'best.nll<2.5'. Raises ConfigError."""
    if not (match := _CONDITION.fullmatch(text)):
        raise ConfigError(f"--where={text}: expected KEY=VALUE, or !=, <, <=, > or >= in the place of =")
    made = Condition(match[1], match[2], match[3])
    if made.operator not in ("=", "!=") and number(made.value, made.key) is None:
        unit = "; an age has a unit, such as 12h or 30d" if made.key == "age" else ""
        raise ConfigError(f"--where={text}: '{made.operator}' compares numbers, and '{made.value}' is none{unit}")
    if made.key == "state" and made.operator in ("=", "!=") and not fnmatch.filter(STATES, made.value):
        raise ConfigError(f"--where={text}: no state '{made.value}'; there are {', '.join(STATES)}")
    return made


def select(entries: Sequence[Entry], conditions: Iterable[Condition], values: Values) -> list[Entry]:
    """The runs that fulfil all conditions."""
    out = list(entries)
    for each in conditions:
        out = [entry for entry in out if each.holds(values.of(entry, each.key))]
    return out


def arrange(entries: Sequence[Entry], key: str, values: Values) -> list[Entry]:
    """Runs sorted by a key, '-KEY' = descending; those without a value last.

    Of 'best' the best is first, and runs that are compared by one metric are together.
    """
    name, is_descending = key.removeprefix("-"), key.startswith("-")
    ranked: list[tuple[Any, Entry]] = []
    without = []
    for entry in entries:
        value = values.of(entry, name)
        if value is None:
            without.append(entry)
        elif isinstance(value, int | float):
            gain = metrics.gain(entry.best_metric, value) if name == "best" else -value
            ranked.append(((0, entry.best_metric if name == "best" else "", -gain, []), entry))
        else:
            ranked.append(((1, "", 0.0, natural(str(value)[:200])), entry))
    ranked.sort(key=lambda pair: pair[0], reverse=is_descending)
    return [entry for _, entry in ranked] + without


def natural(text: str) -> list[tuple[int, int, str]]:
    """Sorts 'run9' before 'run10'."""
    parts = re.split(r"(\d+)", text)
    return [(0, int(part), "") if part.isascii() and part.isdecimal() else (1, 0, part) for part in parts]


# --- table --------------------------------------------------------------------------------------------------------


def table(entries: Sequence[Entry], columns: Sequence[str], values: Values) -> str:
    """The table of runs."""
    rows = [[cell(entry, key, values) for key in columns] for entry in entries]
    right = [i for i, key in enumerate(columns) if key not in ("name", "arm", "task", "state")]
    return terminal.table(columns, rows, right)


def cell(entry: Entry, key: str, values: Values) -> str:
    """A value as a cell of the table."""
    value = values.of(entry, key)
    if value is None:
        return ""
    if key == "age":
        return in_time(value)
    if key == "size":
        return in_bytes(value)
    if key == "steps":
        return f"{value}/{entry.total_steps}" if entry.total_steps not in (0, value) else str(value)
    if key == "best":
        return f"{entry.best_metric} {value:.5g}" + ("" if entry.best_step is None else f" @{entry.best_step}")
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def in_time(seconds: float) -> str:
    """Example: 5400 -> '1 h'; the largest unit of which there are at least one."""
    seconds = max(seconds, 0)
    unit = next((unit for unit in "dhm" if seconds >= _SECONDS[unit]), "s")
    return f"{int(seconds // _SECONDS[unit])} {unit}"


def in_bytes(size: float) -> str:
    """Example: 1_234_567 -> '1.2 MB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 99.5 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"
