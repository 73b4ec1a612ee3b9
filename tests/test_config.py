"""lm/config/sections.py: refused values, conversions, and error messages."""

import dataclasses
import functools
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm import config as config_lib
from lm.config import Config, schema
from lm.config.schema import ConfigError, Duration, keys
from lm.models import transformer
from lm.tasks import TASKS, build_config, build_saved_config, default_config, task_config

RUNNABLE = {"train": {"total_steps": 10}}
KEYS = [*(key for key in keys(Config) if key != "task"), "task.name"]  # for a task without options
OPTIONS = {name: [f"task.{key}" for key in keys(task.options)] for name, task in TASKS.items()}


def build(**sections):
    return build_config(RUNNABLE | sections)


# --- accepted values ---------------------------------------------------------------------------------------------


def test_defaults_build_once_a_length_is_given():
    source = default_config()
    with pytest.raises(ConfigError, match=r"no training length: set one of 'train\.total_steps"):
        build_config(source)
    source.train.total_steps = 10
    config = build_config(source)
    assert config == dataclasses.replace(Config(), train=config_lib.TrainConfig(total=Duration(steps=10)))
    assert config == build_config({"train": {"total_steps": 10}}), "a key left out takes its default"


def test_defaults_hold_every_key():
    flat = [key for key, _ in config_lib.flatten(default_config().to_dict())]
    spelled = [
        spelling
        for key in KEYS
        for spelling in ([f"{key}_{unit}" for unit in schema.UNITS] if f"{key}_steps" in flat else [key])
    ]
    assert sorted([*flat, "eval.sets"]) == sorted(spelled), "there are no sets, whose keys would be in flat"


def test_json_round_trip_of_a_config_with_no_default_left():
    config = build(
        seed=-3,
        task={"name": "tagging", "labels": ("O", "B-x"), "entity_scheme": "IOB2"},
        init_from="runs/a@best",
        init_rules=((r"head/.*", "reinit"), (r".*", "keep")),
        tokenizer={"path": "é.model"},
        data={"format": "jsonl", "path": "x.jsonl", "rename": (("q", "prompt"), ("a", "response")), "seq_len": 32},
        model={"norm_eps": 1e-6, "use_bias": False},
        optim={"warmup_epochs": 0.1, "decay_rules": ((r".*", False),), "lr_rules": ((r"a", 0.0), (r".*", 1.0))},
        generate={"prompts": ("Once\n", "")},
    )
    text = config_lib.to_json(config)
    again = build_config(json.loads(text))
    assert again == config
    assert hash(again) == hash(config), "lists of the JSON must come back as tuples"
    assert config_lib.to_json(again) == text


@pytest.mark.parametrize(
    ("section", "key", "given_value", "expected"),
    [("optim", "learning_rate", 1, 1.0), ("optim", "lr_rules", [[".*", 2]], ((".*", 2.0),))],
)
def test_the_only_conversions_are_int_to_float_and_list_to_tuple(section, key, given_value, expected):
    value = getattr(getattr(build(**{section: {key: given_value}}), section), key)
    assert value == expected
    assert isinstance(json.loads(json.dumps(value)), type(json.loads(json.dumps(expected))))
    leaf = value if key == "learning_rate" else value[0][1]
    assert type(leaf) is float


def test_recipes_and_overrides_go_through_a_config_dict():
    source = default_config()
    source.train.total_epochs = 2.0
    source.optim.lr_rules = (("embed/.*", 0.5), (".*", 1.0))
    config = build_config(source)
    assert config.train.total == Duration(epochs=2.0)
    assert config.optim.lr_rules == (("embed/.*", 0.5), (".*", 1.0))


# --- refused values ----------------------------------------------------------------------------------------------

