"""lm/checkpoint/resume.py: what may change when a run is resumed, from which checkpoint and at which example."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from lm import checkpoint, preemption, train
from lm import run as run_lib
from lm.checkpoint import CheckpointError, list_saved, resume
from lm.config import CheckpointConfig, Config, DataConfig, MeshConfig, OptimConfig, TrainConfig, schema
from lm.config.schema import ConfigError, Duration
from lm.data import tokenizer
from lm.preemption import Preempted
from tests import toys
from tests.test_checkpoint_store import assert_same, info, may_stop_orbax, save, small


def changed(cfg, section, **values):
    return dataclasses.replace(cfg, **{section: dataclasses.replace(getattr(cfg, section), **values)})


def test_the_batch_size_may_change_if_all_lengths_are_in_steps(tmp_path):
    old = Config(train=TrainConfig(Duration(steps=9)))
    said = []
    resume.refuse_changes(old, changed(old, "data", batch_size=4), tmp_path, say=said.append)
    assert said == ["changed since the last start: data.batch_size 16 -> 4"]
    by_epochs = Config(train=TrainConfig(Duration(epochs=1.5)))
    with pytest.raises(ConfigError, match=r"(?s)data.batch_size: 16 -> 4\n.*in steps, but 'train.total_epochs' is set"):
        resume.refuse_changes(by_epochs, changed(by_epochs, "data", batch_size=4), tmp_path)


def test_other_data_and_another_seed_are_refused_unless_accepted(tmp_path):
    old = Config(data=DataConfig(format="text", path="a"))
    for new in (changed(old, "data", path="b"), dataclasses.replace(old, seed=3)):
        with pytest.raises(ConfigError, match="pass --accept_changed_data"):
            resume.refuse_changes(old, new, tmp_path)
        resume.refuse_changes(old, new, tmp_path, accept_data=True)
    model = changed(old, "model", num_layers=3)
    with pytest.raises(ConfigError, match=r"model\.num_layers") as error:
        resume.refuse_changes(old, model, tmp_path, accept_data=True)
    assert "--accept_changed_data" not in str(error.value)


def test_another_curriculum_is_refused_and_no_flag_accepts_it(tmp_path):
    old = Config(data=DataConfig(packing="pad", curriculum=Duration(steps=9)), train=TrainConfig(Duration(steps=90)))
    for new in (
        changed(old, "data", curriculum=Duration(steps=18)),
        changed(old, "data", curriculum=Duration(epochs=1.0)),
        changed(old, "data", curriculum=schema.NEVER, batch_size=4),
    ):
        for accept in (False, True):
            says = r"(?s)data\.curriculum_steps: 9 -> .*\n.*of a run that has begun cannot change"
            with pytest.raises(ConfigError, match=says) as error:
                resume.refuse_changes(old, new, tmp_path, accept)
            assert "--accept_changed_data" not in str(error.value)
    resume.refuse_changes(old, changed(old, "data", batch_size=4), tmp_path)


def test_what_a_task_says_of_its_data_counts_as_data_and_how_it_is_scored_may_change(tmp_path):
    old = Config(task=toys.task("tagging", labels=("O", "B-x")))
    said = []
    resume.refuse_changes(old, changed(old, "task", entity_scheme="none"), tmp_path, say=said.append)
    assert said == ["changed since the last start: task.entity_scheme 'auto' -> 'none'"]
    labels = changed(old, "task", labels=("O", "B-y"))
    with pytest.raises(ConfigError, match="pass --accept_changed_data"):
        resume.refuse_changes(old, labels, tmp_path)
    resume.refuse_changes(old, labels, tmp_path, accept_data=True)
    masked = Config(task=toys.task("masked_lm"))
    with pytest.raises(ConfigError, match=r"task\.mask_rate: 0\.15 -> 0\.3") as error:
        resume.refuse_changes(masked, changed(masked, "task", mask_rate=0.3), tmp_path, accept_data=True)
    assert "--accept_changed_data" not in str(error.value)


@pytest.mark.slow
def test_a_batch_size_changed_under_a_curriculum_repeats_and_skips_no_draw(tmp_path, monkeypatch):
    """Three starts with three batch sizes read the rows that one start reads: each example once, with its own row."""
    texts = toys.write_texts(tmp_path / "texts", documents=30)
    cfg = toys.recipe(texts, train__total_steps=12, data__packing="pad", data__curriculum_steps=6, eval__at_start=False)
    drawn: list[tuple[int, bytes]] = []
    train_batches = run_lib.train_batches

    class Spy:
        def __init__(self, *args):
            self.batches = train_batches(*args)
            self.ready, self.close = self.batches.ready, self.batches.close

        def __next__(self):
            batch = next(self.batches)
            drawn.extend(zip(batch["example_index"].tolist(), map(bytes, batch["tokens"]), strict=True))
            return batch

    monkeypatch.setattr(run_lib, "train_batches", Spy)
    train.train(dataclasses.replace(cfg, train=TrainConfig(Duration(steps=16))), tmp_path / "whole")
    whole = drawn.copy()
    drawn.clear()
    monkeypatch.setattr(preemption.Interrupt, "requested", lambda _, done: done in (3, 8))
    for batch_size in (16, 8):
        with pytest.raises(Preempted):
            train.train(changed(cfg, "data", batch_size=batch_size), tmp_path / "run")
    train.train(changed(cfg, "data", batch_size=24), tmp_path / "run")
    assert [index for index, _ in drawn] == list(range(3 * 16 + 5 * 8 + 4 * 24))
    assert drawn == whole[: len(drawn)]


@pytest.mark.slow
def test_a_run_resumes_with_another_batch_size_and_with_other_data(tmp_path, monkeypatch, capsys):
    texts = toys.write_texts(tmp_path / "texts", documents=30)
    cfg = toys.recipe(texts, train__total_steps=6, eval__at_start=False)
    monkeypatch.setattr(preemption.Interrupt, "requested", lambda _, done: done in (2, 4))
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
    assert "content: " in said and "accepted: each source continues" in said
    assert saved()["example"] == 64 and summary["tokens"] == 64 * 32 and summary["steps"] == 6
    assert 0 <= summary["input_bound"] <= 1
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= row["input_bound"] <= 1 for row in rows if row["split"] == "train")


def run_of(abstract, fingerprint: str = "f"):
    """The part of a `lm.run.Run` that `lm.train.restore` reads if there are checkpoints."""
    optimizer = SimpleNamespace(selection=SimpleNamespace(trained={"a": True}))
    return SimpleNamespace(
        program=SimpleNamespace(abstract_state=abstract, optimizer=optimizer),
        data=SimpleNamespace(fingerprint=fingerprint, about={}, set_fingerprints={}),
    )


@may_stop_orbax
@pytest.mark.parametrize("file", ["_CHECKPOINT_METADATA", "state/manifest.ocdbt", "state/ocdbt.process_0/d"])
def test_restore_falls_back_to_the_checkpoint_before_a_damaged_one(file, tmp_path):
    save(tmp_path, {2: None, 4: None})
    path = tmp_path / "checkpoints/4" / file
    if path.is_dir():  # one bit of an array
        path = max(path.iterdir(), key=lambda p: p.stat().st_size)
        path.write_bytes(toys.flip(path.read_bytes(), 8 * 200))
    else:
        path.write_bytes(b"{")
    said = []
    state, position, origin = train.restore(run_of(small()[1]), checkpoint.list_saved(tmp_path), said.append)
    assert_same(state, small(2)[0])
    assert position.example == 8 and origin == {"a": "this run, step 2"}
    assert "checkpoints/4 " in said[0] and said[0].endswith("; going back to step 2") and "\n" not in said[0]
    assert said[1:] == [f"resuming from {tmp_path}/checkpoints/2"]


@may_stop_orbax
def test_restore_fails_if_no_checkpoint_can_be_read_instead_of_starting_over(tmp_path):
    save(tmp_path, {2: None, 4: None})
    for number in (2, 4):
        (tmp_path / f"checkpoints/{number}/state/manifest.ocdbt").unlink()
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints in .*/checkpoints can be read"):
        train.restore(run_of(small()[1]), checkpoint.list_saved(tmp_path), lambda _: None)


def test_restore_refuses_other_data(tmp_path):
    save(tmp_path, {2: None})
    match = r"(?s)checkpoints/2 was trained on other data \(fingerprint f, now g\).*--config.init_from="
    with pytest.raises(CheckpointError, match=match):
        train.restore(run_of(small()[1], "g"), checkpoint.list_saved(tmp_path), lambda _: None)


def test_a_resumed_run_may_change_only_keys_that_do_not_affect_its_steps():
    old = Config()
    resume.refuse_changes(old, old, Path("run"))
    free = {
        "mesh": MeshConfig(fsdp=4),
        "eval": dataclasses.replace(old.eval, max_tokens=9),
        "checkpoint": CheckpointConfig(keep_best=3),
        "generate": dataclasses.replace(old.generate, temperature=0.0),
        "monitor": dataclasses.replace(old.monitor, log_every_steps=1),
        "model": dataclasses.replace(old.model, remat="full", unroll=0),
        "loss": dataclasses.replace(old.loss, chunk_len=16),
    }
    resume.refuse_changes(old, dataclasses.replace(old, **free), Path("run"))
    for name, value in {
        "seed": 1,
        "optim": OptimConfig(b2=0.9),
        "model": dataclasses.replace(old.model, unroll=2, dropout=0.1),
    }.items():
        with pytest.raises(ConfigError) as error:
            resume.refuse_changes(old, dataclasses.replace(old, **{name: value}), Path("run"))
        key = {"seed": "seed: 0 -> 1", "optim": "optim.b2: 0.95 -> 0.9", "model": "model.dropout: 0.0 -> 0.1"}[name]
        assert str(error.value).splitlines()[:2] == ["run holds a run with a different config:", f"  {key}"]
        assert "unroll" not in str(error.value)


@may_stop_orbax
def test_the_config_is_compared_with_the_newest_readable_checkpoint(tmp_path, monkeypatch):
    class Reached(Exception):
        pass

    def stop(*_):
        raise Reached

    monkeypatch.setattr(train.mesh_lib, "make_mesh", stop)
    cfg = toys.recipe(tmp_path / "no_data", tokenizer__vocab_size=300)
    resolved = run_lib.plan(cfg, tmp_path).cfg
    words = tokenizer.train(["alpha beta gamma delta " * 50], 285, 10_000)
    words.save(tmp_path / "tokenizer.model")
    about = info() | {"config": schema.to_dict(resolved), "tokenizer_hash": words.hash}
    with checkpoint.Checkpoints(tmp_path, resolved.checkpoint) as saves:
        for number in (1, 2):
            saves.save(number, small()[0], about, None)
    (tmp_path / "checkpoints/2/_CHECKPOINT_METADATA").write_text("{")
    with pytest.raises(Reached):
        train.train(cfg, tmp_path)
    with pytest.raises(ConfigError, match="seed: 0 -> 5"):
        train.train(dataclasses.replace(cfg, seed=5), tmp_path)
