"""Optimizers against float64 references, stacked weights against single ones, what is frozen and what decays."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm import optim, param_paths
from lm.config import OptimConfig
from lm.config.schema import ConfigError
from lm.optim import trainable

NAMES = ("adamw", "lion", "adafactor", "muon")
SHAPES = {
    "embed/embedding": (16, 8),
    "decoder/layers/attention_norm/scale": (3, 8),
    "decoder/layers/mlp/up/kernel": (3, 8, 24),
    "decoder/layers/mlp/up/bias": (3, 24),
    "decoder/layers/mlp/down/kernel": (3, 24, 8),
    "decoder/final_norm/scale": (8,),
    "lm_head/kernel": (8, 16),
}
UNIT = OptimConfig(learning_rate=1.0, schedule="constant", weight_decay=0.0, clip_norm=0.0)
FREEZE_EMBED = (("embed/.*", 0.0), (".*", 1.0))


def random_tree(seed, shapes=SHAPES, scale=1.0):
    rng = np.random.default_rng(seed)
    return param_paths.unflatten({p: jnp.asarray(scale * rng.normal(size=s), jnp.float32) for p, s in shapes.items()})


def build(cfg, params, **lengths):
    lengths = {"total_steps": 100, "warmup_steps": 0, "decay_steps": 0} | lengths
    return optim.build(cfg, jax.eval_shape(lambda: params), **lengths)


@functools.cache  # also of what is compiled: jax.jit knows a function it has seen
def standard(name):
    """An optimizer of all SHAPES: linear from 1 at step 0 to 0 at step 5, clipped, without decay."""
    return build(dataclasses.replace(UNIT, name=name, schedule="linear", clip_norm=1.0), random_tree(0), total_steps=5)


def one_step(optimizer, grads, params, step=0):
    return jax.jit(optimizer.update)(grads, jax.jit(optimizer.init)(params), params, jnp.int32(step))


def directions(optimizer, grads_of_steps):
    """What each step subtracts at learning rate 1; path -> float64."""
    params = grads_of_steps[0]
    state, update, out = jax.jit(optimizer.init)(params), jax.jit(optimizer.update), []
    zeros = jax.tree.map(jnp.zeros_like, params)
    for grads in grads_of_steps:
        moved, state, _ = update(grads, state, zeros, jnp.int32(0))
        out.append({path: -np.asarray(leaf, np.float64) for path, leaf in param_paths.flatten(moved).items()})
    return out


def relative_error(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


# --- one optimizer step against float64 references ---


def reference_run(cfg, params, grads_of_steps, lr_of_steps, multiplier, decayed):
    """AdamW and Lion as their papers write them, in float64."""
    params = {path: np.asarray(leaf, np.float64) for path, leaf in param_paths.flatten(params).items()}
    mean, square = ({path: np.zeros_like(leaf) for path, leaf in params.items()} for _ in range(2))
    norms = []
    for t, (grads, lr) in enumerate(zip(grads_of_steps, lr_of_steps, strict=True), start=1):
        grads = {path: np.asarray(leaf, np.float64) for path, leaf in param_paths.flatten(grads).items()}
        norms.append(math.sqrt(sum((g**2).sum() for g in grads.values())))
        clip = min(1.0, cfg.clip_norm / norms[-1]) if cfg.clip_norm else 1.0
        for path, param in params.items():
            g, m, v = grads[path] * clip, mean[path], square[path]
            if cfg.name == "adamw":
                mean[path] = cfg.b1 * m + (1 - cfg.b1) * g
                square[path] = cfg.b2 * v + (1 - cfg.b2) * g**2
                unbiased = mean[path] / (1 - cfg.b1**t), square[path] / (1 - cfg.b2**t)
                direction = unbiased[0] / (np.sqrt(unbiased[1]) + cfg.eps)
            else:
                direction = np.sign(cfg.b1 * m + (1 - cfg.b1) * g)
                mean[path] = cfg.b2 * m + (1 - cfg.b2) * g
            decay = cfg.weight_decay if decayed(path) else 0.0
            params[path] = param - lr * multiplier(path) * (direction + decay * param)
    return params, norms


@pytest.mark.parametrize("name", ["adamw", "lion"])
@pytest.mark.parametrize("clip_norm", [0.0, 5.0])
def test_steps_match_the_float64_reference(name, clip_norm):
    cfg = OptimConfig(
        name=name,
        learning_rate=0.1,
        schedule="linear",
        clip_norm=clip_norm,
        lr_rules=((".*/mlp/.*", 0.5), (".*norm/.*", 2.0), (".*", 1.0)),
        eps=1e-3,  # large enough to be seen
    )
    params = random_tree(0)
    grads_of_steps = [random_tree(seed, scale=0.1 if seed % 3 == 0 else 1.0) for seed in range(1, 7)]  # norms 4 and 40
    optimizer = build(cfg, params, total_steps=8, warmup_steps=2)
    state, now, update = optimizer.init(params), params, jax.jit(optimizer.update)
    norms = []
    for step, grads in enumerate(grads_of_steps):
        now, state, info = update(grads, state, now, jnp.int32(step))
        norms.append(info["grad_norm"])

    expected, expected_norms = reference_run(
        cfg,
        params,
        grads_of_steps,
        [0.05, 0.1, 0.1, 0.1 * 5 / 6, 0.1 * 4 / 6, 0.1 * 3 / 6],
        lambda path: 0.5 if "/mlp/" in path else 2.0 if "norm/" in path else 1.0,
        lambda path: path.endswith(("kernel", "embedding")),
    )
    np.testing.assert_allclose(norms, expected_norms, rtol=1e-6)
    for path, leaf in param_paths.flatten(now).items():
        assert relative_error(leaf, expected[path]) < 1e-6, path


def test_decay_rules_choose_what_decays():
    params = random_tree(0)
    cfg = dataclasses.replace(UNIT, weight_decay=0.5, decay_rules=(("lm_head/.*", True), (".*", False)))
    optimizer = build(cfg, params)
    assert [path for path, decayed in optimizer.selection.decayed.items() if any(decayed)] == ["lm_head/kernel"]
    zeros = jax.tree.map(jnp.zeros_like, params)
    moved, _, _ = one_step(optimizer, zeros, params)
    for path, leaf in param_paths.flatten(moved).items():
        np.testing.assert_array_equal(
            leaf, param_paths.flatten(params)[path] * (0.5 if path == "lm_head/kernel" else 1)
        )


@pytest.mark.parametrize("name", NAMES)
def test_learning_rate_zero_changes_no_parameter(name):
    params, optimizer = random_tree(0), standard(name)
    moved, _, info = one_step(optimizer, random_tree(1), params, step=5)
    assert info["learning_rate"] == 0
    jax.tree.map(np.testing.assert_array_equal, moved, params)
    moved, _, _ = one_step(optimizer, random_tree(1), params, step=4)
    for path, leaf in param_paths.flatten(moved).items():
        assert not np.array_equal(leaf, param_paths.flatten(params)[path])


@pytest.mark.parametrize("name", NAMES)
def test_gradient_of_zero_moves_nothing(name):
    params = random_tree(0)
    moved, _, info = one_step(standard(name), jax.tree.map(jnp.zeros_like, params), params)
    assert info["grad_norm"] == 0
    jax.tree.map(np.testing.assert_array_equal, moved, params)


# --- rules and freezing ---


@pytest.mark.parametrize("name", NAMES)
def test_frozen_parameters_hold_no_state(name):
    params = random_tree(0)
    optimizer = build(OptimConfig(name=name, lr_rules=FREEZE_EMBED), params)
    assert [path for path, trained in optimizer.selection.trained.items() if not trained] == ["embed/embedding"]
    assert optimizer.selection.lr_multiplier["embed/embedding"] == (0,)
    trained = trainable.trained_part(optimizer.selection, params)
    state = jax.eval_shape(optimizer.init, trained)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert any("lm_head" in name for name in names)
    assert not any("embed" in name for name in names)


def test_grad_norm_and_new_parameters_are_of_the_trained_ones_alone():
    optimizer = build(OptimConfig(lr_rules=FREEZE_EMBED), random_tree(0))
    trained = trainable.trained_part(optimizer.selection, random_tree(0))
    grads = trainable.trained_part(optimizer.selection, random_tree(1))
    moved, _, info = one_step(optimizer, grads, trained)
    assert param_paths.flatten(moved).keys() == SHAPES.keys() - {"embed/embedding"}
    squares = [(np.asarray(leaf, np.float64) ** 2).sum() for leaf in jax.tree.leaves(grads)]
    np.testing.assert_allclose(info["grad_norm"], math.sqrt(sum(squares)), rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("only", ["lm_head/.*", ".*/up/kernel"])
def test_one_trained_parameter_is_enough(name, only):
    params = random_tree(0)
    optimizer = build(OptimConfig(name=name, lr_rules=((only, 1.0), (".*", 0.0))), params)
    trained = trainable.trained_part(optimizer.selection, params)
    state = jax.eval_shape(optimizer.init, trained)
    moved, after, _ = jax.eval_shape(optimizer.update, trained, state, trained, jnp.int32(0))
    assert jax.tree.structure(moved) == jax.tree.structure(trained) and len(jax.tree.leaves(moved)) == 1
    assert jax.tree.structure(after) == jax.tree.structure(state)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"lr_rules": (("lm_haed/.*", 0.1), (".*", 1.0))}, r"'optim\.lr_rules'.*'lm_haed/\.\*'.*'lm_head'"),
        ({"decay_rules": ((".*kernal", True), (".*", False))}, r"'optim\.decay_rules'.*'\.\*kernal'.*'kernel'"),
        ({"lr_rules": (("decoder/.*", 1.0),)}, r"'optim\.lr_rules'.*no rule covers.*'embed/embedding'"),
        ({"lr_rules": (("embed/.*", -0.5), (".*", 1.0))}, r"'optim\.lr_rules': 'embed/\.\*'.*negative.*-0\.5"),
        ({"lr_rules": ((".*", 0.0),)}, r"'optim\.lr_rules' freezes every parameter"),
        ({"schedule": "wsd"}, r"wsd, but no 'optim\.decay_steps"),
    ],
)
def test_invalid_rules_are_refused(cfg, message):
    with pytest.raises(ConfigError, match=message):
        build(OptimConfig(**cfg), random_tree(0))


def test_trained_parameters_must_be_float32_and_frozen_ones_need_not():
    params = random_tree(0)
    params["embed"]["embedding"] = params["embed"]["embedding"].astype(jnp.bfloat16)
    with pytest.raises(ValueError, match=r"'embed/embedding' is bfloat16"):
        build(OptimConfig(), params)
    assert not build(OptimConfig(lr_rules=FREEZE_EMBED), params).selection.trained["embed/embedding"]


def test_update_refuses_frozen_parameters():
    params = random_tree(0)
    optimizer = build(OptimConfig(lr_rules=FREEZE_EMBED), params)
    with pytest.raises(ValueError, match=r"exactly the trained.*embed/embedding"):
        optimizer.update(params, optimizer.init(params), params, jnp.int32(0))


# --- stacked weights ---


def test_muon_on_stacked_kernels_is_muon_on_each_layer_alone():
    shapes = {"decoder/layers/wide/kernel": (9, 4, 6), "decoder/layers/tall/kernel": (3, 12, 5)}
    grads_of_steps = [random_tree(seed, shapes) for seed in range(3)]
    got = directions(build(dataclasses.replace(UNIT, name="muon"), grads_of_steps[0]), grads_of_steps)
    alone = optax.contrib.scale_by_muon(beta=UNIT.b1, eps=UNIT.eps)  # its default: one matrix
    update_alone = jax.jit(alone.update)
    for path, (layers, rows, columns) in shapes.items():
        for layer in range(layers):
            state = alone.init(jnp.zeros((rows, columns)))
            for step, grads in enumerate(grads_of_steps):
                expected, state = update_alone(param_paths.flatten(grads)[path][layer], state)
                expected = 0.2 * math.sqrt(max(rows, columns)) * np.asarray(expected)
                np.testing.assert_allclose(got[step][path][layer], expected, rtol=1e-4, atol=1e-5)


def test_muon_makes_each_layer_orthogonal_at_the_scale_of_adamw():
    for step in directions(standard("muon"), [random_tree(1), random_tree(2)]):
        for path in ("decoder/layers/mlp/up/kernel", "decoder/layers/mlp/down/kernel"):
            for update in step[path]:
                singular = np.linalg.svd(update / (0.2 * math.sqrt(24)), compute_uv=False)
                assert singular.min() > 0.6 and singular.max() < 1.3, singular
                assert 0.12 < np.sqrt((update**2).mean()) < 0.26


def test_muon_leaves_all_but_the_layers_kernels_to_adamw():
    muon, adamw = (directions(standard(name), [random_tree(1), random_tree(2)])[-1] for name in ("muon", "adamw"))
    same = {path for path in muon if np.array_equal(muon[path], adamw[path])}
    assert same == SHAPES.keys() - {"decoder/layers/mlp/up/kernel", "decoder/layers/mlp/down/kernel"}


def reference_adafactor(grads_of_steps, b1, b2, eps):
    """One weight, float64: Shazeer & Stern's algorithm 4 without parameter scale, decay capped by b2, with momentum."""
    row, column, whole, mean, out = 0.0, 0.0, 0.0, 0.0, []
    for t, grad in enumerate(grads_of_steps, start=1):
        decay, square = min(b2, 1 - t**-0.8), grad**2 + eps**2
        if grad.ndim == 2:
            row = decay * row + (1 - decay) * square.mean(1)
            column = decay * column + (1 - decay) * square.mean(0)
            update = grad / np.sqrt(np.outer(row, column) / row.mean())
        else:
            whole = decay * whole + (1 - decay) * square
            update = grad / np.sqrt(whole)
        update /= max(1.0, np.sqrt((update**2).mean()))
        mean = b1 * mean + (1 - b1) * update
        out.append(mean / (1 - b1**t))
    return out


