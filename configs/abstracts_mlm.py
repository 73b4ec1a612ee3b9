"""Pre-train a small BERT-like encoder on medical abstracts (PubMedQA, Jin et al. 2019) by masked language modelling.

    python -m lm.main --config=configs/abstracts_mlm.py --workdir=runs/abstracts_mlm

Two CPU cores, minutes. Held-out nats per masked token: see experiments/objectives/results.md.
Reads ../shared/data/pubmedqa/ori_pqal.json; LM_SHARED_DATA or --config.data.path=FILE names another place.
"""

from typing import Any

from configs import common, reviews_mlm


def get_config(arg: str | None = None) -> Any:
    """Masked language modelling; `arg` is not used."""
    del arg
    c = reviews_mlm.get_config()
    c.data.path = common.shared_data("pubmedqa/ori_pqal.json")
    c.data.rename = (("CONTEXTS", "text"),)
    c.data.eval_fraction = 0.05  # of 1,000 abstracts
    c.train.total_tokens = 3_000_000
    c.model.dropout = 0.1  # the 0.3 million tokens are seen several times
    return c
