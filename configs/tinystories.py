"""Pre-train a small Llama-like model on TinyStories (Eldan and Li 2023), one story a document.

    python -m lm.main --config=configs/tinystories.py --workdir=runs/tinystories

Two CPU cores, minutes. Held-out bits per byte 1.424 (3.225 untrained), perplexity 36.5 a token.
With four experts instead of each MLP, two of them for each token (docs/performance.md), not run to the end:

    python -m lm.main --config=configs/tinystories.py:experts --workdir=runs/tinystories_experts

Reads ../shared/data/tinystories/sample.txt; LM_SHARED_DATA or --config.data.path=FILE names another place.
"""

from typing import Any

from configs import common
from lm.config.schema import ConfigError
from lm.tasks import default_config


def get_config(arg: str | None = None) -> Any:
    """Pre-training on stories; `arg` is 'experts' or nothing."""
    if arg not in (None, "", "experts"):
        raise ConfigError(f"recipe argument '{arg}': expected 'experts' or nothing")
    c = default_config()
    c.tokenizer.vocab_size = 2048
    c.data.format = "text"
    c.data.path = common.shared_data("tinystories/sample.txt")
    c.data.separator = "<|endoftext|>"
    c.data.packing = "concat"
    c.data.seq_len = 256
    c.data.batch_size = 8

    c.model.num_layers = 4
    c.model.embed_dim = 256
    c.model.num_heads = 8
    c.model.num_kv_heads = 4
    c.model.mlp_dim = 688  # 8/3 x 256, rounded up to a multiple of 16
    if arg == "experts":
        c.model.num_experts, c.model.experts_per_token = 4, 2
        c.model.mlp_dim = 688 // 2  # a token goes through two experts, for the cost of one MLP of 688
    c.model.position = "rope"
    c.model.norm = "rmsnorm"
    c.model.mlp = "swiglu"
    c.model.use_bias = False
    c.model.qk_norm = True
    c.model.init = "fan_in"  # at this width better than gpt2, see experiments/initialisation
    c.model.unroll = 0  # all layers: faster on CPU
    c.loss.chunk_len = 64  # 8 rows x 64 positions x 2,048 ids x 4 bytes = 4 MiB of logits at once

    c.optim.learning_rate = 3e-3
    c.optim.schedule = "wsd"
    c.optim.warmup_steps = 20
    c.optim.decay_steps = 60
    c.train.total_epochs = 1.0

    c.eval.every_steps = 100
    c.checkpoint.every_steps = 100
    c.generate.prompts = ("Once upon a time, there was a little", "Tom and Lily went to")
    return c
