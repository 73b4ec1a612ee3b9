"""Tasks: one file each, with all that it needs from the records it reads to the scores it reports."""

from lm.tasks.base import Task, columns_of_batch
from lm.tasks.registry import TASKS, build_config, build_saved_config, default_config, task_config, task_of
