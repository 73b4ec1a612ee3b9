"""Nested dicts of arrays by path ('decoder/layers/mlp/up/kernel'), and ordered rules over those paths."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from lm.schema import ConfigError, nearest

T = TypeVar("T")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Path -> leaf, in the order of sorted keys (jax's own). Example: {'a': {'b': 1}} -> {'a/b': 1}."""
    out: dict[str, Any] = {}
    for key in sorted(tree):
        value = tree[key]
        out |= flatten(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {prefix + key: value}
    return out


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `flatten`."""
    out: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = out
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return out


def map_with_path(fn: Callable[..., Any], tree: Mapping[str, Any], *rest: Mapping[str, Any]) -> dict[str, Any]:
    """fn(path, leaf, *leaves of rest) over trees of one structure."""
    flat_rest = [flatten(other) for other in rest]
    return unflatten({path: fn(path, leaf, *(o[path] for o in flat_rest)) for path, leaf in flatten(tree).items()})


def split(tree: Mapping[str, Any], selected: Mapping[str, bool]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(leaves whose path is selected, the others), as two trees that `merge` puts together again."""
    flat = flatten(tree)
    chosen = {path: leaf for path, leaf in flat.items() if selected[path]}
    return unflatten(chosen), unflatten({path: leaf for path, leaf in flat.items() if not selected[path]})


def merge(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """One tree with the leaves of two that share none."""
    flat_first, flat_second = flatten(first), flatten(second)
    if shared := sorted(flat_first.keys() & flat_second.keys()):
        raise ValueError(f"both trees hold {shared[0]}")
    return unflatten(flat_first | flat_second)


def match_rules(rules: Sequence[tuple[str, T]], paths: Sequence[str], key: str) -> dict[str, T]:
    """Path -> value of the first rule whose regex matches the whole path.

    Args:
      rules: ordered (regex, value) pairs.
      paths: the parameter paths; each must be covered.
      key: config key of the rules, for messages.

    Raises:
      ConfigError: a regex that does not compile, a rule that matches no path, or a path that no rule covers.
    """
    out: dict[str, T] = {}
    for pattern, value in rules:
        try:
            regex = re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"'{key}': {pattern!r} is not a regular expression: {error}") from None
        matched = [path for path in paths if regex.fullmatch(path)]
        if not matched:
            raise ConfigError(f"'{key}': rule {pattern!r} matches no parameter{_closest(pattern, paths)}")
        for path in matched:
            out.setdefault(path, value)
    if missing := [path for path in paths if path not in out]:
        raise ConfigError(
            f"'{key}': no rule covers parameter '{missing[0]}' ({len(missing)} in all); end with ('.*', …)"
        )
    return {path: out[path] for path in paths}


def _closest(pattern: str, paths: Sequence[str]) -> str:
    """Suggests the nearest path, comparing with the pattern's plain letters and with prefixes of each path."""
    plain = re.sub(r"\.\*|\\.|[\^$()\[\]?+*|]", "", pattern).strip("/")
    prefixes = {"/".join(path.split("/")[:n]) for path in paths for n in range(1, path.count("/") + 2)}
    names = {name for path in paths for name in path.split("/")}
    return nearest(plain, sorted(prefixes | names), "nearest name") or f"; there are: {', '.join(sorted(paths)[:8])}, …"
