"""lm/resume.py: what a run that goes on may change, and that it goes on where it was."""

import dataclasses
import json

import pytest

from lm import interrupt, resume, train
from lm.checkpoint import list_saved
from lm.config import Config, DataConfig, TrainConfig
from lm.interrupt import Preempted
from lm.schema import ConfigError, Duration
from tests import toys


def changed(cfg, section, **values):
    return dataclasses.replace(cfg, **{section: dataclasses.replace(getattr(cfg, section), **values)})


def test_a_batch_size_may_change_where_every_length_is_in_steps(tmp_path):
    old = Config(train=TrainConfig(Duration(steps=9)))
    said = []
    resume.refuse_changes(old, changed(old, "data", batch_size=4), tmp_path, say=said.append)
    assert said == ["changed meanwhile: data.batch_size 16 -> 4"]
    by_epochs = Config(train=TrainConfig(Duration(epochs=1.5)))
    with pytest.raises(ConfigError, match=r"(?s)data.batch_size: 16 -> 4\n.*in steps, but 'train.total_epochs' is set"):
        resume.refuse_changes(by_epochs, changed(by_epochs, "data", batch_size=4), tmp_path)


def test_other_data_and_another_seed_are_refused_unless_asked_for(tmp_path):
    old = Config(data=DataConfig(format="text", path="a"))
    for new in (changed(old, "data", path="b"), dataclasses.replace(old, seed=3)):
        with pytest.raises(ConfigError, match="--accept_changed_data goes on"):
            resume.refuse_changes(old, new, tmp_path)
        resume.refuse_changes(old, new, tmp_path, accept_data=True)
    model = changed(old, "model", num_layers=3)
    with pytest.raises(ConfigError, match=r"model\.num_layers") as error:
        resume.refuse_changes(old, model, tmp_path, accept_data=True)
    assert "--accept_changed_data" not in str(error.value)


@pytest.mark.slow
def test_a_run_goes_on_with_another_batch_size_and_with_other_data(tmp_path, monkeypatch, capsys):
    texts = toys.write_texts(tmp_path / "texts", documents=30)
    cfg = toys.recipe(texts, train__total_steps=6, eval__at_start=False)
    monkeypatch.setattr(interrupt.Interrupt, "requested", lambda _, done: done in (2, 4))
    run = tmp_path / "run"

    def saved():
        return list_saved(run)[-1].info["data"]

    with pytest.raises(Preempted):
        train.train(cfg, run)
    assert (saved()["example"], saved()["sources"]) == (32, {"": 32})
    smaller = changed(cfg, "data", batch_size=8)
    with pytest.raises(Preempted):
        train.train(smaller, run)
    assert (saved()["example"], saved()["sources"]) == (48, {"": 48})
    (texts / "000.txt").write_text("other words, and so other rows\n")
    capsys.readouterr()
    summary = train.train(smaller, run, accept_changed_data=True)
    said = capsys.readouterr().out
    assert "content: " in said and "accepted: each source goes on" in said
    assert saved()["example"] == 64 and summary["tokens"] == 64 * 32 and summary["steps"] == 6
    assert 0 <= summary["input_bound"] <= 1
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= row["input_bound"] <= 1 for row in rows if row["split"] == "train")
