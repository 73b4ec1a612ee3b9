"""Replay: a run that starts from another run's parameters draws a share of its rows from that run's data."""

from collections.abc import Callable
from pathlib import Path

from lm import checkpoint, input_pipeline
from lm.checkpoint import CheckpointError, init_from
from lm.config import Config, DataConfig, older, schema
from lm.config.schema import ConfigError
from lm.data.readers.registry import Split
from lm.data.record import DataError
from lm.tasks import TASKS, base, build_saved_config, task_of


def source(cfg: Config, workdir: Path | None, init: init_from.Source | None) -> DataConfig | None:
    """The data to replay, as the earlier run's config describes it; None without `data.replay`.

    Args:
      cfg: config of the new run.
      workdir: the new run's folder. Once the run has begun, its own checkpoints describe the replayed data, so that the
        earlier run is no longer needed.
      init: the checkpoint of the earlier run; None if the new run has begun.

    Raises:
      ConfigError: the earlier run was trained on a mixture, or is a published model.
      CheckpointError: none of the new run's own checkpoints can be read.
    """
    if not cfg.data.replay:
        return None
    if init:
        if "config" not in init.info:
            raise ConfigError(f"'data.replay' draws from a run's data, but {cfg.init_from} is a published model")
        other = build_saved_config(init.info["config"]).data
        if other.mixture:
            raise ConfigError(
                f"'data.replay' draws from one source, but {cfg.init_from} was trained on a 'data.mixture'"
            )
        return other
    for saved in reversed(checkpoint.list_saved(workdir) if workdir else []):
        if "unreadable" not in saved.info:
            return schema.build_section(DataConfig, older.upgrade_data(saved.info["replay"]), "data.")
    raise CheckpointError(
        f"none of the checkpoints of {workdir} can be read, but they describe the data of 'data.replay': restore one"
    )


def load(
    data_cfg: DataConfig | None, cfg: Config, note: Callable[[str], None] = lambda _: None
) -> input_pipeline.Found | None:
    """Reads the records to replay; None without `data.replay`.

    Args:
      data_cfg: from `source`.
      cfg: config of the new run, whose task must be able to read the records.
      note: called with a report of what was read.

    Raises:
      DataError: the records no longer exist.
      ConfigError: the task cannot read them.
    """
    if data_cfg is None:
        return None
    place = f"'data.replay': the data of {cfg.init_from}"
    try:
        (found,) = input_pipeline.load(data_cfg, task_of(cfg).wanted(cfg))
        if isinstance(found, Split):
            base.check_fields(task_of(cfg), [*found.train, *found.valid], TASKS)
    except DataError as error:
        raise DataError(f"{place}: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from None
    note(f"replayed: {found.report}")
    return found
