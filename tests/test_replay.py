"""lm/replay.py: runs that replay another run's data: to the end, resumed, and with that data missing."""

import dataclasses
import json
import shutil

import pytest

from lm import checkpoint, train
from lm.config.schema import ConfigError
from lm.data.record import DataError
from tests import toys

TINY = {"model__num_layers": 1, "model__dropout": 0.0, "train__total_steps": 4}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    cfg = toys.recipe(toys.write_texts(folder / "texts"), **TINY)
    return cfg, folder / "run", train.train(cfg, folder / "run")


@pytest.fixture
def domain(tmp_path):
    (tmp_path / "domain").mkdir()
    for i in range(40):
        (tmp_path / "domain" / f"{i}.txt").write_text(f"model data {i} " * (i % 5 + 3))
    return tmp_path / "domain"


def arrays(workdir):
    return {name: entry["fingerprint"] for name, entry in checkpoint.list_saved(workdir)[-1].info["arrays"].items()}


@pytest.mark.slow
def test_replayed_rows_are_evaluated_from_step_0_and_a_resume_does_not_need_the_earlier_run(base, domain, tmp_path):
    cfg, run, before = base
    moved = shutil.copytree(run, tmp_path / "moved")
    recipe = {**TINY, "init_from": str(moved), "data__replay": 0.5, "checkpoint__every_steps": 2}
    recipe |= {"checkpoint__best_metric": "replay_loss"}
    going_on = toys.recipe(domain, **recipe)
    whole = train.train(going_on, tmp_path / "whole")
    # The same parameters on the same held-out rows: the last values of the earlier run are the first of this one.
    for name in ("loss", "nll", "accuracy", "bits_per_byte"):
        assert whole["before"][f"replay_{name}"] == pytest.approx(before[name], rel=1e-6)
        assert whole[f"replay_{name}"] != whole["before"][f"replay_{name}"] and whole[name] != whole[f"replay_{name}"]
    assert whole["best"]["replay_loss"] == min(whole["replay_loss"], whole["before"]["replay_loss"])

    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "whole" / "checkpoints" / "2", resumed / "checkpoints" / "2")
    shutil.copy(tmp_path / "whole" / "tokenizer.model", resumed)
    shutil.rmtree(moved)
    again = train.train(going_on, resumed)
    assert arrays(resumed) == arrays(tmp_path / "whole") and again["replay_loss"] == whole["replay_loss"]
    saved = [checkpoint.list_saved(folder)[-1].info for folder in (resumed, tmp_path / "whole")]
    assert saved[0]["replay"] == saved[1]["replay"] and saved[0]["data"] == saved[1]["data"]
    assert saved[0]["replay"]["path"] == cfg.data.path


def test_data_that_cannot_be_replayed_is_refused_before_the_first_step(base, domain, tmp_path):
    cfg, run, _ = base
    with pytest.raises(ConfigError, match=r"'data\.replay' draws from .* but 'init_from' is empty"):
        toys.recipe(domain, **TINY, data__replay=0.5)
    going_on = toys.recipe(domain, **TINY, init_from=str(run), data__replay=0.5)
    chats = toys.write_chats(tmp_path / "chats.jsonl")
    with pytest.raises(ConfigError, match=rf"'data\.replay': the data of {run}: .*'task\.name' is chat, which reads"):
        train.train(toys.recipe(chats, **TINY, init_from=str(run), data__replay=0.5), tmp_path / "chat")
    with pytest.raises(ConfigError, match=r"no metric 'replay_los' \(did you mean 'replay_loss'\?\)"):
        wrong = dataclasses.replace(going_on.checkpoint, best_metric="replay_los")
        train.train(dataclasses.replace(going_on, checkpoint=wrong), tmp_path / "metric")
    texts = shutil.move(cfg.data.path, tmp_path / "elsewhere")
    try:
        with pytest.raises(DataError, match=rf"'data\.replay': the data of {run}: data path '.*texts': no such file"):
            train.train(going_on, tmp_path / "gone")
    finally:
        shutil.move(texts, cfg.data.path)
    assert not (tmp_path / "gone" / "checkpoints").exists()


def test_a_run_without_replay_evaluates_only_its_own_rows(base):
    cfg, run, summary = base
    assert not any(name.startswith("replay_") for name in summary)
    info = json.loads(json.dumps(checkpoint.list_saved(run)[-1].info))
    assert info["replay"] is None and info["config"]["data"]["path"] == cfg.data.path
