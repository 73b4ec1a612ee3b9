"""Pre-train a Llama-like model of 1.37B parameters on 16 chips, ZeRO-3 over all: see docs/performance.md.

    python tools/plan.py --config=configs/bench/v5e16_1b.py
    python -m lm.main --distributed --config=configs/bench/v5e16_1b.py --workdir=/mnt/runs/v5e16_1b

The first compiles its step without a TPU; the second is for every worker of the slice. Not run on one.
"""

from typing import Any

from configs import common

TOPOLOGY = "v5e:4x4"


def get_config(arg: str | None = None) -> Any:
    """4 rows of 2,048 positions a chip; `arg` is not used."""
    del arg
    sizes = dict(num_layers=24, embed_dim=2048, num_heads=16, mlp_dim=5632, vocab_size=32_768)
    return common.llama(chips=16, rows=4, seq_len=2048, remat="minimal", sizes=sizes)
