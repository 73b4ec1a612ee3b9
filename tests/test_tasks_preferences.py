"""Preference pairs: rows made by hand, the loss and its gradient against float64, a fixed reference, and runs."""

import dataclasses
import functools
import json
import shutil
from collections import Counter
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import checkpoint, config, input_pipeline, param_paths, step, train
from lm import run as run_lib
from lm.config import AdapterConfig, LossConfig, MeshConfig
from lm.config.schema import ConfigError
from lm.data import tokenizer
from lm.data.readers import registry
from lm.data.record import DataError
from lm.models import transformer
from lm.parallel import sharding
from lm.parallel.mesh import make_mesh
from lm.tasks import TASKS, chat
from tests import reference, test_step, toys

TASK = TASKS["preferences"]
TOK = tokenizer.train([f"It is {n} and {n * n}, what is it then? So be it." for n in range(40)], 330, 100_000)
SYSTEM, ASK = {"role": "system", "content": "so"}, {"role": "user", "content": "what is it?"}
GOOD, BAD = {"role": "assistant", "content": "It is 4."}, {"role": "assistant", "content": "So be it 9."}
BETA = 0.3


# Rows -----------------------------------------------------------------------------------------------------------------


def make_config(seq_len=96, overlong="drop_turns", **options):
    data = config.DataConfig(seq_len=seq_len, packing="pad", overlong=overlong)
    return config.Config(data=data, task=toys.task("preferences", **options))


def make(seq_len=96, prompt=(ASK,), chosen=(GOOD,), rejected=(BAD,), overlong="drop_turns"):
    """The columns of a pair, or None, and the counts."""
    record = {"prompt": [*prompt], "chosen": [*chosen], "rejected": [*rejected], "source": "f:1"}
    counts = Counter()
    found = TASK.examples(record, TOK, make_config(seq_len, overlong), counts)
    for example in found:
        for name, (shape, dtype) in TASK.columns(make_config(seq_len)).items():
            assert example.columns[name].shape == shape and example.columns[name].dtype == dtype
    return (found[0].columns if found else None), dict(counts)


def ids_of(*messages):
    return chat.tokens_of(messages, TOK, "").ids


def assert_view(row, view, whole, trained):
    """Checks that a view holds the ids `whole` and that only the `trained` ids at its end are trained on."""
    n = len(whole) - 1
    padding = row["tokens"].shape[1] - n
    assert row["tokens"][view].tolist() == whole[:-1] + [0] * padding
    assert row["targets"][view].tolist() == whole[1:] + [0] * padding
    assert row["loss_weights"][view].tolist() == [0] * (n - trained) + [1] * trained + [0] * padding
    assert row["segment_ids"][view].tolist() == [1] * n + [0] * padding
    assert row["positions"][view].tolist() == [*range(n), *[0] * padding]


def test_a_row_is_the_chat_with_each_answer_and_only_answers_are_trained_on():
    earlier = {"role": "assistant", "content": "It is it."}
    row, counts = make(prompt=[SYSTEM, ASK, earlier, ASK])
    for view, answer in enumerate((GOOD, BAD)):
        content = len(TOK.encode(answer["content"]))
        assert_view(row, view, ids_of(SYSTEM, ASK, earlier, ASK, answer), content + 1)
    assert counts == {}


def test_an_answer_of_several_messages_keeps_other_roles_messages_in_between():
    row, _ = make(chosen=[GOOD, ASK, GOOD, ASK], rejected=[BAD])
    trained = row["targets"][0][row["loss_weights"][0] > 0].tolist()
    assert trained == [*TOK.encode(GOOD["content"]), TOK.end_of_turn_id] * 2
    assert row["segment_ids"][0].sum() == len(ids_of(ASK, GOOD, ASK, GOOD)) - 1


def test_both_answers_keep_the_same_part_of_a_long_prompt():
    old = [{"role": "user", "content": "and then " * 9}, {"role": "assistant", "content": "so"}]
    longer = {"role": "assistant", "content": BAD["content"] * 2}
    needed = len(ids_of(SYSTEM, ASK, longer)) - 1
    row, counts = make(needed, [SYSTEM, *old, ASK], rejected=[longer])
    for view, answer in enumerate((GOOD, longer)):
        assert_view(row, view, ids_of(SYSTEM, ASK, answer), len(TOK.encode(answer["content"])) + 1)
    assert counts == {"prompts_shortened": 1}


