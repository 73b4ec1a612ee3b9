"""Prepared data on disk: packed rows of token ids in shards, read by row number through memory maps.

A folder holds the tokenizer, one `.npy` file for each shard, and `index.json`, which is written last: a folder without
it is unfinished. A shard is an array [R, W] of uint16 (uint32 if ids do not fit), each row of which is

    L token ids | 2 halves of a checksum | S pairs of a length and a last target

Worked, with L = 6, S = 2 and the documents [a b] and [c], which begin with BOS (^) and end with EOS (.):

    stored        ^ a b ^ c 0 | checksum | 3 . 2 .
    tokens        ^ a b ^ c 0     as stored
    segment_ids   1 1 1 2 2 0     from the lengths
    positions     0 1 2 0 1 0     from the lengths
    targets       a b . c . 0     the next token; at the end of a document, its last target
    loss_weights  1 1 1 1 1 0     1 where there is a document

A token takes two bytes, and a batch takes one copy and a few passes over it. The checksum covers the row, its number
and the name of its shard, and is verified whenever a row is read: it detects flipped bits, and rows or shards that
were swapped. The index has a checksum of its own.
"""

import functools
import hashlib
import json
import mmap
import os
import re
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from lm.data.example import Rows
from lm.data.record import DataError
from lm.terminal import say

FORMAT = 2
INDEX = "index.json"
_OPEN_SHARDS = 256  # each holds a file descriptor
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")  # of a shard: a file in the folder, whatever the index says
_HALVES = 2  # cells of a row that hold its checksum
_ROW = np.uint32(0x9E3779B1)  # odd, so that the 2^32 first rows of a shard all start from different checksums


class Layout(NamedTuple):
    """Layout of all rows of a folder.

    Attributes:
      length: L, positions of a row.
      shifted: whether rows have targets (next tokens).
      mask_documents: False = a row is read as one segment, so that its documents attend to those before them.
    """

    length: int
    shifted: bool
    mask_documents: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """The columns that a row is decoded to."""
        return ("tokens", "segment_ids", "positions", *(("targets", "loss_weights") if self.shifted else ()))


# Writing --------------------------------------------------------------------------------------------------------------


