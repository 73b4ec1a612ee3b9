"""lm/checkpoint/init_from.py: rules decide where each parameter comes from, and nothing but parameters is read."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from lm import checkpoint, optim, param_paths, step, train
from lm import run as run_lib
from lm.checkpoint import CheckpointError, init_from
from lm.config import CheckpointConfig, Config, ModelConfig, OptimConfig, TrainConfig, schema
from lm.config.schema import ConfigError
from lm.data import tokenizer
from lm.models import transformer
from lm.types import TrainState

SMALL = ModelConfig(num_layers=1, embed_dim=8, num_heads=2, mlp_dim=12)
SEED = 5


@functools.cache
def model_of(cfg: ModelConfig = SMALL, seq_len: int = 8):
    """(functions, abstract parameters on one device)."""
    model = transformer.text_model(transformer.resolve(cfg, vocab_size=toys.VOCAB, seq_len=seq_len), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)))
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return model, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes)


@functools.cache
def fresh_of():
    """The parameters that the model's `init` makes from `SEED`."""
    return jax.jit(model_of()[0].init)(jax.random.key(SEED))


def save(workdir, params, ema=None, number: int = 7) -> checkpoint.Saved:
    """A run's checkpoint with a step and an optimizer's state beside the parameters."""
    moments = {"mu": toys.random_like(params, 99)}
    state = TrainState(jnp.int32(number), params, moments, ema, jnp.int32(2))
    with checkpoint.Checkpoints(workdir, CheckpointConfig()) as saves:
        saves.save(number, state, {"config": schema.to_dict(Config()), "data": {}, "tokenizer_hash": "abc"}, None)
    return checkpoint.choose(str(workdir))


def initialize(saved, rules, cfg: ModelConfig = SMALL):
    """(flat parameters, origins, unused) of a new run."""
    model, abstract = model_of(cfg)
    origin_of, unused = init_from.sources(abstract, rules, saved)
    params, origin = init_from.initialize(model, abstract, SEED, saved, origin_of)
    assert jax.tree.structure(params) == jax.tree.structure(abstract)
    return param_paths.flatten(params), origin, unused


def same(a, b) -> bool:
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_keep_reads_every_parameter(tmp_path):
    old = toys.random_like(model_of()[1], 0)
    got, origin, unused = initialize(save(tmp_path / "old", old), ((".*", "keep"),))
    for path, leaf in param_paths.flatten(old).items():
        assert same(got[path], leaf) and origin[path] == "old@7"
    assert got.keys() == origin.keys() and unused == []


def test_reinit_initialises_as_the_model_would_and_keeps_the_rest(tmp_path):
    old = toys.random_like(model_of()[1], 0)
    rules = ((r"decoder/layers/mlp/.*|embed/embedding", "reinit"), (".*", "keep"))
    got, origin, unused = initialize(save(tmp_path, old), rules)
    fresh, kept = param_paths.flatten(fresh_of()), param_paths.flatten(old)
    anew = {path for path in got if "/mlp/" in path or path == "embed/embedding"}
    assert len(anew) == 5 and {path for path, text in origin.items() if text == "initialised"} == anew
    for path, leaf in got.items():
        assert same(leaf, fresh[path] if path in anew else kept[path]), path
    assert unused == sorted(anew)


def test_averaged_parameters_are_preferred(tmp_path):
    """The average has the trained parameters only; frozen ones are read from the parameters."""
    old, average = toys.random_like(model_of()[1], 0), toys.random_like(model_of()[1], 1)
    ema = param_paths.select(average, {path: "/mlp/" in path for path in param_paths.flatten(old)})
    got, origin, _ = initialize(save(tmp_path / "old", old, ema), ((".*", "keep"),))
    for path, leaf in got.items():
        tree, name = (average, "old@7 ema") if "/mlp/" in path else (old, "old@7")
        assert same(leaf, param_paths.flatten(tree)[path]) and origin[path] == name


def test_renamed_parameters_are_read_from_the_path_with_groups_filled_in(tmp_path):
    old = toys.random_like(model_of()[1], 0)
    flat = param_paths.flatten(old)
    moved = {path.replace("decoder/layers/", "encoder/stack/"): leaf for path, leaf in flat.items()}
    moved["table"] = moved.pop("embed/embedding")
    moved["extra/kernel"] = jnp.ones(3)
    rules = (
        (r"decoder/layers/(\w+)/(.*)", r"encoder/stack/\1/\2"),
        (r"embed|embed/embedding", "table"),  # the whole path is replaced, whichever alternative is tried first
        (".*", "keep"),
    )
    got, _, unused = initialize(save(tmp_path, param_paths.unflatten(moved)), rules)
    assert unused == ["extra/kernel"]
    for path, leaf in flat.items():
        assert same(got[path], leaf), path


