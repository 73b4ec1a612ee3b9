"""Every task by its name in `data.task`: how records become the rows that an objective reads."""

import numpy as np

from lm.config import Config
from lm.data import (
    chats,
    corrupt,
    examples,
    images,
    items,
    labelled,
    masked_pairs,
    mixtures,
    prompts,
    sentence_views,
    seq2seq,
    span_qa,
    tagging,
)
from lm.data.examples import Columns, Task, field_texts, sequence_columns, shifted_columns


def _whole_columns(cfg: Config) -> Columns:
    return sequence_columns(("tokens",), cfg.data.seq_len)


def _prefix_columns(cfg: Config) -> Columns:
    return shifted_columns(cfg) | {"is_prefix": ((cfg.data.seq_len,), np.int32)}


TASKS: dict[str, Task] = {
    "text": examples.TEXT,
    "chat": chats.CHAT,
    "prefix_text": examples.TEXT._replace(corrupt=corrupt.prefix, batch=_prefix_columns),
    "span_corruption": seq2seq.SPAN_CORRUPTION,
    "translation": seq2seq.TRANSLATION,
    "masked_text": Task(
        ("text",), examples.whole_text, _whole_columns, field_texts("text"), corrupt.mask_tokens, shifted_columns
    ),
    "masked_pairs": masked_pairs.MASKED_PAIRS,
    **sentence_views.SENTENCE_TASKS,
    "sentences": labelled.LABELLED,
    "scored_sentences": labelled.SCORED,
    "mixed_sentences": mixtures.MIXED,
    "prompted": prompts.PROMPTED,
    "tagging": tagging.TAGGING,
    "entities": tagging.ENTITIES,
    "span_qa": span_qa.SPAN_QA,
    "images": images.LABELLED_IMAGES,
    "masked_images": images.MASKED_IMAGES,
    "image_pairs": images.IMAGE_PAIRS,
    "items": items.ITEMS,
    "masked_items": items.MASKED_ITEMS,
}
