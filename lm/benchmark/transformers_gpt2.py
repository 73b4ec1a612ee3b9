"""Training of Hugging Face's GPT-2 in PyTorch, for `tools/bench.py --peer=transformers` and experiments/parity.

It has the same batches, weight decay groups and clipping as our training, PyTorch's fused AdamW (the default of Hugging
Face's trainer), and the model's own loss. Nothing is compiled (`torch.compile`), as by default.
"""

import dataclasses
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lm import config, param_paths
from lm.checkpoint.hf import families
from lm.config import Config
from lm.config.schema import ConfigError

# Keys of `model` that GPT-2 leaves open.
_SIZES = (
    *("num_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim"),
    *("max_len", "vocab_size", "norm_eps"),
)


def check(cfg: Config, platform: str) -> None:
    """Checks that a config computes the same as the peer.

    Raises:
      ConfigError: PyTorch is not installed, or the config's model or optimizer differs from GPT-2's.
    """
    if missing := [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"--peer=transformers: {' and '.join(missing)} not installed: pip install -e '.[peer]'")
    if platform != "cpu":
        raise ConfigError(f"--peer=transformers compares on CPU, and JAX is on {platform}: set JAX_PLATFORMS=cpu")
    model, optim, plain = cfg.model, cfg.optim, config.Config()
    needs = {
        "task.name": cfg.task.name == "causal_lm",
        "data.mask_documents (False)": not cfg.data.mask_documents,
        "data.packing (concat)": cfg.data.packing == "concat",
        "model.num_kv_heads": model.num_kv_heads == model.num_heads,
        "model.head_dim": model.head_dim * model.num_heads == model.embed_dim,
        "model.dtype (float32)": model.dtype in ("auto", "float32"),
        "optim.name": optim.name == "adamw",
        "optim.clip_norm": optim.clip_norm > 0,
        "train.micro_batches": cfg.train.micro_batches == 1,
    }
    sizes = dataclasses.replace(plain.model, **{key: getattr(model, key) for key in _SIZES})
    needs |= dict.fromkeys((f"model.{key}" for key in families.differences(model, sizes)), False)
    for section, names in {
        "model": ("dropout", "neftune_alpha"),
        "optim": ("decay_rules", "lr_rules", "unfreeze_rules", "l2_sp", "mixout", "ema_decay"),
        "loss": ("z_loss", "label_smoothing"),
        "adapter": ("kind",),
    }.items():
        own, default = getattr(cfg, section), getattr(plain, section)
        needs |= {f"{section}.{name}": getattr(own, name) == getattr(default, name) for name in names}
    if broken := [key for key, holds in needs.items() if not holds]:
        raise ConfigError(f"--peer=transformers needs the config of a GPT-2; these keys differ: {', '.join(broken)}")


def make(
    cfg: Config,
    params: Mapping[str, Any],
    learning_rates: Iterator[float],
    batches: Iterator[Mapping[str, np.ndarray]],
    vocab_size: int,
    activation: str,
) -> Callable[[int], float]:
    """Builds the peer's training.

    Args:
      cfg: a config that `check` accepts.
      params: our initial parameters.
      learning_rates: of each step.
      batches: those of our training.
      vocab_size: of the tokenizer.
      activation: of the MLP, a name of `GPT2Config`.

    Returns:
      Number of steps -> loss of the last one; each call continues the training.
    """
    return training(cfg, gpt2(cfg, params, vocab_size, activation), learning_rates, batches)


def gpt2(cfg: Config, params: Mapping[str, Any] | None, vocab_size: int, activation: str) -> Any:
    """The peer's model, with our parameters, or with its own initialisation if `params` is None.

    Raises:
      ConfigError: our vocabulary is padded; the padding would enter the peer's softmax.
    """
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    own = cfg.model
    if vocab_size != own.vocab_size:
        raise ConfigError(f"--peer=transformers: 'model.vocab_size' is {own.vocab_size}, the tokenizer's {vocab_size}")
    sizes = {"vocab_size": vocab_size, "n_positions": own.max_len, "n_embd": own.embed_dim, "n_layer": own.num_layers}
    shape = {"n_head": own.num_heads, "n_inner": own.mlp_dim, "layer_norm_epsilon": own.norm_eps}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    no_ids = {"bos_token_id": None, "eos_token_id": None}  # the defaults are ids of GPT-2's own vocabulary
    settings = {**sizes, **shape, **no_dropout, **no_ids, "activation_function": activation, "loss_type": "ForCausalLM"}
    model = GPT2LMHeadModel(GPT2Config(**settings))
    if params is not None:
        ours = weights(params, own.num_layers)
        model.load_state_dict({name: torch.from_numpy(np.array(x)) for name, x in ours.items()})
    return model.train()


