"""lm/train.py: whole runs. Resumed equals uninterrupted bitwise, two processes equal one, steps are compiled once."""

import dataclasses
import json
import logging
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from lm import checkpoint, config, optim, preemption, train
from lm.checkpoint import CheckpointError, resume
from lm.config import schema
from lm.config.schema import ConfigError
from lm.data import tokenizer
from lm.evaluation import evaluate
from tests import toys

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    return toys.write_texts(tmp_path_factory.mktemp("data") / "texts")


def arrays(workdir: Path, step: int | None = None) -> dict[str, int]:
    """Name -> fingerprint of each array of a checkpoint."""
    saved = {s.step: s for s in checkpoint.list_saved(workdir)}
    chosen = saved[max(saved) if step is None else step]
    return {name: entry["fingerprint"] for name, entry in chosen.info["arrays"].items()}


def rows(workdir: Path, *keys: str) -> list[tuple]:
    """(step, values of `keys`) of the training rows of metrics.jsonl."""
    parsed = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [tuple(row[key] for key in ("step", *keys)) for row in parsed if row["split"] == "train"]


def command(cfg: config.Config, workdir: Path, *flags: str) -> list[str]:
    """The command that starts `lm.main` with this config, as a user would."""
    recipe = workdir.parent / f"{workdir.name}_recipe.py"
    recipe.write_text(
        "from ml_collections import ConfigDict\n\n\ndef get_config():\n"
        f"    return ConfigDict({schema.to_dict(cfg)!r})\n"
    )
    return [sys.executable, "-m", "lm.main", f"--config={recipe}", f"--workdir={workdir}", *flags]


def environment(devices: int) -> dict[str, str]:
    return os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT)}


