"""Next-item recommendation: runs on a synthetic table of interactions, and configs that are refused."""

import collections
import dataclasses
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lm import run as run_lib
from lm import train
from lm.config import Config
from lm.config.schema import ConfigError, Duration
from lm.data.readers import registry
from lm.tasks import build_config, default_config, recommendation
from lm.tracking import files
from tests import tool_modules, toys
from tests.test_tasks_recommendation import VOCABULARY

make_interactions = tool_modules.load("make_interactions")


def recipe(path: Path, **changes: Any) -> Config:
    """A config of a run that takes seconds."""
    c = default_config(changes.pop("task__name", "next_item"))
    c.data.format, c.data.path = "interactions", str(path)
    c.tokenizer.vocab_size = 48
    c.data.packing, c.data.seq_len, c.data.batch_size = "pad", 16, 64
    c.model.num_layers, c.model.embed_dim, c.model.num_heads, c.model.mlp_dim = 1, 32, 2, 32
    c.optim.learning_rate, c.optim.warmup_steps = 1e-2, 2
    c.train.total_steps = 40
    c.checkpoint.best_metric = "ndcg_at_10"
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        setattr(c[section] if section else c, name, value)
    return build_config(c)


MASKED = {
    "task__name": "masked_item",
    "tokenizer__extra_ids": 1,
    "model__kind": "encoder",
    "train__total_steps": 4,
}


@pytest.fixture
def on_one_device(monkeypatch):
    """A function that makes later runs use one device."""
    return lambda: toys.use_one_device(monkeypatch)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "a.csv"
    make_interactions.write(path, make_interactions.make(users=320, items=40, seed=0))
    return path


def test_the_synthetic_table_is_skewed_and_a_function_of_its_seed(table):
    rows = make_interactions.make(users=320, items=40, seed=0)
    assert rows == make_interactions.make(320, 40, 0) != make_interactions.make(320, 40, 1)
    assert [tuple(line.split(",")) for line in table.read_text().split()[1:]] == [
        (user, item, str(time)) for user, item, time in rows
    ]
    by_user = collections.Counter(user for user, _, _ in rows)
    by_item = sorted(Counter(item for _, item, _ in rows).values())
    assert len(by_user) == 320 and min(by_user.values()) >= 5
    assert sum(by_item[-8:]) > 0.4 * len(rows)


def test_a_run_beats_the_popularity_baseline_and_keeps_its_vocabulary(table, tmp_path, on_one_device):
    on_one_device()
    cfg = recipe(table)
    summary = train.train(cfg, tmp_path / "run")
    split = registry.load(cfg.data)
    counts = Counter(item for record in split.train for item in record["items"])
    popular = [sum(c >= counts[r["target"]] for c in counts.values()) <= 10 for r in split.valid]
    assert summary["popularity_hr_at_10"] == np.mean(popular)
    assert summary["hr_at_10"] > summary["popularity_hr_at_10"] + 0.1
    assert "bits_per_byte" not in summary
    popular = [sum(c >= counts[r["target"]] for c in counts.values()) <= 10 for r in split.test]
    assert summary["test"]["popularity_hr_at_10"] == np.mean(popular)
    assert summary["test"]["hr_at_10"] > np.mean(popular) + 0.1
    vocabulary = recommendation.load(tmp_path / "run" / "items.json")
    assert dict(vocabulary.items) == counts

    # A run initialised from it has the same ids, whatever its own data.
    other = dataclasses.replace(cfg, init_from=str(tmp_path / "run"))
    assert run_lib.plan(other, tmp_path / "next").tokenizer == vocabulary
    VOCABULARY.save(tmp_path / "run" / "items.json")  # then those of the checkpoint are read
    assert run_lib.plan(other, tmp_path / "next").tokenizer == vocabulary


def test_the_test_items_are_scored_by_the_checkpoint_best_in_validation(table, tmp_path, on_one_device):
    """With few users the model soon overfits; a run that ends at the best step must have the same test scores."""
    on_one_device()
    few = {"data__max_records": 24, "optim__learning_rate": 0.02, "optim__schedule": "constant", "model__embed_dim": 64}
    cfg = recipe(table, eval__every_steps=20, train__total_steps=60, optim__weight_decay=0.0, **few)
    summary = train.train(cfg, tmp_path / "long")
    rows = files.read_rows(tmp_path / "long" / "metrics.jsonl")
    best = max((row for row in rows if row["split"] == "eval"), key=lambda row: row["ndcg_at_10"])
    assert summary["test"]["step"] == best["step"] == 20 < summary["steps"]
    short = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, total=Duration(steps=20)))
    assert train.train(short, tmp_path / "short")["test"] == summary["test"]


def test_a_run_on_masked_items_resumes_bitwise(table, tmp_path, on_one_device):
    on_one_device()
    cfg = recipe(table, **MASKED | {"checkpoint__every_steps": 2, "model__dropout": 0.1})
    whole = train.train(cfg, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    (tmp_path / "summary.json").unlink()
    again = train.train(cfg, tmp_path)
    assert again["hr_at_10"] > 0
    for name in ("loss", "accuracy", "hr_at_10", "ndcg_at_10", "popularity_hr_at_10"):
        assert whole[name] == again[name]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model__kind": "encoder"}, "'model.kind' is encoder, which does not fit task.name=next_item; use decoder"),
        (MASKED | {"model__kind": "decoder"}, "'model.kind' is decoder, which does not fit task.name=masked_item"),
        (MASKED | {"tokenizer__extra_ids": 0}, "'tokenizer.extra_ids' is 0, but task.name=masked_item needs 1"),
        (MASKED | {"task__mask_rate": 0.0}, "'task.mask_rate' is 0.0; expected a share in (0, 1)"),
        ({"generate__prompts": ("i1",)}, "'generate.prompts' is set, but this model does not generate text"),
        ({"generate__stop": ("a",)}, "'generate.stop' is set, but this model does not generate text"),
        ({"generate__min_new_tokens": 2}, "'generate.min_new_tokens' is set, but this model does not generate text"),
        ({"generate__repetition_penalty": 1.1}, "'generate.repetition_penalty' is set, but this model does not"),
        ({"data__packing": "best_fit"}, "'data.packing' is best_fit, which does not fit task.name=next_item; use pad"),
    ],
)
def test_invalid_configs_are_refused(table, changes, says):
    with pytest.raises(ConfigError) as error:
        run_lib.plan(recipe(table, **changes), None)
    assert says in str(error.value)


def test_ranking_metrics_are_accepted_as_best_metric_and_unknown_ones_refused(table, tmp_path):
    cfg = recipe(table, checkpoint__best_metric="hr_at_5")
    with pytest.raises(ConfigError, match=r"no metric 'hr_at_5' \(did you mean 'hr_at_10'\?\)"):
        train.train(cfg, tmp_path / "run")
