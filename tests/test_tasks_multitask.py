"""Several tasks in one batch, each with its own head columns, against float64 and against each task alone."""

import dataclasses
import functools
import json
import sys
import types
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from lm import run as run_lib
from lm import train
from lm.config import Config, MeshConfig, ModelConfig
from lm.config.schema import ConfigError
from lm.data.record import DataError
from lm.data.tokenizer import train as train_tokenizer
from lm.models import registry, transformer
from lm.parallel.mesh import make_mesh
from lm.tasks import TASKS, build_config, default_config, multitask
from lm.tasks.multitask import Part
from tests import tool_modules, toys

mix_tasks = tool_modules.load("mix_tasks")
LABELS = ("mood/bad", "mood/good", "mood/so", "alike/", "right/0", "right/1")
PARTS = [Part("mood", ("bad", "good", "so"), 0), Part("alike", (), 3), Part("right", ("0", "1"), 4)]


def make_config(**loss) -> Config:
    shape = ModelConfig(kind="encoder", num_layers=1, embed_dim=16, num_heads=2, mlp_dim=24, pool="mean")
    cfg = Config(model=transformer.resolve(shape, vocab_size=toys.VOCAB, seq_len=8))
    data = dataclasses.replace(cfg.data, seq_len=8, packing="pad")
    task = toys.task("multitask", labels=LABELS)
    return dataclasses.replace(cfg, task=task, data=data, loss=dataclasses.replace(cfg.loss, **loss))


def test_labels_define_the_tasks():
    assert multitask.parts(LABELS) == PARTS
    assert TASKS["multitask"].head(make_config()).size == 6


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (("a/0", "a/1", "b"), "task 'b' has the labels"),
        (("a/0",), "task 'a' has the labels"),
        (("a/", "a/1"), "task 'a' has the labels"),
        (("/0", "/1"), "task '' has the labels"),
        (("a/0", "a/1", "b/", "a/2", "a/3"), "the labels of task 'a' must be adjacent"),
    ],
)
def test_malformed_labels_are_refused(labels, says):
    with pytest.raises(ConfigError) as error:
        multitask.parts(labels)
    assert says in str(error.value) and "'task.labels'" in str(error.value)


def made(label: str):
    words = train_tokenizer(["one two three four " * 9], 285, 1000)
    counts: Counter[str] = Counter()
    record = {"text": "one two", "text_pair": "three", "label": label, "source": "f:7"}
    [example] = multitask.mixed_sentences(record, words, make_config(), counts)
    return example.columns, counts


@pytest.mark.parametrize(
    ("label", "part", "value"),
    [("mood/good", 0, 1), ("mood/so", 0, 2), ("right/0", 2, 0), ("alike/3.8", 1, 3.8), ("alike/-1", 1, -1)],
)
def test_an_example_has_its_task_and_the_index_of_its_label_within_it(label, part, value):
    columns, counts = made(label)
    assert (columns["part"], columns["labels"]) == (part, np.float32(value))
    assert counts[PARTS[part].name] == 1


@pytest.mark.parametrize(
    ("label", "says"),
    [
        ("moods/good", r"f:7: label 'moods/good' is of no task among mood, alike, right \(did you mean 'mood'\?\)"),
        ("good", "f:7: label 'good' is of no task among"),
        ("mood/0", "f:7: label 'mood/0'; expected one of bad, good, so after 'mood/'"),
        ("mood/", "f:7: label 'mood/'; expected one of"),
        ("alike/nan", "f:7: label 'alike/nan'; expected a finite number after 'alike/'"),
        ("alike/good", "f:7: label 'alike/good'; expected a finite number"),
    ],
)
def test_a_label_of_no_task_is_refused_with_the_record_named(label, says):
    with pytest.raises(DataError, match=says):
        made(label)


def batch(rows: int = 16) -> dict[str, np.ndarray]:
    """Rows of all tasks; the last one is padding."""
    rng = np.random.default_rng(0)
    part = rng.permutation(np.arange(rows) % 3).astype(np.int32)
    classes = np.array([3, 1, 2])[part]
    weights = np.ones(rows, np.float32)
    weights[-1] = 0
    ones = np.ones((rows, 8), np.int32)
    return {
        "tokens": rng.integers(1, toys.VOCAB, (rows, 8)).astype(np.int32),
        "type_ids": 0 * ones,
        "segment_ids": ones,
        "positions": np.arange(8, dtype=np.int32)[None] * ones,
        "labels": np.where(part == 1, rng.normal(2, 1, rows), rng.integers(0, classes)).astype(np.float32),
        "part": part,
        "row_weights": weights,
        "example_index": np.arange(rows, dtype=np.int32),
    }


