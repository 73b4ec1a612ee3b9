"""Resuming a run: its position in the data, and which settings may have changed since it stopped."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lm import config
from lm.checkpoint.store import CheckpointError, Saved
from lm.config import Config, older, schema
from lm.config.schema import ConfigError
from lm.data.loader import Data
from lm.evaluation.early_stopping import EarlyStopping

# Rows of a step. May change where every length is in steps, as the schedules then stay the same.
_ELASTIC = ("data.batch_size", "train.micro_batches")
_VALID = "eval.sets.valid"  # its rows decide which checkpoint is the best one
_DATA = ("data", "seed", _VALID)
_CHANGES: tuple[Literal["scores", "data"], ...] = ("scores", "data")


class Position(NamedTuple):
    """Where a run stands, beside its step.

    Attributes:
      example: number of examples consumed.
      sources: source -> how many of them came from it; None = as the mixture's weights say.
      early_stopping: the state of early stopping.
    """

    example: int
    sources: Mapping[str, int] | None
    early_stopping: EarlyStopping


START = Position(0, None, EarlyStopping())


def position(saved: Saved) -> Position:
    """The position that a checkpoint holds."""
    there = saved.info["data"]
    return Position(there["example"], there.get("sources"), EarlyStopping(**saved.info.get("waiting", {})))


def data_info(data: Data, example: int, consumed: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """What a checkpoint keeps of the data and of the position in it, for `position` and `check_data`."""
    sources = {name: int(used["examples"]) for name, used in consumed.items()}
    return {
        "example": example,
        "sources": sources,
        "easy_first": data.easy_first,
        "fingerprint": data.fingerprint,
        "about": data.about,
        "sets": data.set_fingerprints,
    }


def refuse_changes(
    old: Config, new: Config, workdir: Path, accept_data: bool = False, say: Callable[[str], None] = lambda _: None
) -> None:
    """Raises ConfigError if a resumed run would not continue the computation it began; else reports what changed.

    Mesh and batch size may change: no example is lost or repeated. The batch size only where every length is given in
    steps, because schedules count steps. With `accept_data`, `data.*`, the task's keys about data, and the seed may
    change too, but not the curriculum: another length would run it a second time, or skip rows. Of `eval.sets` all but
    `valid` may change, as they decide nothing.
    """
    by_batch = sorted(key for cfg in (old, new) for key in _lengths_by_batch(cfg))
    scoring, about_data = ([f"task.{name}" for name in schema.fields_that_change(new.task, what)] for what in _CHANGES)
    data = (*_DATA, *about_data)
    free = (*config.RESUMABLE, *scoring, *(() if by_batch else _ELASTIC), *(data if accept_data else ()))
    differs = config.diff(old, new)
    is_fixed = {key: key.startswith("data.curriculum_") for key in differs}
    is_fixed |= {key: True for key in differs if _is_among(key, (_VALID,)) and not accept_data}
    changed = {key: values for key, values in differs.items() if is_fixed[key] or not _is_among(key, free)}
    if not changed:
        for key, (before, now) in differs.items():
            say(f"changed since the last start: {key} {before!r} -> {now!r}")
        return
    hints = []
    if by_batch and changed.keys() & {*_ELASTIC}:
        hints.append(f"the batch size may change only if all lengths are in steps, but '{by_batch[0]}' is set; ")
    if any(key.startswith("data.curriculum_") for key in changed):
        hints.append("the curriculum of a run that has begun cannot change, or rows would be repeated or skipped; ")
    elif all(_is_among(key, data) for key in changed):
        hints.append("to continue with other data or another seed pass --accept_changed_data; otherwise ")
    lines = "\n".join(f"  {key}: {before!r} -> {now!r}" for key, (before, now) in changed.items())
    raise ConfigError(
        f"{workdir} holds a run with a different config:\n{lines}\n{''.join(hints)}"
        f"restore the old values, or start a new --workdir (--config.init_from={workdir} starts from its parameters)"
    )


def check_tokenizer(saved: Saved, tokenizer: Any) -> None:
    """Raises CheckpointError if the run's tokenizer is not the one that its checkpoint was trained with.

    No flag accepts that: the same ids would stand for other text.
    """
    was, now = saved.info.get("tokenizer_hash", ""), tokenizer.hash if tokenizer else ""
    if was and was != now:
        raise CheckpointError(
            f"{saved.path} was trained with tokenizer {was[:12]}, but the tokenizer in {saved.path.parent.parent} is "
            f"{now[:12] or 'missing'}: it was changed or damaged since, or it is a published one with added tokens, "
            "options or two separators of a pair, which an earlier version left out of the number; put it back, or "
            "resume with that version"
        )


def _is_among(key: str, names: Sequence[str]) -> bool:
    """Whether a key, or a section that it is in, is one of `names`."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _lengths_by_batch(cfg: Config) -> list[str]:
    """The keys that give a length of the run in another unit than steps."""
    units = tuple(f"_{unit}" for unit in schema.UNITS if unit != "steps")
    flat = schema.flatten({name: schema.to_dict(getattr(cfg, name)) for name in ("train", "optim", "data")})
    return [key for key, value in flat if key.endswith(units) and value]


def check_data(saved: Saved, data: Data, accept: bool, say: Callable[[str], None]) -> None:
    """Raises CheckpointError, listing the differences, if the data is not what the checkpoint was trained on.

    With `accept` the differences are reported only, and so are those of the sets of `eval.sets` that decide nothing.
    """
    was = saved.info["data"]
    for name, now in data.set_fingerprints.items():
        if was.get("sets", {}).get(name, now) != now:
            say(f"eval.sets.{name} has other records than at step {saved.step:,}, or in another order")
    if was["fingerprint"] == data.fingerprint:
        return
    old: Mapping[str, Any] = was.get("about", {})
    changed = [key for key in sorted(old.keys() | data.about.keys()) if old.get(key) != data.about.get(key)]
    # The settings are keys of the config, which `refuse_changes` compares; older versions had other names for some.
    if old and changed == ["settings"] and older.is_older(saved.info["config"]):
        if saved.info["config"]["data"].get("synonyms"):
            say(f"{saved.path} was written by an older version: whether the file of data.synonyms changed is not known")
        return
    lines = [f"  {key}: {old.get(key, 'not there')} -> {data.about.get(key, 'not there')}" for key in changed]
    prints = f"fingerprint {was['fingerprint'][:12]}, now {data.fingerprint[:12]}"
    found = "\n".join([f"{saved.path} was trained on other data ({prints}):", *lines])
    if not accept:
        raise CheckpointError(
            f"{found}\nresuming would repeat or skip examples. Restore the data, start a new --workdir with "
            f"--config.init_from={saved.path.parent.parent}, or pass --accept_changed_data to continue regardless"
        )
    say(f"{found}\naccepted: each source continues from the example at which it stopped")
