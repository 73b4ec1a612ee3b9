"""lm/data/packing.py: every pair once, segments and positions right, in every mode."""

from collections import Counter

import grain
import numpy as np
import pytest
from grain import experimental
from hypothesis import given
from hypothesis import strategies as st

from lm.config import Config, DataConfig
from lm.data import packing
from lm.data.example import Example
from lm.tasks.base import shifted_columns

MODES = ("pad", "best_fit", "concat")


def example(doc, length, weights=None):
    """Tokens tell document and position: 1000 * doc + position; position i predicts position i + 1."""
    tokens = 1000 * doc + np.arange(length, dtype=np.int32)
    weights = np.ones(length) if weights is None else weights
    return Example({"tokens": tokens, "targets": tokens + 1, "loss_weights": np.asarray(weights, np.float32)})


def pack(examples, **options):
    cfg = DataConfig(**options)
    columns = shifted_columns(Config(data=cfg))
    rows, metas = packing.pack(iter(examples), columns, cfg)
    assert list(rows) == list(columns) and len(metas) == len(rows["tokens"])
    assert {array.shape for array in rows.values()} == {(len(rows["tokens"]), cfg.seq_len)}
    return rows


def pairs(rows):
    used = rows["segment_ids"] > 0
    return Counter(zip(*(rows[key][used].tolist() for key in ("tokens", "targets", "loss_weights")), strict=True))


DOCS = [example(1, 3, [0, 1, 1]), example(2, 1), example(3, 2)]
WORKED = {
    ("pad", True): (
        [[1000, 1001, 1002, 0], [2000, 0, 0, 0], [3000, 3001, 0, 0]],
        [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]],
        [[0, 1, 2, 0], [0, 0, 0, 0], [0, 1, 0, 0]],
    ),
    ("best_fit", True): ([[1000, 1001, 1002, 2000], [3000, 3001, 0, 0]], [[1, 1, 1, 2], [1, 1, 0, 0]], None),
    ("best_fit", False): (
        [[1000, 1001, 1002, 2000], [3000, 3001, 0, 0]],
        [[1, 1, 1, 1], [1, 1, 0, 0]],
        [[0, 1, 2, 3], [0, 1, 0, 0]],
    ),
    ("concat", True): (
        [[1000, 1001, 1002, 2000], [3000, 3001, 0, 0]],
        [[1, 1, 1, 2], [1, 1, 0, 0]],
        [[0, 1, 2, 0], [0, 1, 0, 0]],
    ),
}


@pytest.mark.parametrize("packing_mode,mask_documents", WORKED)
def test_worked_arrays(packing_mode, mask_documents):
    rows = pack(DOCS, seq_len=4, packing=packing_mode, mask_documents=mask_documents)
    tokens, segment_ids, positions = WORKED[packing_mode, mask_documents]
    assert rows["tokens"].tolist() == tokens
    assert rows["segment_ids"].tolist() == segment_ids
    assert rows["positions"].tolist() == (positions or [[0, 1, 2, 0], [0, 1, 0, 0]])
    assert rows["targets"].tolist() == (rows["tokens"] + (rows["segment_ids"] > 0)).tolist()
    assert rows["loss_weights"][0].tolist()[:3] == [0, 1, 1]


