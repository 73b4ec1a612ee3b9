"""Reads images as records {"image": uint8 [H, W, C], "label": str, "source": file}, and reports every fault.

Three forms: an image file, labelled by the name of its folder; a .tar of such files; and a pair of files in MNIST's
format, `*-images-idx3-ubyte` with `*-labels-idx1-ubyte` beside it. Each may be compressed as .gz or .zst.

`pixels` decodes the content of an image file; the Parquet, Arrow and TFDS readers use it, too.
"""

import io
import math
import tarfile
import warnings
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from etils import epath

from lm.config import DataConfig
from lm.data.readers import paths
from lm.data.readers.fields import BadRecord
from lm.data.readers.text import chunks, read_bytes, unpacked_name
from lm.data.record import DataError, Fault, NotRead, Record

_KINDS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")  # formats that Pillow may open
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff")
SUFFIXES = (*IMAGE_SUFFIXES, ".tar", "-images-idx3-ubyte")
_EXPECTED = "expected a JPEG or PNG image (or GIF, WebP, BMP, TIFF)"
_TAR_BYTES = 1 << 20  # of a .tar in memory at once, beside the current image
_IMAGES_MAGIC, _LABELS_MAGIC = 0x803, 0x801  # uint8 arrays of three dimensions and of one
_ORIENTATION = 0x0112  # EXIF tag; values from 5 on swap height and width
_FIRST_TURNED = 5


def read_images(
    path: epath.Path, shape: tuple[int, int, int], max_expansion: int = DataConfig.max_expansion
) -> Iterator[Record | Fault | NotRead]:
    """Reads the images of a file; a file without a known suffix is read as an image file.

    Args:
      path: one of the three forms of the module docstring.
      shape: height, width and channels of every image, see `pixels`.
      max_expansion: data.max_expansion.

    Raises:
      DataError: a .tar or an MNIST pair is damaged, or the pair does not match.
    """
    name = unpacked_name(path)
    if name.endswith(".tar"):
        yield from _tar(path, shape, max_expansion)
    elif name.endswith("-images-idx3-ubyte"):
        yield from _mnist(path, shape, max_expansion)
    else:
        yield _image(read_bytes(path, max_expansion), PurePosixPath(path), str(path), shape)


def labels_beside(path: epath.Path) -> epath.Path:
    """The label file that belongs to an image file in MNIST's format."""
    return path.parent / path.name.replace("-images-idx3-", "-labels-idx1-")


