"""Predictions of trained runs: every record once, in order, whatever the size of a batch and the number of devices."""

import json
from pathlib import Path

import jax
import pytest

import lm
from lm import predict
from lm.data.readers import registry
from lm.tasks import TASKS
from tests import used_runs

COUNT = 21


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    """Task -> its run, trained once."""
    made: dict[str, Path] = {}

    def make(task: str) -> Path:
        if task not in made:
            made[task] = used_runs.make(task, tmp_path_factory.mktemp(task))
        return made[task]

    return make


def new_records(task: str, folder: Path, cfg, to_predict: bool = True) -> list:
    path = used_runs.KINDS[task].write(folder / "new", 1, COUNT)
    wanted = predict.wanted_to_predict(cfg) if to_predict else TASKS[task].wanted(cfg)
    return list(registry.stream(predict.data_at(cfg, str(path)), wanted))


def close(one, other):
    """Equal but for the rounding of floats."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(close(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(close, one, other))
    return one == pytest.approx(other, rel=1e-4, abs=1e-4) if isinstance(one, float) else one == other


@pytest.mark.parametrize("task", TASKS)
def test_each_record_is_predicted_once_alike_on_one_and_on_eight_devices(task, run_of, tmp_path):
    alone = lm.load(str(run_of(task)), batch_size=3, devices=jax.devices()[:1])
    spread = lm.load(str(run_of(task)), batch_size=16)
    assert (alone.mesh.size, spread.mesh.size) == (1, 8)
    records = new_records(task, tmp_path, alone.config)
    said = list(predict.predictions(alone, records))
    assert [one["number"] for one in said] == list(range(COUNT))
    assert [one["source"] for one in said] == [record["source"] for record in records]
    assert all(one["prediction"] is not None for one in said)
    json.dumps(said, allow_nan=False)
    for one, other in zip(said, predict.predictions(spread, records), strict=True):
        assert close(one, other), (one, other)
