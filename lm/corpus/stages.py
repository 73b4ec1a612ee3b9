"""The stages that read, filter and deduplicate documents: read, measure, match; each a function of one unit of work.

A unit's output is a folder of arrays (`lm.corpus.artifacts`) below JOB/work. It is a function of the job alone: units
may run anywhere, in any order, any number of times, and leave the same bytes.

- `read`: files -> blocks of documents of bounded size, each sorted by the hash of its content.
- `measure`: a block -> for each document the verdict of filters and decontamination, MinHash signature and LSH bands.
- `match`: a range of hashes -> the exact and near duplicates of earlier documents.

A document's id is the number of its block and its row in the block; earlier documents have smaller ids. Shape letters:
D documents of a block, E entries (a band of a document each), N duplicates.
"""

import dataclasses
import functools
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from etils import epath

from lm.config import Config, holds_out
from lm.corpus import artifacts, decontaminate, dedup, filters, ngrams
from lm.data import splits
from lm.data.readers import paths, registry
from lm.data.record import DataError, Fault, NotRead, Record

PARTS = ("valid", "train")
SAME = 2.0  # stored as the similarity of exact duplicates
KEYS = 2**64  # a key is the first 8 bytes of the content's sha256; keys below eval_fraction * KEYS are held out
CONTAMINATED, EXACT, NEAR = "contaminated", "exact_duplicate", "near_duplicate"
MOST_BYTES = 1 << 24  # longest document
_BLOCK_NAME = re.compile(r"\d{8}-\d{8}")  # number of the group of files, number of the block in it
_BLOCK_DOCUMENTS = 1 << 15
_MATCH_ENTRIES = 1 << 19  # entries in a range of hashes: bounds the memory of `match`


@dataclasses.dataclass(frozen=True)
class Job:
    """What to prepare, and how.

    Attributes:
      folder: the output folder.
      cfg: the recipe: source of the records (`data.*`), form of the rows, tokenizer.
      num_groups: number of groups of files, the units of `read`; those of data.eval_path come first.
      held_groups: how many of the groups are of data.eval_path.
      evaluation: evaluation files to decontaminate against.
      ngram: length in words of the n-grams that documents may not share with them.
      filters: names of `lm.corpus.filters.FILTERS`.
      near: similarity from which on documents are near duplicates; 0 = no near-duplicate removal.
      tokenizer_file: name of the tokenizer in the folder.
      block_bytes, shard_bytes: largest amount of text in a block, and approximate amount in a shard.
    """

    folder: Path
    cfg: Config
    num_groups: int
    held_groups: int
    evaluation: tuple[str, ...]
    ngram: int
    filters: tuple[str, ...]
    near: float
    tokenizer_file: str
    block_bytes: int
    shard_bytes: int

    @property
    def work(self) -> Path:
        return self.folder / "work"


def blocks(job: Job) -> list[str]:
    """Names of all blocks, in the order of their numbers."""
    return sorted(path.name for path in (job.work / "read").iterdir() if _BLOCK_NAME.fullmatch(path.name))


def blocks_of_part(job: Job, part: str) -> list[tuple[int, str]]:
    """(number, name) of the blocks with documents of a part: all blocks, unless data.eval_path separates the parts."""
    numbered = list(enumerate(blocks(job)))
    if not job.held_groups:
        return numbered
    is_held = {name: int(name.partition("-")[0]) < job.held_groups for _, name in numbered}
    return [(number, name) for number, name in numbered if is_held[name] == (part == "valid")]


def parts_with_documents(job: Job) -> tuple[str, ...]:
    """The parts that must have documents: both, unless nothing is held out: the runs have a set `valid` then."""
    return PARTS if holds_out(job.cfg.data) else ("train",)


def keys_of_part(job: Job, part: str) -> tuple[int, int]:
    """The range [low, high) of the keys of a part's documents, in its blocks."""
    if job.held_groups:
        return 0, KEYS
    held = int(job.cfg.data.eval_fraction * KEYS)
    return (0, held) if part == "valid" else (held, KEYS)


