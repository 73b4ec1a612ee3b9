"""Runs on images: a masked autoencoder, a ViT initialised from it, and the picture of its reconstructions."""

import re

import numpy as np
import pytest
from PIL import Image

from lm import run as run_lib
from lm import train
from lm.config.schema import ConfigError
from lm.tasks import build_config, default_config
from tests import tool_modules

show_reconstructions = tool_modules.load("show_reconstructions")
pytestmark = pytest.mark.slow
SHAPE = (8, 8, 3)


def recipe(path, **entries):
    c = default_config(entries.pop("task__name"))
    c.task.image_shape = SHAPE
    c.data.format, c.data.path, c.data.eval_fraction = "images", str(path), 0.3
    c.data.packing, c.data.seq_len, c.data.batch_size = "pad", 5, 8
    c.model.patch_size, c.model.position, c.model.pool = 4, "sincos", "mean"
    c.model.num_layers, c.model.embed_dim, c.model.num_heads = 1, 8, 2
    c.eval.at_start = False
    c.train.total_steps = 2
    for key, value in entries.items():
        section, _, name = key.rpartition("__")
        setattr(c[section] if section else c, name, value)
    return build_config(c)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """(folder of images, a run of a masked autoencoder on them)."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(30):
        path = folder / "data" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, SHAPE).astype(np.uint8)).save(path)
    cfg = recipe(folder / "data", task__name="masked_autoencoding", task__mask_rate=0.5, model__kind="mae")
    train.train(cfg, folder / "mae")
    return folder / "data", folder / "mae"


def test_a_linear_probe_keeps_the_encoder_and_trains_the_head(pretrained):
    data, run = pretrained
    entries = {"task__name": "image_classification", "task__labels": ("a", "b"), "model__kind": "vit"}
    rules = {"init_from": str(run), "init_rules": (("head/.*", "reinit"), (".*", "keep"))}
    planned = run_lib.plan(recipe(data, **entries, **rules, optim__lr_rules=(("head/.*", 1.0), (".*", 0.0))), None)
    assert len(planned.origin_of) > 10
    for path, origin in planned.origin_of.items():
        assert origin == (None if path.startswith("head/") else f"params/{path}")
        assert planned.selection.trained[path] == path.startswith("head/")
    assert {path.split("/")[0] for path in planned.unused} == {"decoder", "decoder_embed", "mask_token", "pixels"}


def test_images_cannot_be_sharded_over_positions(tmp_path):
    mae = {"task__name": "masked_autoencoding", "task__mask_rate": 0.5, "model__kind": "mae"}
    with pytest.raises(ConfigError, match=r"^'mesh.context' splits the positions of a text; 'model.kind' mae"):
        recipe(tmp_path, **mae, mesh__context=2)


def test_the_picture_shows_visible_and_reconstructed_patches(pretrained, tmp_path):
    data, run = pretrained
    columns, about = show_reconstructions.reconstruct(str(run), 3)
    show_reconstructions.draw(columns, about, str(tmp_path / "out.png"))
    assert Image.open(tmp_path / "out.png").size == (960, 810)
    assert re.fullmatch(
        rf"{re.escape(str(run))}, step 2, 3 held-out images\n"
        r"squared error per hidden patch: model \d\.\d{4}, zero prediction 1\.0000",
        about,
    )
    held_out = {np.asarray(Image.open(path)).tobytes() for path in data.glob("*/*.png")}
    for original, seen, made, zero in zip(*columns.values(), strict=True):
        assert original.tobytes() in held_out
        # Two of the four patches are visible and unchanged; the others are grey, or reconstructed.
        squares = [(slice(r, r + 4), slice(c, c + 4)) for r in (0, 4) for c in (0, 4)]
        is_seen = [np.array_equal(seen[square], original[square]) for square in squares]
        assert sum(is_seen) == 2
        for square, visible in zip(squares, is_seen, strict=True):
            assert np.array_equal(made[square], original[square]) == visible
            assert np.array_equal(zero[square], original[square]) == visible
            assert visible or np.all(seen[square] == 127)
