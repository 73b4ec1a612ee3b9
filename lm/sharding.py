"""The device mesh, and where every array lies on it.

Arrays name their dimensions by logical axes ('batch', 'embed', …); `RULES` says which mesh axis each one is split over.
Axes are Auto: the compiler places what is not constrained, and a mesh of one device needs no second code path.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lm import flags
from lm.config import MeshConfig
from lm.schema import ConfigError
from lm.types import LENGTH_KEYS

AXES = ("data", "fsdp", "expert", "context", "tensor")

# Logical axis -> mesh axes. Activations: batch, length, residual_length (the same outside of a block's matmuls, where
# devices of tensor would hold and compute the same) and row_parts, see `parts_of_rows`. Weights: embed (the axis ZeRO-3
# splits, over devices that share rows too; expert_embed of experts, which are split already) and those that tensor
# parallelism splits. Names that are absent are never split.
RULES: dict[str, str | tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "length": "context",
    "residual_length": ("context", "tensor"),
    "row_parts": ("context", "data", "fsdp", "expert"),
    "embed": ("context", "fsdp", "expert"),
    "experts": "expert",
    "expert_embed": ("context", "fsdp"),
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}

# Devices in one ring of `sum_where_it_lies`, at most.
LONGEST_RING = 32

LogicalAxes = tuple[str | None, ...]


def initialize_processes(coordinator: str = "", num_processes: int = 0, process_id: int = -1) -> None:
    """Joins this process to the others, before anything touches a device.

    With no arguments `jax.distributed` finds the coordinator itself (TPU pods, Slurm, GKE).

    Args:
      coordinator: 'HOST:PORT' of process 0.
      num_processes: how many there are.
      process_id: which one this is, from 0.
    """
    if coordinator:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    else:
        jax.distributed.initialize()


def mesh_sizes(cfg: MeshConfig, num_devices: int) -> tuple[int, ...]:
    """dcn_data, then the sizes of `AXES`: their product is `num_devices`. `data` = -1 takes what the others leave.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices.
    """
    fixed = cfg.dcn_data * cfg.fsdp * cfg.expert * cfg.context * cfg.tensor
    data = num_devices // fixed if cfg.data == -1 else cfg.data
    if fixed * data != num_devices or data < 1:
        raise ConfigError(
            f"mesh data={cfg.data} fsdp={cfg.fsdp} expert={cfg.expert} context={cfg.context} tensor={cfg.tensor} "
            f"dcn_data={cfg.dcn_data} does not fit {num_devices} devices: their product must be {num_devices}"
        )
    return cfg.dcn_data, data, cfg.fsdp, cfg.expert, cfg.context, cfg.tensor


def make_mesh(cfg: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """The mesh with axes `AXES`; slices (dcn_data) are the outer part of 'data', so only it crosses the DCN.

    Raises:
      ConfigError: the sizes do not fit the devices, or their slices.
    """
    devices = jax.devices() if devices is None else devices
    dcn, *sizes = mesh_sizes(cfg, len(devices))
    auto = (AxisType.Auto,) * len(AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if devices[0].platform == "tpu" and dcn != slices:
        raise ConfigError(f"mesh.dcn_data={dcn}: expected {slices}, the number of slices")
    if (
        slices == 1
    ):  # on CPU and GPU devices are numbered process by process, of which the outermost axis has whole ones
        mesh = jax.make_mesh((dcn * sizes[0], *sizes[1:]), AXES, axis_types=auto, devices=devices)
        return Mesh(_as_ring(mesh.devices), AXES, axis_types=auto) if max(sizes) == len(devices) else mesh
    from jax.experimental import mesh_utils

    grid = mesh_utils.create_hybrid_device_mesh(sizes, (dcn, *[1] * len(sizes[1:])), devices)
    return Mesh(grid, AXES, axis_types=auto)


def in_words(mesh: Mesh) -> str:
    """Example: 'fsdp=4 x tensor=2'."""
    return " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "one"


def _as_ring(devices: np.ndarray) -> np.ndarray:
    """The TPU chips of one long axis, in JAX's order or to and fro through the slice: where neighbours are closer."""
    flat = devices.ravel()
    if flat.size > LONGEST_RING or not all(hasattr(device, "coords") for device in flat):
        return devices
    coords_NxC = np.array([device.coords for device in flat])
    coords_NxC -= coords_NxC.min(axis=0)
    place_N = np.zeros(flat.size, np.int64)
    for axis in np.argsort(sizes_C := coords_NxC.max(axis=0) + 1, kind="stable"):
        there_N, size = coords_NxC[:, axis], sizes_C[axis]
        place_N = place_N * size + np.where(place_N % 2, size - 1 - there_N, there_N)

    def hops(order_N: np.ndarray) -> int:
        return int(np.abs(coords_NxC[order_N] - coords_NxC[np.roll(order_N, -1)]).sum())

    best_N = min(np.arange(flat.size), np.argsort(place_N, kind="stable"), key=hops)
    return flat[best_N].reshape(devices.shape)


