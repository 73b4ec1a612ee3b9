"""Studies: what is committed is what their figures say, and the figures are those of the configs as they are."""

import itertools
import json
import runpy
from pathlib import Path

import pytest
from scipy import stats

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
OBJECTIVES = EXPERIMENTS / "objectives"


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there are no runs, whose figures would be taken first
    return runpy.run_path(str(OBJECTIVES / "study.py"))


def test_table_is_that_of_the_figures(study):
    assert study["results"](3) == (OBJECTIVES / "results.md").read_text(encoding="utf-8")


def test_differences_are_tested_in_pairs_and_corrected_over_the_lines_of_a_task(study):
    kept = json.loads((OBJECTIVES / "results.json").read_text(encoding="utf-8"))
    p = {}
    for arm in ("mlm", "clm"):
        other = "scratch" if arm == "mlm" else "clm,scratch"
        values = [[kept[f"sst2 sst2:{each} {seed}"]["accuracy"] for seed in range(3)] for each in (arm, other)]
        p[arm] = stats.ttest_rel(*values).pvalue
    found = study["comparisons"]("sst2", 3)
    assert p["clm"] < p["mlm"] and found.keys() == p.keys()
    assert (found["clm"][2], found["mlm"][2]) == (f"{2 * p['clm']:.3f}", f"{p['mlm']:.3f}")
    assert (found["clm"][3], found["mlm"][3]) == ("better", "undecided")
    assert study["comparisons"]("mlm", 3) == {} and set(study["comparisons"]("translation", 3)) == {"pretrained"}


def test_every_figure_is_of_a_config_as_it_is(study):
    kept = json.loads((OBJECTIVES / "results.json").read_text(encoding="utf-8"))
    current = {
        f"{name} {arm.recipe}:{arm.argument} {seed}": study["fingerprint"](name, arm, seed)
        for name, row in study["ROWS"].items()
        for arm in row.arms
        for seed in range(1 if row.once else 3)
    }
    stale = [key for key, figures in kept.items() if figures["config"] != current.get(key)]
    assert not stale, "run these rows again, or take them out of results.json"


@pytest.mark.parametrize(
    ("row", "started_from"),
    [
        ("sst2", [["mlm"], ["mlm"], ["clm"], ["clm"]]),  # from scratch it is the tokenizer
        ("simcse", [["mlm"]]),
        ("cifar10_probe", [["mae"], ["simclr"], []]),
        ("next_item_short", [["items"], []]),
    ],
)
def test_what_a_run_starts_from_is_read_from_its_config(study, row, started_from):
    recipes = [study["recipe_of"](row, arm, 0) for arm in study["ROWS"][row].arms]
    assert [study["starts_from"](recipe) for recipe in recipes] == started_from
    assert study["needs"](row) == list(dict.fromkeys(itertools.chain(*started_from)))


@pytest.mark.parametrize("name", ["initialisation", "parity"])
def test_the_other_tables_are_those_of_their_figures(name):
    folder = EXPERIMENTS / name
    assert runpy.run_path(str(folder / "study.py"))["results"]() == (folder / "results.md").read_text(encoding="utf-8")


def test_every_trial_of_initialisation_is_of_a_config_as_it_is():
    folder = EXPERIMENTS / "initialisation"
    study = runpy.run_path(str(folder / "study.py"))
    same = {
        f"{name} {w}x{n}": study["fingerprint"](name, (w, n)) for name in study["FAMILIES"] for w, n in study["SIZES"]
    }
    kept = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    stale = [key for key, figures in kept.items() if figures["config"] != same.get(" ".join(key.split()[:2]))]
    assert not stale, "run these trials again, or take them out of results.json"


def test_a_learning_rate_is_tuned_until_both_neighbours_are_worse():
    study = runpy.run_path(str(EXPERIMENTS / "initialisation" / "study.py"))
    asked = []

    def loss_of(best):
        def loss(step):
            asked.append(step)
            return abs(step - best) if step < best + 2 else float("inf")

        return loss

    assert study["tuned"](loss_of(-5)) == -5 and sorted(asked) == [-6, -5, -4]
    asked.clear()
    assert study["tuned"](loss_of(-2)) == -2 and sorted(asked) == [-6, -5, -4, -3, -2, -1]