def test_long_pairs_are_cut_dropped_or_truncated_and_counted():
    whole = len(ids_of(ASK, BAD)) - 1
    row, counts = make(whole - 2)
    assert counts == {"answers_cut": 1}
    assert row["loss_weights"][1].sum() == len(TOK.encode(BAD["content"])) - 1 and row["segment_ids"][1].all()
    prompt = len(ids_of(ASK)) - 1
    assert make(prompt) == (None, {"dropped_long_prompt": 1})
    assert make(prompt + 1) == (None, {"dropped_long_prompt": 1})  # room only for the role symbol
    assert make(prompt + 2)[1] == {"answers_cut": 1}
    assert make(whole - 1, overlong="drop") == (None, {"dropped_overlong": 1})
    assert make(whole, overlong="drop")[1] == {}
    row, counts = make(whole + 3, [SYSTEM, ASK], overlong="truncate")
    assert counts == {"pairs_truncated": 1}
    assert row["tokens"][1].tolist() == ids_of(SYSTEM, ASK, BAD)[: whole + 3]


def test_pairs_of_equal_answers_or_without_a_trained_token_are_dropped_and_counted():
    assert make(rejected=[GOOD]) == (None, {"dropped_equal_answers": 1})
    assert make(rejected=[GOOD, ASK]) == (None, {"dropped_equal_answers": 1})
    start = {"role": "assistant", "content": GOOD["content"] + " " + GOOD["content"]}
    assert make(len(ids_of(ASK, GOOD)) - 2, rejected=[start]) == (None, {"dropped_equal_answers": 1})
    assert make(rejected=[BAD | {"weight": 0}]) == (None, {"dropped_no_target": 1})


def write_pairs(path, rows=60, equal=()):
    """Questions whose chosen answer is right; in the rows `equal` the rejected answer is the same."""
    pairs = [
        {"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": f"It is {n}." if n in equal else "So be it."}
        for n in range(rows)
    ]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


def data_of(path):
    cfg = toys.recipe(path, task__name="preferences", data__packing="pad", data__seq_len=48, data__eval_fraction=0.3)
    return input_pipeline.build(
        dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, overlong="drop_turns")),
        TOK,
        registry.load(cfg.data, TASK.wanted(cfg)),
    )


def test_data_in_which_all_pairs_are_equal_is_refused(tmp_path):
    report = data_of(write_pairs(tmp_path / "a.jsonl", equal=range(0, 60, 2))).report
    assert sum(part["dropped_equal_answers"] for part in report.values()) == 30
    assert sum(part["examples"] for part in report.values()) == 30
    with pytest.raises(
        DataError, match=r"the train data has no target: .*dropped_equal_answers \d+\); check data\.path"
    ):
        data_of(write_pairs(tmp_path / "b.jsonl", equal=range(60)))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"task__beta": 0.0}, r"'task\.beta' must be greater than 0, got 0"),
        ({"task__flip_rate": 0.5}, r"'task\.flip_rate' is 0\.5; expected a share in \[0, 0\.5\)"),
        ({"optim__l2_sp": 0.1}, r"'optim\.l2_sp' is set, but the loss of task\.name=preferences already compares"),
        ({"optim__mixout": 0.1}, r"'optim\.mixout' is set"),
        ({"data__packing": "best_fit"}, r"'data\.packing' is best_fit, which does not fit task\.name=preferences"),
        ({"model__kind": "encoder"}, r"'model\.kind' is encoder, which does not fit"),
        (
            {"loss__label_smoothing": 0.1},
            r"'loss\.label_smoothing' is 0\.1, but task\.name=preferences does not",
        ),
    ],
)
def test_invalid_options_are_refused(tmp_path, changes, says):
    cfg = toys.recipe(tmp_path / "a.jsonl", **{"task__name": "preferences", "data__packing": "pad"} | changes)
    with pytest.raises(ConfigError, match=says):
        run_lib.plan(cfg, None)


