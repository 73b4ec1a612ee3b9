"""Token cross-entropy: fused form = definition = float64 numpy; and what it promises about memory, masks, sharding."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from lm import losses
from lm.config import MeshConfig
from lm.parallel.mesh import make_mesh
from tests import reference

B, L, D, V, VOCAB = 8, 7, 16, 24, 21


def make_inputs(seed=0, dtype=np.float32):
    """(hidden, unembed, targets, weights); weights are uneven, with whole rows of 0."""
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(B, L, D)), dtype)
    unembed = jnp.asarray(rng.normal(size=(D, V)), dtype)
    targets = rng.integers(0, VOCAB, size=(B, L)).astype(np.int32)
    weights = (rng.random((B, L)) * (rng.random((B, L)) < 0.6)).astype(np.float32)
    weights[[1, 4]] = 0
    return hidden, unembed, targets, weights


@functools.cache
def compiled(fn, **options):
    def loss(hidden, unembed, targets, weights):
        terms = fn(hidden, unembed, targets, weights, **options)
        return terms.sum, terms

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def value_and_grads(hidden, unembed, targets, weights, fn=losses.token_cross_entropy, **options):
    """(LossTerms, (d_hidden, d_unembed)), jitted."""

    (_, terms), grads = compiled(fn, **options)(hidden, unembed, targets, weights)
    return terms, grads


def assert_leaf_close(actual, expected, rtol=1e-5):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=rtol * np.abs(expected).max())


CASES = [
    dict(softcap=softcap, z_loss=z, label_smoothing=eps, vocab_size=vocab, chunk_len=chunk)
    for softcap, z, eps, vocab, chunk in [
        *itertools.product((0.0, 3.0), (0.0, 1e-2), (0.0, 0.1), (VOCAB,), (3,)),
        (0.0, 0.0, 0.0, V, 0),
        (3.0, 1e-2, 0.1, V, 1),
    ]
]


@pytest.mark.parametrize("options", CASES, ids=lambda o: "-".join(f"{v}" for v in o.values()))
def test_value_metrics_and_gradients_match_float64_numpy(options):
    inputs = make_inputs()
    terms, grads = value_and_grads(*inputs, **options)
    definition = {k: v for k, v in options.items() if k != "chunk_len"}
    loss, nll, correct, d_hidden, d_unembed = reference.cross_entropy(*inputs, **definition)
    weight = inputs[3].sum(dtype=np.float64)
    np.testing.assert_allclose(terms.sum, loss, rtol=1e-6)
    np.testing.assert_allclose(terms.weight, weight, rtol=1e-6)
    np.testing.assert_allclose(terms.metrics["nll"], (nll, weight), rtol=1e-6)
    np.testing.assert_allclose(terms.metrics["accuracy"], (correct, weight), rtol=1e-6)
    assert_leaf_close(grads[0], d_hidden)
    assert_leaf_close(grads[1], d_unembed)
    assert {x.dtype for x in jax.tree.leaves((terms, grads))} == {jnp.dtype("float32")}
    assert np.all(np.asarray(grads[1])[:, options["vocab_size"] :] == 0)
    plain, plain_grads = value_and_grads(*inputs, fn=losses.reference_token_cross_entropy, **definition)
    np.testing.assert_allclose(plain.sum, loss, rtol=1e-6)
    np.testing.assert_allclose([plain.metrics["nll"][0], plain.metrics["accuracy"][0]], (nll, correct), rtol=1e-6)
    assert_leaf_close(plain_grads[0], d_hidden)
    assert_leaf_close(plain_grads[1], d_unembed)
    undifferentiated = jax.jit(functools.partial(losses.token_cross_entropy, **options))(*inputs)
    np.testing.assert_allclose(undifferentiated.sum, loss, rtol=1e-6)
    np.testing.assert_allclose(undifferentiated.metrics["nll"][0], nll, rtol=1e-6)


@pytest.mark.parametrize(("z_loss", "label_smoothing"), list(itertools.product((0.0, 1e-2), (0.0, 0.1))))
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_fused_equals_its_definition_for_all_options(softcap, z_loss, label_smoothing):
    """Value, metrics and gradients, with 0/1 weights, fractions and equal weights; in whole rows, and in chunks of one
    position, ones that do not divide L, and ones longer than L; with `most_predicted` where it applies. Each form is
    within 1e-6 (gradients: 1e-5) of float64, see above, so that they are within twice that of each other."""
    hidden, unembed, targets, fractions = make_inputs()
    options = dict(vocab_size=VOCAB, softcap=softcap, z_loss=z_loss, label_smoothing=label_smoothing)
    forms = [dict(chunk_len=chunk_len) for chunk_len in (0, 1, 3, 5, 100)]
    few = [dict(chunk_len=3, most_predicted=4)]
    for weights in ((fractions > 0).astype(np.float32), fractions, np.ones_like(fractions)):
        for kept, cases in ((weights, forms), (at_most(weights, 4), few)):
            inputs = (hidden, unembed, targets, kept)
            expected, expected_grads = value_and_grads(*inputs, fn=losses.reference_token_cross_entropy, **options)
            for form in cases:
                terms, grads = value_and_grads(*inputs, **options, **form)
                np.testing.assert_allclose(
                    jax.tree.leaves(terms), jax.tree.leaves(expected), rtol=2e-6, err_msg=f"{form}"
                )
                for leaf, expected_leaf in zip(grads, expected_grads, strict=True):
                    assert_leaf_close(leaf, expected_leaf, rtol=2e-5)


def test_accuracy_counts_the_largest_logit():
    """Random targets are seldom right: here the targets are the argmax in half of the rows."""
    hidden, unembed, targets, weights = make_inputs()
    best = np.argmax(hidden @ unembed[:, :VOCAB], axis=-1)
    targets = np.where(np.arange(B)[:, None] < B // 2, best, (best + 1) % VOCAB).astype(np.int32)
    terms = losses.token_cross_entropy(hidden, unembed, targets, weights, vocab_size=VOCAB)
    np.testing.assert_allclose(terms.metrics["accuracy"][0], weights[: B // 2].sum(), rtol=1e-6)


def test_chunk_len_does_not_change_the_loss():
    inputs = make_inputs()
    options = dict(vocab_size=VOCAB, z_loss=1e-2, label_smoothing=0.1, softcap=3.0)
    whole, whole_grads = value_and_grads(*inputs, **options)
    for chunk_len in (1, 2, L - 1, L, 100):
        chunked, chunked_grads = value_and_grads(*inputs, **options, chunk_len=chunk_len)
        np.testing.assert_allclose(jax.tree.leaves(chunked), jax.tree.leaves(whole), rtol=1e-6)
        for chunked_leaf, whole_leaf in zip(chunked_grads, whole_grads, strict=True):
            assert_leaf_close(chunked_leaf, whole_leaf, rtol=1e-6)


def at_most(weights, count):
    """The weights, but 0 from each row's `count`-th positive one on."""
    return np.where(np.cumsum(weights != 0, axis=1) <= count, weights, 0).astype(np.float32)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_most_predicted_does_not_change_the_loss(count):
    hidden, unembed, targets, weights = make_inputs()
    weights = at_most(weights, count)
    assert (weights != 0).sum(axis=1).max() == count
    hidden = jnp.where(weights[..., None] != 0, hidden, jnp.nan)
    options = dict(vocab_size=VOCAB, z_loss=1e-2, label_smoothing=0.1)
    clean = jnp.nan_to_num(hidden)
    loss, nll, correct, d_hidden, d_unembed = reference.cross_entropy(clean, unembed, targets, weights, **options)
    terms, grads = value_and_grads(hidden, unembed, targets, weights, **options, chunk_len=3, most_predicted=count)
    np.testing.assert_allclose(terms.sum, loss, rtol=1e-6)
    np.testing.assert_allclose(terms.metrics["nll"][0], nll, rtol=1e-6)
    assert terms.metrics["accuracy"][0] == pytest.approx(correct, rel=1e-6)
    assert_leaf_close(grads[0], d_hidden)
    assert_leaf_close(grads[1], d_unembed)


