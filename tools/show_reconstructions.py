"""Draws how a masked autoencoder reconstructs held-out images, beside a prediction of zero.

python tools/show_reconstructions.py runs/mae_cifar10 reconstructions.png [--rows=8]
"""

import dataclasses
from typing import Any

import numpy as np
from absl import flags

from lm import command_line
from lm.terminal import say

_ROWS = flags.DEFINE_integer("rows", 8, "Number of images.", lower_bound=1)


def main(argv: list[str]) -> None:
    """Loads a run's checkpoint (RUN, RUN@best or RUN@STEP) and its held-out images, and writes the picture."""
    run, out = command_line.arguments(argv, "RUN", "OUT.png")
    with command_line.one_line_errors():
        draw(*reconstruct(run, _ROWS.value), out)
    say(f"written to {out}")


def check(cfg: Any) -> None:
    """Raises ConfigError unless the config is that of a masked autoencoder."""
    from lm.config.schema import ConfigError

    if cfg.task.name != "masked_autoencoding":
        raise ConfigError(f"this run's 'task.name' is {cfg.task.name}; expected a run of masked_autoencoding")


def reconstruct(run: str, rows: int) -> tuple[dict[str, np.ndarray], str]:
    """(`panels` of held-out images that are evenly spaced in the split, heading of the picture)."""
    import jax

    from lm import eval_sets, input_pipeline
    from lm import run as run_lib
    from lm.data import loader
    from lm.tasks import task_of

    saved, (cfg, model, params, _) = run_lib.load_checkpoint(run)
    check(cfg)
    own = dataclasses.replace(cfg.data, replay=0.0)  # only the run's own images
    cfg = dataclasses.replace(cfg, data=own)
    found = input_pipeline.load(own, task_of(cfg).wanted(cfg))
    data = input_pipeline.build(cfg, None, *found, sets=eval_sets.load(cfg))
    rows = min(rows, len(data.valid))
    batch = next(
        loader.eval_batches(data.valid, batch_size=rows, local_rows=np.arange(rows), max_tokens=rows, seq_len=1)
    )
    prediction_BxTxC = np.asarray(jax.jit(model.apply)(params, batch).head)
    images, masked, size = batch["images"], batch["masked_patches"], cfg.model.patch_size
    target = cfg.task.target
    error, of_zero = (loss(x, images, masked, cfg) for x in (prediction_BxTxC, np.zeros_like(prediction_BxTxC)))
    about = f"{run.partition('@')[0]}, step {saved.step:,}, {rows} held-out images"
    errors = f"squared error per hidden patch: model {error:.4f}, zero prediction {of_zero:.4f}"
    return panels(
        images, prediction_BxTxC, masked, size, cfg.model if target == "pixels" else None
    ), f"{about}\n{errors}"


def loss(prediction_BxTxC: np.ndarray, images_BxHxWxC: np.ndarray, masked_BxM: np.ndarray, cfg: Any) -> float:
    """The training loss of a prediction."""
    import jax.numpy as jnp

    from lm import losses
    from lm.models import vision

    patches_BxTxC = vision.patchify(vision.normalise(images_BxHxWxC, cfg.model), cfg.model.patch_size)
    ones_B = jnp.ones(len(images_BxHxWxC))
    prediction, patches, masked = map(jnp.asarray, (prediction_BxTxC, patches_BxTxC, masked_BxM))
    terms = losses.patch_mse(prediction, patches, masked, ones_B, target=cfg.task.target)
    return float(terms.sum / terms.weight)


def panels(
    images_BxHxWxC: np.ndarray, prediction_BxTxC: np.ndarray, masked_BxM: np.ndarray, size: int, of_pixels: Any = None
) -> dict[str, np.ndarray]:
    """Title -> images, uint8 [B, H, W, C]: the columns of the picture.

    The model predicts patches normalised by their own mean and standard deviation, and does not predict these two. They
    are estimated from the visible patches, one pair for all hidden patches of an image: the mean of their pixels and
    the root mean square of their standard deviations. The prediction of zero is drawn in the same way, so that the
    difference between the last two columns is what the model contributes. A model whose config `of_pixels` has
    task.target=pixels predicts the patches themselves.
    """
    from lm.models import vision

    patches_BxTxC: Any = vision.patchify(images_BxHxWxC, size).astype(np.float32)
    is_masked_BxTx1 = np.zeros((*patches_BxTxC.shape[:2], 1), bool)
    np.put_along_axis(is_masked_BxTx1, masked_BxM[..., None], True, axis=1)
    over_seen = {"axis": (1, 2), "keepdims": True, "where": ~is_masked_BxTx1}
    mean_Bx1x1 = patches_BxTxC.mean(**over_seen)
    deviation_Bx1x1 = np.sqrt(patches_BxTxC.var(axis=-1, keepdims=True).mean(**over_seen))

    def draw_hidden(hidden_BxTxC: Any) -> np.ndarray:
        pixels_BxTxC = np.where(is_masked_BxTx1, hidden_BxTxC, patches_BxTxC)
        images: np.ndarray = vision.unpatchify(pixels_BxTxC, images_BxHxWxC.shape[1:], size)
        return np.clip(np.rint(images), 0, 255).astype(np.uint8)

    model_BxTxC = mean_Bx1x1 + deviation_Bx1x1 * prediction_BxTxC
    if of_pixels:  # a patch is rows, columns, channels: channels are last, as `normalise` has them
        rows = [np.resize(row, images_BxHxWxC.shape[-1]) for row in (of_pixels.pixel_deviation, of_pixels.pixel_mean)]
        deviation_C, mean_C = (255.0 * np.tile(row, size**2) for row in rows)
        model_BxTxC = prediction_BxTxC * deviation_C + mean_C
    return {
        "original": images_BxHxWxC,
        "seen": draw_hidden(np.float32(127)),
        "model": draw_hidden(model_BxTxC),
        "zero prediction": draw_hidden(mean_Bx1x1 + 0 * prediction_BxTxC),
    }


def draw(columns: dict[str, np.ndarray], about: str, out: str) -> None:
    """Writes the images as a grid with one column for each title, under the heading `about`."""
    from matplotlib.figure import Figure

    rows = len(next(iter(columns.values())))
    figure = Figure(figsize=(1.6 * len(columns), 1.6 * rows + 0.6), layout="constrained")
    figure.suptitle(about, fontsize=9)
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for c, (title, images) in enumerate(columns.items()):
        axes[0, c].set_title(title)
        for r, image in enumerate(images):
            axes[r, c].imshow(image, cmap="gray", vmin=0, vmax=255)
            axes[r, c].axis("off")
    figure.savefig(out, dpi=150)


if __name__ == "__main__":
    command_line.run(main)
