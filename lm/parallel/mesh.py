"""The device mesh: its axes, and the order of devices along them.

Axes are Auto: XLA chooses the sharding of what is not constrained, and one device is a mesh like any other.
"""

import math
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from lm.config import MeshConfig
from lm.config.schema import ConfigError

AXES = ("data", "fsdp", "expert", "context", "tensor")
# Largest number of devices in one ring (`lm.parallel.ring_reduce`).
LONGEST_RING = 32
# A 2-D slice has wraparound links along axes of this many chips.
RING = 16


def initialize_processes(coordinator: str = "", num_processes: int = 0, process_id: int = -1) -> None:
    """Initialises `jax.distributed`; call it before anything touches a device.

    Without arguments JAX finds the coordinator itself (TPU pods, Slurm, GKE).

    Args:
      coordinator: 'HOST:PORT' of process 0.
      num_processes: number of processes.
      process_id: index of this process, from 0.
    """
    if coordinator:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    else:
        jax.distributed.initialize()


def mesh_sizes(cfg: MeshConfig, num_devices: int) -> tuple[int, ...]:
    """(dcn_data, *sizes of `AXES`), whose product is `num_devices`; `data` = -1 is inferred.

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
            f"{_valid_sizes(cfg, num_devices)}"
        )
    return tuple(sizes.values())


def _valid_sizes(cfg: MeshConfig, num_devices: int) -> str:
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
    """The mesh with axes `AXES`. Slices (dcn_data) are the outer part of 'data', the only axis that crosses the DCN.

    Raises:
      ConfigError: the sizes do not fit the devices, or their slices.
    """
    devices = jax.devices() if devices is None else devices
    dcn, *sizes = mesh_sizes(cfg, len(devices))
    auto = (AxisType.Auto,) * len(AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if devices[0].platform == "tpu" and dcn != slices:
        raise ConfigError(f"mesh.dcn_data={dcn}: expected {slices}, the number of slices")
    # Physical axes may be split if there is no other assignment; JAX's own `make_mesh` allows this on v5e only.
    if slices == 1:  # CPUs and GPUs are numbered by process, so that the outermost axis is over whole processes
        grid = mesh_utils.create_device_mesh((dcn * sizes[0], *sizes[1:]), devices, allow_split_physical_axes=True)
    else:
        dcn_sizes = (dcn, *[1] * len(sizes[1:]))
        grid = mesh_utils.create_hybrid_device_mesh(sizes, dcn_sizes, devices, allow_split_physical_axes=True)
    if max(sizes) == math.prod(sizes):
        grid = np.concatenate([_ring_order(one) for one in np.split(grid, slices)])
    return Mesh(grid, AXES, axis_types=auto)


def in_words(mesh: Mesh) -> str:
    """Example: 'fsdp=4 x tensor=2'."""
    return " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "one"


def _ring_order(devices: np.ndarray) -> np.ndarray:
    """The chips of a TPU slice with one mesh axis, ordered so that neighbours of a ring are close to each other.

    The collective permutations of `lm.parallel.ring_reduce` between distant chips would not be overlapped.
    """
    flat = devices.ravel()
    if not all(hasattr(device, "coords") for device in flat):
        return devices
    coords_NxC = np.array([device.coords for device in flat])
    coords_NxC -= coords_NxC.min(axis=0)
    sizes_C = coords_NxC.max(axis=0) + 1
    if flat.size > LONGEST_RING:
        # Rings are rows and columns; without wraparound, a ring goes out on even places and back on odd ones.
        there_NxC = np.where(coords_NxC % 2, sizes_C - 1 - coords_NxC // 2, coords_NxC // 2)
        there_NxC = np.where(sizes_C == RING, coords_NxC, there_NxC)
        order = np.lexsort(there_NxC[:, np.argsort(-sizes_C, kind="stable")[::-1]].T)
        return flat[order].reshape(devices.shape) if (sizes_C > 1).sum() == 2 else devices
    place_N = np.zeros(flat.size, np.int64)  # a serpentine through the slice, unless JAX's own order is shorter
    for axis in np.argsort(sizes_C, kind="stable"):
        there_N, size = coords_NxC[:, axis], sizes_C[axis]
        place_N = place_N * size + np.where(place_N % 2, size - 1 - there_N, there_N)

    def hops(order_N: np.ndarray) -> int:
        return int(np.abs(coords_NxC[order_N] - coords_NxC[np.roll(order_N, -1)]).sum())

    best_N = min(np.arange(flat.size), np.argsort(place_N, kind="stable"), key=hops)
    return flat[best_N].reshape(devices.shape)
