"""What learns is what the rules say, layer by layer, and nothing else moves: not a bit of it, not a moment."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import checkpoint, optim, selection, sharding, step, trees
from lm.config import CheckpointConfig, MeshConfig, OptimConfig
from lm.schema import ConfigError
from tests import test_step, toys

LAYERS = 3
SHAPES = {
    "decoder/layers/mlp/up/kernel": (LAYERS, 4, 6),
    "decoder/layers/mlp/up/bias": (LAYERS, 6),
    "decoder/final_norm/scale": (4,),
    "embed/embedding": (8, 4),
    "head/out/kernel": (4, 2),
}
BASE = OptimConfig(learning_rate=0.1, schedule="constant", eps=1e-3)
LAST_TWO = ((r"decoder/layers/[12]/.*", 1.0), (r"head/.*", 2.0), (r".*", 0.0))


def random_tree(seed):
    rng = np.random.default_rng(seed)
    return trees.unflatten({p: jnp.asarray(rng.normal(size=s), jnp.float32) for p, s in SHAPES.items()})


def build(cfg, params, total_steps=10):
    abstract = jax.eval_shape(lambda: params)
    return optim.build(cfg, abstract, total_steps=total_steps, warmup_steps=0, decay_steps=0)


def apart(tree):
    """Every layer as a leaf of its own, under a name that the code does not know as stacked."""
    out = {}
    for path, leaf in trees.flatten(tree).items():
        names = [path.replace("layers/", f"block/{i}/") for i in range(LAYERS)] if "layers" in path else [path]
        out |= dict(zip(names, leaf if "layers" in path else [leaf], strict=True))
    return trees.unflatten(out)


def follow(optimizer, params, grads_of_steps, first_step=0, start=None):
    """All parameters and the last optimizer state after some steps."""
    part = selection.trained_part(optimizer.selection, params)
    state, update = optimizer.init(part), jax.jit(optimizer.update)
    for number, grads in enumerate(grads_of_steps, first_step):
        grads = selection.trained_part(optimizer.selection, grads)
        part, state, info = update(grads, state, part, jnp.int32(number), start)
    return trees.overlay(params, part), state, info


# --- the rules ---


def test_rules_resolve_to_slices():
    got = selection.resolve(
        dataclasses.replace(BASE, lr_rules=LAST_TWO, unfreeze_rules=((".*/1/.*", 0.7), (".*", 0.0))), random_tree(0), 10
    )
    assert [path for path, on in got.trained.items() if not on] == ["decoder/final_norm/scale", "embed/embedding"]
    assert got.frozen_layers == {"decoder/layers/mlp/up/bias": 1, "decoder/layers/mlp/up/kernel": 1}
    assert got.lr_multiplier["decoder/layers/mlp/up/bias"] == (0, 1, 1) and got.lr_multiplier["head/out/kernel"] == (2,)
    assert got.decayed["decoder/layers/mlp/up/kernel"] == (True,) * 3
    assert got.start["decoder/layers/mlp/up/kernel"] == (0, 7, 0)  # 0.7 * 10 is 7.000000000000001
    shapes = {path: leaf.shape for path, leaf in trees.flatten(selection.trained_part(got, random_tree(0))).items()}
    assert shapes == {
        "decoder/layers/mlp/up/bias": (2, 6),
        "decoder/layers/mlp/up/kernel": (2, 4, 6),
        "head/out/kernel": (4, 2),
    }
    abstract = selection.trained_part(got, jax.eval_shape(lambda: random_tree(0)))
    assert {path: leaf.shape for path, leaf in trees.flatten(abstract).items()} == shapes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr_rules": ((".*/1/.*", 1.0), (".*", 0.0))}, r"'optim\.lr_rules' train the layers \[1\] of '.*up/bias'"),
        ({"lr_rules": ((".*/1/.*", 0.0), (".*", 1.0))}, r"train the layers \[0, 2\] of '.*up/bias', which has 3"),
        ({"lr_rules": ((".*/3/.*", 0.0), (".*", 1.0))}, r"'optim\.lr_rules': rule '\.\*/3/\.\*' matches no parameter"),
        ({"unfreeze_rules": ((".*", 1.5),)}, r"'optim\.unfreeze_rules': '\.\*' has 1\.5; expected a share"),
        ({"unfreeze_rules": (("embed/.*", 0.0),)}, r"'optim\.unfreeze_rules': no rule covers"),
    ],
)
def test_rules_that_no_slice_can_follow_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        build(dataclasses.replace(BASE, **changes), random_tree(0))


# --- the optimizer ---


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor"])
def test_layers_under_rules_move_as_parameters_of_their_own(name):
    """Rates, decay, freezing, late starts and clipping, against a tree in which each layer is a leaf of its own."""
    cfg = dataclasses.replace(
        BASE,
        name=name,
        lr_rules=((r".*/0/.*kernel", 0.0), (r".*/1/.*", 0.5), (r"embed/.*", 0.0), (r".*", 1.0)),
        decay_rules=((r".*/2/.*", True), (r"head/.*", True), (r".*", False)),
        unfreeze_rules=((r".*/1/.*", 0.2), (r".*/0/.*", 0.4), (r"head/.*", 0.2), (r".*", 0.0)),
    )
    params, grads = random_tree(0), [random_tree(seed) for seed in range(1, 7)]
    got, _, info = follow(build(cfg, params), params, grads)
    want, _, expected = follow(build(cfg, apart(params)), apart(params), [apart(tree) for tree in grads])
    for path, leaf in trees.flatten(apart(got)).items():
        np.testing.assert_allclose(leaf, trees.flatten(want)[path], rtol=1e-6, atol=1e-7, err_msg=path)
    assert info["grad_norm"] == pytest.approx(float(expected["grad_norm"]), rel=1e-6)
    np.testing.assert_array_equal(
        got["decoder"]["layers"]["mlp"]["up"]["kernel"][0], params["decoder"]["layers"]["mlp"]["up"]["kernel"][0]
    )


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon"])
def test_a_parameter_held_back_begins_as_a_run_of_its_own(name):
    """Nothing of it moves before its step, moments and counts included; then it moves as if all had begun there."""
    late = dataclasses.replace(BASE, name=name, clip_norm=0.0, unfreeze_rules=((r".*/[12]/.*", 0.3), (r".*", 0.0)))
    params, grads = random_tree(0), [random_tree(seed) for seed in range(1, 7)]
    before, state, _ = follow(build(late, params), params, grads[:3])
    after, _, _ = follow(build(late, params), params, grads)
    prompt = dataclasses.replace(late, unfreeze_rules=((".*", 0.0),))
    own, _, _ = follow(build(prompt, params), params, grads[3:], first_step=3)
    throughout, _, _ = follow(build(prompt, params), params, grads)
    for path, leaf in trees.flatten(params).items():
        held = slice(1, None) if "layers" in path else slice(0, 0)
        free = slice(0, 1) if "layers" in path else slice(None)
        flat = [np.asarray(trees.flatten(tree)[path]) for tree in (before, after, own, throughout)]
        np.testing.assert_array_equal(flat[0][held], leaf[held])
        assert not np.array_equal(flat[0][free], leaf[free])
        np.testing.assert_allclose(flat[1][held], flat[2][held], rtol=1e-6, atol=1e-7, err_msg=path)
        np.testing.assert_allclose(flat[1][free], flat[3][free], rtol=1e-6, atol=1e-7, err_msg=path)
    waiting = build(late, params).init(params)[1][1]
    jax.tree.map(np.testing.assert_array_equal, state[1][1], waiting)


def test_gradients_of_what_waits_do_not_count_for_clipping():
    cfg = dataclasses.replace(BASE, unfreeze_rules=((r"head/.*", 0.0), (r".*", 0.5)))
    grads = [random_tree(1)]
    _, _, info = follow(build(cfg, random_tree(0)), random_tree(0), grads)
    assert info["grad_norm"] == pytest.approx(float(np.linalg.norm(grads[0]["head"]["out"]["kernel"])), rel=1e-6)


def test_the_start_draws_as_l2_sp_writes_it():
    """Li et al. 2018, equation 3, with the head's penalty towards 0: float64, gradients of 0."""
    cfg = dataclasses.replace(
        BASE,
        name="lion",
        to_init=0.3,
        weight_decay=0.2,
        decay_rules=(("head/.*", True), (".*", False)),
        lr_rules=LAST_TWO,
    )
    params, start = random_tree(0), random_tree(1)
    zeros = jax.tree.map(jnp.zeros_like, params)
    optimizer = build(cfg, params)
    anchors = selection.trained_part(optimizer.selection, start)
    del anchors["head"]
    got, _, _ = follow(optimizer, params, [zeros] * 2, start=anchors)
    for path, leaf in trees.flatten(got).items():
        want, origin = (np.asarray(trees.flatten(tree)[path], np.float64) for tree in (params, start))
        rate, target, weight = (0.2, 0.0, 0.2) if "head" in path else (0.1, origin, 0.3)
        moved = target + (want - target) * (1 - rate * weight) ** 2
        learns = np.arange(len(want)) >= (1 if "layers" in path else 0 if "head" in path else len(want))
        np.testing.assert_allclose(leaf, np.where(learns.reshape(-1, *[1] * (want.ndim - 1)), moved, want), rtol=1e-6)


