"""Sentiment of sentences from film reviews: SST-2 (Socher et al. 2013).

    python -m lm.main --config=configs/sst2.py --workdir=runs/sst2
    python -m lm.main --config=configs/sst2.py:clm,lora --workdir=runs/sst2_lora

Two CPU cores, minutes. Held-out accuracy: see experiments/objectives/results.md.
The argument says where it starts (mlm, clm, scratch) and what learns (full, head, last2, lora, adapters); the
first run is that of configs/reviews_mlm.py, 'clm' that of configs/reviews_clm.py.
Reads ../shared/data/sst2/{train,dev}.tsv (LM_SHARED_DATA names another place).
"""

from typing import Any

from configs import common, reviews_clm


def get_config(arg: str | None = None) -> Any:
    """See above for `arg`."""
    c = reviews_clm.for_sentences(arg)
    c.data.rename = (("1", "text"), ("2", "label"))  # a table without a header
    c.data.path = common.shared_data("sst2/train.tsv")
    c.data.eval_path = common.shared_data("sst2/dev.tsv")
    c.task.labels = ("0", "1")  # negative, positive
    c.data.seq_len = 48
    return c
