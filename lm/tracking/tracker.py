"""Tracking of a running run: progress, metrics.jsonl, samples.jsonl, TensorBoard, profiles, and where the time goes.

Every process makes a `Tracker` and calls it in the same way; only the one with `enabled` (process 0) writes or prints.
"""

import contextlib
import datetime
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from lm.config import MonitorConfig
from lm.terminal import visible

BUCKETS = ("compile", "input", "step", "eval", "checkpoint")
PLAIN_LINE_SECONDS = 10.0  # at least so long between two progress lines where the console is a file or a pipe

_now = time.perf_counter


class Tracker:
    """Writes metrics, samples and profiles of a run into `workdir`; a context manager that flushes and closes them.

    A run resumed at `start_step` computes the later steps again: rows of metrics.jsonl and samples.jsonl with a greater
    step are dropped (all rows when `start_step` is 0, as nothing was restored), so that the files end up as if the run
    had never stopped. A last line that a kill has cut off is dropped too. The console reports both.
    """

    def __init__(
        self, workdir: str | os.PathLike[str], total_steps: int, start_step: int, enabled: bool, config: MonitorConfig
    ) -> None:
        """Opens the files.

        Raises:
          ValueError: `workdir` is a URL; rows are appended to files, which object stores do not support.
        """
        if "://" in os.fspath(workdir):
            raise ValueError(f"run directory {workdir} is a URL; give a local, NFS or mounted (gcsfuse) folder")
        self._workdir, self._total_steps, self._start_step = Path(workdir), total_steps, start_step
        self._enabled, self._config, self._profiling = enabled, config, False
        self._seconds = dict.fromkeys((*BUCKETS, "other"), 0.0)
        self._buckets = ["other"]  # the open ones, innermost last; time outside all buckets counts as 'other'
        self._began = self._mark = _now()
        self._earlier_seconds = 0.0
        self._first_progress: tuple[int, float] | None = None
        self._last_line = -math.inf
        self._closing = contextlib.ExitStack()
        if enabled:
            self._open()

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._closing.close()

    def log(self, step: int, split: Literal["train", "eval", "test"], metrics: Mapping[str, float]) -> None:
        """Appends a row to metrics.jsonl and scalars to TensorBoard.

        Args:
          step: steps done.
          metrics: name -> value; NaN and infinity become null in the row, as JSON has neither.

        Raises:
          ValueError: a metric has the name of one of the row's own keys: step, split or seconds (wall time of the run
            so far, over all its starts).
        """
        if taken := sorted(metrics.keys() & {"step", "split", "seconds"}):
            raise ValueError(f"metric '{taken[0]}' has the name of a row's own key; rename it")
        if not self._enabled:
            return
        values = {name: float(value) for name, value in metrics.items()}
        row = {"step": step, "split": split, "seconds": round(self.seconds(), 3), **values}
        _append(self._metrics_file, row)
        for name, value in values.items():
            self._tensorboard.add_scalar(f"{split}/{name}", value, step)

    def text(self, step: int, name: str, text: str) -> None:
        """Writes a sample to the console, samples.jsonl and TensorBoard; nothing in `text` is interpreted as markup."""
        if not self._enabled:
            return
        _append(self._samples_file, {"step": step, "name": name, "text": text})
        indented = "\n".join("    " + line for line in text.splitlines())  # verbatim in Markdown
        self._tensorboard.add_text(name, indented, step)
        self.note(f"[step {step:,}] {name}\n{indented}")

    def note(self, message: str) -> None:
        """Prints to the console (stderr), above the progress bar, with control characters escaped."""
        if self._enabled:
            self._console.print(visible(message), markup=False, highlight=False, soft_wrap=True)

    def progress(
        self,
        step: int,
        loss: float,
        tokens_per_second: float,
        mfu: float | None = None,
        input_bound: float | None = None,
    ) -> None:
        """Updates the progress bar; without a terminal, prints a line at most every 10 s and one at the last step.

        The remaining time is estimated from the steps since the first call, so that compilation does not count.

        Args:
          step: steps done.
          mfu: in [0, 1], attention counted in full; None where the peak is not known.
          input_bound: in [0, 1], the share of the time that the devices wait for input; None = not shown.
        """
        if not self._enabled:
            return
        now = _now()
        self._first_progress = first_step, first_time = self._first_progress or (step, now)
        figures = [f"loss {loss:.4f}", f"{tokens_per_second:,.0f} tokens/s"]
        if mfu is not None:
            figures.append(f"MFU {mfu:.1%}")
        if input_bound is not None:
            figures.append(f"input-bound {input_bound:.0%}")
        if first_step < step:
            left = (now - first_time) / (step - first_step) * (self._total_steps - step)
            figures.append(f"ETA {datetime.timedelta(seconds=round(left))}")
        line = " · ".join(figures)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures=line)
        elif step >= self._total_steps or now - self._last_line >= PLAIN_LINE_SECONDS:
            self._last_line = now
            self.note(f"step {step:,}/{self._total_steps:,} · {line}")

    def profile(self, step: int) -> None:
        """Starts or stops the JAX profiler; to be called before step `step` (from 0) is dispatched.

        The trace of steps of `monitor.profile` is written to `workdir`/profile. Waits for the
        device at both ends, so that the trace holds these steps and no others.
        """
        profile = self._config.profile
        self._set_profiling(self._enabled and profile.first_step <= step < profile.first_step + profile.num_steps)

    @contextlib.contextmanager
    def bucket(self, name: str) -> Iterator[None]:
        """Counts the wall time of its block towards `name`, one of BUCKETS; that of an inner bucket counts there only.

        JAX dispatches asynchronously: the device's time counts in the bucket that waits for the result.
        """
        if name not in BUCKETS:
            raise ValueError(f"no time bucket '{name}'; there are {', '.join(BUCKETS)}")
        self._count()
        self._buckets.append(name)
        try:
            yield
        finally:
            self._count()
            self._buckets.pop()

    def goodput(self) -> dict[str, float]:
        """Bucket -> wall seconds since the tracker was made; with 'other' they add up to all the time since then."""
        self._count()
        return dict(self._seconds)

    def seconds(self) -> float:
        """Wall seconds of the run: since the tracker was made, plus those of earlier starts up to the last row kept."""
        return self._earlier_seconds + _now() - self._began

    def _count(self) -> None:
        now = _now()
        self._seconds[self._buckets[-1]] += now - self._mark
        self._mark = now

    def _open(self) -> None:
        from rich.console import Console
        from tensorboardX import SummaryWriter

        self._console = Console(stderr=True)
        self._workdir.mkdir(parents=True, exist_ok=True)
        paths = [self._workdir / "metrics.jsonl", self._workdir / "samples.jsonl"]
        for path in paths:
            rows, note = rewind(path, self._start_step)
            self._earlier_seconds = max([self._earlier_seconds, *(row.get("seconds", 0.0) for row in rows)])
            if note:
                self.note(note)
        self._metrics_file, self._samples_file = (self._closing.enter_context(path.open("a")) for path in paths)
        # Hides the events of steps that will be computed again.
        purge_step = self._start_step + 1 if self._start_step else 0
        self._tensorboard = SummaryWriter(str(self._workdir / "tensorboard"), purge_step=purge_step)
        self._closing.callback(self._tensorboard.close)
        self._bar = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._bar, self._task = self._start_bar()
        self._closing.callback(self._set_profiling, False)

    def _start_bar(self) -> tuple[Any, Any]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[figures]}"),
        )
        bar = self._closing.enter_context(Progress(*columns, console=self._console, refresh_per_second=2))
        return bar, bar.add_task("step", total=self._total_steps, completed=self._start_step, figures="compiling")

    def _set_profiling(self, wanted: bool) -> None:
        if wanted == self._profiling:
            return
        import jax

        jax.block_until_ready(jax.live_arrays())
        if wanted:
            jax.profiler.start_trace(str(self._workdir / "profile"))
        else:
            jax.profiler.stop_trace()
            self.note(f"profile written to {self._workdir / 'profile'}; open it with TensorBoard or xprof")
        self._profiling = wanted


