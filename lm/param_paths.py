"""Parameter paths ('decoder/layers/mlp/up/kernel') of nested dicts of arrays, and ordered rules over them."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax.numpy as jnp

from lm.config.schema import ConfigError, nearest

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
    """Maps fn(path, leaf, *leaves of rest) over trees of the same structure."""
    flat_rest = [flatten(other) for other in rest]
    return unflatten({path: fn(path, leaf, *(o[path] for o in flat_rest)) for path, leaf in flatten(tree).items()})


def num_layers(path: str, leaf: Any) -> int:
    """Number of layers that a leaf stacks on axis 0 ('…/layers/…'); 0 = it belongs to no layer."""
    return leaf.shape[0] if "layers" in path.split("/") else 0


def select(
    tree: Mapping[str, Any], selected: Mapping[str, bool], skip: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """The leaves whose path is selected, without the first `skip[path]` entries of axis 0.

    Example: {'a': 1, 'b': [[4], [5], [6]]}, {'a': False, 'b': True}, {'b': 1} -> {'b': [[5], [6]]}.
    """
    skip = skip or {}
    chosen = {path: leaf for path, leaf in flatten(tree).items() if selected[path]}
    return unflatten({path: leaf[skip[path] :] if path in skip else leaf for path, leaf in chosen.items()})


def overlay(tree: Mapping[str, Any], part: Mapping[str, Any]) -> dict[str, Any]:
    """Puts a part made by `select` back into `tree`: whole leaves, or the last entries of axis 0.

    Raises:
      KeyError: `part` has a leaf that `tree` lacks.
    """
    flat = flatten(tree)
    return unflatten(flat | {path: replace_last(flat[path], new) for path, new in flatten(part).items()})


def replace_last(old: Any, new: Any) -> Any:
    """`old` [N, …] with its last n entries replaced by `new` [n, …]; `new` itself where n = N."""
    return new if new.shape == old.shape else jnp.concatenate([old[: old.shape[0] - new.shape[0]], new])


def match_rules(rules: Sequence[tuple[str, T]], paths: Sequence[str], key: str) -> dict[str, T]:
    """Path -> value of the first rule whose regex matches the whole path.

    Args:
      rules: ordered (regex, value) pairs.
      paths: the parameter paths; each must be covered.
      key: config key of the rules, for messages.

    Raises:
      ConfigError: a regex that does not compile, a rule that matches no path, or a path that no rule covers.
    """
    return _first_match(rules, {path: path for path in paths}, key)


def match_layers(rules: Sequence[tuple[str, T]], tree: Mapping[str, Any], key: str) -> dict[str, tuple[T, ...]]:
    """Path -> a tuple of one value per layer, or of a single value for a leaf without layers.

    A rule matches a layer by the leaf's path, or by that path with the layer's number after 'layers': for
    'decoder/layers/mlp/up/kernel' [2, …], `decoder/layers/1/.*` gives its value to the last layer only.

    Args:
      rules: ordered (regex, value) pairs; the first that matches wins.
      tree: arrays or `jax.ShapeDtypeStruct`.
      key: config key of the rules, for messages.

    Raises:
      ConfigError: as `match_rules`.
    """
    names: dict[str, list[str]] = {}
    for path, leaf in flatten(tree).items():
        before, _, after = path.rpartition("layers/")
        layers = num_layers(path, leaf)
        names[path] = [f"{before}layers/{layer}/{after}" for layer in range(layers)] if layers else [path]
    found = _first_match(rules, {name: path for path, own in names.items() for name in own}, key)
    return {path: tuple(found[name] for name in own) for path, own in names.items()}


def _first_match(rules: Sequence[tuple[str, T]], path_of: Mapping[str, str], key: str) -> dict[str, T]:
    """Name -> value of the first rule that matches it or the path it belongs to, `path_of[name]`."""
    out: dict[str, T] = {}
    for pattern, value in rules:
        try:
            regex = re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"'{key}': {pattern!r} is not a regular expression: {error}") from None
        matched = [name for name, path in path_of.items() if regex.fullmatch(path) or regex.fullmatch(name)]
        if not matched:
            raise ConfigError(f"'{key}': rule {pattern!r} matches no parameter{_closest(pattern, list(path_of))}")
        for name in matched:
            out.setdefault(name, value)
    if missing := [name for name in path_of if name not in out]:
        raise ConfigError(
            f"'{key}': no rule covers parameter '{missing[0]}' ({len(missing)} in all); end with ('.*', …)"
        )
    return {name: out[name] for name in path_of}


def _closest(pattern: str, paths: Sequence[str]) -> str:
    """Suggests the nearest path, comparing with the pattern's plain letters and with prefixes of each path."""
    plain = re.sub(r"\.\*|\\.|[\^$()\[\]?+*|]", "", pattern).strip("/")
    prefixes = {"/".join(path.split("/")[:n]) for path in paths for n in range(1, path.count("/") + 2)}
    names = {name for path in paths for name in path.split("/")}
    return nearest(plain, sorted(prefixes | names), "nearest name") or f"; there are: {', '.join(sorted(paths)[:8])}, …"
