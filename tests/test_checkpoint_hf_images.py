"""ViT and ViT-MAE: they compute here what they compute in transformers, and come out as they went in."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("safetensors", reason="needs the extra hf: pip install -e '.[hf]'")
torch = pytest.importorskip("torch", reason="needs the extra peer: pip install -e '.[peer]'")
transformers = pytest.importorskip("transformers", reason="needs the extra peer: pip install -e '.[peer]'")

from safetensors.numpy import load_file  # noqa: E402

from lm import losses, param_paths  # noqa: E402
from lm.checkpoint import CheckpointError, hf  # noqa: E402
from lm.checkpoint.hf import export, families  # noqa: E402
from lm.models import vision  # noqa: E402
from tests import tool_modules, toys  # noqa: E402

torch.set_num_threads(1)
tool = tool_modules.load("hf")
SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24)
SIZES |= dict(image_size=12, patch_size=4)
DECODER = dict(decoder_hidden_size=12, decoder_num_hidden_layers=3, decoder_num_attention_heads=2)
DECODER |= dict(decoder_intermediate_size=20, mask_ratio=0.6)
MEAN, DEVIATION = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "ViTModel": ("ViTModel", SIZES),
    "ViTForImageClassification": ("ViTForImageClassification", SIZES | dict(num_labels=5)),
    "ViTMAEForPreTraining": ("ViTMAEForPreTraining", SIZES | DECODER),
    "ViTMAEForPreTraining, normalised patches": (
        "ViTMAEForPreTraining",
        SIZES | DECODER | dict(norm_pix_loss=True, num_channels=1, hidden_act="gelu_new"),
    ),
    "ViTMAEModel": ("ViTMAEModel", SIZES | DECODER),
}
TRAINABLE = [name for name in CONFIGS if not name.endswith("Model")]


@functools.cache
def theirs(name: str) -> Any:
    """The model in transformers, with all parameters moved, the positions too, so that each one matters."""
    kind, values = CONFIGS[name]
    torch.manual_seed(0)
    model_class = getattr(transformers, kind)
    cfg = model_class.config_class(**values)
    model = model_class._from_config(cfg, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """name -> the folder of a tiny random model, with the preprocessor of ImageNet's means."""
    root = tmp_path_factory.mktemp("images")

    @functools.cache
    def saved(name: str) -> Path:
        model, channels = theirs(name), theirs(name).config.num_channels
        model.save_pretrained(root / name)
        size = {"height": 12, "width": 12}
        rows = dict(image_mean=MEAN[:channels], image_std=DEVIATION[:channels])
        transformers.ViTImageProcessorPil(size=size, **rows).save_pretrained(root / name)
        return root / name

    return saved


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    """As they are called in published files: transformers 5 calls the decoder's layers otherwise when it writes."""
    found = load_file(path / "model.safetensors")
    return {key.replace("decoder_encoder.layer.", "decoder_layers."): each for key, each in found.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_images_give_what_they_give_in_transformers(name, folder):
    """Hidden states of each layer, and logits, or reconstruction and loss with the same hidden patches."""
    pair = tool.load_both(folder(name))
    errors = tool.compare_images(pair, 3)
    assert len(errors) == 2 + (0 if name.endswith("Model") else 2 if "MAE" in name else 1)
    assert max(errors.values()) <= 1e-5, errors


def test_pixels_are_normalised_as_by_the_folders_preprocessor(folder):
    """Against transformers' own class for it, which verify does not use."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 12, 12, 3)).astype(np.uint8)
    for name in ("ViTModel", "ViTMAEForPreTraining"):
        processor = transformers.ViTImageProcessorPil.from_pretrained(folder(name))
        want = processor(list(pixels), return_tensors="np", do_resize=False)["pixel_values"]
        mine = vision.normalise(pixels, hf.open_model(folder(name)).model)
        np.testing.assert_allclose(mine.transpose(0, 3, 1, 2), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", TRAINABLE)
def test_gradients_are_those_of_transformers(name, folder, tmp_path):
    """Of one batch's loss; fixed positions have none. Exported, so that they have the names of transformers."""
    pair = tool.load_both(folder(name))
    model, shape = pair.model, pair.task["image_shape"]
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (4, *shape)).astype(np.uint8)
    values = torch.from_numpy(np.array(vision.normalise(pixels, model).transpose(0, 3, 1, 2)))
    batch, labels = {"images": pixels}, np.array([0, 4, 2, 2])
    if model.kind == "mae":
        noise = rng.random((4, 9), np.float32)
        order = noise.argsort(axis=1).astype(np.int32)
        batch |= {"visible_patches": order[:, :3], "masked_patches": order[:, 3:]}
    fns = hf.functions(model, pair.task, pair.head)

    def loss(params: Any) -> jax.Array:
        out = fns.apply(params, batch).head
        if model.kind == "vit":
            return -jnp.take_along_axis(jax.nn.log_softmax(out), labels[:, None], axis=1).mean()
        patches = vision.patchify(vision.normalise(pixels, model), 4)
        terms = losses.patch_mse(out, patches, batch["masked_patches"], jnp.ones(4), target=pair.task["target"])
        return terms.sum / terms.weight

    gradients = jax.jit(jax.grad(loss))(pair.params)
    there = theirs(name)
    there.zero_grad()
    more = {"noise": torch.from_numpy(noise)} if model.kind == "mae" else {"labels": torch.from_numpy(labels)}
    there(pixel_values=values, **more).loss.backward()
    export.export(tmp_path / "gradients", model, gradients, vocab_size=0, head=pair.head)
    mine = tensors_of(tmp_path / "gradients")
    plain = tensors_of_parameters(there, {key: each.grad for key, each in there.named_parameters()}, tmp_path)
    assert mine.keys() == plain.keys()
    for key, want in plain.items():
        largest = np.abs(want).max()
        if "pos" in key and model.kind == "mae":
            assert not mine[key].any()
        if key.endswith("key.bias"):  # which changes nothing but by rounding: softmax does not see it
            assert largest < 1e-7
            largest = 1e-3
        np.testing.assert_allclose(mine[key], want, rtol=0, atol=1e-4 * largest, err_msg=key)
    there.zero_grad()