def wait_for_step(process: subprocess.Popen, workdir: Path, step: int) -> None:
    """Returns once metrics.jsonl has a training row of `step` or later, or the process ended."""
    path = workdir / "metrics.jsonl"
    while process.poll() is None:
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        if any(row["split"] == "train" and row["step"] >= step for row in map(json.loads, lines)):
            return
        time.sleep(0.01)


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted_bitwise(texts, tmp_path):
    """Two SIGKILL and a SIGTERM at random steps; warm-up ends at step 5, decay begins at 15, both across a resume."""
    cfg = toys.recipe(
        texts,
        train__total_steps=20,
        optim__schedule="wsd",
        optim__warmup_steps=5,
        optim__decay_steps=5,
        train__micro_batches=2,
        eval__every_steps=10,
        checkpoint__every_steps=3,
        checkpoint__keep_latest=30,
    )
    train.train(cfg, tmp_path / "whole")
    broken = tmp_path / "broken"
    start = command(cfg, broken)
    rng = random.Random(0)
    ends = []
    for low, how in [(4, signal.SIGKILL), (8, signal.SIGTERM), (13, signal.SIGKILL)]:
        process = subprocess.Popen(start, cwd=ROOT, env=environment(8), stderr=subprocess.PIPE, text=True)
        wait_for_step(process, broken, low + rng.randrange(3))
        time.sleep(rng.random() * 0.05)
        process.send_signal(how)
        _, errors = process.communicate(timeout=120)
        ends.append((process.returncode, errors))
    assert [status for status, _ in ends] == [-signal.SIGKILL, preemption.Preempted.exit_status, -signal.SIGKILL], ends
    assert "run the same command to resume" in ends[1][1]
    subprocess.run(start, cwd=ROOT, env=environment(8), check=True, capture_output=True)

    keys = ("loss", "weight", "grad_norm", "learning_rate")
    assert rows(broken, *keys) == rows(tmp_path / "whole", *keys)
    for step in (18, 20):
        assert arrays(broken, step) == arrays(tmp_path / "whole", step)
    last = [checkpoint.list_saved(d)[-1].info["data"] for d in (broken, tmp_path / "whole")]
    assert last[0] == last[1] and last[0]["example"] == 20 * cfg.data.batch_size
    schedule = optim.schedule(cfg.optim, total_steps=20, warmup_steps=5, decay_steps=5)
    assert [rate for _, rate in rows(broken, "learning_rate")] == [
        float(schedule(jax.numpy.int32(s))) for s in range(20)
    ]
    evals = [json.loads(line) for line in (broken / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in evals if row["split"] == "eval"] == [0, 10, 20]


@pytest.mark.slow
def test_early_stopping_reports_the_best_and_a_resumed_run_stops_at_the_same_step(texts, tmp_path):
    """No evaluation improves by the required 1.0: the run stops at the second evaluation after the first."""
    cfg = toys.recipe(
        texts,
        train__total_steps=40,
        train__early_stopping__patience=2,
        train__early_stopping__min_delta=1.0,
        optim__learning_rate=1e-2,
        eval__every_steps=2,
        checkpoint__every_steps=1,
        checkpoint__keep_latest=9,
    )
    whole = train.train(cfg, tmp_path / "whole")
    assert whole["steps"] == 6 and whole["best"]["step"] == 6, "every evaluation was a little better"
    assert whole["loss"] == whole["best"]["loss"]
    broken = tmp_path / "broken"
    process = subprocess.Popen(command(cfg, broken), cwd=ROOT, env=environment(8), stderr=subprocess.PIPE, text=True)
    wait_for_step(process, broken, 4)
    process.kill()
    process.communicate(timeout=120)
    assert train.train(cfg, broken)["steps"] == 6
    assert arrays(broken) == arrays(tmp_path / "whole")
    assert train.train(cfg, broken)["steps"] == 6, "a run that stopped early is done"


@pytest.mark.slow
def test_two_processes_of_four_devices_equal_one_of_eight(texts, tmp_path):
    """Losses, gradient norms, learning rates and the final evaluation agree; process 0 writes the samples."""
    cfg = toys.recipe(
        texts,
        train__total_steps=6,
        mesh__dcn_data=2,
        mesh__data=1,
        mesh__fsdp=2,
        mesh__tensor=2,
        checkpoint__every_steps=3,
        generate__prompts=("the model",),
    )
    one, two = tmp_path / "one", tmp_path / "two"
    train.train(cfg, one)
    port = toys.free_port()
    flags = [f"--coordinator=127.0.0.1:{port}", "--num_processes=2"]
    both = [
        subprocess.Popen(
            command(cfg, two, *flags, f"--process_id={i}"),
            cwd=ROOT,
            env=environment(4),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    np.testing.assert_allclose(rows(two, "loss", "grad_norm"), rows(one, "loss", "grad_norm"), rtol=1e-5)
    assert rows(two, "weight", "learning_rate") == rows(one, "weight", "learning_rate")
    ours, theirs = (json.loads((d / "summary.json").read_text()) for d in (one, two))
    assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-5)
    assert theirs["devices"] == ours["devices"] == 8
    assert len((two / "samples.jsonl").read_text().splitlines()) == 2
    # The run of two processes could be resumed in one: its position in the data is the same.
    longer = dataclasses.replace(cfg, mesh=config.MeshConfig(data=1))
    abstract = checkpoint.list_saved(two)[-1]
    assert abstract.info["data"] == checkpoint.list_saved(one)[-1].info["data"]
    resume.refuse_changes(cfg, longer, two)


def test_each_step_is_compiled_once(texts, tmp_path, caplog):
    """With several evaluations, a padded last evaluation batch, samples and saves."""
    cfg = toys.recipe(texts, eval__every_steps=5, checkpoint__every_steps=4, generate__prompts=("a run",))
    with caplog.at_level(logging.WARNING), jax.log_compiles():
        summary = train.train(cfg, tmp_path / "run")
    messages = [record.getMessage() for record in caplog.records if "Compiling" in record.getMessage()]
    for name in ("train_step", "eval_step", "_sample"):
        assert sum(f"Compiling jit({name})" in message for message in messages) == 1, (name, messages)
    assert summary["steps"] == 12


def test_a_finished_run_is_not_run_again_and_returns_its_summary(texts, tmp_path, capsys):
    cfg = toys.recipe(texts, train__total_steps=2)
    summary = train.train(cfg, tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with_config = (tmp_path / "config.json").read_bytes()
    again = train.train(dataclasses.replace(cfg, mesh=config.MeshConfig(fsdp=2)), tmp_path)
    said = capsys.readouterr().out
    assert again["loss"] == summary["loss"] and "already done" in said
    assert (
        "devices: 8 of kind cpu, as data=4 x fsdp=2" in said
        and "changed since the last start: mesh.fsdp 1 -> 2" in said
    )
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert (tmp_path / "config.json").read_bytes() == with_config, "the config that the run had"


def test_a_run_resumed_at_its_last_step_writes_its_last_rows_once(texts, tmp_path, capsys):
    cfg = toys.recipe(texts, train__total_steps=2, generate__prompts=("the run",))
    whole = train.train(cfg, tmp_path)
    names = ("metrics.jsonl", "samples.jsonl")

    def rows():
        lines = [json.loads(line) for name in names for line in (tmp_path / name).read_text().splitlines()]
        return [(row["step"], row.get("split", row.get("name")), row.get("loss", row.get("text"))) for row in lines]

    before = rows()
    assert len(before) == len(set(before)) == 6 and (2, "eval", whole["loss"]) in before
    (tmp_path / "summary.json").unlink()  # killed after all rows, before the summary
    again = train.train(cfg, tmp_path)
    assert rows() == before and again["loss"] == whole["loss"]
    assert "rows that are written again" in capsys.readouterr().err
    (tmp_path / "report.html").unlink()  # killed after the summary
    train.train(cfg, tmp_path)
    assert (tmp_path / "report.html").exists() and rows() == before


def test_fine_tuning_starts_from_a_checkpoint_and_reports_the_loss_of_answers(texts, tmp_path, capsys):
    pretrain = tmp_path / "pretrain"
    train.train(toys.recipe(texts, train__total_steps=3), pretrain)
    chats = toys.write_chats(tmp_path / "chats.jsonl")
    for name, source in (("sft", pretrain), ("sft_of_sft", tmp_path / "sft")):
        cfg = toys.recipe(chats, init_from=str(source), train__total_steps=2, generate__prompts=("What is 1 and 1?",))
        summary = train.train(cfg, tmp_path / name)
        assert summary["answer_loss"] == summary["nll"] > 0
        said = capsys.readouterr().out
        assert f"init_from {source}/checkpoints/" in said and f"{source.name}@" in said and " ema\n" in said
        assert (tmp_path / name / "tokenizer.model").read_bytes() == (pretrain / "tokenizer.model").read_bytes()
        assert json.loads((tmp_path / name / "samples.jsonl").read_text().splitlines()[-1])["step"] == 2
    wanted = {"seconds", "tokens_per_second", "parameters", "bits_per_byte", "before", "steps", "tokens", "versions"}
    assert wanted <= json.loads((tmp_path / "sft" / "summary.json").read_text()).keys()
    for file in ("config.json", "report.html", "tensorboard", "checkpoints"):
        assert (tmp_path / "sft" / file).exists(), file


def test_divergence_is_reported_with_step_examples_and_last_good_checkpoint(texts, tmp_path):
    cfg = toys.recipe(texts, checkpoint__every_steps=1, optim__learning_rate=1e-3)
    train.train(dataclasses.replace(cfg, train=config.TrainConfig(schema.Duration(steps=2))), tmp_path)
    bad = dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, learning_rate=1e30))
    with pytest.raises(train.Diverged, match=r"step 2: loss nan.*example indices \[16, 17, .*no checkpoint yet"):
        train.train(bad, tmp_path / "bad")
    assert (
        not list((tmp_path / "bad" / "checkpoints").glob("[0-9]*"))
        or max(s.step for s in checkpoint.list_saved(tmp_path / "bad")) < 2
    )
    last = json.loads((tmp_path / "bad" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["loss"] is None and last["step"] == 2


def test_a_state_that_is_not_finite_ends_the_run_at_its_last_good_checkpoint(texts, tmp_path, monkeypatch):
    """A moment becomes infinite while the loss is still finite, in step 2."""
    cfg = toys.recipe(texts, checkpoint__every_steps=1, checkpoint__keep_latest=1, train__total_steps=3)
    save = checkpoint.Checkpoints.save

    def overflow(self, step, state, *args):
        if step == 2:
            state = state._replace(opt_state=jax.tree.map(lambda x: x * np.float32(np.inf), state.opt_state))
        save(self, step, state, *args)

    monkeypatch.setattr(checkpoint.Checkpoints, "save", overflow)
    with pytest.raises(train.Diverged, match=r"step 2: 'opt_state/.*last good checkpoint: step 1\. This step was not"):
        train.train(cfg, tmp_path)
    assert [saved.step for saved in checkpoint.list_saved(tmp_path)] == [1]


@pytest.mark.slow
def test_the_state_is_saved_when_an_evaluation_fails(texts, tmp_path, monkeypatch):
    cfg = toys.recipe(texts, train__total_steps=2, eval__at_start=False)
    whole = train.train(cfg, tmp_path / "whole")

    def fail(*_):
        raise MemoryError("no room to evaluate")

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "evaluate", fail)
        with pytest.raises(MemoryError):
            train.train(cfg, tmp_path / "run")
    assert arrays(tmp_path / "run", 2) == arrays(tmp_path / "whole", 2)
    assert train.train(cfg, tmp_path / "run")["loss"] == whole["loss"]


def test_a_changed_config_or_changed_data_is_refused_with_the_differences(texts, tmp_path, capsys):
    cfg = toys.recipe(texts, train__total_steps=2)
    train.train(cfg, tmp_path / "run")
    other = dataclasses.replace(cfg, seed=1, monitor=config.MonitorConfig(log_every_steps=2))
    with pytest.raises(ConfigError, match=r"seed: 0 -> 1\n(?!.*monitor)"):
        train.train(other, tmp_path / "run")
    moved = toys.write_texts(tmp_path / "texts", documents=50)
    elsewhere = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, path=str(moved)))
    with pytest.raises(ConfigError, match=r"data.path"):
        train.train(elsewhere, tmp_path / "run")
    other_words = tokenizer.train([f"words of another run, {n}\n" for n in range(90)], 300, 10_000)
    other_words.save(tmp_path / "run" / "tokenizer.model")
    train.train(cfg, tmp_path / "run")
    assert "tokenizer.model is not the one saved with step 2; it is read from" in capsys.readouterr().err
    for file in texts.glob("*.txt"):
        (tmp_path / "texts" / file.name).write_text(file.read_text())
    train.train(elsewhere, tmp_path / "second")
    (tmp_path / "texts" / "000.txt").write_text("other words\n")
    with pytest.raises(CheckpointError, match=r"(?s)other data .*  content: \w{12} -> \w{12}\n.*--accept_changed_data"):
        train.train(elsewhere, tmp_path / "second")


