"""lm/evaluation/evaluate.py: metrics do not depend on the batch size or the number of devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

from lm import losses, step
from lm import run as run_lib
from lm.config import MeshConfig
from lm.data import loader
from lm.evaluation import evaluate, metrics
from lm.models import transformer
from lm.parallel import sharding
from lm.parallel.mesh import make_mesh

ROWS, SEQ_LEN = 11, 12


def run(eval_step, params, batch_size: int, shards: int, rows=None, max_tokens: int = 0):
    """Evaluates on some of the fake devices, with batches and shardings as in a run."""
    rows = toys.batch(ROWS, SEQ_LEN) if rows is None else rows
    mesh = make_mesh(MeshConfig(data=shards), jax.devices()[:shards])
    local = sharding.local_rows(mesh, batch_size)
    columns = {key: (x.shape[1:], x.dtype) for key, x in rows.items() if key != "example_index"}
    part = loader.Part(*loader.in_memory({key: rows[key] for key in columns}), [], columns, columns)
    batches = loader.eval_batches(
        part, batch_size=batch_size, local_rows=local, max_tokens=max_tokens, seq_len=rows["tokens"].shape[1]
    )
    with jax.set_mesh(mesh):
        sums, outputs = evaluate.evaluate(eval_step, params, run_lib.placer(mesh, batch_size), batches, len(part))
        return metrics.finalize(sums, has_perplexity=True), outputs


def count(_, batch):
    """An evaluation step whose sums are of small integers, and so exact in any order."""
    weights = batch["loss_weights"]
    per_row = jnp.sum(batch["tokens"] * weights, axis=1)
    sums = {
        "tokens": (jnp.sum(per_row), jnp.sum(weights)),
        "squares": (jnp.sum(per_row**2), jnp.sum(weights)),
        "targets": (jnp.sum(batch["targets"] * weights), jnp.sum(weights)),
    }
    return sums, {"first": batch["tokens"][:, 0]}


@pytest.mark.parametrize(("batch_size", "shards"), [(1, 1), (3, 1), (8, 1), (8, 8), (16, 8)])
def test_each_row_counts_once(batch_size, shards):
    rows = toys.batch(ROWS, SEQ_LEN)
    weights = rows["loss_weights"].astype(np.float64)
    per_row = (rows["tokens"] * weights).sum(axis=1)
    sums = {"tokens": per_row.sum(), "squares": (per_row**2).sum(), "targets": (rows["targets"] * weights).sum()}
    got, outputs = run(jax.jit(count), None, batch_size, shards)
    assert outputs["first"].tolist() == rows["tokens"][:, 0].tolist()
    assert got == {name: value / weights.sum() for name, value in sums.items()}


def test_the_loss_does_not_depend_on_batch_size_and_number_of_shards():
    cfg = transformer.resolve(dataclasses.replace(toys.LLAMA, num_layers=1), vocab_size=toys.VOCAB, seq_len=SEQ_LEN)
    model = transformer.text_model(cfg, jnp.float32)

    def loss_fn(params, batch, rng):
        out = model.apply(params, batch, rng=rng)
        return losses.token_cross_entropy(
            out.hidden_BxLxD,
            out.unembed_DxV,
            batch["targets"],
            batch["loss_weights"],
            vocab_size=toys.VOCAB,
            softcap=cfg.logit_softcap,
        )

    eval_step = jax.jit(functools.partial(step.eval_step, loss_fn=loss_fn))
    params = jax.device_get(jax.jit(model.init)(jax.random.key(0)))
    total, weight = eval_step(params, toys.batch(ROWS, SEQ_LEN))[0]["loss"]  # all rows at once
    want = float(total) / float(weight)
    found = {sizes: run(eval_step, params, *sizes)[0] for sizes in [(1, 1), (3, 1), (8, 8)]}
    for sizes, values in found.items():
        assert values["loss"] == pytest.approx(want, rel=2e-6), sizes
        assert values["accuracy"] == found[8, 8]["accuracy"], sizes
        assert values["perplexity"] == pytest.approx(np.exp(values["nll"]))


def test_a_batch_counts_by_its_number_of_targets():
    """Sums, not a mean of means: one row with 100 targets of value 1, and ten rows with one target of value 0."""
    rows = {key: np.zeros((11, 100), x.dtype) for key, x in toys.batch(1, 100).items()}
    rows["loss_weights"][0], rows["tokens"][0] = 1, 1
    rows["loss_weights"][1:, 0] = 1
    assert run(jax.jit(count), None, 1, 1, rows)[0]["tokens"] == 100 / 110


def test_without_batches_there_are_no_metrics():
    assert evaluate.evaluate(count, None, dict, [], 0) == ({}, {})