def write(folder: Path, name: str, rows: Rows, counts: Mapping[str, int]) -> dict[str, Any]:
    """Writes one shard atomically and returns its entry for the index.

    Args:
      folder: folder of the prepared data.
      name: name of the shard, such as 'train-00003-of-00008'.
      rows: at least one row from `lm.data.packing.pack`, of a task that reads text.
      counts: further counts for the index, such as documents and bytes.

    Raises:
      ValueError: the format cannot hold these rows, for example because only a part of each is trained on.
    """
    stored = stamp(encode(rows), rows["tokens"].shape[1], name)
    temporary = folder / f"{name}.{os.getpid()}.tmp"  # two processes may write the same shard
    with temporary.open("wb") as file:
        np.save(file, stored, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    entry = {
        "name": name,
        "rows": len(stored),
        "tokens": int(np.count_nonzero(rows["segment_ids"])),
        "bytes_on_disk": temporary.stat().st_size,
        "sha256": hashlib.sha256(temporary.read_bytes()).hexdigest(),
    }
    temporary.replace(folder / f"{name}.npy")
    return {**entry, **counts}


def encode(rows: Rows) -> np.ndarray:
    """Rows as stored, [R, W], without their checksums. Raises ValueError if `decode` would not give the same rows."""
    tokens_RxL, segments_RxL = (rows[name].astype(np.int64) for name in ("tokens", "segment_ids"))
    num_rows, length = tokens_RxL.shape
    is_end_RxL = segments_RxL != np.pad(segments_RxL[:, 1:], ((0, 0), (0, 1)))
    if "targets" in rows:  # several documents in one segment: one ends where the target is not the next token
        is_end_RxL |= rows["targets"] != np.pad(tokens_RxL[:, 1:], ((0, 0), (0, 1)))
    is_end_RxL &= segments_RxL > 0
    counts_R = is_end_RxL.sum(axis=1)
    row_N, end_N = np.nonzero(is_end_RxL)
    place_N = np.arange(len(row_N)) - np.repeat(np.cumsum(counts_R) - counts_R, counts_R)
    pairs_RxSx2 = np.zeros((num_rows, int(counts_R.max(initial=1)), 2), np.int64)
    pairs_RxSx2[row_N, place_N, 0] = end_N - np.where(place_N == 0, -1, np.roll(end_N, 1))
    pairs_RxSx2[row_N, place_N, 1] = rows["targets"][row_N, end_N] if "targets" in rows else 0
    pairs_RxP = pairs_RxSx2.reshape(num_rows, pairs_RxSx2.shape[1] * 2)
    dtype = np.uint16 if max(tokens_RxL.max(initial=0), pairs_RxP.max(initial=0)) < 2**16 else np.uint32
    cells = np.concatenate([tokens_RxL, np.zeros((num_rows, _HALVES), np.int64), pairs_RxP], axis=1).astype(dtype)
    merged = bool((segments_RxL.max(axis=1, initial=0) < counts_R).any())
    for name, found in decode(cells, Layout(length, "targets" in rows, not merged)).items():
        if not np.array_equal(found, rows[name]):
            raise ValueError(f"rows of this task cannot be stored: '{name}' does not follow from the tokens")
    return cells


def stamp(cells: np.ndarray, length: int, name: str) -> np.ndarray:
    """Writes the checksums into the rows [R, W] of the shard `name`, in place."""
    sums_R = checksums(cells, length, seeds(name, np.arange(len(cells))))
    cells[:, length], cells[:, length + 1] = sums_R & 0xFFFF, sums_R >> 16
    return cells


def write_index(folder: Path, index: Mapping[str, Any]) -> None:
    """Writes the index, which completes a folder of prepared data.

    Args:
      folder: holds the tokenizer and the shards.
      index: "parts": 'train' and 'valid' -> entries of the shards, from `write`; "layout": length and shifted;
        "settings": other settings that shaped the rows, at least 'packing'; and whatever else is worth recording.
    """
    whole = {**index, "format": FORMAT}
    temporary = folder / f"{INDEX}.tmp"
    text = json.dumps({**whole, "sha256": _sha256(whole)}, indent=1, sort_keys=True)
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(folder / INDEX)


def _sha256(index: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


# Reading --------------------------------------------------------------------------------------------------------------


class Table(NamedTuple):
    """The rows of one split of a prepared folder.

    Attributes:
      paths: paths of the shards.
      starts: first row of each shard, and the total number of rows, int64 [shards + 1].
      layout: layout of the rows.
      seeds: initial value of the checksum of the first row of each shard, uint32 [shards].
      skip: how many damaged rows to read as padding, which trains nothing; one more is an error.
      damaged: the damaged rows found so far, 'file: row'.
    """

    paths: tuple[str, ...]
    starts: np.ndarray
    layout: Layout
    seeds: np.ndarray
    skip: int
    damaged: set[str]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def take(self, row_ids: np.ndarray) -> Rows:
        """Reads rows by number, as columns of a batch, [B, L].

        Raises:
          DataError: a row has a wrong checksum, and `skip` such rows have been left out already; or a shard cannot be
            read. The message names the file and the row.
        """
        shard_B = np.searchsorted(self.starts, row_ids, side="right") - 1
        inside_B = row_ids - self.starts[shard_B]
        length, rows_in = self.layout.length, np.diff(self.starts).tolist()
        of = {shard: _opened(self.paths[shard], rows_in[shard], length) for shard in np.unique(shard_B).tolist()}
        for shard in of.values():
            shard.check()
        rows = [of[shard].cells[at] for shard, at in zip(shard_B.tolist(), inside_B.tolist(), strict=True)]
        if len({shard.cells.shape[1] for shard in of.values()}) > 1:  # shards of fewer pairs: add pairs of length 0
            width = max(shard.cells.shape[1] for shard in of.values())
            rows = [np.pad(row, (0, width - len(row))) for row in rows]
        cells = np.concatenate(rows).reshape(len(rows), -1)
        written = cells[:, length].astype(np.uint32) | cells[:, length + 1].astype(np.uint32) << np.uint32(16)
        seed_B = self.seeds[shard_B] + inside_B.astype(np.uint32) * _ROW
        too_long_B = cells[:, length + _HALVES :: 2].sum(axis=1, dtype=np.int64) > length  # of a shard made to harm
        for at in np.flatnonzero(too_long_B | (written != checksums(cells, length, seed_B))).tolist():
            self._damaged(f"{self.paths[shard_B[at]]}: row {inside_B[at]}")
            cells[at] = 0
        return decode(cells, self.layout)

    def _damaged(self, where: str) -> None:
        message = f"{where} is damaged: its checksum or its documents' lengths are wrong"
        if where not in self.damaged:
            if len(self.damaged) >= self.skip:
                hint = "copy the shard again, or prepare it anew; data.max_bad_records=N leaves up to N such rows out"
                raise DataError(f"{message} ({len(self.damaged)} were left out before it); {hint}")
            self.damaged.add(where)
            say(f"warning: {message}; left out, {len(self.damaged)} of at most {self.skip}", file=sys.stderr)


class _Shard(NamedTuple):
    """A memory-mapped shard: its path, its rows as stored, [R, W], and the map of the whole file."""

    path: str
    cells: np.ndarray
    map: mmap.mmap

    def check(self) -> None:
        """Raises DataError if the file has lost its end: reading rows that are gone would end the process by SIGBUS."""
        if (size := self.map.size()) < (was := len(self.map)):
            raise DataError(f"{self.path}: truncated from {was:,} to {size:,} bytes while it is read; copy it again")


@functools.lru_cache(maxsize=_OPEN_SHARDS)
def _opened(path: str, num_rows: int, length: int) -> _Shard:
    """Maps a shard, whose header must agree with its size, so that damage cannot shift or hide rows."""
    try:
        stored = np.load(path, mmap_mode="r", allow_pickle=False)
        is_whole = stored.ndim == 2 and len(stored) == num_rows and stored.dtype in (np.uint16, np.uint32)
        is_whole = is_whole and stored.offset + stored.nbytes == os.path.getsize(path)
        is_whole = is_whole and stored.shape[1] >= length + _HALVES + 2 and (stored.shape[1] - length) % 2 == 0
    except Exception as error:  # numpy may raise anything on a damaged header
        raise DataError(f"{path}: cannot be read: {type(error).__name__}: {error}; copy it again") from error
    if not is_whole:
        found = f"{stored.dtype} {stored.shape}"
        raise DataError(f"{path}: its header is damaged: {found} where {num_rows:,} rows are expected; copy it again")
    return _Shard(path, np.asarray(stored), stored.base)


def decode(cells: np.ndarray, layout: Layout) -> Rows:
    """Decodes stored rows [B, W] to columns of a batch, int32 [B, L] (loss_weights float32); see the file's top."""
    num_rows, length = len(cells), layout.length
    tokens_BxL = cells[:, :length].astype(np.int32)
    lengths_BxS, last_BxS = cells[:, length + _HALVES :: 2].astype(np.int64), cells[:, length + _HALVES + 1 :: 2]
    # Run lengths of every row: one run for each document and one for the padding. Runs of length 0 vanish.
    runs_BxT = np.column_stack([lengths_BxS, length - lengths_BxS.sum(axis=1)])
    ends_BxT = np.cumsum(runs_BxT).reshape(runs_BxT.shape)
    number_T = np.arange(1, runs_BxT.shape[1] + 1, dtype=np.int32)
    number_T[-1] = 0
    runs_N = runs_BxT.ravel()
    segments_BxL = np.repeat(np.tile(number_T, num_rows), runs_N).reshape(num_rows, length)
    is_full = not runs_BxT[:, -1].any()
    if layout.mask_documents:
        starts_N = (ends_BxT - runs_BxT).ravel().astype(np.int32)
        positions_BxL = _ramp(num_rows * length) - np.repeat(starts_N, runs_N)
        positions_BxL = positions_BxL.reshape(num_rows, length)
    else:
        segments_BxL = np.minimum(segments_BxL, 1)
        positions_BxL = np.tile(np.arange(length, dtype=np.int32), (num_rows, 1))
    if not is_full:
        positions_BxL = np.where(segments_BxL > 0, positions_BxL, 0)
    columns = {"tokens": tokens_BxL, "segment_ids": segments_BxL, "positions": positions_BxL}
    if layout.shifted:
        targets_N = np.zeros(num_rows * length, np.int32)
        targets_N[:-1] = tokens_BxL.ravel()[1:]
        is_document = lengths_BxS > 0
        targets_N[ends_BxT[:, :-1][is_document] - 1] = last_BxS[is_document]
        targets_BxL = targets_N.reshape(num_rows, length)
        weights_BxL = np.ones((num_rows, length), np.float32) if is_full else (segments_BxL > 0).astype(np.float32)
        if not is_full:
            targets_BxL = np.where(segments_BxL > 0, targets_BxL, 0)
        columns |= {"targets": targets_BxL, "loss_weights": weights_BxL}
    return columns


@functools.lru_cache(maxsize=8)
def _ramp(size: int) -> np.ndarray:
    return np.arange(size, dtype=np.int32)


def checksums(cells: np.ndarray, length: int, seed_B: np.ndarray) -> np.ndarray:
    """Checksums of stored rows [B, W], uint32 [B], over all cells except the checksum; trailing zeros do not count.

    The sum of cell times an odd number of its own, modulo 2^32: a change of a single cell is always detected.
    """
    odd_W = _odd(cells.shape[1], length)
    return seed_B + np.einsum("bw,w->b", cells, odd_W, dtype=np.uint32, casting="unsafe")


def seeds(name: str, row_B: np.ndarray) -> np.ndarray:
    """Initial values of the checksums of rows of the shard `name`, uint32 [B], so that a misplaced row is detected."""
    return np.uint32(zlib.crc32(name.encode())) + row_B.astype(np.uint32) * _ROW


@functools.lru_cache(maxsize=64)
def _odd(width: int, length: int) -> np.ndarray:
    odd_W = (np.arange(1, width + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(32)).astype(
        np.uint32
    )
    odd_W |= np.uint32(1)
    odd_W[length : length + _HALVES] = 0
    return odd_W


class Prepared(NamedTuple):
    """An opened folder of prepared data.

    Attributes:
      path: path of the folder.
      about: content of its index.
      fingerprint: sha256 (hex) of the rows and their layout, independent of the path.
    """

    path: str
    about: dict[str, Any]
    fingerprint: str

    def table(self, half: str, *, mask_documents: bool = True, skip: int = 0) -> Table:
        """The rows of the split `half`, 'train' or 'valid'; for the other arguments see `Layout` and `Table`."""
        entries = self.about["parts"][half]
        paths = tuple(str(epath.Path(self.path).expanduser() / f"{entry['name']}.npy") for entry in entries)
        starts = np.cumsum([0, *(entry["rows"] for entry in entries)], dtype=np.int64)
        firsts = np.array([seeds(entry["name"], np.zeros(1))[0] for entry in entries], np.uint32)
        return Table(paths, starts, Layout(**self.about["layout"], mask_documents=mask_documents), firsts, skip, set())

    def counts(self, half: str) -> dict[str, float]:
        """All counts in the index, summed over the shards, and the fill of the rows."""
        entries = self.about["parts"][half]
        names = [name for name, value in entries[0].items() if isinstance(value, int)] if entries else []
        total: dict[str, float] = {name: sum(entry[name] for entry in entries) for name in names}
        if total:
            total["fill"] = total["tokens"] / max(1, total["rows"] * self.about["layout"]["length"])
        return total

    @property
    def report(self) -> str:
        """A line that says what was found."""
        rows = {half: f"{sum(e['rows'] for e in shards):,}" for half, shards in self.about["parts"].items()}
        return f"prepared data in {self.path}: {rows['train']} train and {rows['valid']} valid rows"


def read_index(folder: epath.Path) -> dict[str, Any]:
    """Reads the index of a prepared folder. Raises DataError if it is damaged or of another format version."""
    file = folder / INDEX
    try:
        index = json.loads(file.read_text())
        version, written = index["format"], index.get("sha256")
        if version != FORMAT:
            raise DataError(f"{file}: format {version}, this code reads {FORMAT}; prepare the data anew")
        if written != _sha256({key: value for key, value in index.items() if key != "sha256"}):
            raise DataError(f"{file}: damaged: it is not what was written; copy it again, or prepare the data anew")
        _check_index(index)
    except DataError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{file}: damaged ({type(error).__name__}: {error}); prepare the data anew") from None
    return index


def _check_index(index: Mapping[str, Any]) -> None:
    """Raises ValueError, LookupError, TypeError or AttributeError for an index that `write_index` did not make.

    Its checksum tells that it is what somebody wrote, not who that was.
    """

    def count(entry: Mapping[str, Any], name: str, least: int, most: int) -> int:
        if type(entry[name]) is not int or not least <= entry[name] <= most:
            raise ValueError(f"'{name}' is {str(entry[name])[:40]}, expected {least} to {most}")
        return entry[name]

    length = count(index["layout"], "length", 1, 2**31)
    if index["layout"].keys() != {"length", "shifted"} or type(index["layout"]["shifted"]) is not bool:
        raise ValueError(f"'layout' is {str(index['layout'])[:200]}, expected 'length' and 'shifted'")
    if not isinstance(index["settings"]["packing"], str) or not isinstance(index.get("tokenizer_hash", ""), str):
        raise TypeError("'packing' and 'tokenizer_hash' must be text")
    for entries in (index["parts"]["train"], index["parts"]["valid"]):
        for entry in entries:
            if not _NAME.fullmatch(entry["name"]):
                raise ValueError(f"a shard is named {entry['name'][:80]!r}, expected the name of a file in the folder")
            bytes_on_disk = count(entry, "bytes_on_disk", 1, 2**62)
            count(entry, "rows", 0, bytes_on_disk // (2 * (length + _HALVES + 2)))
            for name in (name for name, value in entries[0].items() if isinstance(value, int)):
                count(entry, name, 0, 2**62)
            bytes.fromhex(entry["sha256"])


def open_folder(path: str) -> Prepared:
    """Opens a folder of prepared data.

    Raises:
      DataError: it is not a prepared folder, it has another format version, or a shard is missing or truncated.
    """
    folder = epath.Path(path).expanduser()
    if not (folder / INDEX).exists():
        raise DataError(f"data path '{path}': no {INDEX} in it; expected a folder that tools/prepare_data.py finished")
    index = read_index(folder)
    parts = {half: index["parts"][half] for half in ("train", "valid")}
    for entry in (entry for entries in parts.values() for entry in entries):
        file = folder / f"{entry['name']}.npy"
        size = file.stat().length if file.exists() else None
        if size != entry["bytes_on_disk"]:
            found = "is missing" if size is None else f"has {size:,} bytes, expected {entry['bytes_on_disk']:,}"
            raise DataError(f"{file}: {found}; copy it again, or prepare the data anew")
        if "://" not in path and os.path.dirname(os.path.realpath(file)) != os.path.realpath(folder):
            raise DataError(f"{file}: a link to {os.path.realpath(file)}, outside of the folder; copy the file itself")
    decisive = {"layout": Layout(**index["layout"]), "rows": [[e["sha256"] for e in s] for s in parts.values()]}
    return Prepared(path, index, hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest())
