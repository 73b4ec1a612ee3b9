"""The tasks by name, and configs whose `task` section holds the options of one of them."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from lm import config
from lm.config import Config, older, schema
from lm.config.schema import ConfigError
from lm.tasks.base import Task
from lm.tasks.chat import CHAT
from lm.tasks.classification import CLASSIFICATION, REGRESSION
from lm.tasks.images import CONTRASTIVE_IMAGES, IMAGE_CLASSIFICATION, MASKED_AUTOENCODING
from lm.tasks.language_modelling import CAUSAL_LM, PREFIX_LM
from lm.tasks.masked_lm import MASKED_LM, MASKED_LM_PAIRS
from lm.tasks.multitask import MULTITASK
from lm.tasks.preferences import PREFERENCES
from lm.tasks.prompting import PROMPTING
from lm.tasks.recommendation import MASKED_ITEM, NEXT_ITEM
from lm.tasks.sentence_embeddings import CONTRASTIVE_PAIRS, CONTRASTIVE_SENTENCES, CONTRASTIVE_TRIPLES
from lm.tasks.seq2seq import SPAN_CORRUPTION, TRANSLATION
from lm.tasks.span_qa import SPAN_QA
from lm.tasks.tagging import ENTITIES, TAGGING

_TASKS: tuple[Task, ...] = (
    *(CAUSAL_LM, PREFIX_LM, CHAT, PREFERENCES),
    *(MASKED_LM, MASKED_LM_PAIRS),
    *(SPAN_CORRUPTION, TRANSLATION),
    *(CONTRASTIVE_SENTENCES, CONTRASTIVE_PAIRS, CONTRASTIVE_TRIPLES),
    *(CLASSIFICATION, REGRESSION, MULTITASK, PROMPTING),
    *(TAGGING, ENTITIES, SPAN_QA),
    *(MASKED_AUTOENCODING, CONTRASTIVE_IMAGES, IMAGE_CLASSIFICATION),
    *(NEXT_ITEM, MASKED_ITEM),
)
TASKS: dict[str, Task] = {task.name: task for task in _TASKS}
assert len(TASKS) == len(_TASKS), "two tasks have one name"
_OPTIONS = {name: task.options for name, task in TASKS.items()}


def task_of(cfg: Config) -> Task:
    """The task that `task.name` names."""
    return TASKS[cfg.task.name]


def task_config(name: str, **options: Any) -> Any:
    """The section `task` of a recipe, as a `ConfigDict`: a task's options, with defaults for those not given.

    Raises:
      ConfigError: there is no such task or option.
    """
    if name not in TASKS:
        raise ConfigError(f"no task '{name}'{schema.nearest(name, TASKS)}; there are {', '.join(TASKS)}")
    section = schema.build_section(TASKS[name].options, {"name": name, **options}, "task.")
    return ConfigDict(schema.to_dict(section))


def default_config(name: str = "causal_lm") -> Any:
    """The default config of a task as a `ConfigDict` with every key; recipes start from it.

    Raises:
      ConfigError: there is no such task.
    """
    defaults = ConfigDict(schema.to_dict(Config()))
    defaults.task = task_config(name)
    return defaults


def build_config(source: Mapping[str, Any]) -> Config:
    """Builds a `Config` strictly from a `ConfigDict` or nested dict. Raises ConfigError, as `lm.config.build`."""
    return config.build(source, _OPTIONS)


def build_saved_config(source: Mapping[str, Any]) -> Config:
    """The `Config` that a run of this or an older version saved as JSON."""
    known = {name: tuple(schema.keys(options)) for name, options in _OPTIONS.items()}
    return build_config(older.upgrade(source, known))
