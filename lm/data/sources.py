"""From a data config to records: finds the files, reads them, and holds some records out."""

import dataclasses
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from lm.config import DataConfig
from lm.data import builtin, image_files, interactions, tables
from lm.data.records import DataError, Fault, Record, read_jsonl, read_text
from lm.schema import ConfigError

# Names that a folder is searched for; a file named in full, or by a glob, is read whatever its name.
SUFFIXES = {
    "text": (".txt", ".text", ".md"),
    "jsonl": (".jsonl", ".json"),
    "table": (".tsv", ".csv"),
    "conll": (".conll", ".conllu", ".iob", ".tsv"),
    "squad": (".json",),
    "parallel": ("",),
    "images": image_files.SUFFIXES,
    "interactions": (".csv", ".tsv"),
}
_ENDINGS = re.compile(r"\{([^{},]+),([^{},]+)\}")  # of the two sides of a parallel corpus: {en,de}
_SHOWN_EXAMPLES = 3  # places shown of each kind of fault


@dataclasses.dataclass
class Split:
    """Records to train on and records held out.

    Attributes:
      train: records to train on, in the order of the sorted file names and of each file.
      valid: held-out records; never empty.
      fingerprint: sha256 hex over the format, the contents and their order; not over where the files lie.
      report: what was read and what was skipped, for the run to print.
    """

    train: list[Record]
    valid: list[Record]
    fingerprint: str
    report: str


def load(cfg: DataConfig) -> Split:
    """Reads the records that `data.*` names.

    Held out are the records of `data.eval_path` or, without one, those whose content has a small sha256: the same
    ones in whatever order the files give them, and the same content never on both sides. The built-in formats and
    interactions have their own split. `data.max_records` keeps the train records of the smallest hashes, so that a
    smaller number gives a subset of a larger one.

    Raises:
      DataError: a bad file; more bad records (see `lm.data.records`) than `data.max_bad_records`; no record left to
        train on or to hold out.
      ConfigError: a key is set that this format does not read.
    """
    split = FORMATS[cfg.format](cfg)
    for name, records in (("train", split.train), ("valid", split.valid)):
        if not records:
            raise DataError(f"data.format={cfg.format}: no {name} record; expected at least one\n{split.report}")
    if 0 < cfg.max_records < len(split.train):
        split.report += f"\ntrain cut to data.max_records={cfg.max_records:,} of {len(split.train):,} records"
        split.train = _smallest(split.train, cfg.max_records)
    split.fingerprint = _fingerprint(cfg.format, split.train, split.valid)
    return split


def _builtin_text(cfg: DataConfig) -> Split:
    return _builtin(cfg, "text")


def _builtin_instructions(cfg: DataConfig) -> Split:
    return _builtin(cfg, "instructions")


def _text(cfg: DataConfig) -> Split:
    return _from_files(cfg, lambda path: read_text(path, cfg.separator))


def _renamed(
    read: Callable[[epath.Path, Mapping[str, str]], Iterable[Record | Fault]],
) -> Callable[[DataConfig], Split]:
    def load_renamed(cfg: DataConfig) -> Split:
        rename = _rename(cfg)
        return _from_files(cfg, lambda path: read(path, rename))

    return load_renamed


def _rename(cfg: DataConfig) -> dict[str, str]:
    for names in zip(*cfg.rename, strict=True):
        if len(set(names)) < len(names):
            raise ConfigError(f"'data.rename' names a field twice: {cfg.rename}")
    return dict(cfg.rename)


def _interactions(cfg: DataConfig) -> Split:
    """Held out is the last item of every user, so that both halves are of the same users."""
    _refuse_unread(cfg)
    rename, faults = _rename(cfg), list[Fault]()
    paths = find_files(cfg.path, SUFFIXES[cfg.format])
    rows = (interactions.read_interactions(path, rename) for path in paths)
    found = interactions.leave_one_out(_good_records(rows, cfg, faults))
    report = [
        f"read {len(paths)} files: {len(found.train):,} users, the last item of each held out; left out: "
        f"{found.users_left_out:,} users of fewer than {interactions.MIN_ITEMS} items, with "
        f"{found.interactions_left_out:,} items"
    ]
    if faults:
        report.append(_describe(faults))
    return Split(found.train, found.valid, "", "\n".join(report))