# The loss -------------------------------------------------------------------------------------------------------------

SEQ_LEN, ROWS = 12, 8
WORDS = SimpleNamespace(vocab_size=toys.VOCAB)


@functools.cache
def batch():
    """Pairs of very uneven length; row 3 has weight 0 and content that would break the loss."""
    found = {key: x.reshape(ROWS, 2, SEQ_LEN) for key, x in toys.batch(2 * ROWS, SEQ_LEN).items() if x.ndim > 1}
    found["targets"][3] = 10**6
    weights = np.ones(ROWS, np.float32)
    weights[3] = 0
    return found | {"row_weights": weights, "example_index": np.arange(ROWS, dtype=np.int32)}


@functools.cache
def model(style, adapter=AdapterConfig()):  # noqa: B008
    """(model config, functions, parameters now, parameters at the start)."""
    cfg, _, start = toys.decoder(toys.STYLES[style], SEQ_LEN)
    fns = transformer.text_model(cfg, jnp.float32, None, adapter)
    fresh = param_paths.flatten(jax.jit(fns.init)(jax.random.key(0)))
    start = jax.device_get(param_paths.unflatten(fresh | param_paths.flatten(start)))
    rng = np.random.default_rng(5)
    now = jax.tree.map(lambda leaf: leaf + 0.1 * rng.standard_normal(leaf.shape).astype(np.float32), start)
    return cfg, fns, now, start


def loss_fn(style, adapter=AdapterConfig(), **options):  # noqa: B008
    cfg, fns, _, _ = model(style, adapter)
    options = {"beta": BETA} | options
    whole = config.Config(model=cfg, task=toys.task("preferences", **options), loss=LossConfig(chunk_len=5))
    return TASK.loss(fns.apply, whole, WORDS)


@functools.cache
def log_likelihoods(style, moved):
    """float64 [rows, 2], and the gradient of each: minus the reference implementation's loss of one conversation."""
    cfg, _, now, start = model(style)
    values, grads = np.zeros((ROWS, 2)), {}
    for row, view in [(r, v) for r in range(ROWS) if r != 3 for v in (0, 1)]:
        alone = {key: batch()[key][row, view][None] for key in batch() if batch()[key].ndim == 3}
        total, _, grad = reference.loss_and_grads(now if moved else start, alone, cfg, LossConfig(), toys.VOCAB)
        values[row, view], grads[row, view] = -total, jax.tree.map(lambda g: -g, grad)
    return values, grads


@functools.cache
def expected(style, flip_rate=0.0):
    """Sum of the loss, weight, gradient of the sum, and metrics, in float64."""
    now, grads = log_likelihoods(style, True)
    rewards = BETA * (now - log_likelihoods(style, False)[0])
    rows = [row for row in range(ROWS) if row != 3]
    margin = rewards[:, 0] - rewards[:, 1]
    p_wrong = 1 / (1 + np.exp(margin))
    loss = -(1 - flip_rate) * np.log(1 - p_wrong) - flip_rate * np.log(p_wrong)
    d_margin = -(1 - flip_rate) * p_wrong + flip_rate * (1 - p_wrong)
    weighted = [
        jax.tree.map(lambda c, r, d=d_margin[row]: BETA * d * (c - r), grads[row, 0], grads[row, 1]) for row in rows
    ]
    metrics = {
        "accuracy": (margin[rows] > 0).sum(),
        "reward_margin": margin[rows].sum(),
        "chosen_reward": rewards[rows, 0].sum(),
        "rejected_reward": rewards[rows, 1].sum(),
        "nll": -np.log(1 - p_wrong[rows]).sum(),
    }
    return loss[rows].sum(), len(rows), jax.tree.map(lambda *leaves: sum(leaves), *weighted), metrics


