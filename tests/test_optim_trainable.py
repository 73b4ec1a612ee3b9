"""lm/optim/trainable.py: the rules train the layers that they name, and change nothing else, bit for bit."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from lm import checkpoint, optim, param_paths, step, train
from lm import run as run_lib
from lm.config import AdapterConfig, CheckpointConfig, MeshConfig, OptimConfig
from lm.config.schema import ConfigError
from lm.models import transformer
from lm.optim import trainable
from lm.parallel import sharding
from lm.parallel.mesh import make_mesh
from tests import test_run, test_step, toys

LAYERS = 3
SHAPES = {
    "decoder/layers/mlp/up/kernel": (LAYERS, 4, 6),
    "decoder/layers/mlp/up/bias": (LAYERS, 6),
    "decoder/final_norm/scale": (4,),
    "embed/embedding": (8, 4),
    "head/out/kernel": (4, 2),
}
# A small rate: what rounding does to a step (Muon's orthogonalisation most of all) stays below the tolerances, whatever
# the compiler; a wrong moment or a leaf that moves does not.
BASE = OptimConfig(learning_rate=0.01, schedule="constant", eps=1e-3)
LAST_TWO = ((r"decoder/layers/[12]/.*", 1.0), (r"head/.*", 2.0), (r".*", 0.0))


def random_tree(seed):
    rng = np.random.default_rng(seed)
    return param_paths.unflatten({p: jnp.asarray(rng.normal(size=s), jnp.float32) for p, s in SHAPES.items()})


def build(cfg, params, total_steps=10):
    abstract = jax.eval_shape(lambda: params)
    return optim.build(cfg, abstract, total_steps=total_steps, warmup_steps=0, decay_steps=0)


def unstack(tree):
    """The tree with a leaf for each layer, under names that the code does not treat as stacked."""
    out = {}
    for path, leaf in param_paths.flatten(tree).items():
        names = [path.replace("layers/", f"block/{i}/") for i in range(LAYERS)] if "layers" in path else [path]
        out |= dict(zip(names, leaf if "layers" in path else [leaf], strict=True))
    return param_paths.unflatten(out)


def follow(optimizer, params, grads_of_steps, first_step=0, start=None):
    """All parameters and the last optimizer state after some steps."""
    part = trainable.trained_part(optimizer.selection, params)
    state, update = optimizer.init(part), jax.jit(optimizer.update)
    for number, grads in enumerate(grads_of_steps, first_step):
        grads = trainable.trained_part(optimizer.selection, grads)
        part, state, info = update(grads, state, part, jnp.int32(number), start)
    return param_paths.overlay(params, part), state, info


# --- the rules ---


def test_rules_resolve_to_slices():
    got = trainable.resolve(
        dataclasses.replace(BASE, lr_rules=LAST_TWO, unfreeze_rules=((".*/1/.*", 0.07), (".*", 0.0))),
        random_tree(0),
        100,
    )
    assert [path for path, on in got.trained.items() if not on] == ["decoder/final_norm/scale", "embed/embedding"]
    assert got.frozen_layers == {"decoder/layers/mlp/up/bias": 1, "decoder/layers/mlp/up/kernel": 1}
    assert got.lr_multiplier["decoder/layers/mlp/up/bias"] == (0, 1, 1) and got.lr_multiplier["head/out/kernel"] == (2,)
    assert got.decayed["decoder/layers/mlp/up/kernel"] == (True,) * 3
    assert got.start["decoder/layers/mlp/up/kernel"] == (0, 7, 0)  # 0.07 * 100 is 7.000000000000001
    shapes = {
        path: leaf.shape for path, leaf in param_paths.flatten(trainable.trained_part(got, random_tree(0))).items()
    }
    assert shapes == {
        "decoder/layers/mlp/up/bias": (2, 6),
        "decoder/layers/mlp/up/kernel": (2, 4, 6),
        "head/out/kernel": (4, 2),
    }
    abstract = trainable.trained_part(got, jax.eval_shape(lambda: random_tree(0)))
    assert {path: leaf.shape for path, leaf in param_paths.flatten(abstract).items()} == shapes


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
def test_rules_that_are_no_slice_of_layers_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        build(dataclasses.replace(BASE, **changes), random_tree(0))


# --- the optimizer ---


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_layers_of_a_stack_are_updated_like_separate_parameters(name):
    """Rates, decay, freezing, gradual unfreezing and clipping, against a tree with a leaf for each layer."""
    cfg = dataclasses.replace(
        BASE,
        name=name,
        lr_rules=((r".*/0/.*kernel", 0.0), (r".*/1/.*", 0.5), (r"embed/.*", 0.0), (r".*", 1.0)),
        decay_rules=((r".*/2/.*", True), (r"head/.*", True), (r".*", False)),
        unfreeze_rules=((r".*/1/.*", 0.2), (r".*/0/.*", 0.4), (r"head/.*", 0.2), (r".*", 0.0)),
    )
    params, grads = random_tree(0), [random_tree(seed) for seed in range(1, 7)]
    got, _, info = follow(build(cfg, params), params, grads)
    want, _, expected = follow(build(cfg, unstack(params)), unstack(params), [unstack(tree) for tree in grads])
    for path, leaf in param_paths.flatten(unstack(got)).items():
        np.testing.assert_allclose(leaf, param_paths.flatten(want)[path], rtol=1e-6, atol=1e-7, err_msg=path)
    assert info["grad_norm"] == pytest.approx(float(expected["grad_norm"]), rel=1e-6)
    np.testing.assert_array_equal(
        got["decoder"]["layers"]["mlp"]["up"]["kernel"][0], params["decoder"]["layers"]["mlp"]["up"]["kernel"][0]
    )


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_an_unfrozen_parameter_starts_with_fresh_optimizer_state(name):
    """Before its step neither it nor its state changes; then it is updated as in a run that starts at this step."""
    late = dataclasses.replace(BASE, name=name, clip_norm=0.0, unfreeze_rules=((r".*/[12]/.*", 0.3), (r".*", 0.0)))
    params, grads = random_tree(0), [random_tree(seed) for seed in range(1, 7)]
    before, state, _ = follow(build(late, params), params, grads[:3])
    after, _, _ = follow(build(late, params), params, grads)
    prompt = dataclasses.replace(late, unfreeze_rules=((".*", 0.0),))
    own, _, _ = follow(build(prompt, params), params, grads[3:], first_step=3)
    throughout, _, _ = follow(build(prompt, params), params, grads)
    for path, leaf in param_paths.flatten(params).items():
        held = slice(1, None) if "layers" in path else slice(0, 0)
        free = slice(0, 1) if "layers" in path else slice(None)
        flat = [np.asarray(param_paths.flatten(tree)[path]) for tree in (before, after, own, throughout)]
        np.testing.assert_array_equal(flat[0][held], leaf[held])
        assert not np.array_equal(flat[0][free], leaf[free])
        np.testing.assert_allclose(flat[1][held], flat[2][held], rtol=1e-6, atol=1e-7, err_msg=path)
        np.testing.assert_allclose(flat[1][free], flat[3][free], rtol=1e-6, atol=1e-7, err_msg=path)
    waiting = build(late, params).init(params)[1][1]
    jax.tree.map(np.testing.assert_array_equal, state[1][1], waiting)


def test_gradients_of_frozen_parameters_do_not_count_for_clipping():
    cfg = dataclasses.replace(BASE, unfreeze_rules=((r"head/.*", 0.0), (r".*", 0.5)))
    grads = [random_tree(1)]
    _, _, info = follow(build(cfg, random_tree(0)), random_tree(0), grads)
    assert info["grad_norm"] == pytest.approx(float(np.linalg.norm(grads[0]["head"]["out"]["kernel"])), rel=1e-6)


def test_l2_sp_matches_its_formula():
    """Li et al. 2018, equation 3, with the head's penalty towards 0: float64, gradients of 0."""
    cfg = dataclasses.replace(
        BASE,
        name="lion",
        learning_rate=0.1,
        l2_sp=0.3,
        weight_decay=0.2,
        decay_rules=(("head/.*", True), (".*", False)),
        lr_rules=LAST_TWO,
    )
    params, start = random_tree(0), random_tree(1)
    zeros = jax.tree.map(jnp.zeros_like, params)
    optimizer = build(cfg, params)
    anchors = trainable.trained_part(optimizer.selection, start)
    del anchors["head"]
    got, _, _ = follow(optimizer, params, [zeros] * 2, start=anchors)
    for path, leaf in param_paths.flatten(got).items():
        want, origin = (np.asarray(param_paths.flatten(tree)[path], np.float64) for tree in (params, start))
        rate, target, weight = (0.2, 0.0, 0.2) if "head" in path else (0.1, origin, 0.3)
        moved = target + (want - target) * (1 - rate * weight) ** 2
        learns = np.arange(len(want)) >= (1 if "layers" in path else 0 if "head" in path else len(want))
        np.testing.assert_allclose(leaf, np.where(learns.reshape(-1, *[1] * (want.ndim - 1)), moved, want), rtol=1e-6)


