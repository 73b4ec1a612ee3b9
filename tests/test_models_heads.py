"""Heads, encoders and the losses of rows: float64 references, padding without influence, one device = a mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import losses, optim, step
from lm.config import Config, MeshConfig, ModelConfig, OptimConfig
from lm.models import heads, registry, transformer
from lm.parallel import sharding
from lm.parallel.mesh import make_mesh
from lm.tasks import TASKS
from lm.tasks.classification import classification_loss
from lm.types import Head
from tests import toys

LABELS = ("no", "yes", "maybe")
POOLS = ("first", "mean", "last")
RNG = np.random.default_rng(0)


def make_config(**model) -> Config:
    shape = {"num_layers": 2, "embed_dim": 16, "num_heads": 4, "mlp_dim": 24, "kind": "encoder"}
    resolved = transformer.resolve(ModelConfig(**(shape | model)), vocab_size=toys.VOCAB, seq_len=12)
    return Config(model=resolved, task=toys.task("classification", labels=LABELS))


def batch(rows: int, seq_len: int = 12, label: type = np.int32) -> dict[str, np.ndarray]:
    """Padded pairs of sentences; the last row only fills the batch up."""
    lengths = RNG.integers(4, seq_len, rows)
    segments = (np.arange(seq_len)[None] < lengths[:, None]).astype(np.int32)
    weights = np.ones(rows, np.float32)
    weights[-1], segments[-1] = 0, 0
    return {
        "tokens": RNG.integers(1, toys.VOCAB, (rows, seq_len)).astype(np.int32) * segments,
        "type_ids": (np.arange(seq_len)[None] >= lengths[:, None] // 2).astype(np.int32) * segments,
        "segment_ids": segments,
        "positions": np.arange(seq_len, dtype=np.int32)[None] * segments,
        "labels": RNG.integers(0, 3, rows).astype(label),
        "row_weights": weights,
        "example_index": np.arange(rows, dtype=np.int32),
    }


@functools.cache
def model(kind: str, pool: str):
    cfg = make_config(kind=kind, pool=pool)
    fns = registry.MODELS[kind](cfg, Head("pooled", 3), jnp.float32)
    params = jax.jit(fns.init)(jax.random.key(0))
    moved = jax.tree.map(lambda leaf: leaf + 0.1 * RNG.standard_normal(leaf.shape).astype(np.float32), params)
    return cfg, fns, moved


@pytest.mark.parametrize("how", POOLS)
def test_pooling_reads_real_positions_only(how):
    hidden = RNG.standard_normal((3, 5, 4)).astype(np.float32)
    segments = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]], np.int32)
    want = []
    for row, segment in zip(hidden.astype(np.float64), segments, strict=True):
        real = row[segment > 0]
        want.append({"first": real[0], "mean": real.mean(axis=0), "last": real[-1]}[how])
    np.testing.assert_allclose(heads.pool(hidden, segments, how), want, rtol=1e-6)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.parametrize("pool", POOLS)
def test_padding_has_no_influence(kind, pool):
    _, fns, params = model(kind, pool)
    given = batch(4)
    longer = {key: np.pad(x, [(0, 0), (0, 4)]) if x.ndim == 2 else x for key, x in given.items()}
    longer["tokens"] = np.where(longer["segment_ids"] > 0, longer["tokens"], 7)
    longer["positions"] = longer["positions"] % 12
    apply = jax.jit(fns.apply)
    got, want = apply(params, longer).head[:-1], apply(params, given).head[:-1]
    assert want.shape == (3, 3) and want.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


def test_an_encoder_sees_both_directions_and_a_decoder_only_the_past():
    for kind, sees_later in (("encoder", True), ("decoder", False)):
        _, fns, params = model(kind, "mean")
        given = batch(2) | {"segment_ids": np.ones((2, 12), np.int32)}

        def first(tokens, fns=fns, params=params, given=given):
            return fns.apply(params, given | {"tokens": tokens}).hidden_BxLxD[:, 0]

        changed = given["tokens"].copy()
        changed[:, 9] = (changed[:, 9] + 1) % toys.VOCAB
        differs = bool(np.any(np.abs(first(given["tokens"]) - first(changed)) > 1e-7))
        assert differs == sees_later, kind


def test_an_encoder_tells_the_two_sentences_apart():
    _, fns, params = model("encoder", "mean")
    given = batch(3)
    swapped = given | {"type_ids": 1 - given["type_ids"]}
    assert np.abs(fns.apply(params, given).head - fns.apply(params, swapped).head)[:-1].min() > 1e-5


@pytest.mark.parametrize("name", ["classification", "regression", "r_drop"])
def test_a_mesh_and_micro_batches_give_what_one_device_gives(name):
    """Three steps: losses and parameters on 2 x 2 x 2 devices, and in two micro-batches, equal those of one device."""
    r_drop, name = name == "r_drop", name.replace("r_drop", "classification")
    cfg = make_config(dropout=0.1, neftune_alpha=5.0)
    if name == "regression":
        cfg = dataclasses.replace(cfg, task=toys.task(name))
    elif r_drop:
        cfg = dataclasses.replace(cfg, task=dataclasses.replace(cfg.task, r_drop=0.5))
    task = TASKS[name]
    fns = registry.MODELS["encoder"](cfg, task.head(cfg), jnp.float32)
    given = batch(8, label=np.int32 if name == "classification" else np.float32)
    params = jax.device_get(jax.jit(fns.init)(jax.random.key(0)))
    optimizer = optim.build(OptimConfig(learning_rate=1e-2), params, total_steps=9, warmup_steps=0, decay_steps=0)
    found = {}
    for sizes, micro_batches in (((1, 1, 1), 1), ((1, 1, 1), 2), ((2, 2, 2), 1)):
        mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
        with jax.set_mesh(mesh):
            state = step.init_state(jax.tree.map(jnp.asarray, params), optimizer, use_ema=False)
            run = jax.jit(
                functools.partial(
                    step.train_step,
                    loss_fn=task.loss(fns.apply, cfg, None),
                    optimizer=optimizer,
                    seed=1,
                    micro_batches=micro_batches,
                    ema_decay=0.0,
                )
            )
            placed = sharding.to_global(given, sharding.local_rows(mesh, 8), 8, mesh)
            seen = []
            for _ in range(3):
                state, figures = run(state, placed)
                seen.append((float(figures["loss"]), float(figures["grad_norm"])))
            found[sizes, micro_batches] = seen
    one = found.pop(((1, 1, 1), 1))
    assert one[0] != one[1]
    for where, seen in found.items():
        np.testing.assert_allclose(seen, one, rtol=2e-5, err_msg=str(where))


def test_r_drop_sees_every_row_under_two_masks():
    cfg, fns, params = model("encoder", "first")
    plain = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, dropout=0.3))
    cfg = dataclasses.replace(plain, task=dataclasses.replace(plain.task, r_drop=1.0))
    fns = registry.MODELS["encoder"](cfg, Head("pooled", 3), jnp.float32)
    given, rng = batch(3), jax.random.key(3)
    terms = classification_loss(fns.apply, cfg, None)(params, given, rng)
    doubled = {key: np.repeat(x, 2, axis=0) for key, x in given.items()}
    doubled["example_index"] = doubled["example_index"] ^ (np.arange(6, dtype=np.int32) % 2 << 29)
    logits = fns.apply(params, doubled, rng=rng).head
    twice = losses.class_cross_entropy(logits, doubled["labels"], doubled["row_weights"])
    divergence = losses.symmetric_divergence(logits[::2], logits[1::2], given["row_weights"])
    assert float(divergence) > 0 and float(terms.weight) == 4
    assert float(terms.sum) == pytest.approx(float(twice.sum) + 2 * float(divergence), rel=1e-6)
    evaluated = classification_loss(fns.apply, cfg, None)(params, given, None)
    assert float(evaluated.weight) == 2
    assert float(evaluated.sum) == float(classification_loss(fns.apply, plain, None)(params, given, None).sum)
