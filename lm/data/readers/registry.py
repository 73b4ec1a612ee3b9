"""Data formats: finds the units of data that a config names, reads their records, and holds some of them out."""

import dataclasses
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from etils import epath

from lm.config import DataConfig, holds_out
from lm.config.schema import ConfigError
from lm.data import labels, splits
from lm.data.readers import array_record, images, interactions, parquet, python_stdlib, tables, tfds
from lm.data.readers import paths as files
from lm.data.readers.text import Opening, read_jsonl, read_text
from lm.data.record import NOTHING, DataError, Fault, NotRead, Record, Wanted

_SHOWN_EXAMPLES = 3  # places shown of each kind of fault

# What is read on its own: a file, or two files line by line. Picklable, and identified by its `str`.
Unit = Any


class Format(NamedTuple):
    """How the records of a format are found and read.

    Attributes:
      find: (data.path, data.eval_path, whether any are held out) -> the units to train on and the held-out ones.
      read: (unit, config, what the task wants) -> iterator over its records and faults, in order.
      reads: which of the config keys `_OPTIONAL` the format reads; the others are refused.
    """

    find: Callable[[str, str, bool], "Units"]
    read: Callable[[Unit, DataConfig, Wanted], Iterator[Record | Fault | NotRead]]
    reads: tuple[str, ...] = ()


class Units(NamedTuple):
    """The units of data that `data.path` and `data.eval_path` name.

    Attributes:
      train: units to train on.
      valid: held-out units; empty = a share of the records of `train` is held out, see `lm.data.splits`.
      notes: lines for the report: which splits are used and which are not read.
    """

    train: list[Unit]
    valid: list[Unit]
    notes: tuple[str, ...] = ()


@dataclasses.dataclass
class Split:
    """Records to train on and held-out records. Every record has a unique `identity`.

    Attributes:
      train: records to train on, in the order of the sorted file names and, within a file, of the file.
      valid: held-out records by which checkpoints are chosen; never empty.
      fingerprint: sha256 (hex) of the format and of the records in order, independent of the paths.
      report: what was read and what was skipped, for the run to print.
      test: records that are evaluated once, at the end of a run; empty for most formats.
    """

    train: list[Record]
    valid: list[Record]
    fingerprint: str
    report: str
    test: list[Record] = dataclasses.field(default_factory=list)


def load(cfg: DataConfig, wanted: Wanted = NOTHING) -> Split:
    """Reads the records that `data.*` names.

    The held-out records are those of `data.eval_path`; without it, those of the folder's validation split; without
    one, the groups of records (see `lm.data.splits`) with the smallest hashes, whatever the order of the files. The
    built-in formats and interactions have splits of their own. If `data.eval_fraction` is 0 and there is no
    `data.eval_path`, none is held out of files. `data.max_records` keeps the training records with the smallest hashes,
    so that a smaller number gives a subset.

    Raises:
      DataError: a file cannot be read; there are more bad records than `data.max_bad_records` (see
        `lm.data.readers.text`); or no record is left to train on or to hold out.
      ConfigError: a key is set that this format does not read.
    """
    split = _OWN_SPLIT[cfg.format](cfg) if cfg.format in _OWN_SPLIT else _read_all(cfg, wanted)
    for name, records in (("train", split.train), ("valid", split.valid)):
        if not records and (name == "train" or holds_out(cfg)):
            raise DataError(f"data.format={cfg.format}: no {name} record; expected at least one\n{split.report}")
    if 0 < cfg.max_records < len(split.train):
        split.report += f"\ntrain cut to data.max_records={cfg.max_records:,} of {len(split.train):,} records"
        split.train = splits.smallest(split.train, cfg.max_records)
    split.fingerprint = splits.fingerprint(cfg.format, split.train, split.valid, *([split.test] if split.test else []))
    splits.identify(itertools.chain(split.train, split.valid, split.test))
    return split


def find(cfg: DataConfig) -> Units:
    """Finds the units of a format in `FORMATS`, in the order in which they are read.

    Raises:
      DataError: a path matches nothing, or both paths match the same unit.
      ConfigError: a key is set that this format does not read.
    """
    _check(cfg)
    return FORMATS[cfg.format].find(cfg.path, cfg.eval_path, holds_out(cfg))


