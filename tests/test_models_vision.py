"""lm.models.vision against float64 numpy, and what each part of an image may and may not reach."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm import param_paths
from lm.config import Config, MeshConfig, ModelConfig
from lm.config.schema import ConfigError
from lm.models import transformer, vision
from lm.parallel import sharding
from lm.parallel.mesh import make_mesh
from lm.tasks import TASKS
from lm.types import Head
from tests import reference, tool_modules, toys

show_reconstructions = tool_modules.load("show_reconstructions")
B, P, SHAPE = 8, 4, (8, 12, 3)  # 2 x 3 patches
T, VISIBLE = 6, 2
IMAGE_TASKS = {"mae": "masked_autoencoding", "vit": "contrastive_images"}


@functools.cache
def make(kind, head=None, **options):
    """A small model's config, functions, and parameters whose zeros and ones are perturbed."""
    sizes = dict(position="sincos", num_layers=2, embed_dim=16, num_heads=4, mlp_dim=32) | options
    sizes = dict(decoder_layers=1, decoder_dim=8) | sizes
    model = transformer.resolve(ModelConfig(kind=kind, patch_size=P, **sizes), vocab_size=1, seq_len=1)
    cfg = Config(model=model, task=toys.task(IMAGE_TASKS[kind], image_shape=SHAPE))
    fns = {"vit": vision.vit, "mae": vision.mae}[kind](cfg, head, jnp.float32)
    rng = np.random.default_rng(0)
    params = jax.jit(fns.init)(jax.random.key(0))
    return cfg, fns, jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32), params)


def make_batch(seed=0):
    rng = np.random.default_rng(seed)
    order = np.stack([rng.permutation(T) for _ in range(B)]).astype(np.int32)
    return {
        "images": rng.integers(0, 256, (B, *SHAPE)).astype(np.uint8),
        "visible_patches": order[:, :VISIBLE],
        "masked_patches": order[:, VISIBLE:],
        "example_index": np.arange(B, dtype=np.int32),
    }


# Patches and positions ------------------------------------------------------------------------------------------------


def test_patchify_worked_example():
    image = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])[None, :, :, None]
    np.testing.assert_array_equal(vision.patchify(image, 2), [[[1, 2, 5, 6], [3, 4, 7, 8]]])
    with pytest.raises(ValueError, match=r"images of 2 x 4 pixels cannot be divided into patches of 3 x 3"):
        vision.patchify(image, 3)


@given(*[st.integers(1, 4)] * 5)
def test_unpatchify_is_the_inverse_and_patches_are_slices(rows, columns, size, channels, batch):
    shape = (rows * size, columns * size, channels)
    images = np.arange(batch * np.prod(shape)).reshape(batch, *shape)
    patches = vision.patchify(images, size)
    r, c = rows - 1, columns // 2
    square = images[:, r * size : (r + 1) * size, c * size : (c + 1) * size]
    np.testing.assert_array_equal(patches[:, r * columns + c], square.reshape(batch, -1))
    np.testing.assert_array_equal(vision.unpatchify(patches, shape, size), images)


def sines(rows, columns, width):
    """One number after the other: [row sines, row cosines, column sines, column cosines]."""
    out = np.zeros((rows * columns, width))
    quarter = width // 4
    for row, column, i in np.ndindex(rows, columns, quarter):
        angles = [place / 10_000 ** (i / quarter) for place in (row, column)]
        values = [np.sin(angles[0]), np.cos(angles[0]), np.sin(angles[1]), np.cos(angles[1])]
        out[row * columns + column, i::quarter] = values
    return out


def test_positions_are_sines_of_row_and_column():
    np.testing.assert_allclose(vision.positions(3, 5, 8), sines(3, 5, 8), atol=1e-6)
    with pytest.raises(ConfigError, match=r"multiples of 4 for images, got 6"):
        vision.positions(2, 2, 6)


# The whole model ------------------------------------------------------------------------------------------------------


def encode(leaves, prefix, x, cfg):
    """Blocks and final norm of `tests.reference`, with every position seeing every other."""
    everything = np.ones((len(x), 1, x.shape[1], x.shape[1]), bool)
    for n in range(cfg.num_layers):
        layers = {path: pair for path, pair in leaves.items() if path.startswith(f"{prefix}/layers/")}
        layer = {path.removeprefix(f"{prefix}/layers/"): (v[n], g[n]) for path, (v, g) in layers.items()}
        x, _ = reference.block(layer, x, everything, None, cfg)
    return reference.norm(leaves, f"{prefix}/final_norm", x, cfg.norm, cfg.norm_eps)[0]