REFUSED = {
    # unknown keys, with the nearest known one
    "unknown in a section": ({"optim": {"learning_ratee": 1.0}}, r"'optim\.learning_ratee' .*'learning_rate'"),
    "unknown at the top": ({"sede": 1}, r"'sede' .*'seed'"),
    "unknown section": ({"optimizer": {}}, r"'optimizer' .*'optim'"),
    "unknown, nothing near": ({"mesh": {"zzzzzz": 1}}, r"'mesh\.zzzzzz'; known here: data, fsdp, expert, context"),
    "duration without its unit": ({"optim": {"warmup": 10}}, r"'optim\.warmup' .*'warmup_\w+'"),
    "duration with a wrong unit": ({"train": {"total_step": 10}}, r"'train\.total_step' .*'total_steps'"),
    "unknown option of a task": ({"task": {"name": "masked_lm", "mask_rat": 0.1}}, r"'task\.mask_rat' .*'mask_rate'"),
    "option of another task": ({"task": {"mask_rate": 0.1}}, r"'task\.mask_rate'; known here: name"),
    # wrong types
    "str for int": ({"model": {"num_layers": "4"}}, r"'model\.num_layers' must be int, got str '4'"),
    "float for int": ({"model": {"num_layers": 4.0}}, r"'model\.num_layers' must be int, got float 4\.0"),
    "bool for int": ({"model": {"num_layers": True}}, r"'model\.num_layers' must be int, got bool True"),
    "bool for float": ({"optim": {"b1": False}}, r"'optim\.b1' must be float, got bool False"),
    "int for bool": ({"model": {"use_bias": 1}}, r"'model\.use_bias' must be bool, got int 1"),
    "str for bool": ({"model": {"use_bias": "False"}}, r"'model\.use_bias' must be bool, got str"),
    "None for str": ({"init_from": None}, r"'init_from' must be str, got NoneType None"),
    "bool for a duration": ({"train": {"total_steps": True}}, r"'train\.total_steps' must be int, got bool"),
    "float for steps": ({"train": {"total_steps": 1e3}}, r"'train\.total_steps' must be int, got float 1000\.0"),
    "value for a section": ({"optim": 3}, r"'optim' is a section of keys; expected a dict, got 3"),
    "value for the task": ({"task": "masked_lm"}, r"'task' is a section of keys, .*; got 'masked_lm'"),
    "str for an option": (
        {"task": {"name": "masked_lm", "mask_rate": "1"}},
        r"'task\.mask_rate' must be float",
    ),
    "str for a tuple": ({"generate": {"prompts": "Once"}}, r"'generate\.prompts' must be a tuple, got 'Once'"),
    "item of a tuple": ({"generate": {"prompts": ["a", 1]}}, r"'generate\.prompts\[1\]' must be str, got int 1"),
    "short pair": ({"optim": {"lr_rules": [[".*"]]}}, r"'optim\.lr_rules\[0\]' must have 2 items, got \['\.\*'\]"),
    "type inside a pair": ({"optim": {"decay_rules": [[".*", 1]]}}, r"'optim\.decay_rules\[0\]\[1\]' must be bool"),
    # choices
    "unknown choice": ({"optim": {"name": "adamww"}}, r"'optim\.name' must be one of adamw, lion.*\(.*'adamw'"),
    "choice of a wrong type": ({"optim": {"name": 3}}, r"'optim\.name' must be one of .*; got 3"),
    "unknown task": ({"task": {"name": "masked_ml"}}, r"'task\.name' must be one of causal_lm, .*\(.*'masked_lm'"),
    "task of a wrong type": ({"task": {"name": 3}}, r"'task\.name' must be one of .*; got 3"),
    # durations
    "two durations": (
        {"train": {"total_steps": 1000, "total_tokens": 5_000_000}},
        r"train\.total_steps=1,000 and train\.total_tokens=5,000,000; keep one",
    ),
    "three durations": ({"eval": {"every_steps": 1, "every_tokens": 2, "every_epochs": 0.5}}, "eval.every_epochs=0.5"),
    "negative duration": ({"train": {"total_steps": -1}}, r"'train\.total_steps' must not be negative, got -1"),
    "no length": ({"train": {"total_steps": 0}}, r"no training length"),
    # numbers
    "NaN": ({"optim": {"learning_rate": math.nan}}, r"'optim\.learning_rate' must be finite, got nan"),
    "infinity": ({"loss": {"z_loss": math.inf}}, r"'loss\.z_loss' must be finite, got inf"),
    "NaN in a duration": ({"train": {"total_epochs": math.nan}}, r"'train\.total_epochs' must be finite"),
    "NaN in a rule": ({"optim": {"lr_rules": [[".*", math.nan]]}}, r"'optim\.lr_rules\[0\]\[1\]' must be finite"),
    "negative rate": ({"optim": {"learning_rate": -1e-3}}, r"'optim\.learning_rate' must not be negative, got -0\.001"),
    "zero layers": ({"model": {"num_layers": 0}}, r"'model\.num_layers' must be at least 1, got 0"),
    "dropout of everything": ({"model": {"dropout": 1.0}}, r"'model\.dropout' must be in \[0, 1\), got 1\.0"),
    "top_p of 0": ({"generate": {"top_p": 0.0}}, r"'generate\.top_p' must be in \(0, 1\], got 0\.0"),
    "penalty of 0": ({"generate": {"repetition_penalty": 0.0}}, r"'generate\.repetition_penalty' must be above 0"),
    "empty stop string": ({"generate": {"stop": ["a", ""]}}, r"'generate\.stop' has an empty string"),
    # contradictions
    "min above max": (
        {"generate": {"min_new_tokens": 9, "max_new_tokens": 8}},
        r"'generate\.min_new_tokens' \(9\) is above 'generate\.max_new_tokens' \(8\)",
    ),
    "uneven micro-batches": (
        {"data": {"batch_size": 8}, "train": {"total_steps": 1, "micro_batches": 3}},
        r"'data\.batch_size' \(8\) must be a multiple of 'train\.micro_batches' \(3\)",
    ),
    "uneven key/value heads": ({"model": {"num_heads": 4, "num_kv_heads": 3}}, r"'model\.num_kv_heads' \(3\)"),
    "uneven heads": ({"model": {"embed_dim": 10, "num_heads": 4}}, r"or set 'model\.head_dim'"),
    "short position table": ({"model": {"max_len": 8}}, r"'model\.max_len' \(8\) is shorter than 'data\.seq_len'"),
    "no path": ({"data": {"format": "jsonl"}}, r"'data\.path' is empty: data\.format=jsonl needs"),
    "rope scaling without rope": (
        {"model": {"rope_scaling": {"kind": "linear", "factor": 2.0}}},
        r"'model\.position' is learned, which does not read 'model\.rope_scaling'",
    ),
    "local theta without rope": (
        {"model": {"rope_local_theta": 1e4, "sliding_window": 4, "global_every": 2}},
        r"'model\.position' is learned, which does not read 'model\.rope_local_theta'",
    ),
    "a key of another rope scaling": (
        {"model": {"position": "rope", "rope_scaling": {"kind": "linear", "factor": 2.0, "beta_fast": 8.0}}},
        r"'model\.rope_scaling\.kind' is linear, which does not read 'model\.rope_scaling\.beta_fast'",
    ),
    "a length that linear does not read": (
        {"model": {"position": "rope", "rope_scaling": {"kind": "linear", "factor": 2.0, "original_len": 64}}},
        r"is linear, which does not read 'model\.rope_scaling\.original_len'",
    ),
    "factor without a kind": (
        {"model": {"position": "rope", "rope_scaling": {"factor": 2.0}}},
        r"is none, which does not read 'model\.rope_scaling\.factor'",
    ),
    "forgotten factor": (
        {"model": {"position": "rope", "rope_scaling": {"kind": "linear"}}},
        r"is linear, which needs a 'model\.rope_scaling\.factor' of at least 1",
    ),
    "windows of a vision transformer": (
        {"model": {"kind": "vit", "position": "sincos", "sliding_window": 4, "global_every": 2}},
        r"'model\.sliding_window' is 4, but 'model\.kind' vit has no windows",
    ),
    "scaled embeddings of a vision transformer": (
        {"model": {"kind": "vit", "position": "sincos", "scale_embeddings": True}},
        r"'model\.scale_embeddings' is for models of text; 'model\.kind' vit",
    ),
    "post-norm of an encoder-decoder": (
        {"model": {"kind": "encoder_decoder", "norm_position": "post"}},
        r"'model\.norm_position' is post, but 'model\.kind' encoder_decoder supports pre only",
    ),
    "transform of a vision transformer": (
        {"model": {"kind": "vit", "position": "sincos", "lm_transform": True}},
        r"'model\.lm_transform' is set, but 'model\.kind' vit does not support it",
    ),
    "embedding norm of a vision transformer": (
        {"model": {"kind": "vit", "position": "sincos", "embed_norm": True}},
        r"'model\.embed_norm' is for models of text; 'model\.kind' vit",
    ),
    "scaled logits of a vision transformer": (
        {"model": {"kind": "vit", "position": "sincos", "scale_logits": True}},
        r"'model\.scale_logits' is for models of text; 'model\.kind' vit",
    ),
    "unused positions of rope": (
        {"model": {"unused_positions": 2, "position": "rope"}},
        r"'model\.unused_positions' is 2, but .*'model\.position' rope has no learned positions of text",
    ),
    "no sentence type": (
        {"model": {"sentence_types": 0, "kind": "encoder"}},
        r"'model\.sentence_types' is 0; expected at least 1",
    ),
    "sentence types of a decoder": (
        {"model": {"sentence_types": 1}},
        r"'model\.sentence_types' is 1, but 'model\.kind' decoder has none: leave 2",
    ),
    "biases twice": ({"model": {"qkv_bias": True}}, r"'model\.qkv_bias' is set, but 'model\.use_bias'"),
    "decay without wsd": ({"optim": {"decay_steps": 5}}, r"'optim\.decay_\*' is read by schedule wsd only.*cosine"),
}


