"""Pre-train a small GPT-2 (Radford et al. 2019) on TinyStories, in the setting of experiments/parity.

    python -m lm.main --config=configs/gpt2_tinystories.py --workdir=runs/gpt2_tinystories

Two CPU cores, minutes. Held-out nats per token 4.234 (7.658 untrained); seeds 1 and 2: 4.261 and 4.233.
Reads ../shared/data/tinystories/sample.txt; LM_SHARED_DATA or --config.data.path=FILE names another place.
"""

from typing import Any

from configs import common
from lm.tasks import default_config


def get_config(arg: str | None = None) -> Any:
    """Pre-training on stories; `arg` is not used."""
    del arg
    c = default_config()
    c.tokenizer.vocab_size = 2048
    c.data.format = "text"
    c.data.path = common.shared_data("tinystories/sample.txt")
    c.data.separator = "<|endoftext|>"
    c.data.packing = "concat"
    c.data.mask_documents = False  # as nanoGPT: a row is a stretch of the text
    c.data.seq_len = 256
    c.data.batch_size = 8

    c.model.num_layers = 4
    c.model.embed_dim = 256
    c.model.num_heads = 4
    c.model.unroll = 0  # all layers: faster on CPU
    c.loss.chunk_len = 64  # 8 rows x 64 positions x 2,048 ids x 4 bytes = 4 MiB of logits at once

    c.optim.learning_rate = 1e-3
    c.optim.schedule = "cosine"
    c.optim.warmup_steps = 20
    c.optim.end_lr_ratio = 0.1
    c.train.total_steps = 240
    return c
