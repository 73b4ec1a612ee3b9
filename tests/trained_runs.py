"""A small trained run, for tests of what stands in its folder."""

from pathlib import Path

from lm import train
from lm.config import Config
from tests import toys


def recipe(folder: Path) -> Config:
    """Of a run with a checkpoint and an evaluation each 2 steps; all checkpoints are kept."""
    data = folder / "texts"
    return toys.recipe(
        data if data.exists() else toys.write_texts(data),
        train__total_steps=6,
        eval__every_steps=2,
        checkpoint__every_steps=2,
        checkpoint__keep_latest=4,
    )


def trained(folder: Path) -> Path:
    """The run."""
    train.train(recipe(folder), folder / "run")
    return folder / "run"