def units(cfg: DataConfig) -> list[Unit]:
    """The units that `stream` reads, none of which is opened. Raises as `stream`."""
    return _interaction_files(cfg) if cfg.format == "interactions" else _all_readings(cfg, NOTHING)[0]


def of_files(cfg: DataConfig) -> Units:
    """The units of files that `load` reads, see `find`; none for formats of other kinds."""
    return find(cfg) if cfg.format in FORMATS else Units([], [])


def read(unit: Unit, cfg: DataConfig, wanted: Wanted = NOTHING) -> Iterator[Record | Fault | NotRead]:
    """Reads one unit from `find`: yields a record or a `Fault` for every record in it, and a `NotRead` for every file
    of an archive that is not a record.

    A record whose label the task cannot use is a fault, see `lm.data.labels`.

    Raises:
      DataError: the unit cannot be read to its end.
    """
    return (labels.checked(item, wanted) for item in FORMATS[cfg.format].read(unit, cfg, wanted))


def stream(cfg: DataConfig, wanted: Wanted = NOTHING, note: Callable[[str], None] = lambda _: None) -> Iterator[Record]:
    """Reads every record that `data.path` names, in order, one at a time: none is held out.

    Where `wanted.may_lack` has the field that is to be predicted: `parallel` may name one side alone, whose lines are
    the texts, and each user of `interactions` is a record of all its items. With all fields, a record of `interactions`
    is a user with the last item as target; users of fewer than `interactions.MIN_ITEMS` items are left out.

    Args:
      cfg: `path` names what is read; with format tfds, `eval_path` the split.
      wanted: what the task wants.
      note: is given, after the last record, a line for each kind of thing that was left out: those users, files that
        are no records, and up to `data.max_bad_records` bad records.

    Raises:
      DataError: a file cannot be read, a record is bad, or a folder holds several splits.
      ConfigError: a key is set that this format does not read, or a format that has no path.
    """
    faults, not_read, notes = list[Fault](), list[NotRead](), list[str]()
    if cfg.format == "interactions":
        read_units: list[Unit] = _interaction_files(cfg)
        rows = _interaction_rows(read_units, cfg, faults)
        if "target" in wanted.may_lack:
            yield from interactions.histories(rows)
        else:
            found = interactions.leave_one_out(rows)
            yield from found.test
            notes += [f"left out: {_users_left_out(found)}"] * bool(found.users_left_out)
    else:
        read_units, readings = _all_readings(cfg, wanted)
        yield from _good_records(readings, cfg, faults, not_read)
    for line in (*notes, *left_out(cfg, read_units, not_read), *([_describe(faults)] if faults else [])):
        note(line)


def _all_readings(cfg: DataConfig, wanted: Wanted) -> tuple[list[Unit], Iterable[Iterable[Record | Fault | NotRead]]]:
    """The units that `data.path` names, and what is read of each. Raises as `stream`."""
    if cfg.format not in FORMATS:
        raise ConfigError(f"data.format={cfg.format} names no file of records; give one of {', '.join(FORMATS)}")
    _check(cfg)
    if cfg.format == "parallel" and "target" in wanted.may_lack and "{" not in cfg.path:
        one_side: list[Unit] = files.find_files(cfg.path, ("",))
        return one_side, (tables.read_lines(path, _opening(cfg)) for path in one_side)
    units = FORMATS[cfg.format].find(cfg.path, cfg.eval_path, True)
    if cfg.format == "tfds" and not cfg.eval_path:
        raise ConfigError(f"data set {cfg.path} of TFDS: name its split, such as test")
    if units.notes and not cfg.eval_path:
        raise DataError(f"data path '{cfg.path}': {units.notes[0]}; name one of them by its folder or a glob")
    return [*units.train, *units.valid], (read(unit, cfg, wanted) for unit in units.valid or units.train)


def parallel_records(path: str) -> list[Record]:
    """All pairs of a parallel corpus such as 'DIR/test.{en,de}.gz', in order. Raises DataError at the first fault."""
    readings = [tables.read_parallel(*pair) for pair in files.file_pairs(path, ("",))]
    return list(_good_records(readings, DataConfig(), [], []))


# Formats --------------------------------------------------------------------------------------------------------------


def _rename(cfg: DataConfig) -> dict[str, str]:
    for names in zip(*cfg.rename, strict=True):
        if len(set(names)) < len(names):
            raise ConfigError(f"'data.rename' names a field twice: {cfg.rename}")
    return dict(cfg.rename)


