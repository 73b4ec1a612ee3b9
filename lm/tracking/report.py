"""Reports of a run: the parameter table, summary.json and report.html."""

import base64
import functools
import html
import io
import json
import math
import os
import platform
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

import lm
from lm import eval_sets, param_paths
from lm.config import Config, schema
from lm.config.schema import NEVER, ConfigError
from lm.evaluation import metrics
from lm.optim.trainable import Selection, trained_part
from lm.tasks import build_saved_config, default_config, task_of
from lm.terminal import visible
from lm.tracking import curves, files
from lm.tracking.curves import Curves
from lm.tracking.files import RunFileError, finite
from lm.tracking.plots import Line, Panel, draw_panels, picture

PACKAGES = {"jax": "jax", "flax": "flax", "optax": "optax", "orbax": "orbax-checkpoint", "grain": "grain"}

TRAINING_PANELS = (
    *("learning_rate", "grad_norm"),
    *("tokens_per_second", "tokens_per_second_a_device", "mfu", "mfu_causal"),
)
NOT_DRAWN = ("weight", "input_bound")  # of training steps; in metrics.jsonl, the latter on average among the figures
BASELINE = "popularity_"  # begins the metrics of a baseline, which is drawn in the panel of the metric itself
RECONSTRUCTIONS = "reconstructions.png"  # of tools/show_reconstructions.py
SAMPLE_STEPS = 100  # the report shows the samples of so many steps
MOST_TILES = 6  # of metrics; all are among the figures
WIDEST = 12  # classes of a confusion matrix that is kept in the summary and shown
WORST = 5  # examples shown of a test set
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
    """Writes `workdir`/report.html from the files in `workdir`, atomically.

    These are metrics.jsonl, summary.json, samples.jsonl, config.json, and if there are any, environment.json,
    trial.json, reconstructions.png and evaluations/*/scores.json. The page needs no other file. It can be written while
    the run is still running: it says which parts are missing. Memory is bounded, whatever the number of rows: see
    `lm.tracking.curves`.

    Returns:
      Its path.

    Raises:
      RunFileError: one of the first four is damaged, or the page cannot be written. What is wrong with another is said
        on the page.
    """
    workdir = Path(workdir)
    summary, resolved = (files.read_document(workdir / name) for name in ("summary.json", "config.json"))
    goodput, used = (_object(summary, key, workdir / "summary.json") for key in ("goodput", "versions"))
    cfg, wrong = _config(resolved)
    about = functools.partial(metrics.about, loss_unit=loss_unit(cfg))
    best_metric = cfg.checkpoint.best_metric if cfg else "loss"
    stages: dict[str, Mapping[str, Any]] = {}
    stages |= {key: _object(summary, key, workdir / "summary.json") for key in ("before", "best") if key in summary}
    rows = files.read_rows(workdir / "metrics.jsonl")
    drawn = curves.gather(rows if stages else _noting_the_best(rows, best_metric, stages))
    hidden = second_names(drawn, best_metric)
    samples = _samples(files.read_rows(workdir / "samples.jsonl"))
    stages["last"] = drawn.last_eval
    title = html.escape(workdir.resolve().name)
    body = [
        f"<h1>{title}</h1>",
        f"<p class=sub>{_subtitle(drawn.last, summary, cfg)}</p>",
        f"<p class=none>{html.escape(wrong)}</p>" if wrong else "",
        _tiles(metric_order(drawn, cfg, hidden), stages, about),
        _sizes(summary, about),
        _shown_or_why_not(lambda: _reconstructions(workdir / RECONSTRUCTIONS)),
        _validation_confusion(_object(summary, "confusion", workdir / "summary.json"), workdir / "summary.json"),
        *(
            _shown_or_why_not(functools.partial(_test_set, path))
            for path in sorted(workdir.glob("evaluations/*/scores.json"))
        ),
        "<h2>Curves</h2>",
        _curves(drawn, cfg, hidden, about),
        samples,
        "<h2>Where the time went</h2>",
        _goodput_bar(goodput),
        "<h2>Data, code, figures and config</h2>",
        _folded("Data and code", _shown_or_why_not(lambda: _table(_origin(workdir, cfg, summary, used)))),
        _folded(
            "Figures", _table(((key, value) for key, value in schema.flatten(summary) if not _is_shown(key)), about)
        ),
        _config_tables(cfg, dict(schema.flatten(resolved))),
    ]
    path = workdir / "report.html"
    files.write_atomic(path, page(workdir.resolve().name, body))
    return path


