"""Contrastive sentence embeddings (SimCSE, Gao et al. 2021) from the encoder of configs/reviews_mlm.py.

    python -m lm.main --config=configs/simcse.py --workdir=runs/simcse
    python -m lm.main --config=configs/simcse.py:pairs --workdir=runs/simcse_pairs

Two CPU cores, minutes. Held-out alignment and uniformity: see experiments/objectives/results.md.
Without an argument, the two views of a sentence of SST-2 are two dropout masks. With 'pairs' they are the two sentences
of an STS-B pair, whatever its score, which is weak supervision. For your own data with hard negatives, use a jsonl
file of 'text', 'text_pair' and 'negative', and --config.task.name=contrastive_triples.
Reads ../shared/data/{sst2,stsb} (LM_SHARED_DATA names another place).
"""

from typing import Any

from configs import common, reviews_mlm
from lm.config.schema import ConfigError
from lm.tasks import task_config


def get_config(arg: str | None = None) -> Any:
    """Contrastive learning of sentences; `arg` is '' or 'pairs'."""
    if arg not in (None, "", "pairs"):
        raise ConfigError(f"recipe argument '{arg}': expected pairs or nothing")
    c = reviews_mlm.get_config()
    c.init_from = "runs/reviews_mlm"
    c.init_rules = ((r"head/.*", "reinit"), (r".*", "keep"))
    c.task = task_config("contrastive_pairs" if arg else "contrastive_sentences", temperature=0.05)
    c.data.format = "table"
    name = "stsb/stsb-en-{}.csv" if arg else "sst2/{}.tsv"
    c.data.path = common.shared_data(name.format("train"))
    c.data.eval_path = common.shared_data(name.format("dev"))
    c.data.rename = (("1", "text"), ("2", "text_pair")) if arg else (("1", "text"),)
    c.data.packing = "pad"
    c.data.seq_len = 48
    c.data.batch_size = 64
    c.model.dropout = 0.1
    c.optim.learning_rate = 3e-4
    c.optim.warmup_steps = 10
    c.train.total_tokens = 0
    c.train.total_epochs = 1.0
    c.checkpoint.best_metric = "uniformity"
    return c
