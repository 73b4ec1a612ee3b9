"""lm/evaluation/early_stopping.py: after which evaluation a run stops."""

import pytest

from lm import config
from lm.evaluation.early_stopping import EarlyStopping


def train(patience, min_delta):
    return config.TrainConfig(early_stopping=config.EarlyStoppingConfig(patience, min_delta))


@pytest.mark.parametrize(
    ("name", "values", "stops_after"),
    [
        ("loss", [3.0, 2.0, 2.1, 1.99, 0.0], 4),
        ("accuracy", [0.5, 0.4, 0.7, 0.7, 0.75], 5),
        ("replay_nll", [3.0, 2.0, 1.0, 0.5, 0.2], None),
        ("f1", [0.5, float("nan"), float("nan"), 0.9], 3),
    ],
)
def test_patience_counts_evaluations_without_a_sufficient_improvement(name, values, stops_after):
    cfg = train(2, 0.1)
    state, stopped = EarlyStopping(), None
    for number, value in enumerate(values, 1):
        state = state.update({name: value}, name, cfg)
        if stopped is None and state.should_stop(cfg):
            stopped = number
    assert stopped == stops_after


def test_without_patience_a_run_never_stops():
    state, cfg = EarlyStopping(), train(0, 0.0)
    for value in (1.0, 2.0, 3.0):
        state = state.update({"loss": value}, "loss", cfg)
        assert not state.should_stop(cfg)


def test_a_missing_metric_is_no_improvement():
    state, cfg = EarlyStopping(), train(2, 0.0)
    state = state.update({"loss": 1.0}, "loss", cfg).update({}, "loss", cfg)
    assert state == EarlyStopping(1.0, 1)
