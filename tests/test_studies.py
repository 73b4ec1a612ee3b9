"""Studies: what is committed is what their figures say, and the figures are those of the configs as they are."""

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


def test_what_a_row_starts_from_is_read_from_its_configs(study):
    needs = study["needs"]
    assert needs("sst2") == ["mlm", "clm"]
    assert needs("simcse") == ["mlm"]
    assert needs("cifar10_probe") == ["mae", "simclr"]
    assert needs("translation") == ["t5"]
    assert needs("next_item") == []
