"""Matmuls in 8 bits by qwix, of parameters that stay float32 (SwitchBack, Wortsman et al., arXiv:2304.13013)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp


def quantized_type(name: str) -> Any:
    """The 8-bit type that `model.dtype` selects for the kernels of blocks; None = not quantized."""
    return {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}.get(name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def quantized_matmul(qtype: Any, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., in] @ kernel [in, out] -> [..., out] in 8 bits, scaled by row of x and column of kernel.

    Scales come from the largest entry of each row and column, anew at each call. The gradient of x is computed in 8
    bits too; that of the kernel, a sum over many positions, in the dtype of x.
    """
    return _quantized_product(qtype, x, kernel, 0)


def _quantized_product(qtype: Any, x: jax.Array, kernel: jax.Array, kernel_axis: int) -> jax.Array:
    """Contracts the last axis of x [..., n] with `kernel_axis`, of size n, of the kernel."""
    import qwix  # an extra, see setup.py

    rows = qwix.quantize(x, qtype, channelwise_axes=range(x.ndim - 1))
    columns = qwix.quantize(kernel, qtype, channelwise_axes=[1 - kernel_axis])
    y: jax.Array = qwix.dot_general(rows, columns, (((x.ndim - 1,), (kernel_axis,)), ((), ())))
    return y.astype(x.dtype)


def _quantized_matmul_fwd(qtype: Any, x: jax.Array, kernel: jax.Array) -> Any:
    return _quantized_product(qtype, x, kernel, 0), (x, kernel)


def _quantized_matmul_bwd(qtype: Any, saved: Any, d_y: jax.Array) -> Any:
    x, kernel = saved
    leading = tuple(range(x.ndim - 1))
    d_kernel = jax.lax.dot_general(x, d_y, ((leading, leading), ((), ())))
    return _quantized_product(qtype, d_y, kernel, 1), d_kernel


quantized_matmul.defvjp(_quantized_matmul_fwd, _quantized_matmul_bwd)
