"""Ring reduce-scatter of weight gradients, overlapped with computation on TPU.

It is made of permutations, which a TPU runs asynchronously, whereas it would wait for a reduce-scatter of XLA's own.
"""

import functools
import math

import jax
import jax.numpy as jnp

from lm.parallel import mesh as mesh_lib
from lm.parallel import sharding, xla_flags
from lm.parallel.mesh import AXES


def is_faster(kernel_IxO: jax.Array, logical: sharding.LogicalAxes, shape: tuple[int, ...]) -> bool:
    """Whether a ring should sum the gradient of this kernel, from activations of `shape` [B, L, ...].

    Not where XLA's own is faster: over up to 16 devices it splits a large matmul into pieces that overlap with their
    communication (windowed einsum, `lm.parallel.xla_flags`).
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not is_possible(kernel_IxO.shape, logical):
        return False
    devices = math.prod(mesh.shape[axis] for axis in sharding.RULES["embed"])
    is_windowed = kernel_IxO.nbytes >= xla_flags.windowed_from(mesh.abstract_device.device_kind) and devices <= 16
    return shape[0] % sharding.batch_shards(mesh) == 0 and shape[1] % sharding.length_shards() == 0 and not is_windowed


def is_possible(shape: tuple[int, ...], logical: sharding.LogicalAxes) -> bool:
    """Whether a ring can sum the gradient of a kernel of this shape.

    It takes several devices, an axis 'embed' that they divide, and shards over 'tensor' that can be halved, as the two
    halves of each travel in opposite directions.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or "embed" not in logical:
        return False
    devices = math.prod(mesh.shape[axis] for axis in sharding.RULES["embed"])
    if shape[logical.index("embed")] % devices:  # as with the rows of biases that `model.lm_transform` adds
        return False
    return not any(size % (2 * mesh.shape["tensor"]) for size in shape)


def reduce_scatter(partials_PxDxO: jax.Array, logical: sharding.LogicalAxes) -> jax.Array:
    """The gradient of a weight ('embed', ...), sharded as the weight, from the partial ones of P token shards.

    Args:
      partials_PxDxO: one partial gradient on each of P = `sharding.token_shards()` devices.
      logical: logical axes of the weight.
    """
    summed: jax.Array = jax.shard_map(
        lambda partial_1xDxO: reduce_scatter_local(partial_1xDxO[0]),
        in_specs=sharding.spec(("token_shards", *logical), whole=("embed",)),
        out_specs=sharding.spec(logical),
        check_vma=False,
    )(partials_PxDxO)
    return summed


def reduce_scatter_local(partial_DxO: jax.Array) -> jax.Array:
    """What `reduce_scatter` runs on each device: from its partial gradient to its shard of the sum.

    For the body of a `jax.shard_map` over all mesh axes. A ring over each axis that shards the weight; over the others
    (replicas on other devices and slices) an all-reduce of the shard alone.
    """
    shape = jax.sharding.get_abstract_mesh().shape
    rest = [axis for axis in AXES if axis != "tensor" and shape[axis] > 1]
    for axis in sharding.RULES["embed"]:
        if axis in rest:
            partial_DxO = _reduce_scatter_axis(partial_DxO, axis, shape[axis])
            rest.remove(axis)
    return jax.lax.psum(partial_DxO, tuple(rest)) if rest else partial_DxO


def _reduce_scatter_axis(x_DxO: jax.Array, axis: str, size: int) -> jax.Array:
    """Reduce-scatter of D over one mesh axis of `size` devices.

    A ring takes as many steps as it has devices, so a long axis is a grid: rings along its rows, then its columns.
    """
    columns = size if size <= mesh_lib.LONGEST_RING else max(n for n in range(1, math.isqrt(size) + 1) if size % n == 0)
    grid = x_DxO.reshape(size // columns, columns, x_DxO.shape[0] // size, x_DxO.shape[1])
    grid = _ring(grid, axis, size, (columns, 1), 1, directions=(1, -1))
    if columns < size:  # little data is left: one direction is about as fast, with half the instructions
        grid = _ring(grid, axis, size, (size // columns, columns), 0, directions=(1,))
    return grid[0, 0]


def _ring(
    x: jax.Array, axis: str, size: int, ring: tuple[int, int], dim: int, directions: tuple[int, ...]
) -> jax.Array:
    """Reduce-scatter along rings: dimension `dim` of x, as long as a ring, becomes 1, the entry of this device.

    The last dimension is split over the directions, whose parts travel at the same time. Example, 3 devices, direction
    1, the entry of device 1: device 2 sends its own to device 0, which adds its own and sends the sum to device 1,
    which adds its own. What is sent is a slice of x and needs no copy.

    Args:
      x: of this device.
      axis: mesh axis, of `size` devices.
      ring: (devices of one ring, distance along the axis between neighbours).
      dim: see above.
      directions: 1 = towards the next device, -1 = towards the previous one.
    """
    count, stride = ring
    place = jax.lax.axis_index(axis).astype(jnp.uint32) // stride % count  # unsigned, so that % needs no sign handling
    sizes = (*(1 if i == dim else n for i, n in enumerate(x.shape[:-1])), x.shape[-1] // len(directions))

    def neighbour(i: int, direction: int) -> int:
        return i + ((i // stride + direction) % count - i // stride % count) * stride

    def local_slice(step: int, part: int, direction: int) -> jax.Array:
        begin = (place + jnp.uint32(-direction * step % count)) % count
        starts = [begin if i == dim else jnp.uint32(0) for i in range(x.ndim - 1)]
        return jax.lax.dynamic_slice(x, [*starts, jnp.uint32(part * sizes[-1])], sizes)

    sums = []
    for part, direction in enumerate(directions):
        route = [(i, neighbour(i, direction)) for i in range(size)]
        slices = [local_slice(step, part, direction) for step in range(1, count + 1)]
        sums.append(functools.reduce(lambda total, own: jax.lax.ppermute(total, axis, route) + own, slices))
    return jnp.concatenate(sums, axis=-1)