def _squad(cfg: DataConfig) -> Split:
    return _from_files(cfg, tables.read_squad)


def _parallel(cfg: DataConfig) -> Split:
    return _from_files(cfg, lambda pair: tables.read_parallel(*pair), _file_pairs)


def _images(cfg: DataConfig) -> Split:
    if cfg.image_shape[2] not in (1, 3):
        raise ConfigError(f"'data.image_shape' is {cfg.image_shape}; expected 1 channel (grey) or 3 (RGB)")
    return _from_files(cfg, lambda path: image_files.read_images(path, cfg.image_shape))


FORMATS: dict[str, Callable[[DataConfig], Split]] = {
    "builtin_text": _builtin_text,
    "builtin_instructions": _builtin_instructions,
    "text": _text,
    "jsonl": _renamed(read_jsonl),
    "table": _renamed(tables.read_table),
    "conll": _renamed(tables.read_conll),
    "squad": _squad,
    "parallel": _parallel,
    "images": _images,
    "interactions": _interactions,
}
_UNREAD = {
    "builtin_text": ("path", "eval_path", "separator", "rename"),
    "builtin_instructions": ("path", "eval_path", "separator", "rename"),
    "text": ("rename",),
    "jsonl": ("separator",),
    "table": ("separator",),
    "conll": ("separator",),
    "squad": ("separator", "rename"),
    "parallel": ("separator", "rename"),
    "images": ("separator", "rename"),
    "interactions": ("eval_path", "separator"),
}


def _builtin(cfg: DataConfig, part: str) -> Split:
    _refuse_unread(cfg)
    corpus = builtin.load()
    records = corpus.parts[part]
    counts = f"{part}: {len(records['train']):,} train and {len(records['valid']):,} valid records, split by file"
    return Split(records["train"], records["valid"], "", f"{corpus.report}\n{counts}")


def _from_files(
    cfg: DataConfig,
    read: Callable[[Any], Iterable[Record | Fault]],
    find: Callable[[str, tuple[str, ...]], list[Any]] | None = None,
) -> Split:
    _refuse_unread(cfg)
    find = find or find_files
    if not cfg.eval_path and not cfg.eval_fraction:
        raise ConfigError("nothing is held out: set 'data.eval_path' or an 'data.eval_fraction' above 0")
    train_paths = find(cfg.path, SUFFIXES[cfg.format])
    eval_paths = find(cfg.eval_path, SUFFIXES[cfg.format]) if cfg.eval_path else []
    if both := sorted(set(map(str, train_paths)) & set(map(str, eval_paths))):
        raise DataError(f"{both[0]}: named by both data.path and data.eval_path; narrow data.path, by a glob perhaps")
    faults: list[Fault] = []
    train = list(_good_records(map(read, train_paths), cfg, faults))
    valid = list(_good_records(map(read, eval_paths), cfg, faults))
    report = [f"read {len(train) + len(valid):,} records of {len(train_paths) + len(eval_paths):,} files"]
    if faults:
        report.append(_describe(faults))
    if cfg.eval_path:
        seen = {_digest(record) for record in train}
        if overlap := sum(_digest(record) in seen for record in valid):
            report.append(f"warning: {overlap:,} of {len(valid):,} records of data.eval_path are trained on as well")
    else:
        train, valid = hold_out(train, cfg.eval_fraction)
    report.append(f"{len(train):,} train and {len(valid):,} valid records")
    return Split(train, valid, "", "\n".join(report))


def _refuse_unread(cfg: DataConfig) -> None:
    for key in _UNREAD[cfg.format]:
        if value := getattr(cfg, key):
            raise ConfigError(f"'data.{key}' is {value!r}, but data.format={cfg.format} does not read it")


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


