"""Next-item recommendation by masked item prediction, as BERT4Rec (Sun et al. 2019), on SYNTHETIC interactions.

    python tools/make_interactions.py runs/interactions.csv
    python -m lm.main --config=configs/bert4rec.py --workdir=runs/bert4rec

Two CPU cores, minutes. Each user's last item ranked among all items: HR@10 0.733, NDCG@10 0.386 (seed 0);
configs/sasrec.py, which gives further baselines, reaches 0.765 and 0.437 in a third of the steps.
"""

from typing import Any

from configs import sasrec
from lm.tasks import task_config


def get_config(arg: str | None = None) -> Any:
    """Prediction of masked items; `arg` is not used."""
    del arg
    c = sasrec.get_config()
    c.task = task_config("masked_item")
    c.task.mask_rate = 0.5  # of about 17 items; with 0.2 (and dropout 0.2) HR@10 was 0.646
    c.tokenizer.extra_ids = 1  # the mask
    c.model.kind = "encoder"
    c.model.dropout = 0.1
    c.train.total_epochs = 48.0  # only half of the items of a row are predicted; a causal model predicts all
    c.eval.every_epochs = 12.0
    return c
