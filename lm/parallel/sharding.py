"""Where every array lies on the mesh.

Arrays name their dimensions by logical axes ('batch', 'embed', …); `RULES` says which mesh axis each one is split over.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm.config.schema import ConfigError
from lm.types import LENGTH_KEYS, Batch

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


LogicalAxes = tuple[str | None, ...]


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


def to_global(batch: Mapping[str, np.ndarray], rows: np.ndarray, batch_size: int, mesh: Mesh) -> Batch:
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

    return cast(Batch, {key: make(key, value) for key, value in batch.items()})
