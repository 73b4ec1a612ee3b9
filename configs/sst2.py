"""Fine-tune on the sentiment of sentences from film reviews: SST-2 (Socher et al. 2013).

    python -m lm.main --config=configs/sst2.py --workdir=runs/sst2
    python -m lm.main --config=configs/sst2.py:clm,lora --workdir=runs/sst2_lora

Two CPU cores, minutes. Held-out accuracy: see experiments/objectives/results.md.
The argument is START,HOW: 'mlm' (from the run of configs/reviews_mlm.py), 'clm' (configs/reviews_clm.py) or 'scratch';
what learns (full, head, last2, lora, adapters).
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
