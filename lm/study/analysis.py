"""From the runs of a study to its tables and the verdicts on its claims.

Arms whose trials have the same seeds are compared in pairs, others by Welch's test. P values are corrected by Holm's
method over each table, and over the claims.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lm.config import flatten, schema
from lm.evaluation import metrics
from lm.study import runs
from lm.study.definition import Claim, Study, Table
from lm.study.runs import Outcome
from lm.study.searching import with_known
from lm.study.statistics import ALPHA, Difference, Mean, detectable, difference, holm, mean_over_seeds
from lm.tracking import files
from lm.tracking.files import RunFileError

NOT_FINITE = "not finite"  # why a seed has no value: its run ended, with a metric that is infinite or NaN
LOST = ("failed", NOT_FINITE)  # a run that diverges ends with an error
Verdict = Literal["better", "worse", "undecided"]
Evaluations = list[dict[str, Any]]  # the rows of metrics.jsonl with split 'eval', ascending steps


@dataclasses.dataclass(frozen=True)
class Comparison:
    """An arm compared with another.

    Attributes:
      other: the other arm.
      difference: arm minus other; None where fewer than two seeds can be compared.
      seeds: how many values of the arm and of the other were compared.
      p: corrected; 1 where there is no test.
      detectable: the smallest difference that these seeds find with a probability of 0.8; NaN = no test.
      verdict: on the arm.
      why: why it is undecided, where not for p.
      lacking: seeds of the arm and of the other that have no value, in words; '' = none.
    """

    other: str
    difference: Difference | None
    seeds: tuple[int, int]
    p: float
    detectable: float
    verdict: Verdict
    why: str = ""
    lacking: tuple[str, str] = ("", "")


@dataclasses.dataclass(frozen=True)
class Row:
    """An arm in a table.

    Attributes:
      values: seed -> value.
      lacking: seed -> why it has no value.
      mean: of the values; None where there is none.
      comparison: with its baseline; None for the baseline itself.
      is_best: it is better than each other arm of the table, by Bonferroni's correction over all pairs.
    """

    arm: str
    values: Mapping[int, float]
    lacking: Mapping[int, str]
    mean: Mean | None
    comparison: Comparison | None
    is_best: bool


@dataclasses.dataclass(frozen=True)
class TableResult:
    """A table with its figures; `error` says why it has none."""

    title: str
    metric: str
    less_is_better: bool
    tests: int
    rows: tuple[Row, ...] = ()
    error: str = ""


@dataclasses.dataclass(frozen=True)
class ClaimResult:
    """A claim and what the data say of it."""

    claim: Claim
    verdict: Literal["reproduced", "contradicted", "undecided"]
    comparison: Comparison
    error: str = ""


@dataclasses.dataclass(frozen=True)
class Analysis:
    """All that a report shows.

    Attributes:
      outcomes: hash -> run of the trial.
      remarks: what a reader has to know of the runs.
      evaluations: hash -> of the runs that are done.
    """

    study: Study
    outcomes: Mapping[str, Outcome]
    remarks: Sequence[str]
    evaluations: Mapping[str, Evaluations]
    tables: tuple[TableResult, ...]
    claims: tuple[ClaimResult, ...]

    @property
    def errors(self) -> list[str]:
        """What is wrong beyond trials that are missing or have failed."""
        damaged = [
            f"{self.study.runs[key]}: {each.why}" for key, each in self.outcomes.items() if each.state == "damaged"
        ]
        wrong = [each.error for each in self.tables] + [each.error for each in self.claims]
        return [*damaged, *dict.fromkeys(filter(None, wrong))]


Values = Callable[[str, str], tuple[dict[int, float], dict[int, str]]]  # arm, metric -> values, lacking, by seed


def analyse(study: Study, root: Path) -> Analysis:
    """Reads the runs of a study, and computes its tables and claims. What is damaged is left out, and named."""
    study = with_known(study, root)
    outcomes, remarks = runs.find(study, root)
    evaluations = {}
    for key, outcome in outcomes.items():
        if outcome.state == "done":
            try:
                rows = files.read_rows(outcome.folder / "metrics.jsonl")
                evaluations[key] = [row for row in rows if row["split"] == "eval"]
            except RunFileError as error:
                outcomes[key] = dataclasses.replace(outcome, state="damaged", why=str(error), summary={})
    summaries = {key: dict(flatten(outcome.summary)) for key, outcome in outcomes.items()}
    known = sorted({name for each in summaries.values() for name, value in each.items() if _is_number(value)})

    def values_of(arm: str, metric: str) -> tuple[dict[int, float], dict[int, str]]:
        values, lacking = dict[int, float](), dict[int, str]()
        for trial in (trial for trial in study.trials if trial.arm == arm):
            value = summaries[trial.hash].get(metric)
            if isinstance(value, int | float) and _is_number(value):
                values[trial.seed] = float(value)
            elif outcomes[trial.hash].state != "done":
                lacking[trial.seed] = outcomes[trial.hash].state
            else:
                is_lost = metric in summaries[trial.hash].get("not_finite", ())
                lacking[trial.seed] = NOT_FINITE if is_lost else "no such metric"
        return values, lacking

    return Analysis(
        study,
        outcomes,
        [*remarks, *_several_commits(study, outcomes)],
        evaluations,
        tuple(tabulate(table, study.arms, values_of, known) for table in study.tables),
        judge(study.claims, values_of, known),
    )


def _several_commits(study: Study, outcomes: Mapping[str, Outcome]) -> list[str]:
    """A remark where the runs that are done were started at different commits of the code."""
    arms: dict[str, dict[str, None]] = {}
    for trial in study.trials:
        for commit in outcomes[trial.hash].commits if outcomes[trial.hash].state == "done" else ():
            arms.setdefault(commit, {})[trial.arm] = None
    if len(arms) < 2:
        return []
    each = "; ".join(f"{commit or 'no commit'}: {', '.join(names)}" for commit, names in arms.items())
    return [f"runs of {len(arms)} commits are compared; {each}"]


def count_states(lacking: Mapping[int, str]) -> str:
    """Why seeds have no value: 'failed 1, missing 2'."""
    states = [*lacking.values()]
    return ", ".join(f"{state} {states.count(state)}" for state in dict.fromkeys(states))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _unknown(metric: str, known: Sequence[str]) -> str:
    """Why no value of a metric can be shown; '' where some run has one, or none is done."""
    if metric in known or not known:
        return ""
    return f"no run has a metric '{metric}'{schema.nearest(metric, known)}; there are {', '.join(known)}"


def tabulate(table: Table, all_arms: Sequence[str], values_of: Values, known: Sequence[str]) -> TableResult:
    """The figures of a table."""
    name = table.metric.rpartition(".")[2]
    about, has_direction = metrics.about(name), metrics.is_known(name)
    title = table.title or about.title
    if error := _unknown(table.metric, known):
        return TableResult(title, table.metric, about.less_is_better, 0, error=f"table '{title}': {error}")
    arms = table.arms or tuple(all_arms)
    pairs = [(arm, other, table.metric) for arm in arms if (other := table.baseline_of(arm))]
    compared = {pair[0]: found for pair, found in zip(pairs, compare(pairs, values_of), strict=True)}
    best = _best(arms, table.metric, values_of) if has_direction else ""
    rows = []
    for arm in arms:
        values, lacking = values_of(arm, table.metric)
        mean = mean_over_seeds(np.array(list(values.values()))) if values else None
        rows.append(Row(arm, values, lacking, mean, compared.get(arm), arm == best))
    return TableResult(title, table.metric, about.less_is_better, len(pairs), tuple(rows))


def _best(arms: Sequence[str], metric: str, values_of: Values) -> str:
    """The arm that is better than each other; '' = none. As the data choose it, p is times the number of all pairs."""
    sign = metrics.gain(metric.rpartition(".")[2], 1.0)
    means = {arm: sign * float(np.mean([*values.values()])) for arm in arms if (values := values_of(arm, metric)[0])}
    if len(arms) < 2 or not means:
        return ""
    leader, pairs = max(means, key=lambda arm: means[arm]), math.comb(len(arms), 2)
    if {*LOST} & {*values_of(leader, metric)[1].values()}:
        return ""
    tested = [_test(leader, other, metric, values_of)[0] for other in arms if other != leader]
    return leader if all(each and sign * each.mean > 0 and each.p * pairs < ALPHA for each in tested) else ""


def judge(claims: Sequence[Claim], values_of: Values, known: Sequence[str]) -> tuple[ClaimResult, ...]:
    """The verdicts on claims, corrected over all of them."""
    verdicts: dict[Verdict, Any] = {"better": "reproduced", "worse": "contradicted", "undecided": "undecided"}
    comparisons = compare([(claim.first, claim.second, claim.metric) for claim in claims], values_of)
    out = []
    for claim, comparison in zip(claims, comparisons, strict=True):
        error = _unknown(claim.metric, known)
        out.append(ClaimResult(claim, verdicts[comparison.verdict], comparison, error and f"claim '{claim}': {error}"))
    return tuple(out)


def compare(family: Sequence[tuple[str, str, str]], values_of: Values) -> list[Comparison]:
    """Compares (arm, other arm, metric) of a family of tests, whose p values are corrected together."""
    tested = [_test(arm, other, metric, values_of) for arm, other, metric in family]
    corrected = holm(np.array([each[0].p if each[0] else np.nan for each in tested], np.float64))
    out = []
    for (arm, other, metric), (found, seeds, why), p in zip(family, tested, corrected.tolist(), strict=True):
        verdict: Verdict = "undecided"
        lacks = values_of(arm, metric)[1], values_of(other, metric)[1]
        if found and p < ALPHA:
            is_better = metrics.gain(metric.rpartition(".")[2], float(found.mean)) > 0
            lost = sum(state in LOST for state in lacks[0 if is_better else 1].values())
            if lost:  # the seeds that are left flatter the arm
                why = f"seeds of '{arm if is_better else other}' that failed or diverged: {lost}"
            else:
                verdict = "better" if is_better else "worse"
        smallest = detectable(float(found.se), float(found.df), len(family)) if found else math.nan
        lacking = count_states(lacks[0]), count_states(lacks[1])
        out.append(Comparison(other, found, seeds, p, smallest, verdict, why, lacking))
    return out


def _test(arm: str, other: str, metric: str, values_of: Values) -> tuple[Difference | None, tuple[int, int], str]:
    """The difference of two arms, not corrected; how many values of each it is of; and why there is no test."""
    (first, first_lacks), (second, second_lacks) = values_of(arm, metric), values_of(other, metric)
    # As the study was planned, not as it went: a failed run does not choose the test.
    is_paired = {*first, *first_lacks} == {*second, *second_lacks}
    if is_paired:
        both = sorted(first.keys() & second.keys())
        first, second = ({seed: each[seed] for seed in both} for each in (first, second))
    seeds = len(first), len(second)
    if min(seeds) < 2:
        return None, seeds, f"{min(seeds)} {'seed' if min(seeds) == 1 else 'seeds'}"
    values = np.array(list(first.values())), np.array(list(second.values()))
    found = difference(*values, "paired" if is_paired else "Welch")
    return found, seeds, "" if np.isfinite(found.p) else "no spread over seeds"
