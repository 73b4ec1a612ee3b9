"""Plots of the pages: panels of curves over one axis, as SVG that needs no other file."""

import contextlib
import io
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from lm.evaluation import metrics
from lm.tracking.curves import Curve

_WIDTH, _HEIGHT, _LEGEND_ROW = 4.4, 2.5, 0.19  # inches
_LEFT, _RIGHT, _BELOW, _ABOVE = 0.62, 0.12, 0.48, 0.58  # inches around the axes
_CLIPPED_BELOW = 0.2  # of the range of a panel, see `_without_starts`
_FEWEST = 8  # points behind the starts; with fewer, the starts are half of what there is to see
_WIDE_LABEL = 20  # characters; two longer ones do not fit beside each other
_STEPS = (1, 2, 5, 10)  # between ticks, times a power of ten
_FROM_ZERO = ("tokens_per_second", "tokens_per_second_a_device", "mfu", "mfu_causal")
_GREY, _WARMUP = "#5b6577", "#f9f3e6"


class Line(NamedTuple):
    """A curve in a panel.

    Attributes:
      curve: what is drawn.
      color: of the line.
      label: in the legend; '' = none.
      has_dots: whether its points are marked.
      id: of its element in the page; '' = none.
      scale: of its axis: what a step, or a second, stands for.
      is_baseline: drawn dashed.
    """

    curve: Curve
    color: str
    label: str = ""
    has_dots: bool = False
    id: str = ""
    scale: float = 1.0
    is_baseline: bool = False


class Panel(NamedTuple):
    """The curves of a metric: its name, what is known of it, and what they are over, for the axis."""

    name: str
    about: metrics.About
    lines: Sequence[Line]
    axis: str = "step"


def draw_panels(given: Sequence[Panel], warmup: float = 0.0) -> list[Any]:
    """A matplotlib figure for each panel; all have the same axis.

    Where a point stands for several rows, the line is their mean, and a band spans their least and greatest value. Made
    without pyplot, so that there is no global state, no display and nothing to close; with fixed margins, as finding
    them takes as long as drawing.

    Args:
      given: the panels.
      warmup: end of the warm-up of the learning rate on the axis, which is shaded; 0 = none.
    """
    ends = [
        float(steps[at]) * line.scale
        for panel in given
        for line in panel.lines
        for steps in line.curve.points()[:1]
        for at in (0, -1)
    ]
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    margin = 0.02 * (high - low) or 0.5
    with _plain_text():
        return [_draw(panel, (low - margin, high + margin), warmup) for panel in given]


