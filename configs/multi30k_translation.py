"""Translate English image captions into German (Multi30k, Elliott et al. 2016): 29,000 pairs.

    python -m lm.main --config=configs/multi30k_translation.py --workdir=runs/multi30k
    python -m lm.main --config=configs/multi30k_translation.py:decoder --workdir=runs/multi30k_decoder
    python -m lm.main --config=configs/multi30k_translation.py:pretrained --workdir=runs/multi30k_pretrained
    python tools/translate.py runs/multi30k --path='../shared/data/multi30k/test_2016_flickr.{en,de}.gz'

Two CPU cores, minutes. Nats per token with 4,000 pairs, pretrained and scratch: see experiments/objectives/results.md;
with all pairs, and BLEU on the test set: not run.
The argument 'decoder' trains a decoder-only model, with the translation as the answer of a conversation; 'pretrained'
starts from the run of configs/t5_tinystories.py, whose tokenizer saw only English; 'scratch' takes only that tokenizer.
"""

from typing import Any

from configs import common, t5_tinystories
from lm.config.schema import ConfigError
from lm.tasks import task_config


def get_config(arg: str | None = None) -> Any:
    """Translation; `arg` is '', 'decoder', 'pretrained' or 'scratch'."""
    if arg not in (None, "", "decoder", "pretrained", "scratch"):
        raise ConfigError(f"recipe argument '{arg}': expected decoder, pretrained, scratch or nothing")
    c = t5_tinystories.get_config()
    c.data.format = "parallel"
    c.data.path = common.shared_data("multi30k/train.{en,de}.gz")
    c.data.eval_path = common.shared_data("multi30k/val.{en,de}.gz")
    c.data.separator = ""
    c.task = task_config("translation")
    c.data.packing = "pad"
    c.data.seq_len = 48
    c.data.target_len = 48
    c.data.batch_size = 64
    if arg == "pretrained":
        c.init_from = "runs/t5_tinystories"
    elif arg == "scratch":
        c.tokenizer.path = "runs/t5_tinystories/tokenizer.model"
    else:
        c.tokenizer.vocab_size = 4096
        c.tokenizer.extra_ids = 0
    if arg == "decoder":
        c.task = task_config("chat")
        c.data.packing = "best_fit"
        c.data.seq_len = 96
        c.data.target_len = 0
        c.data.batch_size = 32
        c.model.kind = "decoder"
        c.model.num_layers = 4
        c.model.decoder_layers = 0

    c.model.dropout = 0.1
    c.loss.label_smoothing = 0.1
    c.optim.learning_rate = 2e-3
    c.optim.schedule = "cosine"
    c.optim.warmup_steps = 50
    c.optim.decay_steps = 0
    c.train.total_epochs = 2.0
    c.eval.every_steps = 200
    c.checkpoint.every_steps = 200
    c.generate.prompts = ("A man is riding a bike.", "Two dogs are playing in the snow.")
    c.generate.max_new_tokens = 48
    c.generate.temperature = 0.0
    return c
