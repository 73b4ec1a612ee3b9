"""One page that lays the curves of runs over each other, above a table of their figures; it needs no other file."""

import dataclasses
import functools
import html
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm.config import flatten
from lm.config.schema import ConfigError
from lm.evaluation import flops, metrics
from lm.registry import details, listing
from lm.registry.listing import Entry
from lm.study.report import COLORS
from lm.tracking import curves, files, report
from lm.tracking.curves import Curves
from lm.tracking.files import RunFileError
from lm.tracking.plots import Line, Panel, draw_panels, picture

_AXIS_TITLES = {"tokens": "tokens (positions of batches)", "flops": "model FLOPs", "seconds": "seconds since the start"}
_TRAINING = ("loss", "grad_norm", "learning_rate", "tokens_per_second")  # panels of training unless others are named
_POINTS = 40_000  # of all curves of a panel together
_FEW = len(COLORS)  # so many runs have colours of their own, and a legend

_STYLE = """
main{max-width:1400px} .wide{overflow-x:auto} .wide td,.wide th{white-space:nowrap;width:auto;text-align:left;
padding:4px 12px 4px 0} .wide td:first-child{width:auto}
.wide i{display:inline-block;width:12px;height:12px;border-radius:3px;margin-right:8px}
tr[data-run]{cursor:pointer} tr.hot{background:#eef2fa} main.dim svg g[id^=run]:not(.hot){opacity:.12}
svg g.hot path{stroke-width:3.2!important}
"""
_SCRIPT = """
const main=document.querySelector("main"),mark=run=>{main.classList.toggle("dim",run!==null);
for(const hot of document.querySelectorAll(".hot"))hot.classList.remove("hot");
if(run!==null)for(const it of document.querySelectorAll(`tr[data-run="${run}"],g[id^="run${run}."]`))
it.classList.add("hot")};
for(const row of document.querySelectorAll("tr[data-run]")){row.onmouseenter=()=>mark(row.dataset.run);
row.onmouseleave=()=>mark(null)}
for(const line of document.querySelectorAll("g[id^=run]")){line.onmouseenter=()=>mark(line.id.slice(3).split(".")[0]);
line.onmouseleave=()=>mark(null)}
"""


@dataclasses.dataclass(frozen=True)
class Compared:
    """A run of the page.

    Attributes:
      settings: key of the config -> value; {} = not known.
      figures: flat, see `lm.registry.listing.Entry`.
      drawn: its curves.
      scale: what a step stands for on the axis.
      loss_unit: what stands before the name of a loss -> its unit, see `eval_sets.loss_unit`; '' = not known.
    """

    entry: Entry
    settings: Mapping[str, Any]
    figures: Mapping[str, Any]
    drawn: Curves
    scale: float
    loss_unit: Callable[[str], str]


