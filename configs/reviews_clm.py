"""Pre-train a small Llama-like model on the text of IMDB's film reviews (Maas et al. 2011); their labels are not read.

python -m lm.main --config=configs/reviews_clm.py --workdir=runs/reviews_clm

Two CPU cores, minutes. Held-out bits per byte: see experiments/objectives/results.md.
Reads ../shared/data/imdb/imdb_train.jsonl.gz; LM_SHARED_DATA or --config.data.path=FILE names another place.
"""

from typing import Any

from configs import common
from lm.tasks import default_config, task_config


def get_config(arg: str | None = None) -> Any:
    """Causal language modelling; `arg` is not used."""
    del arg
    c = default_config()
    c.tokenizer.vocab_size = 4096
    c.tokenizer.extra_ids = 1  # the mask of reviews_mlm.py, so that both have one tokenizer
    c.tokenizer.train_bytes = 4_000_000
    c.data.format = "jsonl"
    c.data.path = common.shared_data("imdb/imdb_train.jsonl.gz")
    c.data.packing = "concat"
    c.data.seq_len = 128
    c.data.batch_size = 16

    c.model.num_layers = 3
    c.model.embed_dim = 128
    c.model.num_heads = 4
    c.model.mlp_dim = 344  # 8/3 x 128, rounded up to a multiple of 8
    c.model.position = "rope"
    c.model.norm = "rmsnorm"
    c.model.mlp = "swiglu"
    c.model.use_bias = False
    # Tied, the input embeddings learn from every softmax: the same loss in half the tokens, and more to transfer.
    c.model.tie_embeddings = True
    c.model.qk_norm = True
    c.model.init = "fan_in"  # at this width better than gpt2, see experiments/initialisation
    c.model.unroll = 0  # all layers: faster on CPU
    c.loss.chunk_len = 64  # 16 rows x 64 positions x 4,096 ids x 4 bytes = 16 MiB of logits at once

    c.optim.learning_rate = 3e-3
    c.optim.schedule = "cosine"
    c.optim.warmup_steps = 30
    c.optim.end_lr_ratio = 0.05

    c.train.total_tokens = 4_000_000  # about one pass
    c.eval.max_tokens = 32_768
    return c


def for_sentences(arg: str | None) -> Any:
    """The model of this run, or of configs/reviews_mlm.py, with a head for labelled sentences.

    Args:
      arg: that of `common.fine_tune`; 'clm' and 'clm,scratch' make a decoder, all else an encoder.
    """
    c = get_config()
    words = (arg or "mlm").split(",")
    is_decoder = "clm" in words
    common.fine_tune(
        c,
        ",".join(word for word in words if word != "clm" or "scratch" not in words),
        {"clm": "runs/reviews_clm"} if is_decoder else {"mlm": "runs/reviews_mlm"},
    )
    c.task = task_config("classification")
    c.model.kind = "decoder" if is_decoder else "encoder"
    c.model.pool = "mean"
    c.model.dropout = 0.1
    c.data.format = "table"
    c.data.packing = "pad"
    c.data.batch_size = 32
    c.optim.learning_rate = 1e-3
    c.optim.schedule = "linear"
    c.optim.warmup_steps = 20
    c.train.total_tokens = 0
    c.train.total_epochs = 3.0
    c.eval.every_epochs = 1.0
    c.eval.max_tokens = 0
    c.checkpoint.best_metric = "accuracy"
    return c
