"""What an image becomes: its orientation, transparency, depth and frames; images in tables and published sets."""

import dataclasses
import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from lm.config import DataConfig
from lm.data.readers import images, registry
from lm.data.record import DataError
from tests import small_sets
from tests.test_data_readers_images import PICTURES, SHAPE, WANTED, encoded, named, read, tarred, write


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_its_exif_orientation_says(tmp_path, kind, orientation):
    upright = np.zeros(SHAPE, np.uint8)
    upright[:2, :2] = 255  # one corner, so that every turn and mirror image is another one
    upright[0, 0] = upright[1, 0] = (255, 0, 0)
    # What a camera stores, for a viewer to undo (EXIF 2.3, tag 274): rows and columns that run otherwise.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    picture, exif = Image.fromarray(np.ascontiguousarray(stored)), Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    picture.save(buffer := io.BytesIO(), kind, exif=exif, **options)
    (record,) = read(write(tmp_path / f"a.{kind.lower()}", buffer.getvalue()))
    np.testing.assert_allclose(record["image"].astype(int), upright, atol=40 if kind == "JPEG" else 0)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA", "L+tRNS", "RGB+tRNS"])
def test_transparency_is_blended_with_white(tmp_path, mode):
    colour = np.array([200, 40, 0], np.uint8)
    alpha = np.zeros(SHAPE[:2], np.uint8)
    alpha[:, :2], alpha[:, 2:4] = 255, 100
    picture = Image.fromarray(np.broadcast_to(colour, SHAPE).copy())
    options = {}
    if mode.endswith("tRNS"):  # one colour stands for what is transparent
        alpha[:, 2:4] = 255
        picture = picture.convert(mode[0] if mode[0] == "L" else "RGB")
        picture.paste((10, 20, 30) if mode[0] == "R" else 7, (4, 0, 6, 8))
        options["transparency"] = (10, 20, 30) if mode[0] == "R" else 7
    elif mode == "P":
        picture = Image.fromarray((np.arange(6, dtype=np.uint8) // 2)[None].repeat(8, 0), "P")
        picture.putpalette(list(colour) * 3)
        options["transparency"] = bytes([255, 100, 0])
    elif mode == "PA":
        picture = picture.convert("RGBA")
        picture.putalpha(Image.fromarray(np.where(alpha == 100, 255, alpha).astype(np.uint8)))
        alpha[:, 2:4] = 255
        picture = picture.quantize(4)
    else:
        picture = picture.convert(mode)
        picture.putalpha(Image.fromarray(alpha))
    picture.save(buffer := io.BytesIO(), "PNG", **options)
    grey = int(np.asarray(Image.fromarray(colour[None, None]).convert("L"))[0, 0])
    opaque = np.full(3, grey) if mode[0] == "L" else colour
    share = alpha[..., None] / 255
    expected = share * opaque + (1 - share) * 255
    (record,) = read(write(tmp_path / "a.png", buffer.getvalue()))
    np.testing.assert_allclose(record["image"].astype(int), expected, atol=1)
    if mode == "RGBA":
        (in_grey,) = read(tmp_path / "a.png", (*SHAPE[:2], 1))
        assert (in_grey["image"][:, 4:] == 255).all() and abs(int(in_grey["image"][0, 0, 0]) - grey) <= 1


def deep_png(colour_type: int, channels: int) -> bytes:
    """A PNG of 16 bits a channel, which Pillow cannot write."""
    height, width = SHAPE[:2]
    row = b"\0" + np.full((width, channels), 0x0180, ">u2").tobytes()

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(row * height))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(("colour_type", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)], ids=["L", "RGB", "LA", "RGBA"])
@pytest.mark.parametrize("shape", [SHAPE, (*SHAPE[:2], 1)])
def test_sixteen_bits_a_channel_are_refused_in_every_mode(tmp_path, colour_type, channels, shape):
    (fault,) = read(write(tmp_path / "a.png", deep_png(colour_type, channels)), shape)
    assert fault.kind == "wrong depth" and "16 bits a channel" in fault.message


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_several_frames_are_a_fault_and_one_is_an_image(tmp_path, kind):
    frames = [Image.fromarray(picture) for picture in PICTURES[:3]]
    path = tmp_path / f"a.{kind.lower()}"
    frames[0].save(path, kind, save_all=True, append_images=frames[1:])
    (fault,) = read(path)
    assert fault.kind == "several images" and "found 3 frames or pages" in fault.message
    frames[0].save(path, kind, **({"lossless": True} if kind == "WEBP" else {}))
    (record,) = read(path)
    if kind != "GIF":  # of 256 colours
        np.testing.assert_array_equal(record["image"], PICTURES[0])


