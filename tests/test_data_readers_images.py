"""Files of images and every fault they have; their tasks and augmentations."""

import gzip
import io
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from PIL import Image, ImageEnhance

from lm import checks, input_pipeline
from lm.config import Config, DataConfig
from lm.config.schema import ConfigError
from lm.data import augment, loader
from lm.data.readers import images as image_files
from lm.data.readers import paths as files
from lm.data.readers import registry
from lm.data.record import DataError, Fault, NotRead, Wanted
from lm.tasks import TASKS, build_config, default_config, images, task_of
from tests import toys

SHAPE = (8, 6, 3)
WANTED = Wanted(image_shape=SHAPE)
RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (6, *SHAPE)).astype(np.uint8)


def encoded(pixels: np.ndarray, kind: str = "PNG", mode: str | None = None) -> bytes:
    buffer = io.BytesIO()
    picture = Image.fromarray(pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)
    (picture.convert(mode) if mode else picture).save(buffer, kind)
    return buffer.getvalue()


def named(folder: str = "") -> dict[str, bytes]:
    return {f"{folder}{'cat' if n % 2 else 'dog'}/{n}.png": encoded(x) for n, x in enumerate(PICTURES)}


def tarred(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def idx(array: np.ndarray) -> bytes:
    header = np.array([0x800 + array.ndim, *array.shape], ">u4")
    return header.tobytes() + array.astype(np.uint8).tobytes()


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def read(path: Path, shape: tuple[int, int, int] = SHAPE) -> list:
    return list(image_files.read_images(epath.Path(path), shape))


def data_config(path: Path, **options) -> DataConfig:
    return DataConfig(format="images", path=str(path), eval_fraction=0.3, **options)


# Forms ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_tar_and_folder_give_the_pixels_and_the_folder_as_label(tmp_path, name):
    extra = {"train/readme.txt": b"x", "train/._0.png": b"x", "train/dog": b""}
    packed = write(tmp_path / "packed" / name, tarred(extra | named("train/")))
    for member, content in named("tree/").items():
        write(tmp_path / member, content)
    from_tar = read(packed)
    other = [found.name for found in from_tar if isinstance(found, NotRead)]
    assert other == ["train/readme.txt", "train/._0.png", "train/dog"]
    from_tar = [found for found in from_tar if not isinstance(found, NotRead)]
    paths = files.find_files(str(tmp_path / "tree"), image_files.SUFFIXES)
    from_folder = [record for path in paths for record in read(path)]
    assert [r["source"] for r in from_tar] == [f"{packed}:{member}" for member in named("train/")]
    assert {r["source"] for r in from_folder} == {str(tmp_path / member) for member in named("tree/")}
    for found in (from_tar, from_folder):
        by_number = sorted(found, key=lambda record: Path(record["source"]).stem)
        assert [r["label"] for r in by_number] == ["dog", "cat"] * 3
        np.testing.assert_array_equal([r["image"] for r in by_number], PICTURES)
        assert all(r["image"].dtype == np.uint8 for r in by_number)


@pytest.mark.parametrize(
    ("kind", "mode", "channels"),
    [("PNG", "P", 3), ("PNG", "RGBA", 3), ("JPEG", "L", 3), ("PNG", "1", 1), ("PNG", "L", 1)],
)
def test_other_modes_are_converted(tmp_path, kind, mode, channels):
    shape = (*SHAPE[:2], channels)
    path = write(tmp_path / "dog" / "a.png", encoded(PICTURES[0], kind, mode))
    (record,) = read(path, shape)
    expected = np.asarray(Image.open(path).convert("L" if channels == 1 else "RGB")).reshape(shape)
    assert mode != "RGBA" or np.asarray(Image.open(path))[..., 3].min() == 255  # opaque
    np.testing.assert_array_equal(record["image"], expected)
    assert record["label"] == "dog"


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_pair(tmp_path, suffix):
    images, labels = PICTURES[..., 0], np.array([3, 1, 4, 1, 5, 9])
    path = write(tmp_path / f"t10k-images-idx3-ubyte{suffix}", idx(images))
    write(tmp_path / f"t10k-labels-idx1-ubyte{suffix}", idx(labels))
    found = read(path, (8, 6, 1))
    np.testing.assert_array_equal([r["image"] for r in found], images[..., None])
    assert [r["label"] for r in found] == list("314159")
    assert [r["source"] for r in found] == [f"{path}:{n}" for n in range(6)]


def test_real_data(shared_data):
    cifar = shared_data("cifar10") / "cifar10_jpg_test_100perclass.tar"
    found = read(cifar, (32, 32, 3))
    assert len(found) == 1000
    assert {record["label"] for record in found} >= {"airplane", "truck"}
    digits = read(shared_data("mnist") / "t10k-images-idx3-ubyte.gz", (28, 28, 1))
    assert len(digits) == 10_000
    assert [record["label"] for record in digits[:5]] == ["7", "2", "1", "0", "4"]


# Faults ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (
            encoded(PICTURES[0].transpose(1, 0, 2)),
            "wrong size",
            r"found 6 x 8 pixels; expected task.image_shape, 8 x 6",
        ),
        (encoded(PICTURES[0])[:60], "damaged image", r"expected a JPEG or PNG image"),
        (encoded(PICTURES[0], "JPEG")[:-30], "damaged image", r"truncated"),
        (b"not an image", "damaged image", r"cannot identify"),
        (b"", "damaged image", r"cannot identify"),
        (encoded(PICTURES[0, :, :, 0].astype(np.uint16)), "wrong depth", r"mode I;16; expected 8 bits"),
    ],
    ids=["turned", "cut", "cut-jpeg", "text", "nothing", "16-bit"],
)
def test_a_bad_image_is_a_fault_of_its_own(tmp_path, content, kind, message):
    path = write(tmp_path / "a.tar", tarred({"dog/bad.png": content} | named()))
    fault, *others = read(path)
    assert isinstance(fault, Fault)
    assert (fault.kind, fault.where) == (kind, f"{path}:dog/bad.png")
    assert len(others) == 6 and not any(isinstance(other, Fault) for other in others)
    with pytest.raises(DataError, match=rf"a.tar:dog/bad.png: {kind}: .*{message}"):
        registry.load(data_config(path), WANTED)
    split = registry.load(data_config(path, max_bad_records=100), WANTED)
    assert len(split.train) + len(split.valid) == 6


