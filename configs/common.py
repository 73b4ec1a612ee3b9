"""Shared by several recipes: the location of data, and the rules of the usual ways to fine-tune.

Rules are for `optim.lr_rules` unless stated otherwise; 0 freezes. Parameters that some models lack, such as a head,
share a rule with others, because a rule that matches nothing is refused.
"""

import os
from collections.abc import Mapping
from typing import Any

from lm.config.schema import ConfigError
from lm.tasks import default_config

Rates = tuple[tuple[str, float], ...]


def shared_data(name: str) -> str:
    """Path of a data set under LM_SHARED_DATA, or under ../shared/data if that is not set."""
    return os.path.join(os.environ.get("LM_SHARED_DATA", "../shared/data"), name)


def mixture(
    sizes: Mapping[str, float], temperature: float = 1.0, start: float = 0.0
) -> tuple[tuple[float, str, float], ...]:
    """A stage of `data.mixture`, with weights size^(1 / temperature) (Arivazhagan et al. 2019).

    1 samples by size, larger values more evenly. Worked: sizes 9 and 1, temperature 2 -> weights 0.75 and 0.25.
    """
    if temperature <= 0 or min(sizes.values(), default=0) <= 0:
        raise ConfigError(f"mixture: sizes {dict(sizes)} and temperature {temperature} must be above 0")
    largest = max(sizes.values())
    weights = {path: (size / largest) ** (1 / temperature) for path, size in sizes.items()}
    total = sum(weights.values())
    return tuple((start, path, round(weight / total, 9)) for path, weight in weights.items())


def head_only() -> Rates:
    """Only the task's head learns (linear probing)."""
    return ((r"head/.*", 1.0), (r".*", 0.0))


def last_layers(n: int, num_layers: int) -> Rates:
    """The last n of num_layers layers learn, and all after them: final norm, transform, output projection, head."""
    if not 0 <= n <= num_layers:
        raise ConfigError(f"last_layers: {n} of {num_layers} layers")
    numbers = "|".join(map(str, range(num_layers - n, num_layers)))
    return ((rf".*/layers/({numbers})/.*|.*final_norm/.*|lm_transform/.*|(lm_)?head/.*", 1.0), (r".*", 0.0))


def bias_only() -> Rates:
    """Only biases and the head learn (BitFit, Ben Zaken et al. 2022)."""
    return ((r".*bias|head/.*", 1.0), (r".*", 0.0))


def layer_decay(rate: float, num_layers: int) -> Rates:
    """Each layer learns `rate` times as fast as the next, the head at 1 (ULMFiT; Clark et al. 2020, table 7).

    With N layers, the last has rate^1, the first rate^N, the embeddings rate^(N + 1), the final norm 1.
    """
    layers = tuple((rf".*/layers/{i}/.*", rate ** (num_layers - i)) for i in range(num_layers))
    return (*layers, (r"[^/]*embed[^/]*/.*", rate ** (num_layers + 1)), (r".*", 1.0))


def gradual_unfreezing(num_layers: int, until: float) -> Rates:
    """For `optim.unfreeze_rules`: first the head, then layer after layer from the last (ULMFiT, section 3.3).

    Args:
      num_layers: N; the last layer begins at until / (N + 1) of the run, the first at until * N / (N + 1).
      until: share of the run after which the embeddings, and so all parameters, learn.
    """
    part = until / (num_layers + 1)
    layers = tuple((rf".*/layers/{i}/.*", part * (num_layers - i)) for i in range(num_layers))
    return (*layers, (r"[^/]*embed[^/]*/.*", until), (r".*", 0.0))


def lora_rules() -> Rates:
    """Only LoRA's matrices and the head learn."""
    return ((r".*/lora_.*|head/.*", 1.0), (r".*", 0.0))


def adapter_rules() -> Rates:
    """Only bottleneck adapters and the head learn."""
    return ((r".*/adapter_.*|head/.*", 1.0), (r".*", 0.0))


def fresh_adapters() -> tuple[tuple[str, str], ...]:
    """For `init_rules`: adapters and the head are initialised anew, all else comes from `init_from`."""
    return ((r".*/lora_.*|.*/adapter_.*|head/.*", "reinit"), (r".*", "keep"))


HOWS = ("full", "head", "last2", "lora", "adapters")


def fine_tune(c: Any, arg: str | None, runs: dict[str, str]) -> None:
    """Sets where a recipe starts, from a pre-trained run or from scratch, and which of its parameters learn.

    Args:
      c: the recipe, with the model of the run it starts from.
      arg: 'START,HOW'. START is a key of `runs` (default: the first) or 'scratch', which keeps only the tokenizer of
        the first run; HOW is one of `HOWS` (default: 'full').
      runs: name -> folder of the run.
    """
    words = [word for word in (arg or "").split(",") if word]
    starts = [word for word in words if word in (*runs, "scratch")]
    hows = [word for word in words if word in HOWS]
    if len(starts) > 1 or len(hows) > 1:
        raise ConfigError(
            f"recipe argument '{arg}': expected START,HOW: where to start, and what learns, one word each"
        )
    start, how = (*starts, next(iter(runs)))[0], (*hows, "full")[0]
    if unknown := [word for word in words if word not in (*runs, "scratch", *HOWS)]:
        raise ConfigError(
            f"recipe argument '{unknown[0]}': expected {', '.join((*runs, 'scratch'))}, {', '.join(HOWS)}"
        )
    if start == "scratch":
        c.tokenizer.path = f"{next(iter(runs.values()))}/tokenizer.model"
    else:
        c.init_from = runs[start]
        c.init_rules = fresh_adapters() if how in ("lora", "adapters") else ((r"head/.*", "reinit"), (r".*", "keep"))
    match how:
        case "head":
            c.optim.lr_rules = head_only()
        case "last2":
            c.optim.lr_rules = last_layers(2, c.model.num_layers)
        case "lora":
            c.adapter.kind = "lora"
            c.adapter.targets = r".*/(query|key|value|out|gate|up|down)"
            c.optim.lr_rules = lora_rules()
        case "adapters":
            c.adapter.kind = "pfeiffer"
            c.adapter.rank = 16
            c.optim.lr_rules = adapter_rules()


LLAMA_7B = {"num_layers": 32, "embed_dim": 4096, "num_heads": 32, "mlp_dim": 11_008, "vocab_size": 32_000}


def llama(chips: int, rows: int, seq_len: int, remat: str, sizes: dict[str, int]) -> Any:
    """Pre-training of a Llama-like model by ZeRO-3, shared by the benchmarks of configs/bench.

    Args:
      chips: number of chips over which everything is split.
      rows: rows of a step on each chip.
      seq_len: positions of a row.
      remat: `model.remat`.
      sizes: keys and values of `model`.
    """
    c = default_config()
    c.tokenizer.vocab_size = sizes["vocab_size"]
    c.data.format = "text"
    c.data.path = shared_data("tinystories/sample.txt")
    c.data.separator = "<|endoftext|>"
    c.data.packing = "concat"
    c.data.seq_len = seq_len
    c.data.batch_size = chips * rows
    c.mesh.fsdp = chips
    c.model.position = "rope"
    c.model.norm = "rmsnorm"
    c.model.mlp = "swiglu"
    c.model.use_bias = False
    c.model.tie_embeddings = False
    c.model.remat = remat
    c.model.update(sizes)
    c.loss.chunk_len = 0
    c.optim.learning_rate = 3e-4
    c.optim.schedule = "cosine"
    c.optim.warmup_steps = 1_000
    c.train.total_steps = 10_000
    return c
