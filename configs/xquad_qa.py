"""Find the answer to a question in a paragraph (XQuAD in English, Artetxe et al. 2020, part of SQuAD v1.1's dev set).

    python -m lm.main --config=configs/xquad_qa.py --workdir=runs/xquad_qa
    python -m lm.main --config=configs/xquad_qa.py:scratch --workdir=runs/xquad_qa_scratch

Two CPU cores, minutes. Held-out exact match and F1: not run.
Reads ../shared/data/xquad/xquad.en.json (LM_SHARED_DATA names another place) and starts from runs/tinystories_mlm. A
fifth of the 1,190 questions is held out by hash; others about the same paragraphs are trained on. A thousand questions
teach a model this small little: the recipe shows the way, not a result.
The argument 'scratch' starts from random parameters with the same tokenizer and steps.
"""

from typing import Any

from configs import bc5cdr_ner, common


def get_config(arg: str | None = None) -> Any:
    """Extraction of answers; `arg` is '' or 'scratch'."""
    c = bc5cdr_ner.get_config(arg)
    c.objective = "span_qa"
    c.data.format = "squad"
    c.data.task = "span_qa"
    c.data.path = common.shared_data("xquad/xquad.en.json")
    c.data.eval_path = ""
    c.data.eval_fraction = 0.2
    c.data.rename = ()
    c.data.labels = ()
    c.data.seq_len = 256
    c.data.batch_size = 8

    c.train.total_steps = 150
    c.eval.every_steps = 75
    c.eval.max_tokens = 0  # all windows of each question
    c.checkpoint.every_steps = 75
    c.checkpoint.best_metric = "f1"
    return c
