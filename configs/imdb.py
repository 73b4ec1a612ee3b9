"""Fine-tune on the sentiment of whole film reviews: IMDB (Maas et al. 2011).

    python -m lm.main --config=configs/imdb.py --workdir=runs/imdb
    python -m lm.main --config=configs/imdb.py:clm,lora --workdir=runs/imdb_lora

Two CPU cores, minutes. Held-out accuracy: see experiments/objectives/results.md.
The argument is START,HOW: 'mlm' (from the run of configs/reviews_mlm.py), 'clm' (configs/reviews_clm.py) or 'scratch';
what learns (full, head, last2, lora, adapters).
Reads ../shared/data/imdb/imdb_{train,test}.jsonl.gz (LM_SHARED_DATA names another place).
"""

from typing import Any

from configs import common, reviews_clm


def get_config(arg: str | None = None) -> Any:
    """See above for `arg`."""
    c = reviews_clm.for_sentences(arg)
    c.data.format = "jsonl"
    c.data.path = common.shared_data("imdb/imdb_train.jsonl.gz")
    c.data.eval_path = common.shared_data("imdb/imdb_test.jsonl.gz")
    c.task.labels = ("0", "1")  # negative, positive
    c.data.seq_len = 256  # longer reviews are cut at the end
    c.data.batch_size = 16
    c.eval.max_tokens = 256_000  # 1,000 reviews
    return c
