"""Pre-train a small T5-like encoder-decoder on TinyStories by span corruption (Raffel et al. 2020).

    python -m lm.main --config=configs/t5_tinystories.py --workdir=runs/t5_tinystories

Two CPU cores, minutes. Held-out nats per predicted token: not run.
"""

from typing import Any

from configs import tinystories
from lm.tasks import task_config


def get_config(arg: str | None = None) -> Any:
    """Span corruption on stories; `arg` is not used."""
    del arg
    c = tinystories.get_config()
    c.task = task_config("span_corruption")
    c.tokenizer.extra_ids = 33  # the mask and 32 sentinels
    c.data.target_len = 64  # for a row of 284 tokens: 43 hidden ones, 14 sentinels and EOS

    c.model.kind = "encoder_decoder"
    c.model.num_layers = 2
    c.model.decoder_layers = 2
    c.model.embed_dim = 128
    c.model.num_heads = 4
    c.model.num_kv_heads = 4
    c.model.mlp_dim = 352  # 8/3 x 128, rounded up to a multiple of 16
    c.model.position = "relative"
    c.generate.prompts = ()  # a plain prompt has no sentinel to fill in
    return c
