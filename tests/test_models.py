"""Properties of the decoder: nothing leaks from later positions or other documents, in any of its forms."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import losses, param_paths
from lm.config import RopeScalingConfig
from lm.config.schema import ConfigError
from lm.models import attention, layers, rope, transformer
from lm.parallel import sharding
from tests import reference, toys

SEQ_LEN = 12


@functools.partial(jax.jit, static_argnums=(0, 1))
def logits_of(cfg, model, params, batch, cache=None):
    out = model.apply(params, batch, cache=cache)
    return losses.logits(out.hidden_BxLxD, out.unembed_DxV, vocab_size=toys.VOCAB, softcap=cfg.logit_softcap), out.cache


def one_document(rows: int, seq_len: int) -> dict[str, np.ndarray]:
    batch = toys.batch(rows, seq_len)
    positions = np.tile(np.arange(seq_len, dtype=np.int32), (rows, 1))
    return batch | {"segment_ids": np.ones((rows, seq_len), np.int32), "positions": positions}


@pytest.mark.parametrize("style", toys.STYLES)
@pytest.mark.parametrize("seq_len", [SEQ_LEN, 128], ids=["dense", "blocks"])
def test_causal_by_gradient(style, seq_len):
    """The hidden state at a position has gradient exactly 0 by every later embedding, and not by its own."""
    _, model, params = toys.decoder(dataclasses.replace(toys.STYLES[style], sliding_window=0), seq_len)
    batch = one_document(1, seq_len)
    batch["tokens"] = np.arange(seq_len, dtype=np.int32)[None]  # an embedding row of its own for each position
    at = seq_len // 2

    def of_embedding(embedding):
        tree = params | {"embed": params["embed"] | {"embedding": embedding}}
        return model.apply(tree, batch).hidden_BxLxD[0, at].sum()

    # Hidden states, not logits: tied logits would read every row of the embedding.
    grad_VxD = np.asarray(jax.jit(jax.grad(of_embedding))(params["embed"]["embedding"]))
    assert (grad_VxD[at + 1 : seq_len] == 0).all()
    assert (np.abs(grad_VxD[: at + 1]).max(axis=1) > 0).all()


@pytest.mark.parametrize("style", toys.STYLES)
@pytest.mark.parametrize("seq_len", [SEQ_LEN, 128], ids=["dense", "blocks"])
def test_another_document_changes_nothing_bitwise(style, seq_len):
    """Perturbing document A leaves the logits of B, and the gradients of B's loss, as they were in every bit."""
    cfg, model, params = toys.decoder(toys.STYLES[style], seq_len)
    batch = toys.batch(2, seq_len)
    cut = seq_len // 2 - 1
    segments = np.where(np.arange(seq_len) < cut, 1, 2).astype(np.int32)
    batch["segment_ids"] = np.stack([segments, segments])
    is_b = batch["segment_ids"] == 2
    batch["loss_weights"] = is_b.astype(np.float32)
    other = batch | {"tokens": np.where(is_b, batch["tokens"], (batch["tokens"] + 7) % toys.VOCAB)}

    @jax.jit
    def run(params, batch):
        def loss(params):
            out, _ = logits_of(cfg, model, params, batch)
            log_probs = jax.nn.log_softmax(out)
            taken = jnp.take_along_axis(log_probs, batch["targets"][..., None], axis=-1)[..., 0]
            return -(taken * batch["loss_weights"]).sum(), out

        (_, out), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return out, grads

    (logits, grads), (other_logits, other_grads) = run(params, batch), run(params, other)
    assert not np.array_equal(logits[~is_b], other_logits[~is_b])
    np.testing.assert_array_equal(np.asarray(logits)[is_b], np.asarray(other_logits)[is_b])
    for path, grad in param_paths.flatten(grads).items():
        theirs = np.asarray(param_paths.flatten(other_grads)[path])
        # What A's tokens choose lies between B's in an expert's group: its sum over positions, to which A gives exact
        # zeros, is cut elsewhere, and rounds otherwise on some CPUs.
        is_of_expert = style == "experts" and "/mlp/" in path
        size = float(np.abs(theirs).max()) * is_of_expert
        np.testing.assert_allclose(grad, theirs, rtol=0, atol=size * batch["tokens"].size * 2.0**-24, err_msg=path)


