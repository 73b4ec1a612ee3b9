"""Reports of a run: the parameter table, summary.json and report.html."""

import functools
import html
import io
import json
import math
import os
import platform
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax

import lm
from lm import eval_sets, param_paths
from lm.config import Config, schema
from lm.config.schema import ConfigError
from lm.evaluation import metrics
from lm.optim.trainable import Selection, trained_part
from lm.tasks import build_saved_config
from lm.tracking import curves, files
from lm.tracking.curves import Curve, Curves
from lm.tracking.files import RunFileError, finite

PACKAGES = {"jax": "jax", "flax": "flax", "optax": "optax", "orbax": "orbax-checkpoint", "grain": "grain"}

# The first panels of the report, in this order.
FIRST_PANELS = (
    *("loss", "bits_per_byte", "learning_rate", "grad_norm"),
    *("tokens_per_second", "tokens_per_second_a_device", "mfu", "mfu_causal"),
)
SAMPLE_STEPS = 100  # the report shows the samples of so many steps
COLORS = {"train": "#3b6fb6", "eval": "#d9772b"}
BUCKET_COLORS = {
    "step": "#3f9c6c",
    "compile": "#8067b7",
    "input": "#d0a02c",
    "eval": "#d9772b",
    "checkpoint": "#3b6fb6",
    "other": "#b4bac4",
}


def versions() -> dict[str, str]:
    """Name -> version of Python and the packages that results depend on. Touches no device."""
    return {
        "python": platform.python_version(),
        **{name: metadata.version(package) for name, package in PACKAGES.items()},
        "lm": lm.__version__,
    }


def write_summary(workdir: str | os.PathLike[str], summary: Mapping[str, Any]) -> None:
    """Writes `workdir`/summary.json atomically: `summary`, and 'versions'.

    NaN and infinity become null; their keys are listed under 'not_finite'. Raises RunFileError.
    """
    given, written = dict(schema.flatten(summary)), dict(schema.flatten(finite(summary)))
    lost = [key for key, value in written.items() if value is None and given[key] is not None]
    out = {**summary, **({"not_finite": lost} if lost else {}), "versions": versions()}
    files.write_document(Path(workdir) / "summary.json", out)


