"""Pre-train a Llama-like model of 124M parameters on 16 chips, ZeRO-3 over all: see docs/performance.md.

    python tools/plan.py --config=configs/bench/v5e16_124m.py
    python -m lm.main --distributed --config=configs/bench/v5e16_124m.py --workdir=/mnt/runs/v5e16_124m

The first compiles its step without a TPU; the second is for every worker of the slice. Not run on one.
"""

from typing import Any

from configs import common

TOPOLOGY = "v5e:4x4"


def get_config(arg: str | None = None) -> Any:
    """8 rows of 1,024 positions a chip; `arg` is not used."""
    del arg
    sizes = dict(num_layers=12, embed_dim=768, num_heads=12, mlp_dim=2048, vocab_size=32_768)
    return common.llama(chips=16, rows=8, seq_len=1024, remat="minimal", sizes=sizes)