@pytest.mark.parametrize("style", toys.STYLES)
def test_packed_equals_unpacked(style):
    """Three documents in one row have the logits they have alone in a row each."""
    cfg, model, params = toys.decoder(toys.STYLES[style], SEQ_LEN)
    lengths = [3, 5, 4]
    rng = np.random.default_rng(1)
    documents = [rng.integers(0, toys.VOCAB, n).astype(np.int32) for n in lengths]
    packed = {
        "tokens": np.concatenate(documents)[None],
        "segment_ids": np.repeat([1, 2, 3], lengths)[None].astype(np.int32),
        "positions": np.concatenate([np.arange(n) for n in lengths])[None].astype(np.int32),
    }
    together, _ = logits_of(cfg, model, params, packed)
    alone = []
    for document in documents:
        n = len(document)
        batch = {"tokens": document[None], "segment_ids": np.ones((1, n), np.int32)}
        alone.append(logits_of(cfg, model, params, batch | {"positions": np.arange(n, dtype=np.int32)[None]})[0][0])
    np.testing.assert_allclose(together[0, :, : toys.VOCAB], np.concatenate(alone)[:, : toys.VOCAB], rtol=0, atol=3e-6)


@pytest.mark.parametrize("style", toys.STYLES)
def test_cached_decoding_equals_the_full_forward(style):
    cfg, model, params = toys.decoder(toys.STYLES[style], SEQ_LEN)
    batch = one_document(2, SEQ_LEN)
    full, _ = logits_of(cfg, model, params, batch)
    cache = model.init_cache(2, SEQ_LEN + 3)
    pieces = []
    for start, stop in [(0, 5), (5, 6), (6, 7), (7, 10), (10, SEQ_LEN)]:  # a prompt, then one or several at a time
        part = {key: value[:, start:stop] for key, value in batch.items() if value.ndim == 2}
        logits, cache = logits_of(cfg, model, params, part, cache)
        pieces.append(logits)
    got = np.concatenate(pieces, axis=1)[..., : toys.VOCAB]
    np.testing.assert_allclose(got, full[..., : toys.VOCAB], rtol=0, atol=5e-6)


@pytest.mark.parametrize("window", [0, 1, 40, 70, 200])
def test_query_blocks_equal_the_dense_form(window):
    rng = jax.random.key(0)
    query, key, value = (jax.random.normal(k, (2, 256, 4, 8)) for k in jax.random.split(rng, 3))
    segments = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 3, (2, 256)), axis=1), jnp.int32)
    mask = attention.Mask(segments, segments, window)
    blocks = attention.attend(query, key[:, :, :2], value[:, :, :2], mask, softcap=5.0)
    dense = attention._dense(query, key[:, :, :2], value[:, :, :2], mask, 5.0)
    np.testing.assert_allclose(blocks, dense, rtol=0, atol=2e-6)


def test_mask_worked_example():
    segments = jnp.asarray([[1, 1, 2, 2, 0]], jnp.int32)
    want = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]
    np.testing.assert_array_equal(attention.Mask(segments, segments, 0).dense()[0], np.array(want, bool))
    ones = jnp.ones((1, 4), jnp.int32)
    want = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    np.testing.assert_array_equal(attention.Mask(ones, ones, 2).dense()[0], np.array(want, bool))


def test_rope_depends_on_differences_of_positions_only():
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    frequency = rope.frequencies(10_000.0, 8, RopeScalingConfig())

    def score(query_at, key_at):
        turned = [rope.rotate(x, jnp.full((1, 1), p), frequency) for x, p in ((query, query_at), (key, key_at))]
        return float(jnp.sum(turned[0] * turned[1]))

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert score(7, 3) != pytest.approx(score(7, 4), abs=1e-3)


def test_dropout_mask_of_a_row_depends_on_its_key_alone():
    """A row's mask is the same in another batch and at another place; its rate and scale are right."""
    x = jnp.ones((4, 1000))
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(4))
    out = np.asarray(layers.dropout(x, 0.25, keys_B))
    np.testing.assert_array_equal(layers.dropout(x[:2], 0.25, keys_B[::-1][:2]), out[::-1][:2])
    assert set(np.unique(out)) == {0.0, np.float32(1 / 0.75)}
    assert abs((out == 0).mean() - 0.25) < 0.03


def test_resolve_refuses_what_does_not_fit():
    with pytest.raises(ConfigError, match=r"model.vocab_size.*40"):
        transformer.resolve(dataclasses.replace(toys.GPT2, vocab_size=40), vocab_size=50, seq_len=8)
    with pytest.raises(ConfigError, match=r"even for rope"):
        transformer.resolve(dataclasses.replace(toys.LLAMA, head_dim=5), vocab_size=50, seq_len=8)


def test_bfloat16_stays_close_to_float32():
    cfg, _, params = toys.decoder(toys.LLAMA, SEQ_LEN)
    batch = one_document(2, SEQ_LEN)
    full = transformer.text_model(cfg, jnp.float32).apply(params, batch).hidden_BxLxD
    half = transformer.text_model(cfg, jnp.bfloat16).apply(params, batch).hidden_BxLxD
    assert half.dtype == jnp.bfloat16
    assert np.abs(np.asarray(half, np.float32) - full).max() < 0.1 * np.abs(full).max()