def reference_hidden(leaves, images, seen, cfg):
    """Hidden states of [CLS] and of the patches that `seen` [B, M] names, in its order."""
    patches = np.zeros((len(images), T, P * P * 3))
    for b, t in np.ndindex(len(images), T):
        row, column = divmod(t, 3)
        square = images[b, row * P : (row + 1) * P, column * P : (column + 1) * P].astype(np.float64)
        patches[b, t] = (square / 255 * 2 - 1).reshape(-1)
    x = reference.linear(leaves, "embed/patches", patches)[0] + sines(2, 3, cfg.embed_dim)
    x = np.stack([x[b, seen[b]] for b in range(len(images))])
    cls = np.broadcast_to(leaves["embed/cls"][0], (len(images), 1, cfg.embed_dim))
    return encode(leaves, "encoder", np.concatenate([cls, x], axis=1), cfg)


def leaves_of(params):
    values = {path: np.asarray(leaf, np.float64) for path, leaf in param_paths.flatten(params).items()}
    return {path: (value, np.zeros_like(value)) for path, value in values.items()}


def test_vit_is_the_reference():
    cfg, fns, params = make("vit", Head("pooled", 5), pool="mean")
    batch, leaves = make_batch(), leaves_of(params)
    out = jax.jit(fns.apply)(params, batch)
    hidden = reference_hidden(leaves, batch["images"], [np.arange(T)] * B, cfg.model)
    np.testing.assert_allclose(out.hidden_BxLxD, hidden, rtol=0, atol=2e-5)
    logits = reference.linear(leaves, "head/classifier", hidden.mean(axis=1, keepdims=True))[0][:, 0]
    np.testing.assert_allclose(out.head, logits, rtol=0, atol=2e-5)
    assert out.head.dtype == jnp.float32


def test_mae_is_the_reference():
    cfg, fns, params = make("mae")
    batch, leaves = make_batch(), leaves_of(params)
    out = jax.jit(fns.apply)(params, batch)
    hidden = reference_hidden(leaves, batch["images"], batch["visible_patches"], cfg.model)
    np.testing.assert_allclose(out.hidden_BxLxD, hidden, rtol=0, atol=2e-5)

    small = reference.linear(leaves, "decoder_embed", hidden)[0]
    x = np.zeros((B, 1 + T, 8))
    for b in range(B):
        x[b, 0] = small[b, 0]
        x[b, 1:] = leaves["mask_token"][0]
        for place, t in enumerate(batch["visible_patches"][b]):
            x[b, 1 + t] = small[b, 1 + place]
    x[:, 1:] += sines(2, 3, 8)
    decoder = dataclasses.replace(cfg.model, num_layers=1, embed_dim=8, head_dim=2)
    pixels = reference.linear(leaves, "pixels", encode(leaves, "decoder", x, decoder))[0][:, 1:]
    assert out.head.shape == (B, T, P * P * 3)
    np.testing.assert_allclose(out.head, pixels, rtol=0, atol=5e-5)


def test_masked_patches_do_not_reach_the_model():
    """Gradient by the pixels: exactly 0 in hidden patches, not 0 in any visible one; a ViT sees all."""
    batch = make_batch()

    def pixel_gradient(fns, params):
        def total(images):
            out = fns.apply(params, batch | {"images": images})
            return jnp.sin(out.hidden_BxLxD).sum() + jnp.sin(out.head).sum()

        gradient = jax.jit(jax.grad(total))(batch["images"].astype(np.float32))
        return np.abs(vision.patchify(np.asarray(gradient), P)).max(axis=2)

    _, fns, params = make("mae", num_layers=1)
    rows = np.arange(B)[:, None]
    gradient_BxT = pixel_gradient(fns, params)
    assert np.all(gradient_BxT[rows, batch["masked_patches"]] == 0)
    assert np.all(gradient_BxT[rows, batch["visible_patches"]] > 0)
    _, fns, params = make("vit", Head("pooled", 5), num_layers=1)
    assert np.all(pixel_gradient(fns, params) > 0)


