"""Axes combine to trials; a trial's config, name and hash; mistakes are refused before anything runs."""

import re

import pytest
from scipy import stats

from lm import study as study_lib
from lm.config import ConfigError
from lm.study import definition
from tests.study_runs import RECIPE, ROOT, make_study


def test_product_is_every_combination_the_last_axis_fastest():
    made = study_lib.product(study_lib.over("a", [1, 2]), study_lib.seeds(2))
    assert made == [{"a": 1, "seed": 0}, {"a": 1, "seed": 1}, {"a": 2, "seed": 0}, {"a": 2, "seed": 1}]


def test_zip_pairs_and_chain_appends():
    a, b = study_lib.over("a", [1, 2]), study_lib.over("b", [3, 4])
    assert study_lib.zip(a, b) == [{"a": 1, "b": 3}, {"a": 2, "b": 4}]
    assert study_lib.chain(a, b) == [{"a": 1}, {"a": 2}, {"b": 3}, {"b": 4}]
    with pytest.raises(ConfigError, match=r"axes of 2, 1 trials"):
        study_lib.zip(a, b[:1])


def test_when_multiplies_those_that_the_condition_chooses():
    made = study_lib.when(
        study_lib.over("optim.name", ["adamw", "lion"]),
        lambda t: t["optim.name"] == "adamw",
        study_lib.over("b", [1, 2]),
    )
    assert made == [{"optim.name": "adamw", "b": 1}, {"optim.name": "adamw", "b": 2}, {"optim.name": "lion"}]


def test_two_axes_that_set_one_key_are_refused():
    with pytest.raises(ConfigError, match="two axes set 'a': 1 and 2"):
        study_lib.product([{"a": 1}], [{"a": 2}])


def test_values_of_a_key_depend_on_neither_the_other_keys_nor_the_number_of_trials():
    space = {"lr": stats.loguniform(1e-4, 1e-2), "name": ["x", "y"], "n": stats.randint(1, 9)}
    five = study_lib.sample(5, space)
    assert study_lib.sample(9, {"n": space["n"]})[:5] == [{"n": each["n"]} for each in five]
    assert study_lib.sample(5, space) == five != study_lib.sample(5, space, seed=1)
    assert {type(each["lr"]) for each in five} == {float} and {type(each["n"]) for each in five} == {int}
    assert all(1e-4 <= each["lr"] <= 1e-2 and 1 <= each["n"] < 9 for each in study_lib.sample(200, space))


def test_an_arm_is_named_by_its_name_and_by_what_varies_within_it_but_the_seed():
    rates = study_lib.over("optim.learning_rate", [0.1, 0.2])
    wide = study_lib.product([{"arm": "wide", "model.mlp_dim": 256}], rates, study_lib.seeds(2))
    study = make_study(study_lib.chain(wide, study_lib.product([{"arm": "usual"}], study_lib.seeds(2))))
    assert study.arms == ["wide, optim.learning_rate=0.1", "wide, optim.learning_rate=0.2", "usual"]
    assert [trial.seed for trial in study.trials] == [0, 1] * 3
    assert study.trials[0].config.model.mlp_dim == 256 and study.trials[4].config.model.mlp_dim == 512


def test_the_hash_names_the_config_whatever_the_override_says():
    one, two, other = make_study([{"arm": "a", "seed": 1}, {"arm": "b", "seed": 1, "model.mlp_dim": 512}, {}]).trials
    assert one.hash == two.hash != other.hash  # 512 is what the recipe has
    assert make_study([{"arm": "a", "seed": 1}, {"arm": "b", "seed": 1}]).runs == {one.hash: one}


