"""What `tools/bench.py --peer=transformers` and experiments/parity compare with: GPT-2 of Hugging Face in PyTorch.

The same batches, AdamW with the same decay groups (the fused one, its trainer's default), the same clipping, and its
own loss. Nothing is compiled: that is how it comes.
"""

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from lm import config, param_paths
from lm.config import Config
from lm.config.schema import ConfigError


def check(cfg: Config, platform: str) -> None:
    """Refuses what would not be the same computation on both sides.

    Raises:
      ConfigError: PyTorch is not there, or this config's model or optimizer is not GPT-2's.
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
    same = ("kind", "position", "norm", "mlp", "experts", "use_bias", "tie_embeddings", "qk_norm", "logit_softcap")
    for section, names in {
        "model": (*same, "attention_softcap", "sliding_window", "dropout", "embed_noise"),
        "optim": ("decay_rules", "lr_rules", "unfreeze_rules", "to_init", "mixout", "ema_decay"),
        "loss": ("z_loss", "label_smoothing"),
        "adapter": ("kind",),
    }.items():
        own, default = getattr(cfg, section), getattr(plain, section)
        needs |= {f"{section}.{name}": getattr(own, name) == getattr(default, name) for name in names}
    if broken := [key for key, holds in needs.items() if not holds]:
        raise ConfigError(f"--peer=transformers is GPT-2, which this config is not: {', '.join(broken)} differs")


def make(
    cfg: Config,
    params: Mapping[str, Any],
    learning_rates: Iterator[float],
    batches: Iterator[Mapping[str, np.ndarray]],
    vocab_size: int,
    activation: str,
) -> Callable[[int], float]:
    """The peer's training.

    Args:
      cfg: as `check` lets it pass.
      params: the model's at the start.
      learning_rates: of each step.
      batches: as the model's own training reads them.
      vocab_size: of the tokenizer.
      activation: name of its MLP's, as `GPT2Config` has it.

    Returns:
      steps -> loss of the last of them; each call goes on.
    """
    return training(cfg, gpt2(cfg, params, vocab_size, activation), learning_rates, batches)


def gpt2(cfg: Config, params: Mapping[str, Any] | None, vocab_size: int, activation: str) -> Any:
    """The peer's model, with our parameters or, without `params`, those it starts with itself.

    Raises:
      ConfigError: the vocabulary is padded, which its softmax would see.
    """
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    own = cfg.model
    if vocab_size != own.vocab_size:
        raise ConfigError(f"--peer=transformers: 'model.vocab_size' is {own.vocab_size}, the tokenizer's {vocab_size}")
    sizes = {"vocab_size": vocab_size, "n_positions": own.max_len, "n_embd": own.embed_dim, "n_layer": own.num_layers}
    shape = {"n_head": own.num_heads, "n_inner": own.mlp_dim, "layer_norm_epsilon": own.norm_eps}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    no_ids = {"bos_token_id": None, "eos_token_id": None}  # the defaults are of GPT-2's own vocabulary
    settings = {**sizes, **shape, **no_dropout, **no_ids, "activation_function": activation, "loss_type": "ForCausalLM"}
    model = GPT2LMHeadModel(GPT2Config(**settings))
    if params is not None:
        ours = weights(params, own.num_layers)
        model.load_state_dict({name: torch.from_numpy(np.array(x)) for name, x in ours.items()})
    return model.train()


def training(
    cfg: Config, model: Any, learning_rates: Iterator[float], batches: Iterator[Mapping[str, np.ndarray]]
) -> Callable[[int], float]:
    """Steps of PyTorch's AdamW: steps -> loss of the last of them; each call goes on."""
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


def held_out_loss(model: Any, batches: Iterable[Mapping[str, np.ndarray]]) -> float:
    """Nats a token over all batches."""
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
    """The mean over the tokens of a batch that have a weight."""
    import torch

    tokens, targets = (torch.from_numpy(batch[key].astype(np.int64)) for key in ("tokens", "targets"))
    targets[torch.from_numpy(batch["loss_weights"] == 0)] = -100
    return model(input_ids=tokens, labels=targets, shift_labels=targets, use_cache=False).loss


def about() -> dict[str, Any]:
    """Versions and settings of the peer."""
    import torch
    import transformers

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }


def product(size: int) -> Callable[[], Any]:
    """Multiplies two float32 [size, size] by PyTorch at each call, whose MKL leaves AVX-512 to Intel's processors."""
    import torch

    square = torch.randn(size, size)
    return lambda: square @ square


def weights(params: Mapping[str, Any], num_layers: int) -> dict[str, np.ndarray]:
    """Our parameters by the names of `GPT2LMHeadModel`: kernels are [in, out] there too; query, key, value are one."""
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
