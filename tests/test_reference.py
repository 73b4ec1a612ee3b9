"""The numpy reference itself: backward against finite differences, forward against jax.nn and worked examples."""

import jax
import numpy as np
import pytest

from lm import param_paths
from lm.config import LossConfig, ModelConfig
from tests import reference

VOCAB, VOCAB_ROWS = 13, 16
STYLES = {
    "gpt2": ModelConfig(num_layers=2, embed_dim=12, num_heads=3, vocab_size=VOCAB_ROWS, max_len=8),
    "llama": ModelConfig(
        num_layers=2,
        embed_dim=10,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        mlp_dim=14,
        vocab_size=VOCAB_ROWS,
        position="rope",
        rope_theta=100.0,
        norm="rmsnorm",
        mlp="swiglu",
        use_bias=False,
        tie_embeddings=False,
        qk_norm=True,
        logit_softcap=4.0,
        attention_softcap=2.0,
        sliding_window=3,
    ),
}
LOSS = LossConfig(z_loss=1e-2, label_smoothing=0.1)


def make_params(cfg: ModelConfig, seed: int = 0) -> dict:
    """Random float64 parameters with the paths and shapes of the model; scales near 1, nothing near 0."""
    rng = np.random.default_rng(seed)
    D, V, N, H = cfg.embed_dim, cfg.vocab_size, cfg.num_layers, cfg.num_heads
    K, E, F = cfg.num_kv_heads or H, cfg.head_dim or D // H, cfg.mlp_dim or 4 * D
    shapes = {"embed/embedding": (V, D), "decoder/final_norm/scale": (D,)}
    if cfg.position == "learned":
        shapes["embed/position_embedding"] = (cfg.max_len, D)
    if not cfg.tie_embeddings:
        shapes["lm_head/kernel"] = (D, V)
    kernels = {"attention/query": (D, H * E), "attention/key": (D, K * E), "attention/value": (D, K * E)}
    kernels |= {"attention/out": (H * E, D), "mlp/up": (D, F), "mlp/down": (F, D)}
    kernels |= {"mlp/gate": (D, F)} if cfg.mlp == "swiglu" else {}
    for name, (d_in, d_out) in kernels.items():
        shapes[f"decoder/layers/{name}/kernel"] = (N, d_in, d_out)
        if cfg.use_bias:
            shapes[f"decoder/layers/{name}/bias"] = (N, d_out)
    for name in ("attention_norm", "mlp_norm"):
        shapes[f"decoder/layers/{name}/scale"] = (N, D)
        if cfg.use_bias:
            shapes[f"decoder/layers/{name}/bias"] = (N, D)
    if cfg.use_bias:
        shapes["decoder/final_norm/bias"] = (D,)
    if cfg.qk_norm:
        shapes |= {f"decoder/layers/attention/{name}_norm/scale": (N, E) for name in ("query", "key")}

    def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
        noise = rng.normal(size=shape)
        return 1 + 0.3 * noise if path.endswith("scale") else 0.4 * noise

    return param_paths.unflatten({path: draw(path, shape) for path, shape in sorted(shapes.items())})


def make_batch(seed: int = 0) -> dict[str, np.ndarray]:
    """Two rows: two documents and padding; one document. Some weights are 0, the others differ."""
    rng = np.random.default_rng(seed)
    segment_ids = np.array([[1, 1, 1, 2, 2, 2, 2, 0], [1] * 8])
    positions = np.array([[0, 1, 2, 0, 1, 2, 3, 0], list(range(8))])
    weights = np.where(segment_ids > 0, rng.choice([0, 0.5, 1, 2], size=(2, 8)), 0)
    tokens, targets = rng.integers(0, VOCAB, size=(2, 2, 8))
    return dict(tokens=tokens, targets=targets, loss_weights=weights, segment_ids=segment_ids, positions=positions)


def hidden_states(params: dict, batch: dict, cfg: ModelConfig) -> np.ndarray:
    leaves = {path: (value, np.zeros(value.shape)) for path, value in param_paths.flatten(params).items()}
    return reference.decoder(leaves, batch, cfg)[0]


