"""Chemicals and diseases in biomedical abstracts (BC5CDR, Li et al. 2016): fine-tune an encoder to tag them in BIO.

    python -m lm.main --config=configs/bc5cdr_ner.py --workdir=runs/bc5cdr_ner
    python -m lm.main --config=configs/bc5cdr_ner.py:scratch --workdir=runs/bc5cdr_ner_scratch

Two CPU cores, minutes. Held-out entity F1: see experiments/objectives/results.md.
The argument is START,HOW: 'mlm' (runs/abstracts_mlm) or 'scratch'; what learns (full, head, last2, lora, adapters).
Reads ../shared/data/bc5cdr/{train,devel}.tsv (LM_SHARED_DATA names another place).
"""

from typing import Any

from configs import abstracts_mlm, common
from lm.tasks import task_config


def get_config(arg: str | None = None) -> Any:
    """See above for `arg`."""
    return tagger(abstracts_mlm.get_config(), arg, "runs/abstracts_mlm")


def tagger(c: Any, arg: str | None, run: str) -> Any:
    """A tagging recipe on a pre-trained encoder: `c` is its pre-training recipe, `run` the folder of that run."""
    common.fine_tune(c, arg, {"mlm": run})
    c.task = task_config("tagging", labels=("O", "B-Chemical", "I-Chemical", "B-Disease", "I-Disease"))
    c.data.format = "conll"
    c.data.path = common.shared_data("bc5cdr/train.tsv")
    c.data.eval_path = common.shared_data("bc5cdr/devel.tsv")
    c.data.rename = (("1", "token"), ("2", "tag"))
    c.data.packing = "pad"
    c.data.seq_len = 64
    c.data.batch_size = 32

    c.model.dropout = 0.1
    c.optim.learning_rate = 1e-3
    c.optim.schedule = "linear"
    c.optim.warmup_steps = 20
    c.train.total_tokens = 0
    c.train.total_steps = 200
    c.eval.every_steps = 100
    c.eval.max_tokens = 65_536  # 1,024 rows
    c.checkpoint.best_metric = "entity_f1"
    return c