def training(
    cfg: Config, model: Any, learning_rates: Iterator[float], batches: Iterator[Mapping[str, np.ndarray]]
) -> Callable[[int], float]:
    """Training with PyTorch's AdamW: number of steps -> loss of the last one; each call continues."""
    import torch

    by_decay: dict[bool, list[Any]] = {True: [], False: []}
    for weight in model.parameters():
        by_decay[weight.ndim > 1].append(weight)
    optimizer = torch.optim.AdamW(
        [
            {"params": group, "weight_decay": cfg.optim.weight_decay * is_decayed}
            for is_decayed, group in by_decay.items()
        ],
        betas=(cfg.optim.b1, cfg.optim.b2),
        eps=cfg.optim.eps,
        fused=True,
    )

    def advance(steps: int) -> float:
        loss = 0.0
        for _ in range(steps):
            batch = next(batches)
            learning_rate = next(learning_rates)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.zero_grad()
            result = _loss(model, batch)
            result.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.optim.clip_norm)
            optimizer.step()
            loss = result.item()
        return loss

    return advance


def generator(
    model: Any, new: int, stop_ids: Sequence[int], excluded: Sequence[int]
) -> Callable[[Any], list[list[int]]]:
    """Greedy decoding: prompts of equal length -> `new` ids after each, none of them a stop id or `excluded`."""
    import torch

    model.eval()
    never = [*stop_ids, *excluded]
    settings = {"do_sample": False, "min_new_tokens": new, "max_new_tokens": new, "suppress_tokens": never}

    def generate(prompts: Any) -> list[list[int]]:
        tokens = torch.tensor(prompts)
        mask = torch.ones_like(tokens)
        with torch.no_grad():
            out = model.generate(
                tokens, attention_mask=mask, eos_token_id=list(stop_ids), pad_token_id=stop_ids[0], **settings
            )
        new_ids: list[list[int]] = out[:, tokens.shape[1] :].tolist()
        return new_ids

    return generate


def held_out_loss(model: Any, batches: Iterable[Mapping[str, np.ndarray]]) -> float:
    """Mean loss over all batches, in nats per token."""
    import torch

    model.eval()
    total, count = 0.0, 0.0
    with torch.no_grad():
        for batch in batches:
            weight = float((batch["loss_weights"] > 0).sum())
            total, count = total + weight * _loss(model, batch).item(), count + weight
    model.train()
    return total / count


def _loss(model: Any, batch: Mapping[str, np.ndarray]) -> Any:
    """Mean loss over the tokens of a batch with a nonzero weight."""
    import torch

    tokens, targets = (torch.from_numpy(batch[key].astype(np.int64)) for key in ("tokens", "targets"))
    targets[torch.from_numpy(batch["loss_weights"] == 0)] = -100
    return model(input_ids=tokens, labels=targets, shift_labels=targets, use_cache=False).loss


def about() -> dict[str, Any]:
    """Versions and number of threads of the peer."""
    import torch
    import transformers

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }


def product(size: int) -> Callable[[], Any]:
    """A function that multiplies two float32 [size, size] matrices in PyTorch (its MKL uses AVX-512 on Intel only)."""
    import torch

    square = torch.randn(size, size)
    return lambda: square @ square


def weights(params: Mapping[str, Any], num_layers: int) -> dict[str, np.ndarray]:
    """Our parameters under the names of `GPT2LMHeadModel`, whose kernels are [in, out] too, with q, k, v in one."""
    flat = {path: np.asarray(x) for path, x in param_paths.flatten(params).items()}
    layer = "decoder/layers"
    out = {
        "transformer.wte.weight": flat["embed/embedding"],
        "lm_head.weight": flat["embed/embedding"],
        "transformer.wpe.weight": flat["embed/position_embedding"],
        "transformer.ln_f.weight": flat["decoder/final_norm/scale"],
        "transformer.ln_f.bias": flat["decoder/final_norm/bias"],
    }
    for i in range(num_layers):
        at = f"transformer.h.{i}"
        for theirs, ours in {"ln_1": "attention_norm", "ln_2": "mlp_norm"}.items():
            out[f"{at}.{theirs}.weight"] = flat[f"{layer}/{ours}/scale"][i]
            out[f"{at}.{theirs}.bias"] = flat[f"{layer}/{ours}/bias"][i]
        for theirs, ours in {"attn.c_proj": "attention/out", "mlp.c_fc": "mlp/up", "mlp.c_proj": "mlp/down"}.items():
            out[f"{at}.{theirs}.weight"] = flat[f"{layer}/{ours}/kernel"][i]
            out[f"{at}.{theirs}.bias"] = flat[f"{layer}/{ours}/bias"][i]
        for theirs, ours in {"weight": "kernel", "bias": "bias"}.items():
            parts = [flat[f"{layer}/attention/{name}/{ours}"][i] for name in ("query", "key", "value")]
            out[f"{at}.attn.c_attn.{theirs}"] = np.concatenate(parts, axis=-1)
    return out