# Read -----------------------------------------------------------------------------------------------------------------


def group_units(units: Iterable[registry.Unit], most_bytes: int) -> list[list[registry.Unit]]:
    """Groups consecutive units up to `most_bytes` of files, so that many small files are one unit of work."""
    groups: list[list[registry.Unit]] = []
    size = 0
    for unit in units:
        found = paths.files_of(unit)
        length = sum(file.stat().length for file in found) if found else most_bytes
        if not groups or size + length > most_bytes:
            groups.append([])
            size = 0
        groups[-1].append(unit)
        size += length
    return groups


def read(job: Job, group: tuple[int, list[registry.Unit]]) -> None:
    """Reads a group of files, (number, units), into blocks.

    Raises:
      DataError: a file cannot be read, or has more than data.max_bad_records bad records.
    """
    number, units = group
    texts: list[str] = []
    places: list[str] = []
    faults: list[Fault] = []
    count = size = total = documents = normalised = 0

    def flush() -> None:
        nonlocal count, size, texts, places
        if texts:
            _write_block(job, f"{number:08}-{count:08}", texts, places)
            count, size, texts, places = count + 1, 0, [], []

    for found in (record for unit in units for record in registry.read(unit, job.cfg.data)):
        if isinstance(found, NotRead):
            continue
        record = found if isinstance(found, Fault) else _normalise(found)
        if isinstance(record, Fault):
            faults.append(record)
            check_faults(faults, job.cfg.data.max_bad_records)
            continue
        documents, normalised = documents + 1, normalised + (record is not found)
        length = len(record["text"].encode())
        if size + length > job.block_bytes or len(texts) == _BLOCK_DOCUMENTS:
            flush()
        texts.append(record["text"])
        places.append(record["source"])
        size, total = size + length, total + length
    flush()
    info = {"blocks": count, "documents": documents, "bytes": total, "normalised": normalised, "faults": faults}
    artifacts.write(job.work / "read" / f"{number:08}", {}, info)


def check_faults(faults: list[Fault], most: int) -> None:
    """Raises DataError if there are more than `most` faults, naming the last one."""
    if len(faults) > most:
        kind, place, message = faults[-1]
        raise DataError(
            f"{place}: {kind}: {message} (more than data.max_bad_records={most}; a larger value drops, counts and "
            "lists such records)"
        )


def _normalise(record: Record) -> Record | Fault:
    """The record with its text stripped and in Unicode NFC; the same object if nothing changes."""
    if "text" not in record:
        found = ", ".join(sorted(set(record) - {"source"}))
        return Fault("missing field", str(record["source"]), f"found {found}; expected 'text'")
    text = unicodedata.normalize("NFC", record["text"]).strip()
    if not text:
        return Fault("empty text", str(record["source"]), "found white space alone; expected text")
    if len(text) > MOST_BYTES // 4 and len(text.encode()) > MOST_BYTES:
        found = f"found a document of {len(text):,} characters; expected at most {MOST_BYTES:,} bytes"
        return Fault("document too long", str(record["source"]), f"{found}: split it")
    return record if text == record["text"] else {**record, "text": text}


def _write_block(job: Job, name: str, texts: list[str], places: list[str]) -> None:
    # The same digest as runs that read raw text use, so that both hold out the same documents.
    digests = [splits.digest({"text": text}) for text in texts]
    key_D = np.array([int.from_bytes(d[:8]) for d in digests], np.uint64)
    row_D = np.argsort(key_D, kind="stable").astype(np.uint32)
    ordered = [texts[row].encode() for row in row_D]
    arrays = {
        "key": key_D,
        "rest": np.array([int.from_bytes(d[8:16]) for d in digests], np.uint64),
        "source": np.array([place.encode(errors="replace") for place in places]),
        "size": np.array([len(text.encode()) for text in texts], np.uint32),
        # In the order of keys: the row of each document, and all texts.
        "row": row_D,
        "text": np.frombuffer(b"".join(ordered), np.uint8),
    }
    artifacts.write(job.work / "read" / name, arrays, {})


