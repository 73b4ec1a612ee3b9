"""Fine-tune the quickstart's checkpoint on instruction pairs from the standard library; the loss is on answers only.

    python -m lm.main --config=configs/quickstart_sft.py --workdir=runs/quickstart/sft
    python -m lm.main --config=configs/quickstart_sft.py:scratch --workdir=runs/quickstart/sft_scratch

Two CPU cores, a minute. Held-out nats per answer token 4.158, from scratch 5.479 (Python 3.11.7).
The argument 'scratch' starts from random parameters with the same tokenizer and steps, as a baseline.
"""

from typing import Any

from configs import quickstart_pretrain
from lm.tasks import task_config

PRETRAINED = "runs/quickstart/pretrain"


def get_config(arg: str | None = None) -> Any:
    """The quickstart's fine-tuning; `arg` is '' or 'scratch'."""
    c = quickstart_pretrain.get_config()
    if arg == "scratch":
        c.tokenizer.path = f"{PRETRAINED}/tokenizer.model"
    else:
        c.init_from = PRETRAINED
    c.data.format = "builtin_instructions"
    c.task = task_config("chat")

    c.optim.learning_rate = 1e-3
    c.optim.warmup_steps = 10
    c.train.total_steps = 50
    c.eval.max_tokens = 0
    c.generate.prompts = (
        "Summarise this function: queue.Stack.is_empty(self)",
        "Summarise this function: shelf.Shelf.close(self)",
        "Summarise this function: mail.Message.get_subject(self, default=None)",
    )
    c.generate.temperature = 0.0
    return c
