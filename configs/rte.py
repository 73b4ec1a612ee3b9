"""Fine-tune on textual entailment of sentence pairs: RTE (Dagan et al. 2006), as in GLUE; MNLI has the same form.

    python -m lm.main --config=configs/rte.py --workdir=runs/rte
    python -m lm.main --config=configs/rte.py:clm,lora --workdir=runs/rte_lora

Two CPU cores, minutes. Held-out accuracy: see experiments/objectives/results.md.
The argument is START,HOW: 'mlm' (from the run of configs/reviews_mlm.py), 'clm' (configs/reviews_clm.py) or 'scratch';
what learns (full, head, last2, lora, adapters).
Reads ../shared/data/rte/{train,dev}.tsv (LM_SHARED_DATA names another place).
"""

from typing import Any

from configs import common, reviews_clm


def get_config(arg: str | None = None) -> Any:
    """See above for `arg`."""
    c = reviews_clm.for_sentences(arg)
    c.data.rename = (("sentence1", "text"), ("sentence2", "text_pair"), ("label", "label"))
    c.data.path = common.shared_data("rte/train.tsv")
    c.data.eval_path = common.shared_data("rte/dev.tsv")
    c.task.labels = ("0", "1")
    c.data.seq_len = 128
    return c
