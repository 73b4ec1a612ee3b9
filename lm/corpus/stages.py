"""From files of records to what is kept of them: read, measure, match; each a function of one unit of work.

A unit's output is a folder of arrays (`lm.corpus.artifacts`) below JOB/work. It is a function of the job alone: units
may run anywhere, in any order, any number of times, and leave the same bytes.

- `read`: files -> blocks of documents of bounded size, each sorted by the hash of its content.
- `measure`: a block -> what the filters and the evaluation files say of each document, its signature and its bands.
- `match`: a range of hashes -> the documents whose content or band an earlier one has.

A document's id is the number of its block and its row there: an earlier document has a smaller id. Shape letters:
D documents of a block, E entries (a band of a document each), N documents that are found.
"""

import dataclasses
import functools
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from etils import epath

from lm.config import Config
from lm.corpus import artifacts, decontaminate, dedup, filters, ngrams
from lm.data import splits
from lm.data.readers import paths, registry
from lm.data.record import DataError, Fault, NotRead, Record

PARTS = ("valid", "train")
SAME = 2.0  # stands for the similarity of documents whose content is the same
KEYS = 2**64  # a key is the first 8 bytes of a content's sha256; those below eval_fraction * KEYS are held out
CONTAMINATED, EXACT, NEAR = "contaminated", "exact_duplicate", "near_duplicate"
MOST_BYTES = 1 << 24  # of a document
_BLOCK_NAME = re.compile(r"\d{8}-\d{8}")  # group of files, and which of its blocks
_BLOCK_DOCUMENTS = 1 << 15
_MATCH_ENTRIES = 1 << 19  # bands in a range of hashes: bounds the memory of `match`


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be prepared, and how.

    Attributes:
      folder: where to.
      cfg: the recipe: where the records are (`data.*`), what rows they become, which tokenizer.
      num_groups: groups of files that `read` takes, those of data.eval_path first.
      held_groups: how many of them are of data.eval_path.
      evaluation: evaluation files whose text no document may hold.
      ngram: words in common that make a document hold such text.
      filters: names of `lm.corpus.filters.FILTERS`.
      near: least similarity of near duplicates; 0 = they are kept.
      block_bytes, shard_bytes: of text, at most, in a block and a shard.
    """

    folder: Path
    cfg: Config
    num_groups: int
    held_groups: int
    evaluation: tuple[str, ...]
    ngram: int
    filters: tuple[str, ...]
    near: float
    block_bytes: int
    shard_bytes: int

    @property
    def work(self) -> Path:
        return self.folder / "work"


def blocks(job: Job) -> list[str]:
    """Names of all blocks that were read, in the order of their ids."""
    return sorted(path.name for path in (job.work / "read").iterdir() if _BLOCK_NAME.fullmatch(path.name))


def blocks_of_part(job: Job, part: str) -> list[tuple[int, str]]:
    """(number, name) of the blocks that have documents of a part: all, but where data.eval_path says which."""
    numbered = list(enumerate(blocks(job)))
    if not job.held_groups:
        return numbered
    is_held = {name: int(name.partition("-")[0]) < job.held_groups for _, name in numbered}
    return [(at, name) for at, name in numbered if is_held[name] == (part == "valid")]


def keys_of_part(job: Job, part: str) -> tuple[int, int]:
    """The range [low, high) of keys that documents of a part have, in its blocks."""
    if job.held_groups:
        return 0, KEYS
    held = int(job.cfg.data.eval_fraction * KEYS)
    return (0, held) if part == "valid" else (held, KEYS)


# Read -----------------------------------------------------------------------------------------------------------------


def group_units(units: Iterable[registry.Unit], most_bytes: int) -> list[list[registry.Unit]]:
    """Consecutive units, put together while their files have at most `most_bytes`: many small files are one group."""
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
    """Reads (number, units) into blocks, one after the other.

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
    """Raises DataError where there are more than `most`, naming the last one."""
    if len(faults) > most:
        kind, where, message = faults[-1]
        raise DataError(
            f"{where}: {kind}: {message} (more than data.max_bad_records={most}; a larger one leaves such records out, "
            "counted and listed)"
        )


def _normalise(record: Record) -> Record | Fault:
    """The record with its text in composed Unicode (NFC) and without white space around; itself if it is so already."""
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
    # As runs that read raw text do, so that they hold the same documents out.
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
    """(row, text) of the documents of a block from place `first` to `last`, in the order of keys."""
    row_D, size_D, text = (artifacts.array(folder, name) for name in ("row", "size", "text"))
    end_D = np.cumsum(size_D[row_D], dtype=np.int64)
    for row, end in zip(row_D[first:last].tolist(), end_D[first:last].tolist(), strict=True):
        if is_wanted(row):
            yield row, text[end - int(size_D[row]) : end].tobytes().decode()


# Measure --------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def evaluation(files: tuple[str, ...], ngram: int) -> decontaminate.Evaluation:
    """The evaluation files' n-grams, read once a process."""
    return decontaminate.read([epath.Path(file) for file in files], ngram)


def verdicts(job: Job) -> list[str]:
    """Why a document goes, by the number that `measure` gives: '' = it stays."""
    return ["", *job.filters, CONTAMINATED]


def measure(job: Job, name: str) -> None:
    """What is to be known of each document of a block: why it goes ('' = it stays), signature, bands."""
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
        compared = np.setdiff1d(text_G, np.array(list(held), np.int64))  # the others have too few words
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
    """Of one range of hashes: documents of which an earlier one has the content, or is much like them.

    Its folder has, sorted by key: key, id, of (what the earlier one is called in messages), similarity (`SAME`: the
    content is).
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
    """Where the documents of a block whose keys are in [low, high) are, in the order of keys."""
    key_D = artifacts.array(folder, "key")[artifacts.array(folder, "row")]
    return places(key_D, low, high)


def places(sorted_N: np.ndarray, low: int, high: int) -> tuple[int, int]:
    """Where the values in [low, high) are; `high` may be 2^64, which uint64 cannot hold."""
    first = int(np.searchsorted(sorted_N, np.uint64(low)))
    return first, len(sorted_N) if high == KEYS else int(np.searchsorted(sorted_N, np.uint64(high)))


def _same_content(job: Job, low: int, high: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids, ids of the first document of the same content, `SAME` for each; of keys in [low, high).

    Those that a filter dropped are among them: what has the same content was dropped with them."""
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
    """(hash, id) of the bands in [low, high), uint64 [E] each."""
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
    """A column of documents, which may be of any blocks."""
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
