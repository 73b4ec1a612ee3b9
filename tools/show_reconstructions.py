"""A picture of what a masked autoencoder makes of held-out images: original, what it sees, what it makes of the rest.

python tools/show_reconstructions.py runs/mae_cifar10 reconstructions.png [--rows=8]
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np


def main() -> None:
    """Loads the run's newest (or best, or a given) checkpoint and its held-out images, and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run's folder; DIR@best or DIR@STEP for another checkpoint")
    parser.add_argument("out", help="the picture, .png or what else matplotlib writes")
    parser.add_argument("--rows", type=int, default=8, help="how many images")
    args = parser.parse_args()

    from lm.checkpoint import CheckpointError
    from lm.data.records import DataError
    from lm.schema import ConfigError

    try:
        draw(reconstruct(args.run, args.rows), args.out)
    except (CheckpointError, ConfigError, DataError) as error:
        sys.exit(f"error: {error}")
    print(f"written to {args.out}")


def reconstruct(run: str, rows: int) -> dict[str, np.ndarray]:
    """Title -> images, uint8 [rows, H, W, C], of held-out images, evenly spaced over all of them."""
    import jax

    from lm import build
    from lm.data import feed, pipeline
    from lm.schema import ConfigError

    cfg, model, params, _ = build.load_run(run)
    if cfg.objective != "mae":
        raise ConfigError(f"{run}: its 'objective' is {cfg.objective}; only mae makes images")
    own = dataclasses.replace(cfg.data, replay=0.0)  # not what it replayed
    data = pipeline.build(dataclasses.replace(cfg, data=own), None, *pipeline.load(own))
    rows = min(rows, len(data.valid))
    batch = next(feed.eval_batches(data.valid, batch_size=rows, local_rows=np.arange(rows), max_tokens=rows, seq_len=1))
    prediction_BxTxC = np.asarray(jax.jit(model.apply)(params, batch).head)
    return panels(batch["images"], prediction_BxTxC, batch["masked_patches"], cfg.model.patch_size)


def panels(
    images_BxHxWxC: np.ndarray, prediction_BxTxC: np.ndarray, masked_BxM: np.ndarray, size: int
) -> dict[str, np.ndarray]:
    """The three columns of the picture.

    The model predicts a patch less its mean, over its deviation; both are taken from the original, for nothing else
    could give them. What is drawn is thus the structure that the model found, at the true brightness and contrast.
    """
    from lm.models import vision

    patches_BxTxC: Any = vision.patchify(images_BxHxWxC, size).astype(np.float32)
    mean, deviation = patches_BxTxC.mean(axis=-1, keepdims=True), patches_BxTxC.std(axis=-1, keepdims=True)
    is_masked_BxTx1 = np.zeros(mean.shape, bool)
    np.put_along_axis(is_masked_BxTx1, masked_BxM[..., None], True, axis=1)

    def draw_hidden(hidden_BxTxC: Any) -> np.ndarray:
        pixels_BxTxC = np.where(is_masked_BxTx1, hidden_BxTxC, patches_BxTxC)
        images: np.ndarray = vision.unpatchify(pixels_BxTxC, images_BxHxWxC.shape[1:], size)
        return np.clip(np.rint(images), 0, 255).astype(np.uint8)

    made = draw_hidden(mean + deviation * prediction_BxTxC)
    return {"original": images_BxHxWxC, "seen": draw_hidden(np.float32(127)), "reconstructed": made}


def draw(columns: dict[str, np.ndarray], out: str) -> None:
    """Writes the images as a grid, a column for each title."""
    from matplotlib.figure import Figure

    rows = len(next(iter(columns.values())))
    figure = Figure(figsize=(1.6 * len(columns), 1.6 * rows), layout="constrained")
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for c, (title, images) in enumerate(columns.items()):
        axes[0, c].set_title(title)
        for r, image in enumerate(images):
            axes[r, c].imshow(image, cmap="gray", vmin=0, vmax=255)
            axes[r, c].axis("off")
    figure.savefig(out, dpi=150)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main()
