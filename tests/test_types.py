"""lm/types.py: what a batch may hold, and that the batches of every task hold it."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from lm.config import Config, ModelConfig
from lm.tasks import TASKS, columns_of_batch
from tests import batch_types, toys

OPTIONS = {
    "prompting": {"labels": ("no", "yes"), "templates": ("{text} {label}",)},
    "multitask": {"labels": ("a/x", "a/y")},
    **{name: {"labels": ("O", "B-X")} for name in ("classification", "image_classification", "tagging", "entities")},
}


@pytest.mark.parametrize("name", TASKS)
def test_columns_of_a_task_are_fields_of_a_batch(name):
    cfg = Config(task=toys.task(name, **OPTIONS.get(name, {})), model=ModelConfig(dropout=0.1))
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, augment=(("flip", 1.0),)))
    columns = columns_of_batch(TASKS[name], cfg)
    batch = {key: jnp.zeros((3, *shape), dtype) for key, (shape, dtype) in columns.items()}
    batch_types.check(batch | {"row_weights": jnp.ones(3), "example_index": jnp.zeros(3, jnp.int32)})


@pytest.mark.parametrize(
    ("key", "array", "says"),
    [
        ("tokens", np.zeros((3, 5), np.float32), r"'tokens'\] is float32\[3, 5\]; expected .*Int32"),
        ("targets", np.zeros((3, 4), np.int32), r"'targets'\] is int32\[3, 4\]"),
        ("row_weights", np.zeros(4, np.float32), r"'row_weights'\] is float32\[4\]"),
        ("token", np.zeros((3, 5), np.int32), "'token'\\] is not named"),
    ],
)
def test_a_wrong_array_of_a_batch_is_seen(key, array, says):
    batch = {"tokens": jnp.zeros((3, 5), jnp.int32)} | {key: jnp.asarray(array)}
    with pytest.raises(TypeError, match=says):
        batch_types.check(batch)