def _file_pairs(path: str, suffixes: tuple[str, ...]) -> list[tuple[epath.Path, epath.Path]]:
    """(source, target) files of 'DIR/train.{en,de}.gz', where the braces name the two sides.

    Raises:
      DataError: not one pair of braces in `path`, no such files, or more of one side than of the other.
    """
    if len(_ENDINGS.findall(path)) != 1:
        raise DataError(f"data path '{path}': expected the two sides once in braces, such as DIR/train.{{en,de}}.gz")
    source, target = (find_files(_ENDINGS.sub(rf"\{side}", path), suffixes) for side in (1, 2))
    if len(source) != len(target):
        raise DataError(f"data path '{path}': {len(source)} files of the first side, but {len(target)} of the second")
    return list(zip(source, target, strict=True))


def parallel_records(path: str) -> list[Record]:
    """All pairs of a parallel corpus such as 'DIR/test.{en,de}.gz', in order. Raises DataError at the first fault."""
    readings = [tables.read_parallel(*pair) for pair in _file_pairs(path, SUFFIXES["parallel"])]
    return list(_good_records(readings, DataConfig(), []))


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


def _good_records(
    readings: Iterable[Iterable[Record | Fault]], cfg: DataConfig, faults: list[Fault]
) -> Iterator[Record]:
    """The records of all files; faults are raised, or added to `faults` until there are too many."""
    for reading in readings:
        for item in reading:
            if not isinstance(item, Fault):
                yield item
            elif not cfg.max_bad_records:
                hint = "data.max_bad_records=N leaves up to N such records out"
                raise DataError(f"{item.where}: {item.kind}: {item.message} ({hint})")
            else:
                faults.append(item)
                if len(faults) > cfg.max_bad_records:
                    raise DataError(f"more than data.max_bad_records={cfg.max_bad_records}: {_describe(faults)}")


def _describe(faults: list[Fault]) -> str:
    """Counts of each kind of fault, with the first few places."""
    lines = [f"skipped {len(faults):,} bad records:"]
    for kind, count in Counter(fault.kind for fault in faults).most_common():
        examples = [f for f in faults if f.kind == kind][:_SHOWN_EXAMPLES]
        lines.append(f"  {count:,} x {kind}")
        lines += [f"    {fault.where}: {fault.message}" for fault in examples]
        lines += ["    ..."] if count > len(examples) else []
    return "\n".join(lines)


def hold_out(records: list[Record], fraction: float) -> tuple[list[Record], list[Record]]:
    """(train, valid): held out are records whose content's sha256, read as a number in [0, 1), is below `fraction`.

    At least one distinct content falls on each side: the smallest hash is held out, the largest is trained on.

    Raises:
      DataError: fewer than two distinct contents.
    """
    digests = [_digest(record) for record in records]
    smallest, largest = min(digests, default=b""), max(digests, default=b"")
    if smallest == largest:
        found = f"{len(records)} records, {len(set(digests))} distinct"
        raise DataError(
            f"cannot hold records out: found {found}; expected two or more distinct ones. Set "
            "data.eval_path or, with data.format=text, data.separator: '' makes one document of each file"
        )
    bound = int(fraction * 2**64)
    held = [d == smallest or (int.from_bytes(d[:8]) < bound and d != largest) for d in digests]
    pairs = list(zip(records, held, strict=True))
    return [record for record, out in pairs if not out], [record for record, out in pairs if out]


def _smallest(records: list[Record], count: int) -> list[Record]:
    chosen = sorted(range(len(records)), key=lambda i: _digest(records[i]))[:count]
    return [records[i] for i in sorted(chosen)]


def _content(record: Record) -> bytes:
    """The record as bytes, without where it came from."""
    return json.dumps({k: v for k, v in record.items() if k != "source"}, sort_keys=True, default=_array).encode()


def _array(value: np.ndarray) -> list[str]:
    return [str(value.dtype), str(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]


def _digest(record: Record) -> bytes:
    return hashlib.sha256(_content(record)).digest()


def _fingerprint(name: str, *splits: list[Record]) -> str:
    digest = hashlib.sha256(name.encode())
    for records in splits:
        digest.update(b"\0split\0")
        for record in records:
            digest.update(_digest(record))
    return digest.hexdigest()
