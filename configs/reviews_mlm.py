"""Pre-train a small BERT-like encoder on the text of IMDB's film reviews by masked language modelling.

python -m lm.main --config=configs/reviews_mlm.py --workdir=runs/reviews_mlm

Two CPU cores, minutes. Held-out nats per masked token: not run.
Reads ../shared/data/imdb/imdb_train.jsonl.gz; LM_SHARED_DATA or --config.data.path=FILE names another place.
"""

from typing import Any

from configs import reviews_clm


def get_config(arg: str | None = None) -> Any:
    """Masked language modelling; `arg` is not used."""
    del arg
    c = reviews_clm.get_config()
    c.objective = "mlm"
    c.data.task = "masked_text"
    c.corrupt.rate = 0.3  # more to learn from each row than BERT's 0.15 (Wettig et al. 2023)
    c.model.kind = "encoder"
    return c