@functools.cache
def model():
    cfg = make_config()
    fns = registry.MODELS["encoder"](cfg, TASKS["multitask"].head(cfg), jnp.float32)
    rng = np.random.default_rng(1)
    params = jax.jit(fns.init)(jax.random.key(0))
    return fns, jax.tree.map(lambda leaf: leaf + 0.2 * rng.standard_normal(leaf.shape).astype(np.float32), params)


def reference(logits: np.ndarray, rows: dict[str, np.ndarray], eps: float):
    """(loss, weight, right answers) of each task, in float64, row by row."""
    sums = {part.name: np.zeros(3) for part in PARTS}
    for logit, label, place, weight in zip(logits, rows["labels"], rows["part"], rows["row_weights"], strict=True):
        part = PARTS[place]
        if part.name == "alike":
            loss, right = (logit[3] - float(label)) ** 2, 0
        else:
            own = logit[part.first : part.first + len(part.classes)]
            nll = np.log(np.exp(own).sum()) - own
            loss, right = (1 - eps) * nll[int(label)] + eps * nll.mean(), own.argmax() == label
        sums[part.name] += weight * np.array([loss, 1, right])
    return sums


@pytest.mark.parametrize(("devices", "eps"), [(1, 0.1), (8, 0.0)])
def test_each_row_has_the_loss_of_its_own_task(devices, eps):
    fns, params = model()
    rows = batch()
    logits = jax.device_get(fns.apply(params, rows).head).astype(np.float64)
    want = reference(logits, rows, eps)
    mesh = make_mesh(MeshConfig(data=devices), jax.devices()[:devices])
    loss_fn = multitask.multitask_loss(fns.apply, make_config(label_smoothing=eps), None)
    with jax.set_mesh(mesh):
        terms = jax.device_get(jax.jit(lambda p, b: loss_fn(p, b, None))(params, run_lib.placer(mesh, 16)(rows)))
    assert terms.weight == 15
    assert terms.sum == pytest.approx(sum(loss for loss, _, _ in want.values()), rel=2e-6)
    for name, (loss, weight, right) in want.items():
        assert terms.metrics[f"{name}_loss"] == pytest.approx((loss, weight), rel=2e-6)
        if name != "alike":
            assert terms.metrics[f"{name}_accuracy"] == (right, weight)
    assert set(terms.metrics) == {"mood_loss", "mood_accuracy", "alike_loss", "right_loss", "right_accuracy"}


def test_a_task_has_gradients_only_in_its_own_columns_of_the_head():
    fns, params = model()
    rows = batch()
    loss_fn = multitask.multitask_loss(fns.apply, make_config(label_smoothing=0.1), None)
    gradient = jax.jit(jax.grad(lambda p, b: loss_fn(p, b, None).sum))
    for i, part in enumerate(PARTS):
        kernel = gradient(params, rows | {"row_weights": (rows["part"] == i).astype(np.float32)})["head"]["classifier"]
        moved = np.abs(jax.device_get(kernel["kernel"])).max(axis=0) > 0
        assert np.flatnonzero(moved).tolist() == list(range(part.first, part.first + max(1, len(part.classes))))


def test_micro_batches_that_mix_tasks_unevenly_add_up_to_the_batch():
    fns, params = model()
    rows = batch()
    by_task = {key: x[np.argsort(rows["part"])] for key, x in rows.items()}  # so that micro-batches lack tasks
    loss_fn = multitask.multitask_loss(fns.apply, make_config(), None)
    run = jax.jit(lambda p, b: loss_fn(p, b, None)._replace(outputs={}))
    whole = run(params, rows)
    parts = [run(params, {key: x[at : at + 4] for key, x in by_task.items()}) for at in range(0, 16, 4)]
    summed = jax.tree.map(lambda *terms: sum(terms), *parts)
    assert jax.tree.structure(whole) == jax.tree.structure(summed)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(summed), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-6)


