"""What pre-training gains, for each task: every objective and every task on the shared data, in one table.

    python experiments/objectives/study.py [--only=sst2,ner] [--seeds=3]

Finished rows are not run again and a stopped run is resumed, so the same command completes the study. After each row
`results.md`, beside this file, is rewritten. Figures of earlier studies are saved in `results.json` and are valid as
long as a run's config is the same.
"""

import argparse
import dataclasses
import hashlib
import importlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
KEPT = HERE / "results.json"


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to do a task: a name for the table, and the recipe with its argument."""

    name: str
    recipe: str
    argument: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
    """Rows of the table that are compared with each other.

    Attributes:
      title: the task and its data.
      metric: a key of the summary.
      arms: ways to compare; each with the one of its kind from scratch, or else with the last.
      changes: config keys that differ from the recipe: fewer labels, a shorter run.
      once: it is a pre-training, run with one seed in the folder where the recipes of other rows look for it.
      note: a remark printed below the table.
      data: a file to be generated, and the tool that generates it.
      on_test: the metric is measured on the test records, with the checkpoint chosen by validation.
    """

    title: str
    metric: str
    arms: tuple[Arm, ...]
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    once: bool = False
    note: str = ""
    data: tuple[str, str] | None = None
    on_test: bool = False


def arms(recipe: str, *arguments: str) -> tuple[Arm, ...]:
    """One arm for each argument of a recipe, named by the argument."""
    return tuple(Arm(argument, recipe, argument) for argument in arguments)


def once(title: str, metric: str, recipe: str, data: tuple[str, str] | None = None) -> Row:
    """The row of a pre-training."""
    return Row(title, metric, (Arm("", recipe),), once=True, data=data)


SENTENCES = ("mlm", "scratch", "clm", "clm,scratch")
# Few labels, because that is where pre-training helps, and because all of them would take too long.
FEW = {"data.max_records": 500, "train.total_epochs": 8.0, "eval.every_epochs": 0.0}
REVIEWS = FEW | {"train.total_epochs": 4.0, "eval.max_tokens": 128_000}
FEWER = {"data.max_records": 2_000, "eval.every_epochs": 0.0}
SHORTER = {"train.total_steps": 100, "eval.every_steps": 0}
NO_PAIRS = "low either way: this model has read single texts only, and too few to judge what two mean together."
NO_GRAMMAR = "near 0 either way: a million parameters do not judge grammar after one pass of reviews."
INTERACTIONS = ("runs/interactions.csv", "tools/make_interactions.py")
ROWS: dict[str, Row] = {
    "mlm": once("MLM on reviews", "nll", "reviews_mlm"),
    "clm": once("CLM on reviews", "bits_per_byte", "reviews_clm"),
    "sst2": Row("SST-2, 500 labels", "accuracy", arms("sst2", *SENTENCES), FEW),
    "sst2_selectors": Row(
        "SST-2, 500 labels, from MLM",
        "accuracy",
        arms("sst2", "mlm,full", "mlm,last2", "mlm,lora", "mlm,adapters", "mlm,head"),
        FEW,
        note="compared with the head alone.",
    ),
    "mae": once("MAE on CIFAR-10", "loss", "mae_cifar10"),
    "simclr": once("SimCLR on CIFAR-10", "accuracy", "simclr_cifar10"),
    "cifar10_probe": Row(
        "CIFAR-10, linear probe",
        "accuracy",
        arms("cifar10_probe", "mae", "simclr", "random"),
        {"train.total_steps": 160},
    ),
    "abstracts": once("MLM on abstracts", "nll", "abstracts_mlm"),
    "ner": Row(
        "Entities, BC5CDR, 1,000 sentences",
        "entity_f1",
        arms("bc5cdr_ner", "mlm", "scratch"),
        {"data.max_records": 1_000, "eval.every_steps": 0},
    ),
    "imdb": Row(
        "IMDB, 500 labels",
        "accuracy",
        arms("imdb", *SENTENCES),
        REVIEWS,
        note="the encoder from scratch is good here; a guess is that single words tell.",
    ),
    "stsb": Row("STS-B, 2,000 pairs", "pearson", arms("stsb", "mlm", "scratch"), FEWER, note=NO_PAIRS),
    "cola": Row("CoLA, 2,000 sentences", "matthews", arms("cola", "mlm", "scratch"), FEWER, note=NO_GRAMMAR),
    "rte": Row(
        "RTE, 1,000 pairs",
        "accuracy",
        arms("rte", "mlm", "scratch"),
        FEWER | {"data.max_records": 1_000},
        note=NO_PAIRS,
    ),
    "pos": Row(
        "Parts of speech, UD EWT, 1,000 sentences",
        "token_accuracy",
        arms("ud_pos", "mlm", "scratch"),
        {"data.max_records": 1_000},
    ),
    "qa": Row("Span QA, XQuAD", "f1", arms("xquad_qa", "mlm", "scratch")),
    "simcse": once("SimCSE on SST-2's sentences", "uniformity", "simcse"),
    "stories": once("CLM on stories", "bits_per_byte", "tinystories"),
    "continued": Row(
        "CLM on stories, then abstracts: abstracts",
        "bits_per_byte",
        arms("continue_pubmedqa", "", "no_replay"),
        SHORTER,
        note="'' replays a quarter of stories.",
    ),
    "forgotten": Row(
        "the same runs: stories",
        "replay_bits_per_byte",
        arms("continue_pubmedqa", "", "no_replay"),
        SHORTER,
    ),
    "t5": once("Span corruption on stories", "nll", "t5_tinystories"),
    "translation": Row(
        "Translation, Multi30k, 4,000 pairs",
        "nll",
        arms("multi30k_translation", "pretrained", "scratch"),
        {"data.max_records": 4_000},
        note="less is better, so pre-training loses: it read English stories only, and has to unlearn.",
    ),
    "finetune": Row(
        "CIFAR-10, all parameters",
        "accuracy",
        arms("cifar10_finetune", "mae", "simclr", "random"),
        {"train.total_steps": 60, "optim.warmup_steps": 10},
    ),
    "next_item": Row(
        "Next item, synthetic",
        "ndcg_at_10",
        (Arm("causal", "sasrec"), Arm("masked", "bert4rec")),
        note="users and items are made by tools/make_interactions.py; both lines are from scratch. Scores are of each "
        "user's test item, at the step that the validation item chose.",
        data=INTERACTIONS,
        on_test=True,
    ),
    "items": dataclasses.replace(once("Masked items, synthetic", "ndcg_at_10", "bert4rec", INTERACTIONS), on_test=True),
    "next_item_short": Row(
        "Next item, synthetic, 3 passes",
        "ndcg_at_10",
        arms("sasrec", "masked", "scratch"),
        {"train.total_epochs": 3.0, "eval.every_epochs": 0.0},
        data=INTERACTIONS,
        on_test=True,
    ),
}


def main() -> None:
    """Runs the requested rows in order, and writes the table after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"rows, by name: {', '.join(ROWS)} (default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each fine-tuning (default: 3)")
    args = parser.parse_args()
    wanted = args.only.split(",") if args.only else list(ROWS)
    if unknown := [name for name in wanted if name not in ROWS]:
        sys.exit(f"error: --only: no row '{unknown[0]}'; there are {', '.join(ROWS)}")
    os.chdir(ROOT)  # recipes name runs and data relative to the root
    for row in ROWS:  # runs that are already in folders
        for arm in ROWS[row].arms:
            summaries(row, arm, args.seeds)
    for number, name in enumerate(wanted, 1):
        for needed in (*needs(name), name):
            print(f"== row {number} of {len(wanted)}: {needed}", flush=True)
            run_row(needed, args.seeds)
        (HERE / "results.md").write_text(results(args.seeds), encoding="utf-8")


