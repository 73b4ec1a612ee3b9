"""Every task by its name in `data.task`: how records become the rows that an objective reads."""

from lm.config import Config
from lm.data import corrupt, examples, images, labelled, span_qa, tagging
from lm.data.examples import Columns, Task, field_texts, sequence_columns, shifted_columns


def _whole_columns(cfg: Config) -> Columns:
    return sequence_columns(("tokens",), cfg.data.seq_len)


TASKS: dict[str, Task] = {
    "text": examples.TEXT,
    "chat": examples.CHAT,
    "masked_text": Task(
        ("text",), examples.whole_text, _whole_columns, field_texts("text"), corrupt.mask_tokens, shifted_columns
    ),
    "sentences": labelled.LABELLED,
    "scored_sentences": labelled.SCORED,
    "tagging": tagging.TAGGING,
    "entities": tagging.ENTITIES,
    "span_qa": span_qa.SPAN_QA,
    "images": images.LABELLED_IMAGES,
    "masked_images": images.MASKED_IMAGES,
    "image_pairs": images.IMAGE_PAIRS,
}
