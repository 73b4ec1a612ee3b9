"""Pre-train a Llama-like model of 110M parameters on English Wikipedia, as TFDS has it.

    python -m lm.main --config=configs/wikipedia_clm.py --workdir=runs/wikipedia_clm

Not run on the whole set, which is read and packed in host memory before the first step. 10,000 steps are 2.6 billion
tokens, 24 per parameter, meant for a slice of 16 chips or more.
Reads the TFDS set wikipedia/20230601.en from TFDS_DATA_DIR (~/tensorflow_datasets); if it is missing,
the error gives the command that prepares it.
"""

from typing import Any

from lm.tasks import default_config


def get_config(arg: str | None = None) -> Any:
    """Causal language modelling; `arg` is not used."""
    del arg
    c = default_config()
    c.tokenizer.vocab_size = 32_000
    c.tokenizer.train_bytes = 100_000_000
    c.data.format = "tfds"
    c.data.path = "wikipedia/20230601.en"
    c.data.eval_fraction = 0.001
    c.data.packing = "concat"
    c.data.seq_len = 1024
    c.data.batch_size = 256  # x 1,024 = 262,144 tokens a step

    c.model.num_layers = 12
    c.model.embed_dim = 768
    c.model.num_heads = 12
    c.model.mlp_dim = 2048  # 8/3 x 768
    c.model.position = "rope"
    c.model.norm = "rmsnorm"
    c.model.mlp = "swiglu"
    c.model.use_bias = False
    c.model.qk_norm = True
    c.model.remat = "minimal"

    c.optim.learning_rate = 1e-3
    c.optim.schedule = "cosine"
    c.optim.warmup_steps = 500
    c.optim.end_lr_ratio = 0.1

    c.train.total_steps = 10_000
    c.eval.every_steps = 1_000
    c.eval.max_tokens = 1_048_576  # 1,024 rows
    c.checkpoint.every_steps = 1_000
    c.generate.prompts = ("The river Thames is", "In mathematics, a group is")
    return c
