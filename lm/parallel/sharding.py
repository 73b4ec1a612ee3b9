"""Sharding of every array, by rules from logical axes to mesh axes.

Arrays name their dimensions by logical axes ('batch', 'embed', …); `RULES` maps each to the mesh axes that shard it.
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

# Logical axis -> mesh axes. A logical axis that is absent is never sharded.
RULES: dict[str, str | tuple[str, ...]] = {
    # Activations. The residual stream between matmuls is sharded over tensor too (sequence parallelism).
    "batch": ("data", "fsdp", "expert"),
    "length": "context",
    "residual_length": ("context", "tensor"),
    "token_shards": ("context", "data", "fsdp", "expert"),  # batch and length in one axis: `fold_length_into_batch`
    # Weights: ZeRO-3 shards 'embed'; of experts, which 'expert' shards already, 'expert_embed'.
    "embed": ("context", "fsdp", "expert"),
    "experts": "expert",
    "expert_embed": ("context", "fsdp"),
    # Tensor parallelism, of weights and of the activations that they give.
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}


LogicalAxes = tuple[str | None, ...]


def mesh_axes(name: str | None) -> tuple[str, ...]:
    """Mesh axes that shard a logical axis. Example: 'mlp' -> ('tensor',); None -> ()."""
    axes = RULES.get(name or "", ())
    return (axes,) if isinstance(axes, str) else axes


def spec(logical: LogicalAxes, whole: tuple[str, ...] = ()) -> PartitionSpec:
    """PartitionSpec of logical axes. Example: ('layers', 'embed', 'mlp') -> P(None, ('fsdp', 'context'), 'tensor').

    Args:
      logical: a name or None for each dimension.
      whole: names to leave unsharded.
    """
    return PartitionSpec(*(RULES.get(name) if name and name not in whole else None for name in logical))


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Constrains the sharding of `x` to its logical axes on the mesh set by `jax.set_mesh`, if there is one."""
    return _constrain(x, activation_spec(x, logical))


def activation_spec(x: jax.Array, logical: LogicalAxes) -> PartitionSpec:
    """PartitionSpec of an activation; a length that the mesh does not divide is not sharded.

    Example: the one position that is decoded at a time. 'residual_length' falls back to 'length' first.
    """

    def divisible(size: int, name: str | None) -> str | None:
        if name == "residual_length" and size % length_shards(name):
            name = "length"
        return None if name == "length" and size % length_shards() else name

    return spec(tuple(divisible(size, name) for size, name in zip(x.shape, logical, strict=True)))


@jax.custom_vjp
def gather_positions(x_BxLxD: jax.Array) -> jax.Array:
    """All-gather of positions over 'tensor' before the matmuls of a block; its gradient is reduce-scattered.

    This is sequence parallelism (Korthikanti et al., arXiv:2205.05198).
    """
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
    # Not a call of _gather: remat policies (lm.models.remat) recognise the constraint and do not save its result.
    return _constrain(w, spec(logical, whole=("embed", "expert_embed"))), None


def _gather_bwd(logical: LogicalAxes, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    # Sharded as the weight is. The transpose of the constraint would be an unsharded gradient on every device.
    return (_constrain(gradient, spec(logical)),)


_gather.defvjp(_gather_fwd, _gather_bwd)


def gather(w: jax.Array, *logical: str | None) -> jax.Array:
    """All-gather of a weight's 'embed' axis for use (ZeRO-3); its gradient is sharded as the weight is.

    Cast the weight to the compute dtype first, so that fewer bytes are sent.
    """
    return _gather(w, logical)


def _constrain(x: jax.Array, partition: PartitionSpec) -> jax.Array:
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty or mesh.size == 1 else jax.lax.with_sharding_constraint(x, partition)


def is_distributed_trace() -> bool:
    """Whether the program being traced will run on more than one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1


def platform() -> str:
    """Platform of the program being traced, 'cpu', 'gpu' or 'tpu': that of the mesh set by `jax.set_mesh`, else 'cpu'.

    The mesh's devices need not be attached: `tools/plan.py` compiles for a TPU pod without one.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return device.platform if device else "cpu"


def token_shards() -> int:
    """Number of shards of a batch's tokens (by row and by position) on the mesh set by `jax.set_mesh`; else 1."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else batch_shards(mesh) * mesh.shape["context"]


def length_shards(name: str = "length") -> int:
    """Number of shards of a row ('length' or 'residual_length') on the mesh set by `jax.set_mesh`; else 1."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in mesh_axes(name))


def fold_length_into_batch(x_BxL: jax.Array) -> jax.Array:
    """[B, L, …] -> [shards * B, L / shards, …]: each context shard of a row becomes a row. No data moves.

    For functions that treat positions independently: a loop over chunks of positions then keeps all devices busy.
    Example, 2 shards: [[1, 2, 3, 4], [5, 6, 7, 8]] -> [[1, 2], [5, 6], [3, 4], [7, 8]]. If the mesh does not divide L,
    the array is returned unchanged.
    """
    B, L, *rest = x_BxL.shape
    shards = length_shards()
    if shards == 1 or L % shards:
        return x_BxL
    folded = jnp.moveaxis(x_BxL.reshape(B, shards, L // shards, *rest), 1, 0).reshape(shards * B, L // shards, *rest)
    return constrain(folded, "token_shards", *[None] * (x_BxL.ndim - 1))


def batch_shards(mesh: Any) -> int:
    """Number of shards of the rows of a batch."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def batch_sharding(mesh: Mesh, key: str = "", ndim: int = 1) -> NamedSharding:
    """Sharding of an array of a batch: by rows, and for the keys of `LENGTH_KEYS` also by positions, the last axis."""
    last = ("length",) if key in LENGTH_KEYS else ()
    return NamedSharding(mesh, spec(("batch", *[None] * (ndim - 1 - len(last)), *last)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding with a full copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_divisible(shapes: Mapping[str, tuple[int, ...]], axes: Mapping[str, LogicalAxes], mesh: Mesh) -> None:
    """Checks that the mesh divides every parameter.

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
    """Rows of a global batch on the devices of this process: int64 [n], ascending."""
    index_map: Mapping[Any, Any] = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(*index[0].indices(batch_size)) for index in index_map.values()]))


def to_global(batch: Mapping[str, np.ndarray], rows: np.ndarray, batch_size: int, mesh: Mesh) -> Batch:
    """Global arrays [batch_size, …], sharded by `batch_sharding`, from the rows that this process holds.

    Args:
      batch: arrays [len(rows), …].
      rows: indices of these rows in the global batch, from `local_rows`.
      batch_size: rows of the global batch.
      mesh: the mesh.
    """

    def make(key: str, local: np.ndarray) -> jax.Array:
        def shard(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_size)
            first = int(np.searchsorted(rows, start))
            return local[first : first + stop - start, *index[1:]]

        shape = (batch_size, *local.shape[1:])
        return jax.make_array_from_callback(shape, batch_sharding(mesh, key, local.ndim), shard)

    return cast(Batch, {key: make(key, value) for key, value in batch.items()})