@pytest.mark.parametrize(("source", "message"), REFUSED.values(), ids=REFUSED)
def test_invalid_configs_are_refused_with_the_key_named(source, message):
    with pytest.raises(ConfigError, match=message):
        build_config(RUNNABLE | source)


@pytest.mark.parametrize(
    "source",
    [
        {"model": {"embed_dim": 10, "num_heads": 4, "head_dim": 3}},
        {"model": {"position": "rope", "max_len": 8}},
        {"optim": {"schedule": "wsd", "decay_steps": 5}},
        {"mesh": {"data": -1}},
        {"seed": -1},
        {"data": {"batch_size": 8}, "train": {"total_steps": 1, "micro_batches": 4}},
    ],
    ids=str,
)
def test_values_at_the_limits_are_accepted(source):
    assert isinstance(build_config(RUNNABLE | source), Config)


@given(st.sampled_from([key for key in keys(Config) if "." in key]), st.data())
def test_a_misspelled_key_is_refused_and_the_right_one_suggested(key, data):
    section, _, name = key.rpartition(".")
    within = functools.reduce(lambda inner, part: inner[part], section.split("."), default_config())
    if f"{name}_steps" in within:
        name += "_steps"
    if len(name) < 4:
        return
    i = data.draw(st.integers(0, len(name) - 1))
    misspelt = name[:i] + name[i + 1 :]
    if misspelt in list(within):
        return
    with pytest.raises(ConfigError, match=rf"'{section}\.{misspelt}' \(did you mean '\w+'\?\)"):
        build(**functools.reduce(lambda inner, part: {part: inner}, reversed(section.split(".")), {misspelt: 0}))