def test_a_tar_of_no_images_is_a_fault(tmp_path):
    not_read, fault = read(write(tmp_path / "a.tar", tarred({"dog/a.txt": b"x"})))
    assert not_read.name == "dog/a.txt"
    assert fault.kind == "empty file"


def test_a_damaged_tar_is_refused_wherever_it_is_damaged(tmp_path):
    whole = tarred(named())
    ends = np.cumsum([512 + -(-len(content) // 512) * 512 for content in named().values()])
    headless = bytearray(whole)
    headless[ends[2] + 100] ^= 1  # in a header: its checksum is wrong
    cut = [whole[:n] for n in (0, 100, 600, *(int(end) for end in ends))]
    for damaged in (*cut, bytes(headless), whole[: ends[-1]] + b"x" * 1024):
        path = write(tmp_path / "a.tar", damaged)
        with pytest.raises(DataError, match=r"a\.tar: damaged"):
            read(path)


def test_a_damaged_mnist_pair_is_refused(tmp_path):
    images, labels = idx(PICTURES[..., 0]), idx(np.arange(6))
    cases = [
        (images, None, r"t10k-labels-idx1-ubyte: no such file; expected the labels of .*t10k-images"),
        (images, idx(np.arange(5)), r"labels-idx1-ubyte: found 5 labels; expected one for each of 6 images"),
        (images[:-1], labels, r"images-idx3-ubyte: found 287 values; expected 6 x 8 x 6"),
        (labels, labels, r"images-idx3-ubyte: found no IDX header of 3 dimensions"),
        (images, b"", r"labels-idx1-ubyte: found no IDX header of 1 dimensions"),
        (idx(PICTURES[:, :6, :, 0]), labels, r"found 6 x 6 x 1 images; expected task.image_shape, \(8, 6, 1\)"),
    ]
    for number, (image_bytes, label_bytes, message) in enumerate(cases):
        path = write(tmp_path / str(number) / "t10k-images-idx3-ubyte", image_bytes)
        if label_bytes is not None:
            write(path.with_name("t10k-labels-idx1-ubyte"), label_bytes)
        with pytest.raises(DataError, match=message):
            read(path, (8, 6, 1))


@pytest.mark.parametrize("name", ["image_classification", "masked_autoencoding", "contrastive_images"])
@pytest.mark.parametrize("shape", [(8, 6, 4), (0, 6, 3)])
def test_only_grey_and_rgb_can_be_asked_for(name, shape):
    options = {"labels": ("cat", "dog")} if name == "image_classification" else {}
    cfg = Config(task=toys.task(name, image_shape=shape, **options))
    with pytest.raises(ConfigError, match=rf"'task.image_shape' is {re.escape(str(shape))}; expected .*1 channel"):
        TASKS[name].check(cfg)


# What is held out -----------------------------------------------------------------------------------------------------


def test_fingerprint_and_split_follow_the_pixels(tmp_path):
    path = write(tmp_path / "a.tar", tarred(named()))
    first = registry.load(data_config(path), WANTED)
    other_place = registry.load(data_config(write(tmp_path / "elsewhere" / "b.tar", tarred(named("train/")))), WANTED)
    assert other_place.fingerprint == first.fingerprint
    changed = PICTURES[0].copy()
    changed[3, 2, 1] ^= 1
    one_bit = registry.load(
        data_config(write(tmp_path / "c.tar", tarred(named() | {"dog/0.png": encoded(changed)}))), WANTED
    )
    assert one_bit.fingerprint != first.fingerprint
    # The same pixels twice are never on both sides.
    twice = registry.load(data_config(write(tmp_path / "d.tar", tarred(named() | named("again/")))), WANTED)
    held, kept = ({record["image"].tobytes() for record in part} for part in (twice.valid, twice.train))
    assert not held & kept


# Tasks ----------------------------------------------------------------------------------------------------------------


def recipe(path: Path, **changes) -> Config:
    name, kind = changes.pop("entries", ("image_classification", "vit"))
    c = default_config(name)
    c.task.image_shape = SHAPE
    if "labels" in c.task:
        c.task.labels = ("cat", "dog")
    c.data.format, c.data.path, c.data.eval_fraction, c.data.packing = "images", str(path), 0.3, "pad"
    c.model.kind, c.model.patch_size, c.model.position, c.train.total_steps = kind, 2, "sincos", 1
    for key, value in changes.items():
        section, name = key.split("__")
        c[section][name] = value
    return build_config(c)


MASKED = ("masked_autoencoding", "mae")
PAIRS = ("contrastive_images", "vit")


@pytest.fixture
def packed(tmp_path) -> Path:
    return write(tmp_path / "a.tar", tarred(named()))


def batches(cfg: Config) -> list[dict]:
    """The first training batch and the evaluation's, and the pixels that each row is of."""
    split = registry.load(cfg.data, task_of(cfg).wanted(cfg))
    data = input_pipeline.build(cfg, None, split)
    train = next(loader.train_batches(data, batch_size=5, start_example=0, local_rows=np.arange(5), seed=0))
    rows = loader.train_row_ids(len(data.train), 0, 0, 5)
    valid = next(
        loader.eval_batches(data.valid, batch_size=5, local_rows=np.arange(5), max_tokens=0, seq_len=cfg.data.seq_len)
    )
    own = [[split.train[i] for i in rows], split.valid]
    return [batch | {"records": records} for batch, records in zip((train, valid), own, strict=True)]


def test_labelled_images(packed):
    train, valid = batches(recipe(packed, data__augment=(("flip", 1.0),)))
    for batch, turned in ((train, True), (valid, False)):
        assert (batch["images"].dtype, batch["labels"].dtype) == (np.uint8, np.int32)
        for row, record in enumerate(batch["records"]):
            pixels = record["image"][:, ::-1] if turned else record["image"]
            np.testing.assert_array_equal(batch["images"][row], pixels)
            assert ("cat", "dog")[batch["labels"][row]] == record["label"]
    np.testing.assert_array_equal(valid["row_weights"], np.arange(5) < len(valid["records"]))
    with pytest.raises(DataError, match=r"a.tar:dog/.*png: unknown label 'dog'; task.labels has cat, cow"):
        batches(recipe(packed, task__labels=("cat", "cow")))


def test_masked_images_have_each_patch_once(packed):
    train, valid = batches(recipe(packed, entries=MASKED))
    for batch in (train, valid):
        assert (batch["visible_patches"].shape, batch["masked_patches"].shape) == ((5, 3), (5, 9))
        both = np.concatenate([batch["visible_patches"], batch["masked_patches"]], axis=1)
        for row, record in enumerate(batch["records"]):
            assert sorted(both[row]) == list(range(12))
            np.testing.assert_array_equal(batch["images"][row], record["image"])
    assert len({tuple(sorted(row)) for row in train["visible_patches"]}) > 2
    again = batches(recipe(packed, entries=MASKED))
    np.testing.assert_array_equal(again[1]["masked_patches"], valid["masked_patches"])


def test_every_patch_is_hidden_equally_often(packed):
    cfg = recipe(packed, entries=MASKED)
    rng = np.random.default_rng(0)
    rows = [images.hide_patches({}, rng, None, cfg)["masked_patches"] for _ in range(2000)]
    share = np.bincount(np.concatenate(rows), minlength=12) / 2000
    np.testing.assert_allclose(share, 0.75, atol=0.05)  # 5 deviations


def test_pairs_of_views_are_augmented_once_each_also_in_evaluation(packed):
    for batch in batches(recipe(packed, entries=PAIRS, data__augment=(("flip", 1.0),))):
        for row, record in enumerate(batch["records"]):
            np.testing.assert_array_equal(batch["images"][row], [record["image"][:, ::-1]] * 2)
    drawn = [("crop", 0.5), ("color", 0.5)]
    first, again = (batches(recipe(packed, entries=PAIRS, data__augment=tuple(drawn))) for _ in range(2))
    for batch, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(batch["images"], other["images"])
        for row in range(len(batch["records"])):
            assert not np.array_equal(batch["images"][row, 0], batch["images"][row, 1])


def test_a_config_that_does_not_fit_is_refused(packed):
    with pytest.raises(
        ConfigError, match=r"'data.augment': no 'corp' \(did you mean 'crop'\?\); there are .*color, crop"
    ):
        checks.fit(recipe(packed, data__augment=(("corp", 0.5),)))
    with pytest.raises(ConfigError, match=r"'data.augment': swap does not fit 'task.name' image_classification"):
        checks.fit(recipe(packed, data__augment=(("swap", 0.5),)))
    with pytest.raises(ConfigError, match=r"'data.augment': the strength of crop must be in \(0, 1\], got 1.5"):
        checks.fit(recipe(packed, data__augment=(("flip", 1.0), ("crop", 1.5))))
    for rate in (0.03, 0.97):
        with pytest.raises(ConfigError, match=rf"'task.mask_rate' \({rate}\) hides .* of the 12 patches"):
            checks.fit(recipe(packed, entries=MASKED, task__mask_rate=rate))
    with pytest.raises(
        ConfigError, match=r"'task.image_shape' \(8, 6, 3\) must be multiples of 'model.patch_size' \(4\)"
    ):
        checks.fit(recipe(packed, model__patch_size=4))
    with pytest.raises(ConfigError, match=r"'model.position' is rope, but 'model.kind' vit needs sincos"):
        recipe(packed, model__position="rope")
    with pytest.raises(ConfigError, match=r"'model.position' is sincos, but 'model.kind' encoder needs another"):
        recipe(packed, entries=("image_classification", "encoder"))


# Augmentations --------------------------------------------------------------------------------------------------------


def augmented(name: str, pixels: np.ndarray, strength: float, seed: int = 0) -> np.ndarray:
    before = pixels.copy()
    row = {"images": pixels, "labels": np.int32(3)}
    out = augment.AUGMENTATIONS[name].change(row, np.random.default_rng(seed), strength, None, Config())
    np.testing.assert_array_equal(pixels, before)
    assert out["labels"] == 3
    assert (out["images"].shape, out["images"].dtype) == (pixels.shape, np.uint8)
    return out["images"]


@pytest.mark.parametrize("name", ("crop", "flip", "color"))
@pytest.mark.parametrize("channels", [1, 3])
def test_strength_0_changes_nothing(name, channels):
    for seed in range(5):
        np.testing.assert_array_equal(
            augmented(name, PICTURES[0][..., :channels], 0.0, seed), PICTURES[0][..., :channels]
        )


def test_crop_is_a_rectangle_of_the_right_area_and_aspect():
    """Of an image whose channels are its coordinates, the crop's place and size can be read off."""
    y, x = np.mgrid[:64, :64]
    pixels = np.stack([4 * x, 4 * y, np.full_like(x, 77)], axis=-1).astype(np.uint8)
    sizes = []
    for seed in range(300):
        out = augmented("crop", pixels, 0.8, seed)
        assert np.all(out[..., 2] == 77)
        inner = np.arange(8, 56)  # bilinear is exact on a ramp but for the edges
        slopes = []
        for channel, line in ((0, out[32, inner, 0]), (1, out[inner, 32, 1])):
            slope, offset = np.polyfit(inner + 0.5, line / 4 + 0.5, 1)
            assert offset > -0.3 and offset + 64 * slope < 64.3, "inside the image"
            np.testing.assert_allclose(np.ptp(out[..., channel].astype(int), axis=channel), 0, atol=1)
            slopes.append(slope)
        sizes.append(slopes)
    width, height = np.array(sizes).T
    area, aspect = width * height, width / height
    assert 0.19 < area.min() < 0.24 and 0.96 < area.max() < 1.01
    assert abs(area.mean() - 0.6) < 0.05
    assert 0.74 < aspect.min() < 0.8 and 1.25 < aspect.max() < 1.35


def test_flip_mirrors_columns_with_the_given_probability():
    turned = [np.array_equal(augmented("flip", PICTURES[0], 0.3, seed), PICTURES[0][:, ::-1]) for seed in range(1000)]
    kept = [np.array_equal(augmented("flip", PICTURES[0], 0.3, seed), PICTURES[0]) for seed in range(1000)]
    assert all(a != b for a, b in zip(turned, kept, strict=True))
    assert abs(np.mean(turned) - 0.3) < 0.07


def test_color_equals_pillow():
    for seed in range(20):
        brightness, contrast, saturation = np.random.default_rng(seed).uniform(0.4, 1.6, 3)
        picture = ImageEnhance.Brightness(Image.fromarray(PICTURES[1])).enhance(brightness)
        picture = ImageEnhance.Contrast(picture).enhance(contrast)
        expected = np.asarray(ImageEnhance.Color(picture).enhance(saturation)).astype(int)
        got = augmented("color", PICTURES[1], 0.6, seed).astype(int)
        assert np.abs(got - expected).max() <= 4  # it rounds after each of the three, and the mean as well
    grey = np.repeat(PICTURES[0][..., :1], 3, axis=2)
    out = augmented("color", grey, 0.6).astype(int)
    assert np.abs(out - out[..., :1]).max() <= 1
    assert not np.array_equal(out, grey)
