"""lm/param_paths.py: paths and trees are inverses of one another, and rules cover what they claim."""

import string

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm import param_paths
from lm.config.schema import ConfigError

names = st.text(string.ascii_lowercase + "_0123456789.-+", min_size=1, max_size=4)
nested = st.recursive(
    st.integers(), lambda children: st.dictionaries(names, children, min_size=1, max_size=4), max_leaves=12
).filter(lambda tree: isinstance(tree, dict))

PATHS = [
    "decoder/final_norm/scale",
    "decoder/layers/attention/query/kernel",
    "decoder/layers/mlp/up/bias",
    "decoder/layers/mlp/up/kernel",
    "embed/embedding",
]


@given(nested)
def test_unflatten_is_the_inverse_of_flatten(tree):
    assert param_paths.unflatten(param_paths.flatten(tree)) == tree


@given(nested)
def test_flatten_has_the_leaves_of_jax_in_its_order(tree):
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    assert [("/".join(key.key for key in path), leaf) for path, leaf in leaves] == list(
        param_paths.flatten(tree).items()
    )


def test_flatten_worked_example():
    assert param_paths.flatten({"b": {"d": 1, "c": 2}, "a": 3}) == {"a": 3, "b/c": 2, "b/d": 1}
    assert param_paths.flatten({}) == {}
    assert param_paths.unflatten({}) == {}


@given(st.dictionaries(names, st.tuples(st.integers(1, 4), st.booleans(), st.integers(0, 3)), min_size=1, max_size=5))
def test_overlay_puts_back_what_select_took(leaves):
    rng = np.random.default_rng(0)
    tree = {name: {"x": rng.normal(size=(n, 2)).astype(np.float32)} for name, (n, _, _) in leaves.items()}
    selected = {f"{name}/x": chosen for name, (_, chosen, _) in leaves.items()}
    skip = {f"{name}/x": k for name, (n, chosen, k) in leaves.items() if chosen and 0 < k < n}
    part = param_paths.select(tree, selected, skip)
    expected = {path: tree[path[:-2]]["x"][skip.get(path, 0) :] for path, chosen in selected.items() if chosen}
    jax.tree.map(np.testing.assert_array_equal, param_paths.flatten(part), expected)
    jax.tree.map(np.testing.assert_array_equal, param_paths.overlay(tree, part), tree)
    doubled = param_paths.flatten(param_paths.overlay(tree, jax.tree.map(lambda x: 2 * x, part)))
    for path, leaf in param_paths.flatten(tree).items():
        new = np.array(leaf)
        new[skip.get(path, 0) if selected[path] else len(leaf) :] *= 2
        np.testing.assert_array_equal(doubled[path], new)


def test_select_needs_a_word_on_every_leaf():
    with pytest.raises(KeyError, match="b"):
        param_paths.select({"a": 1, "b": 2}, {"a": True})


def test_overlay_refuses_a_leaf_that_the_tree_lacks():
    with pytest.raises(KeyError, match="a/c"):
        param_paths.overlay({"a": {"b": np.ones(2)}}, {"a": {"c": np.ones(2)}})


def test_map_with_path_hands_over_path_and_all_leaves():
    first, second = {"a": {"b": 1}, "c": 2}, {"a": {"b": 10}, "c": 20}
    assert param_paths.map_with_path(lambda path, x: (path, x), first) == {"a": {"b": ("a/b", 1)}, "c": ("c", 2)}
    assert param_paths.map_with_path(lambda path, x, y: f"{path}:{x + y}", first, second) == {
        "a": {"b": "a/b:11"},
        "c": "c:22",
    }


def test_the_first_matching_rule_wins():
    rules = [(r".*/mlp/.*", 1), (r".*kernel", 2), (r".*", 3)]
    assert param_paths.match_rules(rules, PATHS, "optim.lr_rules") == {
        "decoder/final_norm/scale": 3,
        "decoder/layers/attention/query/kernel": 2,
        "decoder/layers/mlp/up/bias": 1,
        "decoder/layers/mlp/up/kernel": 1,
        "embed/embedding": 3,
    }


