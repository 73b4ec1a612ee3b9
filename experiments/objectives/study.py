"""What pre-training is worth, task by task: every objective and every task on the shared data, one table.

    python experiments/objectives/study.py [--only=sst2,ner] [--seeds=3]

Rows that are done are not run again, and a run that was stopped goes on: the same command finishes the study. After
each row `results.md`, beside this file, is written anew from the summaries of the runs.
"""

import argparse
import dataclasses
import importlib
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
HERE = Path(__file__).resolve().parent

SPREAD = "the two standard deviations added"


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to do a task: a name for the table, and the recipe with its argument."""

    name: str
    recipe: str
    argument: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
      title: what is learnt, on which data.
      metric: a key of the summary.
      arms: compared with each other; the last one is the baseline.
      once: a pre-training run, done with one seed, whose folder is where the recipes of other rows look for it.
      needs: rows whose runs this one starts from.
      reason: why the result is as it is, where it needs one.
    """

    title: str
    metric: str
    arms: tuple[Arm, ...]
    once: bool = False
    needs: tuple[str, ...] = ()
    reason: str = ""


def starts(recipe: str, *pairs: str) -> tuple[Arm, ...]:
    """Arms of a recipe: for each start, from its run and from scratch."""
    return tuple(Arm(argument or "pre-trained", recipe, argument) for argument in pairs)


SENTENCES = ("mlm", "scratch", "clm", "clm,scratch")
ROWS: dict[str, Row] = {
    "clm": Row("CLM on reviews", "bits_per_byte", (Arm("", "reviews_clm"),), once=True),
    "mlm": Row("MLM on reviews", "nll", (Arm("", "reviews_mlm"),), once=True),
    "sst2": Row("Sentiment of sentences, SST-2", "accuracy", starts("sst2", *SENTENCES), needs=("clm", "mlm")),
    "sst2_selectors": Row(
        "SST-2 from MLM, what learns",
        "accuracy",
        tuple(Arm(how, "sst2", f"mlm,{how}") for how in ("full", "last2", "lora", "adapters", "bias", "head")),
        needs=("mlm",),
    ),
    "imdb": Row("Sentiment of reviews, IMDB", "accuracy", starts("imdb", *SENTENCES), needs=("clm", "mlm")),
    "cola": Row("Acceptability, CoLA", "matthews", starts("cola", "mlm", "scratch"), needs=("mlm",)),
    "rte": Row("Entailment, RTE", "accuracy", starts("rte", "mlm", "scratch"), needs=("mlm",)),
    "stsb": Row("Similarity, STS-B", "pearson", starts("stsb", "mlm", "scratch"), needs=("mlm",)),
}


def main() -> None:
    """Runs what is asked for, in order, and writes the table after each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"rows, by name: {', '.join(ROWS)} (default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each fine-tuning (default: 3)")
    args = parser.parse_args()
    wanted = args.only.split(",") if args.only else list(ROWS)
    if unknown := [name for name in wanted if name not in ROWS]:
        sys.exit(f"error: --only: no row '{unknown[0]}'; there are {', '.join(ROWS)}")
    use_compilation_cache()
    for number, name in enumerate(wanted, 1):
        for needed in (*ROWS[name].needs, name):
            print(f"== row {number} of {len(wanted)}: {needed}", flush=True)
            run_row(needed, args.seeds)
        (HERE / "results.md").write_text(results(args.seeds), encoding="utf-8")


def use_compilation_cache() -> None:
    """The runs of a row differ in their seed: compiled once, they share the program."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(ROOT / "runs" / "compilation_cache"))


def run_row(name: str, seeds: int) -> None:
    """Every run of a row that is not done yet."""
    from lm import config, train

    for arm in ROWS[name].arms:
        for seed in range(1 if ROWS[name].once else seeds):
            folder = workdir(name, arm, seed)
            if (folder / "summary.json").exists():
                continue
            began = time.monotonic()
            recipe = importlib.import_module(f"configs.{arm.recipe}").get_config(arm.argument)
            recipe.seed = seed
            train.train(config.build(recipe), folder)
            print(f"{folder.relative_to(ROOT)}: {time.monotonic() - began:.0f} s", flush=True)


def workdir(name: str, arm: Arm, seed: int) -> Path:
    """Where a run lies; that of a pre-training, where the recipes look for it."""
    if ROWS[name].once:
        return ROOT / "runs" / arm.recipe
    return ROOT / "runs" / "objectives" / name / f"{arm.name.replace(',', '_')}-{seed}"


def summaries(name: str, arm: Arm, seeds: int) -> list[dict[str, Any]]:
    """The summaries of an arm's runs that are done."""
    paths = [workdir(name, arm, seed) / "summary.json" for seed in range(1 if ROWS[name].once else seeds)]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def results(seeds: int) -> str:
    """The table, as Markdown."""
    lines = [
        "# Every objective and task: results",
        "",
        f"Written by `python experiments/objectives/study.py`; mean and standard deviation over {seeds} seeds. "
        "'beyond' = the difference to the baseline (the row's last line, or 'scratch' of the same kind), and whether "
        f"it is more than {SPREAD}. Minutes are of all runs of the line, on the machine that ran it.",
        "",
        "| task | how | metric | before | score | beyond | trained parameters | minutes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in ROWS.items():
        for arm in row.arms:
            lines.append(line(name, row, arm, seeds))
        if row.reason:
            lines.append(f"| | {row.reason} | | | | | | |")
    return "\n".join(lines) + "\n"


def line(name: str, row: Row, arm: Arm, seeds: int) -> str:
    """One line of the table."""
    done = summaries(name, arm, seeds)
    if not done:
        return f"| {row.title} | {arm.name} | {row.metric} | | not run | | | |"
    values = [summary[row.metric] for summary in done]
    score = f"{statistics.mean(values):.3f}"
    if len(values) > 1:
        score += f" ± {statistics.stdev(values):.3f}"
    before = [summary["before"].get(row.metric) for summary in done]
    shown = f"{statistics.mean(before):.3f}" if all(value is not None for value in before) else ""
    minutes = sum(summary["seconds"] for summary in done) / 60
    trained = f"{done[0]['trained_parameters']:,}"
    missing = "" if row.once or len(done) == seeds else f" ({len(done)} of {seeds} seeds)"
    return (
        f"| {row.title} | {arm.name} | {row.metric} | {shown} | {score}{missing} | {beyond(name, arm, seeds)} "
        f"| {trained} | {minutes:.1f} |"
    )


def beyond(name: str, arm: Arm, seeds: int) -> str:
    """Whether an arm differs from its baseline by more than the spread: 'yes' (better or worse), 'no', or ''."""
    row = ROWS[name]
    scratch = [other for other in row.arms if other.argument == f"{arm.argument},scratch"]
    baseline = (scratch or [other for other in row.arms if other.argument == "scratch"] or [row.arms[-1]])[0]
    if baseline == arm or "scratch" in arm.argument:
        return ""
    mine, theirs = ([s[row.metric] for s in summaries(name, a, seeds)] for a in (arm, baseline))
    if min(len(mine), len(theirs)) < 2:
        return ""
    difference = statistics.mean(mine) - statistics.mean(theirs)
    spread = statistics.stdev(mine) + statistics.stdev(theirs)
    return f"{difference:+.3f} {'yes' if abs(difference) > spread else 'no'}"


if __name__ == "__main__":
    main()
