"""lm/run.py: configs that cannot run are refused before data is read; a finished run can be loaded."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from lm import checkpoint, param_paths, program, step
from lm import run as run_lib
from lm.checkpoint import CheckpointError
from lm.config import MeshConfig, schema
from lm.config.schema import ConfigError
from lm.data import tokenizer
from lm.models import transformer
from lm.parallel.mesh import make_mesh

ROOT = Path(__file__).resolve().parents[1]
TINY = {
    "data__batch_size": 8,
    "model__num_layers": 1,
    "model__embed_dim": 8,
    "model__mlp_dim": 16,
    "data__seq_len": 16,
    "mesh__data": -1,
}


def mesh(**sizes):
    return make_mesh(MeshConfig(**sizes), jax.devices())


def write_run(folder: Path, scores: dict[int, float], **changes):
    """A finished run: its tokenizer, and a checkpoint of random parameters for each step -> metric."""
    folder.mkdir()
    words = tokenizer.train(["alpha beta gamma delta of the a run"] * 9, 285, 10_000)
    words.save(folder / "tokenizer.model")
    cfg = toys.recipe(folder / "no_data", **TINY | changes)
    cfg = dataclasses.replace(cfg, model=transformer.resolve(cfg.model, vocab_size=285, seq_len=16))
    model = transformer.text_model(cfg.model, jnp.float32)
    shapes = jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)))
    info = {"config": schema.to_dict(cfg), "tokenizer_hash": words.hash, "data": {}}
    states = {}
    with checkpoint.Checkpoints(folder, dataclasses.replace(cfg.checkpoint, keep_latest=9)) as saves:
        for number, score in scores.items():
            rng = np.random.default_rng(number)
            states[number] = jax.tree.map(lambda x, rng=rng: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)
            metrics = {cfg.checkpoint.best_metric: score}
            saves.save(number, {"params": states[number]}, info, metrics, words.saved_files)
    return cfg, states


def test_a_stage_of_a_mixture_without_an_example_is_refused(tmp_path):
    paths = [str(toys.write_texts(tmp_path / name, documents=20)) for name in ("web", "books")]
    for share in (1e-9, 0.9999999):
        mixture = ((0.0, paths[0], 1.0), (share, paths[1], 1.0))
        cfg = toys.recipe(tmp_path, data__path="", data__mixture=mixture, train__total_steps=2)
        where = "0.0" if share < 0.5 else "0.9999999"
        with pytest.raises(ConfigError, match=rf"'data\.mixture': the stage that begins at {where} .* none of its 32 "):
            run_lib.prepare(run_lib.plan(cfg, tmp_path / "run"), mesh(data=-1), lambda _: None)


def test_plan_touches_no_device_and_suggests_a_path_for_a_misspelt_rule(tmp_path):
    script = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
import pathlib, toys, jax
from lm import config
from lm import run as run_lib
folder = pathlib.Path({str(tmp_path)!r})
tiny = {TINY}
planned = run_lib.plan(toys.recipe(folder, **tiny), folder / "new")
assert planned.tokenizer is None and planned.cfg.model.vocab_size == 384  # of 300 ids, rounded up
try:
    run_lib.plan(toys.recipe(folder, **tiny, optim__lr_rules=(("decodr/.*", 0.0), (".*", 1.0))), folder / "new")
except config.ConfigError as error:
    print(error)
print("devices touched:", jax._src.xla_bridge.backends_are_initialized())
"""
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    refused, touched = result.stdout.splitlines()
    assert refused.startswith("'optim.lr_rules': rule 'decodr/.*' matches no parameter") and "'decoder'" in refused
    assert touched == "devices touched: False"
    assert not (tmp_path / "new").exists()


def test_plan_finds_the_tokenizer_and_the_parameters_of_init_from(tmp_path):
    write_run(tmp_path / "old", {1: 0.5})
    old = str(tmp_path / "old")
    planned = run_lib.plan(toys.recipe(tmp_path / "no_data", init_from=old, **TINY), tmp_path / "new")
    assert planned.tokenizer.vocab_size == 285 and planned.unused == []
    assert planned.origin_of == {path: f"params/{path}" for path in param_paths.flatten(planned.abstract_params)}