def test_specs_follow_slices_and_groups():
    cfg = dataclasses.replace(BASE, lr_rules=LAST_TWO, unfreeze_rules=((".*/1/.*", 0.5), (".*", 0.0)))
    optimizer = build(cfg, random_tree(0))
    part = selection.trained_part(optimizer.selection, random_tree(0))
    specs = trees.map_with_path(lambda path, leaf: jax.P(*[None] * (leaf.ndim - 1), path), part)
    got = optim.state_specs(optimizer, jax.eval_shape(lambda: part), specs)
    assert jax.tree.structure(got) == jax.tree.structure(optimizer.init(part))
    groups = [state.mu for state in got[1]]
    assert [sorted(trees.flatten(group)) for group in groups] == [
        sorted(trees.flatten(part)),
        sorted(trees.flatten(part))[:2],
    ]
    for group in groups:
        assert trees.flatten(group) == {path: trees.flatten(specs)[path] for path in trees.flatten(group)}


# --- the step, on a model ---

TAIL = ((r"decoder/layers/1/.*", 1.0), (r".*final_norm.*", 1.0), (r".*", 0.0))


@functools.cache
def model():
    cfg, _, params, batch, (_, weight, grads) = test_step.expected("gpt2")
    fns = toys.decoder(toys.GPT2, test_step.SEQ_LEN)[1]
    return test_step.loss_of(fns, cfg), fns, params, batch, jax.tree.map(lambda g: g / weight, grads)


