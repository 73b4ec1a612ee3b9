"""What the study prepares; the argument is the folder of its corpus."""

from typing import Any

from lm.tasks import default_config


def get_config(arg: str) -> Any:
    """Rows of 1,024 tokens of JSON lines below `arg`."""
    c = default_config()
    c.data.format = "jsonl"
    c.data.path = arg
    c.data.seq_len = 1024
    c.tokenizer.vocab_size = 8192
    c.train.total_epochs = 1.0
    return c
