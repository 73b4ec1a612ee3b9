"""Span corruption: rows can be rebuilt, span lengths and positions are uniform, and results fit their rows."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.config import Config, DataConfig, TokenizerConfig
from lm.config.schema import ConfigError
from lm.data.example import Row
from lm.tasks import TASKS, seq2seq
from tests import toys
from tests.pieces import TOKENIZER, Pieces, packed


def config(seq_len: int, target_len: int = 0, extra_ids: int = 41, **options: Any) -> Config:
    return Config(
        task=toys.task("span_corruption", **options),
        data=DataConfig(seq_len=seq_len, target_len=target_len),
        tokenizer=TokenizerConfig(extra_ids=extra_ids),
    )


def undo(out: Row) -> list[int]:
    """Rebuilds the row from its inputs and targets."""
    spans: dict[int, list[int]] = {}
    for token in out["targets"][out["segment_ids"] > 0].tolist()[:-1]:
        if token in TOKENIZER.sentinel_ids:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    inputs = out["inputs"][out["input_segment_ids"] > 0].tolist()[:-1]
    return [token for unit in inputs for token in spans.get(unit, [unit])]


@given(
    st.integers(0, 60),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.05, 0.15, 0.5, 0.8]),
    st.sampled_from([1.0, 1.5, 3.0, 8.0]),
)
def test_the_row_can_be_rebuilt_from_inputs_and_targets(n, seed, rate, mean_span):
    cfg = config(64, 96, mask_rate=rate, mean_span_length=mean_span)
    row = packed([n] if n else [], 64, seed)
    out = seq2seq.span_corruption(row, np.random.default_rng(seed), TOKENIZER, cfg)
    assert undo(out) == row["tokens"][:n].tolist()
    used = [token for token in out["inputs"].tolist() if token in TOKENIZER.sentinel_ids]
    assert used == TOKENIZER.sentinel_ids[: len(used)].tolist()
    hidden = n - (int(out["input_segment_ids"].sum()) - len(used) - 1)
    assert hidden == (np.clip(round(n * rate), 1, n - 1) if n > 1 else 0)
    length = int(out["segment_ids"].sum())
    assert length == hidden + len(used) + 1
    assert out["targets"][length - 1] == TOKENIZER.eos_id
    assert out["inputs"][out["input_segment_ids"].sum() - 1] == TOKENIZER.eos_id
    np.testing.assert_array_equal(out["tokens"][:length], [TOKENIZER.bos_id, *out["targets"][: length - 1]])
    np.testing.assert_array_equal(out["loss_weights"], (np.arange(96) < length) * (hidden > 0))
    for key in ("segment_ids", "positions", "tokens", "targets", "inputs", "input_segment_ids", "input_positions"):
        assert out[key].dtype == np.int32
        assert out[key].shape == ((64,) if key.startswith("input") else (96,))
    np.testing.assert_array_equal(out["input_positions"], np.arange(64) * out["input_segment_ids"])
    np.testing.assert_array_equal(out["positions"], np.arange(96) * out["segment_ids"])


def test_span_lengths_and_positions_are_uniform():
    # Compositions of 4 in 2 parts: 1+3, 2+2, 3+1, equally likely.
    rng = np.random.default_rng(0)
    drawn = [tuple(seq2seq._composition(4, 2, rng)) for _ in range(3000)]
    counts = [drawn.count(parts) / 3000 for parts in ((1, 3), (2, 2), (3, 1))]
    np.testing.assert_allclose(counts, 1 / 3, atol=0.03)


def test_the_position_of_a_single_span_is_uniform():
    cfg, rng = config(16), np.random.default_rng(0)
    row = packed([14], 14, 0)  # round(0.15 * 14) = 2 hidden tokens in one span
    out = [seq2seq.span_corruption(row, rng, TOKENIZER, cfg)["inputs"] for _ in range(1300)]
    places = [inputs.tolist().index(TOKENIZER.sentinel_ids[0]) for inputs in out]
    np.testing.assert_allclose(np.bincount(places, minlength=13) / len(places), 1 / 13, atol=0.03)


def test_lengths_equal_those_of_t5():
    cfg = config(512, 114, extra_ids=101)
    assert seq2seq.raw_len(cfg) == 568  # what random_spans_helper gives for 512 inputs, 15 %, spans of 3
    assert seq2seq.span_sizes(568, cfg) == (85, 28, 512, 114)
    TASKS["span_corruption"].check(cfg)


@given(
    st.integers(3, 80), st.sampled_from([0.02, 0.15, 0.5, 0.9]), st.sampled_from([1.0, 3.0, 5.0]), st.integers(0, 99)
)
def test_a_checked_config_fits_every_row(seq_len, rate, mean_span, seed):
    cfg = config(seq_len, 1, mask_rate=rate, mean_span_length=mean_span)
    longest = seq2seq.raw_len(cfg)
    sizes = seq2seq.span_sizes(longest, cfg)
    cfg = config(seq_len, sizes.targets, sizes.spans + 1, mask_rate=rate, mean_span_length=mean_span)
    TASKS["span_corruption"].check(cfg)
    tokenizer: Any = Pieces(sentinels=sizes.spans)
    for n in {longest, seed % longest}:
        row = packed([n] if n else [], longest + 1, seed)
        out = seq2seq.span_corruption(row, np.random.default_rng(seed), tokenizer, cfg)
        assert len(out["inputs"]) == seq_len
        assert len(out["targets"]) == sizes.targets


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (config(512, 113, 101), r"'data.target_len' is 113.* up to 114"),
        (config(512, 114, 28), r"'tokenizer.extra_ids' is 28.* at least 29"),
        (config(512, 114, 0), r"'tokenizer.extra_ids' is 0"),
        (config(2), "'data.seq_len'"),
        (config(32, mask_rate=0.0), "'task.mask_rate' is 0"),
        (config(32, mean_span_length=0.5), "'task.mean_span_length' must be at least 1, got 0.5"),
    ],
)
def test_invalid_configs_are_refused_before_data_is_read(cfg, message):
    with pytest.raises(ConfigError, match=message):
        TASKS["span_corruption"].check(cfg)