def refusal(saved, rules, cfg: ModelConfig = SMALL, seq_len: int = 8) -> str:
    with pytest.raises(ConfigError) as error:
        init_from.sources(model_of(cfg, seq_len)[1], rules, saved)
    return str(error.value)


def test_rules_that_do_not_fit_are_refused_with_advice(tmp_path):
    old = param_paths.flatten(toys.random_like(model_of()[1], 0))
    old["decoder/final_norm/scales"] = old.pop("decoder/final_norm/scale")
    saved = save(tmp_path, param_paths.unflatten(old))
    keep = ((".*", "keep"),)
    missing = refusal(saved, keep)
    assert "has no parameter 'decoder/final_norm/scale'" in missing and str(saved.path) in missing
    assert "'decoder/final_norm/scales'" in missing, "the nearest name"
    assert "add the rule ('decoder/final_norm/scale', 'reinit')" in missing
    reinit = (("decoder/final_norm/scale", "reinit"), (".*", "keep"))
    longer = refusal(saved, reinit, seq_len=16)
    assert "'embed/position_embedding' has shape (16, 8)" in longer and "has (8, 8)" in longer
    assert "rule ('embed/position_embedding', 'reinit')" in longer
    assert "'init_rules': rule 'embde/.*' matches no parameter" in refusal(saved, (("embde/.*", "reinit"), *keep))
    assert "no rule covers parameter" in refusal(saved, reinit[:1])
    bad_group = refusal(saved, ((r"decoder/(.*)", r"old/\2"), *keep))
    assert "'init_rules': 'old/\\\\2' is no path to read 'decoder/final_norm/bias' from" in bad_group
    with pytest.raises(CheckpointError, match=r"'init_rules' read no parameter from .*checkpoints/7"):
        initialize(saved, ((".*", "reinit"),))


def test_parameters_that_are_not_used_are_named(tmp_path):
    untied = dataclasses.replace(SMALL, tie_embeddings=False)
    saved = save(tmp_path, toys.random_like(model_of(untied)[1], 0))
    origin_of, unused = init_from.sources(model_of()[1], (("embed/position.*", "reinit"), (".*", "keep")), saved)
    assert unused == ["embed/position_embedding", "lm_head/kernel"]
    old, new = ModelConfig(num_heads=2), ModelConfig(num_heads=4)
    assert init_from.describe(origin_of, unused, saved, old, new).splitlines() == [
        f"init_from {saved.path}: {len(origin_of) - 1} parameters read",
        "  initialised (1): embed/position_embedding",
        "  not used (2): embed/position_embedding, lm_head/kernel",
        "  model.num_heads: 2 there, 4 here",
    ]


def test_a_fine_tuned_run_can_be_fine_tuned_again(tmp_path):
    rules = ((r"embed/position_embedding", "reinit"), (".*", "keep"))
    first = toys.random_like(model_of()[1], 0)
    second, _, _ = initialize(save(tmp_path / "a", first), rules)
    saved = save(tmp_path / "b", param_paths.unflatten(second), ema=param_paths.unflatten(second), number=3)
    third, origin, _ = initialize(saved, ((".*", "keep"),))
    assert all(same(third[path], second[path]) for path in second)
    assert set(origin.values()) == {"b@3 ema"}


def test_nothing_but_parameters_is_read(tmp_path):
    """Step, moments and skipped steps start at zero, the average at the parameters."""
    model, abstract = model_of()
    old = toys.random_like(abstract, 0)
    saved = save(tmp_path, old)
    saved.info["config"] = schema.to_dict(Config(train=TrainConfig(total=schema.Duration(steps=1))))
    optimizer = optim.build(OptimConfig(schedule="constant"), abstract, total_steps=1, warmup_steps=0, decay_steps=0)
    cfg = dataclasses.replace(Config(seed=SEED), optim=OptimConfig(ema_decay=0.9))
    program = SimpleNamespace(
        model=model,
        init_state=functools.partial(step.init_state, optimizer=optimizer, use_ema=True),
        abstract_state=SimpleNamespace(params=abstract),
        state_shardings=jax.tree.leaves(abstract)[0].sharding,
    )
    origin_of, unused = init_from.sources(abstract, ((".*", "keep"),), saved)
    plan = SimpleNamespace(init=saved, origin_of=origin_of, unused=unused, words=init_from.NO_TABLES)
    said = []
    state, position, _ = train.restore(SimpleNamespace(program=program, plan=plan, cfg=cfg), [], said.append)
    assert (int(state.step), int(state.skipped), position.example) == (0, 0, 0)
    want = step.init_state(old, optimizer, use_ema=True)
    jax.tree.map(np.testing.assert_array_equal, state, want)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.opt_state))
    assert said[0].startswith(f"init_from {saved.path}: ")


