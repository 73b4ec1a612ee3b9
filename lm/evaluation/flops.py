"""Model FLOPs of training on a token, and model FLOPs utilisation (MFU)."""

from lm.config import ModelConfig


def train_flops_per_token(
    model: ModelConfig, seq_len: int, vocab_size: int, *, causal_half: bool = False
) -> float | None:
    """Model FLOPs of a forward and backward pass for one position: 6 N + 12 H E context, summed over layers.

    N is the number of parameters in matrices that a token is multiplied with: those of the blocks (only the experts it
    is routed to) and the output projection, tied or not, but not the embedding, which is a look-up. Norms and biases,
    below 0.1%, are left out. The second term is the attention scores and the weighted sum of the values. There are two
    conventions: attention counted in full (PaLM, arXiv:2204.02311, appendix B), and its causal half, as MaxText counts
    since 2025. The context is seq_len, or in a layer with a sliding window the window if that is shorter; its causal
    half is the mean number of keys that a position attends to, taken as context - context^2 / (2 seq_len), which is
    seq_len / 2 without a window.
    Recomputation (remat) does not count, and frozen parameters count as trained ones.

    Args:
      model: its sizes.
      seq_len: positions in a row.
      vocab_size: rows of the output projection.
      causal_half: use the second convention; no difference for models whose attention is not causal.

    Returns:
      None for encoder-decoders and masked autoencoders, whose positions do not each pass through every layer once.
    """
    if model.decoder_layers or model.kind in ("encoder_decoder", "mae"):
        return None
    heads, width = model.num_heads, model.embed_dim
    head_dim = model.head_dim or width // heads
    kv_heads = model.num_kv_heads or heads
    mlp_dim = model.mlp_dim or 4 * width
    attention = width * head_dim * (2 * heads + 2 * kv_heads)  # query and out; key and value
    mlp = width * mlp_dim * (3 if model.mlp in ("swiglu", "geglu") else 2)
    if experts := model.num_experts:
        mlp = model.experts_per_token * mlp + width * experts  # the router
    matrices = model.num_layers * (attention + mlp) + width * (vocab_size + width * model.lm_transform)
    without_window = model.num_layers // model.global_every if model.global_every else 0
    contexts = 0.0  # summed over layers
    for layers, reach in ((without_window, 0), (model.num_layers - without_window, model.sliding_window)):
        context = float(min(seq_len, reach or seq_len))
        if causal_half and model.kind in ("decoder", "prefix_decoder"):
            context -= context**2 / (2 * seq_len)
        contexts += layers * context
    return 6.0 * matrices + 12.0 * contexts * heads * head_dim


# FLOP/s of one *JAX device*, dense bfloat16 (no structured sparsity), by the start of `device_kind`; the first match
# wins. A chip of TPU v2, v3 or 7x is two devices, so each has half of the chip's peak.
# TPU: "peak compute per chip" from cloud.google.com/tpu/docs/system-architecture-tpu-vm and the page of each version;
# device kinds as in jax/_src/pallas/mosaic/tpu_info.py. GPU: the data sheets, whose figures from Ampere on are with
# sparsity and therefore halved here; the SXM part where the name says neither PCIe nor NVL.
PEAK_FLOPS = (
    ("TPU v2", 46e12 / 2),
    ("TPU v3", 123e12 / 2),
    ("TPU v4 lite", 138e12),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),  # v5p; its kind is 'TPU v5' or 'TPU v5p'
    ("TPU v6", 918e12),  # v6e; 'TPU v6 lite' or 'TPU v6e'
    ("TPU7", 2307e12 / 2),  # Ironwood
    ("NVIDIA A100", 312e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA H100", 989e12),
    ("NVIDIA H200 NVL", 835e12),
    ("NVIDIA H200", 989e12),
    ("NVIDIA GH200", 989e12),
    ("NVIDIA B200", 2250e12),
    ("NVIDIA GB200", 2500e12),
)


def peak_flops(device_kind: str) -> float | None:
    """Peak dense bfloat16 FLOP/s of one device of `jax.Device.device_kind`; None where it is not known (every CPU)."""
    return next((peak for prefix, peak in PEAK_FLOPS if device_kind.startswith(prefix)), None)


def mfu(tokens_per_second: float, flops_per_token: float | None, device_kind: str, num_devices: int) -> float | None:
    """Model FLOPs utilisation in [0, 1]: the model's FLOP/s divided by the bfloat16 peak of all devices.

    Args:
      tokens_per_second: over all devices.
      flops_per_token: see `train_flops_per_token`.
      device_kind: of `jax.Device`.
      num_devices: JAX devices, over all hosts.

    Returns:
      None where the peak or the FLOPs are not known.
    """
    peak = peak_flops(device_kind)
    return (
        None if peak is None or flops_per_token is None else tokens_per_second * flops_per_token / (peak * num_devices)
    )
