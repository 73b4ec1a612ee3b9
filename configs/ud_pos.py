"""Fine-tune an encoder to tag English words with universal parts of speech (UD English EWT, Silveira et al. 2014).

    python -m lm.main --config=configs/ud_pos.py --workdir=runs/ud_pos
    python -m lm.main --config=configs/ud_pos.py:scratch --workdir=runs/ud_pos_scratch

Two CPU cores, minutes. Held-out accuracy over words: see experiments/objectives/results.md.
The argument is START,HOW: 'mlm' (runs/reviews_mlm) or 'scratch'; what learns (full, head, last2, lora, adapters).
Reads ../shared/data/ud_ewt (LM_SHARED_DATA names another place).
"""

from typing import Any

from configs import bc5cdr_ner, common, reviews_mlm


def get_config(arg: str | None = None) -> Any:
    """See above for `arg`."""
    c = bc5cdr_ner.tagger(reviews_mlm.get_config(), arg, "runs/reviews_mlm")
    c.data.path = common.shared_data("ud_ewt/en_ewt-ud-train_from_source_docs.conllu.gz")
    c.data.eval_path = common.shared_data("ud_ewt/en_ewt-ud-dev.conllu")
    c.data.rename = (("2", "token"), ("4", "tag"))
    c.task.labels = (
        *("ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "INTJ", "NOUN", "NUM", "PART"),
        *("PRON", "PROPN", "PUNCT", "SCONJ", "SYM", "VERB", "X"),
    )
    c.checkpoint.best_metric = "token_accuracy"
    return c
