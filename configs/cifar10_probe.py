"""Linear probe of a frozen encoder on CIFAR-10's classes: a linear layer on the mean of the last hidden states.

    python -m lm.main --config=configs/cifar10_probe.py:mae --workdir=runs/cifar10_probe_mae
    python -m lm.main --config=configs/cifar10_probe.py:simclr --workdir=runs/cifar10_probe_simclr
    python -m lm.main --config=configs/cifar10_probe.py:random --workdir=runs/cifar10_probe_random

Two CPU cores, minutes. Held-out accuracy: see experiments/objectives/results.md.
The argument selects the encoder: that of runs/mae_cifar10, that of runs/simclr_cifar10, or a random one, which shows
what pre-training is worth. The data is that of `configs/mae_cifar10.py`, with its labels.
"""

from typing import Any

from configs import mae_cifar10
from lm.tasks import task_config

LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def get_config(arg: str | None = None) -> Any:
    """Training of the head alone; `arg` is 'mae' (also when empty), 'simclr' or 'random'."""
    c = mae_cifar10.get_config()
    c.task = task_config("image_classification", labels=LABELS)
    c.data.augment = (("crop", 0.3), ("flip", 0.5))
    if arg != "random":
        c.init_from = f"runs/{arg or 'mae'}_cifar10"
        c.init_rules = (("head/.*", "reinit"), (".*", "keep"))

    c.model.kind = "vit"
    c.model.decoder_layers = c.model.decoder_dim = 0  # the autoencoder's decoder is not loaded
    c.model.pool = "mean"

    c.optim.lr_rules = (("head/.*", 1.0), (".*", 0.0))
    c.optim.learning_rate = 1e-2
    c.optim.weight_decay = 0.0
    c.optim.warmup_steps = 20
    c.train.total_steps = 400
    c.checkpoint.best_metric = "accuracy"
    return c