def texts_of(folder: Path, first: int, last: int, is_wanted: Callable[[int], bool]) -> Iterator[tuple[int, str]]:
    """(row, text) of the wanted documents of a block, from place `first` to `last` in the order of keys."""
    row_D, size_D, text = (artifacts.array(folder, name) for name in ("row", "size", "text"))
    end_D = np.cumsum(size_D[row_D], dtype=np.int64)
    for row, end in zip(row_D[first:last].tolist(), end_D[first:last].tolist(), strict=True):
        if is_wanted(row):
            yield row, text[end - int(size_D[row]) : end].tobytes().decode()


# Measure --------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def evaluation(files: tuple[str, ...], ngram: int) -> decontaminate.Evaluation:
    """The n-grams of the evaluation files, read once in each process."""
    return decontaminate.read([epath.Path(file) for file in files], ngram)


def verdicts(job: Job) -> list[str]:
    """Reasons to drop a document, indexed by the numbers that `measure` writes; '' = kept."""
    return ["", *job.filters, CONTAMINATED]


def measure(job: Job, name: str) -> None:
    """Computes for each document of a block its verdict (why it is dropped, if it is), signature and bands."""
    folder = job.work / "read" / name
    count = len(artifacts.array(folder, "row"))
    row_D, text_D = (list(column) for column in zip(*texts_of(folder, 0, count, lambda _: True), strict=True))
    why_D = np.array([filters.rejected_by(text, job.filters) for text in text_D], dtype=object)
    is_kept_D = why_D == ""
    kept = np.flatnonzero(is_kept_D)
    hash_W, text_W = ngrams.word_hashes([text_D[i] for i in kept])
    held = decontaminate.matches(evaluation(job.evaluation, job.ngram), hash_W, text_W)
    for i in held:
        why_D[kept[i]] = CONTAMINATED
    entry_hash_E, entry_row_E = np.zeros(0, np.uint64), np.zeros(0, np.uint32)
    signature_DxK = np.zeros((count if job.near else 0, dedup.ROWS), np.uint16)
    if job.near:
        hash_G, text_G = ngrams.ngrams(hash_W, text_W, dedup.SHINGLE_WORDS)
        compared = np.setdiff1d(text_G, np.array(list(held), np.int64))  # others are too short
        rows = np.array(row_D, np.uint32)[kept]
        signature_KxK = dedup.signatures(hash_G, text_G, len(kept))
        signature_DxK[rows] = signature_KxK
        hash_E = dedup.band_hashes(signature_KxK[compared]).ravel()
        order_E = np.argsort(hash_E)
        entry_hash_E, entry_row_E = hash_E[order_E], np.repeat(rows[compared], dedup.BANDS)[order_E]
    reasons = verdicts(job)
    verdict_D = np.zeros(count, np.uint8)
    verdict_D[row_D] = [reasons.index(why) for why in why_D]
    found = {str(row_D[kept[i]]): counts for i, counts in held.items()}
    arrays: dict[str, np.ndarray] = {
        "verdict": verdict_D,
        "signature": signature_DxK,
        "band_hash": entry_hash_E,
        "band_row": entry_row_E,
    }
    artifacts.write(
        job.work / "measure" / name, arrays, {"held": found, "documents": count, "entries": len(entry_hash_E)}
    )


# Match ----------------------------------------------------------------------------------------------------------------


