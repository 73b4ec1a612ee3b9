"""Gradients of weights that ZeRO-3 splits, summed round rings of devices, beside which a TPU computes other things."""

import functools
import math

import jax
import jax.numpy as jnp

from lm.parallel import mesh as mesh_lib
from lm.parallel import sharding, xla_flags
from lm.parallel.mesh import AXES


def goes_round(kernel_IxO: jax.Array, logical: sharding.LogicalAxes, rows: tuple[int, ...]) -> bool:
    """Whether `sum_where_it_lies` is for the gradient of this kernel, from activations of this shape [B, L, ...].

    Not where the compiler does better: over up to 16 devices it multiplies a large kernel in pieces while they
    travel (`lm.parallel.xla_flags`).
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not can_go_round(kernel_IxO, logical):
        return False
    devices = math.prod(mesh.shape[axis] for axis in sharding.RULES["embed"])
    in_pieces = kernel_IxO.nbytes >= xla_flags.windowed_from(mesh.abstract_device.device_kind) and devices <= 16
    return rows[0] % sharding.batch_shards(mesh) == 0 and rows[1] % sharding.length_parts() == 0 and not in_pieces


def can_go_round(kernel_IxO: jax.Array, logical: sharding.LogicalAxes) -> bool:
    """Whether the mesh has what `sum_where_it_lies` needs: several devices, and a kernel that they divide in halves."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or "embed" not in logical:
        return False
    return not any(size % (2 * mesh.shape["tensor"]) for size in kernel_IxO.shape)  # halves go either way


def sum_parts(parts_PxDxO: jax.Array, logical: sharding.LogicalAxes) -> jax.Array:
    """The gradient of a weight ('embed', ...) from what each device makes of its rows, P = `sharding.row_groups()`."""
    summed: jax.Array = jax.shard_map(
        lambda part_1xDxO: sum_where_it_lies(part_1xDxO[0]),
        in_specs=sharding.spec(("row_parts", *logical), whole=("embed",)),
        out_specs=sharding.spec(logical),
        check_vma=False,
    )(parts_PxDxO)
    return summed


def sum_where_it_lies(partial_DxO: jax.Array) -> jax.Array:
    """The gradient of a weight whose first axis is 'embed', of which each device has its own rows' part, summed: each
    device keeps what it holds of the weight. For the body of a `jax.shard_map` over all axes.

    Over the axes that split the weight it goes round a ring, in both directions at once, a part after the other. So
    what travels are permutations, beside which a TPU computes other things; for a reduction of its own it would stand
    still. Over the rest, copies of the model on other devices and slices, only the part that is kept is summed.
    """
    shape = jax.sharding.get_abstract_mesh().shape
    rest = [axis for axis in AXES if axis != "tensor" and shape[axis] > 1]
    for axis in sharding.RULES["embed"]:
        if axis in rest:
            partial_DxO = _scatter_sum(partial_DxO, axis, shape[axis])
            rest.remove(axis)
    return jax.lax.psum(partial_DxO, tuple(rest)) if rest else partial_DxO


def _scatter_sum(x_DxO: jax.Array, axis: str, size: int) -> jax.Array:
    """Reduce-scatter of D over a mesh axis, by a ring; many devices are a grid, whose rows and then columns are rings:
    a ring's steps are as many as its devices. What travels is a slice of x, which needs no copy first."""
    columns = size if size <= mesh_lib.LONGEST_RING else max(n for n in range(1, math.isqrt(size) + 1) if size % n == 0)
    grid = x_DxO.reshape(size // columns, columns, x_DxO.shape[0] // size, x_DxO.shape[1])
    grid = _ring(grid, axis, size, (columns, 1), 1, ways=(1, -1))
    if columns < size:  # little is left: one way takes hardly longer, and half the instructions
        grid = _ring(grid, axis, size, (size // columns, columns), 0, ways=(1,))
    return grid[0, 0]


def _ring(x: jax.Array, axis: str, size: int, ring: tuple[int, int], dim: int, ways: tuple[int, ...]) -> jax.Array:
    """Sums what the devices of each ring have; of dimension `dim`, as long as the ring, each keeps its own place.

    Of two ways one half of the last dimension travels to the right, one to the left. Example, 3 devices, of what goes
    to the right device 1's place: device 2 begins with its own, 0 adds its own to that, and 1 adds its own.

    Args:
      x: of this device.
      axis: of the mesh, of `size` devices.
      ring: how many devices a ring has, and how far neighbours are from each other.
      dim: see above.
      ways: 1 = to the right, -1 = to the left.
    """
    count, stride = ring
    place = jax.lax.axis_index(axis).astype(jnp.uint32) // stride % count  # unsigned: no cases below zero to compute
    sizes = (*(1 if i == dim else n for i, n in enumerate(x.shape[:-1])), x.shape[-1] // len(ways))

    def neighbour(i: int, way: int) -> int:
        return i + ((i // stride + way) % count - i // stride % count) * stride

    def own(n: int, part: int, way: int) -> jax.Array:
        begin = (place + jnp.uint32(-way * n % count)) % count
        starts = [begin if i == dim else jnp.uint32(0) for i in range(x.ndim - 1)]
        return jax.lax.dynamic_slice(x, [*starts, jnp.uint32(part * sizes[-1])], sizes)

    sums = []
    for part, way in enumerate(ways):
        to = [(i, neighbour(i, way)) for i in range(size)]
        parts = [own(n, part, way) for n in range(1, count + 1)]
        sums.append(functools.reduce(lambda total, part: jax.lax.ppermute(total, axis, to) + part, parts))
    return jnp.concatenate(sums, axis=-1)