@pytest.mark.parametrize("style", STYLES)
def test_gradients_match_finite_differences(style):
    """Along a random direction of each whole leaf, and at single entries: some random ones, and the largest."""
    cfg, batch = STYLES[style], make_batch()
    params = make_params(cfg)
    _, weight, grads = reference.loss_and_grads(params, batch, cfg, LOSS, VOCAB)
    assert weight == batch["loss_weights"].sum() > 0
    flat, flat_grads = param_paths.flatten(params), param_paths.flatten(grads)
    assert flat.keys() == flat_grads.keys()
    rng = np.random.default_rng(1)
    step = 1e-5

    for path, leaf in flat.items():
        grad = flat_grads[path]
        assert grad.shape == leaf.shape
        largest = np.abs(grad).max()
        # Softmax does not see what all keys share, so this gradient is 0 but for rounding.
        assert largest > 1e-2 or path.endswith("key/bias"), path

        entries = np.append(rng.choice(leaf.size, size=3, replace=False), np.abs(grad).argmax())
        directions = [np.eye(1, leaf.size, entry).reshape(leaf.shape) for entry in entries]
        whole = rng.normal(size=leaf.shape)
        for direction in [*directions, whole / np.linalg.norm(whole)]:
            above, below = (
                reference.loss_and_grads(
                    param_paths.unflatten(flat | {path: leaf + sign * step * direction}), batch, cfg, LOSS, VOCAB
                )[0]
                for sign in (1, -1)
            )
            difference = (above - below) / (2 * step)
            assert abs(difference - (grad * direction).sum()) <= 1e-6 * largest + 1e-8, path


@pytest.mark.parametrize("style", STYLES)
def test_padded_vocabulary_and_unused_rows_have_gradient_0(style):
    cfg, batch = STYLES[style], make_batch()
    grads = param_paths.flatten(reference.loss_and_grads(make_params(cfg), batch, cfg, LOSS, VOCAB)[2])
    unembed = grads["embed/embedding"] if cfg.tie_embeddings else grads["lm_head/kernel"].T
    assert np.all(unembed[VOCAB:] == 0)
    assert np.all(np.abs(unembed[:VOCAB]).max(axis=1) > 0)


@pytest.mark.parametrize("style", STYLES)
def test_packed_documents_are_as_if_alone(style):
    cfg, batch = STYLES[style], make_batch()
    params = make_params(cfg)
    packed = hidden_states(params, batch, cfg)
    for document in (slice(0, 3), slice(3, 7)):
        alone = hidden_states(params, {key: value[:1, document] for key, value in batch.items()}, cfg)
        np.testing.assert_allclose(packed[:1, document], alone, rtol=1e-12, atol=1e-12)


def test_rope_depends_on_relative_positions_only():
    cfg, batch = STYLES["llama"], make_batch()
    params = make_params(cfg)
    here = hidden_states(params, batch, cfg)
    shifted = hidden_states(params, batch | {"positions": batch["positions"] + 5}, cfg)
    stretched = hidden_states(params, batch | {"positions": batch["positions"] * 2}, cfg)
    np.testing.assert_allclose(shifted, here, rtol=1e-10, atol=1e-10)
    assert np.abs(stretched - here).max() > 1e-3


def test_rotate_turns_the_pair_i_and_i_plus_half():
    x = np.zeros((1, 2, 1, 4))
    x[0, :, 0, :] = [1, 3, 0, 2]  # the pairs are (1, 0) and (3, 2)
    out = reference.rotate(x, np.array([[0, 3]]), theta=100.0)
    slow = 3 * 100 ** (-2 / 4)
    np.testing.assert_allclose(out[0, 0, 0], [1, 3, 0, 2])
    turned = (3 + 2j) * np.exp(1j * slow)
    np.testing.assert_allclose(out[0, 1, 0], [np.cos(3), turned.real, np.sin(3), turned.imag])


def test_attention_mask_example():
    mask = reference.attention_mask(np.array([[1, 1, 1, 2, 2]]), window=2)
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    np.testing.assert_array_equal(mask, np.array(expected, bool)[None, None])
    without_window = reference.attention_mask(np.array([[1, 1, 1, 2, 2]]), window=0)
    assert without_window.sum() == 6 + 3


def test_attention_matches_jax_nn():
    """Grouped heads, scale, causal window: against jax.nn.dot_product_attention, with identity projections."""
    cfg = ModelConfig(embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=4, sliding_window=3, use_bias=False)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 6, 16))
    kernels = {name: rng.normal(size=(16, width)) for name, width in [("query", 16), ("key", 8), ("value", 8)]}
    layer = {f"attention/{name}/kernel": (kernel, kernel) for name, kernel in kernels.items()}
    layer["attention/out/kernel"] = (np.eye(16), np.eye(16))
    mask = reference.attention_mask(np.ones((2, 6)), 3)
    out, _ = reference.attention(layer, x, mask, np.arange(6)[None], cfg)
    query, key, value = ((x @ kernel).reshape(2, 6, -1, 4).astype(np.float32) for kernel in kernels.values())
    expected = jax.nn.dot_product_attention(query, key, value, is_causal=True, local_window_size=(2, 0))
    np.testing.assert_allclose(out, np.asarray(expected).reshape(2, 6, 16), rtol=1e-4, atol=1e-5)