@pytest.mark.parametrize(("style", "flip_rate"), [("gpt2", 0.0), ("llama", 0.0), ("llama", 0.2)])
def test_the_loss_and_its_gradient_match_the_paper(style, flip_rate):
    """Equation 7 of Rafailov et al. 2023 in float64, with its gradient by hand; one of the rows has weight 0."""
    _, _, now, start = model(style)
    total, weight, grads, metrics = expected(style, flip_rate)
    one = jax.jit(lambda p: loss_fn(style, flip_rate=flip_rate)(p, batch(), None, start))
    terms = one(now)
    assert 0 < metrics["accuracy"] < weight and float(terms.weight) == weight
    assert float(terms.sum) == pytest.approx(total, rel=1e-5)
    found = {name: float(value) for name, (value, _) in terms.metrics.items()}
    assert found == pytest.approx(metrics, rel=1e-4) and terms.outputs == {}
    assert all(float(by) == weight for _, by in terms.metrics.values())
    test_step.assert_close(jax.grad(lambda p: one(p).sum)(now), grads, 1e-5)


@pytest.mark.parametrize(
    ("mesh_cfg", "devices", "micro_batches"),
    [
        (MeshConfig(data=1), 1, 1),
        (MeshConfig(data=8), 8, 1),
        (MeshConfig(data=2, fsdp=2, tensor=2), 8, 1),
        (MeshConfig(data=1), 1, 4),
        (MeshConfig(data=2), 2, 4),
    ],
)
def test_a_step_is_the_same_on_many_devices_and_in_micro_batches(mesh_cfg, devices, micro_batches):
    """Metrics and gradient against the float64 reference, with parameters that differ from the start."""
    total, weight, grads, metrics = expected("llama")
    _, _, now, start = model("llama")
    optimizer = test_step.gradient_as_parameters(now)
    one = functools.partial(
        step.train_step, loss_fn=loss_fn("llama"), optimizer=optimizer, seed=3, micro_batches=micro_batches
    )
    mesh = make_mesh(mesh_cfg, jax.devices()[:devices])
    with jax.set_mesh(mesh):
        every = dict.fromkeys(param_paths.flatten(now), True)
        state = step.init_state(now, optimizer, use_ema=False, anchored=every)._replace(start=start)
        placed = sharding.to_global(batch(), sharding.local_rows(mesh, ROWS), ROWS, mesh)
        state, found = jax.jit(functools.partial(one, ema_decay=0.0, needs_start=True))(state, placed)
    found = jax.device_get(found)
    assert found["loss"] == pytest.approx(total / weight, rel=1e-5) and found["weight"] == weight
    assert {name: found[name][0] for name in metrics} == pytest.approx(metrics, rel=1e-4)
    test_step.assert_close(jax.device_get(state.params), jax.tree.map(lambda g: g / weight, grads), 1e-5)


@pytest.mark.parametrize("adapter", [AdapterConfig(), AdapterConfig("lora", rank=2), AdapterConfig("pfeiffer", rank=2)])
def test_at_the_start_the_loss_is_exactly_log_2(adapter):
    """Accuracy is 0; the policy has a gradient, the reference has none."""
    _, _, _, start = model("gpt2", adapter)
    one = jax.jit(lambda now, start, rows: loss_fn("gpt2", adapter)(now, rows, None, start))
    terms = one(start, start, batch())
    margin, accuracy = terms.metrics["reward_margin"], terms.metrics["accuracy"]
    assert terms.sum == terms.weight * np.float32(np.log(2)) and margin[0] == accuracy[0] == 0
    of_policy, of_start = jax.jit(jax.grad(lambda *params: one(*params, batch()).sum, (0, 1)))(start, start)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(of_policy)) > 1e-3
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(of_start))


def test_dropout_applies_to_the_policy_but_not_to_the_reference():
    cfg = dataclasses.replace(model("gpt2")[0], dropout=0.3)
    fns, start = transformer.text_model(cfg, jnp.float32), model("gpt2")[3]
    seen = []

    def apply(params, rows, *, rng):
        seen.append(rng)
        return fns.apply(params, rows, rng=rng)

    options = config.Config(model=cfg, task=toys.task("preferences"))
    one = TASK.loss(apply, options, WORDS)
    first, again, other, none = (
        float(one(start, batch(), rng, start).sum)
        for rng in (jax.random.key(0), jax.random.key(0), jax.random.key(1), None)
    )
    assert first == again != other and none == pytest.approx(7 * np.log(2)) and first != none
    assert [rng is None for rng in seen] == [True, False] * 3 + [True, True]


