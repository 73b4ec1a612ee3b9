"""Documents to pairs of neighbouring stretches, of which `lm.tasks.corrupt.masked_pairs` makes what BERT reads."""

import re
from collections import Counter

import numpy as np

from lm.config import Config
from lm.data import splits
from lm.data.example import Columns, Example, Rows, Task, field_texts, sequence_columns, shifted_columns
from lm.data.record import Record
from lm.data.tokenizer import Tokenizer
from lm.tasks import corrupt

_BETWEEN_SENTENCES = re.compile(r"(?<=[.!?])(?=\s)|(?<=\n)(?=[^\n])")  # nothing is lost: white space begins the next


def neighbours(record: Record, tokenizer: Tokenizer, cfg: Config, counts: Counter[str]) -> list[Example]:
    """Consecutive sentences that fit a row with [CLS] and two [SEP], split in two where A and B are closest in length.

    A sentence ends at . ! ? and white space, or at a new line. One that is longer than a row loses its end (counted:
    sentence_cut); one that no other fits beside has no neighbour (dropped_single).

    Returns:
      Columns tokens, A then B; type_ids, 0 in A and 1 in B; document, a hash of the content: equal texts are one
      document.
    """
    room = cfg.data.seq_len - corrupt.PAIR_SPECIALS
    document = np.array(int.from_bytes(splits.digest(record)[:4]) & 0x7FFFFFFF, np.int32)
    groups: list[list[list[int]]] = [[]]
    for sentence in _BETWEEN_SENTENCES.split(record["text"]):
        # Each begins with white space: else the first of a document would tell where it belongs.
        ids = tokenizer.encode(sentence if sentence[:1].isspace() else f" {sentence}")
        if len(ids) > room:
            counts["sentence_cut"] += 1
        if sum(map(len, groups[-1])) + len(ids) > room:
            groups.append([])
        groups[-1].append(ids[:room])
    made = []
    for group in groups:
        ends = np.cumsum([len(ids) for ids in group])
        if len(group) < 2:
            counts["dropped_single"] += len(group)
            continue
        middle = int(ends[np.argmin(np.abs(2 * ends[:-1] - ends[-1]))])
        tokens = np.array([token for ids in group for token in ids], np.int32)
        types = (np.arange(len(tokens)) >= middle).astype(np.int32)
        made.append(Example({"tokens": tokens, "type_ids": types, "document": document}))
    return made


def _stored(cfg: Config) -> Columns:
    return sequence_columns(("tokens", "type_ids"), cfg.data.seq_len) | {"document": ((), np.int32)}


def _batch(cfg: Config) -> Columns:
    return shifted_columns(cfg) | {"type_ids": ((cfg.data.seq_len,), np.int32), "labels": ((), np.int32)}


def _lacks(rows: Rows, cfg: Config) -> str:
    if cfg.corrupt.pairs == "next" and len(np.unique(rows["document"])) < 2:
        return "all rows are of one document, so that no pair can have its B from another one; expected two or more"
    return ""


MASKED_PAIRS = Task(
    ("text",),
    neighbours,
    _stored,
    field_texts("text"),
    corrupt.masked_pairs,
    _batch,
    draws_other=True,
    lacks=_lacks,
)
