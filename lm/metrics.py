"""Metrics that merge exactly, and the arithmetic of FLOPs.

A metric is a (sum, weight) pair and its value is sum / weight, divided once, at the very end: adding the pairs of
micro-batches, batches, shards or hosts gives what one pass over all of it would have given. There is no mean of means.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lm.config import ModelConfig

# name -> (sum, weight), on the host in float64. Examples, over all tokens with a loss weight:
#   loss           (what is optimised, weight)  label smoothing and z-loss included
#   nll            (-log p(target) in nats, weight)
#   bits_per_byte  (-log2 p(target), UTF-8 bytes the targets stand for)
Sums = dict[str, tuple[float, float]]


# Objective -> what its loss, and its nll where it has one, are measured in.
LOSS_UNITS = {
    "clm": "nats per token",
    "seq2seq": "nats per token",
    "mlm": "nats per hidden token",
    "next_item": "nats per item",
    "masked_item": "nats per hidden item",
    "classification": "nats per example",
    "verbalizer": "nats per example",
    "tagging": "nats per word",
    "span_qa": "nats per window",
    "contrastive": "nats per example",
    "regression": "squared error per example",
    "mae": "squared error per hidden patch",
    "multitask": "nats or squared error per example",
}
LANGUAGE_MODELS = ("clm", "seq2seq", "mlm")  # objectives whose nll has a perplexity
_LOSS = "that of the objective's loss"


class About(NamedTuple):
    """What a metric is.

    Attributes:
      title: its name in a table or above a curve.
      unit: of its values; '' = none, as of a share.
      less_is_better: whether a smaller value is the better one.
    """

    title: str
    unit: str = ""
    less_is_better: bool = False


METRICS = {
    "loss": About("Loss", _LOSS, less_is_better=True),
    "nll": About("NLL", _LOSS, less_is_better=True),
    "answer_loss": About("NLL of the answers", _LOSS, less_is_better=True),
    "perplexity": About("Perplexity", less_is_better=True),
    "bits_per_byte": About("Bits per byte", less_is_better=True),
    "accuracy": About("Accuracy"),
    "pair_accuracy": About("Accuracy of the pairs' labels"),
    "token_accuracy": About("Accuracy over words"),
    "f1": About("F1"),
    "matthews": About("Matthews correlation"),
    "pearson": About("Pearson correlation"),
    "spearman": About("Spearman correlation"),
    "exact_match": About("Exact match"),
    "HasAns_exact": About("Exact match where there is an answer"),
    "HasAns_f1": About("F1 where there is an answer"),
    "NoAns_exact": About("Exact match where there is none"),
    "NoAns_f1": About("F1 where there is none"),
    "best_exact": About("Exact match at the best threshold"),
    "best_f1": About("F1 at the best threshold"),
    "best_exact_thresh": About("Threshold of the best exact match"),
    "best_f1_thresh": About("Threshold of the best F1"),
    "entity_f1": About("Entity F1"),
    "entity_f1_strict": About("Entity F1, strict"),
    "entity_precision": About("Entity precision"),
    "entity_recall": About("Entity recall"),
    "mean_score": About("Mean score of the tasks"),
    "hr_at_10": About("Hit rate at 10"),
    "ndcg_at_10": About("NDCG at 10"),
    "alignment": About("Alignment", "squared distance", less_is_better=True),
    "uniformity": About("Uniformity", less_is_better=True),
    "balance": About("Balance of the experts", less_is_better=True),
    "weight": About("Weight of the batch"),
    "learning_rate": About("Learning rate"),
    "grad_norm": About("Gradient norm"),
    "tokens_per_second": About("Tokens per second"),
    "tokens_per_second_a_device": About("Tokens per second and device"),
    "mfu": About("MFU, attention in full"),
    "mfu_causal": About("MFU, attention's causal half"),
    "input_bound": About("Input-bound", "share of the time"),
}


def about(name: str, objective: str = "", labels: Sequence[str] = ()) -> About:
    """What is known of a metric; of 'NAME_loss', the loss of the source or the task NAME, what is known of 'loss'.

    A name that is not in `METRICS` is its own title, and more of it is better.

    Args:
      name: as an evaluation reports it.
      objective: of the run, which says what its loss is measured in; '' = not known.
      labels: `data.labels`, which tell the tasks of a mixture that have numbers.
    """
    words = name.split("_")
    own = next((i for i in range(len(words)) if "_".join(words[i:]) in METRICS), None)
    if own is None:
        return About(name)
    found, prefix = METRICS["_".join(words[own:])], "_".join(words[:own])
    if found.unit == _LOSS:
        unit = LOSS_UNITS.get(objective, "")
        if objective == "multitask" and prefix:
            unit = LOSS_UNITS["regression" if f"{prefix}/" in labels else "classification"]
        found = found._replace(unit=unit)
    return found._replace(title=f"{prefix}: {found.title}") if prefix else found


def nll_metrics(nll_sum: Any, weight_sum: Any, byte_sum: Any) -> dict[str, tuple[Any, Any]]:
    """The pairs that every token likelihood reports; for `LossTerms.metrics`, also inside jit.

    Args:
      nll_sum: [], sum of loss_weight * -log p(target), in nats.
      weight_sum: [], sum of loss_weight.
      byte_sum: [], sum of the UTF-8 bytes of the targets that have a weight; control symbols stand for 0 bytes.
    """
    return {"nll": (nll_sum, weight_sum), "bits_per_byte": (nll_sum / math.log(2), byte_sum)}


def add(total: Mapping[str, tuple[Any, Any]], part: Mapping[str, tuple[Any, Any]]) -> Sums:
    """The sums of both, in float64. A name that only one of them has is kept. Scalars of any kind are taken."""
    out = {name: (float(value), float(weight)) for name, (value, weight) in total.items()}
    for name, (value, weight) in part.items():
        old_value, old_weight = out.get(name, (0.0, 0.0))
        out[name] = (old_value + float(value), old_weight + float(weight))
    return out


def gain(name: str, value: float) -> float:
    """A number that is larger for the better value of a metric: `value`, or minus it where less is better."""
    return -value if about(name).less_is_better else value


def finalize(sums: Mapping[str, tuple[Any, Any]], objective: str = "clm") -> dict[str, float]:
    """Name -> sum / weight, and 'perplexity' = exp(nll) where the objective is one of `LANGUAGE_MODELS`.

    A metric whose weight is 0 was measured on nothing and is left out, rather than reported as 0 or NaN.
    A perplexity beyond float64 is inf.
    """
    out = {name: float(value) / float(weight) for name, (value, weight) in sums.items() if float(weight) != 0}
    if "nll" in out and objective in LANGUAGE_MODELS:
        # exp overflows just above 709 nats; a diverged model is there.
        out["perplexity"] = math.inf if out["nll"] > 709 else math.exp(out["nll"])
    return out


def train_flops_per_token(
    model: ModelConfig, seq_len: int, vocab_size: int, *, causal_half: bool = False
) -> float | None:
    """Model FLOPs of a forward and backward pass for one position: 6 N + 12 layers H E context.

    N counts the matrices a token is multiplied with: those of the blocks (of the experts it goes through only) and the
    output projection, tied or not, but not the embedding, which is a look-up; norms and biases are left out, being
    below 0.1%. The second term is the attention scores and their sum over values. Two conventions are in use: attention
    in full, not halved for causality (PaLM, arXiv:2204.02311, appendix B), and its causal half, as MaxText has counted
    since 2025. The context is seq_len, or the sliding window when that is shorter; the causal half of it is the mean
    number of keys that a position sees, taken as context - context^2 / (2 seq_len), which is seq_len / 2 without a
    window. Recomputation (remat) does not count, and nothing is taken off for frozen parameters.

    Args:
      model: its sizes.
      seq_len: positions in a row.
      vocab_size: rows of the output projection.
      causal_half: the second convention; the same as the first for a model whose attention is not causal.

    Returns:
      None for a model whose positions do not all go through all layers once, which this does not count: an
      encoder-decoder, a masked autoencoder.
    """
    if model.decoder_layers or model.kind in ("encoder_decoder", "mae"):
        return None
    heads, width = model.num_heads, model.embed_dim
    head_dim = model.head_dim or width // heads
    kv_heads = model.num_kv_heads or heads
    mlp_dim = model.mlp_dim or 4 * width
    attention = width * head_dim * (2 * heads + 2 * kv_heads)  # query and out; key and value
    mlp = width * mlp_dim * (3 if model.mlp == "swiglu" else 2)
    if experts := model.experts[0]:
        mlp = model.experts[1] * mlp + width * experts  # the router
    matrices = model.num_layers * (attention + mlp) + width * vocab_size
    context = float(min(seq_len, model.sliding_window or seq_len))
    if causal_half and model.kind in ("decoder", "prefix_decoder"):
        context -= context**2 / (2 * seq_len)
    return 6.0 * matrices + 12.0 * model.num_layers * heads * head_dim * context


# FLOP/s of one *JAX device*, dense bfloat16 (no structured sparsity), by the start of `device_kind`; the first match
# wins. A chip of TPU v2, v3 and 7x shows as two devices, so each has half of its chip's peak.
# TPU: the "peak compute per chip" of cloud.google.com/tpu/docs/system-architecture-tpu-vm and the page of each version;
# the names of kinds are those of jax/_src/pallas/mosaic/tpu_info.py. GPU: the data sheets' figures, which are with
# sparsity from Ampere on and so are halved; the SXM part where the name does not say PCIe or NVL.
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
    """Model FLOPs utilisation in [0, 1]: the FLOP/s the model needs over the bfloat16 peak of all devices.

    Args:
      tokens_per_second: over all devices.
      flops_per_token: see `train_flops_per_token`.
      device_kind: of `jax.Device`.
      num_devices: JAX devices, over all hosts.

    Returns:
      None where the peak is not known, or the FLOPs.
    """
    peak = peak_flops(device_kind)
    return (
        None if peak is None or flops_per_token is None else tokens_per_second * flops_per_token / (peak * num_devices)
    )