@pytest.mark.parametrize("b1", [0.0, 0.9])
def test_adafactor_on_stacked_weights_is_the_reference_on_each_layer_alone(b1, monkeypatch):
    monkeypatch.setattr(optim.optimizer, "ADAFACTOR_MIN_DIM", 4)
    shapes = {
        "decoder/layers/a/kernel": (9, 4, 6),  # the layer axis is the largest
        "decoder/layers/b/kernel": (9, 12, 5),
        "decoder/layers/b/bias": (9, 8),  # must not be factored over layers
        "embed/embedding": (8, 6),
        "decoder/final_norm/scale": (6,),
    }
    grads_of_steps = [random_tree(seed, shapes) for seed in range(6)]
    for step, grads in enumerate(grads_of_steps):  # uneven layers and steps: statistics shared by layers would show
        for path, leaf in param_paths.flatten(grads).items():
            scale = 10.0 ** jnp.arange(leaf.shape[0]) if "layers" in path else jnp.ones(leaf.shape[0])
            scaled = leaf * scale.reshape(-1, *[1] * (leaf.ndim - 1)) * 3.0**step
            grads_of_steps[step] = param_paths.unflatten(param_paths.flatten(grads_of_steps[step]) | {path: scaled})
    cfg = dataclasses.replace(UNIT, name="adafactor", b1=b1, b2=0.7, eps=0.1)
    got = directions(build(cfg, grads_of_steps[0]), grads_of_steps)
    for path in shapes:
        history = [np.asarray(param_paths.flatten(grads)[path], np.float64) for grads in grads_of_steps]
        for layer in range(shapes[path][0]) if "layers" in path else [...]:
            expected = reference_adafactor([grad[layer] for grad in history], b1, cfg.b2, cfg.eps)
            for step, want in enumerate(expected):
                assert relative_error(got[step][path][layer], want) < 1e-6, (path, layer, step)


