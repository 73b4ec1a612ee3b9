"""Files of images to records {"image": uint8 [H, W, C], "label": str, "source": file}, and every fault they can have.

Three forms: an image file, labelled by the name of its folder; a .tar of such files; and a pair of files in the format
of MNIST, `*-images-idx3-ubyte` with `*-labels-idx1-ubyte` beside it. Each may be packed as .gz or .zst.
"""

import io
import math
import tarfile
import warnings
from collections.abc import Iterator
from pathlib import PurePosixPath

import numpy as np
from etils import epath

from lm.data.records import DataError, Fault, Record, read_bytes

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")
SUFFIXES = (*IMAGE_SUFFIXES, ".tar", "-images-idx3-ubyte")
_IMAGES_MAGIC, _LABELS_MAGIC = 0x803, 0x801  # unsigned bytes, in three and in one dimension


def read_images(path: epath.Path, shape: tuple[int, int, int]) -> Iterator[Record | Fault]:
    """The images of a file, by its name; a name of no known ending is taken for an image file's.

    Args:
      path: see the head of this module.
      shape: height, width and channels that every image must have. Whatever the file holds is made grey where channels
        is 1 and RGB where it is 3 (without its transparency).

    Raises:
      DataError: a file that leaves nothing to go on with: a damaged .tar, a damaged or wrong MNIST pair.
    """
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    if name.endswith(".tar"):
        yield from _tar(path, shape)
    elif name.endswith("-images-idx3-ubyte"):
        yield from _mnist(path, shape)
    else:
        yield _image(read_bytes(path), PurePosixPath(path), str(path), shape)


def _tar(path: epath.Path, shape: tuple[int, int, int]) -> Iterator[Record | Fault]:
    content, empty = read_bytes(path), True
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                if not member.isfile() or name.suffix not in IMAGE_SUFFIXES or name.name.startswith("."):
                    continue
                file = tar.extractfile(member)
                assert file is not None  # for it is a file
                empty = False
                yield _image(file.read(), name, f"{path}:{name}", shape)
            rest = content[tar.offset :]
    except tarfile.TarError as error:
        raise DataError(f"{path}: damaged tar data ({error}); expected a whole .tar file") from error
    # tarfile takes a damaged header, or a file cut off between two members, for the end.
    if not rest or rest.strip(b"\0"):
        raise DataError(
            f"{path}: damaged or truncated tar data at byte {len(content) - len(rest)}; expected a whole .tar"
        )
    if empty:
        yield Fault("empty file", str(path), f"found no file in it that ends in {', '.join(IMAGE_SUFFIXES)}")


def _image(content: bytes, name: PurePosixPath, where: str, shape: tuple[int, int, int]) -> Record | Fault:
    """An image file's content as a record, labelled by the last folder in its name ('' = there is none)."""
    from PIL import Image

    height, width, channels = shape
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # its size is checked before it is decoded
            image = Image.open(io.BytesIO(content))
        if image.size != (width, height):
            found = f"found {image.height} x {image.width} pixels"
            return Fault("wrong size", where, f"{found}; expected data.image_shape, {height} x {width}")
        if image.mode[0] in "IF":
            return Fault("wrong depth", where, f"found pixels of mode {image.mode}; expected 8 bits a channel")
        pixels = np.asarray(image.convert({1: "L", 3: "RGB"}[channels])).reshape(shape)
    except (
        Exception
    ) as error:  # what a decoder of Pillow stumbles over comes as it is: OSError, SyntaxError, struct.error
        return Fault("damaged image", where, f"{type(error).__name__}: {error}; expected a JPEG or PNG image")
    return {"image": pixels, "label": name.parent.name, "source": where}


def _mnist(path: epath.Path, shape: tuple[int, int, int]) -> Iterator[Record]:
    labels_path = path.parent / path.name.replace("-images-idx3-", "-labels-idx1-")
    if not labels_path.exists():
        raise DataError(f"{labels_path}: no such file; expected the labels of {path} beside it")
    images, labels = _idx(path, _IMAGES_MAGIC), _idx(labels_path, _LABELS_MAGIC)
    if len(images) != len(labels):
        raise DataError(f"{labels_path}: found {len(labels)} labels; expected one for each of {len(images)} images")
    if (*images.shape[1:], 1) != shape:
        height, width = images.shape[1:]
        raise DataError(f"{path}: found {height} x {width} x 1 images; expected data.image_shape, {shape}")
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        yield {"image": image[:, :, None], "label": str(label), "source": f"{path}:{number}"}


def _idx(path: epath.Path, magic: int) -> np.ndarray:
    """The uint8 array in a file of the format IDX: a magic number, the sizes, all as big-endian int32; the values."""
    content = read_bytes(path)
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
