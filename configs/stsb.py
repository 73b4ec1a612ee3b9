"""Fine-tune to score the similarity of two sentences, from 0 to 5: STS-B (Cer et al. 2017).

    python -m lm.main --config=configs/stsb.py --workdir=runs/stsb
    python -m lm.main --config=configs/stsb.py:clm,lora --workdir=runs/stsb_lora
    python tools/evaluate.py --run=runs/stsb@best --set=test

Two CPU cores, minutes. Pearson and Spearman correlation: see experiments/objectives/results.md.
The argument is START,HOW: 'mlm' (from the run of configs/reviews_mlm.py), 'clm' (configs/reviews_clm.py) or 'scratch';
what learns (full, head, last2, lora, adapters).
Reads ../shared/data/stsb/stsb-en-{train,dev,test}.csv (LM_SHARED_DATA names another place).
"""

from typing import Any

from configs import common, reviews_clm
from lm.tasks import task_config


def get_config(arg: str | None = None) -> Any:
    """See above for `arg`."""
    c = reviews_clm.for_sentences(arg)
    c.task = task_config("regression")
    c.data.rename = (("1", "text"), ("2", "text_pair"), ("3", "label"))  # a table without a header
    c.data.path = common.shared_data("stsb/stsb-en-train.csv")
    c.data.eval_path = common.shared_data("stsb/stsb-en-dev.csv")
    c.eval.sets = {"test": {"path": common.shared_data("stsb/stsb-en-test.csv")}}  # not read by the run
    c.data.seq_len = 64
    c.checkpoint.best_metric = "pearson"
    return c