def read_rows(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """Reads a jsonl file.

    Returns:
      The rows, and whether the last line was incomplete. Such a line is left out unless only its newline is missing.

    Raises:
      ValueError: another line is not a JSON object with a 'step'; names file and line.
    """
    if not path.exists():
        return [], False
    *lines, last = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        if (row := _parse(line)) is None:
            raise ValueError(
                f"{path}:{number}: expected a JSON object with a 'step', found {line[:60]!r}; "
                "delete that line or move the file away, then start again"
            )
        rows.append(row)
    if (row := _parse(last)) is not None:
        rows.append(row)
    return rows, bool(last)


def rewind(path: Path, start_step: int) -> tuple[list[dict[str, Any]], str]:
    """Drops the rows of a jsonl file that a run resumed at `start_step` will write again, and an incomplete last line.

    The file is replaced atomically.

    Returns:
      The rows kept, and a message that says what was dropped; '' for nothing.
    """
    rows, incomplete = read_rows(path)
    kept = [row for row in rows if start_step and row["step"] <= start_step]
    dropped = len(rows) - len(kept)
    if incomplete or dropped:
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept))
    notes = [f"dropped {dropped} rows after step {start_step}"] if dropped else []
    notes += ["repaired an incomplete last line"] if incomplete else []
    return kept, f"{path.name}: {' and '.join(notes)}" if notes else ""


def write_atomic(path: Path, text: str) -> None:
    """Writes a file atomically: a reader, also after a crash, finds either the old content or the new."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with scratch.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def finite(value: Any) -> Any:
    """`value` (nested dicts, lists, scalars) with NaN and infinity as None, since JSON has neither."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if hasattr(value, "item"):  # a numpy or jax scalar
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _append(file: Any, row: Mapping[str, Any]) -> None:
    file.write(json.dumps(finite(row), allow_nan=False) + "\n")
    file.flush()


def _parse(line: bytes) -> dict[str, Any] | None:
    with contextlib.suppress(ValueError):
        row = json.loads(line)
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            return row
    return None