@pytest.mark.parametrize(
    ("key", "value", "now"),
    [
        ("objective", "clm", "task.name"),
        ("data.task", "chat", "task.name"),
        ("data.labels", ("a", "b"), "task.labels"),
        ("corrupt.mean_span", 3.0, "task.mean_span_length"),
        ("model.experts", (4, 2), "model.num_experts and model.experts_per_token"),
        ("optim.to_init", 0.1, "optim.l2_sp"),
    ],
)
def test_a_key_of_an_older_version_is_refused_with_the_one_of_today(key, value, now):
    section, _, name = key.rpartition(".")
    with pytest.raises(ConfigError, match=f"unknown config key '{key}': set {now} instead"):
        build(**({section: {name: value}} if section else {name: value}))


def test_a_task_of_an_older_version_is_refused_with_its_name_of_today():
    with pytest.raises(ConfigError, match=r"got 'sentences' \(it is called classification now\)"):
        build(task={"name": "sentences"})


# --- durations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("duration", "steps"),
    [
        # 16 rows of 256 positions = 4,096 tokens a step; 1,000 rows an epoch = 62.5 steps
        (Duration(), 0),
        (Duration(steps=7), 7),
        (Duration(tokens=4096), 1),
        (Duration(tokens=4097), 2),
        (Duration(tokens=1), 1),
        (Duration(tokens=40_960), 10),
        (Duration(examples=16), 1),
        (Duration(examples=17), 2),
        (Duration(epochs=1.0), 63),
        (Duration(epochs=2.0), 125),
        (Duration(epochs=0.016), 1),
    ],
    ids=str,
)
def test_to_steps_rounds_up(duration, steps):
    assert duration.to_steps("train.total", batch_size=16, seq_len=256, epoch_examples=1000) == steps


