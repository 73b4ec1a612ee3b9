"""The decoder and its loss in float64 numpy, forward and backward by hand: what the JAX code is tested against.

It shares nothing with the code it checks but the names of parameters and of config keys. Each layer takes an input and
returns its output and a function from the output's gradient to the input's, which also adds the gradients of the
layer's parameters to their arrays. Shape letters as in `lm/types.py`; M = L, on the side of the keys.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lm import param_paths
from lm.config import LossConfig, ModelConfig

Array = np.ndarray
Backward = Callable[[Array], Array]
# Path -> (value, gradient); gradients are added to in place.
Leaves = dict[str, tuple[Array, Array]]


def loss_and_grads(
    params: Mapping[str, Any], batch: Mapping[str, Any], cfg: ModelConfig, loss: LossConfig, vocab_size: int
) -> tuple[float, float, dict[str, Any]]:
    """Sum of the weighted loss, sum of the weights, and the gradient of the sum, a float64 tree like `params`.

    Dropout is off. `batch` holds tokens, targets, loss_weights, segment_ids and positions, all [B, L].
    """
    values = {path: np.asarray(leaf, np.float64) for path, leaf in param_paths.flatten(params).items()}
    leaves = {path: (value, np.zeros(value.shape)) for path, value in values.items()}
    hidden_BxLxD, backward = decoder(leaves, {key: np.asarray(x) for key, x in batch.items()}, cfg)

    embedding_VxD, d_embedding_VxD = leaves["embed/embedding"]
    tied = embedding_VxD.T, d_embedding_VxD.T  # views, so that adding to the gradient adds to the embedding's
    unembed_DxV, d_unembed_DxV = tied if cfg.tie_embeddings else leaves["lm_head/kernel"]
    total, _, _, d_hidden_BxLxD, d_unembed = cross_entropy(
        hidden_BxLxD,
        unembed_DxV,
        batch["targets"],
        batch["loss_weights"],
        vocab_size=vocab_size,
        z_loss=loss.z_loss,
        label_smoothing=loss.label_smoothing,
        softcap=cfg.logit_softcap,
    )
    d_unembed_DxV[...] += d_unembed
    backward(d_hidden_BxLxD)
    weight = np.asarray(batch["loss_weights"], np.float64).sum()
    return float(total), float(weight), param_paths.unflatten({path: grad for path, (_, grad) in leaves.items()})


def cross_entropy(
    hidden: Array,
    unembed_DxV: Array,
    targets: Array,
    weights: Array,
    *,
    vocab_size: int,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
) -> tuple[float, float, float, Array, Array]:
    """Sums of weighted loss, negative log-likelihood and correct tokens; gradients of the first by hidden and unembed.

    hidden is [B, L, D]; columns of unembed from `vocab_size` on are padding. Targets may be anything at weight 0.
    """
    hidden, unembed_DxV, weights = (np.asarray(x, np.float64) for x in (hidden, unembed_DxV, weights))
    targets = np.where(weights != 0, targets, 0)
    raw = hidden @ unembed_DxV[:, :vocab_size]
    logits = softcap * np.tanh(raw / softcap) if softcap else raw
    largest = logits.max(-1, keepdims=True)
    lse = largest + np.log(np.exp(logits - largest).sum(-1, keepdims=True))
    one_hot = np.eye(vocab_size)[targets]
    nll = -(one_hot * (logits - lse)).sum(-1)
    smooth = (lse - logits).mean(-1)
    loss = (1 - label_smoothing) * nll + label_smoothing * smooth + z_loss * lse[..., 0] ** 2
    correct = logits.argmax(-1) == targets

    p = np.exp(logits - lse)
    d_logits = p - (1 - label_smoothing) * one_hot - label_smoothing / vocab_size + 2 * z_loss * lse * p
    d_logits *= weights[..., None]
    if softcap:
        d_logits /= np.cosh(raw / softcap) ** 2
    d_unembed_DxV = np.zeros(unembed_DxV.shape)
    d_unembed_DxV[:, :vocab_size] = np.einsum("bld,blv->dv", hidden, d_logits)
    total, nll_total, correct_total = ((weights * x).sum() for x in (loss, nll, correct))
    return total, nll_total, correct_total, d_logits @ unembed_DxV[:, :vocab_size].T, d_unembed_DxV


def decoder(leaves: Leaves, batch: Mapping[str, Array], cfg: ModelConfig) -> tuple[Array, Callable[[Array], None]]:
    """Last hidden states [B, L, D], and the function that takes their gradient back to every leaf it depends on."""
    tokens, positions = batch["tokens"], batch["positions"]
    embedding, d_embedding = leaves["embed/embedding"]
    x = embedding[tokens]
    if cfg.position == "learned":
        x = x + leaves["embed/position_embedding"][0][positions]

    mask = attention_mask(batch["segment_ids"], cfg.sliding_window)
    prefix = "decoder/layers/"
    backwards = []
    for n in range(cfg.num_layers):
        layer = {
            path.removeprefix(prefix): (value[n], grad[n])
            for path, (value, grad) in leaves.items()
            if path.startswith(prefix)
        }
        x, backward = block(layer, x, mask, positions, cfg)
        backwards.append(backward)
    x, final_backward = norm(leaves, "decoder/final_norm", x, cfg.norm, cfg.norm_eps)

    def backward_all(d: Array) -> None:
        d = final_backward(d)
        for backward in reversed(backwards):
            d = backward(d)
        np.add.at(d_embedding, tokens, d)
        if cfg.position == "learned":
            np.add.at(leaves["embed/position_embedding"][1], positions, d)

    return x, backward_all


def block(layer: Leaves, x: Array, mask: Array, positions: Array, cfg: ModelConfig) -> tuple[Array, Backward]:
    """x + attention(norm(x)), then x + mlp(norm(x))."""
    normed, attention_norm_backward = norm(layer, "attention_norm", x, cfg.norm, cfg.norm_eps)
    attended, attention_backward = attention(layer, normed, mask, positions, cfg)
    x = x + attended
    normed, mlp_norm_backward = norm(layer, "mlp_norm", x, cfg.norm, cfg.norm_eps)
    mixed, mlp_backward = (swiglu_mlp if cfg.mlp == "swiglu" else gelu_mlp)(layer, normed)

    def backward(d: Array) -> Array:
        d = d + mlp_norm_backward(mlp_backward(d))
        return d + attention_norm_backward(attention_backward(d))

    return x + mixed, backward


def norm(leaves: Leaves, path: str, x: Array, kind: str, eps: float) -> tuple[Array, Backward]:
    """LayerNorm or RMSNorm over the last axis."""
    scale, d_scale = leaves[f"{path}/scale"]
    bias, d_bias = leaves.get(f"{path}/bias", (0.0, None))
    axes = tuple(range(x.ndim - 1))
    centred = x - x.mean(-1, keepdims=True) if kind == "layernorm" else x
    inverse = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    unit = centred * inverse

    def backward(d: Array) -> Array:
        d_scale[...] += (d * unit).sum(axes)
        if d_bias is not None:
            d_bias[...] += d.sum(axes)
        d_unit = d * scale
        d_centred = inverse * (d_unit - unit * (d_unit * unit).mean(-1, keepdims=True))
        return d_centred - d_centred.mean(-1, keepdims=True) if kind == "layernorm" else d_centred

    return unit * scale + bias, backward


def linear(leaves: Leaves, path: str, x: Array) -> tuple[Array, Backward]:
    """x [B, L, in] @ kernel [in, out], plus the bias where there is one."""
    kernel, d_kernel = leaves[f"{path}/kernel"]
    bias, d_bias = leaves.get(f"{path}/bias", (0.0, None))

    def backward(d: Array) -> Array:
        d_kernel[...] += np.einsum("bli,blo->io", x, d)
        if d_bias is not None:
            d_bias[...] += d.sum((0, 1))
        return d @ kernel.T

    return x @ kernel + bias, backward


def gelu_mlp(layer: Leaves, x: Array) -> tuple[Array, Backward]:
    """GELU in GPT-2's approximation: u / 2 * (1 + tanh(sqrt(2 / pi) * (u + 0.044715 u^3)))."""
    u, up_backward = linear(layer, "mlp/up", x)
    c = np.sqrt(2 / np.pi)
    t = np.tanh(c * (u + 0.044715 * u**3))
    y, down_backward = linear(layer, "mlp/down", 0.5 * u * (1 + t))

    def backward(d: Array) -> Array:
        slope = 0.5 * (1 + t) + 0.5 * u * (1 - t**2) * c * (1 + 3 * 0.044715 * u**2)
        return up_backward(down_backward(d) * slope)

    return y, backward


