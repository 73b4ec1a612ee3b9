"""Studies: what is committed is what their figures say, and the figures are those of the configs as they are."""

import itertools
import json
import runpy
from pathlib import Path

import pytest

OBJECTIVES = Path(__file__).parents[1] / "experiments" / "objectives"


@pytest.fixture(scope="module")
def study():
    return runpy.run_path(str(OBJECTIVES / "study.py"))


def test_table_is_that_of_the_figures(study):
    assert study["results"](3) == (OBJECTIVES / "results.md").read_text(encoding="utf-8")


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