def test_most_predicted_computes_no_other_logits():
    hidden, unembed, targets, weights = make_inputs()

    def loss(hidden):
        options = dict(vocab_size=VOCAB, chunk_len=0, most_predicted=2)
        return losses.token_cross_entropy(hidden, unembed, targets, at_most(weights, 2), **options).sum

    text = str(jax.make_jaxpr(loss)(hidden))
    assert f"f32[{B},2,{V}]" in text and f"f32[{B},{L},{V}]" not in text


def test_more_weighted_positions_than_most_predicted_give_nan():
    hidden, unembed, targets, weights = make_inputs()
    weights = at_most(weights, 3)
    terms, grads = value_and_grads(hidden, unembed, targets, weights, vocab_size=VOCAB, most_predicted=2)
    assert np.isnan([terms.sum, terms.metrics["nll"][0]]).all()
    assert np.isnan(np.asarray(grads[1])).any()


def test_any_cotangent_scales_the_gradients_and_metrics_have_none():
    hidden, unembed, targets, weights = make_inputs()
    expected = reference.cross_entropy(hidden, unembed, targets, weights, vocab_size=VOCAB)

    def fn(hidden, unembed):
        terms = losses.token_cross_entropy(hidden, unembed, targets, weights, vocab_size=VOCAB, chunk_len=3)
        return -2.5 * terms.sum + 7.0 * terms.metrics["nll"][0]

    d_hidden, d_unembed = jax.grad(fn, argnums=(0, 1))(hidden, unembed)
    assert_leaf_close(d_hidden, -2.5 * expected[3])
    assert_leaf_close(d_unembed, -2.5 * expected[4])


