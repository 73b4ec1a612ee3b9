"""A GPT-2-like model for two CPU cores, to compare speed on: see docs/performance.md.

    python tools/bench.py --config=configs/bench/cpu_gpt2.py --peer=transformers
    python -m lm.main --config=configs/bench/cpu_gpt2.py --workdir=runs/cpu_gpt2    # trains it; not run

13.9 M parameters, 16 x 256 tokens a step, float32. Documents are cut into full rows and see the ones before them, so
that attention is causal and nothing else, as GPT-2's own; the learning rate is constant.
"""

from typing import Any

from lm.tasks import default_config


def get_config(arg: str | None = None) -> Any:
    """The benchmark on the built-in corpus; `arg` is not used."""
    del arg
    c = default_config()
    c.tokenizer.vocab_size = 8192
    c.data.format = "builtin_text"
    c.data.packing = "concat"
    c.data.mask_documents = False
    c.data.seq_len = 256
    c.data.batch_size = 16

    c.model.num_layers = 6
    c.model.embed_dim = 384
    c.model.num_heads = 6
    c.model.mlp_dim = 1536  # 4 x 384
    c.model.dtype = "float32"
    c.model.unroll = 0  # all layers: faster on CPU
    c.loss.chunk_len = 64

    c.optim.learning_rate = 3e-4
    c.optim.schedule = "constant"
    c.train.total_steps = 1_000
    return c