def _named(
    *suffixes: str, find_splits: Callable[[str, tuple[str, ...]], dict[str, list[Unit]]] = files.find_splits
) -> Callable[[str, str, bool], Units]:
    """`Format.find` for files. Of a folder, the files with one of `suffixes` are read; a file named in full, or matched
    by a glob, is read whatever its name is."""

    def find_both(path: str, eval_path: str, holds_out: bool) -> Units:
        found = find_splits(path, suffixes)
        held_out = find_splits(eval_path, suffixes) if eval_path else {}
        if len(held_out) > 1:
            names = ", ".join(map(repr, held_out))
            raise DataError(f"data.eval_path '{eval_path}': holds the splits {names}; name one by its folder or a glob")
        units = _train_and_validation(path, found, held_out.popitem()[1] if eval_path else [], holds_out)
        if both := sorted(set(map(real, units.train)) & set(map(real, units.valid))):
            hint = "narrow data.path, by a glob perhaps"
            raise DataError(f"{both[0]}: named by both data.path and data.eval_path; {hint}")
        return units

    return find_both


def real(unit: Unit) -> str:
    """The resolved path of a unit: 'd/b', './d/../d/b' and a link to it are the same unit."""
    return str(unit) if "://" in str(unit) else os.path.realpath(unit) if isinstance(unit, epath.Path) else str(unit)


def _train_and_validation(path: str, found: dict[str, list[Unit]], held_out: list[Unit], holds_out: bool) -> Units:
    """Chooses the 'train' split of a folder with several splits and, if units are held out and `held_out` names none,
    its 'validation'."""
    if len(found) == 1:
        (only,) = found.values()
        return Units(only, held_out)
    if files.TRAIN not in found:
        names = ", ".join(map(repr, sorted(found)))
        raise DataError(f"data path '{path}': holds {names} and no 'train'; name one by its folder or a glob")
    valid = held_out or (found.get(files.VALIDATION, []) if holds_out else [])
    also = ", 'validation' is held out" if valid and not held_out else ""
    notes = [f"{path} holds several splits: 'train' is trained on{also}"]
    read = {str(unit) for unit in (*found[files.TRAIN], *valid)}
    if rest := [f"'{name}'" for name in sorted(found) if not read & set(map(str, found[name]))]:
        hint = (
            "data.eval_path names another split to evaluate on" if holds_out else "eval.sets has what is evaluated on"
        )
        notes.append(f"not read: {', '.join(rest)} ({hint})")
    return Units(found[files.TRAIN], valid, tuple(notes))


def _pairs(path: str, suffixes: tuple[str, ...]) -> dict[str, list[Unit]]:
    return {"": files.file_pairs(path, suffixes)}


def _opening(cfg: DataConfig) -> Opening:
    return Opening(cfg.encoding, cfg.max_expansion)


def _text_with_fields(
    reader: Callable[[Any, Mapping[str, str], Opening, Wanted], Iterator[Record | Fault]],
) -> dict[str, Any]:
    return {
        "read": lambda unit, cfg, wanted: reader(unit, _rename(cfg), _opening(cfg), wanted),
        "reads": ("rename", "encoding"),
    }


def _with_fields(reader: Callable[[Any, Mapping[str, str], Wanted], Iterator[Record | Fault]]) -> dict[str, Any]:
    return {"read": lambda unit, cfg, wanted: reader(unit, _rename(cfg), wanted), "reads": ("rename",)}


