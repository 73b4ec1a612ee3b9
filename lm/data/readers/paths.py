"""Finds the files of a data path: a file, a folder, a glob, or the two sides of a parallel corpus."""

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import PurePath
from typing import Any, NamedTuple

from etils import epath

from lm.data.readers.text import refuse_special
from lm.data.record import DataError

_PACKED = ("", ".gz", ".zst")
_MOST_NAMES = 3  # names that the report shows of the unread files of each suffix
_ENDINGS = re.compile(r"\{([^{},]+),([^{},]+)\}")  # of the two sides of a parallel corpus: {en,de}
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}.*")  # as Hugging Face names them: unsupervised-00000-of-00002.parquet
TRAIN, VALIDATION, TEST = "train", "validation", "test"
_SPLIT_NAMES = {
    **dict.fromkeys(("train", "training", "trainset"), TRAIN),
    **dict.fromkeys(("val", "valid", "validation", "dev", "devel", "eval", "evaluation"), VALIDATION),
    **dict.fromkeys(("valset", "devset", "heldout", "holdout", "testa"), VALIDATION),  # testa: CoNLL-2003's
    **dict.fromkeys(("test", "testing", "testset", "testb", "t10k"), TEST),
}
# Text and image files may be named anything: a word within the name does not make a split ('how_to_test.md').
_NAMED_FREELY = (".txt", ".text", ".md", ".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff")


class Pair(NamedTuple):
    """Two files whose lines are translations of each other."""

    source: epath.Path
    target: epath.Path

    def __str__(self) -> str:
        return f"{self.source} with {self.target}"


def find_files(path: str, suffixes: tuple[str, ...]) -> list[epath.Path]:
    """Finds the files of a path, sorted: the file itself, the matches of a glob, or all files in and below a folder
    whose names end in one of `suffixes`.

    A suffix may be in upper or lower case and be followed by .gz or .zst. Hidden files (names that start with a dot)
    are skipped; `left_out` lists the skipped files of a folder.

    Raises:
      DataError: the path does not exist or has no such file, or a file is a FIFO, socket or device.
    """
    try:
        root = epath.Path(path).expanduser()
        refuse_special(root)
        if root.is_file():
            return [root]
        if root.is_dir():
            found = _files_below(root, suffixes)
        elif (matches := _matches(root)) is None:
            raise DataError(f"data path '{path}': no such file or folder (the working directory is {os.getcwd()})")
        else:
            for match in matches:
                refuse_special(match)
            found = [match for match in matches if match.is_file()]
    except (KeyError, NotImplementedError, OSError) as error:  # unknown URL scheme; '**'; no access
        raise DataError(f"data path '{path}': {type(error).__name__}: {error}") from error
    if not found:
        raise DataError(f"data path '{path}': no file matches; expected at least one")
    return found


def find_splits(path: str, suffixes: tuple[str, ...]) -> dict[str, list[epath.Path]]:
    """Split -> its files, if a folder holds several splits; otherwise {'': all files}, as from `find_files`.

    The split is in the name of a folder or file: root/val/cat/1.png, test.csv, train-00000-of-00002.parquet,
    cifar10_train_500.tar. A single file or a glob was chosen by the user and is never split.

    Raises:
      DataError: as `find_files`; or some files belong to a split and others to none.
    """
    found = find_files(path, suffixes)
    root = epath.Path(path).expanduser()
    return by_split(root, found) if root.is_dir() else {"": found}


def by_split(root: epath.Path, found: Iterable[epath.Path]) -> dict[str, list[epath.Path]]:
    """`find_splits` for the files found in a folder."""
    paths = {file: PurePath(os.path.relpath(file, root)) for file in found}
    of = {file: _split_in_words(path) for file, path in paths.items()}
    if TRAIN not in of.values() and set(of.values()) != {VALIDATION, TEST}:
        of = {
            file: _split_in_whole_names(path) if PurePath(_unpacked(path.name)).suffix in _NAMED_FREELY else of[file]
            for file, path in paths.items()
        }
    # Shards of any other name, such as 'unsupervised', are a split too, beside a 'train' split or in Parquet files.
    of = {
        file: split or (_shard_of(file.name) if TRAIN in of.values() or file.suffix == ".parquet" else "")
        for file, split in of.items()
    }
    if set(of.values()) == {TRAIN, ""}:
        return {"": list(paths)}
    splits = sorted(set(of.values()) - {""})
    if not splits or (len(splits) == 1 and "" not in of.values()):
        return {"": list(paths)}
    if others := [file for file, split in of.items() if not split]:
        names = ", ".join(map(repr, splits))
        raise DataError(
            f"data path '{root}': holds files of the split {names} beside others, such as {others[0]}; name the files "
            "to train on by a glob, and those to evaluate on by data.eval_path"
        )
    return {split: [file for file in paths if of[file] == split] for split in splits}


def split_named(name: str) -> str:
    """The split that a word of a name stands for: 'trainData.csv' -> 'train', 'held_out' -> 'validation'; '' = none.

    A name with words of two splits ('train_test_split') stands for none.
    """
    joined = re.sub(r"(?i)h[eo]ld[^a-z0-9]?out", "heldout", name)
    words = re.findall(r"(?<![a-z])t10k|[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", joined).lower())
    named = {_SPLIT_NAMES[word] for word in words if word in _SPLIT_NAMES}
    return named.pop() if len(named) == 1 else ""


def split_of_folders(path: PurePath) -> str:
    """The split of the topmost folder in a path that is named after one; '' = none."""
    return next((split for folder in path.parts[:-1] if (split := split_named(folder))), "")