def test_specs_follow_slices_and_groups():
    cfg = dataclasses.replace(BASE, lr_rules=LAST_TWO, unfreeze_rules=((".*/1/.*", 0.5), (".*", 0.0)))
    optimizer = build(cfg, random_tree(0))
    part = trainable.trained_part(optimizer.selection, random_tree(0))
    specs = param_paths.map_with_path(lambda path, leaf: jax.P(*[None] * (leaf.ndim - 1), path), part)
    got = optim.state_specs(optimizer, jax.eval_shape(lambda: part), specs)
    assert jax.tree.structure(got) == jax.tree.structure(optimizer.init(part))
    groups = [state.mu for state in got[1]]
    assert [sorted(param_paths.flatten(group)) for group in groups] == [
        sorted(param_paths.flatten(part)),
        sorted(param_paths.flatten(part))[:2],
    ]
    for group in groups:
        assert param_paths.flatten(group) == {
            path: param_paths.flatten(specs)[path] for path in param_paths.flatten(group)
        }


# --- the step, on a model with LoRA: at its start it computes what the base does ---

RULES = (
    (r"decoder/layers/1/mlp/.*(kernel|bias)", 1.0),
    (r".*/lora_.*|.*final_norm.*", 1.0),
    (r".*", 0.0),
)
LEARN = dataclasses.replace(
    BASE, lr_rules=RULES, unfreeze_rules=((r".*/1/mlp/up/kernel", 0.1), (".*", 0.0)), l2_sp=0.1, weight_decay=0.1
)