def write(
    folders: Sequence[Path], out: Path, axis: str = "step", wanted: Sequence[str] = ()
) -> tuple[list[Compared], list[str]]:
    """Writes the page of runs.

    Args:
      folders: of the runs.
      out: the page.
      axis: what curves are over: step, tokens, flops or seconds.
      wanted: metrics to draw; () = those by which the runs are compared, and the usual ones of training.

    Returns:
      The runs that are on it, and a line for each thing that is wrong with a run.

    Raises:
      ConfigError: no run can be compared, or none has a metric that is wanted.
      RunFileError: the page cannot be written.
    """
    points = max(20, min(curves.MAX_POINTS, _POINTS // max(len(folders), 1)))
    shown, wrong = list[Compared](), list[str]()
    for folder in folders:
        try:
            run, notes = read(folder, axis, points)
            wrong += notes
            shown.append(run)
        except (ConfigError, RunFileError) as error:
            wrong.append(str(error))
    if not shown:
        raise ConfigError("; ".join(wrong[:3]) or "expected runs to compare")
    present = dict.fromkeys(name for run in shown for _, name in run.drawn.of)
    for name in wanted:
        if name not in present:
            raise ConfigError(f"--metrics: no run has '{name}'; there are {', '.join(sorted(present)) or 'none'}")
    files.write_atomic(out, page(shown, axis, wanted))
    return shown, list(dict.fromkeys(wrong))


def read(folder: Path, axis: str, points: int) -> tuple[Compared, list[str]]:
    """Reads a run for the page; the second is what is wrong with files that it can do without.

    Raises:
      ConfigError, RunFileError: there is no run, its metrics are damaged, or it has no such axis.
    """
    entry, wrong = details.open_run(folder)
    cfg = details.saved_config(entry)
    figures = dict(flatten(listing.figures_of(entry)))
    scale = 1.0
    if axis in ("tokens", "flops"):
        if cfg is None:
            raise ConfigError(f"{folder}: left out: it has no config.json or trial.json, which tells its {axis}")
        a_step, steps, tokens = cfg.data.batch_size * cfg.data.seq_len, figures.get("steps"), figures.get("tokens")
        if isinstance(steps, int) and isinstance(tokens, int) and tokens != steps * a_step:
            raise ConfigError(
                f"{folder}: left out: {tokens:,} tokens in {steps:,} steps are not {a_step:,} a step: its batch size "
                "has changed on the way; compare by step or seconds"
            )
        scale = float(a_step)
        if axis == "flops":
            a_token = flops.train_flops_per_token(cfg.model, cfg.data.seq_len, cfg.model.vocab_size)
            if a_token is None:
                raise ConfigError(f"{folder}: left out: the FLOPs of this kind of model are not known")
            scale *= a_token
    column = "seconds" if axis == "seconds" else "step"
    drawn = curves.gather(files.read_rows(folder / "metrics.jsonl"), column, points)
    return Compared(entry, details.settings_of(cfg), figures, drawn, scale, report.loss_unit(cfg)), wrong


def page(runs: Sequence[Compared], axis: str, wanted: Sequence[str] = ()) -> str:
    """The page."""
    colors = palette(len(runs))
    body = [
        f"<h1>{len(runs):,} runs</h1>",
        f"<p class=sub>Lines: training; dots: evaluation; over {html.escape(_AXIS_TITLES.get(axis, axis))}. "
        "Point at a line or a row to find its run.</p>",
    ]
    panels = panels_of(runs, axis, wanted, colors)
    body.append(picture(*draw_panels(panels)) if panels else "<p class=none>No rows in metrics.jsonl yet.</p>")
    body += ["<h2>Figures, and the keys in which the configs differ</h2>", _table(runs, colors)]
    return report.page(f"{len(runs):,} runs", body, _STYLE, _SCRIPT)


def palette(number: int) -> list[str]:
    """A colour for each run: its own of a few, else along a scale, in their order."""
    if number <= _FEW:
        return list(COLORS[:number])
    import matplotlib
    from matplotlib.colors import to_hex

    scale = matplotlib.colormaps["viridis"]
    return [to_hex(scale(0.92 * i / (number - 1))) for i in range(number)]


def panels_of(runs: Sequence[Compared], axis: str, wanted: Sequence[str], colors: Sequence[str]) -> list[Panel]:
    """The panels: of evaluation, then of training."""
    best = dict.fromkeys(run.entry.best_metric for run in runs)
    chosen = [
        *(("eval", name) for name in (wanted or [*best, "loss"])),
        *(("train", name) for name in (wanted or _TRAINING)),
    ]
    merged = max((curve.rows_per_point for run in runs for curve in run.drawn.of.values()), default=1)
    title = _AXIS_TITLES.get(axis, axis) + (f" · up to {merged:,} rows a point" if merged > 1 else "")
    panels = []
    for number, (split, name) in enumerate(dict.fromkeys(chosen)):
        lines = []
        for i, (run, color) in enumerate(zip(runs, colors, strict=True)):
            if curve := run.drawn.of.get((split, name)):
                label = f"{i + 1} {run.entry.name}"[:28] if len(runs) <= _FEW else ""
                has_dots = split == "eval" and len(runs) <= 3 * _FEW
                lines.append(Line(curve, color, label, has_dots, f"run{i}.{number}", run.scale))
        if lines:
            about = metrics.about(
                name, functools.partial(_common_unit, [run for run in runs if (split, name) in run.drawn.of])
            )
            panels.append(Panel(name, about._replace(title=f"{split}: {about.title}"), lines, title))
    return panels


def _common_unit(runs: Sequence[Compared], prefix: str) -> str:
    """The unit of a loss in all runs; '' = they differ, or it is not known."""
    units = {run.loss_unit(prefix) for run in runs}
    return units.pop() if len(units) == 1 else ""


def _table(runs: Sequence[Compared], colors: Sequence[str]) -> str:
    """A row for each run: its figures, and the keys of the config in which they differ."""
    absent = object()
    keys = dict.fromkeys(itertools.chain.from_iterable(run.settings for run in runs))
    differ = [key for key in keys if len({repr(run.settings.get(key, absent)) for run in runs}) > 1]
    shown = dict.fromkeys(key for run in runs for key in run.figures if details.is_result(key))
    values = listing.Values([run.entry for run in runs])
    columns = ("arm", "state", "best")
    head = "".join(f"<th>{html.escape(name)}" for name in ("run", *columns, *differ, *shown))
    rows = []
    for i, (run, color) in enumerate(zip(runs, colors, strict=True)):
        cells = [listing.cell(run.entry, key, values) for key in columns]
        cells += [str(run.settings.get(key, "")) for key in differ]
        cells += [details.number(run.figures.get(key)) for key in shown]
        name = f"<td><i style='background:{color}'></i>{i + 1} {html.escape(str(run.entry.folder))}"
        rows.append(f"<tr data-run={i}>{name}" + "".join(f"<td>{html.escape(cell)}" for cell in cells))
    return f"<div class='card wide'><table><tr>{head}{''.join(rows)}</table></div>"