def parameter_table(
    params: Mapping[str, Any],
    *,
    selection: Selection,
    learning_rate: float,
    scales: Mapping[str, float],
    origin: Mapping[str, str],
) -> str:
    """A plain-text table with a line for each parameter, and totals.

    Args:
      params: nested dict of arrays or `jax.ShapeDtypeStruct`.
      selection: which parameters are trained, and how. Weight decay and learning rate of a frozen parameter are shown
        as '-'; where layers differ, the table names those that are trained and decayed, and the range of rates.
      learning_rate: the peak; the table shows it times the multiplier and the factor of `scales`.
      scales: path -> factor of the optimizer's direction (`lm.optim.mup`).
      origin: path -> where the value came from.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    leaves = param_paths.flatten(params)
    table = Table(box=box.SIMPLE_HEAD, show_footer=True, pad_edge=False)
    total = sum(math.prod(leaf.shape) for leaf in leaves.values())
    learnt = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(trained_part(selection, dict(params))))
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves.values())
    table.add_column("parameter", f"total ({size / 2**20:,.1f} MiB)\n  trained\n  frozen", no_wrap=True)
    table.add_column("shape")
    table.add_column("dtype")
    table.add_column("size", f"{total:,}\n{learnt:,}\n{total - learnt:,}", justify="right", no_wrap=True)
    for name in ("trained", "decayed"):
        table.add_column(name, no_wrap=True)
    table.add_column("peak lr", justify="right", no_wrap=True)
    table.add_column("from", overflow="fold")
    group = None
    for path, leaf in leaves.items():
        if group not in (None, group := path.split("/")[:-1][:2]):
            table.add_section()
        table.add_row(
            path,
            " x ".join(map(str, leaf.shape)),
            str(leaf.dtype),
            f"{math.prod(leaf.shape):,}",
            *_how(path, selection, learning_rate * scales[path]),
            origin[path],
        )
    text = io.StringIO()
    Console(file=text, width=160, color_system=None).print(table, markup=False, highlight=False)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()).strip("\n")


def _how(path: str, selection: Selection, learning_rate: float) -> tuple[str, str, str]:
    """The cells 'trained', 'decayed' and 'peak lr' of a parameter, over its trained layers."""
    if not selection.trained[path]:
        return "frozen", "-", "-"
    multipliers = selection.lr_multiplier[path]
    learning = [value != 0 for value in multipliers]
    decayed = [d and on for d, on in zip(selection.decayed[path], learning, strict=True)]
    rates = sorted({learning_rate * value for value in multipliers if value})
    shown = " to ".join(f"{rate:.3g}" for rate in dict.fromkeys((rates[0], rates[-1])))
    if last := max(start for start, on in zip(selection.start[path], learning, strict=True) if on):
        shown += f", all from step {last:,}"
    return _layers(learning, len(learning)), _layers(decayed, sum(learning)), shown


def _layers(on: Sequence[bool], number: int) -> str:
    """Which layers are on: [0, 0, 1, 1] -> 'layers 2-3 of 4'; 'yes' if `number` of them are on, 'no' if none is."""
    if sum(on) in (0, number):
        return "yes" if any(on) else "no"
    numbers = [i for i, value in enumerate(on) if value]
    is_run = numbers == list(range(numbers[0], numbers[-1] + 1)) and len(numbers) > 1
    listed = f"{numbers[0]}-{numbers[-1]}" if is_run else ", ".join(map(str, numbers))
    return f"layer{'s' if len(numbers) > 1 else ''} {listed} of {len(on)}"


def write_report(workdir: str | os.PathLike[str]) -> Path:
    """Writes `workdir`/report.html from metrics.jsonl, summary.json, samples.jsonl and config.json, atomically.

    The page needs no other file. It can be written while the run is still running: it says which parts are missing.
    Memory is bounded, whatever the number of rows: see `lm.tracking.curves`.

    Returns:
      Its path.

    Raises:
      RunFileError: one of the files is damaged, or the page cannot be written.
    """
    workdir = Path(workdir)
    drawn = curves.gather(files.read_rows(workdir / "metrics.jsonl"))
    samples = _samples(files.read_rows(workdir / "samples.jsonl"))
    summary, resolved = (files.read_document(workdir / name) for name in ("summary.json", "config.json"))
    figures = {key: value for key, value in summary.items() if key not in ("versions", "goodput")}
    goodput, used = (_object(summary, key, workdir / "summary.json") for key in ("goodput", "versions"))
    cfg = _config(resolved)
    about = functools.partial(metrics.about, loss_unit=loss_unit(cfg))
    best_metric = cfg.checkpoint.best_metric if cfg else "loss"
    body = [
        f"<h1>{html.escape(workdir.resolve().name)}</h1>",
        f"<p class=sub>{_subtitle(drawn.last, used)}</p>",
        _tiles(drawn.last_eval, summary, best_metric, about),
        "<h2>Curves</h2>",
        _curves(drawn, about),
        "<h2>Where the time went</h2>",
        _goodput_bar(goodput),
        "<h2>Figures</h2>",
        _table(schema.flatten(figures), about),
        "<h2>Samples</h2>",
        samples,
        "<h2>Config</h2>",
        _table(schema.flatten(resolved)),
    ]
    title = html.escape(workdir.resolve().name)
    page = f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
    path = workdir / "report.html"
    files.write_atomic(path, f"{page}<main>{''.join(body)}</main></html>\n")
    return path


def _object(document: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    """The JSON object at a key, {} if there is none. Raises RunFileError if something else is there."""
    value = document.get(key, {})
    if not isinstance(value, dict):
        raise RunFileError(f"{path} is damaged: expected a JSON object at '{key}', found {str(value)[:40]!r}")
    return value


def _config(resolved: dict[str, Any]) -> Config | None:
    """The config in a config.json; None where it cannot be told, as when the file is damaged."""
    try:
        return build_saved_config(resolved)
    except (ConfigError, AttributeError, KeyError, TypeError, ValueError):  # `older.upgrade` expects what a run wrote
        return None


def loss_unit(cfg: Config | None) -> Callable[[str], str]:
    """The unit of a loss of the run, by the name of the part whose loss it is; '' where the config is not known."""
    return functools.partial(eval_sets.loss_unit, cfg) if cfg else lambda prefix: ""


class Line(NamedTuple):
    """A curve in a panel.

    Attributes:
      curve: what is drawn.
      color: of the line.
      label: in the legend; '' = none.
      has_dots: whether its points are marked.
      id: of its element in the page; '' = none.
      scale: of its axis: what a step, or a second, stands for.
    """

    curve: Curve
    color: str
    label: str = ""
    has_dots: bool = False
    id: str = ""
    scale: float = 1.0


class Panel(NamedTuple):
    """The curves of a metric: its name, what is known of it, and what they are over, for the axis."""

    name: str
    about: metrics.About
    lines: Sequence[Line]
    axis: str = "step"


def draw_curves(drawn: Curves, about: Callable[[str], metrics.About] = metrics.about) -> Any:
    """A matplotlib figure with a panel for each metric over steps: training as a line, evaluation as dots on a line.

    Args:
      drawn: of metrics.jsonl.
      about: what is known of a metric by its name, in a run of this task.
    """
    present = {name for _, name in drawn.of}
    names = [name for name in FIRST_PANELS if name in present] + sorted(present.difference(FIRST_PANELS))
    panels = []
    for name in names:
        curves_of = {split: curve for split in COLORS if (curve := drawn.of.get((split, name)))}
        merged = "".join(
            f" · {split}: mean and range of {curve.rows_per_point:,} rows a point"
            for split, curve in curves_of.items()
            if curve.rows_per_point > 1
        )
        lines = [
            Line(curve, COLORS[split], f"{split} {_number(curve.last)}", has_dots=split == "eval")
            for split, curve in curves_of.items()
        ]
        panels.append(Panel(name, about(name), lines, f"step{merged}"))
    return draw_panels(panels)


def draw_panels(given: Sequence[Panel]) -> Any:
    """A matplotlib figure with these panels, two beside each other.

    Where a point stands for several rows, the line is their mean, and a band spans their least and greatest value. Made
    without pyplot, so that there is no global state, no display and nothing to close.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    height = max(1, math.ceil(len(given) / 2))
    figure = Figure(figsize=(10.5, 2.9 * height), layout=ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.12))
    panels = figure.subplots(height, 2, squeeze=False).flatten()
    for (name, about, lines, axis), panel in zip(given, panels, strict=False):
        for line in lines:
            steps, means, low, high = line.curve.points()
            steps = steps * line.scale
            marker = "o" if line.has_dots or len(steps) == 1 else None
            style = {"color": line.color, "lw": 1.4, "marker": marker, "ms": 4, "mec": "white"}
            panel.plot(steps, means, label=line.label or "_", gid=line.id or None, **style)
            if line.curve.rows_per_point > 1:
                band_id = f"{line.id}.band" if line.id else None
                panel.fill_between(steps, low, high, color=line.color, alpha=0.25, lw=0, gid=band_id)
        if name in ("tokens_per_second", "tokens_per_second_a_device", "mfu", "mfu_causal"):
            panel.set_ylim(bottom=0)  # otherwise small jitter looks large
        elif name.endswith("perplexity"):
            panel.set_yscale("log")  # otherwise the value of the untrained model hides the rest of the curve
        else:
            panel.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
        panel.set_title(about.title, loc="left", fontsize=10.5, fontweight="bold", color="#222b3a")
        panel.set_ylabel(about.unit, fontsize=8.5, color="#5b6577")
        if any(line.label for line in lines):
            # The last values, above the panel, where no curve crosses them.
            above = {"loc": "lower right", "bbox_to_anchor": (1.01, 0.98), "borderaxespad": 0.2}
            legend = panel.legend(
                ncols=2, fontsize=8.5, frameon=False, labelcolor="linecolor", handlelength=1.4, **above
            )
            for text in legend.get_texts():
                text.set_parse_math(False)
        panel.set_xlabel(axis, fontsize=8.5, color="#5b6577")
        panel.tick_params(which="both", labelsize=8.5, colors="#5b6577", length=0)
        panel.grid(axis="y", color="#e6e9ef", lw=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.spines["bottom"].set_color("#c9ced8")
        panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    for panel in panels[len(given) :]:
        panel.remove()
    return figure


def _curves(drawn: Curves, about: Callable[[str], metrics.About]) -> str:
    if not drawn.last:
        return "<p class=none>No rows in metrics.jsonl yet.</p>"
    return picture(draw_curves(drawn, about))


def picture(figure: Any) -> str:
    """A matplotlib figure as HTML that needs no other file."""
    import matplotlib

    buffer = io.StringIO()
    # With a fixed salt and without a date, the same rows give the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "lm", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    return f"<div class=card>{svg[svg.index('<svg') :]}</div>"


def _subtitle(last: Mapping[str, Any], used_versions: Mapping[str, str]) -> str:
    done = f"{last['step']:,} steps in {last['seconds']:,.0f} s" if last else "not started"
    used = " · ".join(f"{name} {version}" for name, version in used_versions.items())
    return html.escape(
        " · ".join(part for part in (done, used or "no summary.json yet: still running or killed") if part)
    )


def _tiles(
    last: Mapping[str, Any],
    summary: Mapping[str, Any],
    best_metric: str,
    about: Callable[[str], metrics.About],
) -> str:
    """Tiles with the metrics of the last evaluation, and the size and speed of the run."""
    names = dict.fromkeys(("loss", "perplexity", "bits_per_byte", best_metric, "accuracy"))
    wanted = [(f"eval {name.replace('_', ' ')}", last.get(name), about(name).unit) for name in names]
    sizes = ("tokens_per_second", "parameters", "seconds")
    wanted += [(name.replace("_", " "), summary.get(name), "") for name in sizes]
    wanted += [(about(name).title, summary.get(name), "") for name in ("mfu", "mfu_causal")]
    tiles = [
        f"<div class=tile><b>{_number(value)}</b><span>{html.escape(name)}</span><i>{html.escape(unit)}</i></div>"
        for name, value, unit in wanted
        if isinstance(value, int | float)
    ]
    return f"<div class=tiles>{''.join(tiles)}</div>"


def _goodput_bar(goodput: Mapping[str, float]) -> str:
    goodput = {name: goodput[name] for name in BUCKET_COLORS if isinstance(goodput.get(name), int | float)}
    total = sum(goodput.values())
    if not total:
        return "<p class=none>Not recorded.</p>"
    order = sorted(goodput, key=lambda name: -goodput[name])
    bar = "".join(
        f'<i style="width:{100 * goodput[name] / total:.3f}%;background:{BUCKET_COLORS[name]}" title={name}></i>'
        for name in order
    )
    legend = "".join(
        f'<span><i style="background:{BUCKET_COLORS[name]}"></i>{name} <b>{goodput[name] / total:.1%}</b> '
        f"{goodput[name]:,.1f} s</span>"
        for name in order
    )
    return f"<div class=card><div class=bar>{bar}</div><div class=legend>{legend}</div></div>"


def _samples(samples: Iterable[Mapping[str, Any]]) -> str:
    """The samples of the latest SAMPLE_STEPS steps, those of the latest one unfolded."""
    steps: deque[tuple[int, list[str]]] = deque(maxlen=SAMPLE_STEPS)
    number = 0
    for row in samples:
        if not steps or steps[-1][0] != row["step"]:
            steps.append((row["step"], []))
            number += 1
        steps[-1][1].append(f"<h3>{html.escape(row['name'])}</h3><pre>{html.escape(row['text'])}</pre>")
    out = [
        f"<details class=card{'' if place else ' open'}><summary>Step {step:,}</summary>{''.join(texts)}</details>"
        for place, (step, texts) in enumerate(reversed(steps))
    ]
    if number > len(steps):
        out.append(f"<p class=none>Those of {number - len(steps):,} earlier steps are in samples.jsonl.</p>")
    return "".join(out) or "<p class=none>None.</p>"


def _table(items: Iterator[tuple[str, Any]], about: Callable[[str], metrics.About] | None = None) -> str:
    """A table of keys and values; with `about`, values of metrics have their units."""

    def unit(key: str, value: Any) -> str:
        name = about(key.rpartition(".")[2]).unit if about and isinstance(value, int | float) else ""
        return f" <i>{html.escape(name)}</i>" if name else ""

    rows = "".join(f"<tr><td>{html.escape(key)}<td>{_number(value)}{unit(key, value)}" for key, value in items)
    return f"<div class=card><table>{rows}</table></div>" if rows else "<p class=none>Not written yet.</p>"


def _number(value: Any) -> str:
    if isinstance(value, bool | None | str | list) or not abs(value) <= sys.float_info.max:
        return html.escape(json.dumps(value, ensure_ascii=False))
    if isinstance(value, int) or (abs(value) >= 10_000 and value == round(value)):
        return f"{value:,.0f}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.5g}"


STYLE = """
body{margin:0;background:#f5f6f9;color:#222b3a;font:15px/1.5 system-ui,sans-serif}
main{max-width:1080px;margin:0 auto;padding:32px 20px 64px}
h1{margin:0;font-size:28px} h2{margin:36px 0 12px;font-size:18px} h3{margin:16px 0 6px;font-size:13px;color:#5b6577}
.sub,.none{color:#5b6577;margin:4px 0 20px}
.card{background:#fff;border:1px solid #e2e6ed;border-radius:10px;padding:16px;margin-bottom:12px}
.card svg{width:100%;height:auto;display:block}
.tiles{display:flex;flex-wrap:wrap;gap:12px}
.tile{background:#fff;border:1px solid #e2e6ed;border-radius:10px;padding:12px 18px;flex:1 1 130px}
.tile b{display:block;font-size:22px;font-variant-numeric:tabular-nums}
.tile span,.tile i{color:#5b6577;font-size:13px;display:block}
.bar{display:flex;height:26px;border-radius:6px;overflow:hidden}.bar i{display:block;min-width:1px}
.legend{display:flex;flex-wrap:wrap;gap:6px 22px;margin-top:12px;font-size:13px;color:#5b6577}
.legend i{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:6px}.legend b{color:#222b3a}
table{border-collapse:collapse;font-size:13px;width:100%}
td{padding:4px 12px 4px 0;border-bottom:1px solid #eef0f4;vertical-align:top;font-variant-numeric:tabular-nums}
td:first-child,td i{width:40%;color:#5b6577} td+td{overflow-wrap:anywhere}
pre{margin:0;padding:12px;background:#f5f6f9;border-radius:6px;white-space:pre-wrap;overflow-wrap:anywhere;
font:13px/1.5 ui-monospace,monospace}
summary{cursor:pointer;font-weight:600}
"""
