"""lm/tracking/throughput.py: tokens per second of training alone, and MFU by both conventions."""

from types import SimpleNamespace

import pytest

from lm.evaluation import metrics
from lm.tracking.throughput import Throughput


@pytest.mark.parametrize(("kind", "is_known"), [("TPU v6 lite", True), ("cpu", False)])
def test_utilisation_has_both_conventions_and_the_speed_of_a_device(kind, is_known):
    """Four devices of 918 TFLOP/s; nothing where the peak is not known."""
    flops_per_token = {"mfu": 2e9, "mfu_causal": 1e9}
    throughput = Throughput(
        SimpleNamespace(goodput=lambda: {"step": 0.0, "input": 0.0}),
        0,
        tokens_per_step=1,
        flops_per_token=flops_per_token,
        device_kind=kind,
        num_devices=4,
    )
    want = {"mfu": 1.0, "mfu_causal": 0.5, "tokens_per_second_a_device": 459e3}
    assert throughput.utilisation(4 * 459e3) == (want if is_known else {})
    assert "in full" in metrics.METRICS["mfu"].title and "causal half" in metrics.METRICS["mfu_causal"].title


def test_only_training_and_waiting_for_input_count_as_time():
    seconds = {"step": 1.0, "input": 1.0, "eval": 0.0}  # before training began
    tracker = SimpleNamespace(goodput=lambda: dict(seconds))
    throughput = Throughput(tracker, 10, tokens_per_step=100, flops_per_token={}, device_kind="cpu", num_devices=1)
    assert throughput.overall(10) == 0.0
    seconds |= {"step": 4.0, "input": 2.0, "eval": 50.0}
    assert throughput.update(12) == 2 * 100 / 4 and throughput.input_bound == 1 / 4
    seconds |= {"step": 8.0}
    assert throughput.update(14) == 4 * 100 / 8 and throughput.input_bound == 1 / 8  # the window was shorter than 5 s
    seconds |= {"step": 10.0}
    assert throughput.update(15) == 1 * 100 / 2 and throughput.input_bound == 0  # since the last update
    assert throughput.overall(15) == 5 * 100 / 10 and throughput.overall_input_bound() == 1 / 10