# Runs -----------------------------------------------------------------------------------------------------------------


def recipe(folder, **changes):
    path = folder / "pairs.jsonl"
    changes = {
        "task__name": "preferences",
        "tokenizer__vocab_size": 290,
        "data__packing": "pad",
        "data__seq_len": 48,
        "data__eval_fraction": 0.3,
        "model__num_layers": 1,
        "model__dropout": 0.1,
        "optim__learning_rate": 1e-2,
        "optim__ema_decay": 0.0,
        "train__total_steps": 16,
    } | changes
    return toys.recipe(path if path.exists() else write_pairs(path, 120), **changes)


LORA = {
    "adapter__kind": "lora",
    "adapter__targets": r".*/(query|value|out|up|down)",
    "optim__lr_rules": ((r".*/lora_.*", 1.0), (r".*", 0.0)),
}


def state_of(folder, cfg):
    """The last state that a run saved."""
    run = run_lib.prepare(run_lib.plan(cfg, folder), make_mesh(cfg.mesh), lambda _: None)
    return jax.device_get(checkpoint.load(checkpoint.choose(str(folder)), run.program.abstract_state))


def test_a_run_learns_to_prefer(tmp_path):
    cfg = recipe(tmp_path, train__micro_batches=2, checkpoint__best_metric="accuracy")
    summary = train.train(cfg, tmp_path / "run")
    before = summary["before"]
    assert (before["accuracy"], before["reward_margin"]) == (0, 0) and before["loss"] == pytest.approx(np.log(2))
    assert summary["accuracy"] > 0.9 and summary["loss"] < 0.4
    assert summary["reward_margin"] == pytest.approx(summary["chosen_reward"] - summary["rejected_reward"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, LORA], ids=["full", "lora"])
def test_the_reference_stays_equal_to_the_initial_run_and_frozen_parameters_are_stored_once(tmp_path, changes):
    """Bitwise after all steps. With LoRA the state keeps only copies of LoRA's matrices."""
    base = recipe(tmp_path, train__total_steps=2)
    train.train(base, tmp_path / "base")
    rules = ((r".*/lora_.*", "reinit"), (r".*", "keep"))[0 if changes else 1 :]
    cfg = recipe(tmp_path, init_from=str(tmp_path / "base"), init_rules=rules, **changes)
    summary = train.train(cfg, tmp_path / "run")
    before = summary["before"]
    assert before["loss"] == pytest.approx(np.log(2)) and before["accuracy"] == 0
    assert summary["accuracy"] > 0.9 and summary["loss"] < before["loss"]
    state, old = state_of(tmp_path / "run", cfg), param_paths.flatten(state_of(tmp_path / "base", base).params)
    kept, now = param_paths.flatten(state.start), param_paths.flatten(state.params)
    assert kept and all("/lora_" in path for path in kept) == bool(changes)
    assert sum(leaf.size for leaf in kept.values()) == summary["trained_parameters"]
    assert summary["trained_parameters"] < summary["parameters"] / (5 if changes else 0.9)
    at_start = param_paths.flatten(step.start_params(state.params, state.start))
    for path, leaf in old.items():
        np.testing.assert_array_equal(at_start[path], leaf, err_msg=path)
    for path in kept:
        assert not np.array_equal(kept[path], now[path]), path
        assert not path.endswith("lora_b") or not kept[path].any()


@pytest.mark.slow
def test_a_resumed_run_keeps_its_reference_and_equals_the_uninterrupted_one(tmp_path):
    cfg = recipe(tmp_path, checkpoint__every_steps=4, train__total_steps=8)
    train.train(cfg, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    (tmp_path / "parts" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "8")
    train.train(cfg, tmp_path / "parts")
    whole, parts = (state_of(tmp_path / name, cfg) for name in ("whole", "parts"))
    assert whole.step == 8 and whole.start is not None
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