FORMATS: dict[str, Format] = {
    "text": Format(
        _named(".txt", ".text", ".md"),
        lambda path, cfg, _: read_text(path, cfg.separator, _opening(cfg)),
        reads=("separator", "encoding"),
    ),
    "jsonl": Format(_named(".jsonl", ".json"), **_text_with_fields(read_jsonl)),
    "table": Format(_named(".tsv", ".csv"), **_text_with_fields(tables.read_table)),
    "conll": Format(
        _named(".conll", ".conllu", ".iob", ".tsv"),
        lambda path, cfg, wanted: tables.read_conll(path, _rename(cfg), _opening(cfg), wanted),
        reads=("rename", "encoding"),
    ),
    "squad": Format(
        _named(".json"),
        lambda path, cfg, wanted: tables.read_squad(path, _opening(cfg), wanted),
        reads=("encoding",),
    ),
    "parallel": Format(
        _named("", find_splits=_pairs),
        lambda pair, cfg, _: tables.read_parallel(pair.source, pair.target, _opening(cfg)),
        reads=("encoding",),
    ),
    "images": Format(
        _named(*images.SUFFIXES),
        lambda path, cfg, wanted: images.read_images(path, wanted.image_shape, cfg.max_expansion),
    ),
    "tfds": Format(lambda name, split, _: Units(*tfds.find(name, split)), **_with_fields(tfds.read)),
    "array_record": Format(_named(".array_record", ".arrayrecord"), **_with_fields(array_record.read_array_record)),
    "parquet": Format(_named(".parquet"), **_with_fields(parquet.read_parquet)),
    "arrow": Format(_named(".arrow", find_splits=parquet.find_arrow), **_with_fields(parquet.read_arrow)),
}


def _builtin(cfg: DataConfig) -> Split:
    _check(cfg)
    corpus, part = python_stdlib.load(), cfg.format.removeprefix("builtin_")
    records = corpus.parts[part]
    counts = f"{part}: {len(records['train']):,} train and {len(records['valid']):,} valid records, split by file"
    return Split(records["train"], records["valid"], "", f"{corpus.report}\n{counts}")


def _interactions(cfg: DataConfig) -> Split:
    """Leave-one-out: each user's second-last item validates and the last one tests, as in SASRec and BERT4Rec."""
    faults, paths = list[Fault](), _interaction_files(cfg)
    found = interactions.leave_one_out(_interaction_rows(paths, cfg, faults))
    report = [
        f"read {len(paths)} files: {len(found.train):,} users, split by time: of each user the second-last item "
        f"validates (and chooses checkpoints), the last one tests; left out: {_users_left_out(found)}",
        *left_out(cfg, paths),
    ]
    if faults:
        report.append(_describe(faults))
    return Split(found.train, found.valid, "", "\n".join(report), found.test)


def _users_left_out(found: interactions.Sequences) -> str:
    number, items = found.users_left_out, found.interactions_left_out
    return f"{number:,} users of fewer than {interactions.MIN_ITEMS} items, with {items:,} items"


def _interaction_rows(paths: Iterable[epath.Path], cfg: DataConfig, faults: list[Fault]) -> Iterator[Record]:
    rename = _rename(cfg)
    rows = (interactions.read_interactions(path, rename, _opening(cfg)) for path in paths)
    return _good_records(rows, cfg, faults, [])


def _interaction_files(cfg: DataConfig) -> list[epath.Path]:
    _check(cfg)
    found_splits = files.find_splits(cfg.path, (".csv", ".tsv"))
    if len(found_splits) > 1:
        raise DataError(
            f"data path '{cfg.path}': holds the splits {', '.join(map(repr, found_splits))}, but interactions are "
            "split by time for each user; name the files to read by a glob"
        )
    (paths,) = found_splits.values()
    return paths


# Formats with a split of their own, which are not read unit by unit.
_OWN_SPLIT: dict[str, Callable[[DataConfig], Split]] = {
    "builtin_text": _builtin,
    "builtin_instructions": _builtin,
    "interactions": _interactions,
}
_OPTIONAL = ("separator", "rename", "encoding")
_UNREAD = {
    "builtin_text": ("path", "eval_path", *_OPTIONAL),
    "builtin_instructions": ("path", "eval_path", *_OPTIONAL),
    "interactions": ("eval_path", "separator"),
    **{name: tuple(key for key in _OPTIONAL if key not in fmt.reads) for name, fmt in FORMATS.items()},
}


def _check(cfg: DataConfig) -> None:
    """Raises ConfigError for keys that the format does not read, before anything is read."""
    _rename(cfg)
    for key in _UNREAD[cfg.format]:
        if (value := getattr(cfg, key)) != getattr(DataConfig, key):
            raise ConfigError(f"'data.{key}' is {value!r}, but data.format={cfg.format} does not read it")


# Reading all units ----------------------------------------------------------------------------------------------------