def swiglu_mlp(layer: Leaves, x: Array) -> tuple[Array, Backward]:
    """down(silu(gate(x)) * up(x))."""
    gate, gate_backward = linear(layer, "mlp/gate", x)
    up, up_backward = linear(layer, "mlp/up", x)
    sigmoid = 1 / (1 + np.exp(-gate))
    y, down_backward = linear(layer, "mlp/down", gate * sigmoid * up)

    def backward(d: Array) -> Array:
        d = down_backward(d)
        d_gate = d * up * sigmoid * (1 + gate * (1 - sigmoid))
        return gate_backward(d_gate) + up_backward(d * gate * sigmoid)

    return y, backward


def attention_mask(segment_ids_BxL: Array, window: int) -> Array:
    """True [B, 1, L, M] where query l sees key m: same segment, m <= l, and l - m < window unless that is 0."""
    index = np.arange(segment_ids_BxL.shape[1])
    distance_LxM = index[:, None] - index[None, :]
    near = (distance_LxM >= 0) & (distance_LxM < (window or len(index)))
    same = segment_ids_BxL[:, :, None] == segment_ids_BxL[:, None, :]
    return (same & near)[:, None]


def attention(
    layer: Leaves, x_BxLxD: Array, mask: Array, positions_BxL: Array, cfg: ModelConfig
) -> tuple[Array, Backward]:
    """Multi-head attention; query head h reads key/value head h // (H / K)."""
    B, L, _ = x_BxLxD.shape
    H = cfg.num_heads
    K = cfg.num_kv_heads or H
    E = cfg.head_dim or cfg.embed_dim // H
    query, query_backward = heads(layer, "query", x_BxLxD, (B, L, H, E), positions_BxL, cfg)
    key, key_backward = heads(layer, "key", x_BxLxD, (B, L, K, E), positions_BxL, cfg)
    value, value_backward = linear(layer, "attention/value", x_BxLxD)
    key = key.repeat(H // K, axis=2)
    value = value.reshape(B, L, K, E).repeat(H // K, axis=2)

    scores = np.einsum("blhe,bmhe->bhlm", query, key) / np.sqrt(E)
    cap = cfg.attention_softcap
    capped = cap * np.tanh(scores / cap) if cap else scores
    masked = np.where(mask, capped, -np.inf)
    unnormalised = np.exp(masked - masked.max(-1, keepdims=True))
    p = unnormalised / unnormalised.sum(-1, keepdims=True)
    mixed = np.einsum("bhlm,bmhe->blhe", p, value)
    out, out_backward = linear(layer, "attention/out", mixed.reshape(B, L, H * E))

    def per_kv_head(d_BxLxHxE: Array) -> Array:
        return d_BxLxHxE.reshape(B, L, K, H // K, E).sum(3)

    def backward(d: Array) -> Array:
        d_mixed = out_backward(d).reshape(B, L, H, E)
        d_value = per_kv_head(np.einsum("bhlm,blhe->bmhe", p, d_mixed))
        d_p = np.einsum("blhe,bmhe->bhlm", d_mixed, value)
        d_scores = p * (d_p - (d_p * p).sum(-1, keepdims=True))
        if cap:
            d_scores = d_scores / np.cosh(scores / cap) ** 2
        d_scores = d_scores / np.sqrt(E)
        d_query = np.einsum("bhlm,bmhe->blhe", d_scores, key)
        d_key = per_kv_head(np.einsum("bhlm,blhe->bmhe", d_scores, query))
        return query_backward(d_query) + key_backward(d_key) + value_backward(d_value.reshape(B, L, K * E))

    return out, backward


def heads(
    layer: Leaves, name: str, x_BxLxD: Array, shape: tuple[int, int, int, int], positions: Array, cfg: ModelConfig
) -> tuple[Array, Backward]:
    """Queries or keys in `shape` [B, L, heads, E]: projected, normed over E with qk_norm, rotated with rope."""
    projected, linear_backward = linear(layer, f"attention/{name}", x_BxLxD)
    y = projected.reshape(shape)
    if cfg.qk_norm:
        y, norm_backward = norm(layer, f"attention/{name}_norm", y, "rmsnorm", cfg.norm_eps)
    if cfg.position == "rope":
        y = rotate(y, positions, cfg.rope_theta)

    def backward(d: Array) -> Array:
        if cfg.position == "rope":
            d = rotate(d, -positions, cfg.rope_theta)  # a rotation's transpose is the rotation back
        if cfg.qk_norm:
            d = norm_backward(d)
        return linear_backward(d.reshape(projected.shape))

    return y, backward


def rotate(x_BxLxHxE: Array, positions_BxL: Array, theta: float) -> Array:
    """RoPE: the pair (i, i + E/2) turns by position * theta^(-2i/E)."""
    half = x_BxLxHxE.shape[-1] // 2
    angle = positions_BxL[:, :, None, None] * theta ** (-np.arange(half) / half)
    first, second = x_BxLxHxE[..., :half], x_BxLxHxE[..., half:]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
