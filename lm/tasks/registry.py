"""Every task by its name in `data.task`: how records become the rows that an objective reads."""

import numpy as np

from lm.config import Config
from lm.data import example
from lm.data.example import Columns, Task, field_texts, sequence_columns, shifted_columns
from lm.tasks import (
    chat,
    classification,
    corrupt,
    images,
    masked_lm,
    multitask,
    prompting,
    recommendation,
    sentence_embeddings,
    seq2seq,
    span_qa,
    tagging,
)


def _whole_columns(cfg: Config) -> Columns:
    return sequence_columns(("tokens",), cfg.data.seq_len)


def _prefix_columns(cfg: Config) -> Columns:
    return shifted_columns(cfg) | {"is_prefix": ((cfg.data.seq_len,), np.int32)}


TASKS: dict[str, Task] = {
    "text": example.TEXT,
    "chat": chat.CHAT,
    "prefix_text": example.TEXT._replace(corrupt=corrupt.prefix, batch=_prefix_columns),
    "span_corruption": seq2seq.SPAN_CORRUPTION,
    "translation": seq2seq.TRANSLATION,
    "masked_text": Task(
        ("text",), example.whole_text, _whole_columns, field_texts("text"), corrupt.mask_tokens, shifted_columns
    ),
    "masked_pairs": masked_lm.MASKED_PAIRS,
    **sentence_embeddings.SENTENCE_TASKS,
    "sentences": classification.LABELLED,
    "scored_sentences": classification.SCORED,
    "mixed_sentences": multitask.MIXED,
    "prompted": prompting.PROMPTED,
    "tagging": tagging.TAGGING,
    "entities": tagging.ENTITIES,
    "span_qa": span_qa.SPAN_QA,
    "images": images.LABELLED_IMAGES,
    "masked_images": images.MASKED_IMAGES,
    "image_pairs": images.IMAGE_PAIRS,
    "items": recommendation.ITEMS,
    "masked_items": recommendation.MASKED_ITEMS,
}