def spec(logical: LogicalAxes, whole: tuple[str, ...] = ()) -> PartitionSpec:
    """PartitionSpec of logical axes. Example: ('layers', 'embed', 'mlp') -> P(None, ('fsdp', 'context'), 'tensor').

    Args:
      logical: one name or None a dimension.
      whole: names that are not to be split here.
    """
    return PartitionSpec(*(RULES.get(name) if name and name not in whole else None for name in logical))


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Asks for `x` to lie as its logical axes say, on the mesh set by `jax.set_mesh`; without one, does nothing."""
    return _constrain(x, spec_of(x, logical))


def spec_of(x: jax.Array, logical: LogicalAxes) -> PartitionSpec:
    """PartitionSpec of an activation. A length that the mesh does not divide, as of the one position that is decoded at
    a time, stays whole; a residual_length may still be split as length."""

    def divided(size: int, name: str | None) -> str | None:
        if name == "residual_length" and size % length_parts(name):
            name = "length"
        return None if name == "length" and size % length_parts() else name

    return spec(tuple(divided(size, name) for size, name in zip(x.shape, logical, strict=True)))


@jax.custom_vjp
def gather_positions(x_BxLxD: jax.Array) -> jax.Array:
    """What a block's matmuls read: positions that 'residual_length' splits over tensor are gathered (Korthikanti et
    al., arXiv:2205.05198). Of its gradient, a sum over tensor, each device keeps that of its own positions."""
    return constrain(x_BxLxD, "batch", "length", None)


def _gather_positions_fwd(x_BxLxD: jax.Array) -> tuple[jax.Array, None]:
    return constrain(x_BxLxD, "batch", "length", None), None


def _gather_positions_bwd(_: None, d_BxLxD: jax.Array) -> tuple[jax.Array]:
    return (constrain(d_BxLxD, "batch", "residual_length", None),)


gather_positions.defvjp(_gather_positions_fwd, _gather_positions_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(w: jax.Array, logical: LogicalAxes) -> jax.Array:
    return _constrain(w, spec(logical, whole=("embed", "expert_embed")))


def _gather_fwd(w: jax.Array, logical: LogicalAxes) -> tuple[jax.Array, None]:
    # The constraint itself, which a remat policy knows not to keep (lm.models.blocks).
    return _constrain(w, spec(logical, whole=("embed", "expert_embed"))), None


def _gather_bwd(logical: LogicalAxes, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    # Asked for where the weight lies, and not, as the transpose of the gather would, whole on every device.
    return (_constrain(gradient, spec(logical)),)


_gather.defvjp(_gather_fwd, _gather_bwd)


def gather(w: jax.Array, *logical: str | None) -> jax.Array:
    """A weight whose 'embed' axis is gathered for use (ZeRO-3); cast it to the compute dtype first: the cast travels.

    Its gradient is split as the weight is.
    """
    return _gather(w, logical)


def goes_round(kernel_IxO: jax.Array, logical: LogicalAxes, rows: tuple[int, ...]) -> bool:
    """Whether `sum_where_it_lies` is for the gradient of this kernel, from activations of this shape [B, L, ...].

    Not where the compiler does better: where it multiplies a large kernel in pieces while they travel (`lm.flags`),
    which it does over up to 16 devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not can_go_round(kernel_IxO, logical):
        return False
    devices = math.prod(mesh.shape[axis] for axis in RULES["embed"])
    in_pieces = kernel_IxO.nbytes >= flags.windowed_from(mesh.abstract_device.device_kind) and devices <= 16
    return rows[0] % batch_shards(mesh) == 0 and rows[1] % length_parts() == 0 and not in_pieces


