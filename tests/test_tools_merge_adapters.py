"""tools/merge_adapters.py: a merged run computes the same; an extracted run is attached to its own base only."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from lm import checkpoint, lease, param_paths
from lm import run as run_lib
from lm.config import schema
from tests import test_run, tool_modules, toys

ROOT = Path(__file__).resolve().parents[1]
LORA = {
    "adapter__kind": "lora",
    "adapter__rank": 2,
    "init_rules": common.fresh_adapters(),
    "optim__lr_rules": ((r".*final_norm.*", 1.0), *common.lora_rules()),
}


def call(*arguments):
    """Exit code of the command: None, or its error message."""
    try:
        tool_modules.call("merge_adapters", *arguments)
    except SystemExit as end:
        return end.code
    return None


@pytest.fixture
def runs(tmp_path):
    """A base, and a run that trained LoRA and the final norm on it."""
    test_run.write_run(tmp_path / "base", {1: 0.5})
    _, _, params, words = run_lib.load_model(str(tmp_path / "base"))
    save_tuned(tmp_path, params, words, **LORA)
    return tmp_path


def save_tuned(folder, base_params, words, **changes):
    cfg = toys.recipe(folder / "no_data", **test_run.TINY | {"init_from": str(folder / "base")} | changes)
    planned = run_lib.plan(cfg, None)
    rng = np.random.default_rng(0)

    def value(path, leaf):
        moved = path not in param_paths.flatten(base_params) or "final_norm" in path
        return (
            jnp.asarray(rng.normal(size=leaf.shape), jnp.float32) if moved else param_paths.flatten(base_params)[path]
        )

    params = param_paths.map_with_path(value, planned.abstract_params)
    (folder / "tuned").mkdir()
    words.save(folder / "tuned" / "tokenizer.model")
    info = {"config": schema.to_dict(planned.cfg), "tokenizer_hash": words.hash, "data": {"example": 32}}
    with checkpoint.Checkpoints(folder / "tuned", cfg.checkpoint) as saves:
        saves.save(7, {"params": params}, info, {"loss": 0.25})


def hidden(folder):
    cfg, model, params, _ = run_lib.load_model(str(folder))
    return cfg, params, np.asarray(jax.jit(model.apply)(params, toys.batch(2, 16)).hidden_BxLxD)


def test_a_merged_run_computes_the_same_and_starts_another(runs):
    assert call("merge", runs / "tuned", runs / "merged") is None
    cfg, params, got = hidden(runs / "merged")
    _, _, want = hidden(runs / "tuned")
    assert cfg.adapter.kind == "none" and cfg.init_from == ""
    assert not any("lora_" in path for path in param_paths.flatten(params))
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
    assert np.abs(want - hidden(runs / "base")[2]).max() > 0.1
    saved = checkpoint.choose(f"{runs / 'merged'}@best")
    assert (saved.step, saved.metrics, saved.info["data"]) == (7, {"loss": 0.25}, {"example": 32})
    planned = run_lib.plan(toys.recipe(runs / "no_data", **test_run.TINY, init_from=str(runs / "merged")), runs / "new")
    assert planned.unused == [] and all(planned.origin_of.values())


def test_an_extracted_run_is_small_and_is_attached_to_its_base_bitwise(runs):
    assert call("extract", runs / "tuned", runs / "small") is None
    arrays = checkpoint.choose(str(runs / "small")).info["arrays"]
    assert arrays and all("lora_" in name or "final_norm" in name for name in arrays)
    shutil.move(runs / "tuned", runs / "gone")
    assert call("attach", runs / "small", runs / "whole") is None
    _, want, _ = hidden(runs / "gone")
    _, got, _ = hidden(runs / "whole")
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_another_base_is_refused(runs):
    call("extract", runs / "tuned", runs / "small")
    shutil.move(runs / "base", runs / "moved")
    assert "no checkpoint under" in call("attach", runs / "small", runs / "whole")
    assert call("attach", runs / "small", runs / "whole", f"--base={runs / 'moved'}") is None
    test_run.write_run(runs / "base", {2: 0.5})  # other parameters under the same name
    error = call("attach", runs / "small", runs / "again")
    assert "is not the base of" in error and "decoder/layers/attention/key/bias' differs" in error
    assert not (runs / "again").exists()


def test_an_impossible_command_is_an_error_in_one_line(runs):
    assert "exists already" in call("merge", runs / "tuned", runs / "base")
    with lease.hold(runs / "held"):
        assert f"{runs / 'held'} is in use by process " in call("merge", runs / "tuned", runs / "held")
    assert "'adapter.kind' is none: only lora can be merged" in call("merge", runs / "base", runs / "out")
    assert "has no frozen base" in call("extract", runs / "base", runs / "out")
    assert "was not made by 'extract'" in call("attach", runs / "base", runs / "out")
    assert not (runs / "out").exists()
