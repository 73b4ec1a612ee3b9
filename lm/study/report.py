"""The report of a study: Markdown, CSV, LaTeX, and one HTML page with plots that needs no other file."""

import csv
import html
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lm.evaluation import metrics
from lm.study.analysis import Analysis, ClaimResult, Comparison, Row, TableResult, count_states
from lm.study.definition import in_words
from lm.study.runs import Outcome
from lm.study.statistics import LEVEL, POWER, mean_over_seeds
from lm.tracking import files
from lm.tracking import report as run_report
from lm.tracking.plots import picture

COLUMNS = ("arm", "seeds", "mean ± sd", "95 % interval", "against", "difference", "95 % interval", "p", "detectable")
COLORS = ("#3b6fb6", "#d9772b", "#3f9c6c", "#8067b7", "#d0a02c", "#b8405e", "#4aa3a3", "#7a6a58")
_PAGE_STYLE = """
table.wide td:first-child{width:auto;color:inherit} th{text-align:left;padding:4px 12px 4px 0;color:#5b6577}
.reproduced,.better{color:#2c7a51} .contradicted,.worse{color:#b3372f} .undecided{color:#5b6577}
.wrong{background:#fdf0ee;border-color:#e9b9b3}
"""


def write(analysis: Analysis, folder: Path) -> list[Path]:
    """Writes results.md, results.csv, trials.csv, results.tex and report.html. Raises RunFileError."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "results.md": markdown(analysis),
        "results.csv": table_csv(analysis),
        "trials.csv": trials_csv(analysis),
        "results.tex": latex(analysis),
        "report.html": page(analysis),
    }
    for name, text in content.items():
        files.write_atomic(folder / name, text)
    return [folder / name for name in content]


# --- cells --------------------------------------------------------------------------------------------------------


def _decimals(table: TableResult) -> int:
    """Two significant digits of the least spread over seeds."""
    spread = [row.mean.sd for row in table.rows if row.mean and row.mean.sd > 0]
    return min(max(1 - math.floor(math.log10(min(spread))), 0), 8) if spread else 4


def _cells(row: Row, decimals: int) -> list[str]:
    """The cells of a row, in the order of `COLUMNS`, as plain text; a verdict is beside p."""
    number: Callable[[float], str] = f"{{:.{decimals}f}}".format
    signed: Callable[[float], str] = f"{{:+.{decimals}f}}".format
    cells = [row.arm, _seeds(row)]
    if row.mean is None:
        cells += ["none", ""]
    elif math.isnan(row.mean.sd):
        cells += [number(row.mean.mean), ""]
    else:
        interval = "" if math.isnan(row.mean.low) else f"{number(row.mean.low)} to {number(row.mean.high)}"
        cells += [f"{number(row.mean.mean)} ± {number(row.mean.sd)}", interval]
    compared = row.comparison
    if compared is None:
        return [*cells, *[""] * 5]
    pairs = compared.seeds[0]
    cells.append(compared.other + (f", {pairs} pairs" if row.values and pairs != len(row.values) else ""))
    found = compared.difference
    if found is None or compared.why:
        return [*cells, signed(found.mean) if found else "", "", f"undecided: {compared.why}", ""]
    cells += [signed(found.mean), f"{signed(found.low)} to {signed(found.high)}"]
    return [*cells, f"{p_value(compared.p)} {compared.verdict}", number(compared.detectable)]


def p_value(p: float) -> str:
    """Three decimals, or '<.001'."""
    return f"{p:.3f}" if p >= 0.001 else "<.001"


def _seeds(row: Row) -> str:
    """'5', or '3 of 5: failed 1, missing 1'."""
    if not row.lacking:
        return str(len(row.values))
    return f"{len(row.values)} of {len(row.values) + len(row.lacking)}: {count_states(row.lacking)}"


def _caption(table: TableResult) -> str:
    """What the figures of a table are."""
    tests = {row.comparison.difference.test for row in table.rows if row.comparison and row.comparison.difference}
    how = {"paired": "t test paired by seed", "Welch": "Welch's t test"}
    direction = "less" if table.less_is_better else "more"
    has_direction = metrics.is_known(table.metric.rpartition(".")[2])
    parts = [
        f"`{table.metric}`" + (f", {direction} is better" if has_direction else ""),
        f"mean and standard deviation over seeds, {LEVEL:.0%} t interval",
    ]
    if tests:
        parts.append(f"p by {' or '.join(how[test] for test in sorted(tests))}, corrected by Holm over {table.tests}")
        parts.append("intervals are not corrected")
        parts.append(
            f"detectable = the difference that a test finds with a probability of {POWER:.0%}, by the spread measured"
        )
    return "; ".join(parts) + ". Bold: better than each other arm, p times the number of pairs."


def _claim_line(result: ClaimResult) -> str:
    """Why a claim has its verdict."""
    compared = result.comparison
    arms = zip((result.claim.first, result.claim.second), compared.lacking, strict=True)
    without = "".join(f"; '{arm}' lacks seeds: {lacking}" for arm, lacking in arms if lacking)
    if compared.difference is None or compared.why:
        return compared.why + without
    seeds = " and ".join(map(str, dict.fromkeys(compared.seeds)))
    found = compared.difference
    line = (
        f"difference {found.mean:+.4g} ({found.low:+.4g} to {found.high:+.4g}), {found.test} test, {seeds} seeds, "
        f"p {p_value(compared.p)}"
    )
    return line + (f"; detectable {compared.detectable:.4g}" if result.verdict == "undecided" else "") + without


def _trial_rows(analysis: Analysis) -> list[list[str]]:
    """A row for each trial: arm, seed, hash, state, commits, and why it has no figures."""
    rows = []
    for trial in analysis.study.trials:
        outcome = analysis.outcomes[trial.hash]
        rows.append([trial.arm, str(trial.seed), trial.hash, outcome.state, " ".join(outcome.commits), outcome.why])
    return rows


def provenance(analysis: Analysis) -> list[str]:
    """Runs that are done, commits, versions."""
    done = [each for each in analysis.outcomes.values() if each.state == "done"]
    lines = [f"{len(done)} of {len(analysis.outcomes)} runs are done"]
    commits = dict.fromkeys(commit for each in done for commit in each.commits if commit)
    lines += (
        [f"commit {', '.join(commits)}" + (" (+: with changes)" if "+" in "".join(commits) else "")] if commits else []
    )
    versions = dict.fromkeys(_versions(each) for each in done)
    lines += [text for text in versions if text]
    return lines


def _versions(outcome: Outcome) -> str:
    used = outcome.summary.get("versions")
    return ", ".join(f"{name} {version}" for name, version in used.items()) if isinstance(used, dict) else ""


# --- formats ------------------------------------------------------------------------------------------------------


def markdown(analysis: Analysis) -> str:
    """The tables, the claims, and what is missing."""
    study = analysis.study
    lines = [f"# {study.name}", "", *study.about.splitlines()[:1], ""]
    for table in analysis.tables:
        lines += [f"## {table.title}", ""]
        if table.error:
            lines += [table.error, ""]
            continue
        lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
        decimals = _decimals(table)
        for row in table.rows:
            cells = [cell.replace("|", "\\|") for cell in _cells(row, decimals)]
            if row.is_best:
                cells[2] = f"**{cells[2]}**"
            lines.append("| " + " | ".join(cells) + " |")
        lines += ["", _caption(table), ""]
    if analysis.claims:
        lines += [f"## Claims, corrected by Holm over {len(analysis.claims)}", ""]
        lines += [f"- **{each.verdict}**: {each.claim}: {_claim_line(each)}" for each in analysis.claims] + [""]
    lacking = [row for row in _trial_rows(analysis) if row[3] != "done"]
    if lacking:
        lines += ["## Left out", ""]
        lines += [
            f"- {arm}, seed {seed}: {state} ({name}) {why}".rstrip() for arm, seed, name, state, _, why in lacking
        ]
        lines.append("")
    if analysis.remarks:
        lines += ["## Notes", "", *(f"- {remark}" for remark in analysis.remarks), ""]
    return "\n".join([*lines, "; ".join(provenance(analysis)) + "."]) + "\n"


def table_csv(analysis: Analysis) -> str:
    """A line for each row of each table, with unrounded figures; p is corrected."""
    names = (
        *("table", "metric", "arm", "seeds", "planned", "mean", "sd", "low", "high", "against", "test"),
        *("compared", "compared_against"),
        *("difference", "difference_low", "difference_high", "p_uncorrected", "p", "detectable", "verdict", "is_best"),
    )
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    for table in analysis.tables:
        for row in table.rows:
            mean = row.mean._asdict() if row.mean else {}
            line: dict[str, Any] = {"table": table.title, "metric": table.metric, "arm": row.arm, **mean}
            line |= {"seeds": len(row.values), "planned": len(row.values) + len(row.lacking), "is_best": row.is_best}
            line |= _comparison_columns(row.comparison) if row.comparison else {}
            writer.writerow(["" if _is_nan(line.get(name)) else line.get(name, "") for name in names])
    return out.getvalue()


def _comparison_columns(compared: Comparison) -> dict[str, Any]:
    line: dict[str, Any] = {"against": compared.other, "p": compared.p, "verdict": compared.verdict}
    line |= {"compared": compared.seeds[0], "compared_against": compared.seeds[1]}
    if found := compared.difference:
        line |= {"test": found.test, "difference": found.mean, "difference_low": found.low}
        line |= {"difference_high": found.high, "p_uncorrected": found.p, "detectable": compared.detectable}
    return line


def _is_nan(value: Any) -> bool:
    return isinstance(value, float | np.ndarray) and bool(np.isnan(value))


def trials_csv(analysis: Analysis) -> str:
    """A line for each trial: its state and its value of the metric of each table."""
    wanted = dict.fromkeys(table.metric for table in analysis.study.tables)
    values = {(t.metric, row.arm): row.values for t in analysis.tables for row in t.rows}
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["arm", "seed", "hash", "state", "commits", "why", *wanted])
    for row in _trial_rows(analysis):
        writer.writerow([*row, *(values.get((name, row[0]), {}).get(int(row[1]), "") for name in wanted)])
    return out.getvalue()


def latex(analysis: Analysis) -> str:
    """A `table` environment for each table, for the package booktabs."""
    out = []
    for table in analysis.tables:
        if table.error:
            out.append(f"% {table.error}")
            continue
        decimals = _decimals(table)
        out += ["\\begin{table}", "\\centering", "\\begin{tabular}{lllllllll}", "\\toprule"]
        out += [" & ".join(map(_tex, COLUMNS)) + r" \\", "\\midrule"]
        for row in table.rows:
            cells = [_tex(cell) for cell in _cells(row, decimals)]
            if row.is_best:
                cells[2] = f"\\textbf{{{cells[2]}}}"
            out.append(" & ".join(cells) + r" \\")
        caption = _tex(f"{table.title}: {_caption(table).replace('`', '')}")
        out += ["\\bottomrule", "\\end{tabular}", f"\\caption{{{caption}}}", "\\end{table}", ""]
    return "\n".join(out) + "\n"


_TEX = {
    **{char: f"\\{char}" for char in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"±": r"$\pm$", "<": "$<$", ">": "$>$", "+": "$+$"},
}


def _tex(text: str) -> str:
    return "".join(_TEX.get(char, char) for char in text)


def page(analysis: Analysis) -> str:
    """The HTML page."""
    study = analysis.study
    title, _, rest = study.about.partition("\n")
    body = [f"<h1>{html.escape(study.name)}</h1>", f"<p class=sub>{html.escape(title)}</p>"]
    if rest.strip():
        body.append(f"<pre>{html.escape(rest.strip())}</pre>")
    if analysis.errors:
        body.append("<div class='card wrong'>" + "<br>".join(map(html.escape, analysis.errors)) + "</div>")
    if analysis.claims:
        lines = [
            f"<tr><td class={each.verdict}><b>{each.verdict}</b><td>{html.escape(str(each.claim))}"
            f"<td>{html.escape(_claim_line(each))}"
            for each in analysis.claims
        ]
        corrected = f"p corrected by Holm over {len(lines)}"
        body += ["<h2>Claims</h2>", _html_table(("verdict", "claim", corrected), lines)]
    for table in analysis.tables:
        body.append(f"<h2>{html.escape(table.title)}</h2>")
        if table.error:
            body.append(f"<p class=none>{html.escape(table.error)}</p>")
            continue
        body.append(_html_table(COLUMNS, [_html_row(row, _decimals(table)) for row in table.rows]))
        body.append(f"<p class=sub>{html.escape(_caption(table).replace('`', ''))}</p>")
        if any(row.values for row in table.rows):
            body.append(picture(draw(table, analysis)))
    body += ["<h2>Arms</h2>", _html_table(("arm", "differs from the recipe by"), _overrides(analysis))]
    trials = ["<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in row) for row in _trial_rows(analysis)]
    body += ["<h2>Trials</h2>", _html_table(("arm", "seed", "hash", "state", "commits", ""), trials)]
    if analysis.remarks:
        body += ["<h2>Notes</h2>", *(f"<p>{html.escape(remark)}</p>" for remark in analysis.remarks)]
    body.append(f"<p class=sub>{html.escape('; '.join(provenance(analysis)))}</p>")
    return run_report.page(study.name, body, _PAGE_STYLE)


def _html_table(columns: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f"<th>{html.escape(name)}" for name in columns)
    return f"<div class=card><table class=wide><tr>{head}{''.join(rows)}</table></div>"


def _html_row(row: Row, decimals: int) -> str:
    cells = [html.escape(cell) for cell in _cells(row, decimals)]
    if row.is_best:
        cells[2] = f"<b>{cells[2]}</b>"
    verdict = row.comparison.verdict if row.comparison else ""
    return "<tr>" + "".join(f"<td class='{verdict if i == 7 else ''}'>{cell}" for i, cell in enumerate(cells))


def _overrides(analysis: Analysis) -> list[str]:
    """What all trials have in common, then what each arm has beside it."""
    trials = analysis.study.trials
    common = {
        key: value
        for key, value in trials[0].override.items()
        if all(each.override.get(key) == value for each in trials)
    }
    shown = {"all": {"recipe": trials[0].recipe, **common}} if common else {}
    for trial in trials:
        own = {key: value for key, value in trial.override.items() if key not in ("arm", "seed", *common)}
        shown.setdefault(trial.arm, own)
    return [f"<tr><td>{html.escape(arm)}<td>{html.escape(in_words(each))}" for arm, each in shown.items()]


def draw(table: TableResult, analysis: Analysis) -> Any:
    """A matplotlib figure: each arm's mean with its interval and seeds, and its learning curve with a band."""
    from matplotlib.figure import Figure

    shown = [row for row in table.rows if row.values and row.mean]
    sign = 1 if table.less_is_better else -1
    best = sorted(shown, key=lambda row: sign * float(row.mean.mean) if row.mean else 0.0)[: len(COLORS)]
    colors = {row.arm: color for row, color in zip(best, COLORS, strict=False)}
    curves = {row.arm: curve for row in best if (curve := _curve(analysis, row.arm, table.metric))}
    figure = Figure(figsize=(10.5, max(2.6, 0.42 * len(shown) + 1.2)), layout="constrained")
    panels = figure.subplots(1, 2 if curves else 1, squeeze=False).flatten()
    for place, row in enumerate(shown):
        assert row.mean is not None
        color = colors.get(row.arm, "#8a93a3")
        panels[0].plot(list(row.values.values()), [place] * len(row.values), "o", color=color, alpha=0.35, ms=4)
        if not math.isnan(row.mean.low):
            panels[0].plot([row.mean.low, row.mean.high], [place, place], "-", color=color, lw=2)
        panels[0].plot([row.mean.mean], [place], "D", color=color, ms=6, mec="white")
        if row.arm in curves:
            steps, mean, low, high = curves[row.arm]
            panels[1].plot(steps, mean, "o-", color=color, ms=3, lw=1.4, label=row.arm)
            panels[1].fill_between(steps, low, high, color=color, alpha=0.18, lw=0)
    panels[0].set_yticks(range(len(shown)), [row.arm for row in shown], parse_math=False)
    panels[0].set_ylim(len(shown) - 0.5, -0.5)
    panels[0].set_xlabel(f"{table.metric}: mean, {LEVEL:.0%} t interval, seeds", fontsize=8.5)
    if curves:
        panels[1].set_xlabel("step", fontsize=8.5)
        which = f", the {len(best)} best arms" if len(best) < len(shown) else ""
        panels[1].set_title(f"{table.metric}, mean and {LEVEL:.0%} t interval{which}", fontsize=8.5, loc="left")
        for text in panels[1].legend(fontsize=8, frameon=False).get_texts():
            text.set_parse_math(False)
    for panel in panels:
        panel.tick_params(labelsize=8.5, length=0)
        panel.grid(color="#e6e9ef", lw=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    return figure


def _curve(analysis: Analysis, arm: str, metric: str) -> tuple[list[int], Any, Any, Any] | None:
    """Steps at which all finished runs of an arm were evaluated, and mean and interval there; None below two steps."""
    runs = [
        {row["step"]: row[metric] for row in analysis.evaluations[trial.hash] if row.get(metric) is not None}
        for trial in analysis.study.trials
        if trial.arm == arm and trial.hash in analysis.evaluations
    ]
    steps = sorted(set.intersection(*map(set, runs))) if runs else []
    if len(steps) < 2:
        return None
    found = mean_over_seeds(np.array([[run[step] for run in runs] for step in steps], np.float64))
    low, high = (np.where(np.isnan(edge), found.mean, edge) for edge in (found.low, found.high))
    return steps, found.mean, low, high