def can_go_round(kernel_IxO: jax.Array, logical: LogicalAxes) -> bool:
    """Whether the mesh has what `sum_where_it_lies` needs: several devices, and a kernel that they divide in halves."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or "embed" not in logical:
        return False
    return not any(size % (2 * mesh.shape["tensor"]) for size in kernel_IxO.shape)  # halves go either way


def sum_parts(parts_PxDxO: jax.Array, logical: LogicalAxes) -> jax.Array:
    """The gradient of a weight ('embed', ...) from what each device makes of its rows, [P, D, O], P = `row_groups`."""
    summed: jax.Array = jax.shard_map(
        lambda part_1xDxO: sum_where_it_lies(part_1xDxO[0]),
        in_specs=spec(("row_parts", *logical), whole=("embed",)),
        out_specs=spec(logical),
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
    for axis in RULES["embed"]:
        if axis in rest:
            partial_DxO = _scatter_sum(partial_DxO, axis, shape[axis])
            rest.remove(axis)
    return jax.lax.psum(partial_DxO, tuple(rest)) if rest else partial_DxO


def _scatter_sum(x_DxO: jax.Array, axis: str, size: int) -> jax.Array:
    """Reduce-scatter of D over a mesh axis, by a ring; many devices are a grid, whose rows and then columns are rings:
    a ring's steps are as many as its devices. What travels is a slice of x, which needs no copy first."""
    columns = size if size <= LONGEST_RING else max(n for n in range(1, math.isqrt(size) + 1) if size % n == 0)
    grid = x_DxO.reshape(size // columns, columns, x_DxO.shape[0] // size, x_DxO.shape[1])
    grid = _ring(grid, axis, size, (columns, 1), 1)
    if columns < size:
        grid = _ring(grid, axis, size, (size // columns, columns), 0)
    return grid[0, 0]


def _ring(x: jax.Array, axis: str, size: int, ring: tuple[int, int], dim: int) -> jax.Array:
    """Sums what the devices of each ring have; of dimension `dim`, as long as the ring, each keeps its own place.

    One half of the last dimension travels to the right, one to the left. Example, 3 devices, of the half that goes to
    the right device 1's place: device 2 begins with its own, 0 adds its own to that, and 1 adds its own.

    Args:
      x: of this device.
      axis: of the mesh, of `size` devices.
      ring: how many devices a ring has, and how far neighbours are from each other.
      dim: see above.
    """
    count, stride = ring
    place = jax.lax.axis_index(axis) // stride % count
    sizes = (*(1 if i == dim else n for i, n in enumerate(x.shape[:-1])), x.shape[-1] // 2)

    def neighbour(i: int, way: int) -> int:
        return i + ((i // stride + way) % count - i // stride % count) * stride

    def own(n: int, half: int, way: int) -> jax.Array:
        starts = [(place - way * n) % count if i == dim else 0 for i in range(x.ndim - 1)]
        return jax.lax.dynamic_slice(x, [*starts, half * sizes[-1]], sizes)

    sums = []
    for half, way in enumerate((1, -1)):
        to = [(i, neighbour(i, way)) for i in range(size)]
        parts = [own(n, half, way) for n in range(1, count + 1)]
        sums.append(functools.reduce(lambda total, part: jax.lax.ppermute(total, axis, to) + part, parts))
    return jnp.concatenate(sums, axis=-1)


def _constrain(x: jax.Array, partition: PartitionSpec) -> jax.Array:
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty or mesh.size == 1 else jax.lax.with_sharding_constraint(x, partition)


def is_distributed_trace() -> bool:
    """Whether what is being traced will run on more than one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1


def platform() -> str:
    """What is being traced will run on this: 'cpu', 'gpu' or 'tpu', of the mesh set by `jax.set_mesh`; 'cpu' without.

    The mesh may be of devices that are not there, as where `tools/plan.py` compiles for a TPU pod.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return device.platform if device else "cpu"


def row_groups() -> int:
    """In how many parts the mesh set by `jax.set_mesh` splits 'row_parts'; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else batch_shards(mesh) * mesh.shape["context"]


def length_parts(name: str = "length") -> int:
    """In how many parts the mesh set by `jax.set_mesh` splits each row, as length or residual_length; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    over = ("context",) if name == "length" else RULES[name]
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in over)


def parts_of_rows(x_BxL: jax.Array) -> jax.Array:
    """[B, L, …] -> [parts * B, L / parts, …]: what each device holds of a row becomes a row of its own.

    For what treats positions one by one: a loop over them then takes some of every device's. Nothing moves.
    Example, 2 parts: [[1, 2, 3, 4], [5, 6, 7, 8]] -> [[1, 2], [5, 6], [3, 4], [7, 8]]. Where the mesh does not divide L
    the rows stay as they are.
    """
    B, L, *rest = x_BxL.shape
    parts = length_parts()
    if parts == 1 or L % parts:
        return x_BxL
    split = jnp.moveaxis(x_BxL.reshape(B, parts, L // parts, *rest), 1, 0).reshape(parts * B, L // parts, *rest)
    return constrain(split, "row_parts", *[None] * (x_BxL.ndim - 1))


def batch_shards(mesh: Any) -> int:
    """In how many parts the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def batch_sharding(mesh: Mesh, key: str = "", ndim: int = 1) -> NamedSharding:
    """Sharding of a batch's array: its rows, and where the key says that the last axis is of positions, those too."""
    last = ("length",) if key in LENGTH_KEYS else ()
    return NamedSharding(mesh, spec(("batch", *[None] * (ndim - 1 - len(last)), *last)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of scalars."""
    return NamedSharding(mesh, PartitionSpec())


def check_divisible(shapes: Mapping[str, tuple[int, ...]], axes: Mapping[str, LogicalAxes], mesh: Mesh) -> None:
    """Refuses a mesh that does not divide a parameter.

    Args:
      shapes: path -> shape.
      axes: path -> logical axes.
      mesh: the mesh.

    Raises:
      ConfigError: naming the parameter, the dimension and the mesh axis.
    """
    for path, shape in shapes.items():
        for size, name, split in zip(shape, axes[path], spec(axes[path]), strict=True):
            over = [axis for axis in ((split,) if isinstance(split, str) else split or ()) if mesh.shape[axis] > 1]
            if size % math.prod(mesh.shape[axis] for axis in over):
                sizes = " x ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in over)
                raise ConfigError(f"{sizes} does not divide '{name}' ({size}) of parameter '{path}' {shape}")


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Rows of a global batch that this process's devices hold: int64 [n], ascending."""
    index_map: Mapping[Any, Any] = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(*index[0].indices(batch_size)) for index in index_map.values()]))


def to_global(batch: Mapping[str, np.ndarray], rows: np.ndarray, batch_size: int, mesh: Mesh) -> dict[str, jax.Array]:
    """Global arrays [batch_size, …] from this process's part of them; each device gets its rows, or its part of them.

    Args:
      batch: arrays [len(rows), …], the rows of the global batch named by `rows`.
      rows: as `local_rows` gives them.
      batch_size: rows of the global batch.
      mesh: where it goes.
    """

    def make(key: str, local: np.ndarray) -> jax.Array:
        def piece(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_size)
            first = int(np.searchsorted(rows, start))
            return local[first : first + stop - start, *index[1:]]

        where = batch_sharding(mesh, key, local.ndim)
        return jax.make_array_from_callback((batch_size, *local.shape[1:]), where, piece)

    return {key: make(key, value) for key, value in batch.items()}