def run_row(name: str, seeds: int) -> None:
    """Runs every unfinished run of a row; a pre-training also if its folder is gone, since others start from it."""
    from lm import tasks, train

    row = ROWS[name]
    if row.data and not Path(row.data[0]).exists():
        subprocess.run([sys.executable, row.data[1], row.data[0]], check=True)
    for arm in row.arms:
        for seed in range(1 if row.once else seeds):
            folder = workdir(name, arm, seed)
            if found(name, arm, seed) and (not row.once or (folder / "summary.json").exists()):
                continue
            if (folder / "summary.json").exists() and (differs := differs_from_recipe(name, arm, seed)):
                sys.exit(f"error: {folder} is of another config: {differs}; move it away")
            began = time.monotonic()
            train.train(tasks.build_config(recipe_of(name, arm, seed)), folder)
            found(name, arm, seed)
            print(f"{folder}: {time.monotonic() - began:.0f} s", flush=True)


def recipe_of(name: str, arm: Arm, seed: int) -> Any:
    """The config of a run."""
    recipe = importlib.import_module(f"configs.{arm.recipe}").get_config(arm.argument)
    recipe.update_from_flattened_dict(ROWS[name].changes)
    recipe.seed = seed
    return recipe


def starts_from(recipe: Any) -> list[str]:
    """The pre-trainings whose checkpoint or tokenizer a config reads."""
    read = [Path(path) for path in (recipe.init_from, recipe.tokenizer.path) if path]
    folders = {name: workdir(name, row.arms[0], 0) for name, row in ROWS.items() if row.once}
    return [name for name, folder in folders.items() if any(path.is_relative_to(folder) for path in read)]


