"""Which files a data path names: a file, a folder, a glob, or the two sides of a parallel corpus."""

import os
import re
from typing import NamedTuple

from etils import epath

from lm.data.records import DataError

_ENDINGS = re.compile(r"\{([^{},]+),([^{},]+)\}")  # of the two sides of a parallel corpus: {en,de}


class Pair(NamedTuple):
    """Two files whose lines translate each other."""

    source: epath.Path
    target: epath.Path

    def __str__(self) -> str:
        return f"{self.source} with {self.target}"


def find_files(path: str, suffixes: tuple[str, ...]) -> list[epath.Path]:
    """The files of a path, sorted: a file, a glob's matches, or all in a folder and below that end in `suffixes`.

    Either suffix may be followed by .gz or .zst. Names that start with a dot are passed over.

    Raises:
      DataError: there is no such path, or no such file in it.
    """
    try:
        root = epath.Path(path).expanduser()
        if root.is_file():
            return [root]
        if root.is_dir():
            return _files_below(root, suffixes)
        first_magic = next((i for i, part in enumerate(root.parts) if set(part) & set("*?[")), None)
        if first_magic is None:
            raise DataError(f"data path '{path}': no such file or folder (the working directory is {os.getcwd()})")
        base = epath.Path(*root.parts[:first_magic])
        found = sorted((p for p in base.glob("/".join(root.parts[first_magic:])) if p.is_file()), key=str)
    except (KeyError, NotImplementedError, OSError) as error:  # unknown URL scheme; '**'; no access
        raise DataError(f"data path '{path}': {type(error).__name__}: {error}") from error
    if not found:
        raise DataError(f"data path '{path}': no file matches; expected at least one")
    return found


def file_pairs(path: str, suffixes: tuple[str, ...]) -> list[Pair]:
    """Files of 'DIR/train.{en,de}.gz', where the braces name the two sides.

    Raises:
      DataError: not one pair of braces in `path`, no such files, or more of one side than of the other.
    """
    if len(_ENDINGS.findall(path)) != 1:
        raise DataError(f"data path '{path}': expected the two sides once in braces, such as DIR/train.{{en,de}}.gz")
    source, target = (find_files(_ENDINGS.sub(rf"\{side}", path), suffixes) for side in (1, 2))
    if len(source) != len(target):
        raise DataError(f"data path '{path}': {len(source)} files of the first side, but {len(target)} of the second")
    return [Pair(*both) for both in zip(source, target, strict=True)]


def _files_below(folder: epath.Path, suffixes: tuple[str, ...]) -> list[epath.Path]:
    endings = tuple(suffix + packed for suffix in suffixes for packed in ("", ".gz", ".zst"))
    found, others = [], 0
    for directory, folders, names in folder.walk():
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.endswith(endings) and not name.startswith("."):
                found.append(directory / name)
            else:
                others += 1
    if not found:
        expected = ", ".join(suffixes)
        raise DataError(f"data path '{folder}': no file ends in {expected} (or with .gz, .zst); found {others} others")
    return sorted(found, key=str)
