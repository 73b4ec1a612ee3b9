"""Which records are held out, and which are kept of many: decided by the sha256 of their content alone."""

import hashlib
import json

import numpy as np

from lm.data.records import DataError, Record


def hold_out(records: list[Record], fraction: float) -> tuple[list[Record], list[Record]]:
    """(train, valid): held out are records whose content's sha256, read as a number in [0, 1), is below `fraction`.

    At least one distinct content falls on each side: the smallest hash is held out, the largest is trained on.

    Raises:
      DataError: fewer than two distinct contents.
    """
    digests = [digest(record) for record in records]
    first, last = min(digests, default=b""), max(digests, default=b"")
    if first == last:
        found = f"{len(records)} records, {len(set(digests))} distinct"
        raise DataError(
            f"cannot hold records out: found {found}; expected two or more distinct ones. Set "
            "data.eval_path or, with data.format=text, data.separator: '' makes one document of each file"
        )
    held = [d == first or (is_below(d, fraction) and d != last) for d in digests]
    pairs = list(zip(records, held, strict=True))
    return [record for record, out in pairs if not out], [record for record, out in pairs if out]


def is_below(digest_of_it: bytes, fraction: float) -> bool:
    """Whether a digest, read as a number in [0, 1), is below `fraction`."""
    return int.from_bytes(digest_of_it[:8]) < int(fraction * 2**64)


def smallest(records: list[Record], count: int) -> list[Record]:
    """The `count` records of the smallest digests, in their order: a smaller number gives a subset of a larger one."""
    chosen = sorted(range(len(records)), key=lambda i: digest(records[i]))[:count]
    return [records[i] for i in sorted(chosen)]


def _content(record: Record) -> bytes:
    """The record as bytes, without where it came from."""
    return json.dumps({k: v for k, v in record.items() if k != "source"}, sort_keys=True, default=_array).encode()


def _array(value: np.ndarray) -> list[str]:
    return [str(value.dtype), str(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]


def digest(record: Record) -> bytes:
    """sha256 of the record's content: of all its fields but where it came from."""
    return hashlib.sha256(_content(record)).digest()


def fingerprint(name: str, *splits: list[Record]) -> str:
    """sha256 hex over the name of the format, the contents of each split and their order."""
    whole = hashlib.sha256(name.encode())
    for records in splits:
        whole.update(b"\0split\0")
        for record in records:
            whole.update(digest(record))
    return whole.hexdigest()
