"""Sentences, one or a pair, with a label or a score: classification, regression, and pairs to tell apart."""

from collections import Counter

import numpy as np

from lm.config import Config
from lm.config.schema import nearest
from lm.data import labels
from lm.data.example import Columns, Example, Task, field_texts, one_label, sequence_columns
from lm.data.record import DataError, Record
from lm.data.tokenizer import Tokenizer


def encode_pair(
    first: str, second: str | None, tokenizer: Tokenizer, seq_len: int, counts: Counter[str]
) -> dict[str, np.ndarray]:
    """[CLS] first [SEP], or [CLS] first [SEP] second [SEP]; BOS stands for [CLS] and EOS for [SEP].

    Longer than `seq_len`: the longer of the two loses its end, one id after the other, counted as 'sentence_cut'.

    Returns:
      tokens and type_ids, int32 [n], n at most seq_len; type_ids are 1 from the second sentence on.
    """
    a = tokenizer.encode(first)
    b = tokenizer.encode(second) if second is not None else []
    room = seq_len - (2 if second is None else 3)
    excess = len(a) + len(b) - room
    if excess > 0:
        counts["sentence_cut"] += 1
        # The longer one gives first what it has more than the other, then both give alike.
        keep_a = min(len(a), max(room - len(b), (room + 1) // 2))
        a, b = a[:keep_a], b[: room - keep_a]
    ids = [tokenizer.bos_id, *a, tokenizer.eos_id]
    types = [0] * len(ids)
    if second is not None:
        ids += [*b, tokenizer.eos_id]
        types += [1] * (len(b) + 1)
    return {"tokens": np.array(ids, np.int32), "type_ids": np.array(types, np.int32)}


def label_index(label: str, record: Record, cfg: Config) -> int:
    """The place of a label in `data.labels`. Raises DataError, naming the record, for one that is not there."""
    if label not in cfg.data.labels:
        expected = ", ".join(cfg.data.labels)
        raise DataError(
            f"{record['source']}: unknown label {label!r}{nearest(label, cfg.data.labels)}; data.labels has {expected}"
        )
    return cfg.data.labels.index(label)


def labelled(record: Record, tokenizer: Tokenizer, cfg: Config, counts: Counter[str]) -> list[Example]:
    """A sentence or a pair with the index of its label."""
    columns = encode_pair(record["text"], record.get("text_pair"), tokenizer, cfg.data.seq_len, counts)
    return [Example(columns | {"labels": np.array(label_index(record["label"], record, cfg), np.int32)})]


def scored(record: Record, tokenizer: Tokenizer, cfg: Config, counts: Counter[str]) -> list[Example]:
    """A sentence or a pair with a number. Raises DataError, naming the record, where it is not a finite one."""
    score = labels.number(record["label"])
    if np.isnan(score):
        raise DataError(f"{record['source']}: found the label {record['label']!r}; expected a finite number")
    columns = encode_pair(record["text"], record.get("text_pair"), tokenizer, cfg.data.seq_len, counts)
    return [Example(columns | {"labels": np.array(score, np.float32)})]


def _columns(cfg: Config, label: type) -> Columns:
    return sequence_columns(("tokens", "type_ids"), cfg.data.seq_len) | {"labels": ((), label)}


_TEXTS = field_texts("text", "text_pair")
LABELLED = Task(("text", "label"), labelled, lambda cfg: _columns(cfg, np.int32), _TEXTS, lacks=one_label)
SCORED = Task(("text", "label"), scored, lambda cfg: _columns(cfg, np.float32), _TEXTS, lacks=one_label)
