"""The device mesh: its axes, and which device stands where on it.

Axes are Auto: the compiler places what is not constrained, and a mesh of one device needs no second code path.
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


# Devices in one ring (`lm.parallel.ring_reduce`), at most.
LONGEST_RING = 32


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
    """The TPU chips of a slice's one long axis, ordered so that neighbours of the ring (`lm.parallel.ring_reduce`) are
    close to each other: what a permutation sends far is waited for."""
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


# Chips along an axis of a two-dimensional slice that close to a ring by their links.
RING = 16
