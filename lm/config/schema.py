"""Frozen dataclasses as a config schema: strict building from nested dicts, durations, names of keys.

The sections and keys themselves are in `lm.config.sections`; this module knows none of them.
"""

import codecs
import dataclasses
import difflib
import encodings
import functools
import math
import pkgutil
import sys
import typing
from collections.abc import Iterable, Iterator, Mapping
from encodings import aliases
from typing import Any, Literal, get_args, get_origin, get_type_hints

UNITS = ("steps", "tokens", "examples", "epochs")


class ConfigError(ValueError):
    """An invalid config. The message names the key, what was found, and what was expected."""


@dataclasses.dataclass(frozen=True)
class Duration:
    """A length of training, set in the config as one of `NAME_steps|_tokens|_examples|_epochs`; all 0 = none."""

    steps: int = 0
    tokens: int = 0
    examples: int = 0
    epochs: float = 0.0

    def to_steps(self, key: str, *, batch_size: int, seq_len: int, epoch_examples: int) -> int:
        """Rounds up to whole steps. A token is one position of a batch, padding included; an example is one row.

        Args:
          key: of the config, for the message: 'train.total'.

        Raises:
          ConfigError: a part of an epoch that is no example.
        """
        if self.steps:
            return self.steps
        # Rounded first: 1.1 epochs of 100 examples are 110.00000000000001 in floats, one step too many.
        examples = self.examples or round(self.epochs * epoch_examples, 6) or self.tokens / seq_len
        if not examples and self != NEVER:
            raise ConfigError(
                f"'{key}_epochs' is {self.epochs}: no example of the {epoch_examples:,} of an epoch, and so no step; "
                "expected 0, or a longer duration"
            )
        return math.ceil(examples / batch_size)


NEVER = Duration()  # a duration that is not set


_hints_of = functools.cache(get_type_hints)  # of a dataclass; a study builds thousands of configs


def build_section(cls: type, source: Mapping[str, Any], prefix: str) -> Any:
    """Builds an instance of the dataclass `cls` strictly from nested dicts; `prefix` begins its keys in messages."""
    hints = _hints_of(cls)
    known = [key for name, hint in hints.items() for key in (spelled(name) if hint is Duration else [name])]
    for key in source:
        if key not in known:
            hint = nearest(key, known) or f"; known here: {', '.join(known)}"
            raise ConfigError(f"unknown config key '{prefix}{key}'{hint}")
    values: dict[str, Any] = {}
    for name, hint in hints.items():
        if hint is Duration:
            values[name] = _duration(name, source, prefix)
        elif name in source:
            value = source[name]
            if dataclasses.is_dataclass(hint):
                values[name] = build_section(
                    typing.cast(type, hint), _section(value, prefix + name), f"{prefix}{name}."
                )
            elif of := named_sections(hint):
                given = _section(value, prefix + name)
                values[name] = tuple(
                    (key, build_section(of, _section(given[key], f"{prefix}{name}.{key}"), f"{prefix}{name}.{key}."))
                    for key in sorted(given)
                )
            else:
                values[name] = _convert(value, hint, prefix + name)
    return cls(**values)


def named_sections(hint: Any) -> type | None:
    """The dataclass C of the hint `tuple[tuple[str, C], ...]`, sections by name; None for any other hint.

    A config spells them as a dict, name -> section; as a tuple sorted by name they are frozen and have a hash.
    """
    pair = get_args(hint)[0] if get_origin(hint) is tuple and get_args(hint)[1:] == (Ellipsis,) else None
    of = get_args(pair)[1:] if get_origin(pair) is tuple else ()
    return of[0] if len(of) == 1 and dataclasses.is_dataclass(of[0]) else None  # type: ignore[return-value]


def _section(value: Any, key: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"'{key}' is a section of keys; expected a dict, got {value!r}")
    return value


def _duration(name: str, source: Mapping[str, Any], prefix: str) -> Duration:
    hints = _hints_of(Duration)
    given = {}
    for unit, key in zip(UNITS, spelled(name), strict=True):
        if value := _convert(source.get(key, 0), hints[unit], prefix + key):
            given[unit] = value
    if len(given) > 1:
        listed = " and ".join(f"{prefix}{name}_{unit}={value:,}" for unit, value in given.items())
        raise ConfigError(f"two durations at once: {listed}; keep one and set the others to 0")
    return Duration(**given)


