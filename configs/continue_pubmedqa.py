"""Continue pre-training the TinyStories model on medical abstracts (PubMedQA, Jin et al. 2019), replaying some stories.

    python -m lm.main --config=configs/continue_pubmedqa.py --workdir=runs/continue_pubmedqa
    python -m lm.main --config=configs/continue_pubmedqa.py:no_replay --workdir=runs/continue_pubmedqa_no_replay

Two CPU cores, minutes. summary.json has `bits_per_byte` of held-out abstracts and `replay_bits_per_byte` of held-out
stories, at the end and, under 'before', at the start; they measure what is learnt and what is forgotten. For both see
experiments/objectives/results.md.
Reads ../shared/data/pubmedqa/ori_pqal.json (LM_SHARED_DATA names another place) and starts from runs/tinystories, whose
data must still be there. The argument 'no_replay' trains on abstracts only, and measures the same.
"""

from typing import Any

from configs import common, tinystories


def get_config(arg: str | None = None) -> Any:
    """Continued pre-training; `arg` is '' or 'no_replay'."""
    c = tinystories.get_config()
    c.init_from = "runs/tinystories"
    c.data.format = "jsonl"
    c.data.path = common.shared_data("pubmedqa/ori_pqal.json")
    c.data.rename = (("CONTEXTS", "text"),)
    c.data.separator = ""
    c.data.eval_fraction = 0.05  # of 1,000 abstracts
    c.data.replay = 1e-9 if arg == "no_replay" else 0.25  # 1e-9 of 1,200 rows is none, but stories are evaluated

    c.optim.learning_rate = 1e-3  # a third of the peak of pre-training: a higher one forgets faster
    c.optim.schedule = "cosine"
    c.optim.end_lr_ratio = 0.1
    c.optim.decay_steps = 0
    c.train.total_epochs = 0.0
    c.train.total_steps = 150
    c.eval.every_steps = 75
    c.eval.max_tokens = 32_768  # 128 rows of each
    c.checkpoint.every_steps = 75
    c.generate.prompts = ("Once upon a time, there was a little", "The aim of this study was to")
    return c
