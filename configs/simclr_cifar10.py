"""Pre-train a small Vision Transformer on CIFAR-10 without labels, by contrastive learning (Chen et al. 2020).

    python -m lm.main --config=configs/simclr_cifar10.py --workdir=runs/simclr_cifar10

Two CPU cores, minutes (10 passes over the images). Held-out accuracy: see experiments/objectives/results.md.
Data as in `configs/mae_cifar10.py`; `configs/cifar10_probe.py` and `configs/cifar10_finetune.py` start from this run.
"""

from typing import Any

from configs import mae_cifar10
from lm.tasks import task_config


def get_config(arg: str | None = None) -> Any:
    """Pre-training on pairs of views; `arg` is not used."""
    del arg
    c = mae_cifar10.get_config()
    c.task = task_config("contrastive_images", temperature=0.2, projection_dim=64)
    c.data.augment = (("crop", 0.8), ("flip", 0.5), ("color", 0.4))  # a view keeps at least a fifth of the area

    c.model.kind = "vit"
    c.model.decoder_layers = c.model.decoder_dim = 0  # an encoder only
    c.model.pool = "mean"

    c.optim.warmup_steps = 20
    c.train.total_steps = 400
    c.eval.every_steps = 100
    c.checkpoint.every_steps = 100
    return c
