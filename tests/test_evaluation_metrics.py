"""lm/evaluation/metrics.py and flops.py: sums merge exactly; FLOPs and MFU of hand-worked and published cases."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.config import Config, ModelConfig
from lm.evaluation import flops, metrics
from lm.tasks import TASKS, base
from tests import toys


def test_bits_per_byte_and_perplexity_of_a_hand_worked_case():
    # Two tokens with p = 1/4 and 1/16: 2 + 4 bits, for a target of 3 bytes: 2 bits a byte, 3 bits a token.
    nll = math.log(4) + math.log(16)
    out = metrics.finalize(metrics.nll_metrics(nll, 2.0, 3.0), has_perplexity=True)
    assert out == pytest.approx({"nll": 3 * math.log(2), "bits_per_byte": 2.0, "perplexity": 8.0}, rel=1e-15)


def test_merged_parts_equal_the_whole():
    rng = np.random.default_rng(0)
    nll, weights, sizes = rng.gamma(2.0, size=300), rng.integers(0, 2, 300), rng.integers(0, 5, 300)
    weights[:40] = 0  # one part measures nothing

    def sums(part: slice) -> metrics.Sums:
        w = weights[part]
        return metrics.add({}, metrics.nll_metrics(nll[part] @ w, w.sum(), sizes[part] @ w))

    total: metrics.Sums = {}
    for part in (slice(0, 40), slice(40, 47), slice(47, 210), slice(210, 300)):  # uneven: a mean of means would show
        total = metrics.add(total, sums(part))
    assert metrics.finalize(total, has_perplexity=True) == pytest.approx(
        metrics.finalize(sums(slice(0, 300)), has_perplexity=True), rel=1e-14
    )


def test_sums_are_kept_in_float64():
    total = {"nll": (2.0**24, 2.0**24)}
    for _ in range(3):
        total = metrics.add(total, {"nll": (np.float32(1.0), jnp.float32(1.0))})
    assert total == {"nll": (2.0**24 + 3, 2.0**24 + 3)}  # float32 would stay at 2^24


def test_add_does_not_change_its_arguments_and_keeps_names_of_one_side():
    total, part = {"a": (1.0, 2.0)}, {"b": (3.0, 4.0)}
    assert metrics.add(total, part) == {"a": (1.0, 2.0), "b": (3.0, 4.0)}
    assert total == {"a": (1.0, 2.0)} and part == {"b": (3.0, 4.0)}


def test_metrics_of_weight_zero_are_left_out():
    assert metrics.finalize({"loss": (0.0, 0.0), "nll": (0.0, 0.0), "accuracy": (1.0, 2.0)}, has_perplexity=True) == {
        "accuracy": 0.5
    }


def test_perplexity_of_a_diverged_model_is_infinite():
    assert metrics.finalize({"nll": (1e6, 1.0)}, has_perplexity=True)["perplexity"] == math.inf
    assert math.isnan(metrics.finalize({"nll": (math.nan, 1.0)}, has_perplexity=True)["perplexity"])


def test_likelihood_of_a_jitted_objective():
    @jax.jit
    def objective(nll_sum):
        return metrics.nll_metrics(nll_sum, jnp.float32(4), jnp.float32(8))

    out = metrics.finalize(metrics.add({}, objective(jnp.float32(6))), has_perplexity=True)
    assert out["nll"] == 1.5
    assert out["bits_per_byte"] == pytest.approx(6 / math.log(2) / 8, rel=1e-7)


def test_train_flops_of_a_hand_worked_model():
    # GPT-2 block, D=8, H=2, E=4, F=32: attention 4 * 8 * 8 = 256, MLP 2 * 8 * 32 = 512; 3 layers; logits 8 * 100.
    model = ModelConfig(num_layers=3, embed_dim=8, num_heads=2)
    matrices = 3 * (256 + 512) + 800
    assert flops.train_flops_per_token(model, seq_len=16, vocab_size=100) == 6 * matrices + 12 * 3 * 2 * 4 * 16


def test_train_flops_of_grouped_heads_gate_and_window():
    # H=4, K=1, E=6: query and out 2 * 8 * 24 = 384, key and value 2 * 8 * 6 = 96; SwiGLU 3 * 8 * 20 = 480.
    model = ModelConfig(
        num_layers=2, embed_dim=8, num_heads=4, num_kv_heads=1, head_dim=6, mlp_dim=20, mlp="swiglu", sliding_window=5
    )
    matrices = 2 * (384 + 96 + 480) + 8 * 50
    assert flops.train_flops_per_token(model, seq_len=16, vocab_size=50) == 6 * matrices + 12 * 2 * 4 * 6 * 5
    assert flops.train_flops_per_token(model, seq_len=3, vocab_size=50) == 6 * matrices + 12 * 2 * 4 * 6 * 3


def test_flops_of_a_bert_are_those_of_an_encoder_and_of_its_transform():
    plain = ModelConfig(kind="encoder", num_layers=3, embed_dim=8, num_heads=2)
    bert = dataclasses.replace(plain, norm_position="post", embed_norm=True, mlp="gelu_exact", lm_transform=True)
    added = flops.train_flops_per_token(bert, 16, 50) - flops.train_flops_per_token(plain, 16, 50)
    assert added == 6 * 8 * 8
    relu = dataclasses.replace(plain, mlp="relu")
    assert flops.train_flops_per_token(relu, 16, 50) == flops.train_flops_per_token(plain, 16, 50)


@pytest.mark.parametrize(("window", "seen"), [(0, 128.5), (64, 64 - 64 * 63 / 2 / 256), (500, 128.5)])
def test_the_causal_half_counts_the_keys_that_a_position_sees(window, seen):
    """Up to one key: the diagonal counts as half."""
    model = ModelConfig(num_layers=3, embed_dim=8, num_heads=2, sliding_window=window)
    per_token = functools.partial(flops.train_flops_per_token, seq_len=256, vocab_size=100)
    matrices = per_token(model) - 12 * 3 * 8 * min(256, window or 256)
    half = per_token(model, causal_half=True)
    assert half - matrices == pytest.approx(12 * 3 * 8 * seen, abs=12 * 3 * 8)
    if not 0 < window < 256:
        assert half - matrices == 12 * 3 * 8 * 128
    both_ways = dataclasses.replace(model, kind="encoder")
    assert per_token(both_ways, causal_half=True) == per_token(both_ways) == per_token(model)


@pytest.mark.parametrize(
    ("sizes", "vocab", "seq_len", "tokens", "published"),
    [
        ({"mlp_dim": 14336}, 128_256, 8192, 7207, 0.455),  # Llama-3.1-8B
        ({"mlp_dim": 14336, "num_experts": 8, "experts_per_token": 2}, 32_000, 4096, 3899, 0.352),  # Mixtral 8x7B
    ],
)
def test_mfu_as_maxtext_published_it_for_v6e(sizes, vocab, seq_len, tokens, published):
    """Tokens per second per chip and MFU, both as published: they agree if attention is counted in full."""
    model = ModelConfig(num_layers=32, embed_dim=4096, num_heads=32, num_kv_heads=8, mlp="swiglu", **sizes)
    full, half = (
        flops.mfu(tokens, flops.train_flops_per_token(model, seq_len, vocab, causal_half=h), "TPU v6 lite", 1)
        for h in (False, True)
    )
    assert full == pytest.approx(published, abs=0.001) and half < published - 0.01


def test_train_flops_count_the_experts_that_a_token_is_routed_to():
    dense = ModelConfig(num_layers=3, embed_dim=8, num_heads=2, mlp_dim=32, mlp="swiglu")
    three, model = (
        dataclasses.replace(dense, mlp_dim=3 * 32),
        dataclasses.replace(dense, num_experts=7, experts_per_token=3),
    )
    router = 6 * 3 * 8 * 7
    per_token = functools.partial(flops.train_flops_per_token, seq_len=16, vocab_size=100)
    assert per_token(model) == per_token(three) + router


def test_mfu_of_a_hand_worked_case():
    # PaLM 540B, table 3: 238.3K tokens/s on 6144 TPU v4; 540.35e9 parameters, 118 layers, 48 heads of 256, 2048 long.
    per_token = 6 * 540.35e9 + 12 * 118 * 48 * 256 * 2048
    assert flops.mfu(238.3e3, per_token, "TPU v4", 6144) == pytest.approx(0.462, abs=0.001)  # 46.2% in the paper
    assert flops.mfu(238.3e3, per_token, "cpu", 6144) is None


@pytest.mark.parametrize(
    ("device_kind", "peak"),
    [
        ("TPU v3", 61.5e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5e", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 1153.5e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H20", None),
        ("cpu", None),
    ],
)
def test_peak_flops(device_kind, peak):
    assert flops.peak_flops(device_kind) == peak


def test_every_task_has_a_unit_and_only_language_models_a_perplexity():
    language_models = {
        *("causal_lm", "prefix_lm", "chat", "span_corruption", "translation", "masked_lm", "masked_lm_pairs")
    }
    for name, task in TASKS.items():
        found = metrics.finalize({"nll": (2.0, 2.0), "loss": (3.0, 2.0)}, task.has_perplexity)
        assert ("perplexity" in found) == (name in language_models)
        assert ("token" in task.loss_unit) == (name in language_models)
        assert task.loss_unit


LABELS = {
    "multitask": ("sst2/0", "sst2/1", "stsb/"),
    "tagging": ("O", "B-X", "I-X"),
    "entities": ("O", "B-X", "I-X"),
}


def config_of(name: str) -> Config:
    return Config(task=toys.task(name, **({"labels": LABELS[name]} if name in LABELS else {})))


def test_every_score_that_a_task_names_is_described():
    for name, task in TASKS.items():
        names = task.score_names(config_of(name))
        assert not [metric for metric in names if metrics.about(metric).title == metric]


@pytest.mark.parametrize(
    ("name", "task", "title", "unit", "gain"),
    [
        ("loss", "causal_lm", "Loss", "nats per token", -1),
        ("replay_nll", "masked_lm", "replay: NLL", "nats per hidden token", -1),
        ("sst2_loss", "multitask", "sst2: Loss", "nats per example", -1),
        ("stsb_loss", "multitask", "stsb: Loss", "squared error per example", -1),
        ("my_web_bits_per_byte", "causal_lm", "my_web: Bits per byte", "", -1),
        ("popularity_hr_at_10", "next_item", "popularity: Hit rate at 10", "", 1),
        ("pair_accuracy", "masked_lm_pairs", "Accuracy of the pairs' labels", "", 1),
        ("floss", "causal_lm", "floss", "", 1),
        ("loss", "", "Loss", "", -1),
    ],
)
def test_metrics_are_described_by_name(name, task, title, unit, gain):
    found = base.about(TASKS[task], config_of(task), name) if task else metrics.about(name)
    assert (found.title, found.unit) == (title, unit)
    assert metrics.gain(name, 1.0) == gain