def test_gradients_reach_both_uses_of_a_tied_embedding():
    """One array is embedding and unembedding: autodiff must add the two paths."""
    _, unembed, targets, weights = make_inputs()

    def fn(embedding_VxD, through_hidden, through_unembed):
        stop = jax.lax.stop_gradient
        hidden = (embedding_VxD if through_hidden else stop(embedding_VxD))[targets]
        unembed = (embedding_VxD if through_unembed else stop(embedding_VxD)).T
        return losses.token_cross_entropy(hidden, unembed, targets, weights, vocab_size=VOCAB).sum

    both, first, second = (jax.grad(fn)(unembed.T, *use) for use in [(True, True), (True, False), (False, True)])
    assert np.abs(first).max() > 0.1
    assert np.abs(second).max() > 0.1
    assert_leaf_close(both, first + second, rtol=1e-6)


def test_weights_get_no_gradient():
    hidden, unembed, targets, weights = make_inputs()

    def fn(weights):
        terms = losses.token_cross_entropy(hidden, unembed, targets, weights, vocab_size=VOCAB)
        return terms.sum + terms.weight

    assert np.all(jax.grad(fn)(jnp.asarray(weights)) == 0)


def test_positions_of_weight_0_change_nothing_even_when_not_finite():
    hidden, unembed, targets, weights = make_inputs()
    options = dict(vocab_size=VOCAB, z_loss=1e-2, label_smoothing=0.1, softcap=3.0, chunk_len=3)
    clean, clean_grads = value_and_grads(hidden, unembed, targets, weights, **options)
    masked = weights == 0
    junk = jnp.where(masked[..., None], jnp.where(jnp.arange(D)[None, None] % 2 == 0, jnp.inf, jnp.nan), hidden)
    terms, grads = value_and_grads(junk, unembed, np.where(masked, -100, targets), weights, **options)
    np.testing.assert_array_equal(jax.tree.leaves(terms), jax.tree.leaves(clean))
    assert np.all(np.asarray(grads[0])[masked] == 0)
    for leaf, clean_leaf in zip(grads, clean_grads, strict=True):
        np.testing.assert_array_equal(leaf, clean_leaf)


def test_batch_of_weight_0_gives_exact_zeros():
    hidden, unembed, targets, weights = make_inputs()
    terms, grads = value_and_grads(hidden, unembed, targets, 0 * weights, vocab_size=VOCAB, z_loss=1e-2)
    assert all(np.all(x == 0) for x in jax.tree.leaves((terms, grads)))


