"""Does a gated MLP (SwiGLU) learn the built-in corpus faster than GPT-2's, at the same number of parameters?

python tools/sweep.py experiments/quick && python tools/report.py experiments/quick
"""

from lm.study import Override, Table, arms, better, product, seeds

RECIPE = "configs/quickstart_pretrain.py"
SMALL: Override = {
    "tokenizer.vocab_size": 1024,
    "data.max_records": 300,
    "data.seq_len": 128,
    "model.num_layers": 2,
    "model.embed_dim": 96,
    "model.num_heads": 2,
    "train.total_steps": 30,
    "optim.warmup_steps": 5,
    "eval.every_steps": 10,
    "eval.max_tokens": 8_192,
    "generate.prompts": (),
}
TABLES = (Table("bits_per_byte", baseline="gelu"),)
CLAIMS = (better("swiglu", "gelu", "bits_per_byte"),)


def trials() -> list[Override]:
    """Two arms of five seeds."""
    # Three matrices of 96 x 256 have as many parameters as two of 96 x 384.
    mlp = arms({"gelu": {"model.mlp": "gelu", "model.mlp_dim": 384}, "swiglu": {"model.mlp_dim": 256}})
    return product([SMALL], mlp, seeds(5))
