"""Pre-train a small Vision Transformer on CIFAR-10 without labels, as a masked autoencoder (He et al. 2021).

    python -m lm.main --config=configs/mae_cifar10.py --workdir=runs/mae_cifar10
    python tools/show_reconstructions.py runs/mae_cifar10 reconstructions.png

Two CPU cores, minutes (20 passes over the images). Held-out loss: see experiments/objectives/results.md.
Reads ../shared/data/cifar10/*.tar (LM_SHARED_DATA names another place): 5,000 images, and 1,000 to evaluate on.
`configs/cifar10_probe.py` and `configs/cifar10_finetune.py` start from this run.
"""

from typing import Any

from configs import common
from lm.tasks import default_config


def get_config(arg: str | None = None) -> Any:
    """Pre-training on pixels; `arg` is not used."""
    del arg
    c = default_config("masked_autoencoding")
    c.task.image_shape = (32, 32, 3)
    c.task.mask_rate = 0.75  # 16 patches are seen, 48 are not
    c.data.format = "images"
    c.data.path = common.shared_data("cifar10/cifar10_jpg_train_500perclass.tar")
    c.data.eval_path = common.shared_data("cifar10/cifar10_jpg_test_100perclass.tar")
    c.data.seq_len = 65  # (32 / 4)^2 patches and [CLS]: the positions of a row, for throughput
    c.data.packing = "pad"
    c.data.augment = (("crop", 0.6), ("flip", 0.5))
    c.data.batch_size = 128

    c.model.kind = "mae"
    c.model.patch_size = 4
    c.model.position = "sincos"
    c.model.num_layers = 4
    c.model.embed_dim = 96
    c.model.num_heads = 4
    c.model.decoder_layers = 1
    c.model.decoder_dim = 64
    c.model.init = "fan_in"  # at this width better than gpt2, see experiments/initialisation
    c.model.unroll = 0  # all layers: faster on CPU

    c.optim.learning_rate = 1e-3
    c.optim.weight_decay = 0.05
    c.optim.warmup_steps = 40
    c.train.total_steps = 800
    c.eval.every_steps = 200
    c.checkpoint.every_steps = 200
    return c