def first_layer(path):
    """Number of frozen entries of axis 0 of a leaf, written down by hand from RULES."""
    if "lora_" in path or "final_norm" in path:
        return 0
    return 1 if "/mlp/" in path else 10**6


@functools.cache
def model():
    cfg, _, base, batch, (_, weight, grads) = test_step.expected("gpt2")
    adapter = AdapterConfig("lora", rank=2, dropout=0.3, targets=".*/(query|down)")
    fns = transformer.text_model(cfg, jnp.float32, None, adapter)
    fresh = param_paths.flatten(jax.jit(fns.init)(jax.random.key(0)))
    params = param_paths.unflatten(fresh | param_paths.flatten(base))
    return test_step.loss_of(fns, cfg), fns, jax.device_get(params), batch, jax.tree.map(lambda g: g / weight, grads)


def anchored():
    return {path: "/mlp/" in path and "lora_" not in path for path in param_paths.flatten(model()[2])}


@functools.cache
def learn():
    return build(LEARN, model()[2])


@functools.cache
def compiled(optimizer_of, mixout, micro_batches):
    one = functools.partial(step.train_step, loss_fn=model()[0], optimizer=optimizer_of(), seed=3, ema_decay=0.9)
    return jax.jit(functools.partial(one, micro_batches=micro_batches, mixout=mixout))


