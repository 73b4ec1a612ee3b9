"""Sentences side by side, to tell what belongs together from all else (SimCSE, Gao et al. 2021)."""

from collections import Counter

import numpy as np

from lm.config import Config
from lm.config.schema import ConfigError
from lm.data.example import Columns, Example, Rows, Task, field_texts
from lm.data.record import Record
from lm.data.tokenizer import Tokenizer
from lm.tasks.classification import encode_pair


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
        if len(fields) == 1 and not cfg.model.dropout:
            raise ConfigError(f"'data.task' {cfg.data.task} compares two dropout masks, but 'model.dropout' is 0")
        shape = (len(fields), cfg.data.seq_len)
        return {name: (shape, np.int32) for name in ("tokens", "segment_ids", "positions")}

    def lacks(rows: Rows, cfg: Config) -> str:
        tokens_RxnxL = rows["tokens"]
        if (tokens_RxnxL[:, 0] == tokens_RxnxL[:1, 0]).all():
            return "all rows have the same sentence, so that there is nothing to tell it from; expected two or more"
        if len(fields) > 1 and (tokens_RxnxL[:, 0] == tokens_RxnxL[:, 1]).all():
            return "'text' and 'text_pair' are equal in every row; expected two different sentences"
        return ""

    return Task(fields, make, columns, field_texts(*fields), lacks=lacks)


# data.task -> what an anchor is compared with: itself under other dropout, its pair, its pair and a hard negative.
SENTENCE_TASKS: dict[str, Task] = {
    "lone_sentences": _views(("text",)),
    "sentence_pairs": _views(("text", "text_pair")),
    "sentence_triples": _views(("text", "text_pair", "negative")),
}