def run(optimizer, steps=1, devices=1, micro_batches=1, state=None, mixout=0.0, anchored=None):
    """Jitted steps on a mesh; the state comes back on the host."""
    loss_fn, fns, params, batch, _ = model()
    sizes = {1: MeshConfig(data=1), 8: MeshConfig(data=2, fsdp=2, tensor=2)}[devices]
    mesh = sharding.make_mesh(sizes, jax.devices()[:devices])
    rows = batch["tokens"].shape[0]
    with jax.set_mesh(mesh):
        placed = sharding.to_global(batch, sharding.local_rows(mesh, rows), rows, mesh)
        if state is None:
            axes = fns.logical_axes()
            where = trees.map_with_path(lambda _, a: jax.NamedSharding(mesh, sharding.spec(a)), axes)
            state = step.init_state(jax.device_put(params, where), optimizer, use_ema=True, anchored=anchored)
        one = functools.partial(step.train_step, loss_fn=loss_fn, optimizer=optimizer, seed=3, ema_decay=0.9)
        jitted = jax.jit(functools.partial(one, micro_batches=micro_batches, mixout=mixout))
        for _ in range(steps):
            state, _ = jitted(state, placed)
    return jax.device_get(state)


def tail_optimizer(**changes):
    return build(dataclasses.replace(BASE, **({"lr_rules": TAIL} | changes)), model()[2])