def run(optimizer_of, steps, *, devices=1, micro_batches=1, state=None, mixout=0.3):
    """Jitted steps on a mesh; the state comes back on the host."""
    _, fns, params, batch, _ = model()
    sizes = {1: MeshConfig(data=1), 8: MeshConfig(data=2, fsdp=2, tensor=2)}[devices]
    mesh = make_mesh(sizes, jax.devices()[:devices])
    rows = batch["tokens"].shape[0]
    with jax.set_mesh(mesh):
        placed = sharding.to_global(batch, sharding.local_rows(mesh, rows), rows, mesh)
        if state is None:
            where = param_paths.map_with_path(
                lambda _, a: jax.NamedSharding(mesh, sharding.spec(a)), fns.logical_axes()
            )
            state = step.init_state(jax.device_put(params, where), optimizer_of(), use_ema=True, anchored=anchored())
        for _ in range(steps):
            state, _ = compiled(optimizer_of, mixout, micro_batches)(state, placed)
    return jax.device_get(state)


@functools.cache
def after(steps):
    return run(learn, steps)


def test_the_gradient_is_that_of_the_slice():
    """Against the float64 reference's gradient of all layers, micro-batches and all; 0 at every other place."""
    *_, params, _, grads = model()

    def seen():
        moved = lambda grads, state, p, step, start: (jax.tree.map(jnp.add, p, grads), state, {})  # noqa: E731
        return learn()._replace(init=lambda p: (), update=moved)

    flat, before = param_paths.flatten(run(seen, 1, micro_batches=2, mixout=0.0).params), param_paths.flatten(params)
    for path, want in param_paths.flatten(grads).items():
        first = first_layer(path)
        np.testing.assert_array_equal(flat[path][:first], before[path][:first])
        got = flat[path][first:] - before[path][first:]
        assert np.abs(got - want[first:]).max(initial=0) <= 1e-5 * np.abs(want).max() + 1e-6, path
        assert not got.size or np.abs(got).max() > 1e-4


