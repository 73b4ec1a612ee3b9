"""Prefer the better of two answers to an instruction (DPO, Rafailov et al. 2023), after tuning on the chosen answers.

    python -m lm.main --config=configs/dpo_instructions.py:sft --workdir=runs/instructions_sft
    python -m lm.main --config=configs/dpo_instructions.py --workdir=runs/instructions_dpo
    python -m lm.main --config=configs/dpo_instructions.py:lora --workdir=runs/instructions_dpo_lora

Two CPU cores, four minutes each. Accuracy (the chosen answer has the larger reward) on 133 held-out pairs 0.872, loss
0.411 nats per pair (0.693 before); with LoRA, 4% of the parameters, 0.835 and 0.409. Fine-tuning on chosen answers:
held-out nats per answer token 3.524 (6.609 before).
Reads ../shared/data/instr_rasbt/instruction-data-with-preference.json (LM_SHARED_DATA names another place): 1,100
instructions with a polite and a rude, or a better and a worse answer. The first command starts from runs/tinystories.
"""

from typing import Any

from configs import common, tinystories
from lm.config.schema import ConfigError
from lm.tasks import task_config


def get_config(arg: str | None = None) -> Any:
    """DPO on all parameters, or with `arg` 'lora' on LoRA's; 'sft' is the fine-tuning that both start from."""
    if arg not in (None, "", "sft", "lora"):
        raise ConfigError(f"recipe argument '{arg}': expected 'sft', 'lora' or nothing")
    c = tinystories.get_config()
    c.init_from = "runs/tinystories" if arg == "sft" else "runs/instructions_sft"
    c.data.format = "jsonl"
    c.data.path = common.shared_data("instr_rasbt/instruction-data-with-preference.json")
    c.data.separator = ""
    c.data.eval_fraction = 0.15  # of the instructions: the same ones for both tasks
    c.data.packing = "pad"
    c.data.seq_len = 96
    c.data.batch_size = 8
    if arg == "sft":
        c.task = task_config("chat")
        c.data.rename = (("output", "unused"), ("chosen", "output"))
        c.optim.learning_rate = 1e-3
        c.train.total_epochs = 1.0
    else:
        c.task = task_config("preferences", beta=0.1)
        c.optim.learning_rate = 1e-4
        c.train.total_epochs = 1.0
    if arg == "lora":
        c.init_rules = common.fresh_adapters()
        c.adapter.kind = "lora"
        c.adapter.targets = r".*/(query|key|value|out|gate|up|down)"
        c.optim.lr_rules = ((r".*/lora_.*", 1.0), (r".*", 0.0))
        c.optim.learning_rate = 1e-3

    c.optim.schedule = "linear"
    c.optim.warmup_steps = 10
    c.optim.decay_steps = 0
    c.eval.every_steps = 0
    c.checkpoint.every_steps = 0
    c.generate.prompts = ("What is the opposite of 'hot'?", "Rewrite the sentence in the past tense.\n\nShe goes home.")
    c.generate.temperature = 0.0
    return c
