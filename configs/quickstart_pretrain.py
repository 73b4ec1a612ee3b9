"""Pre-train a small GPT on the built-in corpus: English technical prose that comes with Python.

python -m lm.main --config=configs/quickstart_pretrain.py --workdir=runs/quickstart/pretrain
"""

from typing import Any

from lm import config


def get_config(arg: str | None = None) -> Any:
    """The quickstart's pre-training; `arg` is not used."""
    del arg
    c = config.defaults()
    c.tokenizer.vocab_size = 4096
    c.data.format = "builtin_text"
    c.data.packing = "best_fit"
    c.data.seq_len = 256
    c.data.batch_size = 16

    c.model.num_layers = 4
    c.model.embed_dim = 256
    c.model.num_heads = 4
    c.model.unroll = 0  # all layers: faster on CPU

    c.loss.chunk_len = 32  # 16 rows x 32 positions x 4,096 ids x 4 bytes = 8 MiB of logits at once

    c.optim.learning_rate = 2e-3
    c.optim.warmup_steps = 20
    c.optim.schedule = "cosine"
    c.optim.end_lr_ratio = 0.05

    c.train.total_steps = 60
    c.eval.max_tokens = 32_768
    c.generate.prompts = ("The function returns", "If the argument is")
    c.generate.max_new_tokens = 40
    return c