def pixels(content: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    """Decodes the content of an image file to uint8 [H, W, C].

    The EXIF orientation is applied, transparency is blended with white, and the image is converted to grey (C = 1) or
    RGB (C = 3). Colour profiles are not applied.

    Raises:
      BadRecord: it is not an image, is damaged, has another size, more than 8 bits per channel, or several frames.
    """
    from PIL import Image, ImageOps

    height, width, channels = shape
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # its size is checked before it is decoded
            image: Any = Image.open(io.BytesIO(content), formats=_KINDS)
        if sorted(image.size) != sorted((width, height)):
            raise _wrong_size(image.size, shape)
        # Pillow would keep the upper 8 of 16 bits of RGB, and clip grey at 255.
        is_wide = ";16" in str(image.tile)
        if is_wide or image.mode[0] in "IF":
            found = f"found {'16 bits a channel, ' * is_wide}pixels of mode {image.mode}"
            raise BadRecord("wrong depth", f"{found}; expected 8 bits a channel")
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # a photo with previews or a depth map
            found = f"found {image.n_frames} frames or pages in one {image.format} file"
            raise BadRecord("several images", f"{found}; expected one image")
        image = ImageOps.exif_transpose(image)
        if image.size != (width, height):
            raise _wrong_size(image.size, shape)
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return np.asarray(image.convert({1: "L", 3: "RGB"}[channels])).reshape(shape)
    except BadRecord:
        raise
    except Image.DecompressionBombError as error:
        raise BadRecord("wrong size", f"{error}; expected task.image_shape, {height} x {width}") from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError and many others
        raise BadRecord("damaged image", f"{type(error).__name__}: {error}; {_EXPECTED}") from None


def _wrong_size(size: tuple[int, int], shape: tuple[int, int, int]) -> BadRecord:
    found = f"found {size[1]} x {size[0]} pixels"
    return BadRecord("wrong size", f"{found}; expected task.image_shape, {shape[0]} x {shape[1]}")


def with_pixels(record: Record, shape: tuple[int, int, int]) -> Record:
    """Decodes the image of a record, if it has one. Raises BadRecord."""
    return record | {"image": pixels(record["image"], shape)} if "image" in record else record


class _Unpacked:
    """A forward-only file object for tarfile, which keeps the last bytes read so that the end can be checked."""

    def __init__(self, found: Iterator[bytes]) -> None:
        self.found, self.ready, self.last, self.position = found, b"", b"", 0

    def read(self, size: int) -> bytes:
        parts = [self.ready]
        while sum(map(len, parts)) < size and (chunk := next(self.found, b"")):
            parts.append(chunk)
        content = b"".join(parts)
        given, self.ready = content[:size], content[size:]
        self.position += len(given)
        self.last = self.last[-size:] + given
        return given

    def ends_at(self, offset: int) -> bool:
        """Whether at least one byte follows `offset`, and only zeros do. Reads the rest of the file."""
        rest = self.last[offset - self.position + len(self.last) :]
        is_zero, size = not rest.strip(b"\0"), len(rest)
        while more := self.read(_TAR_BYTES):
            is_zero, size = is_zero and not more.strip(b"\0"), size + len(more)
        return is_zero and size > 0


def _tar(path: epath.Path, shape: tuple[int, int, int], max_expansion: int) -> Iterator[Record | Fault | NotRead]:
    unpacked, empty = _Unpacked(chunks(path, max_expansion)), True
    splits: set[str] = set()
    try:
        with tarfile.open(fileobj=unpacked, mode="r|", bufsize=_TAR_BYTES) as tar:  # type: ignore[call-overload]
            for member in tar:
                name = PurePosixPath(member.name)
                if member.isdir():
                    continue
                if not member.isfile() or name.suffix.lower() not in IMAGE_SUFFIXES or name.name.startswith("."):
                    yield NotRead(str(path), member.name)
                    continue
                file = tar.extractfile(member)
                assert file is not None  # since it is a file
                empty = False
                splits.add(paths.split_of_folders(name))
                if paths.TRAIN in splits and len(splits - {""}) > 1:
                    found = ", ".join(map(repr, sorted(splits - {""})))
                    raise DataError(f"{path}: holds the splits {found} in one .tar; unpack it, or make a .tar of each")
                yield _image(file.read(), name, f"{path}:{name}", shape)
                tar.members = []  # tarfile keeps them all
            end = tar.offset
    except tarfile.TarError as error:
        raise DataError(f"{path}: damaged tar data ({error}); expected a whole .tar file") from error
    # tarfile takes a damaged header, or truncation between two members, for the end of the archive.
    if not unpacked.ends_at(end):
        raise DataError(f"{path}: damaged or truncated tar data at byte {end}; expected a whole .tar")
    if empty:
        yield Fault("empty file", str(path), f"found no file in it that ends in {', '.join(IMAGE_SUFFIXES)}")


def _image(content: bytes, name: PurePosixPath, where: str, shape: tuple[int, int, int]) -> Record | Fault:
    """Decodes an image file to a record, labelled by the last folder in its name ('' = there is none)."""
    try:
        return {"image": pixels(content, shape), "label": name.parent.name, "source": where}
    except BadRecord as error:
        return Fault(error.args[0], where, error.args[1])


def _mnist(path: epath.Path, shape: tuple[int, int, int], max_expansion: int) -> Iterator[Record]:
    labels_path = labels_beside(path)
    if not labels_path.exists():
        raise DataError(f"{labels_path}: no such file; expected the labels of {path} beside it")
    images = _idx(path, _IMAGES_MAGIC, max_expansion)
    labels = _idx(labels_path, _LABELS_MAGIC, max_expansion)
    if len(images) != len(labels):
        raise DataError(f"{labels_path}: found {len(labels)} labels; expected one for each of {len(images)} images")
    if (*images.shape[1:], 1) != shape:
        height, width = images.shape[1:]
        raise DataError(f"{path}: found {height} x {width} x 1 images; expected task.image_shape, {shape}")
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        yield {"image": image[:, :, None], "label": str(label), "source": f"{path}:{number}"}


def _idx(path: epath.Path, magic: int, max_expansion: int) -> np.ndarray:
    """The uint8 array of an IDX file: a magic number and the sizes, as big-endian uint32, then the values."""
    content = read_bytes(path, max_expansion)
    rank = magic & 0xFF
    header = np.frombuffer(content[: 4 * (1 + rank)], ">u4") if len(content) >= 4 * (1 + rank) else np.zeros(1, ">u4")
    if header[0] != magic:
        raise DataError(f"{path}: found no IDX header of {rank} dimensions; expected magic number 0x{magic:08x}")
    sizes, values = [int(size) for size in header[1:]], content[4 * (1 + rank) :]
    if len(values) != math.prod(sizes):
        raise DataError(
            f"{path}: found {len(values)} values; expected {' x '.join(map(str, sizes))}, as its header says"
        )
    return np.frombuffer(values, np.uint8).reshape(sizes)