def _shown_or_why_not(part: Callable[[], str]) -> str:
    """A part of the page; if the files that it is made from are damaged, that."""
    try:
        return part()
    except RunFileError as error:
        return f"<p class=none>{html.escape(str(error))}</p>"


def _noting_the_best(
    rows: Iterable[dict[str, Any]], metric: str, stages: dict[str, Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """The rows, unchanged; `stages` becomes the `files.first_and_best` of those so far, for a run that is not over."""
    for row in rows:
        if row["split"] == "eval":
            stages |= files.first_and_best([*filter(None, stages.values()), row], metric)
        yield row


def page(title: str, body: Iterable[str], style: str = "", script: str = "") -> str:
    """An HTML page, for screens of any width and for paper.

    Args:
      title: as text.
      body: HTML.
      style: CSS beside `STYLE`.
      script: JavaScript.
    """
    head = (
        "<meta charset=utf-8><meta name=viewport content='width=device-width,initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{STYLE}{style}</style>"
    )
    end = f"<script>{script}</script>" if script else ""
    return f"<!doctype html><html lang=en>{head}<main>{''.join(body)}</main>{end}</html>\n"


def _object(document: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    """The JSON object at a key, {} if there is none. Raises RunFileError if something else is there."""
    value = document.get(key, {})
    if not isinstance(value, dict):
        raise RunFileError(f"{path} is damaged: expected a JSON object at '{key}', found {str(value)[:40]!r}")
    return value


def _config(resolved: dict[str, Any]) -> tuple[Config | None, str]:
    """The config in a config.json and '', or None and why it cannot be told, as where the file is damaged."""
    try:
        return (build_saved_config(resolved), "") if resolved else (None, "")
    except (ConfigError, AttributeError, KeyError, TypeError, ValueError) as error:  # `older.upgrade` expects a run's
        return None, f"config.json cannot be read: {error}"


def loss_unit(cfg: Config | None) -> Callable[[str], str]:
    """The unit of a loss of the run, by the name of the part whose loss it is; '' where the config is not known."""
    return functools.partial(eval_sets.loss_unit, cfg) if cfg else lambda prefix: ""


# Metrics --------------------------------------------------------------------------------------------------------------


def second_names(drawn: Curves, best_metric: str) -> set[str]:
    """Metrics that repeat another one: the nll where it is the loss, throughput by device where there is one device.

    Of loss and nll the one that chooses checkpoints stays.
    """
    pairs = [("tokens_per_second", "tokens_per_second_a_device")]
    for name in {name for _, name in drawn.of if name.endswith("nll")}:
        loss = f"{name.removesuffix('nll')}loss"
        pairs.append((name, loss) if name == best_metric else (loss, name))
    return {second for first, second in pairs if _are_same(drawn, first, second)}


def _are_same(drawn: Curves, first: str, second: str) -> bool:
    """Whether two metrics have the same values wherever the second was logged, to float32's precision."""
    both = [(drawn.of.get((split, first)), curve) for (split, name), curve in drawn.of.items() if name == second]
    points = [(one.points(), other.points()) for one, other in both if one]
    return (
        bool(both)
        and len(points) == len(both)
        and all(
            len(one[0]) == len(other[0])
            and all(np.allclose(a, b, rtol=1e-6, atol=0.0) for a, b in zip(one, other, strict=True))
            for one, other in points
        )
    )


def metric_order(drawn: Curves, cfg: Config | None, hidden: Collection[str]) -> list[str]:
    """The metrics to show: that which chooses checkpoints, the task's own scores, the loss, and all others; first
    those that were evaluated, then those of training alone."""
    evaluated = {name for split, name in drawn.of if split == "eval"}
    present = {name for _, name in drawn.of}.difference(hidden, NOT_DRAWN)
    present -= {f"{BASELINE}{name}" for name in evaluated}
    own = (cfg.checkpoint.best_metric, *task_of(cfg).score_names(cfg)) if cfg else ()
    first = dict.fromkeys(("loss", "nll", "bits_per_byte", "perplexity", "accuracy"))
    wanted = dict.fromkeys((*own, *first, *sorted(present.difference(TRAINING_PANELS)), *TRAINING_PANELS))
    found = [name for name in wanted if name in present]
    return sorted(found, key=lambda name: name not in evaluated)


def _tiles(names: Iterable[str], stages: Mapping[str, Mapping[str, Any]], about: Callable[[str], metrics.About]) -> str:
    """Tiles of metrics, each before training, at the evaluation that was best by the first of them, and at the last."""
    last = stages["last"]
    shown = [name for name in names if isinstance(last.get(name), int | float)][:MOST_TILES]
    tiles = []
    for name in shown:
        known = about(name)
        steps = [
            f"<div><b>{_number(row[name])}</b><span>{stage}, step {row['step']:,}</span></div>"
            for stage, row in stages.items()
            if isinstance(row.get(name), int | float) and isinstance(row.get("step"), int)
        ]
        baseline = last.get(f"{BASELINE}{name}")
        remark = f"<p>baseline, most popular: {_number(baseline)}</p>" if isinstance(baseline, int | float) else ""
        unit = f" <i>{html.escape(known.unit)}</i>" if known.unit else ""
        first = " first" if name == shown[0] else ""
        tiles.append(
            f"<div class='tile metric{first}'><h3>{html.escape(known.title)}{unit}</h3>"
            f"<div class=stages>{''.join(steps)}</div>{remark}</div>"
        )
    return f"<div class=tiles>{''.join(tiles)}</div>"


def _sizes(summary: Mapping[str, Any], about: Callable[[str], metrics.About]) -> str:
    """Tiles of the size and speed of the run."""
    wanted = [(name.replace("_", " "), summary.get(name)) for name in ("parameters", "tokens_per_second", "seconds")]
    wanted += [(about(name).title, summary.get(name)) for name in ("mfu", "mfu_causal")]
    tiles = [
        f"<div class=tile><b>{_number(value)}</b><span>{html.escape(name)}</span></div>"
        for name, value in wanted
        if isinstance(value, int | float)
    ]
    return f"<div class=tiles>{''.join(tiles)}</div>"


def panels_of(
    drawn: Curves, names: Iterable[str], about: Callable[[str], metrics.About] = metrics.about
) -> list[Panel]:
    """A panel for each metric over steps: training as a line, evaluation as dots on a line, its baseline dashed.

    Args:
      drawn: of metrics.jsonl.
      names: of the metrics.
      about: what is known of a metric by its name, in a run of this task.
    """
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
        if baseline := drawn.of.get(("eval", f"{BASELINE}{name}")):
            lines.append(Line(baseline, "#8a93a3", f"most popular {_number(baseline.last)}", is_baseline=True))
        panels.append(Panel(name, about(name), lines, f"step{merged}"))
    return panels


def _curves(drawn: Curves, cfg: Config | None, hidden: Collection[str], about: Callable[[str], metrics.About]) -> str:
    if not drawn.last:
        return "<p class=none>No rows in metrics.jsonl yet.</p>"
    steps, remark = warmup(cfg)
    panels = panels_of(drawn, metric_order(drawn, cfg, hidden), about)
    remarks = [remark] if remark else []
    same = (("loss", "nll"), ("nll", "loss"))
    remarks += [f"not drawn: {name}, which is the same as {first}" for first, name in same if name in hidden]
    text = f"<p class=sub>{html.escape('; '.join(remarks))}</p>" if remarks else ""
    return text + picture(*draw_panels(panels, steps))


def warmup(cfg: Config | None) -> tuple[int, str]:
    """The step at which the warm-up ends, 0 = none, and a remark for the page."""
    length = cfg.optim.warmup if cfg else NEVER
    if cfg is None or length == NEVER:
        return 0, ""
    if length.epochs:
        return 0, f"not shaded: the warm-up, of {length.epochs:g} epochs"
    size = {"batch_size": cfg.data.batch_size, "seq_len": cfg.data.seq_len, "epoch_examples": 0}
    steps = length.to_steps("optim.warmup", **size)
    return steps, f"shaded: the warm-up, of {steps:,} steps"


# Other parts ----------------------------------------------------------------------------------------------------------


def _subtitle(last: Mapping[str, Any], summary: Mapping[str, Any], cfg: Config | None) -> str:
    parts = [cfg.task.name] if cfg else []
    steps = summary.get("steps", last.get("step"))  # the last row may be of a test, with an earlier checkpoint
    parts.append(f"{_number(steps)} steps in {last['seconds']:,.0f} s" if last else "not started")
    parts += [] if summary else ["no summary.json yet: still running or killed"]
    return html.escape(" · ".join(parts))


def _reconstructions(path: Path) -> str:
    """The picture in the run's folder; '' where there is none. Raises RunFileError."""
    with files.access(path, "reading"):
        if not path.exists():
            return ""
        content = path.read_bytes()
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        raise RunFileError(f"{path} is damaged: expected a PNG, found {content[:8]!r}")
    data = base64.b64encode(content).decode()
    return f"<h2>Reconstructions</h2><div class=card><img alt=Reconstructions src='data:image/png;base64,{data}'></div>"


def _test_set(path: Path) -> str:
    """Scores, confusion matrix and worst errors, as tools/evaluate.py wrote them. Raises RunFileError if damaged."""
    scores = files.read_document(path)
    try:
        rows = [
            (about["value"], about["unit"], " to ".join(map(_number, about.get("interval", ()))), name)
            for name, about in scores["metrics"].items()
        ]
        figures = "".join(
            f"<tr><td>{html.escape(name)}<td>{_number(value)} <i>{html.escape(unit)}</i><td>{between}"
            for value, unit, between, name in rows
        )
        parts = [
            f"<h2>{html.escape(path.parent.name)}</h2>",
            f"<p class=sub>{html.escape(scores['run'])} on {html.escape(scores['data'])}: {scores['records']:,} "
            f"records; {html.escape(scores['interval'])}</p><div class='card wide'><table>{figures}</table></div>",
        ]
        parts += [_confusion(name, one["labels"], one["confusion"]) for name, one in scores["tables"].items()]
        worst = "".join(
            f"<tr><td>{_number(one['loss'])}<td>{html.escape(json.dumps(one['record'], ensure_ascii=False)[:400])}"
            f"<td>{html.escape(str(one['prediction'])[:400])}"
            for one in scores["worst"][:WORST]
        )
        if worst:
            table = f"<table><tr><th>loss<th>record<th>prediction{worst}</table>"
            parts.append(_folded("The largest losses", f"<div class='card wide'>{table}</div>"))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise RunFileError(
            f"{path} is damaged: {type(error).__name__}: {error}; delete it, or evaluate again"
        ) from None
    return "".join(parts)


def _validation_confusion(found: Mapping[str, Any], path: Path) -> str:
    """The confusion matrix of the last validation, of a task that has classes. Raises RunFileError if it is damaged."""
    if not found:
        return ""
    try:
        title = f"<h2>Classes at the validation of step {found['step']:,}</h2>"
        return title + "".join(
            _confusion(name, one["labels"], one["confusion"]) for name, one in found["tables"].items()
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RunFileError(f"{path} is damaged: 'confusion': {type(error).__name__}: {error}") from None


def _confusion(name: str, labels: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """A table of right classes (rows) by predicted ones; each cell is as dark as its share of the row."""
    title = html.escape(f"Confusion matrix {name}".strip())
    if len(labels) > WIDEST:
        return f"<p class=none>{title}: {len(labels):,} classes; see scores.json</p>"
    rows = []
    for label, row in zip(labels, counts, strict=True):
        shares = [count / max(sum(row), 1) for count in row]
        cells = "".join(
            f"<td style='background:rgb(59 111 182/{share:.2f});color:{'#fff' if share > 0.6 else 'inherit'}'>{count:,}"
            for count, share in zip(row, shares, strict=True)
        )
        rows.append(f"<tr><th>{html.escape(label)}{cells}")
    head = "".join(f"<th>{html.escape(label)}" for label in labels)
    return (
        f"<h3>{title}</h3><div class='card wide'><table class=confusion><tr><th>right \\ predicted{head}"
        f"{''.join(rows)}</table></div>"
    )


def _goodput_bar(goodput: Mapping[str, float]) -> str:
    goodput = {name: float(goodput[name]) for name in BUCKET_COLORS if _is_finite(goodput.get(name))}
    total = sum(goodput.values())
    if not 0 < total <= sys.float_info.max:
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
    """The samples of the latest SAMPLE_STEPS steps, those of the latest one unfolded: prompts and continuations; ''
    where there are none."""
    steps: deque[tuple[int, list[str]]] = deque(maxlen=SAMPLE_STEPS)
    number = 0
    for row in samples:
        if not steps or steps[-1][0] != row["step"]:
            steps.append((row["step"], []))
            number += 1
        prompt, text = (html.escape(visible(row[key])) for key in ("name", "text"))
        steps[-1][1].append(f"<div class=sample><pre class=prompt>{prompt}</pre><pre>{text}</pre></div>")
    out = [
        f"<details class=card{'' if place else ' open'}><summary>Step {step:,}</summary>{''.join(texts)}</details>"
        for place, (step, texts) in enumerate(reversed(steps))
    ]
    if number > len(steps):
        out.append(f"<p class=none>Those of {number - len(steps):,} earlier steps are in samples.jsonl.</p>")
    return "".join(("<h2>Samples</h2>", *out)) if out else ""


def _origin(
    workdir: Path, cfg: Config | None, summary: Mapping[str, Any], used: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    """What the run was made from: data and their counts, commit and host, versions."""
    keys = ("data.path", "data.format", "data.mixture", "data.eval_path", "eval.sets", "init_from", "tokenizer.path")
    settings = dict(schema.flatten(schema.to_dict(cfg))) if cfg else {}
    yield from ((key, settings[key]) for key in keys if settings.get(key))
    yield from (
        (key, value) for key, value in settings.items() if key.startswith("eval.sets.") and key.endswith(".path")
    )
    counted = {key: summary[key] for key in ("records", "sources", "tokens") if key in summary}
    yield from schema.flatten(counted)
    started, trial = (files.read_document(workdir / name) for name in ("environment.json", "trial.json"))
    known = ("began", "host", "git", "command")
    yield from schema.flatten({key: started[key] for key in known if key in started})
    if trial.get("commits"):
        yield "commits", trial["commits"]
    yield from used.items()


def _is_shown(key: str) -> bool:
    """Whether another part of the page shows this figure."""
    return key.partition(".")[0] in ("versions", "goodput", "records", "sources", "confusion")


def _config_tables(cfg: Config | None, resolved: Mapping[str, Any]) -> str:
    """The keys that differ from the task's defaults, and all of them."""
    whole = _folded("All keys of the config", _table(iter(resolved.items())))
    if cfg is None:
        return whole
    usual = dict(schema.flatten(default_config(cfg.task.name).to_dict()))
    own = schema.flatten(schema.to_dict(cfg))
    changed = [(key, value, usual.get(key)) for key, value in own if value != usual.get(key)]
    rows = "".join(
        f"<tr><td>{html.escape(key)}<td>{_number(value)}<td><i>{_number(default)}</i>"
        for key, value, default in changed
    )
    table = f"<div class='card wide'><table><tr><th>key<th>value<th>default{rows}</table></div>"
    title = f"Config: {len(changed)} keys differ from the defaults of {cfg.task.name}"
    return _folded(title, table if rows else "") + whole


def _folded(title: str, content: str) -> str:
    return f"<details class=part><summary>{html.escape(title)}</summary>{content}</details>"


def _table(items: Iterator[tuple[str, Any]], about: Callable[[str], metrics.About] | None = None) -> str:
    """A table of keys and values; with `about`, values of metrics have their units."""

    def unit(key: str, value: Any) -> str:
        name = about(key.rpartition(".")[2]).unit if about and isinstance(value, int | float) else ""
        return f" <i>{html.escape(name)}</i>" if name else ""

    rows = "".join(f"<tr><td>{html.escape(key)}<td>{_number(value)}{unit(key, value)}" for key, value in items)
    return f"<div class=card><table>{rows}</table></div>" if rows else "<p class=none>Not written yet.</p>"


def _is_finite(value: Any) -> bool:
    """Whether it is a number that a float can be."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _number(value: Any) -> str:
    if not _is_finite(value):
        return html.escape(visible(json.dumps(value, ensure_ascii=False)))
    if isinstance(value, int) or (abs(value) >= 10_000 and value == round(value)):
        return f"{value:,.0f}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


STYLE = """
*{box-sizing:border-box}
body{margin:0;background:#f5f6f9;color:#222b3a;font:15px/1.5 system-ui,sans-serif}
main{max-width:1120px;margin:0 auto;padding:32px 20px 64px}
h1{margin:0;font-size:28px;overflow-wrap:anywhere} h2{margin:36px 0 12px;font-size:18px;overflow-wrap:anywhere}
h3{margin:16px 0 6px;font-size:13px;color:#5b6577} .sub,.none{color:#5b6577;margin:4px 0 20px;overflow-wrap:anywhere}
.card{background:#fff;border:1px solid #e2e6ed;border-radius:10px;padding:16px;margin-bottom:12px;min-width:0}
.card svg{width:100%;height:auto;display:block} .card img{width:100%;max-width:560px;display:block}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,460px),1fr));gap:12px;margin-bottom:12px}
.panels .card{margin:0;padding:8px} .wide{overflow-x:auto}
.tiles{display:flex;flex-wrap:wrap;gap:12px;margin-bottom:12px}
.tile{background:#fff;border:1px solid #e2e6ed;border-radius:10px;padding:12px 18px;flex:1 1 130px}
.tile b{display:block;font-size:20px;font-variant-numeric:tabular-nums} .tile h3{margin:0 0 4px;color:#222b3a}
.tile span,.tile i,.tile p{color:#5b6577;font-size:13px;font-style:normal;font-weight:400;margin:0}
.metric{flex-basis:300px} .first{flex-basis:100%;border-color:#3b6fb6}
.first b{font-size:clamp(22px,4vw,30px);line-height:1.3} .first h3{font-size:16px}
.stages{display:grid;grid-auto-flow:column;grid-auto-columns:1fr;gap:8px;max-width:520px}
.stages div+div span::before{content:"→ "}
.bar{display:flex;height:26px;border-radius:6px;overflow:hidden}.bar i{display:block;min-width:1px}
.legend{display:flex;flex-wrap:wrap;gap:6px 22px;margin-top:12px;font-size:13px;color:#5b6577}
.legend i{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:6px}.legend b{color:#222b3a}
table{border-collapse:collapse;font-size:13px;width:100%} th{text-align:left;padding:4px 12px 4px 0;color:#5b6577}
td{padding:4px 12px 4px 0;border-bottom:1px solid #eef0f4;vertical-align:top;font-variant-numeric:tabular-nums}
td:first-child,td i{width:40%;color:#5b6577} td:first-child,td+td{overflow-wrap:anywhere}
.confusion{width:auto} .confusion td,.confusion th{padding:6px 12px;text-align:right;width:auto;color:inherit}
pre{margin:0;padding:12px;background:#f5f6f9;border-radius:6px;white-space:pre-wrap;overflow-wrap:anywhere;
font:13px/1.5 ui-monospace,monospace}
.sample{margin:12px 0} .prompt{background:none;color:#5b6577;border-left:3px solid #c9ced8;border-radius:0}
.prompt{padding:2px 12px;margin-bottom:6px}
summary{cursor:pointer;font-weight:600} .part{margin-bottom:12px} .part>summary{margin-bottom:8px}
@media(max-width:600px){main{padding:16px 10px 40px} .card{padding:10px}}
@media print{body{background:#fff;font-size:12px;-webkit-print-color-adjust:exact;print-color-adjust:exact}
main{max-width:none;padding:0} .panels .card,.tile,.sample,tr{break-inside:avoid} h2,summary{break-after:avoid}
.wide{overflow:visible} details::details-content{content-visibility:visible;block-size:auto}}
"""
