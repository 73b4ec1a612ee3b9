"""Files of images and every fault they have; their tasks and augmentations."""

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from PIL import Image

from lm.config import DataConfig
from lm.data import image_files, sources
from lm.data.records import DataError, Fault
from lm.schema import ConfigError

SHAPE = (8, 6, 3)
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


def config(path: Path, **options) -> DataConfig:
    return DataConfig(format="images", path=str(path), image_shape=SHAPE, eval_fraction=0.3, **options)


# Forms ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_tar_and_folder_give_the_pixels_and_the_folder_as_label(tmp_path, name):
    extra = {"train/readme.txt": b"x", "train/._0.png": b"x", "train/dog": b""}
    packed = write(tmp_path / "packed" / name, tarred(extra | named("train/")))
    for member, content in named("tree/").items():
        write(tmp_path / member, content)
    from_tar = read(packed)
    paths = sources.find_files(str(tmp_path / "tree"), image_files.SUFFIXES)
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
            r"found 6 x 8 pixels; expected data.image_shape, 8 x 6",
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
        sources.load(config(path))
    split = sources.load(config(path, on_bad_record="skip"))
    assert len(split.train) + len(split.valid) == 6


def test_a_tar_of_no_images_is_a_fault(tmp_path):
    (fault,) = read(write(tmp_path / "a.tar", tarred({"dog/a.txt": b"x"})))
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
        (idx(PICTURES[:, :6, :, 0]), labels, r"found 6 x 6 x 1 images; expected data.image_shape, \(8, 6, 1\)"),
    ]
    for number, (image_bytes, label_bytes, message) in enumerate(cases):
        path = write(tmp_path / str(number) / "t10k-images-idx3-ubyte", image_bytes)
        if label_bytes is not None:
            write(path.with_name("t10k-labels-idx1-ubyte"), label_bytes)
        with pytest.raises(DataError, match=message):
            read(path, (8, 6, 1))


def test_only_grey_and_rgb_can_be_asked_for(tmp_path):
    with pytest.raises(ConfigError, match=r"'data.image_shape' is \(8, 6, 4\); expected 1 channel \(grey\) or 3"):
        sources.load(DataConfig(format="images", path=str(tmp_path), image_shape=(8, 6, 4)))


# What is held out -----------------------------------------------------------------------------------------------------


def test_fingerprint_and_split_follow_the_pixels(tmp_path):
    path = write(tmp_path / "a.tar", tarred(named()))
    first = sources.load(config(path))
    other_place = sources.load(config(write(tmp_path / "elsewhere" / "b.tar", tarred(named("train/")))))
    assert other_place.fingerprint == first.fingerprint
    changed = PICTURES[0].copy()
    changed[3, 2, 1] ^= 1
    one_bit = sources.load(config(write(tmp_path / "c.tar", tarred(named() | {"dog/0.png": encoded(changed)}))))
    assert one_bit.fingerprint != first.fingerprint
    # The same pixels twice are never on both sides.
    twice = sources.load(config(write(tmp_path / "d.tar", tarred(named() | named("again/")))))
    held, kept = ({record["image"].tobytes() for record in part} for part in (twice.valid, twice.train))
    assert not held & kept
