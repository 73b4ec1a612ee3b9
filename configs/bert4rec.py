"""Next-item recommendation by masked items, as BERT4Rec (Sun et al. 2019), on SYNTHETIC interactions.

    python tools/make_interactions.py runs/interactions.csv
    python -m lm.main --config=configs/bert4rec.py --workdir=runs/bert4rec

Two CPU cores, minutes. HR@10 and NDCG@10 over all items, none left out: not run.
"""

from typing import Any

from configs import sasrec


def get_config(arg: str | None = None) -> Any:
    """Hidden items from all others; `arg` is not used."""
    del arg
    c = sasrec.get_config()
    c.objective = "masked_item"
    c.tokenizer.extra_ids = 1  # the mask
    c.data.task = "masked_items"
    c.corrupt.rate = 0.2
    c.model.kind = "encoder"
    c.train.total_epochs = 48.0  # a row teaches a fifth of what it teaches a causal model
    c.eval.every_epochs = 12.0
    return c
