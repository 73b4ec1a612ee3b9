"""Going on with a run: where it is in its data, and what may have changed meanwhile."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lm import config
from lm.checkpoint.store import CheckpointError, Saved
from lm.config import Config, older, schema
from lm.config.schema import ConfigError
from lm.data.loader import Data
from lm.evaluation import evaluate

# Rows of a step. Where every length is in steps, another one leaves the schedules what they were.
_ELASTIC = ("data.batch_size", "train.micro_batches")
_DATA = ("data", "seed", "task.labels", "task.image_shape", "task.templates", "task.shots")


class Position(NamedTuple):
    """Where in a run a state is, beside its step.

    Attributes:
      example: how many were consumed.
      sources: source -> how many of them were its; None = as the mixture says.
      waiting: how long no evaluation was better.
    """

    example: int
    sources: Mapping[str, int] | None
    waiting: evaluate.Waiting


def position(saved: Saved) -> Position:
    """Where a checkpoint is."""
    there = saved.info["data"]
    return Position(there["example"], there.get("sources"), evaluate.Waiting(**saved.info.get("waiting", {})))


def about_data(data: Data, example: int, consumed: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """What a checkpoint keeps of the data and of the place in it, for `position` and `same_data`."""
    sources = {name: int(used["examples"]) for name, used in consumed.items()}
    return {"example": example, "sources": sources, "fingerprint": data.fingerprint, "about": data.about}


def refuse_changes(
    old: Config, new: Config, workdir: Path, accept_data: bool = False, say: Callable[[str], None] = lambda _: None
) -> None:
    """Raises ConfigError when a resumed run would compute other steps than it began with; else says what has changed.

    Mesh and batch size may change: no example is lost or repeated. The latter only where every length is in steps, as
    schedules go by steps. `accept_data`: so may `data.*`, what the task says of the data, and the seed.
    """
    by_batch = sorted(key for cfg in (old, new) for key in _lengths_by_batch(cfg))
    free = (*config.RESUMABLE, *(() if by_batch else _ELASTIC), *(_DATA if accept_data else ()))
    differs = config.diff(old, new)
    changed = {key: values for key, values in differs.items() if not _is_among(key, free)}
    if not changed:
        for key, (before, now) in differs.items():
            say(f"changed meanwhile: {key} {before!r} -> {now!r}")
        return
    hints = []
    if by_batch and changed.keys() & {*_ELASTIC}:
        hints.append(f"a batch size may change where every length is in steps, but '{by_batch[0]}' is set; ")
    if all(_is_among(key, _DATA) for key in changed):
        hints.append("--accept_changed_data goes on with other data or another seed; ")
    lines = "\n".join(f"  {key}: {before!r} -> {now!r}" for key, (before, now) in changed.items())
    raise ConfigError(
        f"{workdir} holds a run with another config:\n{lines}\n{''.join(hints)}"
        f"put the old values back, or start another --workdir (with --config.init_from={workdir} to build on it)"
    )


def _is_among(key: str, names: Sequence[str]) -> bool:
    """Whether a key, or a section that it is in, is one of `names`."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _lengths_by_batch(cfg: Config) -> list[str]:
    """Keys of lengths of the run that are not in steps."""
    units = tuple(f"_{unit}" for unit in schema.UNITS if unit != "steps")
    flat = schema.flatten({name: schema.to_dict(getattr(cfg, name)) for name in ("train", "optim", "data")})
    return [key for key, value in flat if key.endswith(units) and value]


def same_data(saved: Saved, data: Data, accept: bool, say: Callable[[str], None]) -> None:
    """Raises CheckpointError, with the difference, where the data is not what the run was on; says it if accepted."""
    was = saved.info["data"]
    if was["fingerprint"] == data.fingerprint:
        return
    old: Mapping[str, Any] = was.get("about", {})
    changed = [key for key in sorted(old.keys() | data.about.keys()) if old.get(key) != data.about.get(key)]
    # The settings are keys of the config, which `refuse_changes` compares; older versions had other names for some.
    if old and changed == ["settings"] and older.is_older(saved.info["config"]):
        return
    lines = [f"  {key}: {old.get(key, 'not there')} -> {data.about.get(key, 'not there')}" for key in changed]
    prints = f"fingerprint {was['fingerprint'][:12]}, now {data.fingerprint[:12]}"
    found = "\n".join([f"{saved.path} was trained on other data ({prints}):", *lines])
    if not accept:
        raise CheckpointError(
            f"{found}\ngoing on would repeat or skip examples. Put the data back, start another --workdir with "
            f"--config.init_from={saved.path.parent.parent}, or go on nevertheless with --accept_changed_data"
        )
    say(f"{found}\naccepted: each source goes on at the example at which it stopped")
