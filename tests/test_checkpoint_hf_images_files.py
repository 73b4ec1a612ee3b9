"""Folders of ViT and ViT-MAE that this project wrote; runs that start from one, and what is refused."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("safetensors", reason="needs the extra hf: pip install -e '.[hf]'")

from safetensors.numpy import load_file

from lm import checks, losses, train
from lm import run as run_lib
from lm.checkpoint import CheckpointError, hf
from lm.checkpoint.hf import export, families
from lm.config import ModelConfig, check_model
from lm.config.schema import ConfigError
from lm.models import transformer, vision
from lm.tasks import build_config, default_config
from lm.types import Head
from tests import tool_modules, toys
from tests.test_checkpoint_hf_files import forget_the_last_step

SHAPE, REINIT = (8, 12, 3), (("head/.*", "reinit"), (".*", "keep"))
PIXELS = {"pixel_mean": (0.4, 0.5, 0.6), "pixel_deviation": (0.2, 0.3, 0.25)}
SIZES: dict[str, Any] = dict(num_layers=2, embed_dim=16, num_heads=4, mlp_dim=24, mlp="gelu_exact", norm_eps=1e-12)
SIZES |= PIXELS | dict(patch_size=4)
VIT = ModelConfig(kind="vit", pool="cls", **SIZES)
MAE = ModelConfig(
    kind="mae",
    position="fixed",
    decoder_layers=1,
    decoder_dim=8,
    decoder_heads=2,
    decoder_mlp_dim=20,
    **SIZES,
)
TARGET = {"target": "normalised_unbiased", "mask_rate": 0.5}


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> dict[str, Path]:
    """kind -> a folder; that of the ViT has a classifier of three labels."""
    root = tmp_path_factory.mktemp("images")
    for model in (VIT, MAE):
        cfg = transformer.resolve(model, vocab_size=1, seq_len=1)
        task = toys.task("masked_autoencoding" if cfg.kind == "mae" else "image_classification", image_shape=SHAPE)
        task = dataclasses.replace(task, **(TARGET if cfg.kind == "mae" else {}))
        head = Head("pooled", 3) if cfg.kind == "vit" else None
        fns = hf.functions(cfg, {"image_shape": SHAPE}, head)
        params = toys.random_like(jax.eval_shape(fns.init, jax.random.key(0)), scale=0.3)
        pixels = json.dumps(families.pixels_back(cfg, SHAPE)).encode()
        about = families.images_back(task) | ({"id2label": {0: "a", 1: "b", 2: "c"}} if head else {})
        others = {families.PREPROCESSOR: pixels}
        export.export(root / cfg.kind, cfg, params, vocab_size=0, head=head, about=about, others=others)
    rng = np.random.default_rng(0)
    for number in range(24):
        path = root / "data" / "abc"[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, SHAPE).astype(np.uint8)).save(path)
    return {name: root / name for name in ("vit", "mae", "data")}


@pytest.fixture
def copy(published, tmp_path) -> dict[str, Path]:
    return {kind: shutil.copytree(published[kind], tmp_path / f"{kind}-copy") for kind in ("vit", "mae")}


def recipe(published: dict[str, Path], start: Any, task: str, **entries: Any) -> Any:
    c = default_config(task)
    c.init_from = f"hf:{start}"
    c.data.format, c.data.path, c.data.eval_fraction = "images", str(published["data"]), 0.3
    c.data.packing, c.data.batch_size, c.train.total_steps, c.eval.at_start = "pad", 8, 1, False
    if task == "image_classification":
        c.task.labels = ("a", "b", "c")
    for key, value in entries.items():
        section, _, name = key.rpartition("__")
        setattr(c[section] if section else c, name, value)
    return build_config(c)


def change(folder: Path, name: str, **values: Any) -> Path:
    content = json.loads((folder / name).read_text()) | values
    (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return folder


def tensors_of(folder: Path) -> dict[str, bytes]:
    return {name: each.tobytes() for name, each in load_file(folder / "model.safetensors").items()}


@pytest.mark.parametrize(("kind", "task"), [("vit", "image_classification"), ("mae", "masked_autoencoding")])
def test_import_then_export_gives_the_same_files(kind, task, published, tmp_path, capsys):
    tool_modules.call("hf", "import", published[kind], tmp_path / "run", f"--task={task}", "--pool=cls")
    tool_modules.call("hf", "export", tmp_path / "run", tmp_path / "out")
    assert tensors_of(published[kind]) == tensors_of(tmp_path / "out")
    mine, there = (json.loads((each / "config.json").read_text()) for each in (tmp_path / "out", published[kind]))
    there.setdefault("label2id", {"a": 0, "b": 1, "c": 2} if kind == "vit" else None)
    if kind == "mae":  # which the run chooses: that of the task
        assert (mine.pop("mask_ratio"), there.pop("mask_ratio"), there.pop("label2id")) == (0.75, 0.5, None)
    assert mine == there and mine["image_size"] == [8, 12]
    files = [(each / families.PREPROCESSOR).read_text() for each in (tmp_path / "out", published[kind])]
    assert json.loads(files[0]) == json.loads(files[1])
    said = capsys.readouterr().out
    assert "image_shape=(8, 12, 3)" in said and "pixel_mean=(0.4, 0.5, 0.6)" in said


@pytest.mark.parametrize("start", ["vit", "mae"])
def test_a_classifier_takes_shape_and_pixels_and_resumes_without_the_folder(start, copy, published, tmp_path):
    """From a ViT with its head, or from the encoder of a ViT-MAE, whose positions learn from then on."""
    rules = REINIT if start == "mae" else ((".*", "keep"),)
    chosen = {"model__kind": "vit", "model__pool": "cls", "init_rules": rules, "checkpoint__every_steps": 1}
    chosen |= {"train__total_steps": 2, "checkpoint__keep_latest": 3}
    cfg = recipe(published, copy[start], "image_classification", **chosen)
    planned = run_lib.plan(cfg, None)
    assert planned.cfg.task.image_shape == SHAPE and planned.cfg.model.pixel_mean == PIXELS["pixel_mean"]
    assert planned.cfg.model.kind == "vit" and planned.cfg.model.position == "learned"
    initialised = [path for path, origin in planned.origin_of.items() if origin is None]
    assert initialised == ([] if start == "vit" else ["head/classifier/bias", "head/classifier/kernel"])
    train.train(cfg, tmp_path / "run")
    shutil.rmtree(copy[start])
    forget_the_last_step(tmp_path / "run", last=2, kept=1)
    train.train(cfg, tmp_path / "run")
    trained, (there, _, params, _) = run_lib.load_checkpoint(str(tmp_path / "run"))
    assert trained.step == 2 and there.task.image_shape == SHAPE
    before = load_file(published[start] / "model.safetensors")["vit.embeddings.position_embeddings"][0]
    assert not np.array_equal(np.asarray(params["embed"]["positions"]), before)


def test_pre_training_goes_on_from_a_vit_mae_and_keeps_its_positions(published, tmp_path):
    cfg = recipe(published, published["mae"], "masked_autoencoding", task__mask_rate=0.5, optim__learning_rate=0.1)
    train.train(cfg, tmp_path / "run")
    _, (there, _, params, _) = run_lib.load_checkpoint(str(tmp_path / "run"))
    assert there.task.target == "normalised_unbiased" and there.model.decoder_heads == 2
    before = load_file(published["mae"] / "model.safetensors")
    np.testing.assert_array_equal(params["embed"]["positions"], before["vit.embeddings.position_embeddings"][0])
    np.testing.assert_array_equal(params["decoder_positions"], before["decoder.decoder_pos_embed"][0])
    assert not np.array_equal(params["mask_token"], before["decoder.mask_token"][0, 0])


def test_fixed_positions_must_not_decay(published):
    with pytest.raises(ConfigError, match=r"'optim.decay_rules' let 'embed/positions' decay"):
        run_lib.plan(
            recipe(published, published["mae"], "masked_autoencoding", optim__decay_rules=((".*", True),)), None
        )


@pytest.mark.parametrize(
    ("start", "task", "entries", "message"),
    [
        ("vit", "image_classification", {"task__image_shape": (16, 16, 3)}, r"task.image_shape: \(16, 16, 3\) here"),
        (
            "vit",
            "image_classification",
            {"model__position": "sincos"},
            "model.position: 'sincos' here, 'learned' there",
        ),
        ("vit", "image_classification", {"model__pixel_mean": (0.1,) * 3}, r"model.pixel_mean: \(0.1, 0.1, 0.1\) here"),
        ("vit", "image_classification", {"model__pool": "first"}, "no parameter 'head/pooler/"),
        ("mae", "image_classification", {}, "'model.kind' is mae, which does not fit .*; use vit"),
        ("mae", "masked_autoencoding", {"task__target": "pixels"}, "task.target: 'pixels' here, 'normalised_unbiased'"),
        (
            "mae",
            "masked_autoencoding",
            {"model__decoder_heads": 4, "model__kind": "mae"},
            "model.decoder_heads: 4 here",
        ),
    ],
)
def test_keys_that_contradict_the_folder_are_named(start, task, entries, message, published):
    if "model__pixel_mean" in entries:
        entries |= {"model__pixel_deviation": (0.2,) * 3, "model__kind": "vit"}
    if "model__position" in entries:
        entries |= {"model__kind": "vit"}
    with pytest.raises(ConfigError, match=message):
        run_lib.plan(recipe(published, published[start], task, **entries), None)


@pytest.mark.parametrize(
    ("kind", "name", "values", "message"),
    [
        (
            "vit",
            "config.json",
            {"image_size": [12, 12]},
            r"position_embeddings.* has shape \[1, 7, 16\].*\[1, 10, 16\]",
        ),
        ("vit", "config.json", {"image_size": 10}, "image_size is 10, .*expected multiples of patch_size"),
        ("vit", "config.json", {"image_size": "224"}, "image_size is '224'"),
        ("vit", "config.json", {"num_channels": 4}, "num_channels 4"),
        ("vit", "config.json", {"num_channels": 1}, "num_channels is 1, but pixels are normalised by 3 values"),
        ("vit", "config.json", {"patch_size": 2}, "has shape"),
        ("vit", "config.json", {"patch_size": 0}, "patch_size is 0; expected at least 1"),
        ("vit", "config.json", {"qkv_bias": False}, "qkv_bias is False; of this family True is supported"),
        ("vit", "config.json", {"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu'"),
        ("vit", "config.json", {"pooler_output_size": 8}, "pooler_output_size is 8"),
        ("mae", "config.json", {"decoder_num_attention_heads": 3}, r"decoder_hidden_size \(8\) is no multiple of"),
        ("mae", "config.json", {"decoder_num_hidden_layers": 0}, "expected each to be at least 1"),
        ("mae", "config.json", {"decoder_num_hidden_layers": 2}, "no tensor 'decoder.decoder_layers.1."),
        (
            "vit",
            families.PREPROCESSOR,
            {"rescale_factor": 1.0},
            "rescale_factor 1.0; supported are pixels divided by 255",
        ),
        ("vit", families.PREPROCESSOR, {"do_rescale": False}, "do_rescale is False"),
        ("vit", families.PREPROCESSOR, {"image_std": [0.5, 0.0, 0.5]}, "above 0 in image_std"),
        ("vit", families.PREPROCESSOR, {"image_mean": [0.5, 0.5]}, "expected a number for each channel"),
        ("vit", families.PREPROCESSOR, {"image_mean": "half"}, "expected a number for each channel"),
    ],
)
def test_a_folder_that_computes_something_else_is_refused(kind, name, values, message, copy):
    with pytest.raises(CheckpointError, match=message):
        hf.open_model(change(copy[kind], name, **values))


def test_pixels_are_those_of_the_config_where_the_folder_says_nothing(copy):
    (copy["vit"] / families.PREPROCESSOR).unlink()
    opened = hf.open_model(copy["vit"], dataclasses.replace(ModelConfig(kind="vit"), **PIXELS))
    assert opened.model.pixel_mean == PIXELS["pixel_mean"] and "no preprocessor_config.json" in opened.report()
    change(copy["mae"], families.PREPROCESSOR, do_normalize=False)
    model = hf.open_model(copy["mae"]).model
    assert (model.pixel_mean, model.pixel_deviation) == ((0.0,), (1.0,))


def test_each_device_reads_its_own_slices_of_a_convolution(published):
    opened = hf.open_model(published["vit"])
    want = load_file(published["vit"] / "model.safetensors")["vit.embeddings.patch_embeddings.projection.weight"]
    kernel = vision.patchify(want.transpose(0, 2, 3, 1), 4)[:, 0].T  # [patch * patch * channels, out]
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]).reshape(2), ("x",))
    for spec in (jax.P(None, "x"), jax.P("x", None)):
        where = jax.sharding.NamedSharding(mesh, spec)
        leaf = jax.ShapeDtypeStruct(kernel.shape, jnp.float32, sharding=where)
        read = hf.load(opened, {"params": {"embed": {"patches": {"kernel": leaf}}}})
        np.testing.assert_array_equal(read["params"]["embed"]["patches"]["kernel"], kernel)


def test_an_own_autoencoder_with_computed_positions_is_exported_with_tables(published, tmp_path):
    entries = {"model__kind": "mae", "model__position": "sincos", "model__patch_size": 4, "model__embed_dim": 16}
    entries |= {"model__num_layers": 1, "model__num_heads": 2, "task__image_shape": SHAPE, "task__target": "pixels"}
    cfg = recipe(published, "", "masked_autoencoding", init_from="", task__mask_rate=0.5, **entries)
    train.train(cfg, tmp_path / "run")
    tool_modules.call("hf", "export", tmp_path / "run", tmp_path / "out")
    _, (_, fns, params, _) = run_lib.load_checkpoint(str(tmp_path / "run"))
    opened = hf.open_model(tmp_path / "out")
    assert opened.model.position == "fixed" and opened.task == {"image_shape": SHAPE, "target": "pixels"}
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    same = hf.functions(opened.model, opened.task)
    shapes = jax.eval_shape(same.init, jax.random.key(0))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)
    batch = {"images": np.random.default_rng(0).integers(0, 256, (2, *SHAPE)).astype(np.uint8)}
    batch |= {"visible_patches": np.array([[0, 3], [5, 1]]), "masked_patches": np.array([[1, 2, 4, 5], [0, 2, 3, 4]])}
    mine = same.apply(hf.load(opened, {"params": abstract})["params"], batch).head
    np.testing.assert_allclose(mine, fns.apply(params, batch).head, rtol=0, atol=1e-5)


def test_a_target_that_the_files_cannot_say_is_not_exported():
    with pytest.raises(ConfigError, match=r"task\.target is normalised, by the biased variance"):
        families.images_back(toys.task("masked_autoencoding", image_shape=SHAPE))


def test_the_head_of_a_vit_needs_pool_cls():
    with pytest.raises(ConfigError, match="no place for this task's head"):
        families.with_head(families.FAMILIES["vit"], Head("pooled", 3), dataclasses.replace(VIT, pool="mean"))


def test_tables_begin_as_the_positions_that_are_computed_and_fixed_ones_have_no_gradient():
    cfg = transformer.resolve(dataclasses.replace(MAE, **PIXELS), vocab_size=1, seq_len=1)
    fns = hf.functions(cfg, {"image_shape": SHAPE})
    params = fns.init(jax.random.key(0))
    np.testing.assert_array_equal(params["embed"]["positions"][1:], vision.positions(2, 3, 16))
    np.testing.assert_array_equal(params["decoder_positions"][1:], vision.positions(2, 3, 8))
    assert not np.any(params["embed"]["positions"][0])


def test_the_unbiased_target_is_by_torchs_variance_and_pixels_are_as_they_are():
    rng = np.random.default_rng(0)
    patches, prediction = rng.standard_normal((2, 3, 4)), rng.standard_normal((2, 3, 4))
    masked, ones = np.array([[0], [2]], np.int32), jnp.ones(2)
    for target, divisor in (("normalised_unbiased", 3), ("normalised", 4), ("pixels", 0)):
        want = 0.0
        for row in range(2):
            patch = patches[row, masked[row, 0]]
            if divisor:
                patch = patch - patch.mean()
                patch = patch / np.sqrt((patch**2).sum() / divisor + 1e-6)
            want += ((prediction[row, masked[row, 0]] - patch) ** 2).mean()
        arrays = (jnp.asarray(each, jnp.float32) for each in (prediction, patches))
        terms = losses.patch_mse(*arrays, jnp.asarray(masked), ones, target=target)
        assert float(terms.sum) == pytest.approx(want, rel=1e-5)


def test_invalid_pixels_are_refused():
    for mean, deviation in (((0.5, 0.5), (0.5,)), ((0.5,), (0.0,)), ((), ())):
        with pytest.raises(ConfigError, match=r"'model\.pixel_mean' is"):
            check_model(ModelConfig(kind="vit", pixel_mean=mean, pixel_deviation=deviation))
    with pytest.raises(ConfigError, match=r"are for images; 'model\.kind' decoder reads text"):
        check_model(ModelConfig(**PIXELS))
    cfg = default_config("image_classification")
    cfg.model.kind, cfg.task.labels = "vit", ("a", "b")
    cfg.model.pixel_mean = cfg.model.pixel_deviation = (0.5, 0.5)
    cfg.data.format, cfg.data.path, cfg.data.packing, cfg.train.total_steps = "images", "x", "pad", 1
    with pytest.raises(ConfigError, match=r"'model.pixel_mean' has 2 values, but 'task.image_shape' .* has 3 channels"):
        checks.fit(build_config(cfg))