@pytest.mark.parametrize("damage", ["missing", "empty", "flipped"])
def test_a_lost_or_damaged_tokenizer_is_read_from_the_newest_checkpoint_that_has_it(damage, tmp_path, capsys):
    cfg, _ = write_run(tmp_path / "old", {1: 0.5, 2: 0.4})
    path = tmp_path / "old" / "tokenizer.model"
    content = path.read_bytes()
    flipped = toys.flip(content, 8 * 400)
    path.write_bytes({"missing": b"", "empty": b"", "flipped": flipped}[damage])
    if damage == "missing":
        path.unlink()
    (tmp_path / "old/checkpoints/2/tokenizer.model").write_bytes(b"damaged too")
    found = "missing" if damage == "missing" else "not the one saved with step 1"
    said = f"{path} is {found}; it is read from {tmp_path}/old/checkpoints/1\n"
    assert run_lib.load_model(f"{tmp_path}/old@1")[3].model == content
    assert capsys.readouterr().err == said
    resumed = run_lib.plan(cfg, tmp_path / "old")
    assert resumed.tokenizer.model == content and capsys.readouterr().err == said


def test_plan_refuses_configs_that_do_not_fit(tmp_path):
    write_run(tmp_path / "old", {1: 0.5})

    def refusal(error_type=ConfigError, **changes) -> str:
        with pytest.raises(error_type) as error:
            run_lib.plan(toys.recipe(tmp_path / "no_data", **TINY | changes), tmp_path / "new")
        return str(error.value)

    old = str(tmp_path / "old")
    gone = refusal(tokenizer__path="gone.model")
    expected = "the file or folder of a tokenizer, such as RUN/tokenizer.model"
    assert gone == f"'tokenizer.path': no file gone.model; expected {expected}"
    assert (
        refusal(init_from=old, model__vocab_size=128) == "'model.vocab_size' (128) is less than the tokenizer's 285 ids"
    )
    assert "'embed/position_embedding' has shape (32, 8)" in refusal(init_from=old, data__seq_len=32)
    assert "expected latest, best or one of the steps 1" in refusal(CheckpointError, init_from=old + "@2")
    assert "'optim.lr_rules' freeze nothing, so that the whole model would learn" in refusal(adapter__kind="lora")
    assert refusal(CheckpointError, init_from=old + "er").startswith(f"'init_from' is {old}er: no checkpoint under")


@pytest.mark.parametrize(
    ("changes", "sizes", "message"),
    [
        ({"data__batch_size": 12}, {}, "'data.batch_size' (12) must be a multiple of 8: 8 shards of the mesh"),
        (
            {"train__micro_batches": 2},
            {},
            "'data.batch_size' (8) must be a multiple of 16: 8 shards of the mesh x train.micro_batches=2",
        ),
        (
            {"train__micro_batches": 4},
            {"fsdp": 2, "tensor": 2},
            "must be a multiple of 16: 4 shards of the mesh x train.micro_batches=4",
        ),
        ({"eval__batch_size": 9}, {}, "'eval.batch_size' (9) must be a multiple of 8"),
        (
            {"model__num_heads": 8, "model__num_kv_heads": 2},
            {"tensor": 4},
            "mesh.tensor=4 does not divide 2 key/value heads",
        ),
        ({"model__mlp_dim": 18}, {"tensor": 4}, "mesh.tensor=4 does not divide"),
        (
            {"model__embed_dim": 12, "model__num_heads": 2},
            {"fsdp": 8},
            "mesh.fsdp=8 does not divide 'embed' (12) of parameter",
        ),
        (
            {"data__seq_len": 36},
            {"context": 8},
            "mesh.context=8 does not divide the 36 positions of 'tokens': change 'data.seq_len'",
        ),
    ],
)
def test_a_mesh_that_does_not_divide_is_refused_before_data_is_read(changes, sizes, message, tmp_path):
    changes = TINY | {"model__num_heads": 4} | changes
    planned = run_lib.plan(toys.recipe(tmp_path / "no_data", **changes), tmp_path / "new")
    with pytest.raises(ConfigError) as error:
        run_lib.prepare(planned, mesh(**sizes), lambda _: None)
    assert message in str(error.value)