def test_concat_splits_a_document_at_the_end_of_a_row():
    rows = pack([example(1, 3), example(2, 7)], seq_len=4, packing="concat")
    assert rows["tokens"].tolist() == [[1000, 1001, 1002, 2000], [2001, 2002, 2003, 2004], [2005, 2006, 0, 0]]
    assert rows["segment_ids"].tolist() == [[1, 1, 1, 2], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert rows["positions"].tolist() == [[0, 1, 2, 0], [0, 1, 2, 3], [0, 1, 0, 0]]


documents = st.lists(st.tuples(st.integers(1, 8), st.integers(0, 255)), max_size=40)


@pytest.mark.parametrize("mask_documents", [True, False])
@pytest.mark.parametrize("mode", MODES)
@given(docs=documents)
def test_every_pair_is_in_exactly_one_row_and_inside_its_segment(mode, mask_documents, docs):
    made = [
        example(i, length, [(mask >> j) & 1 for j in range(length)]) for i, (length, mask) in enumerate(docs, start=1)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_WINDOW_EXAMPLES", 7)
        patch.setattr(packing, "_CHUNK", 3)
        rows = pack(made, seq_len=8, packing=mode, mask_documents=mask_documents)
    unpacked = Counter(p for e in made for p in zip(*e.columns.values(), strict=True))
    assert pairs(rows) == unpacked
    for tokens, segment_ids, positions in zip(rows["tokens"], rows["segment_ids"], rows["positions"], strict=True):
        used = int((segment_ids > 0).sum())
        assert not tokens[used:].any() and not segment_ids[used:].any() and not positions[used:].any()
        doc, starts = tokens[:used] // 1000, np.diff(tokens[:used].astype(int), prepend=-1) != 1
        if not mask_documents:
            assert set(segment_ids[:used]) <= {1} and positions[:used].tolist() == list(range(used))
            continue
        assert segment_ids[:used].tolist() == np.cumsum(starts).tolist()
        for segment in np.unique(segment_ids[:used]):
            inside = segment_ids[:used] == segment
            assert len(set(doc[inside])) == 1
            assert positions[:used][inside].tolist() == list(range(inside.sum()))


def test_compact_dtypes_lose_nothing():
    weights = np.array([0.25, 0, 1], np.float32)
    tokens, targets = np.array([70_000, 3, 255], np.int32), np.array([3, 65_536, 1], np.int32)
    wide = Example({"tokens": tokens, "targets": targets, "loss_weights": weights})
    rows = pack([wide, example(0, 4)], seq_len=4, packing="pad")
    assert rows["tokens"].tolist() == [[70_000, 3, 255, 0], [0, 1, 2, 3]]
    assert rows["targets"].tolist() == [[3, 65_536, 1, 0], [1, 2, 3, 4]]
    assert rows["loss_weights"].tolist() == [[0.25, 0, 1, 0], [1, 1, 1, 1]]
    assert sum(array.nbytes for array in pack(DOCS, seq_len=4).values()) == 2 * 4 * (2 + 2 + 1 + 1 + 1)


@given(lengths=st.lists(st.integers(1, 16), min_size=1, max_size=60))
def test_best_fit_makes_the_rows_that_grain_makes_of_examples_in_that_order(lengths):
    made = [example(i, length) for i, length in enumerate(lengths, start=1)]
    longest_first = sorted((e.columns for e in made), key=lambda columns: -len(columns["tokens"]))
    names = ("tokens", "targets", "loss_weights")
    # As many bins as examples: with fewer, Grain closes all that are open when one example fits nowhere.
    expected = list(
        experimental.BestFitPackIterDataset(
            grain.MapDataset.source(longest_first).to_iter_dataset(),
            length_struct=dict.fromkeys(names, 16),
            num_packing_bins=len(made),
            shuffle_bins=False,
        )
    )
    rows = pack(made, seq_len=16, packing="best_fit")
    keys = {**{name: name for name in names}, "segment_ids": "tokens_segment_ids", "positions": "tokens_positions"}
    for key, grains in keys.items():
        assert rows[key].tolist() == [row[grains].tolist() for row in expected], key


def test_best_fit_fills_rows_well():
    lengths = np.random.default_rng(0).integers(1, 129, size=1500)
    made = [example(i, length) for i, length in enumerate(lengths, start=1)]
    rows = pack(made, seq_len=128, packing="best_fit")
    assert (rows["segment_ids"] > 0).mean() > 0.96


@pytest.mark.parametrize("mode", ["pad", "best_fit"])
def test_an_example_too_long_for_a_row_is_refused(mode):
    with pytest.raises(ValueError, match=r"an example.* (5 positions|\(5,\)) does not fit in a row of \(?4"):
        pack([example(1, 5)], seq_len=4, packing=mode)


@pytest.mark.parametrize("mode", MODES)
def test_no_examples_give_no_rows(mode):
    assert pack([], seq_len=4, packing=mode)["tokens"].shape == (0, 4)
