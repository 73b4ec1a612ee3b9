"""lm/models/quantization.py: close to matmuls in the compute dtype, in 8 bits in the program, same parameters."""

import dataclasses
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import checks
from lm.config.schema import ConfigError
from lm.models import quantization
from lm.parallel import tpu_matmul
from tests import toys
from tests.test_parallel import ROWS, SEQ_LEN, mesh_of, steps_of

needs_qwix = pytest.mark.skipif(importlib.util.find_spec("qwix") is None, reason="the extra 'quantization'")
PLAIN = dataclasses.replace(toys.LLAMA, embed_dim=32, mlp_dim=64, head_dim=8)


def size(x):
    return float(jnp.sqrt(jnp.mean(jnp.square(x))))


@needs_qwix
@pytest.mark.parametrize(("name", "error"), [("int8", 0.01), ("fp8", 0.05)])
def test_quantized_matmul_and_its_gradients_are_close_to_the_plain_ones(name, error):
    """Relative errors. The gradient of the kernel is not quantized."""
    rng = np.random.default_rng(0)
    x, kernel, d_y = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((4, 8, 64), (64, 32), (4, 8, 32)))
    qtype = quantization.quantized_type(name)
    y, back = jax.vjp(lambda x, kernel: quantization.quantized_matmul(qtype, x, kernel), x, kernel)
    expected, plainly = jax.vjp(tpu_matmul.matmul, x, kernel)
    assert 0 < size(y - expected) < error * size(expected)
    (d_x, d_kernel), (expected_x, expected_kernel) = back(d_y), plainly(d_y)
    assert 0 < size(d_x - expected_x) < error * size(expected_x)
    np.testing.assert_allclose(d_kernel, expected_kernel, rtol=1e-4, atol=1e-4)


@needs_qwix
def test_quantized_training_is_close_to_unquantized_also_on_a_mesh():
    batch = toys.batch(ROWS, SEQ_LEN)
    found = {}
    for dtype, sizes in (("auto", {}), ("int8", {}), ("int8", {"data": 2, "fsdp": 2, "tensor": 2})):
        cfg, model, params = toys.decoder(dataclasses.replace(PLAIN, dtype=dtype), SEQ_LEN)
        steps, _ = steps_of(model, cfg, jax.device_get(params), batch, mesh_of(**sizes))
        found[dtype, len(sizes)] = np.array([loss for loss, _ in steps])
        shapes = jax.tree.map(jnp.shape, params)
        assert shapes == found.setdefault("shapes", shapes)
    plain, eight, on_mesh = found["auto", 0], found["int8", 0], found["int8", 3]
    assert (np.diff(eight) < 0).all()
    assert (eight != plain).all()
    np.testing.assert_allclose(eight, plain, rtol=0.01)
    # Sums in another order, and an entry is rounded the other way: by 1 / 127, and later steps start from there.
    np.testing.assert_allclose(on_mesh[0], eight[0], rtol=1e-3)
    np.testing.assert_allclose(on_mesh, eight, rtol=0.01)


@needs_qwix
def test_the_program_multiplies_in_8_bits():
    """Forward seven kernels of a block, and back to what they were given."""
    _, model, params = toys.decoder(dataclasses.replace(PLAIN, dtype="int8"), SEQ_LEN)
    batch = toys.batch(2, SEQ_LEN)

    def total(params):
        return model.apply(params, batch).hidden_BxLxD.sum()

    text = jax.jit(jax.grad(total)).lower(params).as_text()
    dots = re.findall(r"stablehlo.dot_general.*: \((tensor<\S+>), (tensor<\S+>)\) -> (tensor<\S+>)", text)
    in_8_bits = [dot for dot in dots if all("i8>" in part for part in dot[:2])]
    assert len(in_8_bits) == 14, dots
    assert all(out.endswith("i32>") for _, _, out in in_8_bits)


def test_quantization_without_qwix_or_with_experts_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"'model.dtype' is int8, which experts do not support"):
        toys.recipe(tmp_path, model__dtype="int8", model__num_experts=4, model__experts_per_token=2)
    cfg = toys.recipe(tmp_path, model__dtype="int8")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name != "qwix" or None)
    with pytest.raises(
        ConfigError, match=r"'model.dtype' is int8, which needs qwix: pip install -e '.\[quantization\]'"
    ):
        checks.fit(cfg)
