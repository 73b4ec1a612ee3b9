"""Fine-tune to judge whether a sentence is acceptable English: CoLA (Warstadt et al. 2019).

    python -m lm.main --config=configs/cola.py --workdir=runs/cola
    python -m lm.main --config=configs/cola.py:clm,lora --workdir=runs/cola_lora

Two CPU cores, minutes. Matthews correlation: see experiments/objectives/results.md.
The argument is START,HOW: 'mlm' (from the run of configs/reviews_mlm.py), 'clm' (configs/reviews_clm.py) or 'scratch';
what learns (full, head, last2, lora, adapters).
Reads ../shared/data/cola/{train,dev}.tsv (LM_SHARED_DATA names another place).
"""

from typing import Any

from configs import common, reviews_clm


def get_config(arg: str | None = None) -> Any:
    """See above for `arg`."""
    c = reviews_clm.for_sentences(arg)
    c.data.rename = (("2", "label"), ("4", "text"))  # a table without a header
    c.data.path = common.shared_data("cola/train.tsv")
    c.data.eval_path = common.shared_data("cola/dev.tsv")
    c.task.labels = ("0", "1")
    c.data.seq_len = 32
    c.checkpoint.best_metric = "matthews"
    return c