def needs(name: str) -> list[str]:
    """The rows to run before this one."""
    each = (starts_from(recipe_of(name, arm, 0)) for arm in ROWS[name].arms)
    return list(dict.fromkeys(itertools.chain(*each)))


def workdir(name: str, arm: Arm, seed: int) -> Path:
    """Folder of a run; for a pre-training, the one where the recipes look for it."""
    if ROWS[name].once:
        return Path("runs") / arm.recipe
    return Path("runs") / "objectives" / arm.recipe / f"{arm.argument.replace(',', '_') or 'default'}-{seed}"


def found(name: str, arm: Arm, seed: int) -> dict[str, Any] | None:
    """Figures of a run: from its folder, or else those that an earlier study saved for the same config.

    The figures of the table are saved in results.json beside this file, so that they outlive the folders.
    """
    from lm.tracking import files

    row = ROWS[name]
    path = workdir(name, arm, seed) / "summary.json"
    key = f"{name} {arm.recipe}:{arm.argument} {seed}"
    same = fingerprint(name, arm, seed)
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    if path.exists():
        if differs := differs_from_recipe(name, arm, seed):
            print(f"{path.parent} is of another config: {differs}; its figures are left out", file=sys.stderr)
            return kept[key] if kept.get(key, {}).get("config") == same else None
        summary = files.read_document(path)
        part = summary["test"] if row.on_test else summary
        figures = {row.metric: part[row.metric]} | {key: summary[key] for key in ("seconds", "trained_parameters")}
        figures |= {"before": {row.metric: None if row.on_test else summary["before"].get(row.metric)}, "config": same}
        if kept.get(key) != figures:
            KEPT.write_text(json.dumps(dict(sorted((kept | {key: figures}).items())), indent=1) + "\n")
        return figures
    return kept[key] if kept.get(key, {}).get("config") == same else None


def differs_from_recipe(name: str, arm: Arm, seed: int) -> str:
    """How the config in a run's folder differs from the recipe; '' = in nothing that counts."""
    from lm import tasks
    from lm.study import runs

    return runs.difference_from(workdir(name, arm, seed), tasks.build_config(recipe_of(name, arm, seed)))


