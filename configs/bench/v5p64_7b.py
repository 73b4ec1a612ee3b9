"""Pre-train a Llama-like model of 7B parameters on 32 chips, ZeRO-3 over all: see docs/performance.md.

    python tools/plan.py --config=configs/bench/v5p64_7b.py
    python -m lm.main --distributed --config=configs/bench/v5p64_7b.py --workdir=/mnt/runs/v5p64_7b

The first compiles its step without a TPU; the second is for every worker of the slice. Not run on one.
"""

from typing import Any

from configs import common

TOPOLOGY = "v5p:2x4x4"


def get_config(arg: str | None = None) -> Any:
    """4 rows of 4,096 positions a chip; `arg` is not used."""
    del arg
    return common.llama(chips=32, rows=4, seq_len=4096, remat="minimal", sizes=common.LLAMA_7B)