def test_the_gradient_is_that_of_the_slice_and_nothing_outside_it_moves():
    """The slice's gradient against the float64 reference's of all layers; the rest keeps its bits over two steps."""
    *_, params, _, grads = model()
    chosen = tail_optimizer()
    seen = chosen._replace(init=lambda p: (), update=lambda grads, state, p, step, start: (grads, state, {}))
    flat, before = trees.flatten(run(seen).params), trees.flatten(params)
    for path, want in trees.flatten(grads).items():
        first = {"decoder/layers": 1, "decoder/final_n": 0}.get(path[:15].rstrip("/"), len(want))
        np.testing.assert_array_equal(flat[path][:first], before[path][:first])
        if want[first:].size and "key/bias" not in path:  # whose exact gradient is 0
            assert np.abs(flat[path][first:] - want[first:]).max() <= 1e-5 * np.abs(want[first:]).max(), path

    state = run(chosen, steps=2)
    for path, leaf in trees.flatten(state.params).items():
        first = 1 if "/layers/" in path else 0 if "final_norm" in path else len(leaf)
        np.testing.assert_array_equal(leaf[:first], before[path][:first])
        assert not leaf[first:].size or not np.array_equal(leaf[first:], before[path][first:])
    trained = {path: leaf for path, leaf in before.items() if "/layers/" in path or "final_norm" in path}
    held = [leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert len(held) == 2 * len(trained)
    assert sum(held) == 2 * sum(leaf.size // (2 if "/layers/" in path else 1) for path, leaf in trained.items())


def test_the_average_of_a_slice_is_evaluated_in_its_place():
    state = run(tail_optimizer(), steps=2)
    got = trees.flatten(step.eval_params(jax.device_put(state)))
    for path, leaf in trees.flatten(state.params).items():
        ema = trees.flatten(state.ema).get(path)
        want = leaf if ema is None else np.concatenate([leaf[: len(leaf) - len(ema)], ema])
        np.testing.assert_array_equal(got[path], want)


STAGED = {"unfreeze_rules": ((r".*/1/.*kernel", 0.1), (".*", 0.0)), "to_init": 0.1}


@functools.cache
def kernels():
    return {path: "mlp" in path for path in trees.flatten(model()[2])}


def test_mesh_and_micro_batches_take_the_steps_of_one_device_with_slices():
    optimizer = tail_optimizer(**STAGED)
    one = run(optimizer, steps=3, mixout=0.3, anchored=kernels())
    assert "mlp" in one.start["decoder"]["layers"] and "attention" not in one.start["decoder"]["layers"]
    for other in (
        run(optimizer, steps=3, mixout=0.3, anchored=kernels(), devices=8),
        run(optimizer, steps=3, mixout=0.3, anchored=kernels(), micro_batches=2),
    ):
        test_step.assert_close(other.params, one.params, 1e-5)
        for got, want in zip(jax.tree.leaves(other.opt_state), jax.tree.leaves(one.opt_state), strict=True):
            assert np.abs(got - want).max() <= 1e-5 * max(np.abs(want).max(), 1e-3)


def test_a_resumed_run_with_slices_is_the_uninterrupted_one_bitwise(tmp_path):
    optimizer = tail_optimizer(**STAGED)
    args = {"mixout": 0.3, "anchored": kernels()}
    state = jax.device_put(run(optimizer, steps=2, **args))
    with checkpoint.Checkpoints(tmp_path, CheckpointConfig()) as saves:
        saves.save(2, state, {"config": {}}, None)
    names = checkpoint.list_saved(tmp_path)[0].info["arrays"]
    assert names["start/decoder/layers/mlp/up/kernel"]["shape"] == [1, 16, 24]
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    resumed = run(optimizer, steps=2, state=checkpoint.load(checkpoint.choose(str(tmp_path)), abstract), **args)
    whole = run(optimizer, steps=4, **args)
    assert jax.tree.structure(resumed) == jax.tree.structure(whole)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)


# --- mixout ---


def test_mixout_is_the_papers_formula_with_a_mask_of_the_step_and_the_path():
    """Lee et al. 2020, section 4: each entry is one of two values, their mean is the parameter; kernels only."""
    now, start, rate = random_tree(0), random_tree(1), 0.25
    del start["head"]
    keys = [jax.random.fold_in(jax.random.key(5), number) for number in range(400)]
    mixed = jax.vmap(lambda key: step.mix(now, start, rate, key))(jnp.stack(keys))
    for path, leaf in trees.flatten(mixed).items():
        w = np.asarray(trees.flatten(now)[path], np.float64)
        if path != "decoder/layers/mlp/up/kernel":  # no kernel, or no start
            np.testing.assert_array_equal(leaf, np.broadcast_to(np.float32(w), leaf.shape))
            continue
        u = np.asarray(trees.flatten(start)[path], np.float64)
        kept, replaced = (w - rate * u) / (1 - rate), (u - rate * u) / (1 - rate)
        leaf = np.asarray(leaf, np.float64)
        is_kept = np.abs(leaf - kept) < 1e-5
        np.testing.assert_allclose(leaf, np.where(is_kept, kept, replaced), rtol=1e-5, atol=1e-6)
        assert is_kept.mean() == pytest.approx(1 - rate, abs=0.01)
        spread = np.abs(w - u) * np.sqrt(rate / (1 - rate) / len(keys))
        assert (np.abs(leaf.mean(0) - w) < 5 * spread + 1e-6).all()
    same, other = (trees.flatten(step.mix(now, start, rate, key)) for key in keys[:2])
    path = "decoder/layers/mlp/up/kernel"
    np.testing.assert_array_equal(same[path], trees.flatten(mixed)[path][0])
    assert not np.array_equal(same[path], other[path])
    assert step.mix(now, start, 0.0, keys[0]) is now


def test_mixout_of_a_step_is_seen_by_the_gradient_and_not_by_the_evaluation():
    """The gradient at the mixture, times m / (1 - rate); the new parameters are moved from the unmixed ones."""
    loss_fn, _, params, batch, _ = model()
    optimizer = tail_optimizer(weight_decay=0.0)
    seen = optimizer._replace(init=lambda p: (), update=lambda grads, state, p, step, start: (grads, state, {}))
    start = jax.tree.map(jnp.zeros_like, selection.trained_part(optimizer.selection, params))
    state = step.init_state(params, seen, use_ema=False, anchored=kernels())._replace(start=start)
    one = functools.partial(step.train_step, loss_fn=loss_fn, optimizer=seen, seed=3, micro_batches=1, ema_decay=0.0)
    got = trees.flatten(jax.jit(functools.partial(one, mixout=0.5))(state, batch)[0].params)

    part = selection.trained_part(optimizer.selection, params)
    mixed = step.mix(part, start, 0.5, jax.random.fold_in(jax.random.key(3), 0))
    total = lambda tree: loss_fn(tree, batch, None).sum  # noqa: E731
    grads = trees.flatten(jax.jit(jax.grad(total))(trees.overlay(params, mixed)))
    weight = batch["loss_weights"].sum()
    for path, leaf in trees.flatten(part).items():
        ratio = np.asarray(trees.flatten(mixed)[path]) / np.asarray(leaf)  # 0 or 2, as the start is 0
        want = np.asarray(grads[path])[-len(leaf) :] / weight * ratio
        np.testing.assert_allclose(got[path][-len(leaf) :], want, rtol=1e-4, atol=1e-7, err_msg=path)
