"""Pre-train a Llama-like model of 7B parameters on 16 chips, ZeRO-3 over all: see docs/performance.md.

    python tools/plan.py --config=configs/bench/v5e16_7b.py
    python -m lm.main --distributed --config=configs/bench/v5e16_7b.py --workdir=/mnt/runs/v5e16_7b

The first compiles its step without a TPU; the second is for every worker of the slice. Not run on one.
"""

from typing import Any

from configs import common

TOPOLOGY = "v5e:4x4"


def get_config(arg: str | None = None) -> Any:
    """1 row of 2,048 positions a chip; `arg` is not used."""
    del arg
    return common.llama(chips=16, rows=1, seq_len=2048, remat="minimal", sizes=common.LLAMA_7B)