def _convert(value: Any, hint: Any, key: str) -> Any:
    """Checks `value` against a type hint; the only conversions are int -> float and list -> tuple."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        if value not in args:
            raise ConfigError(
                f"'{key}' must be one of {', '.join(map(str, args))}; got {value!r}{nearest(str(value), args)}"
            )
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"'{key}' must be a tuple, got {value!r}")
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_convert(item, args[0], f"{key}[{i}]") for i, item in enumerate(value))
        if len(value) != len(args):
            raise ConfigError(f"'{key}' must have {len(args)} items, got {value!r}")
        return tuple(_convert(item, arg, f"{key}[{i}]") for i, (item, arg) in enumerate(zip(value, args, strict=True)))
    if hint is float and type(value) is int and abs(value) <= sys.float_info.max:
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"'{key}' must be {hint.__name__}, got {type(value).__name__} {value!r}")
    if hint is float and not math.isfinite(value):
        raise ConfigError(f"'{key}' must be finite, got {value!r}")
    return value


def scoring_only(default: Any) -> Any:
    """A field of a task's options that no step reads: a resumed run may change it."""
    return dataclasses.field(default=default, metadata={"changes": "scores"})


def about_data(default: Any) -> Any:
    """A field of a task's options that says what the data is: a resumed run may change it together with the data."""
    return dataclasses.field(default=default, metadata={"changes": "data"})


def path(default: str | tuple[Any, ...] = "") -> Any:
    """A field that holds a path, or a tuple in which every text is one: what is published does not show it in full."""
    return dataclasses.field(default=default, metadata={"is_path": True})


def path_keys(config: Any, prefix: str = "") -> Iterator[str]:
    """Keys of the fields that were made by `path`, in all sections of a config dataclass."""
    for field in dataclasses.fields(config):
        value, key = getattr(config, field.name), f"{prefix}{field.name}"
        if field.metadata.get("is_path"):
            yield key
        elif dataclasses.is_dataclass(value):
            yield from path_keys(value, f"{key}.")
        elif named_sections(_hints_of(typing.cast(type, type(config)))[field.name]):
            for name, section in value:
                yield from path_keys(section, f"{key}.{name}.")


def fields_that_change(options: Any, what: Literal["scores", "data"]) -> list[str]:
    """Names of the fields of a task's options that were made by `scoring_only` ('scores') or `about_data` ('data')."""
    return [field.name for field in dataclasses.fields(options) if field.metadata.get("changes") == what]


def to_dict(config: Any) -> dict[str, Any]:
    """Nested dict of a config dataclass; a duration becomes its four keys."""
    out: dict[str, Any] = {}
    hints = _hints_of(typing.cast(type, type(config)))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, Duration):
            out |= dict(zip(spelled(field.name), dataclasses.astuple(value), strict=True))
        elif named_sections(hints[field.name]):
            out[field.name] = {name: to_dict(section) for name, section in value}
        else:
            out[field.name] = to_dict(value) if dataclasses.is_dataclass(value) else value
    return out


def keys(cls: type, prefix: str = "") -> list[str]:
    """Every config key, as 'a.b'. A duration counts once, because only one of its four keys can be set."""
    out = []
    for name, hint in _hints_of(cls).items():
        is_section = dataclasses.is_dataclass(hint) and hint is not Duration
        out += keys(hint, f"{prefix}{name}.") if is_section else [prefix + name]
    return out


def spelled(name: str) -> list[str]:
    """The four keys of a duration: 'total' -> 'total_steps', 'total_tokens', …"""
    return [f"{name}_{unit}" for unit in UNITS]


def nearest(name: str, known: Iterable[str], what: str = "did you mean") -> str:
    """' (did you mean X?)' for the closest of `known`, or '' when nothing is close."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" ({what} '{match[0]}'?)" if match else ""


# Python codecs that do not encode text files: domain names, escapes in source code, one that always fails.
_NO_FILES = ("idna", "punycode", "unicode-escape", "raw-unicode-escape", "undefined")


def check_encoding(name: str, key: str) -> None:
    """Raises ConfigError unless `name` is a text encoding known to Python."""
    try:
        codec = codecs.lookup(name)
    except (LookupError, ValueError):
        known = {*aliases.aliases, *(module.name for module in pkgutil.iter_modules(encodings.__path__))}
        hint = nearest(name.lower().replace("-", "_"), known)
        raise ConfigError(
            f"'{key}' is {name!r}; expected an encoding such as 'utf-8', 'cp1252', 'utf-16'{hint}"
        ) from None
    is_text = getattr(codec, "_is_text_encoding", True) and codec.incrementaldecoder is not None
    if not is_text or codec.name.replace("_", "-") in _NO_FILES:
        raise ConfigError(
            f"'{key}' is {name!r}, which is not an encoding of text files; expected one such as 'utf-8', 'cp1252'"
        )


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of the leaves of nested dicts. Example: {'a': {'b': 1}} -> ('a.b', 1)."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