def fingerprint(name: str, arm: Arm, seed: int) -> str:
    """Hash of what differs from the defaults in the configs of a run and of those it starts from, except data paths.

    A new key does not change it. A changed default may change figures but is not detected: delete results.json then.
    """
    from lm import tasks
    from lm.config import schema

    # The default of the first rows, and that of an option which a task has gained since.
    before = {"model.init": "fan_in", "task.target": "normalised"}
    usual = dict(schema.flatten(tasks.default_config().to_dict())) | before
    recipe = recipe_of(name, arm, seed)
    given = schema.flatten(recipe.to_dict())
    values: dict[str, Any] = {key: value for key, value in given if value != usual.get(key) and "path" not in key}
    values["needs"] = [fingerprint(needed, ROWS[needed].arms[0], 0) for needed in starts_from(recipe)]
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def summaries(name: str, arm: Arm, seeds: int) -> list[dict[str, Any]]:
    """Summaries of an arm's finished runs."""
    each = (found(name, arm, seed) for seed in range(1 if ROWS[name].once else seeds))
    return [summary for summary in each if summary]


def results(seeds: int) -> str:
    """The table, as Markdown."""
    lines = [
        "# Every objective and task: results",
        "",
        f"Written by `python experiments/objectives/study.py`; mean and standard deviation over {seeds} seeds. "
        "The difference is to the baseline (the row's last line, or 'scratch' of the same kind), with its 95 % t "
        "interval; p is of the t test paired by seed, corrected by Holm over the lines of a task, which the "
        "interval is not. Better or worse: p < "
        ".05; 'detectable' is the difference that the test would find with a probability of 80 %, given the spread "
        "measured. Minutes are of all runs of the line, on the machine that ran it.",
        "",
        "| task | how | metric | before | score | difference | 95 % interval | p | verdict | detectable "
        "| trained parameters | minutes |",
        "|" + "---|" * 12,
    ]
    for name, row in ROWS.items():
        compared = comparisons(name, seeds)
        lines += [line(name, row, arm, seeds, compared.get(arm.name, [""] * 5)) for arm in row.arms]
    lines += ["", *(f"- {row.title}: {row.note}" for row in ROWS.values() if row.note)]
    return "\n".join(lines) + "\n"


def line(name: str, row: Row, arm: Arm, seeds: int, compared: list[str]) -> str:
    """The table's line for an arm; `compared` are its cells of `comparisons`."""
    done = summaries(name, arm, seeds)
    if not done:
        return f"| {row.title} | {arm.name} | {row.metric} | | not run | | | | | | | |"
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
        f"| {row.title} | {arm.name} | {row.metric} | {shown} | {score}{missing} | {' | '.join(compared)} "
        f"| {trained} | {minutes:.1f} |"
    )


def baseline(row: Row, arm: Arm) -> Arm | None:
    """The arm that another is compared with: from scratch and of the same kind, else the row's last; None = no one."""
    by_argument = {other.argument: other for other in row.arms}
    other = by_argument.get(f"{arm.argument},scratch") or by_argument.get("scratch") or row.arms[-1]
    return None if other == arm or "scratch" in arm.argument or row.once else other


def comparisons(name: str, seeds: int) -> dict[str, list[str]]:
    """Name of each arm that has a baseline -> its last cells: difference, interval, p, verdict, detectable."""
    from lm.study import analysis, report

    row = ROWS[name]
    pairs = [(arm.name, other.name, row.metric) for arm in row.arms if (other := baseline(row, arm))]
    values = {
        arm.name: {seed: figures[row.metric] for seed in range(seeds) if (figures := found(name, arm, seed))}
        for arm in row.arms
        if not row.once  # which have one seed and no baseline
    }

    def values_of(arm: str, metric: str) -> tuple[dict[int, float], dict[int, str]]:
        return values[arm], {seed: "not run" for seed in range(seeds) if seed not in values[arm]}

    out = {}
    for (arm, _, _), compared in zip(pairs, analysis.compare(pairs, values_of), strict=True):
        difference = compared.difference
        if difference is None or compared.why:
            out[arm] = ["", "", "", f"undecided: {compared.why}", ""]
            continue
        interval = f"{difference.low:+.3f} to {difference.high:+.3f}"
        p, detectable = report.p_value(compared.p), f"{compared.detectable:.3f}"
        out[arm] = [f"{difference.mean:+.3f}", interval, p, compared.verdict, detectable]
    return out


if __name__ == "__main__":
    from lm import command_line

    command_line.use_huge_pages()
    main()
