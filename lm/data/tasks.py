"""Every task by its name in `data.task`: how records become the rows that an objective reads."""

from lm.data import examples, labelled
from lm.data.examples import Task

TASKS: dict[str, Task] = {
    "text": examples.TEXT,
    "chat": examples.CHAT,
    "sentences": labelled.LABELLED,
    "scored_sentences": labelled.SCORED,
}
