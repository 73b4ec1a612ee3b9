"""Tasks: one file each, from the records that the task reads to the scores that it reports."""

from lm.tasks.base import Task, columns_of_batch
from lm.tasks.registry import TASKS, build_config, build_saved_config, default_config, task_config, task_of
