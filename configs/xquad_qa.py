"""Find the answer to a question in a paragraph (XQuAD in English, Artetxe et al. 2020, part of SQuAD v1.1's dev set).

    python -m lm.main --config=configs/xquad_qa.py --workdir=runs/xquad_qa
    python -m lm.main --config=configs/xquad_qa.py:scratch --workdir=runs/xquad_qa_scratch

Two CPU cores, minutes. Held-out exact match and F1: see experiments/objectives/results.md.
A fifth of the 240 paragraphs is held out, with all questions about them. A model this small learns little from a
thousand questions: the recipe shows the method, not a good score.
The argument is START,HOW: 'mlm' (runs/reviews_mlm) or 'scratch'; what learns (full, head, last2, lora, adapters).
Reads ../shared/data/xquad/xquad.en.json (LM_SHARED_DATA names another place).
"""

from typing import Any

from configs import bc5cdr_ner, common, reviews_mlm
from lm.tasks import task_config


def get_config(arg: str | None = None) -> Any:
    """See above for `arg`."""
    c = bc5cdr_ner.tagger(reviews_mlm.get_config(), arg, "runs/reviews_mlm")
    c.task = task_config("span_qa")
    c.data.format = "squad"
    c.data.path = common.shared_data("xquad/xquad.en.json")
    c.data.eval_path = ""
    c.data.eval_fraction = 0.2
    c.data.rename = ()
    c.data.seq_len = 256
    c.data.batch_size = 8

    c.train.total_steps = 150
    c.eval.every_steps = 75
    c.eval.max_tokens = 0  # all windows of each question
    c.checkpoint.best_metric = "f1"
    return c