def test_from_scratch_equals_the_models_init():
    model, abstract = model_of()
    params, origin = init_from.initialize(model, abstract, SEED, None, {})
    assert set(origin.values()) == {"initialised"}
    jax.tree.map(lambda a, b: None if same(a, b) else pytest.fail(), params, fresh_of())


def test_fine_tuning_with_another_tokenizer_is_refused_before_data_is_read(tmp_path):
    words = {}
    for name, text in {"old": "some words and more of them", "other": "some other words, more of those"}.items():
        words[name] = tokenizer.train([text] * 20, 285, 10_000)
        (tmp_path / name).mkdir()
        words[name].save(tmp_path / name / "tokenizer.model")
    info = {"config": schema.to_dict(Config()), "data": {}, "tokenizer_hash": words["old"].hash}
    with checkpoint.Checkpoints(tmp_path / "old", CheckpointConfig()) as saves:
        saves.save(1, {"params": {"embed": jnp.ones(3)}}, info, None)
    files = [str(tmp_path / name / "tokenizer.model") for name in ("other", "old")]
    cfg = toys.recipe(tmp_path / "no_data", init_from=str(tmp_path / "old"), tokenizer__path=files[0])
    with pytest.raises(ConfigError, match="the tokenizers differ, so that the same ids would stand for") as error:
        run_lib.plan(cfg, tmp_path / "new")
    for file, name in zip(files, ("other", "old"), strict=True):
        assert f"{words[name].hash[:12]}  {file}" in str(error.value)
    # The same if the file in the old run's folder is not the tokenizer it was trained with.
    words["other"].save(files[1])
    with pytest.raises(ConfigError, match=f"{words['old'].hash[:12]}  {tmp_path}/old/checkpoints/1"):
        run_lib.plan(dataclasses.replace(cfg, tokenizer=dataclasses.replace(cfg.tokenizer, path="")), tmp_path / "new")


# Other numbers of ids -------------------------------------------------------------------------------------------------


def tables_of(cfg, old, new):
    axes = param_paths.flatten(model_of(cfg)[0].logical_axes())
    return init_from.tables(axes, old, new)


@pytest.mark.parametrize("rows", [toys.VOCAB - 3, toys.VOCAB, toys.VOCAB + 40])
@pytest.mark.parametrize("tie", [True, False])
def test_new_ids_begin_as_the_mean_of_the_others_and_the_table_says_so(tmp_path, rows, tie):
    cfg = dataclasses.replace(SMALL, tie_embeddings=tie, vocab_size=toys.VOCAB)
    old = toys.random_like(model_of(cfg)[1], 0)
    saved = save(tmp_path, old)
    trained, ids = toys.VOCAB - 5, toys.VOCAB - 4  # padding rows at the end, of which one becomes an id
    there = dataclasses.replace(cfg, vocab_size=rows)
    model = transformer.text_model(transformer.resolve(there, vocab_size=rows, seq_len=8), jnp.float32)
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), abstract)
    words = tables_of(cfg, trained, ids)
    assert len(words.axes) == (1 if tie else 2)
    origin_of, _ = init_from.sources(abstract, ((".*", "keep"),), saved, words)
    params, origin = init_from.initialize(model, abstract, SEED, saved, origin_of, words)
    flat, before = param_paths.flatten(params), param_paths.flatten(old)
    for path, value in flat.items():
        if path not in words.axes:
            np.testing.assert_array_equal(value, before[path])
            continue
        axis = words.axes[path]
        value, was = (np.moveaxis(np.asarray(x), axis, 0) for x in (value, before[path]))
        np.testing.assert_array_equal(value[:trained], was[:trained])
        np.testing.assert_allclose(value[trained:], np.tile(was[:trained].mean(0), (rows - trained, 1)), rtol=1e-6)
        assert origin[path].endswith(f", rows {trained} to {rows} their mean")


def test_without_new_ids_every_row_is_read_as_it_is(tmp_path):
    old = toys.random_like(model_of()[1], 0)
    saved, (model, abstract) = save(tmp_path, old), model_of()
    words = tables_of(SMALL, toys.VOCAB, toys.VOCAB)
    origin_of, _ = init_from.sources(abstract, ((".*", "keep"),), saved, words)
    params, origin = init_from.initialize(model, abstract, SEED, saved, origin_of, words)
    jax.tree.map(np.testing.assert_array_equal, params, old)
    assert not any("mean" in text for text in origin.values())


def test_only_tables_of_ids_may_have_another_size(tmp_path):
    saved = save(tmp_path, toys.random_like(model_of()[1], 0))
    wider = model_of(dataclasses.replace(SMALL, embed_dim=16))[1]
    with pytest.raises(ConfigError, match="has shape"):
        init_from.sources(wider, ((".*", "keep"),), saved, tables_of(SMALL, 3, toys.VOCAB))
