"""Fine-tune all of a pre-trained encoder on CIFAR-10's classes, or train the same model from scratch.

    python -m lm.main --config=configs/cifar10_finetune.py:mae --workdir=runs/cifar10_finetune_mae
    python -m lm.main --config=configs/cifar10_finetune.py:simclr --workdir=runs/cifar10_finetune_simclr
    python -m lm.main --config=configs/cifar10_finetune.py:random --workdir=runs/cifar10_finetune_random

Two CPU cores, about 3 minutes each (10 passes over the images), estimated; not run in full.
The argument is that of `configs/cifar10_probe.py`.
"""

from typing import Any

from configs import cifar10_probe


def get_config(arg: str | None = None) -> Any:
    """Training of all parameters; `arg` is 'mae' (also when empty), 'simclr' or 'random'."""
    c = cifar10_probe.get_config(arg)
    c.optim.lr_rules = ((".*", 1.0),)
    c.optim.learning_rate = 1e-3
    c.optim.weight_decay = 0.05
    c.optim.warmup_steps = 40
    c.train.total_steps = 400
    c.model.dropout = 0.1
    c.loss.label_smoothing = 0.1
    return c