def test_scores_equal_those_of_each_task_alone():
    rng = np.random.default_rng(0)
    part = np.arange(90) % 3
    label = np.where(part == 1, rng.normal(size=90), rng.integers(0, np.array([3, 1, 2])[part])).astype(np.float32)
    said = np.where(rng.random(90) < 0.5, label, np.where(part == 1, rng.normal(size=90), 0)).astype(np.float32)
    outputs = {"label": label, "prediction": said, "part": part}
    score = TASKS["multitask"].scores
    found = score(outputs, [], make_config())
    want = {"alike_pearson": scipy.stats.pearsonr(label[part == 1], said[part == 1]).statistic}
    want["alike_spearman"] = scipy.stats.spearmanr(label[part == 1], said[part == 1]).statistic
    accuracies = []
    for i, name, average in ((0, "mood", "macro"), (2, "right", "binary")):
        own = label[part == i].astype(int), said[part == i].astype(int)
        want[f"{name}_f1"] = sklearn.metrics.f1_score(*own, average=average)
        want[f"{name}_matthews"] = sklearn.metrics.matthews_corrcoef(*own)
        accuracies.append(sklearn.metrics.accuracy_score(*own))
    want["mean_score"] = (sum(accuracies) + want["alike_pearson"]) / 3
    assert found == pytest.approx(want, rel=1e-6)
    assert set(TASKS["multitask"].score_names(make_config())) == set(found)
    alone = score({name: array[part == 0] for name, array in outputs.items()}, [], make_config())
    assert set(alone) == {"mood_f1", "mood_matthews", "mean_score"} and alone["mean_score"] == accuracies[0]


def test_recipes_are_mixed_and_learnt_in_one_run(tmp_path, monkeypatch):
    def recipe(name: str, labels: tuple[str, ...]):
        lines = []
        for n in range(40):
            label = labels[n % 2] if labels else str(n % 2)
            lines.append({"text": f"{'yes' if n % 2 else 'no'} {n}", "label": label, "text_pair": f"of {name}"})
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        c = default_config("classification" if labels else "regression")
        if labels:
            c.task.labels = labels
        c.data.format, c.data.path, c.data.packing = "jsonl", str(path), "pad"
        c.data.eval_fraction, c.model.kind, c.train.total_steps = 0.2, "encoder", 1
        return types.SimpleNamespace(get_config=lambda: c)

    monkeypatch.setitem(sys.modules, "configs.toy_mood", recipe("mood", ("bad", "good")))
    monkeypatch.setitem(sys.modules, "configs.toy_alike", recipe("alike", ()))
    assert mix_tasks.mix(tmp_path / "out", ["toy_mood", "toy_alike"]) == {"toy_mood": 40, "toy_alike": 40}
    lines = [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]
    held_out = [json.loads(line) for line in (tmp_path / "out" / "valid.jsonl").read_text().splitlines()]
    assert len(lines) + len(held_out) == 80 and len(held_out) > 2
    assert {line["label"] for line in lines} == {"toy_mood/bad", "toy_mood/good", "toy_alike/0", "toy_alike/1"}
    assert all(set(line) == {"text", "text_pair", "label"} for line in lines)

    c = default_config("multitask")
    c.data.format, c.data.packing = "jsonl", "pad"
    c.data.path, c.data.eval_path = (str(tmp_path / "out" / f"{part}.jsonl") for part in ("train", "valid"))
    c.task.labels = ("toy_mood/bad", "toy_mood/good", "toy_alike/")
    c.data.seq_len, c.data.batch_size, c.tokenizer.vocab_size = 16, 16, 290
    c.model.kind, c.model.num_layers, c.model.embed_dim, c.model.num_heads = "encoder", 1, 16, 2
    c.model.pool, c.optim.learning_rate, c.optim.warmup_steps = "mean", 1e-2, 1
    c.train.total_steps, c.checkpoint.best_metric = 40, "mean_score"
    toys.use_one_device(monkeypatch)
    summary = train.train(build_config(c), tmp_path / "run")
    assert summary["toy_mood_accuracy"] > 0.9 and summary["toy_alike_pearson"] > 0.9
    assert summary["mean_score"] == pytest.approx((summary["toy_mood_accuracy"] + summary["toy_alike_pearson"]) / 2)