def _split_in_words(path: PurePath) -> str:
    return split_of_folders(path) or split_named(path.name)


def _split_in_whole_names(path: PurePath) -> str:
    """Like `_split_in_words`, but the whole name of a folder, or of the file without its suffix, must be a split's."""
    names = [*path.parts[:-1], _shard_of(path.name) or path.name.split(".")[0]]
    whole = (_SPLIT_NAMES.get(name.lower().rstrip("0123456789"), "") for name in names)
    return next((split for split in whole if split), "")


def _unpacked(name: str) -> str:
    return name.lower().removesuffix(".gz").removesuffix(".zst")


def _matches(root: epath.Path) -> list[epath.Path] | None:
    """The matches of a glob, sorted; None if the path is not a glob."""
    first_magic = next((i for i, part in enumerate(root.parts) if set(part) & set("*?[")), None)
    if first_magic is None:
        return None
    base = epath.Path(*root.parts[:first_magic])
    return sorted(base.glob("/".join(root.parts[first_magic:])), key=str)


def file_pairs(path: str, suffixes: tuple[str, ...]) -> list[Pair]:
    """Pairs of files of a path such as 'DIR/train.{en,de}.gz', where the braces name the two sides.

    Raises:
      DataError: `path` does not have exactly one pair of braces, there are no such files, or the two sides have
        different numbers of files.
    """
    if len(_ENDINGS.findall(path)) != 1:
        raise DataError(f"data path '{path}': expected the two sides once in braces, such as DIR/train.{{en,de}}.gz")
    source, target = (find_files(_ENDINGS.sub(rf"\{side}", path), suffixes) for side in (1, 2))
    if len(source) != len(target):
        raise DataError(f"data path '{path}': {len(source)} files of the first side, but {len(target)} of the second")
    return [Pair(*both) for both in zip(source, target, strict=True)]


def target_side(path: str) -> str:
    """The second name in the braces of a path: 'de' for 'DIR/test.{en,de}.gz'; '' without braces."""
    found = _ENDINGS.search(path)
    return found[2] if found else ""


def _shard_of(name: str) -> str:
    match = _SHARD.fullmatch(name)
    return match[1] if match else ""


def files_of(unit: Any) -> list[epath.Path]:
    """The files that a unit of data is read from, as far as the unit names them."""
    parts = unit if isinstance(unit, tuple) else (unit,)
    return [part for part in parts if isinstance(part, epath.Path)]


def left_out(path: str, used: Iterable[epath.Path]) -> str:
    """One line about the files of a folder, or the matches of a glob, that are not among `used`; '' if there are none.

    Worked: '4 files in DIR not read: 2 .csv (a.csv, b.csv), 1 without ending (README), 1 hidden'.
    """
    root, used_names = epath.Path(path).expanduser(), set(map(str, used))
    if root.is_dir():
        left = [name for name in _names_below(root) if str(root / name) not in used_names]
    else:
        left = [match.name + "/" * match.is_dir() for match in _matches(root) or () if str(match) not in used_names]
    return describe_left_out(str(root), left)


def describe_left_out(where: str, names: Iterable[str]) -> str:
    """See `left_out`. A name that ends in / is a folder; a name with a part that starts with a dot is hidden."""
    by_kind: dict[str, list[str]] = defaultdict(list)
    for name in names:
        by_kind[_kind(name)].append(name)
    if not by_kind:
        return ""
    kinds = []
    for kind, found in sorted(by_kind.items(), key=lambda item: (-len(item[1]), item[0])):
        shown = ", ".join(sorted(found)[:_MOST_NAMES]) + ", ..." * (len(found) > _MOST_NAMES)
        kinds.append(f"{len(found):,} {kind}" + (f" ({shown})" if kind != "hidden" else ""))
    total = sum(map(len, by_kind.values()))
    return f"{total:,} file{'s' * (total > 1)} in {where} not read: {', '.join(kinds)}"


def _kind(name: str) -> str:
    path = PurePath(name)
    if any(part.startswith(".") for part in path.parts if part not in (".", "..")):
        return "hidden"
    if name.endswith("/"):
        return "folder"
    packed = path.suffix if path.suffix.lower() in _PACKED else ""
    return PurePath(path.name.removesuffix(packed)).suffix + packed or "without ending"


def _names_below(folder: epath.Path) -> Iterator[str]:
    """Relative names of all files below `folder`, and, with a / added, of folders not entered (hidden or links)."""
    for directory, folders, names in folder.walk(on_error=_fail):
        below = directory.relative_to(folder)
        yield from (str(below / name) for name in names)
        closed = [name for name in folders if name.startswith(".") or os.path.islink(directory / name)]
        yield from (f"{below / name}/" for name in closed)
        folders[:] = [name for name in folders if name not in closed]


def _fail(error: OSError) -> None:
    raise error


def _files_below(folder: epath.Path, suffixes: tuple[str, ...]) -> list[epath.Path]:
    endings = tuple(suffix.lower() + packed for suffix in suffixes for packed in _PACKED)
    found, others = [], list[str]()
    for name in _names_below(folder):
        if name.lower().endswith(endings) and _kind(name) not in ("hidden", "folder"):
            refuse_special(folder / name)
            found.append(folder / name)
        else:
            others.append(name)
    if not found:
        expected = ", ".join(suffixes)
        about = f"; {describe_left_out(str(folder), others)}" if others else ""
        raise DataError(
            f"data path '{folder}': no file ends in {expected} (or with .gz, .zst); found {len(others)} others{about}"
        )
    return sorted(found, key=str)