def test_a_rule_matches_whole_paths_only():
    with pytest.raises(ConfigError, match="rule 'embed' matches no parameter"):
        param_paths.match_rules([("embed", 1), (".*", 0)], PATHS, "k")


def test_the_answer_has_the_order_of_the_paths():
    answer = param_paths.match_rules([("embed/.*", 1), (".*", 0)], PATHS, "k")
    assert list(answer) == PATHS


@pytest.mark.parametrize(
    ("pattern", "suggestion"),
    [
        (r".*/attentoin/.*", "attention"),
        (r"decoder/layers/mlp/upp/kernel", "decoder/layers/mlp/up/kernel"),
        (r"embedd/.*", "embed"),
        (r".*final_nrom.*", "final_norm"),
    ],
)
def test_a_rule_that_matches_nothing_is_refused_with_the_nearest_name(pattern, suggestion):
    with pytest.raises(ConfigError) as caught:
        param_paths.match_rules([(pattern, 0.0), (".*", 1.0)], PATHS, "optim.lr_rules")
    message = str(caught.value)
    assert f"'optim.lr_rules': rule {pattern!r} matches no parameter" in message
    assert f"nearest name '{suggestion}'" in message


def test_a_rule_near_to_nothing_is_refused_with_the_paths_there_are():
    with pytest.raises(ConfigError, match="there are: decoder/final_norm/scale, "):
        param_paths.match_rules([("zzzz", 0), (".*", 1)], PATHS, "k")


def test_a_rule_hidden_by_an_earlier_one_still_counts_as_matching():
    assert set(param_paths.match_rules([(".*", 1), ("embed/.*", 2)], PATHS, "k").values()) == {1}


def test_a_path_without_a_rule_is_refused():
    with pytest.raises(ConfigError, match=r"'k': no rule covers parameter 'decoder/final_norm/scale' \(2 in all\)"):
        param_paths.match_rules([(r"decoder/layers/.*", 1)], PATHS, "k")


def test_a_broken_regex_is_refused():
    with pytest.raises(ConfigError, match=r"'k': '\(a' is not a regular expression: "):
        param_paths.match_rules([("(a", 1)], PATHS, "k")


# --- rules over layers ---

STACKED = {
    "decoder": {
        "layers": {"mlp": {"up": {"kernel": np.zeros((3, 2, 4)), "bias": np.zeros((3, 4))}}},
        "final_norm": {"scale": np.zeros(3)},
    },
    "embed": {"embedding": np.zeros((9, 2))},
}


def test_a_rule_may_name_one_layer():
    rules = [(r"decoder/layers/2/.*", 2), (r"decoder/layers/.*kernel", 1), (r".*/0/.*", 5), (r".*", 0)]
    assert param_paths.match_layers(rules, STACKED, "k") == {
        "decoder/final_norm/scale": (0,),
        "decoder/layers/mlp/up/bias": (5, 0, 2),
        "decoder/layers/mlp/up/kernel": (1, 1, 2),
        "embed/embedding": (0,),
    }


@given(st.lists(st.sampled_from([".*", ".*kernel", ".*/1/.*", ".*/[12]/.*bias", "embed/.*", ".*/mlp/.*"]), max_size=4))
def test_rules_over_layers_are_rules_over_a_tree_of_single_layers(patterns):
    """Against the same rules on a tree in which every layer has leaves of its own."""
    rules = [(pattern, number) for number, pattern in enumerate([*patterns, ".*"])]
    apart = {}
    for path, leaf in param_paths.flatten(STACKED).items():
        single = [path.replace("layers/", f"layers/{i}/") for i in range(len(leaf))] if "layers" in path else [path]
        apart[path] = single
    one_by_one = param_paths.match_rules(rules, [name for own in apart.values() for name in own], "k")
    expected = {path: tuple(one_by_one[name] for name in own) for path, own in apart.items()}
    assert param_paths.match_layers(rules, STACKED, "k") == expected


def test_a_layer_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match=r"'k': rule 'decoder/layers/3/\.\*' matches no parameter.*'decoder/layers/"):
        param_paths.match_layers([("decoder/layers/3/.*", 1), (".*", 0)], STACKED, "k")