def test_a_decompression_bomb_and_a_file_of_another_program_are_faults(tmp_path, monkeypatch):
    (fault,) = read(write(tmp_path / "a.png", encoded(PICTURES[0])), (3, 3, 3))
    assert fault.kind == "wrong size"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    (fault,) = read(tmp_path / "a.png")
    assert fault.kind == "wrong size" and "decompression bomb" in fault.message
    (fault,) = read(write(tmp_path / "b.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 8\n"))
    assert fault.kind == "damaged image"


def test_cmyk_is_made_rgb(tmp_path):
    picture = Image.new("CMYK", (6, 8), (0, 255, 255, 0))  # red
    picture.save(tmp_path / "a.tif")
    (record,) = read(tmp_path / "a.tif")
    assert (record["image"] == (255, 0, 0)).all()


def test_a_tar_is_read_a_piece_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "_TAR_BYTES", 1 << 10)
    path = write(tmp_path / "a.tar", tarred({f"dog/{n}.bin": bytes(300_000) for n in range(20)} | named()))
    tracemalloc.start()
    found = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) == 26 and peak < 4e6


# Images in other formats ---------------------------------------------------------------------------------------------

LABELS = ("dog", "cat")


def turned(content: bytes) -> bytes:
    """A JPEG or PNG file's picture on its side, with the EXIF orientation that says so."""
    picture, exif = Image.open(io.BytesIO(content)), Image.Exif()
    exif[0x0112] = 6
    picture.transpose(Image.Transpose.ROTATE_90).save(buffer := io.BytesIO(), "PNG", exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["parquet", "arrow", "tfds", "parquet of bytes"])
def test_images_of_published_sets_are_those_of_their_files(name, tmp_path, tfds_dir):
    contents = [encoded(picture) for picture in PICTURES]
    contents[1] = turned(contents[1])
    rows = [{"img": content, "label": n % 2} for n, content in enumerate(contents)]
    if name == "tfds":
        import tensorflow_datasets as tfds

        features = {"img": tfds.features.Image(), "label": tfds.features.ClassLabel(names=LABELS)}
        paths = [write(tmp_path / f"{n}.png", row["img"]) for n, row in enumerate(rows)]
        small_sets.write_tfds(
            tfds_dir, "pets", features, {"train": [{**r, "img": str(p)} for r, p in zip(rows, paths, strict=True)]}
        )
        path = "pets"
    else:
        if name != "parquet of bytes":
            rows = [{**row, "img": {"bytes": row["img"], "path": "a.png"}} for row in rows]
        columns = {"img": {"_type": "Image"}, "label": small_sets.class_label(*LABELS)}
        table = small_sets.table(rows, columns)
        if name == "arrow":
            (tmp_path / "set").mkdir()
            path = small_sets.save_to_disk(tmp_path / "set", table)
        else:
            path = small_sets.write_parquet(tmp_path / "a.parquet", table)
    cfg = DataConfig(format=name.split()[0], path=str(path), rename=(("img", "image"),))
    found = [record for unit in registry.find(cfg).train for record in registry.read(unit, cfg, WANTED)]
    assert [record["label"] for record in found] == [*LABELS] * 3
    np.testing.assert_array_equal([record["image"] for record in found], PICTURES)
    split = registry.load(dataclasses.replace(cfg, eval_fraction=0.3), WANTED)
    assert len(split.train) + len(split.valid) == 6


@pytest.mark.parametrize(
    ("image", "kind", "says"),
    [
        ({"bytes": None, "path": "cat/1.png"}, "no image", r"its 'path' is str 'cat/1.png'"),
        ({"bytes": b"x", "path": None}, "damaged image", "expected a JPEG or PNG"),
        ({"bytes": encoded(PICTURES[0].transpose(1, 0, 2)), "path": None}, "wrong size", "6 x 8"),
        ({"bytes": deep_png(2, 3), "path": None}, "wrong depth", "16 bits"),
    ],
)
def test_a_bad_image_of_a_table_is_a_fault_of_its_row(tmp_path, image, kind, says):
    rows = [{"image": {"bytes": encoded(picture), "path": None}} for picture in PICTURES]
    path = small_sets.write_parquet(tmp_path / "a.parquet", small_sets.table([*rows[:3], {"image": image}, *rows[3:]]))
    with pytest.raises(DataError, match=rf"a.parquet:4: {kind}: .*{says}"):
        registry.load(DataConfig(format="parquet", path=str(path)), WANTED)
