"""Pre-train a small Llama-like model on the built-in corpus: English technical prose that comes with Python.

python -m lm.main --config=configs/quickstart_pretrain.py --workdir=runs/quickstart/pretrain

Two CPU cores, minutes. Held-out bits per byte 2.124 (Python 3.11.7, whose library is the corpus; 3.707 untrained).
"""

from typing import Any

from lm.tasks import default_config


def get_config(arg: str | None = None) -> Any:
    """The quickstart's pre-training; `arg` is not used."""
    del arg
    c = default_config()
    c.tokenizer.vocab_size = 2048
    c.data.format = "builtin_text"
    c.data.packing = "best_fit"
    c.data.seq_len = 256
    c.data.batch_size = 8

    c.model.num_layers = 4
    c.model.embed_dim = 192
    c.model.num_heads = 3
    c.model.mlp_dim = 512  # 8/3 x 192
    c.model.position = "rope"
    c.model.norm = "rmsnorm"
    c.model.mlp = "swiglu"
    c.model.use_bias = False
    c.model.tie_embeddings = False
    c.model.qk_norm = True
    c.model.init = "fan_in"  # at this width better than gpt2, see experiments/initialisation
    c.model.unroll = 0  # all layers: faster on CPU
    c.loss.chunk_len = 64  # 8 rows x 64 positions x 2,048 ids x 4 bytes = 4 MiB of logits at once

    c.optim.learning_rate = 3e-3
    c.optim.schedule = "cosine"
    c.optim.warmup_steps = 20
    c.optim.end_lr_ratio = 0.05

    c.train.total_steps = 200
    c.eval.max_tokens = 32_768
    c.generate.prompts = ("The function returns", "If the argument is")
    c.generate.max_new_tokens = 40
    return c
