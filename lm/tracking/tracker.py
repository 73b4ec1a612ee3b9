"""Tracking of a running run: progress, metrics.jsonl, samples.jsonl, profiles, and where the time goes.

Every process makes a `Tracker` and calls it in the same way; only the one with `enabled` (process 0) writes or prints.
"""

import contextlib
import datetime
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from lm import terminal
from lm.config import MonitorConfig
from lm.terminal import visible
from lm.tracking import files, saved_step
from lm.tracking.files import RunFileError
from lm.tracking.relay import Trackers

BUCKETS = ("compile", "input", "step", "eval", "checkpoint")
PLAIN_LINE_SECONDS = 10.0  # at least so long between two progress lines where the console is a file or a pipe

_now = time.perf_counter


class Tracker:
    """Writes metrics, samples and profiles of a run into `workdir`; a context manager that flushes and closes them.

    A run resumed at `start_step` writes later rows of metrics.jsonl and samples.jsonl again: they are dropped
    (`files.kept_rows`), so that the files end up as if the run had never stopped. A last line that a kill has cut off
    is dropped too. The console reports both.

    A file that cannot be written raises RunFileError, which names the last good checkpoint.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        total_steps: int,
        start_step: int,
        enabled: bool,
        config: MonitorConfig,
        is_over: bool = False,
        check_lease: Callable[[], None] = lambda: None,
        trackers: Trackers | None = None,
    ) -> None:
        """Opens the files.

        Args:
          workdir: the run's folder.
          total_steps: of the run.
          start_step: steps done; 0 = nothing was restored.
          enabled: whether this process writes and prints.
          config: what to profile.
          is_over: whether no step is left, so that the evaluation after `start_step` is done again.
          check_lease: called before each write; raises `lm.lease.Lost` if the folder is another's now.
          trackers: what else gets the rows and samples; None = nothing.

        Raises:
          ValueError: `workdir` is a URL; rows are appended to files, which object stores do not support.
          RunFileError: a row is damaged, or a file cannot be written.
        """
        if "://" in os.fspath(workdir):
            raise ValueError(f"run directory {workdir} is a URL; give a local, NFS or mounted (gcsfuse) folder")
        self._workdir, self._total_steps, self._start_step = Path(workdir), total_steps, start_step
        self._enabled, self._config, self._profiling, self._is_over = enabled, config, False, is_over
        self._saved_step, self._check_lease = start_step or None, check_lease
        self._trackers = trackers or Trackers()
        self._seconds = dict.fromkeys((*BUCKETS, "other"), 0.0)
        self._buckets = ["other"]  # the open ones, innermost last; time outside all buckets counts as 'other'
        self._began = self._mark = _now()
        self._earlier_seconds = 0.0
        self._first_progress: tuple[int, float] | None = None
        self._last_line = -math.inf
        self._closing = contextlib.ExitStack()
        if enabled:
            with self.writing():
                self._open()

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self._closing.close()
        except RunFileError:
            if kind is None:
                raise  # else the error that ended the `with` block is the one to show

    def log(self, step: int, split: Literal["train", "eval", "test"], metrics: Mapping[str, float]) -> None:
        """Appends a row to metrics.jsonl and hands it to the trackers.

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
        with self.writing():
            self._metrics_file.append(row)
            self._trackers.scalars(step, {f"{split}/{name}": value for name, value in values.items()})

    def text(self, step: int, name: str, text: str) -> None:
        """Writes a sample to the console, samples.jsonl and trackers; nothing in `text` is interpreted as markup."""
        if not self._enabled:
            return
        indented = "\n".join("    " + line for line in text.splitlines())
        with self.writing():
            self._samples_file.append({"step": step, "name": name, "text": text})
            self._trackers.text(step, name, text)
        self.note(f"[step {step:,}] {name}\n{indented}")

    def saved(self, step: int | None) -> None:
        """Records the newest checkpoint that is complete, in saved.json; None = there is none."""
        if step is not None and step != self._saved_step:
            self._saved_step = step
            if self._enabled:
                with self.writing():
                    saved_step.record(self._workdir, step)

    def sync(self) -> None:
        """Waits until all rows are on disk, so that no checkpoint is newer than they are."""
        if self._enabled:
            with self.writing():
                self._metrics_file.sync()
                self._samples_file.sync()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """For a block that writes: checks the lease first, and adds the last good checkpoint to a RunFileError."""
        self._check_lease()
        try:
            yield
        except RunFileError as error:
            if not self._workdir.is_dir():
                raise  # deleted or moved, checkpoints and all
            good = "there is no complete checkpoint yet"
            if self._saved_step is not None:
                good = f"the last good checkpoint is step {self._saved_step:,}, from which the same command goes on"
            raise RunFileError(f"{error}; {good}") from error

    def note(self, message: str) -> None:
        """Prints to the console (stderr), above the progress bar, with control characters escaped."""
        if self._enabled:
            with self.writing(), files.access("to the console (stderr)", "writing"):
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

        self._console = Console(file=terminal.output.get(), stderr=True)
        with files.access(self._workdir, "writing to"):
            self._workdir.mkdir(parents=True, exist_ok=True)
        paths = [self._workdir / name for name in files.COLUMNS]
        if self._start_step and not paths[0].exists():
            self.note(f"{paths[0]} is missing: its rows up to step {self._start_step:,} are lost")
        for path in paths:
            last, note = files.rewind(path, self._start_step, self._is_over)
            self._earlier_seconds = max(self._earlier_seconds, last.get("seconds", 0.0))
            if note:
                self.note(note)
        self._metrics_file, self._samples_file = (files.RowFile(path) for path in paths)
        self._closing.callback(self._samples_file.close)
        self._closing.callback(self._metrics_file.close)
        if self._start_step:
            saved_step.record(self._workdir, self._start_step)
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
