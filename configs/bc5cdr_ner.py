"""Chemicals and diseases in biomedical abstracts (BC5CDR, Li et al. 2016): fine-tune an encoder to tag them in BIO.

    python -m lm.main --config=configs/bc5cdr_ner.py --workdir=runs/bc5cdr_ner
    python -m lm.main --config=configs/bc5cdr_ner.py:scratch --workdir=runs/bc5cdr_ner_scratch

Two CPU cores, minutes. Held-out entity F1: not run.
Reads ../shared/data/bc5cdr/{train,devel}.tsv (LM_SHARED_DATA names another place) and starts from runs/tinystories_mlm.
The argument 'scratch' starts from random parameters with the same tokenizer and steps.
"""

from typing import Any

from configs import common, tinystories_mlm

PRETRAINED = "runs/tinystories_mlm"


def get_config(arg: str | None = None) -> Any:
    """Tagging of words; `arg` is '' or 'scratch'."""
    c = tinystories_mlm.get_config()
    if arg == "scratch":
        c.tokenizer.path = f"{PRETRAINED}/tokenizer.model"
    else:
        c.init_from = PRETRAINED
        c.init_rules = ((r"head/.*", "reinit"), (r".*", "keep"))
    c.objective = "tagging"
    c.data.format = "conll"
    c.data.task = "tagging"
    c.data.path = common.shared_data("bc5cdr/train.tsv")
    c.data.eval_path = common.shared_data("bc5cdr/devel.tsv")
    c.data.separator = ""
    c.data.rename = (("1", "token"), ("2", "tag"))
    c.data.labels = ("O", "B-Chemical", "I-Chemical", "B-Disease", "I-Disease")
    c.data.packing = "pad"
    c.data.seq_len = 96
    c.data.batch_size = 16

    c.model.dropout = 0.1
    c.optim.learning_rate = 1e-3
    c.optim.schedule = "linear"
    c.optim.warmup_steps = 20
    c.optim.decay_steps = 0
    c.train.total_epochs = 0.0
    c.train.total_steps = 200
    c.eval.every_steps = 100
    c.eval.max_tokens = 49_152  # 512 rows
    c.checkpoint.every_steps = 100
    c.checkpoint.best_metric = "entity_f1"
    c.checkpoint.best_mode = "max"
    return c