def test_order_of_visible_patches_does_not_matter():
    _, fns, params = make("mae")
    batch = make_batch()
    turned = {key: batch[key][:, ::-1] for key in ("visible_patches", "masked_patches")}
    out, other = (jax.jit(fns.apply)(params, b) for b in (batch, batch | turned))
    np.testing.assert_allclose(out.head, other.head, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kind", "head"), [("mae", None), ("vit", Head("projection", 8))])
def test_on_a_mesh_as_on_one_device(kind, head):
    """Loss, metrics and gradients of the whole task, one row of the batch without weight."""
    cfg, fns, params = make(kind, head, num_layers=1)
    loss_fn = TASKS[cfg.task.name].loss(fns.apply, cfg, None)
    batch = make_batch() | {"row_weights": np.array([1, 1, 0, 1, 1, 1, 1, 1], np.float32)}
    if kind == "vit":
        batch["images"] = np.stack([batch["images"], make_batch(1)["images"]], axis=1)

    def loss(params, batch):
        terms = loss_fn(params, batch, None)
        return terms.sum, terms

    run = jax.value_and_grad(loss, has_aux=True)
    (value, terms), grads = jax.jit(run)(params, batch)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    axes = param_paths.flatten(fns.logical_axes())
    with jax.set_mesh(mesh):
        where = {path: jax.NamedSharding(mesh, sharding.spec(axes[path])) for path in axes}
        placed = param_paths.unflatten({p: jax.device_put(x, where[p]) for p, x in param_paths.flatten(params).items()})
        rows = {key: jax.device_put(x, sharding.batch_sharding(mesh)) for key, x in batch.items()}
        (split_value, split_terms), split_grads = jax.jit(run)(placed, rows)
    assert value > 0.1
    assert any(not spec.is_fully_replicated for spec in where.values())
    np.testing.assert_allclose(split_value, value, rtol=1e-5)
    np.testing.assert_allclose(split_terms.weight, terms.weight)
    for path, grad in param_paths.flatten(grads).items():
        got = np.asarray(param_paths.flatten(split_grads)[path])
        np.testing.assert_allclose(got, grad, rtol=0, atol=1e-5 + 2e-5 * np.abs(grad).max(), err_msg=path)


# From one to the other ------------------------------------------------------------------------------------------------


def test_a_vit_takes_all_but_its_head_from_an_autoencoder():
    shapes = {}
    for kind, head in (("vit", Head("pooled", 5)), ("mae", None)):
        shapes[kind] = {path: leaf.shape for path, leaf in param_paths.flatten(make(kind, head)[2]).items()}
    kept = {path: shape for path, shape in shapes["vit"].items() if not path.startswith("head/")}
    assert kept == {p: s for p, s in shapes["mae"].items() if p.startswith(("embed/", "encoder/"))}
    assert len(kept) < len(shapes["vit"])


def test_invalid_vision_configs_are_refused():
    with pytest.raises(ConfigError, match=r"mae predicts pixels and has no pooled head; use vit"):
        vision.mae(make("mae")[0], Head("pooled", 3), jnp.float32)
    with pytest.raises(ConfigError, match=r"'model.decoder_dim' \(10\) must be a multiple of 'model.num_heads' \(4\)"):
        vision.decoder_config(ModelConfig(num_heads=4, decoder_dim=10))


def test_reconstruction_image_shows_only_what_the_model_sees():
    """Hidden patches are drawn by the statistics of the visible ones; whatever they hide, the picture is the same."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    masked = np.array([[0, 3], [1, 2]], np.int32)
    prediction = rng.standard_normal((2, 4, 48)).astype(np.float32)
    columns = show_reconstructions.panels(images, prediction, masked, 4)
    assert list(columns) == ["original", "seen", "model", "zero prediction"]

    squares = [(slice(r, r + 4), slice(c, c + 4)) for r in (0, 4) for c in (0, 4)]
    other = images.copy()
    for b in range(2):
        seen = [images[b][squares[t]].astype(np.float64) for t in range(4) if t not in masked[b]]
        mean, deviation = np.mean(seen), np.sqrt(np.mean([np.var(square) for square in seen]))
        for t, square in enumerate(squares):
            if t not in masked[b]:
                assert all(np.array_equal(column[b][square], images[b][square]) for column in columns.values())
                continue
            made = np.clip(mean + deviation * prediction[b, t].reshape(4, 4, 3), 0, 255)
            np.testing.assert_allclose(columns["model"][b][square], made, atol=0.51)
            np.testing.assert_allclose(columns["zero prediction"][b][square], mean, atol=0.51)
            assert np.all(columns["seen"][b][square] == 127)
            other[b][square] = rng.integers(0, 256, (4, 4, 3))
    again = show_reconstructions.panels(other, prediction, masked, 4)
    assert all(np.array_equal(again[name], columns[name]) for name in ("seen", "model", "zero prediction"))


def test_error_on_the_reconstruction_image_is_the_loss():
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    masked = np.array([[0, 3], [1, 2]], np.int32)
    patches = vision.patchify(images.astype(np.float64), 4)
    target = (patches - patches.mean(-1, keepdims=True)) / patches.std(-1, keepdims=True)
    error = functools.partial(show_reconstructions.loss, images_BxHxWxC=images, masked_BxM=masked, cfg=make("mae")[0])
    assert error(target.astype(np.float32)) == pytest.approx(0, abs=1e-5)
    assert error(np.zeros_like(target)) == pytest.approx(1, abs=1e-4)
    assert error((target / 2).astype(np.float32)) == pytest.approx(0.25, abs=1e-4)