@pytest.mark.parametrize("bad_id", [-1, VOCAB, V + 5])
def test_target_out_of_range_with_a_weight_is_nan(bad_id):
    hidden, unembed, targets, weights = make_inputs()
    row, position = np.argwhere(weights > 0)[0]
    targets[row, position] = bad_id
    terms, grads = value_and_grads(hidden, unembed, targets, weights, vocab_size=VOCAB)
    assert np.isnan(terms.sum)
    assert np.isfinite(terms.weight)
    assert all(np.isnan(x).any() for x in grads)
    rows = losses.sequence_log_likelihood(hidden, unembed, targets, weights, vocab_size=VOCAB, chunk_len=2)
    assert np.flatnonzero(np.isnan(rows)).tolist() == [row]


def test_huge_logits_stay_finite():
    hidden, unembed, targets, weights = make_inputs()
    for softcap in (0.0, 30.0):
        terms, grads = value_and_grads(1e4 * hidden, unembed, targets, weights, vocab_size=VOCAB, softcap=softcap)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((terms, grads)))


def test_bfloat16_inputs_are_summed_in_float32():
    hidden, unembed, targets, weights = make_inputs(dtype=jnp.bfloat16)
    options = dict(vocab_size=VOCAB, z_loss=1e-2, label_smoothing=0.1, softcap=3.0)
    terms, grads = value_and_grads(hidden, unembed, targets, weights, **options, chunk_len=3)
    expected = reference.cross_entropy(hidden, unembed, targets, weights, **options)
    assert terms.sum.dtype == jnp.float32
    assert {g.dtype for g in grads} == {jnp.dtype("bfloat16")}
    np.testing.assert_allclose(terms.sum, expected[0], rtol=1e-6)  # bfloat16 logits would be wrong by 1e-3
    for leaf, expected_leaf in zip(grads, expected[3:], strict=True):
        assert_leaf_close(leaf, expected_leaf, rtol=2**-7)  # two roundings to 8 bits


def test_logits_are_float32_capped_and_masked():
    hidden, unembed, _, _ = make_inputs(dtype=jnp.bfloat16)
    raw = np.asarray(hidden, np.float64) @ np.asarray(unembed, np.float64)
    for shape in [(B, L), (B * L,), (1, B, L)]:
        out = losses.logits(hidden.reshape(*shape, D), unembed, vocab_size=VOCAB, softcap=3.0)
        assert out.dtype == jnp.float32
        assert out.shape == (*shape, V)
        out = np.asarray(out).reshape(B, L, V)
        np.testing.assert_allclose(out[..., :VOCAB], 3 * np.tanh(raw / 3)[..., :VOCAB], rtol=1e-5, atol=1e-5)
        assert np.all(out[..., VOCAB:] == losses.MASKED_LOGIT)
    uncapped = losses.logits(hidden, unembed, vocab_size=V)
    np.testing.assert_allclose(uncapped, raw, rtol=1e-5, atol=1e-5)


def test_memory_grows_with_the_chunk_and_not_with_the_row():
    """No [B, L, V] array, forward or backward: temporary memory of the compiled program, in bytes."""
    rows, length, width, vocab = 4, 512, 8, 1024
    args = (
        jax.ShapeDtypeStruct((rows, length, width), jnp.float32),
        jax.ShapeDtypeStruct((width, vocab), jnp.float32),
        jax.ShapeDtypeStruct((rows, length), jnp.int32),
        jax.ShapeDtypeStruct((rows, length), jnp.float32),
    )
    whole = 4 * rows * length * vocab
    chunk_len = 16
    chunk = 4 * rows * chunk_len * vocab

    def temp_bytes(fn, chunk_len):
        def loss(*args):
            return losses.token_cross_entropy(*args, vocab_size=vocab - 5, softcap=3.0, chunk_len=chunk_len).sum

        return jax.jit(fn(loss)).lower(*args).compile().memory_analysis().temp_size_in_bytes

    def gradient(loss):
        return jax.grad(loss, argnums=(0, 1))

    for fn in (lambda loss: loss, gradient):
        assert temp_bytes(fn, 0) >= whole  # the measure sees it when it is there
        small = 4 * (4 * rows * length * width + 2 * width * vocab)  # copies of hidden, and of the unembedding
        assert temp_bytes(fn, chunk_len) < 4 * chunk + small < whole / 2


