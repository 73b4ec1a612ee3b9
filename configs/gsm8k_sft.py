"""Fine-tune the TinyStories model on GSM8K (Cobbe et al. 2021): question -> worked answer, loss on answers only.

    python -m lm.main --config=configs/gsm8k_sft.py --workdir=runs/gsm8k_sft

Two CPU cores, minutes. Held-out nats per answer token 2.748 on 128 evaluation rows (9.455 before).
Reads ../shared/data/gsm8k/{train,test}.jsonl (LM_SHARED_DATA names another place) and starts from runs/tinystories. A
model this small learns the form of a worked answer, not arithmetic.
"""

from typing import Any

from configs import common, tinystories
from lm.tasks import task_config


def get_config(arg: str | None = None) -> Any:
    """Fine-tuning on worked answers; `arg` is not used."""
    del arg
    c = tinystories.get_config()
    c.init_from = "runs/tinystories"
    c.data.format = "jsonl"
    c.task = task_config("chat")
    c.data.path = common.shared_data("gsm8k/train.jsonl")
    c.data.eval_path = common.shared_data("gsm8k/test.jsonl")
    c.data.rename = (("question", "prompt"), ("answer", "response"))
    c.data.separator = ""
    c.data.packing = "best_fit"
    c.data.seq_len = 512  # rotary positions go beyond the 256 of pre-training
    c.data.batch_size = 8

    c.optim.learning_rate = 1e-3
    c.optim.schedule = "linear"
    c.optim.warmup_steps = 10
    c.optim.decay_steps = 0
    c.train.total_epochs = 0.0
    c.train.total_steps = 100
    c.eval.every_steps = 50
    c.eval.max_tokens = 65_536  # 128 rows
    c.checkpoint.every_steps = 50
    c.generate.prompts = ("Tom has 3 apples and buys 4 more. How many apples does Tom have?",)
    c.generate.temperature = 0.0
    return c
