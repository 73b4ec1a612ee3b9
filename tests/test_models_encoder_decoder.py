"""Properties of the encoder-decoder, the prefix decoder and T5's relative positions."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import losses, param_paths
from lm.config import Config, MeshConfig
from lm.models import attention, layers, registry
from lm.parallel import sharding
from lm.parallel.mesh import make_mesh
from tests import toys

INPUTS, TARGETS = 9, 7
STYLES = toys.ENCODER_DECODERS


def model_of(cfg, seq_len=12):
    return toys.decoder(cfg, seq_len)


def sequence(lengths: list[int], size: int, seed: int, prefix: str = "") -> dict[str, np.ndarray]:
    """Rows of one segment each, of those lengths; padding is filled with ids that must not matter."""
    place = np.arange(size, dtype=np.int32)
    real = (place < np.array(lengths)[:, None]).astype(np.int32)
    tokens = np.random.default_rng(seed).integers(0, toys.VOCAB, real.shape).astype(np.int32)
    return {"inputs" if prefix else "tokens": tokens, f"{prefix}segment_ids": real, f"{prefix}positions": place * real}


def pairs(lengths=((9, 7), (4, 5)), inputs=INPUTS, targets=TARGETS) -> dict[str, np.ndarray]:
    sources, outs = zip(*lengths, strict=True)
    batch = sequence(list(sources), inputs, 1, "input_") | sequence(list(outs), targets, 2)
    return batch | {"example_index": np.arange(len(lengths), dtype=np.int32)}


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(cfg, model, params, batch, cache=None):
    out = model.apply(params, batch, cache=cache)
    return losses.logits(out.hidden_BxLxD, out.unembed_DxV, vocab_size=toys.VOCAB, softcap=cfg.logit_softcap), out.cache


@functools.partial(jax.jit, static_argnums=0)
def embedding_grad(model, params, batch, at):
    """Of a hidden state, not of logits: tied logits would read every row of the embedding."""

    def hidden(embedding):
        tree = params | {"embed": params["embed"] | {"embedding": embedding}}
        return model.apply(tree, batch).hidden_BxLxD[0, at].sum()

    return jax.grad(hidden)(params["embed"]["embedding"])


def seen_by(model, params, batch, at: int, key: str) -> np.ndarray:
    """bool: which positions of batch[key], one row of ids all different, the hidden state `at` depends on."""
    grad_VxD = np.asarray(embedding_grad(model, params, batch, at))
    return (grad_VxD != 0).any(axis=1)[batch[key][0]]


@pytest.mark.parametrize("style", STYLES)
def test_a_target_sees_all_inputs_and_what_is_before_it(style):
    _, model, params = model_of(STYLES[style])
    batch = pairs(((INPUTS - 2, TARGETS),))
    ids = np.arange(INPUTS + TARGETS, dtype=np.int32)
    batch |= {"inputs": ids[None, :INPUTS], "tokens": ids[None, INPUTS:]}
    np.testing.assert_array_equal(seen_by(model, params, batch, 3, "tokens"), np.arange(TARGETS) <= 3)
    np.testing.assert_array_equal(seen_by(model, params, batch, 3, "inputs"), np.arange(INPUTS) < INPUTS - 2)


@pytest.mark.parametrize("style", STYLES)
def test_padding_changes_nothing(style):
    """Each row has, with more padding on both sides and other ids in it, the logits that it has alone without any."""
    cfg, model, params = model_of(STYLES[style])
    batch = pairs()
    together, _ = run(cfg, model, params, batch)
    for row, (source, target) in enumerate([(9, 7), (4, 5)]):
        alone = {
            key: value[row : row + 1, : source if key.startswith("input") else target]
            for key, value in batch.items()
            if value.ndim == 2
        }
        want, _ = run(cfg, model, params, alone)
        np.testing.assert_allclose(together[row, :target, : toys.VOCAB], want[0, :, : toys.VOCAB], rtol=0, atol=5e-6)


@pytest.mark.parametrize("style", STYLES)
def test_cached_decoding_equals_the_full_forward(style):
    """The inputs are given once, with the first positions of the decoder."""
    cfg, model, params = model_of(STYLES[style])
    batch = pairs(((9, 7), (4, 7)))
    full, _ = run(cfg, model, params, batch)
    cache, pieces = model.init_cache(2, TARGETS + 2), []
    for start, stop in [(0, 2), (2, 3), (3, 4), (4, 5), (5, 6), (6, 7)]:
        part = {key: batch[key][:, start:stop] for key in ("tokens", "segment_ids", "positions")}
        if start == 0:
            part |= {key: value for key, value in batch.items() if key.startswith("input")}
        logits, cache = run(cfg, model, params, part, cache)
        pieces.append(logits)
    got = np.concatenate(pieces, axis=1)[..., : toys.VOCAB]
    np.testing.assert_allclose(got, full[..., : toys.VOCAB], rtol=0, atol=5e-6)


def loss_and_grads(cfg, dtype, params, batch):
    model = registry.MODELS[cfg.kind](Config(model=cfg), None, dtype)

    def loss(params):
        out = model.apply(params, batch, rng=jax.random.key(3))
        logits = losses.logits(out.hidden_BxLxD, out.unembed_DxV, vocab_size=toys.VOCAB, softcap=cfg.logit_softcap)
        return (jnp.sin(logits[..., : toys.VOCAB]) * batch["segment_ids"][..., None]).sum()

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize("kind", ["encoder_decoder", "prefix_decoder"])
def test_eight_devices_compute_what_one_does(kind):
    """On a mesh that splits rows, positions and heads in two each, with dropout."""
    cfg = dataclasses.replace(toys.T5, kind=kind, dropout=0.2, qk_norm=False)
    cfg, model, params = model_of(cfg, 16)
    batch = pairs(((9, 7), (4, 5), (2, 7), (9, 1)), inputs=10, targets=8)
    batch["is_prefix"] = (batch["positions"] < 3) * batch["segment_ids"]
    loss, grads = loss_and_grads(cfg, jnp.float32, params, batch)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, context=2, tensor=2))
    specs = jax.tree.map(
        lambda axes: jax.NamedSharding(mesh, sharding.spec(axes)),
        model.logical_axes(),
        is_leaf=lambda x: isinstance(x, tuple),
    )
    with jax.set_mesh(mesh):
        there = sharding.to_global(batch, np.arange(4), 4, mesh)
        split_loss, split_grads = loss_and_grads(cfg, jnp.float32, jax.device_put(params, specs), there)
    np.testing.assert_allclose(split_loss, loss, rtol=1e-5)
    for path, grad in param_paths.flatten(grads).items():
        np.testing.assert_allclose(
            param_paths.flatten(split_grads)[path],
            grad,
            rtol=1e-4,
            atol=2e-5 * max(1, np.abs(grad).max()),
            err_msg=path,
        )
        assert np.abs(grad).max() > 0, f"{path} does not learn"


# T5's positions -------------------------------------------------------------------------------------------------------


def t5_bucket(relative_position: int, bidirectional: bool, num_buckets: int = 32, max_distance: int = 128) -> int:
    """`_relative_position_bucket` of mesh-tensorflow, line by line, for one number."""
    ret, n = 0, -relative_position
    if bidirectional:
        num_buckets //= 2
        ret += (n < 0) * num_buckets
        n = abs(n)
    else:
        n = max(n, 0)
    max_exact = num_buckets // 2
    if n < max_exact:
        return ret + n
    # The few distances at which the quotient is whole are rounded as in exact arithmetic.
    large = math.log(n / max_exact) / math.log(max_distance / max_exact) * (num_buckets - max_exact)
    return ret + min(max_exact + int(round(large, 9)), num_buckets - 1)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_buckets_are_those_of_t5(bidirectional):
    distances = np.arange(-300, 301)
    want = [t5_bucket(int(d), bidirectional) for d in distances]
    np.testing.assert_array_equal(layers.relative_buckets(jnp.asarray(distances), bidirectional), want)
    assert set(want) >= set(range(1, 32)) - ({16} if bidirectional else set())  # 16 is 'after, at distance 0'


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_the_bias_is_added_to_the_scores_of_every_layer(kind):
    """A table that is huge at one bucket alone turns attention into a copy of that distance."""
    cfg, model, params = model_of(dataclasses.replace(toys.T5, kind=kind, attention_softcap=0.0), 12)
    distance = -2 if kind == "decoder" else 2
    table = np.zeros((32, cfg.num_heads), np.float32)
    table[t5_bucket(distance, kind == "encoder")] = 1e6
    params = params | {kind: params[kind] | {"relative_bias": {"table": jnp.asarray(table)}}}
    batch = sequence([12], 12, 0) | {"tokens": np.arange(12, dtype=np.int32)[None]}
    at = 5
    # Each of two layers adds what stands `distance` further.
    want = np.isin(np.arange(12), [at, at + distance, at + 2 * distance])
    np.testing.assert_array_equal(seen_by(model, params, batch, at, "tokens"), want)


def test_query_blocks_and_offsets_take_their_part_of_the_bias():
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.standard_normal((2, 256, 4, 8)), jnp.float32) for _ in range(3))
    segments = jnp.asarray(np.sort(rng.integers(0, 3, (2, 256)), axis=1), jnp.int32)
    bias = jnp.asarray(rng.standard_normal((4, 256, 256)), jnp.float32)
    mask = attention.Mask(segments, segments, 70, bias_HxLxS=bias)
    query, key, value, bias = map(np.asarray, (query, key[:, :, :2], value[:, :, :2], bias))
    blocks = jax.jit(functools.partial(attention.attend, softcap=5.0))(query, key, value, mask)
    scores = np.einsum("blkge,bske->bkgls", query.reshape(2, 256, 2, 2, 8), key)
    scores = 5.0 * np.tanh(scores / 5.0) + bias.reshape(1, 2, 2, 256, 256)
    scores = np.where(np.asarray(mask.dense())[:, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    want = np.einsum("bkgls,bske->blkge", weights, value).reshape(2, 256, 4, 8)
    np.testing.assert_allclose(blocks, want, rtol=0, atol=2e-5)
    bias_module = layers.RelativeBias(4, bidirectional=False)
    params = bias_module.init(jax.random.key(0), 1, 1, 0)
    whole = bias_module.apply(params, 12, 12, 0)
    np.testing.assert_array_equal(bias_module.apply(params, 3, 12, 5), whole[:, 5:8])


# Prefixes -------------------------------------------------------------------------------------------------------------


def test_a_segment_sees_its_prefix_and_what_is_before():
    """Segments of 7 and 4 positions with prefixes of 4 and 2, then padding; long enough for query blocks."""
    seq_len = 128
    _, model, params = model_of(toys.PREFIX, seq_len)
    place = np.arange(seq_len)
    segments = np.where(place < 7, 1, np.where(place < 11, 2, 0))
    is_prefix = (place < 4) | ((place >= 7) & (place < 9))
    positions = np.where(segments == 2, place - 7, place) * (segments > 0)
    columns = {"tokens": place % toys.VOCAB, "segment_ids": segments, "is_prefix": is_prefix, "positions": positions}
    batch = {key: column.astype(np.int32)[None] for key, column in columns.items()}
    for at in (0, 3, 4, 6, 7, 8, 10):
        want = (segments == segments[at]) & (is_prefix | (place <= at))
        np.testing.assert_array_equal(seen_by(model, params, batch, at, "tokens")[:11], want[:11], err_msg=str(at))


def test_a_cached_prefix_equals_the_full_forward():
    """The prompt is the prefix; behind padding on its left, as `lm.decoding.sampling` puts it."""
    cfg, model, params = model_of(toys.PREFIX)
    batch = sequence([9, 9], 9, 0) | {"is_prefix": np.tile((np.arange(9) < 5).astype(np.int32), (2, 1))}
    full, _ = run(cfg, model, params, batch)
    cache = model.init_cache(2, 12)
    prompt = {key: np.pad(value[:, :5], ((0, 0), (3, 0))) for key, value in batch.items()}
    logits, cache = run(cfg, model, params, prompt, cache)
    pieces = [logits[:, 3:]]
    for start, stop in [(5, 6), (6, 9)]:
        part = {key: value[:, start:stop] for key, value in batch.items() if key != "is_prefix"}
        logits, cache = run(cfg, model, params, part, cache)
        pieces.append(logits)
    got = np.concatenate(pieces, axis=1)[..., : toys.VOCAB]
    np.testing.assert_allclose(got, full[..., : toys.VOCAB], rtol=0, atol=5e-6)
