"""Adapters add exactly 0 at first, are trained alone, and LoRA can be merged into the kernels and unmerged."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from lm import optim, param_paths
from lm.config import AdapterConfig, OptimConfig
from lm.config.schema import ConfigError
from lm.models import adapters, layers, transformer
from lm.optim import trainable
from lm.types import Head
from tests import test_step, toys

ROOT = Path(__file__).resolve().parents[1]
SEQ_LEN = test_step.SEQ_LEN
LORA = AdapterConfig("lora", rank=3, alpha=5.0, targets=r".*/(query|out|up|down)")


@functools.cache
def adapted(style, adapter):
    """Base model, its parameters, the adapted model and its parameters as they begin: those of the base kept."""
    cfg, base, params = toys.decoder(toys.STYLES[style], SEQ_LEN)
    model = transformer.text_model(cfg, jnp.float32, None, adapter)
    fresh = param_paths.flatten(jax.jit(model.init)(jax.random.key(0)))
    return base, params, model, param_paths.unflatten(fresh | param_paths.flatten(params))


def scrambled(params):
    """Adapters whose zeros are gone."""
    rng = np.random.default_rng(1)
    return param_paths.map_with_path(
        lambda path, leaf: leaf + 0.3 * rng.normal(size=leaf.shape).astype(np.float32) if "lora_" in path else leaf,
        params,
    )


def hidden(model, params, batch, **kwargs):
    return np.asarray(jax.jit(functools.partial(model.apply, **kwargs))(params, batch).hidden_BxLxD)


@pytest.mark.parametrize(("style", "kind"), [("gpt2", "lora"), ("llama", "lora"), ("gpt2", "houlsby")])
def test_an_adapter_adds_exactly_nothing_at_the_start(style, kind):
    base, params, model, start = adapted(style, dataclasses.replace(LORA, kind=kind))
    assert len(jax.tree.leaves(start)) > len(jax.tree.leaves(params))
    batch = toys.batch(2, SEQ_LEN)
    np.testing.assert_array_equal(hidden(model, start, batch), hidden(base, params, batch))


@pytest.mark.parametrize("style", toys.STYLES)
def test_merged_and_unmerged_compute_the_same(style):
    """Against kernels that numpy merges in float64, by the definition of Hu et al. 2021, section 4.1."""
    base, _, model, params = adapted(style, LORA)
    params, batch = scrambled(params), toys.batch(3, SEQ_LEN)
    flat = {path: np.asarray(leaf, np.float64) for path, leaf in param_paths.flatten(params).items()}
    want, targets = {}, 0
    for path, leaf in flat.items():
        a = flat.get(path.replace("/kernel", "/lora_a"))
        if "lora_" not in path:
            want[path] = leaf
        if path.endswith("/kernel") and a is not None:
            b = flat[path.replace("/kernel", "/lora_b")]
            want[path] = np.stack([w + 5.0 / 3 * x @ y for w, x, y in zip(leaf, a, b, strict=True)])
            targets += 1
    assert targets == 4
    merged = adapters.merge(params, LORA)
    got = param_paths.flatten(merged)
    assert got.keys() == want.keys()
    for path, leaf in want.items():
        np.testing.assert_allclose(got[path], leaf, rtol=1e-5, atol=1e-6, err_msg=path)
    unmerged, plain = hidden(model, params, batch), hidden(base, merged, batch)
    assert np.abs(unmerged - plain).max() <= 1e-5 * np.abs(plain).max()
    assert np.abs(plain - hidden(base, adapted(style, LORA)[1], batch)).max() > 0.01
    back = param_paths.flatten(adapters.unmerge(merged, params, LORA))
    assert back.keys() == flat.keys()
    for path, leaf in param_paths.flatten(params).items():
        np.testing.assert_allclose(back[path], leaf, atol=1e-6, err_msg=path)


def test_lora_dropout_is_per_row_and_on_its_input_only():
    _, _, model, start = adapted("gpt2", dataclasses.replace(LORA, dropout=0.5))
    batch, rng = toys.batch(3, SEQ_LEN), jax.random.key(4)
    plain = hidden(model, start, batch)
    np.testing.assert_array_equal(hidden(model, start, batch, rng=rng), plain)  # B is 0
    moved = scrambled(start)
    dropped = hidden(model, moved, batch, rng=rng)
    assert not np.array_equal(dropped, hidden(model, moved, batch))
    order = np.array([2, 0, 1])
    again = hidden(model, moved, {key: value[order] for key, value in batch.items()}, rng=rng)
    np.testing.assert_allclose(again, dropped[order], rtol=1e-5, atol=1e-5)

    dense = layers.Dense(5, ("embed", "mlp"), False, jnp.float32, adapter=AdapterConfig("lora", 2, 6.0, 0.5, ".*"))
    x = jnp.ones((400, 1, 4))
    weights = {"kernel": jnp.zeros((4, 5)), "lora_a": jnp.eye(4, 2), "lora_b": jnp.ones((2, 5))}
    y = dense.apply({"params": weights}, x, jax.random.split(rng, 400))
    assert set(np.unique(y)) == {0.0, 6.0, 12.0}  # 6 / 2 * (0 or 2, twice)
    assert float(y.mean()) == pytest.approx(6.0, abs=0.5)


def bottleneck(params, x):
    """Houlsby et al. 2019, figure 2, in float64; params by 'down/kernel' and so on."""
    z = x @ params["down/kernel"] + params["down/bias"]
    gelu = 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
    return x + gelu @ params["up/kernel"] + params["up/bias"]


def test_bottleneck_matches_houlsby_figure_2():
    rng = np.random.default_rng(0)
    shapes = {"down/kernel": (6, 4), "down/bias": (4,), "up/kernel": (4, 6), "up/bias": (6,)}
    params, x = {path: rng.normal(size=shape) for path, shape in shapes.items()}, rng.normal(size=(2, 3, 6))
    tree = jax.tree.map(jnp.float32, param_paths.unflatten(params))
    got = adapters.Bottleneck(4, jnp.float32).apply({"params": tree}, jnp.float32(x))
    np.testing.assert_allclose(got, bottleneck(params, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "sublayers"), [("houlsby", ("attention/out", "mlp/down")), ("pfeiffer", ("mlp/down",))]
)
def test_bottlenecks_stand_between_a_sublayer_and_the_residual_stream(kind, sublayers):
    """After a sublayer that gives a constant, an adapter gives another constant: it reads that, and nothing else."""
    base, params, model, start = adapted("gpt2", AdapterConfig(kind, rank=3))
    flat, plain, rng = param_paths.flatten(start), param_paths.flatten(params), np.random.default_rng(0)
    names = {path.split("/")[2] for path in flat if "adapter_" in path}
    assert names == {f"adapter_{sublayer.split('/')[0]}" for sublayer in sublayers}
    flat |= {path: rng.normal(size=leaf.shape) for path, leaf in flat.items() if "adapter_" in path}
    for sublayer in sublayers:
        prefix = f"decoder/layers/adapter_{sublayer.split('/')[0]}/"
        kernel, bias = f"decoder/layers/{sublayer}/kernel", f"decoder/layers/{sublayer}/bias"
        flat[kernel] = plain[kernel] = np.zeros(flat[kernel].shape)
        flat[bias] = rng.normal(size=flat[bias].shape)
        own = {path.removeprefix(prefix): leaf for path, leaf in flat.items() if path.startswith(prefix)}
        of_layer = [{path: leaf[i] for path, leaf in own.items()} for i in range(len(flat[bias]))]
        plain[bias] = np.stack([bottleneck(p, c) for p, c in zip(of_layer, flat[bias], strict=True)])
    moved, expected = (jax.tree.map(jnp.float32, param_paths.unflatten(tree)) for tree in (flat, plain))
    batch = toys.batch(2, SEQ_LEN)
    got, want = hidden(model, moved, batch), hidden(base, expected, batch)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (
            AdapterConfig("lora", targets=".*/qeury"),
            r"'adapter\.targets': rule '\.\*/qeury' matches no parameter .*'query'",
        ),
        (AdapterConfig("houlsby"), r"'adapter\.kind' houlsby adds no parameter to this kind of model"),
    ],
)
def test_adapters_that_the_model_does_not_have_are_refused(cfg, message):
    params = toys.decoder(toys.GPT2, SEQ_LEN)[2]
    adapters.check(AdapterConfig(), param_paths.flatten(params))
    with pytest.raises(ConfigError, match=message):
        adapters.check(cfg, param_paths.flatten(params))


def test_only_lora_can_be_merged():
    with pytest.raises(ConfigError, match=r"'adapter\.kind' is pfeiffer: only lora can be merged"):
        adapters.merge({}, AdapterConfig("pfeiffer"))


# --- the rule lists of configs/common.py ---


@functools.cache
def classifier(kind):
    cfg = dataclasses.replace(toys.GPT2, kind="encoder", num_layers=3)
    cfg = transformer.resolve(cfg, vocab_size=toys.VOCAB, seq_len=SEQ_LEN)
    model = transformer.text_model(cfg, jnp.float32, Head("pooled", 2), AdapterConfig(kind, rank=2))
    return jax.eval_shape(model.init, jax.random.key(0))


@pytest.mark.parametrize(
    ("rules", "kind", "learns"),
    [
        (common.head_only(), "none", lambda path, layer: path.startswith("head")),
        (common.bias_only(), "none", lambda path, layer: path.startswith("head") or path.endswith("bias")),
        (
            common.last_layers(2, 3),
            "none",
            lambda path, layer: layer > 0 or path.startswith(("head", "encoder/final_norm")),
        ),
        (common.last_layers(0, 3), "none", lambda path, layer: path.startswith(("head", "encoder/final_norm"))),
        (common.lora_rules(), "lora", lambda path, layer: path.startswith("head") or "lora" in path),
        (common.adapter_rules(), "houlsby", lambda path, layer: path.startswith("head") or "adapter" in path),
    ],
)
def test_rule_lists_train_the_expected_parameters(rules, kind, learns):
    chosen = trainable.resolve(OptimConfig(lr_rules=rules), classifier(kind), 10)
    for path, values in chosen.lr_multiplier.items():
        layers_of = range(3) if "/layers/" in path else [-1]
        assert values == tuple(float(learns(path, layer)) for layer in layers_of), path
    optimizer = optim.build(OptimConfig(lr_rules=rules), classifier(kind), total_steps=9, warmup_steps=0, decay_steps=0)
    part = param_paths.flatten(trainable.trained_part(chosen, classifier(kind)))
    held = [leaf for leaf in jax.tree.leaves(jax.eval_shape(optimizer.init, param_paths.unflatten(part))) if leaf.ndim]
    assert len(held) == 2 * len(part) > 0 and sum(leaf.size for leaf in held) == 2 * sum(x.size for x in part.values())


def test_the_last_layers_include_the_transform_before_the_logits():
    cfg = transformer.resolve(toys.BERT, vocab_size=toys.VOCAB, seq_len=SEQ_LEN)
    model = transformer.text_model(cfg, jnp.float32)
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    chosen = trainable.resolve(OptimConfig(lr_rules=common.last_layers(0, cfg.num_layers)), abstract, 10)
    learn = {path for path, values in chosen.lr_multiplier.items() if max(values) > 0}
    assert {path for path in chosen.lr_multiplier if path.startswith("lm_transform/")} == learn != set()


def test_layerwise_rates_and_gradual_unfreezing():
    cfg = OptimConfig(lr_rules=common.layer_decay(0.5, 3), unfreeze_rules=common.gradual_unfreezing(3, 0.8))
    chosen = trainable.resolve(cfg, classifier("none"), 100)
    kernel = "encoder/layers/mlp/up/kernel"
    assert (chosen.lr_multiplier[kernel], chosen.start[kernel]) == ((0.125, 0.25, 0.5), (60, 40, 20))
    for path, rate, start in (
        ("embed/embedding", 0.0625, 80),
        ("embed/position_embedding", 0.0625, 80),
        ("encoder/final_norm/scale", 1.0, 0),
        ("head/classifier/kernel", 1.0, 0),
    ):
        assert (chosen.lr_multiplier[path], chosen.start[path]) == ((rate,), (start,)), path


def test_more_last_layers_than_the_model_has_are_refused():
    with pytest.raises(ConfigError, match="last_layers: 4 of 3 layers"):
        common.last_layers(4, 3)