def test_backward_does_not_recompute_logits():
    """One matmul for the logits and two for the gradients in all; without differentiation only the first."""
    inputs = make_inputs()

    def loss(hidden, unembed):
        return losses.token_cross_entropy(hidden, unembed, *inputs[2:], vocab_size=VOCAB, chunk_len=3).sum

    def matmuls(fn):
        return str(jax.make_jaxpr(fn)(*inputs[:2])).count("dot_general[")

    assert matmuls(loss) == 1
    assert matmuls(jax.value_and_grad(loss, argnums=(0, 1))) == 3


def test_sharded_and_in_a_scan_of_micro_batches_is_the_same():
    inputs = make_inputs()
    options = dict(vocab_size=VOCAB, z_loss=1e-2, label_smoothing=0.1, softcap=3.0, chunk_len=3)
    expected = reference.cross_entropy(*inputs, **{k: v for k, v in options.items() if k != "chunk_len"})

    @jax.jit
    def step(hidden, unembed, targets, weights):
        def loss(hidden, unembed, targets, weights):
            return losses.token_cross_entropy(hidden, unembed, targets, weights, **options).sum

        def body(carry, micro):
            total, d_unembed = carry
            value, (d_hidden, d) = jax.value_and_grad(loss, argnums=(0, 1))(micro[0], unembed, *micro[1:])
            return (total + value, d_unembed + d), d_hidden

        micro = [x.reshape(2, B // 2, *x.shape[1:]) for x in (hidden, targets, weights)]
        (total, d_unembed), d_hidden = jax.lax.scan(body, (0.0, jnp.zeros_like(unembed)), micro)
        return total, d_hidden.reshape(hidden.shape), d_unembed

    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        rows = PartitionSpec(("data", "fsdp"))
        specs = [rows, PartitionSpec(None, "tensor"), rows, rows]
        placed = [jax.device_put(x, jax.NamedSharding(mesh, s)) for x, s in zip(inputs, specs, strict=True)]
        total, d_hidden, d_unembed = step(*placed)
    np.testing.assert_allclose(total, expected[0], rtol=1e-6)
    assert_leaf_close(d_hidden, expected[3])
    assert_leaf_close(d_unembed, expected[4])


def test_context_parallel_loss_equals_one_device():
    """Rows and positions are sharded; with `most_predicted`, and `sequence_log_likelihood` too."""
    hidden, unembed, targets, weights = make_inputs()
    hidden, targets, weights = hidden[:, :6], targets[:, :6], at_most(weights[:, :6], 2)
    expected = reference.cross_entropy(hidden, unembed, targets, weights, vocab_size=VOCAB)
    likelihood = functools.partial(losses.sequence_log_likelihood, vocab_size=VOCAB, chunk_len=2)
    with jax.set_mesh(make_mesh(MeshConfig(data=1, fsdp=2, context=2, tensor=2))):
        rows = PartitionSpec(("data", "fsdp"), "context")
        specs = [rows, PartitionSpec(None, "tensor"), rows, rows]
        inputs = (hidden, unembed, targets, weights)
        placed = [
            jax.device_put(x, jax.NamedSharding(jax.sharding.get_mesh(), s)) for x, s in zip(inputs, specs, strict=True)
        ]
        terms, grads = value_and_grads(*placed, vocab_size=VOCAB, chunk_len=2, most_predicted=2)
        found_B = jax.jit(likelihood)(*placed)
    np.testing.assert_allclose(terms.sum, expected[0], rtol=1e-6)
    assert_leaf_close(grads[0], expected[3])
    assert_leaf_close(grads[1], expected[4])
    for b, found in enumerate(np.asarray(found_B)):
        one = slice(b, b + 1)
        nll = reference.cross_entropy(hidden[one], unembed, targets[one], weights[one], vocab_size=VOCAB)[1]
        np.testing.assert_allclose(found, -nll, rtol=1e-6)


def test_shapes_that_do_not_fit_are_refused():
    hidden, unembed, targets, weights = make_inputs()
    with pytest.raises(ValueError, match=r"unembed is \(16, 24\), expected \(16, at least the vocabulary's 25\)"):
        losses.token_cross_entropy(hidden, unembed, targets, weights, vocab_size=V + 1)
    with pytest.raises(ValueError, match=r"targets \(8, 6\) and weights \(8, 7\) must both be \(8, 7\)"):
        losses.token_cross_entropy(hidden, unembed, targets[:, 1:], weights, vocab_size=VOCAB)