def test_the_state_is_sharded_like_the_parameters_and_durations_become_steps(tmp_path):
    data = toys.write_texts(tmp_path / "data", 20)
    changes = {"data__batch_size": 16, "train__total_steps": 0, "train__total_epochs": 16.0, "eval__every_examples": 40}
    cfg = toys.recipe(data, **TINY | changes | {"optim__lr_rules": (("embed/.*", 0.0), (".*", 1.0))})
    notes = []
    run = run_lib.prepare(run_lib.plan(cfg, tmp_path / "run"), mesh(fsdp=4), notes.append)
    rows = len(run.data.train)
    assert run.program.total_steps == rows and run.every == {"eval": 3, "checkpoint": 0}
    assert any(f"rows {rows}" in note for note in notes)
    assert not (tmp_path / "run").exists(), "nothing is written before the run starts"
    state, optimizer = run.program.abstract_state, run.program.optimizer
    params = param_paths.flatten(state.params)
    for tree in (state.opt_state[1].mu, state.opt_state[1].nu, state.ema):
        flat = param_paths.flatten(tree)
        assert flat.keys() == {path for path in params if not path.startswith("embed/")}, "frozen ones have no state"
        for path, leaf in flat.items():
            assert (leaf.shape, leaf.sharding) == (params[path].shape, params[path].sharding), path
    kernel = params["decoder/layers/mlp/up/kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (1, 2, 16)
    shape = jax.eval_shape(lambda p: step.init_state(p, optimizer, use_ema=True), state.params)
    assert jax.tree.structure(shape) == jax.tree.structure(state)
    got, batches = program.abstract_batch(run.cfg, run.mesh, 16), run_lib.train_batches(run)
    batch = run_lib.placer(run.mesh, 16)(next(batches))
    batches.close()
    assert {key: (x.shape, x.dtype, x.sharding) for key, x in batch.items()} == {
        key: (x.shape, x.dtype, x.sharding) for key, x in got.items()
    }


def test_the_compute_dtype_is_float32_on_cpus_unless_asked():
    assert [program.compute_dtype(name, mesh()) for name in ("auto", "float32", "bfloat16")] == [
        jnp.float32,
        jnp.float32,
        jnp.bfloat16,
    ]


def test_a_finished_run_is_loaded_by_name_and_best_is_by_its_own_metric(tmp_path):
    """Even if the tokenizer that the run was started with no longer exists: the run has its own copy."""
    scores = {1: 0.1, 2: 0.9, 3: 0.2}
    _, states = write_run(
        tmp_path / "run",
        scores,
        checkpoint__best_metric="accuracy",
        tokenizer__path="gone.model",
    )
    for name, number in {"": 3, "@best": 2, "@1": 1}.items():
        cfg, model, params, words = run_lib.load_model(f"{tmp_path}/run{name}")
        assert param_paths.flatten(params).keys() == param_paths.flatten(states[number]).keys()
        jax.tree.map(np.testing.assert_array_equal, params, states[number])
    assert words.vocab_size == 285 and cfg.model.max_len == 16
    batch = {key: jnp.ones((1, 4), jnp.int32) for key in ("tokens", "positions", "segment_ids")}
    assert jax.eval_shape(model.apply, params, batch).hidden_BxLxD.shape == (1, 4, 8)


def test_experts_that_a_loss_does_not_balance_are_refused(tmp_path):
    experts = {"model__num_experts": 4, "model__experts_per_token": 2, "data__packing": "pad"}
    cfg = toys.recipe(tmp_path / "no_data", task__name="classification", task__labels=("a", "b"), **experts)
    with pytest.raises(ConfigError, match=r"'model\.num_experts' is 4, but the loss of task\.name=classification does"):
        run_lib.plan(cfg, None)


def test_a_run_without_its_tokenizer_is_refused(tmp_path):
    write_run(tmp_path / "run", {1: 0.1})
    (tmp_path / "run" / "tokenizer.model").unlink()
    (tmp_path / "run" / "checkpoints/1/tokenizer.model").unlink()  # older versions had none there
    with pytest.raises(ConfigError, match=f"no {tmp_path}/run/tokenizer.model: the checkpoint cannot be used without"):
        run_lib.load_model(str(tmp_path / "run"))
