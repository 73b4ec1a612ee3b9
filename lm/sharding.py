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
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lm.chips import RING
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

# Devices in one ring (`lm.rings`), at most.
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
    sizes = {name: getattr(cfg, name) for name in ("dcn_data", *AXES)}
    rest = math.prod(size for name, size in sizes.items() if name != "data")
    if sizes["data"] == -1:
        sizes["data"] = num_devices // rest
    if math.prod(sizes.values()) != num_devices or min(sizes.values()) < 1:
        raise ConfigError(
            f"mesh data={cfg.data} fsdp={cfg.fsdp} expert={cfg.expert} context={cfg.context} tensor={cfg.tensor} "
            f"dcn_data={cfg.dcn_data} does not fit {num_devices} devices: their product must be {num_devices}"
            f"{_sizes_that_would_do(cfg, num_devices)}"
        )
    return tuple(sizes.values())


def _sizes_that_would_do(cfg: MeshConfig, num_devices: int) -> str:
    """Example, 8 devices, data=-1 and tensor=3: '; with the others as they are, mesh.tensor=1, 2, 4, 8 would do'."""
    given = {name: getattr(cfg, name) for name in ("dcn_data", *AXES) if getattr(cfg, name) > 0}
    found = []
    for name in AXES:
        left, rest = divmod(num_devices, math.prod(size for other, size in given.items() if other != name))
        if left and not rest:
            smaller = range(1, left + 1) if cfg.data == -1 and name != "data" else ()  # the rest is data's
            found.append(f"mesh.{name}={', '.join(str(n) for n in smaller if left % n == 0) or left}")
    if found:
        return f"; with the others as they are, {' or '.join(found)} would do"
    if num_devices % cfg.dcn_data:
        return f"; mesh.dcn_data={cfg.dcn_data}, the number of slices, does not divide them"
    sizes = dict.fromkeys(AXES, 1) | {"fsdp": num_devices // cfg.dcn_data}
    return f"; {' '.join(f'mesh.{name}={size}' for name, size in sizes.items())} would do"


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
    # A physical axis may be split where no other assignment is found, as JAX's own `make_mesh` does on v5e only.
    if slices == 1:  # CPUs and GPUs are numbered process by process: the outermost axis has whole ones
        grid = mesh_utils.create_device_mesh((dcn * sizes[0], *sizes[1:]), devices, allow_split_physical_axes=True)
    else:
        dcn_sizes = (dcn, *[1] * len(sizes[1:]))
        grid = mesh_utils.create_hybrid_device_mesh(sizes, dcn_sizes, devices, allow_split_physical_axes=True)
    if max(sizes) == math.prod(sizes):
        grid = np.concatenate([_as_ring(one) for one in np.split(grid, slices)])
    return Mesh(grid, AXES, axis_types=auto)


def in_words(mesh: Mesh) -> str:
    """Example: 'fsdp=4 x tensor=2'."""
    return " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "one"


def _as_ring(devices: np.ndarray) -> np.ndarray:
    """The TPU chips of a slice's one long axis, in an order in which those are close that `lm.rings` makes
    neighbours: what a permutation sends far is waited for."""
    flat = devices.ravel()
    if not all(hasattr(device, "coords") for device in flat):
        return devices
    coords_NxC = np.array([device.coords for device in flat])
    coords_NxC -= coords_NxC.min(axis=0)
    sizes_C = coords_NxC.max(axis=0) + 1
    if flat.size > LONGEST_RING:
        # Rings are rows and columns; one that does not close goes out on even places and back on odd ones.
        there_NxC = np.where(coords_NxC % 2, sizes_C - 1 - coords_NxC // 2, coords_NxC // 2)
        there_NxC = np.where(sizes_C == RING, coords_NxC, there_NxC)
        order = np.lexsort(there_NxC[:, np.argsort(-sizes_C, kind="stable")[::-1]].T)
        return flat[order].reshape(devices.shape) if (sizes_C > 1).sum() == 2 else devices
    place_N = np.zeros(flat.size, np.int64)  # to and fro through the slice, unless JAX's own order is shorter
    for axis in np.argsort(sizes_C, kind="stable"):
        there_N, size = coords_NxC[:, axis], sizes_C[axis]
        place_N = place_N * size + np.where(place_N % 2, size - 1 - there_N, there_N)

    def hops(order_N: np.ndarray) -> int:
        return int(np.abs(coords_NxC[order_N] - coords_NxC[np.roll(order_N, -1)]).sum())

    best_N = min(np.arange(flat.size), np.argsort(place_N, kind="stable"), key=hops)
    return flat[best_N].reshape(devices.shape)


def mesh_axes(name: str | None) -> tuple[str, ...]:
    """Mesh axes that a logical axis is split over. Example: 'mlp' -> ('tensor',); None -> ()."""
    split = RULES.get(name or "", ())
    return (split,) if isinstance(split, str) else split


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
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in mesh_axes(name))


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
        for size, name in zip(shape, axes[path], strict=True):
            over = [axis for axis in mesh_axes(name) if mesh.shape[axis] > 1]
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