def tensors_of_parameters(model: Any, values: dict[str, Any], tmp_path: Path) -> dict[str, np.ndarray]:
    """Values of the parameters of a model (None = 0), under the names that its files have."""
    import copy

    twin = copy.deepcopy(model)
    with torch.no_grad():
        for key, parameter in twin.named_parameters():
            parameter.copy_(torch.zeros_like(parameter) if values[key] is None else values[key])
    twin.save_pretrained(tmp_path / "there")
    return tensors_of(tmp_path / "there")


@pytest.mark.parametrize("name", TRAINABLE)
def test_export_writes_the_bytes_that_were_read(name, folder, tmp_path):
    """The tensors of transformers, byte for byte, which reads our folder and computes bit for bit the same."""
    pair = tool.load_both(folder(name))
    task = toys.task("masked_autoencoding", mask_rate=0.6, **pair.task) if pair.model.kind == "mae" else None
    task = task or toys.task("image_classification", **pair.task)
    about = families.images_back(task)
    if pair.head:
        about |= {"id2label": {number: f"class {number}" for number in range(5)}}
    export.export(tmp_path / "one", pair.model, pair.params, vocab_size=0, head=pair.head, about=about)
    first, there = tensors_of(tmp_path / "one"), tensors_of(folder(name))
    assert first.keys() == there.keys()
    for key in first:
        assert first[key].tobytes() == there[key].tobytes() and first[key].shape == there[key].shape, key
    again = tool.load_both(tmp_path / "one")
    named = {"pixel_mean": pair.model.pixel_mean, "pixel_deviation": pair.model.pixel_deviation}
    assert dataclasses.replace(again.model, **named) == pair.model and again.task == pair.task
    export.export(tmp_path / "two", again.model, again.params, vocab_size=0, head=again.head, about=about)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    given = {"pixel_values": torch.randn(2, pair.task["image_shape"][2], 12, 12)}
    given |= {"noise": torch.rand(2, 9)} if pair.model.kind == "mae" else {}
    with torch.no_grad():
        assert torch.equal(again.theirs(**given).logits, theirs(name)(**given).logits)


def test_verify_names_the_folder_that_computes_something_else(folder, capsys):
    pair = tool.load_both(folder("ViTForImageClassification"))
    tool.verify_images(pair)
    assert "equal: within" in capsys.readouterr().out
    moved = param_paths.map_with_path(lambda path, x: x * (1 + 1e-3 * (path == "embed/positions")), pair.params)
    with pytest.raises(CheckpointError, match="computes something else here than in transformers"):
        tool.verify_images(pair._replace(params=moved))
    assert "after layer 1" in capsys.readouterr().out