def test_adafactor_holds_factored_moments_of_large_matrices():
    shapes = {"decoder/layers/mlp/up/kernel": (2, 128, 256), "embed/embedding": (300, 128)}
    cfg = OptimConfig(name="adafactor", b1=0.0)
    abstract = param_paths.unflatten({path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()})
    state = jax.eval_shape(build(cfg, abstract).init, abstract)
    largest = max(math.prod(leaf.shape) for leaf in jax.tree.leaves(state))
    assert largest == 2 * 256  # one column moment for each layer


# --- how the state lies on devices ---


@pytest.mark.parametrize("name", NAMES)
def test_state_specs_follow_the_parameters(name, monkeypatch):
    monkeypatch.setattr(optim.optimizer, "ADAFACTOR_MIN_DIM", 8)
    params = random_tree(0)
    optimizer = build(OptimConfig(name=name, lr_rules=FREEZE_EMBED), params)
    trained = trainable.trained_part(optimizer.selection, params)
    specs = param_paths.map_with_path(lambda path, leaf: PartitionSpec(*[None] * (leaf.ndim - 1), "fsdp"), trained)
    abstract = jax.eval_shape(lambda: trained)
    got = optim.state_specs(optimizer, abstract, specs)

    state = jax.eval_shape(optimizer.init, abstract)
    assert jax.tree.structure(got) == jax.tree.structure(state)
    shapes = {path: leaf.shape for path, leaf in param_paths.flatten(trained).items()}
    like_parameters = 0
    for (key, leaf), spec in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(got), strict=True):
        path = "/".join(entry.key for entry in key if isinstance(entry, jax.tree_util.DictKey))
        owner = next((p for p in shapes if path.endswith(p)), None)
        matches = owner is not None and shapes[owner] == leaf.shape
        like_parameters += matches
        assert spec == (param_paths.flatten(specs)[owner] if matches else PartitionSpec()), key
    per_parameter = {"adamw": 2, "lion": 1, "adafactor": 1, "muon": 1}[name]
    assert like_parameters >= per_parameter * len(shapes)

    mesh = Mesh(np.array(jax.devices()), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    placed = jax.jit(optimizer.init, out_shardings=jax.tree.map(lambda s: NamedSharding(mesh, s), got))(trained)
    jax.tree.map(np.testing.assert_array_equal, placed, jax.jit(optimizer.init)(trained))


@pytest.mark.parametrize("name", NAMES)
def test_moments_are_float32_and_keep_shape_and_dtype_over_a_step(name):
    params, optimizer = random_tree(0), standard(name)
    before, (_, after, info) = jax.jit(optimizer.init)(params), one_step(optimizer, random_tree(1), params)
    described = [
        [
            (jax.tree_util.keystr(path), leaf.shape, leaf.dtype)
            for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        ]
        for state in (before, after)
    ]
    assert described[0] == described[1]
    assert {dtype for _, shape, dtype in described[0] if shape} == {jnp.dtype("float32")}
    assert {value.dtype for value in info.values()} == {jnp.dtype("float32")}