def test_a_key_that_a_later_version_adds_does_not_change_the_hash(monkeypatch):
    config = make_study([{}]).trials[0].config
    before = definition.hash_of(config)
    defaults, flatten = definition.defaults(config.task.name), definition.flatten
    monkeypatch.setattr(definition, "defaults", lambda task: {**defaults, "optim.newer": 0.5})
    monkeypatch.setattr(definition, "flatten", lambda tree: [*flatten(tree), ("optim.newer", 0.5)])
    assert definition.hash_of(config) == before
    monkeypatch.setattr(definition, "flatten", lambda tree: [*flatten(tree), ("optim.newer", 0.6)])
    assert definition.hash_of(config) != before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            {"optim.learning_rat": 0.1},
            r"trial 2 of 2, optim.learning_rat=0.1: unknown config key.*did you mean 'learning_rate'",
        ),
        ({"optim.learning_rate": "high"}, "'optim.learning_rate' must be float"),
        ({"optimiser.learning_rate": 0.1}, "there is no section 'optimiser'"),
        ({"seed.x": 1}, "there is no section 'seed'"),
        ({"model": {"mlp_dim": 256}}, "'model' is a section of the config: set its keys, such as 'model[.]"),
        ({"recipe": "configs/no_such.py"}, "no recipe configs/no_such.py"),
        ({"arm": "a"}, None),
    ],
)
def test_a_mistake_in_a_trial_is_refused_with_its_name(override, message):
    if message is None:
        assert len(make_study([{"arm": "b"}, override]).trials) == 2
        return
    with pytest.raises(ConfigError, match=message):
        make_study([{"arm": "first"}, override])


def test_two_trials_of_an_arm_with_one_config_are_refused():
    with pytest.raises(ConfigError, match="trials 1 and 3 are the same: arm=a, seed=0; remove one"):
        make_study([{"arm": "a", "seed": 0}, {"arm": "a", "seed": 1}, {"arm": "a", "seed": 0}])


def test_two_trials_of_one_name_and_seed_are_refused():
    overrides = [{"arm": "a", "data.seq_len": 64}, {"arm": "a", "data.seq_len": 32}, {"arm": "a, data.seq_len=64"}]
    with pytest.raises(ConfigError, match=r"trials 1 and 3 are both 'a, data.seq_len=64, seed 0', with different"):
        make_study(overrides)


STUDY = f'''"""Which?"""
from lm.study import *
RECIPE = "{RECIPE}"
TABLES = (Table("loss", baseline="b"),)
CLAIMS = (better("a", "b", "loss"),)
def trials():
    return product(arms({{"a": {{}}, "b": {{"model.mlp_dim": 8}}}}), seeds(2))
'''


def write(folder, text):
    folder.mkdir(exist_ok=True)
    (folder / "study.py").write_text(text)
    return folder


def test_a_study_is_loaded_from_its_folder(tmp_path):
    study = study_lib.load(write(tmp_path / "widths", STUDY))
    assert (study.name, study.about, study.arms, len(study.trials)) == ("widths", "Which?", ["a", "b"], 4)
    assert study.tables[0].baseline_of("a") == "b" and study.tables[0].baseline_of("b") == ""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('baseline="b"', 'baseline="c"', r"TABLES\[0\]: no arm 'c'.*there are a; b"),
        ('better("a"', 'better("A1"', r"CLAIMS\[0\]: no arm 'A1'"),
        ('"a", "b", "loss"', '"a", "b", "seconds"', r"CLAIMS\[0\]: whether more or less of 'seconds' is better is not"),
        ("RECIPE", "RECIPES", "has no RECIPE"),
        ("seeds(2)", "seeds(0)", "yields no trial"),
    ],
)
def test_a_study_with_a_mistake_is_refused(tmp_path, old, new, message):
    with pytest.raises(ConfigError, match=message):
        study_lib.load(write(tmp_path / "wrong", STUDY.replace(old, new)))
    with pytest.raises(ConfigError, match=r"expected the folder of a study"):
        study_lib.load(tmp_path)


def test_arms_may_have_recipes_of_their_own():
    fine = RECIPE.replace("pretrain", "sft") + ":scratch"
    plain, tuned = make_study([{"arm": "plain"}, {"arm": "tuned", "recipe": fine}]).trials
    assert plain.config.task.name == "causal_lm" and tuned.config.task.name == "chat"


def test_the_studies_that_are_written_for_it_load(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "studies.md").read_text(encoding="utf-8")
    example, search = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(study_lib.load(write(tmp_path / "example", example)).trials) == 10
    drawn = search.replace("    fixed=", '    sampler="random",\n    fixed=')  # Optuna need not be there
    assert study_lib.load(write(tmp_path / "search", drawn)).search.trials == 30
    quick = study_lib.load(ROOT / "experiments" / "quick")
    assert quick.arms == ["gelu", "swiglu"] and len(quick.runs) == 10