def test_to_steps_does_not_add_a_step_for_a_float_rounding_error():
    # 1.1 * 100 = 110.00000000000001 in floats
    assert Duration(epochs=1.1).to_steps("x", batch_size=10, seq_len=1, epoch_examples=100) == 11


@given(st.sampled_from(schema.UNITS), st.floats(0, 1, exclude_min=True), st.integers(1, 10**9), st.integers(1, 2**30))
def test_a_duration_that_is_set_is_at_least_a_step_or_refused(unit, share, batch_size, epoch_examples):
    duration = Duration(**{unit: share if unit == "epochs" else 1})
    size = {"batch_size": batch_size, "seq_len": 2**20, "epoch_examples": epoch_examples}
    try:
        assert duration.to_steps("eval.every", **size) >= 1
    except ConfigError as error:
        assert str(error).startswith(f"'eval.every_epochs' is {share}: no example of the {epoch_examples:,} of an")
        assert unit == "epochs" and share * epoch_examples < 1e-6
    assert schema.NEVER.to_steps("eval.every", **size) == 0
    with pytest.raises(ConfigError, match=r"'train.total_epochs' is 1e-09: no example of the 429 of an epoch, and so"):
        Duration(epochs=1e-9).to_steps("train.total", **size | {"epoch_examples": 429})


@given(st.sampled_from(["tokens", "examples"]), st.integers(1, 10**13), st.integers(1, 4096), st.integers(1, 8192))
def test_to_steps_is_the_fewest_steps_that_reach_the_length(unit, length, batch_size, seq_len):
    steps = Duration(**{unit: length}).to_steps("x", batch_size=batch_size, seq_len=seq_len, epoch_examples=1)
    per_step = batch_size * (seq_len if unit == "tokens" else 1)
    assert (steps - 1) * per_step < length <= steps * per_step


# --- the rest ----------------------------------------------------------------------------------------------------


def test_diff_names_what_differs_and_nothing_else():
    old = build(optim={"warmup_steps": 5})
    new = build(optim={"warmup_tokens": 9}, model={"remat": "full"})
    assert config_lib.diff(old, new) == {
        "model.remat": ("none", "full"),
        "optim.warmup_steps": (5, 0),
        "optim.warmup_tokens": (0, 9),
    }
    assert config_lib.diff(new, new) == {}


def test_resumable_names_are_keys_or_sections():
    known = {*KEYS, *(key for options in OPTIONS.values() for key in options)}
    for name in config_lib.RESUMABLE:
        assert name in known or any(key.startswith(f"{name}.") for key in known), name


@pytest.mark.parametrize("name", TASKS)
def test_a_recipe_has_all_options_of_its_task_and_no_others(name):
    assert default_config(name).task == task_config(name)
    assert sorted(f"task.{key}" for key in default_config(name).task) == sorted(OPTIONS[name])
    assert build(task={"name": name}).task == TASKS[name].options(name=name)
    with pytest.raises(ConfigError, match=r"'task\.nam' \(did you mean 'name'\?\)"):
        task_config(name, nam="x")


def test_diff_names_the_options_that_one_of_two_tasks_lacks():
    old, new = build(task={"name": "masked_lm"}), build(task={"name": "translation"})
    assert config_lib.diff(old, new) == {
        "task.name": ("masked_lm", "translation"),
        "task.mask_rate": (0.15, None),
        "task.whole_words": (False, None),
        "task.bleu_tokenizer": (None, "auto"),
    }


