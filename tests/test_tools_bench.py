"""tools/bench.py and lm/benchmark: the real training is measured, and the peer computes the same losses."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lm.benchmark import generation, transformers_gpt2
from lm.benchmark import training as bench
from lm.config.schema import ConfigError
from lm.models import transformer
from lm.tasks import build_config
from tests import toys

ROOT = Path(__file__).resolve().parents[1]

GPT2 = {
    "data__packing": "concat",
    "data__mask_documents": False,
    "model__vocab_size": 300,
    "model__dropout": 0.0,
    "optim__ema_decay": 0.0,
    "optim__warmup_steps": 3,  # the learning rate moves
    "optim__weight_decay": 1.0,
    "optim__clip_norm": 0.5,
    "model__init": "fan_in",  # a width of 16 learns in few steps
}


@pytest.fixture
def one_device(monkeypatch):
    toys.use_one_device(monkeypatch)


@pytest.fixture
def cfg(tmp_path, one_device):
    return toys.recipe(toys.write_texts(tmp_path / "texts"), **GPT2)


@pytest.fixture
def peer_there():
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"no {name}: pip install -e '.[peer]' to compare with it")


def test_the_real_training_is_measured(cfg, tmp_path, capsys):
    found = bench.measure(cfg, rounds=3, seconds=0.01)
    assert found["tokens_per_step"] == 16 * 32
    assert 0 < found["tokens_per_second_spread"]["min"] <= found["tokens_per_second"]
    assert found["tokens_per_second"] <= found["tokens_per_second_spread"]["max"]
    assert found["tokens_per_cpu_second"] > 0
    assert found["mfu"] is None and 0 < found["share_of_matmul"] < 1  # the peak of a CPU is not known
    assert found["seconds_to_first_step"] == pytest.approx(sum(found["seconds_of_it"].values()))
    json.dumps(found)
    bench.show(found)
    assert f"{found['parameters']:,}" in capsys.readouterr().out


def test_the_timed_training_learns(cfg, tmp_path):
    own = bench.prepare(cfg, keep_start=False)
    assert own.start is None
    assert own.advance(20) < own.loss - 0.5


def test_the_peer_computes_the_same_steps(cfg, tmp_path, peer_there):
    found = bench.measure(cfg, rounds=2, seconds=0.01, peer=True)
    peer = found["peer"]
    for name, tolerance in (("loss_at_start", bench.AGREE_AT_START), ("loss_after_a_step", bench.AGREE_AFTER)):
        assert peer[name]["peer"] == pytest.approx(peer[name]["own"], rel=tolerance)
    assert peer["loss_after_a_step"]["own"] != peer["loss_at_start"]["own"]
    assert peer["ratio"]["min"] <= peer["ratio"]["median"] <= peer["ratio"]["max"]
    assert peer["activation"] == "gelu_new"
    bench.show(found)


@pytest.mark.parametrize("path", ["embed/position_embedding", "decoder/layers/attention/key/kernel"])
def test_a_peer_with_other_weights_is_not_timed(path, cfg, tmp_path, peer_there, monkeypatch):
    rename = transformers_gpt2.weights

    def moved(params, num_layers):
        flat = {key: np.array(x) for key, x in transformers_gpt2.param_paths.flatten(params).items()}
        flat[path] += 0.05 * np.arange(flat[path].size).reshape(flat[path].shape) % 0.3
        return rename(transformers_gpt2.param_paths.unflatten(flat), num_layers)

    monkeypatch.setattr(transformers_gpt2, "weights", moved)
    with pytest.raises(bench.Disagree, match="does not compute the same: loss"):
        bench.measure(cfg, rounds=1, seconds=0.01, peer=True)


def test_a_peer_with_another_learning_rate_is_not_timed(cfg, tmp_path, peer_there, monkeypatch):
    make = transformers_gpt2.make

    def slower(cfg, params, rates, *rest):
        return make(cfg, params, (0.9 * rate for rate in rates), *rest)

    monkeypatch.setattr(transformers_gpt2, "make", slower)
    with pytest.raises(bench.Disagree):
        bench.measure(cfg, rounds=1, seconds=0.01, peer=True)


@pytest.fixture
def short(monkeypatch):
    """A config whose learned positions suffice for the ids that --generate decodes, of which there are few."""
    monkeypatch.setattr(generation, "PROMPT", 6)
    monkeypatch.setattr(generation, "NEW", 4)
    monkeypatch.setattr(generation, "ROWS", (1, 3))


def test_generating_is_measured(cfg, short, capsys):
    found = generation.measure(cfg, rounds=2)
    assert all(found["rows"][rows]["own"]["tokens_per_second"] > 0 for rows in (1, 3)) and "peer" not in found
    generation.show(json.loads(json.dumps(found)))
    assert f"{found['parameters']:,}" in capsys.readouterr().out


def test_a_peer_generates_the_same_ids_and_others_are_not_timed(cfg, short, peer_there, monkeypatch):
    found = generation.measure(cfg, rounds=1, peer=True)
    assert found["rows"][3]["ratio"]["median"] > 0
    generation.show(found)
    make = transformers_gpt2.generator

    def wrong(*given):
        generate = make(*given)
        return lambda prompts: [generate(prompts)[0] for _ in prompts]

    monkeypatch.setattr(transformers_gpt2, "generator", wrong)
    with pytest.raises(bench.Disagree, match="does not generate the same ids for 2 of 3 prompts"):
        generation.measure(cfg, rounds=1, peer=True)


def test_a_model_that_is_no_decoder_is_not_measured_generating(tmp_path):
    other = toys.recipe(toys.write_texts(tmp_path / "texts"), task__name="prefix_lm", model__kind="prefix_decoder")
    with pytest.raises(ConfigError, match=r"--generate measures a decoder, and 'model\.kind' is prefix_decoder"):
        generation.measure(other, rounds=1)


def test_a_missing_peer_is_an_error_that_names_the_extra(cfg, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"torch and transformers not installed: pip install -e '\.\[peer\]'"):
        transformers_gpt2.check(cfg, "cpu")


def test_a_config_that_is_no_gpt2_is_refused_and_its_keys_are_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    changed = {"model__position": "rope", "optim__name": "lion", "data__mask_documents": True}
    other = toys.recipe(toys.write_texts(tmp_path / "texts"), **GPT2 | changed)
    with pytest.raises(ConfigError, match=r"data\.mask_documents \(False\).*optim\.name.*model\.position"):
        transformers_gpt2.check(other, "cpu")
    plain = toys.recipe(tmp_path / "texts", **GPT2)
    model = transformer.resolve(plain.model, vocab_size=300, seq_len=32)
    for key, value in (("scale_logits", True), ("unused_positions", 2), ("tie_embeddings", False)):
        other = dataclasses.replace(plain, model=dataclasses.replace(model, **{key: value}))
        with pytest.raises(ConfigError, match=rf"these keys differ: model\.{key}$"):
            transformers_gpt2.check(other, "cpu")
    with pytest.raises(ConfigError, match="JAX is on gpu"):
        transformers_gpt2.check(other, "gpu")


def call(*arguments):
    """(exit status, output) of the command."""
    command = [sys.executable, "tools/bench.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def test_the_input_pipeline_is_measured(tmp_path):
    file = tmp_path / "figures.json"
    status, said = call("--input", "--megabytes=1,2", "--seconds=0.02", f"--json={file}")
    assert status == 0, said
    found = json.loads(file.read_text())
    assert set(found["megabytes"]) == {"1", "2"} and "on the fly" in said
    assert found["prepared_tokens_per_second"] > 0 and found["ratio_to_copy"] > 0


def test_checkpoints_are_measured_beside_orbax_alone(tmp_path):
    file = tmp_path / "figures.json"
    status, said = call("--checkpoint", "--megabytes=2", "--rounds=2", f"--json={file}")
    assert status == 0, said
    found = json.loads(file.read_text())
    assert found["megabytes"] == pytest.approx(2, rel=0.1) and found["ratio"].keys() == {
        "save",
        "load",
        "save_cpu",
        "load_cpu",
    }
    assert 0 < found["own"]["blocked"] <= found["own"]["save"] and found["copy_seconds"] > 0
    assert "medians of 2 rounds" in said
    assert "expected a whole number, such as 500" in call("--checkpoint", "--megabytes=2,3")[1]


def test_without_config_and_input_there_is_an_error():
    status, said = call()
    assert status == 1 and "one of --config=configs/NAME.py, --input and --checkpoint" in said


def test_the_benchmark_recipe_is_a_gpt2(monkeypatch, one_device):
    from configs.bench import cpu_gpt2
    from lm import run as run_lib

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    transformers_gpt2.check(run_lib.plan(build_config(cpu_gpt2.get_config()), None).cfg, "cpu")
    assert "torch" not in sys.modules or importlib.util.find_spec("torch")