def _read_all(cfg: DataConfig, wanted: Wanted) -> Split:
    units, faults, not_read = find(cfg), list[Fault](), list[NotRead]()
    parts = (units.train, units.valid)
    train, valid = (
        list(_good_records((read(unit, cfg, wanted) for unit in part), cfg, faults, not_read)) for part in parts
    )
    report = [f"read {len(train) + len(valid):,} records of {sum(map(len, parts)):,} files"]
    report += [f"  {' to '.join(dict.fromkeys((str(part[0]), str(part[-1]))))}" for part in parts if part]
    report += units.notes
    report += left_out(cfg, [*units.train, *units.valid], not_read)
    if faults:
        report.append(_describe(faults))
    if units.valid:
        report += overlap({"": train}, {"": valid})
    elif holds_out(cfg):
        train, valid = splits.hold_out(train, cfg.eval_fraction)
        report.append(splits.describe_groups(train, valid))
    report.append(f"{len(train):,} train and {len(valid):,} valid records")
    return Split(train, valid, "", "\n".join(report))


def overlap(train: Mapping[str, list[Record]], held_out: Mapping[str, list[Record]]) -> list[str]:
    """Warnings about held-out records that are also in the training data, as a whole or by their text, context, ...

    Args:
      train: name of a source, '' = the only one -> its training records.
      held_out: name of a set, '' = the held-out records of `data` -> its records.
    """
    told: list[str] = []
    if not held_out:
        return told
    hashes = {name: [(splits.digest(one), splits.group(one)) for one in some] for name, some in held_out.items()}
    for source, trained_on in train.items():
        digests, groups = (set(map(key, trained_on)) for key in (splits.digest, splits.group))
        place = f" in {source}" if source else ""
        for name, records in held_out.items():
            what = f"{len(records):,} records of eval.sets.{name}" if name else f"{len(records):,} held-out records"
            whole = sum(digest in digests for digest, _ in hashes[name])
            grouped = [one for one, (_, group) in zip(records, hashes[name], strict=True) if group in groups]
            if whole:
                told.append(f"warning: {whole:,} of {what} are trained on as well{place}")
            if len(grouped) > whole:
                kinds = ", ".join(sorted(set(map(splits.grouping, grouped))))
                told.append(f"warning: {len(grouped):,} of {what} share their {kinds} with training{place}")
    return told


def left_out(cfg: DataConfig, units: Iterable[Unit], not_read: Iterable[NotRead] = ()) -> list[str]:
    """One line for each folder, glob or archive with files that are not read, naming them."""
    used = [path for unit in units for path in files.files_of(unit)]
    if cfg.format == "images":
        used += [images.labels_beside(path) for path in used]
    if cfg.format == "arrow":
        used += [about for path in used for about in parquet.described_in(path)]
    in_folders = [files.left_out(path, used) for path in (cfg.path, cfg.eval_path) if path and used]
    in_archives: dict[str, list[str]] = {}
    for archive, name in not_read:
        in_archives.setdefault(archive, []).append(name)
    return [line for line in (*in_folders, *itertools.starmap(files.describe_left_out, in_archives.items())) if line]


def _good_records(
    readings: Iterable[Iterable[Record | Fault | NotRead]],
    cfg: DataConfig,
    faults: list[Fault],
    not_read: list[NotRead],
) -> Iterator[Record]:
    """Yields the records of all units. Faults go to `faults` until there are more than `data.max_bad_records`."""
    for reading in readings:
        for item in reading:
            if isinstance(item, NotRead):
                not_read.append(item)
            elif not isinstance(item, Fault):
                yield item
            elif not cfg.max_bad_records:
                hint = "data.max_bad_records=N leaves up to N such records out"
                raise DataError(f"{item.where}: {item.kind}: {item.message} ({hint})")
            else:
                faults.append(item)
                if len(faults) > cfg.max_bad_records:
                    raise DataError(f"more than data.max_bad_records={cfg.max_bad_records}: {_describe(faults)}")


def _describe(faults: list[Fault]) -> str:
    """Lines for the report: the number of faults of each kind, and the places of the first few."""
    lines = [f"skipped {len(faults):,} bad records:"]
    for kind, count in Counter(fault.kind for fault in faults).most_common():
        examples = [f for f in faults if f.kind == kind][:_SHOWN_EXAMPLES]
        lines.append(f"  {count:,} x {kind}")
        lines += [f"    {fault.where}: {fault.message}" for fault in examples]
        lines += ["    ..."] if count > len(examples) else []
    return "\n".join(lines)