def test_data_without_any_target_is_refused_before_step_0(texts, tmp_path):
    chats = tmp_path / "chats.jsonl"
    words = (texts / "000.txt").read_text() + (texts / "001.txt").read_text()
    turns = [{"messages": [{"role": "user", "content": f"{n} {words}"}]} for n in range(40)]
    chats.write_text("".join(json.dumps(turn) + "\n" for turn in turns))
    toys.write_chats(tmp_path / "valid.jsonl")
    cfg = toys.recipe(chats, data__eval_path=str(tmp_path / "valid.jsonl"), data__eval_fraction=0.0)
    with pytest.raises(ValueError, match=r"no target"):
        train.train(cfg, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_describe_prints_config_and_parameters_without_running(texts, tmp_path, schedule):
    text = train.describe(toys.recipe(texts, optim__schedule=schedule), tmp_path / "none")
    assert (
        f'"schedule": "{schedule}"' in text and "decoder/layers/mlp/up/kernel" in text and '"vocab_size": 384' in text
    )
    assert not (tmp_path / "none").exists()


def test_bits_per_byte_counts_every_held_out_byte_once(texts, tmp_path):
    """An untrained model is nearly uniform: its bits per byte are about log2(vocabulary) x tokens / bytes of files."""
    cfg = toys.recipe(texts, train__total_steps=1, optim__learning_rate=1e-9, eval__batch_size=24)
    summary = train.train(cfg, tmp_path)
    from lm.data.readers import registry

    valid = [record["text"] for record in registry.load(cfg.data).valid]
    words = tokenizer.load(tmp_path / "tokenizer.model")
    targets = sum(len(words.encode(text)) + 1 for text in valid)
    bits = summary["nll"] / math.log(2) * targets
    assert summary["bits_per_byte"] == pytest.approx(bits / sum(len(text.encode()) for text in valid), rel=1e-5)