def test_keys_are_unique():
    names = keys(Config)
    assert len(set(names)) == len(names)
    assert all(len(set(options)) == len(options) for options in OPTIONS.values())
    assert {"seed", "optim.learning_rate", "train.total", "data.path"} <= set(names)
    assert not {"train.total_steps", "optim", "train"} & set(names), "a duration counts once, a section not at all"


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1


def test_nearest_suggests_nothing_when_nothing_is_close():
    assert schema.nearest("seed", ["sead", "x"]) == " (did you mean 'sead'?)"
    assert schema.nearest("seed", ["zzz"]) == ""


def test_a_saved_config_without_rope_scaling_is_read_whatever_its_unused_factor_was():
    """The default of `rope_scaling.factor` was 1."""
    saved = json.loads(json.dumps(schema.to_dict(build())))
    saved["model"]["rope_scaling"]["factor"] = 1.0
    assert build_saved_config(saved) == build()
    saved["model"] |= {"position": "rope", "rope_scaling": saved["model"]["rope_scaling"] | {"kind": "linear"}}
    assert build_saved_config(saved).model.rope_scaling.factor == 1.0


@pytest.mark.parametrize(
    "unread",
    [
        {"qkv_bias": True},
        {"rope_local_theta": 500.0},
        {"rope_scaling": {"kind": "linear", "factor": 2.0}},
        {"kind": "vit", "position": "sincos", "sliding_window": 8},
    ],
)
def test_a_saved_config_may_have_keys_that_its_model_does_not_read_and_a_new_one_not(unread):
    saved = json.loads(json.dumps(schema.to_dict(build())))
    saved["model"] |= unread
    with pytest.raises(ConfigError):
        build_config(saved)
    kept = {key: value for key, value in unread.items() if key in ("kind", "position")}
    assert build_saved_config(saved).model == dataclasses.replace(build().model, **kept)


@pytest.mark.parametrize(("kind", "expected"), [("encoder_decoder", 3), ("mae", 3), ("decoder", 0)])
def test_the_layers_of_a_decoder_that_are_left_open_are_as_many_as_the_encoders_in_new_and_saved_configs(
    kind, expected
):
    """A run that an earlier version saved with 0 layers resumes: its config is the one that is resolved today."""
    position = "sincos" if kind == "mae" else "learned"
    planned = build(model={"kind": kind, "position": position, "num_layers": 3})
    now = transformer.resolve(planned.model, vocab_size=8, seq_len=planned.data.seq_len)
    assert now.decoder_layers == expected
    assert build_saved_config(json.loads(json.dumps(schema.to_dict(planned)))) == planned, "that of a trial"
    saved = json.loads(json.dumps(schema.to_dict(dataclasses.replace(planned, model=now))))
    for before in ({"decoder_layers": 0}, {"decoder_layers": None}):
        saved["model"] = {key: value for key, value in (saved["model"] | before).items() if value is not None}
        assert build_saved_config(saved).model.decoder_layers == expected
    saved["model"]["decoder_layers"] = 2 if expected else 0
    assert build_saved_config(saved).model.decoder_layers == (2 if expected else 0)


def test_the_sizes_of_a_decoder_that_earlier_versions_did_not_save_are_those_that_are_resolved_today():
    planned = build(model={"kind": "mae", "position": "sincos", "embed_dim": 64, "mlp_dim": 96, "decoder_dim": 32})
    now = transformer.resolve(planned.model, vocab_size=8, seq_len=planned.data.seq_len)
    assert (now.decoder_dim, now.decoder_heads, now.decoder_mlp_dim) == (32, 4, 48)
    saved = json.loads(json.dumps(schema.to_dict(dataclasses.replace(planned, model=now))))
    for key in ("decoder_heads", "decoder_mlp_dim", "pixel_mean", "pixel_deviation"):
        del saved["model"][key]
    del saved["model"]["max_len"]  # a trial's config, which leaves sizes open, stays as it is
    assert build_saved_config(saved).model.decoder_heads == 0
    saved["model"]["max_len"] = now.max_len
    assert build_saved_config(saved).model == now
