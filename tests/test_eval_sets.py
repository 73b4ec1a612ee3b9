"""lm/eval_sets.py: named sets in a run, which of them decides, what is never read, and what is refused."""

import dataclasses
import json
from pathlib import Path

import pytest

from lm import eval_sets, train
from lm.config import EvalSetConfig
from lm.config.schema import ConfigError
from lm.data.readers import registry
from lm.tasks import task_config
from lm.tracking import report
from tests import toys, used_runs

LM, CLASSES = used_runs.KINDS["causal_lm"], used_runs.KINDS["classification"]
LINES = {"format": "text", "separator": "\n"}
TASK = task_config("prompting", labels=("neg", "pos"), templates=("{text} It is {label:bad|good}.",)).to_dict()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Texts to train on, four other texts, and labelled sentences."""
    folder = tmp_path_factory.mktemp("data")
    texts = {f"text{seed}": LM.write(folder / str(seed), seed, 12) for seed in range(1, 5)}
    return {"train": LM.write(folder / "train", 0, 40), "labelled": CLASSES.write(folder / "labelled", 9, 16)} | texts


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    toys.use_one_device(monkeypatch)
    monkeypatch.setattr(report, "write_report", lambda workdir: workdir / "report.html")


def recipe(files, sets=None, **changes):
    settings = {"data__separator": "\n", "train__total_steps": 4, "eval__every_steps": 2, "eval__max_tokens": 0}
    return toys.recipe(files["train"], eval__sets=sets or {}, **settings | changes)


def text(files, number: int) -> dict[str, str]:
    return {"path": str(files[f"text{number}"])}


def evaluations(workdir: Path) -> list[dict]:
    """The evaluations of a run, without their times."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "crc32")} for row in rows if row["split"] == "eval"]


def of_set(row: dict, name: str) -> dict:
    """The metrics of a set by their own names."""
    if name == "valid":
        return {key: value for key, value in row.items() if "/" not in key and key not in ("step", "split")}
    return {key.removeprefix(f"{name}/"): value for key, value in row.items() if key.startswith(f"{name}/")}


def test_the_scores_of_a_set_are_those_of_a_run_that_has_its_file_as_eval_path(files, tmp_path):
    """Three texts and a set of another task in one run; and `valid` in either spelling."""
    sets = {"valid": text(files, 1), "second": text(files, 2), "third": text(files, 3) | LINES}
    sets["labelled"] = {"path": str(files["labelled"]), "format": "jsonl", "task": TASK}
    summary = train.train(recipe(files, sets), tmp_path / "sets")
    rows = evaluations(tmp_path / "sets")
    assert [row["step"] for row in rows] == [0, 2, 4]
    for number, name in ((1, "valid"), (2, "second"), (3, "third")):
        train.train(recipe(files, data__eval_path=str(files[f"text{number}"])), tmp_path / name)
        alone = evaluations(tmp_path / name)
        assert [of_set(row, name) for row in rows] == [of_set(row, "valid") for row in alone]
        assert {"loss", "perplexity", "bits_per_byte"} <= of_set(rows[0], name).keys()
    assert {"loss", "nll", "accuracy", "f1", "matthews"} == of_set(rows[0], "labelled").keys()
    assert rows[2]["second/loss"] not in (rows[2]["loss"], rows[2]["third/loss"], rows[0]["second/loss"])
    assert summary["second/loss"] == rows[2]["second/loss"] and summary["before"]["labelled/f1"] == rows[0]["labelled/f1"]