def test_nothing_outside_the_selection_changes_a_bit_or_holds_state():
    before, state = param_paths.flatten(model()[2]), after(3)
    sizes = {path: leaf[first_layer(path) :].size for path, leaf in before.items() if leaf[first_layer(path) :].size}
    for path, leaf in param_paths.flatten(state.params).items():
        first = first_layer(path)
        np.testing.assert_array_equal(leaf[:first], before[path][:first])
        assert not leaf[first:].size or not np.array_equal(leaf[first:], before[path][first:]), path
    held = [leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert len(held) == 2 * len(sizes) and sum(held) == 2 * sum(sizes.values())
    assert {path: leaf.size for path, leaf in param_paths.flatten(state.ema).items()} == sizes
    for path, leaf in param_paths.flatten(state.start).items():
        np.testing.assert_array_equal(leaf, before[path][1:])


def test_the_average_of_a_slice_is_evaluated_in_its_place():
    state = after(3)
    got = param_paths.flatten(step.eval_params(jax.device_put(state)))
    for path, leaf in param_paths.flatten(state.params).items():
        ema = param_paths.flatten(state.ema).get(path, leaf[:0])
        np.testing.assert_array_equal(got[path], np.concatenate([leaf[: len(leaf) - len(ema)], ema]))


def test_a_mesh_takes_the_steps_of_one_device_with_slices():
    """Micro-batches, mixout, LoRA's dropout, a late start and the draw to the start, all at once on 2 x 2 x 2."""
    one, other = after(3), run(learn, 3, devices=8, micro_batches=2)
    test_step.assert_close(other.params, one.params, 1e-5)
    for got, want in zip(jax.tree.leaves(other.opt_state), jax.tree.leaves(one.opt_state), strict=True):
        assert np.abs(got - want).max() <= 1e-5 * max(np.abs(want).max(), 1e-3)


def test_a_resumed_run_with_slices_is_the_uninterrupted_one_bitwise(tmp_path):
    state = jax.device_put(after(1))
    with checkpoint.Checkpoints(tmp_path, CheckpointConfig()) as saves:
        saves.save(1, state, {"config": {}}, None)
    assert checkpoint.list_saved(tmp_path)[0].info["arrays"]["start/decoder/layers/mlp/up/kernel"]["shape"] == [
        1,
        16,
        24,
    ]
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    loaded = checkpoint.load(checkpoint.choose(str(tmp_path)), abstract)
    resumed = run(learn, 2, state=loaded)
    assert jax.tree.structure(resumed) == jax.tree.structure(after(3))
    jax.tree.map(np.testing.assert_array_equal, resumed, after(3))


# --- a whole run ---


@pytest.mark.slow
def test_a_run_with_all_of_it_resumes_bitwise_and_starts_another(tmp_path, monkeypatch):
    """`init_from`, LoRA, the last layer, a late start, the draw to the start, mixout, the average: through lm.train."""
    one_device = toys.use_one_device(monkeypatch)
    tiny = test_run.TINY | {"model__num_layers": 2}
    test_run.write_run(tmp_path / "base", {1: 0.5}, **tiny)
    cfg = toys.recipe(
        toys.write_texts(tmp_path / "texts", 20),
        **tiny,
        init_from=str(tmp_path / "base"),
        init_rules=common.fresh_adapters(),
        adapter__kind="lora",
        adapter__dropout=0.2,
        optim__lr_rules=((".*/lora_.*", 2.0), *common.last_layers(1, 2)),
        optim__unfreeze_rules=((".*/1/mlp/.*", 0.5), (".*", 0.0)),
        optim__l2_sp=0.1,
        optim__mixout=0.2,
        train__total_steps=4,
        checkpoint__every_steps=2,
        checkpoint__keep_best=0,
        eval__at_start=False,
    )
    train.train(cfg, tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "4")
    (tmp_path / "again" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "base")  # a run that has begun no longer needs it
    summary = train.train(cfg, tmp_path / "again")
    first, second = (checkpoint.choose(f"{tmp_path / name}@4").info["arrays"] for name in ("run", "again"))
    assert first == second
    assert first["start/decoder/layers/mlp/up/kernel"]["shape"] == [1, 8, 16]
    assert first["ema/decoder/layers/mlp/up/kernel"]["shape"] == [1, 8, 16]
    assert "start/decoder/layers/attention/query/lora_a" not in first and "ema/embed/embedding" not in first
    trained = sum(np.prod(entry["shape"]) for name, entry in first.items() if name.startswith("ema/"))
    assert summary["trained_parameters"] == trained

    state = checkpoint.choose(str(tmp_path / "run"))
    params = param_paths.flatten(run_lib.load_model(str(tmp_path / "run"))[2])
    name = "decoder/layers/mlp/up/kernel"
    wanted = {
        f"{kind}/{name}": jax.ShapeDtypeStruct((n, 8, 16), jnp.float32, sharding=sharding.replicated(one_device))
        for kind, n in (("ema", 1), ("params", 2))
    }
    read = param_paths.flatten(checkpoint.load(state, param_paths.unflatten(wanted)))
    np.testing.assert_array_equal(params[name], np.concatenate([read[f"params/{name}"][:1], read[f"ema/{name}"]]))


@pytest.mark.parametrize("key", ["l2_sp", "mixout"])
def test_a_pull_to_the_start_without_init_from_is_refused(tmp_path, key):
    cfg = toys.recipe(tmp_path / "no_data", **test_run.TINY, **{f"optim__{key}": 0.1})
    with pytest.raises(ConfigError, match=rf"'optim\.{key}' pulls parameters back to their values in 'init_from'"):
        run_lib.plan(cfg, None)