def match_ranges(job: Job) -> list[tuple[int, int]]:
    """(number, count) of the ranges that hashes are split into."""
    infos = [artifacts.info(job.work / "measure" / name) for name in blocks(job)]
    largest = max(sum(info[key] for info in infos) for key in ("documents", "entries"))
    count = max(1, -(-largest // _MATCH_ENTRIES))
    return [(number, count) for number in range(count)]


def match(job: Job, part: tuple[int, int]) -> None:
    """Finds exact and near duplicates of earlier documents, in one range of hashes.

    Its folder has, sorted by key: key, id, of_id and of (id and source of the earlier document), and similarity (`SAME`
    for exact duplicates).
    """
    number, count = part
    low, high = number * KEYS // count, (number + 1) * KEYS // count
    id_N, of_N, similarity_N = _same_content(job, low, high)
    if job.near:
        near = dedup.near_duplicates(*_entries(job, low, high), lambda ids: rows_of(job, "signature", ids), job.near)
        id_N, of_N = np.concatenate([id_N, near.id_P]), np.concatenate([of_N, near.of_P])
        similarity_N = np.concatenate([similarity_N, near.similarity_P])
    key_N = rows_of(job, "key", id_N)
    order = np.lexsort((id_N, key_N))
    arrays = {"key": key_N, "id": id_N, "of_id": of_N, "of": rows_of(job, "source", of_N), "similarity": similarity_N}
    artifacts.write(job.work / "match" / f"{number:08}", {name: x[order] for name, x in arrays.items()}, {})


def span(folder: Path, low: int, high: int) -> tuple[int, int]:
    """Places of the documents of a block with keys in [low, high), in the order of keys."""
    key_D = artifacts.array(folder, "key")[artifacts.array(folder, "row")]
    return places(key_D, low, high)


def places(sorted_N: np.ndarray, low: int, high: int) -> tuple[int, int]:
    """First and (exclusive) last place of the values in [low, high); `high` may be 2^64, which uint64 cannot hold."""
    first = int(np.searchsorted(sorted_N, np.uint64(low)))
    return first, len(sorted_N) if high == KEYS else int(np.searchsorted(sorted_N, np.uint64(high)))


def _same_content(job: Job, low: int, high: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids of exact duplicates, ids of the first document of the same content, `SAME` for each) of keys in [low, high).

    Documents that a filter dropped are included: all documents of the same content were dropped with them.
    """
    columns = []
    for number, name in enumerate(blocks(job)):
        folder = job.work / "read" / name
        row_D = artifacts.array(folder, "row")[slice(*span(folder, low, high))]
        key_D, rest_D = (artifacts.array(folder, column)[row_D] for column in ("key", "rest"))
        columns.append((key_D, rest_D, _ids(number, row_D)))
    key_N, rest_N, id_N = (np.concatenate(column) for column in zip(*columns, strict=True))
    order = np.lexsort((id_N, rest_N, key_N))
    key_N, rest_N, id_N = key_N[order], rest_N[order], id_N[order]
    is_first_N = np.ones(len(id_N), bool)
    is_first_N[1:] = (key_N[1:] != key_N[:-1]) | (rest_N[1:] != rest_N[:-1])
    first_N = id_N[np.flatnonzero(is_first_N)][np.cumsum(is_first_N) - 1] if len(id_N) else id_N
    return id_N[~is_first_N], first_N[~is_first_N], np.full(np.count_nonzero(~is_first_N), SAME, np.float32)


def _entries(job: Job, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
    """(hash, id) of the bands with hashes in [low, high), uint64 [E] each."""
    hashes, ids = [], []
    for number, name in enumerate(blocks(job)):
        folder = job.work / "measure" / name
        hash_E = artifacts.array(folder, "band_hash")
        here = slice(*places(hash_E, low, high))
        hashes.append(np.array(hash_E[here]))
        ids.append(_ids(number, artifacts.array(folder, "band_row")[here]))
    return np.concatenate(hashes), np.concatenate(ids)


def _ids(block: int, row_D: np.ndarray) -> np.ndarray:
    return (np.uint64(block) << np.uint64(32)) + row_D.astype(np.uint64)


def rows_of(job: Job, column: str, id_N: np.ndarray) -> np.ndarray:
    """A column of the documents with these ids, from any blocks."""
    stage = "measure" if column == "signature" else "read"
    block_N, row_N = id_N >> np.uint64(32), (id_N & np.uint64(2**32 - 1)).astype(np.int64)
    order = np.argsort(block_N, kind="stable")
    names, found = blocks(job), []
    for at in np.split(order, np.flatnonzero(np.diff(block_N[order])) + 1):
        name = names[int(block_N[at[0]]) if len(at) else 0]
        found.append(artifacts.array(job.work / stage / name, column)[row_N[at]])
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return np.concatenate(found)[back]