def test_attention_norms_then_rotates_then_caps():
    """One head and two positions, the second one written out."""
    cfg = ModelConfig(embed_dim=4, num_heads=1, position="rope", rope_theta=9.0, qk_norm=True, attention_softcap=0.5)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 2, 4))
    layer = {f"attention/{name}/kernel": (rng.normal(size=(4, 4)),) * 2 for name in ("query", "key", "value", "out")}
    layer |= {f"attention/{name}_norm/scale": (rng.normal(size=4),) * 2 for name in ("query", "key")}
    positions = np.array([[0, 1]])
    out, _ = reference.attention(layer, x, np.tri(2, dtype=bool)[None, None], positions, cfg)

    def head(name):
        y = x @ layer[f"attention/{name}/kernel"][0]
        y = y / np.sqrt((y**2).mean(-1, keepdims=True) + cfg.norm_eps) * layer[f"attention/{name}_norm/scale"][0]
        return reference.rotate(y[:, :, None], positions, 9.0)[0, :, 0]

    scores = head("key") @ head("query")[1] / 2
    p = np.exp(0.5 * np.tanh(scores / 0.5))
    expected = p / p.sum() @ x[0] @ layer["attention/value/kernel"][0] @ layer["attention/out/kernel"][0]
    np.testing.assert_allclose(out[0, 1], expected)


def test_norms_and_mlps_match_jax_nn():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 8)) + 1
    scale, bias = rng.normal(size=(2, 8))
    leaves = {"norm/scale": (scale, scale), "norm/bias": (bias, bias)}
    x32 = x.astype(np.float32)
    layer_norm = np.asarray(jax.nn.standardize(x32, epsilon=0.1)) * scale + bias
    np.testing.assert_allclose(reference.norm(leaves, "norm", x, "layernorm", 0.1)[0], layer_norm, rtol=1e-4, atol=1e-5)
    rms_norm = x / np.sqrt((x * x).mean(-1, keepdims=True) + 0.1) * scale + bias
    np.testing.assert_allclose(reference.norm(leaves, "norm", x, "rmsnorm", 0.1)[0], rms_norm)

    up, gate, down = rng.normal(size=(3, 8, 8))
    layer = {f"mlp/{name}/kernel": (kernel, kernel) for name, kernel in [("up", up), ("gate", gate), ("down", down)]}
    gelu = np.asarray(jax.nn.gelu((x @ up).astype(np.float32), approximate=True)) @ down
    np.testing.assert_allclose(reference.gelu_mlp(layer, x)[0], gelu, rtol=1e-4, atol=1e-4)
    swiglu = (np.asarray(jax.nn.silu((x @ gate).astype(np.float32))) * (x @ up)) @ down
    np.testing.assert_allclose(reference.swiglu_mlp(layer, x)[0], swiglu, rtol=1e-4, atol=1e-4)


def test_cross_entropy_of_equal_logits_and_against_jax_nn():
    rng = np.random.default_rng(0)
    hidden, unembed = rng.normal(size=(1, 3, 4)), rng.normal(size=(4, VOCAB_ROWS))
    targets, weights = np.array([[1, 2, -100]]), np.array([[1.0, 2.0, 0.0]])
    options = dict(vocab_size=VOCAB, z_loss=0.5, label_smoothing=0.1)
    total, nll, *_ = reference.cross_entropy(0 * hidden, unembed, targets, weights, **options)
    np.testing.assert_allclose([total, nll], [3 * (np.log(VOCAB) + 0.5 * np.log(VOCAB) ** 2), 3 * np.log(VOCAB)])

    logits = 2 * np.tanh(hidden @ unembed[:, :VOCAB] / 2)
    log_p = np.asarray(jax.nn.log_softmax(logits.astype(np.float32)))[0]
    _, nll, correct, *_ = reference.cross_entropy(hidden, unembed, targets, weights, vocab_size=VOCAB, softcap=2.0)
    np.testing.assert_allclose(nll, -(log_p[0, 1] + 2 * log_p[1, 2]), rtol=1e-5)
    assert correct == (log_p[0].argmax() == 1) + 2 * (log_p[1].argmax() == 2)
