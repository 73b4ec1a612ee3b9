"""Runs that an older version began (tests/old_runs) are read, and go on as it would have gone on."""

import json
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest

from lm import run as run_lib
from lm import train
from lm.checkpoint import list_saved
from lm.tasks import TASKS, build_config, build_saved_config
from tests import toys

RUNS = Path(__file__).parent / "old_runs"
# Of arithmetic: another CPU may add in another order.
FIGURES = ("loss", "nll", "grad_norm", "learning_rate", "accuracy", "bits_per_byte", "f1", "replay_nll")


# Archive -> the task of its run; "replay" draws a quarter of its rows from another run's data.
TASK_OF = {"causal_lm": "causal_lm", "classification": "classification", "replay": "causal_lm"}


@pytest.fixture(params=TASK_OF)
def old_run(request, tmp_path, monkeypatch):
    with tarfile.open(RUNS / f"{request.param}.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    toys.use_one_device(monkeypatch)
    return TASK_OF[request.param]


def rows(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_an_old_run_resumes_with_the_losses_it_would_have_had(old_run):
    cfg = build_saved_config(json.loads(Path("run/config.json").read_text()))
    assert cfg.task.name == old_run
    expected = [row for row in rows("expected.jsonl") if row["step"] > 3]
    summary = train.train(cfg, "run")
    found = rows("run/metrics.jsonl")
    assert [(row["step"], row["split"]) for row in found] == [(row["step"], row["split"]) for row in expected]
    for was, now in zip(expected, found, strict=True):
        for name in FIGURES:
            assert now.get(name) == (pytest.approx(was[name], rel=1e-5) if name in was else None), (was["step"], name)
    assert summary["steps"] == 6
    written = json.loads(Path("run/config.json").read_text())
    assert written["task"]["name"] == old_run and "objective" not in written
    assert build_config(written) == cfg


def test_options_of_an_old_run_are_found_in_its_task(old_run):
    old = json.loads(Path("run/config.json").read_text())
    cfg = build_saved_config(old)
    expected = {"labels": ("yes", "no"), "r_drop": 0.5} if old_run == "classification" else {}
    assert cfg.task == TASKS[old_run].options(**expected)
    assert cfg.model.init == old["model"]["init"] and cfg.data.seq_len == old["data"]["seq_len"]


def test_the_arrays_of_an_old_checkpoint_are_verified_and_finite(old_run):
    cfg, _, params, _ = run_lib.load_model("run")
    (saved,) = list_saved("run")
    assert saved.step == 3 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    assert cfg.task.name == old_run
