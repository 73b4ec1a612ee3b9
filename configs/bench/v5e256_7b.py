"""Pre-train a Llama-like model of 7B parameters on 256 chips, ZeRO-3 over all: see docs/performance.md.

    python tools/plan.py --config=configs/bench/v5e256_7b.py
    python -m lm.main --distributed --config=configs/bench/v5e256_7b.py --workdir=/mnt/runs/v5e256_7b

The first compiles its step without a TPU; the second is for every worker of the slice. Not run on one.
"""

from typing import Any

from configs import common

TOPOLOGY = "v5e:16x16"


def get_config(arg: str | None = None) -> Any:
    """4 rows of 2,048 positions a chip; `arg` is not used."""
    del arg
    c = common.llama(
        seq_len=2048,
        batch_size=256 * 4,
        num_layers=32,
        embed_dim=4096,
        num_heads=32,
        mlp_dim=11_008,
        vocab_size=32_000,
    )
    c.mesh.fsdp = 256
    c.model.remat = "attention"
    c.loss.chunk_len = 0
    return c
