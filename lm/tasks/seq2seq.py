"""Rows of an encoder-decoder: a text and its translation, or a text with holes and what was there."""

from collections import Counter

import numpy as np

from lm.config import Config
from lm.data.example import Columns, Example, Task, field_texts, sequence_columns, shifted
from lm.data.record import Record
from lm.data.tokenizer import Tokenizer
from lm.tasks import corrupt


def columns(cfg: Config) -> Columns:
    """Inputs of data.seq_len positions, and what the decoder reads and predicts of data.target_len."""
    names = ("inputs", "input_segment_ids", "input_positions")
    decoder = sequence_columns(("tokens", "targets", "loss_weights"), corrupt.target_len(cfg))
    return decoder | {name: ((cfg.data.seq_len,), np.int32) for name in names}


def source_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """What the encoder reads of a text: its ids and EOS."""
    return [*tokenizer.encode(text), tokenizer.eos_id]


def translation(record: Record, tokenizer: Tokenizer, cfg: Config, counts: Counter[str]) -> list[Example]:
    """A text and its translation, all of which is trained on. Worked, ids a b of the text and x y of its translation:

        inputs   a b EOS
        tokens   BOS x y
        targets  x y EOS

    Longer than its row: the end is cut, before EOS (counted: source_cut, target_cut), or with data.overlong=drop the
    pair is left out (dropped_overlong).
    """
    inputs = source_ids(record["text"], tokenizer)
    target = source_ids(record["target"], tokenizer)
    cut = {"source_cut": len(inputs) > cfg.data.seq_len, "target_cut": len(target) > corrupt.target_len(cfg)}
    if any(cut.values()) and cfg.data.overlong == "drop":
        counts["dropped_overlong"] += 1
        return []
    counts.update(name for name, is_cut in cut.items() if is_cut)
    inputs = [*inputs[: min(len(inputs), cfg.data.seq_len) - 1], tokenizer.eos_id]
    target = [*target[: min(len(target), corrupt.target_len(cfg)) - 1], tokenizer.eos_id]
    encoder = {
        "inputs": np.array(inputs, np.int32),
        "input_segment_ids": np.ones(len(inputs), np.int32),
        "input_positions": np.arange(len(inputs), dtype=np.int32),
    }
    return [Example(encoder | shifted([tokenizer.bos_id, *target], [True] * (1 + len(target))))]


def raw_text(record: Record, tokenizer: Tokenizer, cfg: Config, counts: Counter[str]) -> list[Example]:
    """The text and EOS, from which `corrupt.span_corruption` hides spans; longer than its row, it is cut in pieces."""
    ids = tokenizer.encode(record["text"])
    if not ids:
        counts["dropped_empty"] += 1
        return []
    tokens, limit = np.array([*ids, tokenizer.eos_id], np.int32), corrupt.raw_len(cfg)
    if len(tokens) <= limit or cfg.data.packing == "concat":
        return [Example({"tokens": tokens})]
    counts["cut_in_pieces"] += 1
    return [Example({"tokens": tokens[start : start + limit]}) for start in range(0, len(tokens), limit)]


TRANSLATION = Task(("text", "target"), translation, columns, field_texts("text", "target"), prompt=source_ids)
SPAN_CORRUPTION = Task(
    ("text",),
    raw_text,
    lambda cfg: sequence_columns(("tokens",), corrupt.raw_len(cfg)),
    field_texts("text"),
    corrupt.span_corruption,
    columns,
    prompt=source_ids,
)
