"""Pre-train a small BERT-like encoder on TinyStories by masked language modelling.

python -m lm.main --config=configs/tinystories_mlm.py --workdir=runs/tinystories_mlm

Two CPU cores, minutes. Held-out nats per masked token: not run.
"""

from typing import Any

from configs import tinystories


def get_config(arg: str | None = None) -> Any:
    """Masked language modelling; `arg` is not used."""
    del arg
    c = tinystories.get_config()
    c.objective = "mlm"
    c.tokenizer.extra_ids = 1  # the mask
    c.data.task = "masked_text"
    c.model.kind = "encoder"
    c.generate.prompts = ()
    return c
