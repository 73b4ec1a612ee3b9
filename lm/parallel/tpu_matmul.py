"""Matmuls of activations with sharded weights, and how their backward pass is scheduled on TPU.

Everything else of `lm` writes y = x @ W through `sharded_matmul`. What a TPU needs beyond the plain product to overlap
communication with computation is here and in `lm.parallel.ring_reduce`, measured in docs/performance.md.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lm.parallel import ring_reduce, sharding

Axes = tuple[str | None, str | None]


def sharded_matmul(x: jax.Array, kernel_IxO: jax.Array, axes: Axes) -> jax.Array:
    """x [..., I] @ kernel [I, O] -> [..., O], gathering the kernel for use (ZeRO-3).

    The kernel's gradient is reduce-scattered: it is sharded as the kernel is.

    Args:
      x: in the compute dtype.
      kernel_IxO: in the compute dtype, sharded.
      axes: logical axes of the kernel.
    """
    if sharding.platform() == "tpu" and x.ndim == 3:
        return overlapped_matmul(x, kernel_IxO, axes, ring_reduce.is_faster(kernel_IxO, axes, x.shape))
    return matmul(x, sharding.gather(kernel_IxO, *axes))


def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., in] @ kernel [in, out] -> [..., out], of a kernel that is gathered already.

    On one device the leading axes are flattened: XLA's CPU backend is about a third faster on two-dimensional products.
    On a mesh they are not, because merging two axes can lose their sharding.
    """
    if sharding.is_distributed_trace():
        return x @ kernel
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def overlapped_matmul(x_BxLxI: jax.Array, kernel_IxO: jax.Array, axes: Axes, use_ring: bool) -> jax.Array:
    """`sharded_matmul` on TPU, whose backward pass overlaps the reduction of the kernel's gradient with computation.

    An optimization barrier before the two products of the backward pass keeps XLA from fusing their common operand into
    both, which would compute it twice.

    Args:
      x_BxLxI, kernel_IxO, axes: see `sharded_matmul`.
      use_ring: whether `ring_reduce.reduce_scatter` sums the kernel's gradient over devices; else XLA's own collective.
    """
    return x_BxLxI @ sharding.gather(kernel_IxO, *axes)


def _overlapped_matmul_fwd(x_BxLxI: jax.Array, kernel_IxO: jax.Array, axes: Axes, use_ring: bool) -> Any:
    return overlapped_matmul(x_BxLxI, kernel_IxO, axes, use_ring), (x_BxLxI, kernel_IxO)


def _overlapped_matmul_bwd(axes: Axes, use_ring: bool, saved: Any, d_BxLxO: jax.Array) -> Any:
    x_BxLxI, kernel_IxO = saved
    kernel_IxO, gather_vjp = jax.vjp(lambda kernel: sharding.gather(kernel, *axes), kernel_IxO)
    # A product that is added to the residual stream is where the backward pass of its sublayer begins.
    to_residual = axes[1] == "embed"
    if to_residual:  # positions that 'tensor' splits are gathered once for both products
        d_BxLxO = sharding.constrain(d_BxLxO, "batch", "length", None)
    d_BxLxO = jax.lax.optimization_barrier(d_BxLxO)
    if use_ring:  # reduces over the first axis, so where 'embed' is the last one, the transposed gradient
        names, factors = (axes[::-1], (d_BxLxO, x_BxLxI)) if to_residual else (axes, (x_BxLxI, d_BxLxO))
        d_kernel = jax.shard_map(
            lambda a_BxLxI, b_BxLxO: jnp.einsum("bli,blo->io", a_BxLxI, b_BxLxO)[None],
            in_specs=tuple(sharding.spec(("batch", "length", name), whole=("embed",)) for name in names),
            out_specs=sharding.spec(("token_shards", *names), whole=("embed",)),
            check_vma=False,
        )(*factors)
    else:
        (d_kernel,) = gather_vjp(jnp.einsum("bli,blo->io", x_BxLxI, d_BxLxO))
    if to_residual:  # the kernel is gathered during the product that does not need it
        d_BxLxO, d_kernel = jax.lax.optimization_barrier((d_BxLxO, d_kernel))
    d_BxLxI = d_BxLxO @ kernel_IxO.T
    if use_ring:
        d_kernel = ring_reduce.reduce_scatter(d_kernel, names)
        d_kernel = d_kernel.T if to_residual else d_kernel
    return d_BxLxI, d_kernel


overlapped_matmul.defvjp(_overlapped_matmul_fwd, _overlapped_matmul_bwd)


def sum_partial_gradients(partials_GxDxO: jax.Array, axes: Axes) -> jax.Array:
    """The gradient [D, O] of a kernel from the partial ones of G groups of rows.

    On TPU by a ring, which overlaps with the backward pass of the layers, if there is one group for each token shard.
    """
    is_one_a_shard = partials_GxDxO.shape[0] == sharding.token_shards() and sharding.platform() == "tpu"
    if is_one_a_shard and ring_reduce.is_possible(partials_GxDxO.shape[1:], axes):
        return ring_reduce.reduce_scatter(partials_GxDxO, axes)
    return partials_GxDxO.sum(axis=0)
