"""Width transfer: what a step changes is of the same size at every width, and at the base nothing differs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import losses, optim, param_paths
from lm.config import ModelConfig, MupConfig, OptimConfig
from lm.config.schema import ConfigError
from lm.models import attention, transformer
from lm.optim import mup
from tests import toys

BASE, WIDE, STEPS, ROWS, SEQ_LEN = 64, 512, 3, 4, 16
# Wider heads at a greater width, untied; more heads of one width, tied, with what Llama has.
WIDER = ModelConfig(num_layers=2, num_heads=4, tie_embeddings=False, use_bias=False)
MORE = dataclasses.replace(WIDER, head_dim=16, tie_embeddings=True, position="rope", norm="rmsnorm", mlp="swiglu")
RATES = {"adamw": 0.01, "lion": 0.01, "muon": 0.05}


def model_of(cfg, width, base):
    heads = width // cfg.head_dim if cfg.head_dim else cfg.num_heads
    cfg = dataclasses.replace(cfg, embed_dim=width, num_heads=heads, mup=MupConfig(*base))
    cfg = transformer.resolve(cfg, vocab_size=toys.VOCAB, seq_len=SEQ_LEN)
    return cfg, transformer.text_model(cfg, jnp.float32)


def optimizer_of(name, cfg, model, params):
    options = OptimConfig(name=name, schedule="constant", learning_rate=RATES[name], clip_norm=0.0, weight_decay=0.0)
    scales = mup.direction_scales(name, param_paths.flatten(model.logical_axes()), mup.width_ratio(cfg))
    return optim.build(options, params, total_steps=10, warmup_steps=0, decay_steps=0, scales=scales)


def activations(cfg, model, batch, params):
    """The residual stream after the embedding and after each block, then the logits."""
    embed, block = transformer.Embed(cfg, jnp.float32), transformer.Block(cfg, jnp.float32)
    x, _ = embed.apply({"params": params["embed"]}, batch["tokens"], batch["positions"], None)
    mask = attention.Mask(batch["segment_ids"], batch["segment_ids"], 0)

    def one(x, own):
        x, _ = block.apply({"params": own}, x, mask, batch["positions"], None, None, jnp.int32(0), None)
        return x, x

    _, after = jax.lax.scan(one, x, params["decoder"]["layers"])
    out = model.apply(params, batch)
    logits = losses.logits(out.hidden_BxLxD, out.unembed_DxV, vocab_size=toys.VOCAB)[..., : toys.VOCAB]
    return [x, *after, logits]


@functools.cache
def changes(cfg, name, width, base):
    """RMS of how far a few steps at one learning rate move each of `activations`."""
    cfg, model = model_of(cfg, width, base)
    batch = {key: jnp.asarray(value) for key, value in toys.batch(ROWS, SEQ_LEN).items()}

    def loss(params):
        out = model.apply(params, batch)
        terms = losses.token_cross_entropy(
            out.hidden_BxLxD, out.unembed_DxV, batch["targets"], batch["loss_weights"], vocab_size=toys.VOCAB
        )
        return terms.sum / terms.weight

    @jax.jit
    def run(key):
        start = model.init(key)
        optimizer = optimizer_of(name, cfg, model, start)

        def one(carry, step):
            params, state = carry
            params, state, _ = optimizer.update(jax.grad(loss)(params), state, params, step)
            return (params, state), None

        (end, _), _ = jax.lax.scan(one, (start, optimizer.init(start)), jnp.arange(STEPS))
        both = jax.tree.map(lambda *leaves: jnp.stack(leaves), start, end)
        pairs = jax.lax.map(functools.partial(activations, cfg, model, batch), both)
        return [jnp.sqrt(jnp.mean(jnp.square(after - before))) for before, after in pairs]

    return np.asarray(run(jax.random.key(0)))


def exponents(cfg, name, base):
    """How each change grows with the width: its exponent; 0 = not at all."""
    # At the base both are the same model, see below.
    return np.log(changes(cfg, name, WIDE, base) / changes(cfg, name, BASE, (0, 0))) / np.log(WIDE / BASE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cfg", "name", "base"),
    [
        (WIDER, "adamw", (64, 16)),
        (MORE, "lion", (64, 0)),
        (WIDER, "muon", (64, 16)),
    ],
    ids=["wider heads, adamw", "more heads, tied, lion", "wider heads, muon"],
)
def test_coordinate_check(cfg, name, base):
    """The coordinate check (Tensor Programs V, appendix D.1), with muP and without.

    Exponents of very wide models are multiples of 1/2, and with muP 0. Of a change by chance, as of logits by a tied
    table's own noise, the square falls as 1 / width beside what stays: a narrow model's change is then the greater.
    """
    with_mup, without = exponents(cfg, name, base), exponents(cfg, name, (0, 0))
    assert with_mup.max() < 0.15, (with_mup, without)
    assert with_mup.min() > -0.4, (with_mup, without)
    assert without[1:].min() > 0.3, (with_mup, without)


@pytest.mark.parametrize("cfg", [WIDER, MORE], ids=["untied", "tied"])
def test_mup_changes_nothing_at_the_base_width(cfg):
    batch = toys.batch(2, SEQ_LEN)
    found = []
    for base in ((0, 0), (BASE, 16)):
        _, model = model_of(cfg, BASE, base)
        params = model.init(jax.random.key(0))
        out = model.apply(params, batch)
        found.append((params, out.hidden_BxLxD, out.unembed_DxV))
    jax.tree.map(np.testing.assert_array_equal, *found)
    assert set(mup.direction_scales("adamw", param_paths.flatten(model.logical_axes()), 1.0).values()) == {1.0}


def test_variance_and_direction_scale_of_each_weight():
    """At four times the base's width: the variance at the start, and the factor of the direction."""
    cfg = dataclasses.replace(WIDER, num_experts=2, experts_per_token=1, use_bias=True, init="fan_in")
    cfg, model = model_of(cfg, 256, (BASE, 16))
    axes, params = (
        param_paths.flatten(model.logical_axes()),
        param_paths.flatten(jax.jit(model.init)(jax.random.key(0))),
    )
    assert mup.width_ratio(cfg) == 1 / 4
    assert mup.query_scale(cfg) == pytest.approx(4 / 64)  # sqrt(16) / 64
    scales = {name: mup.direction_scales(name, axes, 1 / 4) for name in ("adamw", "lion", "adafactor", "muon")}
    assert scales["adamw"] == scales["lion"] == scales["adafactor"]
    of_adam = {
        "embed/embedding": (1.0, 1.0),
        "embed/position_embedding": (None, 1.0),
        "decoder/layers/attention/query/kernel": (1 / 256, 1 / 4),
        "decoder/layers/attention/query/bias": (None, 1.0),
        "decoder/layers/mlp/router_kernel": (0.01 / 4 / 256, 1 / 4),
        "decoder/layers/mlp/up_kernel": (1 / 256, 1 / 4),
        "decoder/layers/mlp_norm/scale": (None, 1.0),
        "lm_head/kernel": (1 / BASE, 1.0),
    }
    for path, (variance, scale) in of_adam.items():
        assert scales["adamw"][path] == scale, path
        is_orthogonal = "layers" in path and path.endswith("kernel") and "router" not in path
        assert scales["muon"][path] == (0.5 if is_orthogonal else scale), path
        if variance:
            assert float(params[path].var()) == pytest.approx(variance, rel=0.1), path


