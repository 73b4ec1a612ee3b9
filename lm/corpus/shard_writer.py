"""Writes the kept documents as shards: shuffled, tokenized, packed.

The hash of its content decides the part, the shard and the place of a document. So shards do not depend on how
documents were split into files, and each shard is a random sample of all. Shape letters as in `lm.corpus.stages`.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from lm.corpus import artifacts, stages
from lm.corpus.stages import CONTAMINATED, EXACT, NEAR, Job
from lm.data import packing, shards, tokenizer
from lm.data.example import Example
from lm.data.record import DataError

_COUNTED = ("documents", "examples", "cut_in_pieces", "dropped_empty")  # kept in the index
LENGTH_BINS = 32  # of the histogram of document lengths, by powers of 2 tokens


class Documents(NamedTuple):
    """Documents of a range of keys.

    Attributes:
      kept: (key, rest of the hash, text) of each kept document.
      dropped: reason -> [documents, bytes].
      removed: a line of removed.jsonl for each dropped document.
    """

    kept: list[tuple[int, int, str]]
    dropped: dict[str, list[int]]
    removed: list[str]


def shard_names(job: Job) -> list[str]:
    """Names of all shards, each of about `shard_bytes` of text. Raises DataError if a part has no document."""
    names = []
    for part in stages.parts_with_documents(job):
        size = _bytes_of_part(job, part)
        if not size:
            raise DataError(_nothing_left(job, part))
        count = -(-size // job.shard_bytes)
        names += [f"{part}-{number:05}-of-{count:05}" for number in range(count)]
    return names


def _bytes_of_part(job: Job, part: str) -> int:
    """Bytes of the documents of a part that pass the filters, duplicates included."""
    size = 0
    for _, name in stages.blocks_of_part(job, part):
        folder = job.work / "read" / name
        row_D = artifacts.array(folder, "row")[slice(*stages.span(folder, *stages.keys_of_part(job, part)))]
        is_kept_D = artifacts.array(job.work / "measure" / name, "verdict")[row_D] == 0
        size += int(artifacts.array(folder, "size")[row_D[is_kept_D]].sum())
    return size


def _nothing_left(job: Job, part: str) -> str:
    reasons = Counter[str]()
    for name in stages.blocks(job):
        counts = np.bincount(artifacts.array(job.work / "measure" / name, "verdict"))
        reasons.update({why: int(n) for why, n in zip(stages.verdicts(job), counts, strict=False)})
    kept, total = reasons.pop("", 0), reasons.total()
    dropped = ", ".join(f"{why} {n:,}" for why, n in reasons.items() if n) or "none"
    return (
        f"no {part} document is left of {kept + total:,} (dropped: {dropped}); give more data, other --filters, or "
        "another data.eval_fraction"
    )


def documents(job: Job, part: str, number: int, count: int) -> Documents:
    """The documents of range `number` out of `count` equal ranges of a part's keys, sorted by key."""
    first, last = stages.keys_of_part(job, part)
    low, high = (first + (last - first) * n // count for n in (number, number + 1))
    duplicates = _duplicates(job, low, high)
    found = Documents([], {}, [])
    for block, name in stages.blocks_of_part(job, part):
        _add_block(job, block, name, (low, high), duplicates, found)
    found.kept.sort(key=lambda document: document[:2])
    return found


def _duplicates(job: Job, low: int, high: int) -> dict[int, tuple[float, int, str]]:
    """Duplicates with keys in [low, high): id -> largest (similarity, -id, source) of the earlier documents."""
    found: dict[int, tuple[float, int, str]] = {}
    for folder in sorted((job.work / "match").glob("[0-9]*")):
        here = slice(*stages.places(artifacts.array(folder, "key"), low, high))
        columns = [artifacts.array(folder, name)[here].tolist() for name in ("id", "similarity", "of_id", "of")]
        for document, similarity, of_id, of in zip(*columns, strict=True):
            candidate = (similarity, -of_id, of.decode())
            found[document] = max(candidate, found.get(document, candidate))
    return found


def _add_block(
    job: Job,
    block: int,
    name: str,
    keys: tuple[int, int],
    duplicates: Mapping[int, tuple[float, int, str]],
    found: Documents,
) -> None:
    """Adds the documents of a block with keys in [low, high) to `found`."""
    folder, measured = job.work / "read" / name, job.work / "measure" / name
    key_D, rest_D, source_D, size_D = (artifacts.array(folder, column) for column in ("key", "rest", "source", "size"))
    verdict_D, held = artifacts.array(measured, "verdict"), artifacts.info(measured)["held"]
    reasons = stages.verdicts(job)

    def reason_to_drop(row: int) -> dict[str, Any]:
        """Why a document is dropped, with details, as in removed.jsonl; {} = it is kept."""
        if reason := reasons[verdict_D[row]]:
            return {"why": reason} | ({"ngrams": held[str(row)]} if reason == CONTAMINATED else {})
        if duplicate := duplicates.get((block << 32) + row):
            similarity, _, of = duplicate
            is_same = similarity == stages.SAME
            return {"why": EXACT, "of": of} if is_same else {"why": NEAR, "of": of, "similarity": round(similarity, 3)}
        return {}

    def is_kept(row: int) -> bool:
        if reason := reason_to_drop(row):
            count = found.dropped.setdefault(reason["why"], [0, 0])
            count[:] = [count[0] + 1, count[1] + int(size_D[row])]
            line = {"source": bytes(source_D[row]).decode(), **reason}
            found.removed.append(json.dumps(line, ensure_ascii=False) + "\n")
        return not reason

    for row, text in stages.texts_of(folder, *stages.span(folder, *keys), is_kept):
        found.kept.append((int(key_D[row]), int(rest_D[row]), text))


def tokenizer_names(job: Job) -> list[str]:
    """The name of the tokenizer in the folder."""
    return [job.tokenizer_file]


def make_tokenizer(job: Job, name: str) -> None:
    """Writes the tokenizer of the recipe, or one trained on a sample of documents chosen by their hashes."""
    cfg = job.cfg.tokenizer
    if cfg.path:
        vocabulary: tokenizer.Tokenizer = tokenizer.load(cfg.path)
    else:
        sample = documents(job, "train", 0, max(1, _bytes_of_part(job, "train") // cfg.train_bytes))
        vocabulary = tokenizer.train((text for _, _, text in sample.kept), cfg.vocab_size, cfg.train_bytes)
    vocabulary.save(job.folder / name)


def write(job: Job, name: str) -> None:
    """Tokenizes and packs one shard."""
    part, number, _, count = name.split("-")
    found = documents(job, part, int(number), int(count))
    saved: Any = tokenizer.load(tokenizer.find(job.folder))
    vocabulary = dataclasses.replace(saved, extra_ids=job.cfg.tokenizer.extra_ids)
    from lm import input_pipeline, tasks  # import JAX, see `lm.corpus.pipeline`

    task, counts, lengths = tasks.task_of(job.cfg), Counter[str](), np.zeros(LENGTH_BINS, np.int64)

    def make_examples() -> Iterator[Example]:
        for _, _, text in found.kept:
            record = {"text": text, "source": name}
            record_examples = list(input_pipeline.make_examples(task, [record], vocabulary, job.cfg, counts))
            length = sum(len(example.columns["tokens"]) for example in record_examples)
            lengths[min(LENGTH_BINS - 1, length.bit_length())] += 1
            yield from record_examples

    # Whether attention crosses documents is decided when the rows are read.
    rows, _ = packing.pack(
        make_examples(), task.columns(job.cfg), dataclasses.replace(job.cfg.data, mask_documents=True)
    )
    info: dict[str, Any] = {"dropped": found.dropped, "lengths": lengths.tolist(), "entry": None}
    info["bytes"] = sum(len(text.encode()) for _, _, text in found.kept)
    info["documents"] = len(found.kept)
    if len(rows["tokens"]):
        counted = {key: counts[key] for key in _COUNTED} | {"bytes": info["bytes"]}
        info["entry"] = shards.write(job.folder, name, rows, counted)
    removed = np.frombuffer("".join(found.removed).encode(), np.uint8)
    artifacts.write(job.work / "write" / name, {"removed": removed}, info)
