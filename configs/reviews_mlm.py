"""Pre-train a small BERT-like encoder on the text of IMDB's film reviews by masked language modelling.

    python -m lm.main --config=configs/reviews_mlm.py --workdir=runs/reviews_mlm
    python -m lm.main --config=configs/reviews_mlm.py:next --workdir=runs/reviews_mlm_next

Two CPU cores, minutes. Held-out nats per masked token: see experiments/objectives/results.md.
The argument adds a second objective, on pairs of text segments: 'next' = does the second follow the first (BERT),
'order' = are they swapped (ALBERT).
Reads ../shared/data/imdb/imdb_train.jsonl.gz; LM_SHARED_DATA or --config.data.path=FILE names another place.
"""

from typing import Any

from configs import reviews_clm
from lm.config.schema import ConfigError
from lm.tasks import task_config


def get_config(arg: str | None = None) -> Any:
    """Masked language modelling; `arg` is '', 'next' or 'order'."""
    if arg not in (None, "", "next", "order"):
        raise ConfigError(f"recipe argument '{arg}': expected next, order or nothing")
    c = reviews_clm.get_config()
    c.task = task_config("masked_lm_pairs", pairs=arg) if arg else task_config("masked_lm")
    c.task.mask_rate = 0.3  # more to learn from each row than BERT's 0.15 (Wettig et al. 2023)
    c.model.kind = "encoder"
    c.model.pool = "mean"
    c.train.total_tokens = 5_000_000
    if arg:
        c.data.packing = "pad"
    return c
