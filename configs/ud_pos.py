"""Universal parts of speech of English words (UD English EWT, Silveira et al. 2014): fine-tune an encoder to tag them.

    python -m lm.main --config=configs/ud_pos.py --workdir=runs/ud_pos
    python -m lm.main --config=configs/ud_pos.py:scratch --workdir=runs/ud_pos_scratch

Two CPU cores, minutes. Held-out accuracy over words: not run.
Reads ../shared/data/ud_ewt (LM_SHARED_DATA names another place) and starts from runs/tinystories_mlm. The argument
'scratch' starts from random parameters with the same tokenizer and steps.
"""

from typing import Any

from configs import bc5cdr_ner, common


def get_config(arg: str | None = None) -> Any:
    """Tagging of words; `arg` is '' or 'scratch'."""
    c = bc5cdr_ner.get_config(arg)
    c.data.path = common.shared_data("ud_ewt/en_ewt-ud-train_from_source_docs.conllu.gz")
    c.data.eval_path = common.shared_data("ud_ewt/en_ewt-ud-dev.conllu")
    c.data.rename = (("2", "token"), ("4", "tag"))
    c.data.labels = (
        *("ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "INTJ", "NOUN", "NUM", "PART"),
        *("PRON", "PROPN", "PUNCT", "SCONJ", "SYM", "VERB", "X"),
    )
    c.data.seq_len = 64
    c.data.batch_size = 32
    c.eval.max_tokens = 49_152  # 768 rows
    c.checkpoint.best_metric = "token_accuracy"
    return c
