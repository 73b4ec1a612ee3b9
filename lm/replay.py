"""Replay: a run that goes on from another one draws a share of its rows from the other one's data."""

from collections.abc import Callable
from pathlib import Path

from lm import checkpoint, input_pipeline
from lm.checkpoint import CheckpointError, Saved
from lm.config import Config, DataConfig, schema
from lm.config.schema import ConfigError
from lm.data.readers.registry import Split
from lm.data.record import DataError
from lm.tasks import TASKS, base, build_saved_config, task_of


def source(cfg: Config, workdir: Path | None, init: Saved | None) -> DataConfig | None:
    """Where the data of `init_from`'s run is, or None without `data.replay`.

    Args:
      cfg: of the run that goes on.
      workdir: its folder. Once it has begun its own checkpoints say where, so that it needs no other run.
      init: the checkpoint of the other run; None = this run has begun.

    Raises:
      CheckpointError: none of its own checkpoints can be read.
    """
    if not cfg.data.replay:
        return None
    if init:
        other = build_saved_config(init.info["config"]).data
        if other.mixture:
            raise ConfigError(
                f"'data.replay' draws from one source, but {cfg.init_from} was trained on a 'data.mixture'"
            )
        return other
    for saved in reversed(checkpoint.list_saved(workdir) if workdir else []):
        if "unreadable" not in saved.info:
            return schema.build_section(DataConfig, saved.info["replay"], "data.")
    raise CheckpointError(f"none of the checkpoints of {workdir} can be read, which say what 'data.replay' draws from")


def load(
    where: DataConfig | None, cfg: Config, note: Callable[[str], None] = lambda _: None
) -> input_pipeline.Found | None:
    """The records to replay, or None.

    Args:
      where: from `source`.
      cfg: of the run that goes on, whose task must be able to read them.
      note: called with what was read.

    Raises:
      DataError: they are gone.
      ConfigError: the task cannot read them.
    """
    if where is None:
        return None
    place = f"'data.replay': the data of {cfg.init_from}"
    try:
        (found,) = input_pipeline.load(where, task_of(cfg).wanted(cfg))
        if isinstance(found, Split):
            base.check_fields(task_of(cfg), [*found.train, *found.valid], TASKS)
    except DataError as error:
        raise DataError(f"{place}: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from None
    note(f"replayed: {found.report}")
    return found
