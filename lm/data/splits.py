"""Identity of records and the split into training and held-out ones, both functions of the content alone.

A record's identity serves grouping, scoring and logs; its `source` (file and line) serves messages only.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable

import numpy as np

from lm.data.record import DataError, Record

NOT_CONTENT = ("source", "identity")

# Records that share one of these must be on the same side of a split. The first field that a record has counts.
_GROUPED_BY = {
    "group": "group",  # named by the user, see `data.rename`
    "context": "context",  # questions about one paragraph
    "text": "text",  # the same text with another label, another second text or another translation
    "words": "sentence",
    "messages": "prompt",  # see `_prompt`
    "prompt": "prompt",  # of two answers
    "image": "image",
    "user": "user",
}


def digest(record: Record) -> bytes:
    """sha256 of a record's content: all its fields except its source and identity."""
    return _sha256({field: value for field, value in record.items() if field not in NOT_CONTENT})


def identify(records: Iterable[Record]) -> None:
    """Sets `identity` on every record: a hash of its content, followed by a number for the second and later duplicates.

    The identity depends neither on file names nor on the order of different records, and no two records share one.
    """
    seen: Counter[str] = Counter()
    for record in records:
        content = digest(record)[:12].hex()
        seen[content] += 1
        record["identity"] = content if seen[content] == 1 else f"{content}-{seen[content]}"


def grouping(record: Record) -> str:
    """The name of what the record is grouped by: 'text', 'context', 'user', ..."""
    return next((_GROUPED_BY[field] for field in _GROUPED_BY if field in record), "record")


def group(record: Record) -> bytes:
    """sha256 of what the record is grouped by; records of one group stay on the same side of a split.

    Worked: two questions about one paragraph are one group, and so is one text with two labels, and one prompt with one
    answer or with two: no held-out preference pair has a prompt that a chat model was trained on.
    """
    for field in _GROUPED_BY:
        if field in record:
            shared = _prompt(record[field]) if field == "messages" else record[field]
            return _sha256({"messages" if field == "prompt" else field: shared})
    return digest(record)


def _prompt(messages: list[Record]) -> list[Record]:
    """The messages before the first answer, so that two answers to the same prompt are one group."""
    first = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
    return messages[:first] or messages


def hold_out(records: list[Record], fraction: float) -> tuple[list[Record], list[Record]]:
    """Splits records into (train, valid). A group is held out if its hash is below `fraction`, see `is_below`.

    Each side gets at least one group: the smallest hash is always held out, the largest never.

    Raises:
      DataError: there are fewer than two groups.
    """
    groups = [group(record) for record in records]
    first, last = min(groups, default=b""), max(groups, default=b"")
    if first == last:
        kinds = ", ".join(sorted({grouping(record) for record in records})) or "record"
        raise DataError(
            f"cannot hold records out: found {len(records):,} records, {len(set(groups))} distinct (by {kinds}); "
            "expected two or more distinct ones. Set data.eval_path or, with data.format=text, data.separator: '' "
            "makes one document of each file"
        )
    held = [g == first or (is_below(g, fraction) and g != last) for g in groups]
    pairs = list(zip(records, held, strict=True))
    return [record for record, out in pairs if not out], [record for record, out in pairs if out]


def describe_groups(train: list[Record], valid: list[Record]) -> str:
    """A line for the report: what records were grouped by, and how many groups each side has."""
    kinds = sorted({grouping(record) for record in (*train, *valid)})
    sizes = [len({group(record) for record in records}) for records in (train, valid)]
    return f"split by {', '.join(kinds)}: {sizes[0]:,} distinct to train on, {sizes[1]:,} held out"


def is_below(digest_of_it: bytes, fraction: float) -> bool:
    """Whether a digest, read as a number in [0, 1), is below `fraction`."""
    return int.from_bytes(digest_of_it[:8]) < int(fraction * 2**64)


def smallest(records: list[Record], count: int) -> list[Record]:
    """The `count` records with the smallest digests, in their order, so that a smaller count gives a subset."""
    chosen = sorted(range(len(records)), key=lambda i: digest(records[i]))[:count]
    return [records[i] for i in sorted(chosen)]


def fingerprint(name: str, *splits: list[Record]) -> str:
    """sha256 (hex) of the name of the format and of the records of each split, in order."""
    whole = hashlib.sha256(name.encode())
    for records in splits:
        whole.update(b"\0split\0")
        for record in records:
            whole.update(digest(record))
    return whole.hexdigest()


def _sha256(fields: Record) -> bytes:
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=_array).encode()).digest()


def _array(value: np.ndarray) -> list[str]:
    return [str(value.dtype), str(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
