"""The device mesh, and where every array lies on it.

Arrays name their dimensions by logical axes ('batch', 'embed', …); `RULES` says which mesh axis each one is split over.
Axes are Auto: the compiler places what is not constrained, and a mesh of one device needs no second code path.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lm.config import MeshConfig
from lm.schema import ConfigError

AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes. Activations: batch, length. Weights: embed (the axis ZeRO-3 splits) and those that tensor
# parallelism splits. Names that are absent are never split.
RULES: dict[str, str | tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}

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


def mesh_sizes(cfg: MeshConfig, num_devices: int) -> tuple[int, int, int, int]:
    """(dcn_data, data, fsdp, tensor) whose product is `num_devices`; `data` = -1 takes what the others leave.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices.
    """
    fixed = cfg.dcn_data * cfg.fsdp * cfg.tensor
    data = num_devices // fixed if cfg.data == -1 else cfg.data
    if fixed * data != num_devices or data < 1:
        raise ConfigError(
            f"mesh data={cfg.data} fsdp={cfg.fsdp} tensor={cfg.tensor} dcn_data={cfg.dcn_data} does not fit "
            f"{num_devices} devices: their product must be {num_devices}"
        )
    return cfg.dcn_data, data, cfg.fsdp, cfg.tensor


def make_mesh(cfg: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """The mesh with axes `AXES`; slices (dcn_data) are the outer part of 'data', so only it crosses the DCN."""
    devices = jax.devices() if devices is None else devices
    dcn, data, fsdp, tensor = mesh_sizes(cfg, len(devices))
    auto = (AxisType.Auto,) * len(AXES)
    if dcn == 1:
        return jax.make_mesh((data, fsdp, tensor), AXES, axis_types=auto, devices=devices)
    from jax.experimental import mesh_utils

    # Without slices (CPU, GPU) the processes are what the slow network joins.
    grid = mesh_utils.create_hybrid_device_mesh(
        (data, fsdp, tensor), (dcn, 1, 1), devices, process_is_granule=not hasattr(devices[0], "slice_index")
    )
    return Mesh(grid, AXES, axis_types=auto)


def spec(logical: LogicalAxes, without: tuple[str, ...] = ()) -> PartitionSpec:
    """PartitionSpec of logical axes. Example: ('layers', 'embed', 'mlp') -> P(None, 'fsdp', 'tensor').

    Args:
      logical: one name or None a dimension.
      without: mesh axes to leave out.
    """

    def mesh_axes(name: str | None) -> str | tuple[str, ...] | None:
        axes = RULES.get(name, ()) if name else ()
        kept = tuple(a for a in ((axes,) if isinstance(axes, str) else axes) if a not in without)
        return kept[0] if len(kept) == 1 else kept or None

    return PartitionSpec(*map(mesh_axes, logical))


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Asks for `x` to lie as its logical axes say, on the mesh set by `jax.set_mesh`; without one, does nothing."""
    return _constrain(x, spec(logical))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(w: jax.Array, logical: LogicalAxes) -> jax.Array:
    return _constrain(w, spec(logical, without=("fsdp",)))


def _gather_fwd(w: jax.Array, logical: LogicalAxes) -> tuple[jax.Array, None]:
    # The constraint itself, which a remat policy knows not to keep (lm.models.blocks).
    return _constrain(w, spec(logical, without=("fsdp",))), None


def _gather_bwd(logical: LogicalAxes, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    # Asked for where the weight lies, and not, as the transpose of the gather would, whole on every device.
    return (_constrain(gradient, spec(logical)),)


_gather.defvjp(_gather_fwd, _gather_bwd)


def gather(w: jax.Array, *logical: str | None) -> jax.Array:
    """A weight gathered over 'fsdp' for use (ZeRO-3); cast it to the compute dtype first, so that the cast travels.

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
    """In how many parts the mesh set by `jax.set_mesh` splits the rows of a batch; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else batch_shards(mesh)


def batch_shards(mesh: Any) -> int:
    """In how many parts the rows of a batch are split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of any batch array: rows split, the rest whole."""
    return NamedSharding(mesh, spec(("batch",)))


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
        for size, name, mesh_axis in zip(shape, axes[path], spec(axes[path]), strict=True):
            parts = mesh.shape[mesh_axis] if isinstance(mesh_axis, str) else 1
            if size % parts:
                raise ConfigError(
                    f"mesh.{mesh_axis}={parts} does not divide '{name}' ({size}) of parameter '{path}' {shape}"
                )


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Rows of a global batch that this process's devices hold: int64 [n], ascending."""
    index_map: Mapping[Any, Any] = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(*index[0].indices(batch_size)) for index in index_map.values()]))


def to_global(batch: Mapping[str, np.ndarray], rows: np.ndarray, batch_size: int, mesh: Mesh) -> dict[str, jax.Array]:
    """Global arrays [batch_size, …] from this process's part of them.

    Args:
      batch: arrays [len(rows), …], the rows of the global batch named by `rows`.
      rows: as `local_rows` gives them.
      batch_size: rows of the global batch.
      mesh: where it goes.
    """
    sharding = batch_sharding(mesh)

    def make(local: np.ndarray) -> jax.Array:
        def piece(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_size)
            first = int(np.searchsorted(rows, start))
            return local[first : first + stop - start]

        return jax.make_array_from_callback((batch_size, *local.shape[1:]), sharding, piece)

    return {key: make(value) for key, value in batch.items()}