def test_a_scale_multiplies_the_direction_and_not_the_weight_decay():
    params, grads = {"kernel": jnp.full((2, 2), 3.0)}, {"kernel": jnp.ones((2, 2))}
    options = OptimConfig(learning_rate=0.1, schedule="constant", weight_decay=0.5, clip_norm=0.0)
    adamw = optim.build(options, params, total_steps=9, warmup_steps=0, decay_steps=0, scales={"kernel": 0.25})
    moved, _, _ = adamw.update(grads, adamw.init(params), params, jnp.int32(0))
    np.testing.assert_allclose(moved["kernel"], 3 - 0.1 * (0.25 * 1 + 0.5 * 3), rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__mup__base_head_dim": 16}, "'model.mup.base_head_dim' is 16, but 'model.mup.base_width' is 0"),
        ({"model__mup__base_width": -64}, "'model.mup.base_width' must not be negative"),
    ],
)
def test_invalid_mup_settings_are_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        toys.recipe(tmp_path, **changes)


def test_mup_for_vision_is_refused(tmp_path):
    changes = {"model__mup__base_width": 64, "model__kind": "vit", "model__position": "sincos"}
    with pytest.raises(ConfigError, match=r"'model.mup' is for models of text; 'model.kind' vit"):
        toys.recipe(tmp_path, **changes)