def test_bfloat16_gradients_of_tables_and_biases_are_summed_in_float32():
    """1,000 uses of one row, or positions of one bias: adding ones in bfloat16 would stop at 256."""
    table = jnp.zeros((3, 2), jnp.bfloat16)
    ids = jnp.ones((1, 1000), jnp.int32)
    grad = jax.grad(lambda t: layers.lookup(t, ids).sum().astype(jnp.float32))(table)
    np.testing.assert_array_equal(np.asarray(grad, np.float32), [[0, 0], [1000, 1000], [0, 0]])
    dense = layers.Dense(2, ("embed", "mlp"), True, jnp.bfloat16)
    params = {"kernel": jnp.zeros((4, 2)), "bias": jnp.zeros(2)}
    x = jnp.ones((1, 1000, 4), jnp.bfloat16)
    grads = jax.grad(lambda p: dense.apply({"params": p}, x).sum().astype(jnp.float32))(params)
    np.testing.assert_array_equal(grads["bias"], [1000, 1000])


@pytest.mark.parametrize(
    ("window", "causal", "softcap"), [(0, True, 0.0), (0, False, 0.0), (32, True, 5.0), (32, False, 0.0)]
)
def test_splash_attention_equals_the_plain_form(window, causal, softcap):
    """Values and gradients, without a TPU: grouped heads, segments, padding, window and soft cap."""
    rows, length, heads, kv_heads, width = 2, 256, 4, 2, 64
    rng = np.random.default_rng(0)
    query = jnp.asarray(rng.normal(size=(rows, length, heads, width)), jnp.float32)
    key, value = (jnp.asarray(rng.normal(size=(rows, length, kv_heads, width)), jnp.float32) for _ in range(2))
    segments = jnp.asarray(np.repeat([[1, 1, 2, 3], [1, 2, 2, 0]], length // 4, axis=1), jnp.int32)
    mask = attention.Mask(segments, segments, window, causal=causal)
    assert attention.splash_fits(query, mask)
    weights = jnp.asarray(rng.normal(size=query.shape), jnp.float32)

    def value_and_gradients(fn):
        return jax.value_and_grad(lambda *args: (fn(*args) * weights).sum(), argnums=(0, 1, 2))(query, key, value)

    total, gradients = value_and_gradients(lambda *args: attention.splash(*args, mask, softcap=softcap, interpret=True))
    expected, others = value_and_gradients(lambda *args: attention._dense(*args, mask, softcap))
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    for found, other in zip(gradients, others, strict=True):
        np.testing.assert_allclose(found, other, rtol=0, atol=2e-5 * float(jnp.abs(other).max()))


def gpu_case(form):
    """Arrays of two packed rows in bfloat16, and their mask."""
    rows, length, heads, kv_heads, width = 2, 32, 4, 2, 8
    rng = np.random.default_rng(0)
    sizes = [(rows, length, heads, width), *[(rows, length, kv_heads, width)] * 2]
    arrays = [jnp.asarray(rng.normal(size=size), jnp.bfloat16) for size in sizes]
    segments = jnp.asarray(np.repeat([[1, 1, 2, 3], [1, 2, 2, 0]], length // 4, axis=1), jnp.int32)
    mask = attention.Mask(segments, segments, 5 if form == "window" else 0, causal=form != "both sides")
    return arrays, mask.replace(is_prefix_BxS=segments % 2) if form == "prefix" else mask


@pytest.mark.parametrize("form", ["causal", "window", "both sides", "prefix"])
def test_cudnn_arguments_give_the_plain_form(form):
    """Values and gradients of the same arguments in JAX's other implementation."""
    arrays, mask = gpu_case(form)
    assert attention.cudnn_fits(arrays[0], mask, 0.0)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=arrays[0].shape), jnp.float32)
    arrays = [x.astype(jnp.float32) for x in arrays]

    def value_and_gradients(fn):
        return jax.value_and_grad(lambda *args: (fn(*args) * weights).sum(), argnums=(0, 1, 2))(*arrays)

    total, gradients = value_and_gradients(lambda *args: attention.cudnn(*args, mask, implementation="xla"))
    expected, others = value_and_gradients(lambda *args: attention._dense(*args, mask, 0.0))
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    for found, other in zip(gradients, others, strict=True):
        np.testing.assert_allclose(found, other, rtol=0, atol=1e-5 * float(jnp.abs(other).max()))


@pytest.mark.parametrize("form", ["causal", "window", "both sides", "prefix"])
def test_attention_lowers_to_cudnn_forward_and_backward(form, monkeypatch):
    """Lowered for a GPU, with its library queries stubbed; not run."""
    from jax._src.cudnn import fused_attention_stablehlo as library

    monkeypatch.setattr(library, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")
    arrays, mask = gpu_case(form)

    def lowered(softcap):
        total = jax.grad(lambda *args: attention.attend(*args, mask, softcap=softcap).sum().astype(jnp.float32))
        return jax.jit(total).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()

    text = lowered(0.0)
    calls = re.findall(r"@(__cudnn\$\w+)", text)
    assert any("Backward" in call for call in calls) and any("Backward" not in call for call in calls), calls
    kind = "CAUSAL" if form in ("causal", "window") else "NO_MASK"
    assert re.findall(r'"mask_type": "(\w+)"', text.replace("\\22", '"')) == [kind] * 2
    assert "__cudnn" not in lowered(5.0)


def test_unsupported_attention_does_not_use_cudnn():
    query, segments = jnp.zeros((1, 32, 2, 8), jnp.bfloat16), jnp.ones((1, 32), jnp.int32)
    mask = attention.Mask(segments, segments, 0)
    assert attention.cudnn_fits(query, mask, 0.0)
    for lacking in (
        (query.astype(jnp.float32), mask, 0.0),
        (jnp.zeros((1, 32, 2, 12), jnp.bfloat16), mask, 0.0),
        (jnp.zeros((1, 32, 2, 256), jnp.bfloat16), mask, 0.0),
        (query, mask, 5.0),
        (query, mask.replace(offset=3), 0.0),
        (query, mask.replace(bias_HxLxS=jnp.zeros((2, 32, 32))), 0.0),
        (query, mask.replace(key_segments_BxS=segments[:, :31]), 0.0),
    ):
        assert not attention.cudnn_fits(*lacking)


def test_unsupported_attention_does_not_use_splash():
    query, segments = jnp.zeros((1, 256, 2, 8)), jnp.ones((1, 256), jnp.int32)
    plain = attention.Mask(segments, segments, 0)
    assert attention.splash_fits(query, plain)
    for lacking in (
        plain.replace(offset=3),
        plain.replace(is_prefix_BxS=segments),
        plain.replace(bias_HxLxS=jnp.zeros((2, 256, 256))),
        plain.replace(key_segments_BxS=jnp.ones((1, 512), jnp.int32)),
    ):
        assert not attention.splash_fits(query, lacking)
    assert not attention.splash_fits(query[:, :100], plain.replace(query_segments_BxL=segments[:, :100]))


def test_a_bert_equals_its_formulas_in_float64():
    """Post-norm, the norm of the embeddings, exact GELU, the transform before the output projection and its biases."""
    cfg, model, params = toys.decoder(toys.BERT, SEQ_LEN)
    batch = toys.batch(2, SEQ_LEN)
    batch["type_ids"] = (np.arange(SEQ_LEN) % 2)[None].repeat(2, 0).astype(np.int32)
    leaves = {path: (np.asarray(leaf, np.float64), np.zeros(1)) for path, leaf in param_paths.flatten(params).items()}

    def norm(path, x, own=leaves):
        return reference.norm(own, path, x, "layernorm", cfg.norm_eps)[0]

    def gelu(x):
        return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))

    ids = {"embedding": "tokens", "position_embedding": "positions", "type_embedding": "type_ids"}
    x = norm("embed/norm", sum(leaves[f"embed/{table}"][0][batch[key]] for table, key in ids.items()))
    segments = batch["segment_ids"]
    mask = (segments[:, :, None] == segments[:, None, :])[:, None]
    for n in range(cfg.num_layers):
        layer = {
            path.removeprefix("encoder/layers/"): (pair[0][n], None)
            for path, pair in leaves.items()
            if "layers" in path
        }
        attended, _ = reference.attention(layer, x, mask, batch["positions"], cfg)
        x = norm("attention_norm", x + attended, layer)
        up, _ = reference.linear(layer, "mlp/up", x)
        x = norm("mlp_norm", x + reference.linear(layer, "mlp/down", gelu(up))[0], layer)
    transformed = norm("lm_transform/norm", gelu(reference.linear(leaves, "lm_transform/dense", x)[0]))
    logits = transformed @ leaves["embed/embedding"][0].T + leaves["lm_transform/output_bias"][0]

    out = model.apply(params, batch)
    real = segments > 0
    mine = losses.logits(out.pre_logits_BxLxD, out.unembed_DxV, vocab_size=toys.VOCAB)[..., : toys.VOCAB]
    np.testing.assert_allclose(np.asarray(out.hidden_BxLxD)[real], x[real], rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.asarray(mine)[real], logits[..., : toys.VOCAB][real], rtol=0, atol=2e-5)
