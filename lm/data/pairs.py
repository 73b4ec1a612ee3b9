"""Two stretches of a document to tell apart (BERT, ALBERT), and sentences to tell from other sentences (SimCSE)."""

import zlib
from collections import Counter

import numpy as np

from lm.config import Config
from lm.data import corrupt
from lm.data.examples import Columns, Example, Task, field_texts, sequence_columns, shifted_columns
from lm.data.labelled import encode_pair
from lm.data.records import Record
from lm.data.tokenizer import Tokenizer

_SPECIALS = 3  # [CLS] A [SEP] B [SEP]


def stretches(record: Record, tokenizer: Tokenizer, cfg: Config, counts: Counter[str]) -> list[Example]:
    """A document in pieces of seq_len - 3 tokens, each cut in halves A and B; `corrupt.masked_pairs` does the rest.

    A last piece of fewer than two tokens has no halves: it is left out, counted as 'dropped_short'.
    """
    ids = np.array(tokenizer.encode(record["text"]), np.int32)
    size = cfg.data.seq_len - _SPECIALS
    document = np.array(zlib.crc32(record["text"].encode()) & 0x7FFFFFFF, np.int32)
    made = []
    for start in range(0, len(ids), size):
        piece = ids[start : start + size]
        if len(piece) < 2:
            counts["dropped_short"] += 1
            continue
        types = (np.arange(len(piece)) >= (len(piece) + 1) // 2).astype(np.int32)
        made.append(Example({"tokens": piece, "type_ids": types, "document": document}))
    return made


def _stretch_columns(cfg: Config) -> Columns:
    return sequence_columns(("tokens", "type_ids"), cfg.data.seq_len) | {"document": ((), np.int32)}


def _masked_pair_columns(cfg: Config) -> Columns:
    return shifted_columns(cfg) | {"type_ids": ((cfg.data.seq_len,), np.int32), "labels": ((), np.int32)}


MASKED_PAIRS = Task(
    ("text",),
    stretches,
    _stretch_columns,
    field_texts("text"),
    corrupt.masked_pairs,
    _masked_pair_columns,
    needs_other=True,
)


def _views(fields: tuple[str, ...]) -> Task:
    """Sentences of one record side by side, [n, L] each: anchor, what is alike, and what only seems to be."""

    def make(record: Record, tokenizer: Tokenizer, cfg: Config, counts: Counter[str]) -> list[Example]:
        rows = [encode_pair(record[field], None, tokenizer, cfg.data.seq_len, counts)["tokens"] for field in fields]
        length = max(map(len, rows))
        tokens = np.stack([np.pad(row, (0, length - len(row))) for row in rows])
        real = np.stack([np.arange(length) < len(row) for row in rows])
        return [
            Example(
                {
                    "tokens": tokens,
                    "segment_ids": real.astype(np.int32),
                    "positions": (np.arange(length) * real).astype(np.int32),
                }
            )
        ]

    def columns(cfg: Config) -> Columns:
        shape = (len(fields), cfg.data.seq_len)
        return {name: (shape, np.int32) for name in ("tokens", "segment_ids", "positions")}

    return Task(fields, make, columns, field_texts(*fields))


# data.task -> what an anchor is compared with: itself under other dropout, its pair, its pair and a hard negative.
SENTENCE_TASKS: dict[str, Task] = {
    "lone_sentences": _views(("text",)),
    "sentence_pairs": _views(("text", "text_pair")),
    "sentence_triples": _views(("text", "text_pair", "negative")),
}