def _draw(given: Panel, limits: tuple[float, float], warmup: float) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter, MaxNLocator, ScalarFormatter

    labels = [line.label for line in given.lines if line.label]
    columns = 2 if max(map(len, labels), default=0) <= _WIDE_LABEL else 1
    more = _LEGEND_ROW * max(0, -(-len(labels) // columns) - 1)
    width, height = _WIDTH, _HEIGHT + more
    figure = Figure(figsize=(width, height))
    inside = (width - _LEFT - _RIGHT, height - _BELOW - _ABOVE - more)
    panel = figure.add_axes((_LEFT / width, _BELOW / height, inside[0] / width, inside[1] / height))
    for line in given.lines:
        steps, means, low, high = line.curve.points()
        steps = steps * line.scale
        marker = "o" if not line.is_baseline and (line.has_dots or len(steps) == 1) else None
        style: dict[str, Any] = {"color": line.color, "lw": 1.4, "marker": marker, "ms": 4, "mec": "white"}
        panel.plot(
            steps, means, "--" if line.is_baseline else "-", label=line.label or "_", gid=line.id or None, **style
        )
        if line.curve.rows_per_point > 1:
            band_id = f"{line.id}.band" if line.id else None
            panel.fill_between(steps, low, high, color=line.color, alpha=0.25, lw=0, gid=band_id)
    panel.set_xlim(*limits)
    if warmup:
        panel.axvspan(limits[0], min(warmup, limits[1]), color=_WARMUP, lw=0, zorder=0, gid="warmup")
    if given.name.endswith("perplexity"):
        panel.set_yscale("log")  # otherwise the value of the untrained model hides the rest of the curve
        panel.yaxis.set_major_formatter(LogFormatter())
        panel.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.4)))
    else:
        panel.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
        panel.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
        if given.name in _FROM_ZERO:
            panel.set_ylim(bottom=0)  # otherwise small jitter looks large
        elif clipped := _without_starts(given.lines):
            panel.set_ylim(*clipped[:2])
            panel.text(0.012, 0.97, clipped[2], transform=panel.transAxes, fontsize=8.5, color=_GREY, va="top")
    top = inside[1] + more
    bold: dict[str, Any] = {"fontsize": 10.5, "fontweight": "bold", "color": "#222b3a"}
    panel.set_title(given.about.title, loc="left", y=(top + 0.26) / inside[1], pad=0, **bold)
    place: dict[str, Any] = {"x": 0.0, "y": (top + 0.07) / inside[1], "transform": panel.transAxes}
    panel.text(s=given.about.unit, fontsize=8.5, color=_GREY, va="bottom", gid="unit", **place)
    if labels:
        # The last values, above the panel, where no curve crosses them.
        above: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1.01, 1.0), "borderaxespad": 0.2}
        panel.legend(ncols=columns, fontsize=8.5, frameon=False, labelcolor="linecolor", handlelength=1.4, **above)
    panel.set_xlabel(given.axis, fontsize=8.5, color=_GREY)
    panel.tick_params(which="both", labelsize=8.5, colors=_GREY, length=0)
    panel.grid(axis="y", color="#e6e9ef", lw=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.spines["bottom"].set_color("#c9ced8")
    panel.xaxis.set_major_locator(MaxNLocator(6, steps=_STEPS, integer=True))
    return figure


def _without_starts(lines: Sequence[Line]) -> tuple[float, float, str] | None:
    """(least, greatest, remark) of a value axis that leaves out where curves start, if that flattens all the rest.

    That is where all but the first points take less than `_CLIPPED_BELOW` of the range of all; None = it is not so.
    """
    means = [line.curve.points()[1] for line in lines]
    starts = np.array([each[0] for each in means])
    rest = np.concatenate([each[1:] for each in means])
    if rest.size < _FEWEST:
        return None
    low, high = float(rest.min()), float(rest.max())
    all_of_it = max(high, starts.max()) - min(low, starts.min())
    if not 0 < high - low < _CLIPPED_BELOW * all_of_it:
        return None
    low, high = low - 0.08 * (high - low), high + 0.2 * (high - low)  # the remark is above the curves
    remarks = [
        f"{arrow} starts at {' to '.join(dict.fromkeys(f'{value:.4g}' for value in (off.min(), off.max())))}"
        for arrow, off in (("↑", starts[starts > high]), ("↓", starts[starts < low]))
        if off.size
    ]
    return low, high, ", ".join(remarks)


@contextlib.contextmanager
def _plain_text() -> Iterator[None]:
    """Within it matplotlib shows texts as they are: '$' in the name of a metric begins no formula."""
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False}):
        yield


def picture(*figures: Any) -> str:
    """matplotlib figures, side by side where there is room, as HTML that needs no other file."""
    import matplotlib

    out = []
    for number, figure in enumerate(figures):
        buffer = io.StringIO()
        # With a fixed salt and without a date, the same rows give the same bytes. Text stays text, which is smaller and
        # found by a search in the page.
        with matplotlib.rc_context({"svg.hashsalt": f"lm{number}", "svg.fonttype": "none"}):
            figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        svg = buffer.getvalue()
        out.append(f"<div class=card>{svg[svg.index('<svg') :]}</div>")
    return out[0] if len(out) == 1 else f"<div class=panels>{''.join(out)}</div>"
