"""Mixture of experts in place of a block's MLP (Shazeer et al. 2017; Switch, Fedus et al. 2021).

A router sends each position to its top-k experts, and no position is dropped: positions are sorted by expert, and the
experts are a grouped matmul over groups of unequal size. So a row's result depends on that row alone; with a capacity
factor it would depend on the rest of the batch.

Shape letters: see `lm.types`, and X experts, C of them chosen for each position, T positions on a device, R = T * C.
Experts have no biases.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lm.config import ModelConfig
from lm.models import initialisers, layers
from lm.optim import mup
from lm.parallel import sharding

# Flax collection in which each layer sows its `load_balance`.
ROUTING = "routing"

# Tiles of the TPU kernel: the largest of TILES that divides the rows, and at most MAX_WIDTH columns.
TILES, MAX_WIDTH = (512, 256, 128), 1024


class Experts(nn.Module):
    """sum_c gate_c * mlp_c(x) over the chosen experts c; gates are the router's probabilities."""

    cfg: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, segments_BxL: jax.Array) -> jax.Array:
        cfg = self.cfg
        experts, choices, inner, outer = cfg.num_experts, cfg.experts_per_token, cfg.mlp_dim, cfg.embed_dim

        def kernel(name: str, init: initialisers.Init, shape: tuple[int, ...], *axes: str | None) -> jax.Array:
            # Not named '.../kernel': LoRA targets Dense layers, and this is not one.
            return layers.weight(self, f"{name}_kernel", init, shape, axes)

        # A small initial scale, so that all experts are tried (Switch, section 2.4). Float32: the choice is discrete.
        small = initialisers.fan_in_normal(0.1 * mup.width_ratio(cfg) ** 0.5)
        router_DxX = kernel("router", small, (outer, experts), "embed", None)
        logits_BxLxX = x_BxLxD.astype(jnp.float32) @ sharding.gather(router_DxX, "embed", None)
        logits_BxLxX = sharding.constrain(logits_BxLxX, "batch", "length", None)
        widen, narrow = ("experts", "expert_embed", "mlp"), ("experts", "mlp", "expert_embed")
        weights = [
            kernel(name, initialisers.initialiser(cfg, "kernel"), (experts, outer, inner), *widen)
            for name in (("gate", "up") if cfg.mlp == "swiglu" else ("up",))
        ]
        weights = [sharding.gather(each.astype(self.dtype), *widen) for each in weights]
        down = kernel("down", initialisers.initialiser(cfg, "residual"), (experts, inner, outer), *narrow)
        weights.append(sharding.gather(down.astype(self.dtype), *narrow))
        y_BxLxD, chosen_BxLxC = apply_experts(x_BxLxD, logits_BxLxX, tuple(weights), choices)
        self.sow(ROUTING, "balance_2xB", load_balance(logits_BxLxX, chosen_BxLxC, segments_BxL))
        return y_BxLxD


def route(logits_TxX: jax.Array, choices: int) -> tuple[jax.Array, jax.Array]:
    """Top-k routing: gates float32 [T, C], experts int32 [T, C].

    Gates are normalised to sum to 1 (GShard, Mixtral), but with one choice the gate is the expert's probability, else
    the router would have no gradient (Switch, equation 2).
    """
    gates_TxC, chosen_TxC = jax.lax.top_k(jax.nn.softmax(logits_TxX, axis=-1), choices)
    return gates_TxC / gates_TxC.sum(axis=-1, keepdims=True) if choices > 1 else gates_TxC, chosen_TxC


def apply_experts(
    x_BxLxD: jax.Array, logits_BxLxX: jax.Array, kernels: tuple[jax.Array, ...], choices: int
) -> tuple[jax.Array, jax.Array]:
    """The gated sum of the experts' outputs, [B, L, D], and the chosen experts, int32 [B, L, C].

    Each device holds the positions of its rows. With expert parallelism, positions are all-gathered over 'expert', each
    device computes its own experts, and the results are reduce-scattered. This is exact for any routing, even one that
    sends every position to one device.

    Args:
      x_BxLxD: in the compute dtype.
      logits_BxLxX: float32, of the router.
      kernels: up [X, D, F], or gate and up of SwiGLU, then down [X, F, D], in the compute dtype.
      choices: C.
    """
    mesh = jax.sharding.get_abstract_mesh()
    # The batch of one row that initialises the parameters is not sharded.
    is_split = sharding.is_distributed_trace() and x_BxLxD.shape[0] % sharding.batch_shards(mesh) == 0

    def on_device(x: jax.Array, logits: jax.Array, *kernels: jax.Array) -> tuple[jax.Array, jax.Array]:
        gates_TxC, chosen_TxC = route(logits.reshape(-1, logits.shape[-1]), choices)
        chosen, arrays = chosen_TxC, (x.reshape(-1, x.shape[-1]), gates_TxC, chosen_TxC)
        if is_split and mesh.shape["expert"] > 1:
            x_TxD, gates_TxC, chosen_TxC = (jax.lax.all_gather(a, "expert", axis=0, tiled=True) for a in arrays)
            chosen_TxC -= jax.lax.axis_index("expert") * kernels[0].shape[0]
            y_TxD = _local_experts(x_TxD, gates_TxC, chosen_TxC, kernels)
            y_TxD = jax.lax.psum_scatter(y_TxD, "expert", scatter_dimension=0, tiled=True)
        else:
            y_TxD = _local_experts(*arrays, kernels)
        if is_split and mesh.shape["tensor"] > 1:
            y_TxD = jax.lax.psum(y_TxD, "tensor")
        return y_TxD.astype(x.dtype).reshape(x.shape), chosen.reshape(*x.shape[:2], choices)

    if not is_split:
        return on_device(x_BxLxD, logits_BxLxX, *kernels)
    rows = sharding.activation_spec(x_BxLxD, ("batch", "length", None))
    widen, narrow = (sharding.spec(axes) for axes in (("experts", None, "mlp"), ("experts", "mlp", None)))
    specs = (rows, rows, *[widen] * (len(kernels) - 1), narrow)
    split = jax.shard_map(on_device, in_specs=specs, out_specs=(rows, rows), check_vma=False)
    return split(x_BxLxD, logits_BxLxX, *kernels)


def _local_experts(
    x_TxD: jax.Array, gates_TxC: jax.Array, chosen_TxC: jax.Array, kernels: tuple[jax.Array, ...]
) -> jax.Array:
    """Gated sum over the experts of `kernels`, float32 [T, D]; choices outside [0, X) are experts of other devices."""
    experts, choices = kernels[0].shape[0], chosen_TxC.shape[1]
    is_here_TxC = (chosen_TxC >= 0) & (chosen_TxC < experts)
    group_R = jnp.where(is_here_TxC, chosen_TxC, experts).reshape(-1)
    order_R = jnp.argsort(group_R, stable=True)
    sizes_X = (group_R[:, None] == jnp.arange(experts)[None, :]).sum(axis=0, dtype=jnp.int32)
    x_RxD = x_TxD[order_R // choices]
    *gate, up, down = kernels
    wide_RxF = checkpoint_name(grouped_matmul(x_RxD, up, sizes_X), "up")
    if gate:
        y_RxF = jax.nn.silu(checkpoint_name(grouped_matmul(x_RxD, gate[0], sizes_X), "gate")) * wide_RxF
    else:
        y_RxF = jax.nn.gelu(wide_RxF)
    y_RxD = grouped_matmul(y_RxF, down, sizes_X)
    y_TxCxD = y_RxD[jnp.argsort(order_R)].reshape(*chosen_TxC.shape, -1)
    return (gates_TxC[..., None] * y_TxCxD.astype(jnp.float32)).sum(axis=1)


def grouped_matmul(
    x_RxI: jax.Array, kernel_XxIxO: jax.Array, sizes_X: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """Grouped matmul, [R, O]: the first sizes_X[0] rows @ kernel 0, the next sizes_X[1] rows @ kernel 1, …

    Rows after the last group give 0. On TPU the megablox kernel, whose gradients skip these rows too; `interpret` is
    for tests without a TPU. Elsewhere `ragged_dot`, which on CPU multiplies every row with every kernel.
    """
    rows, outer, inner = *x_RxI.shape, kernel_XxIxO.shape[-1]
    is_in_Rx1 = (jnp.arange(rows) < sizes_X.sum())[:, None]
    # Zero these rows in the input too: the kernel's gradient leaves memory of theirs uninitialised, perhaps NaN.
    x_RxI = jnp.where(is_in_Rx1, x_RxI, 0)
    if interpret or (sharding.platform() == "tpu" and rows % TILES[-1] == 0):
        from jax.experimental.pallas.ops.tpu import megablox

        tile = next(size for size in TILES if rows % size == 0)
        tiling = (tile, min(outer, MAX_WIDTH), min(inner, MAX_WIDTH))
        y_RxO = megablox.gmm(x_RxI, kernel_XxIxO, sizes_X, x_RxI.dtype, tiling, interpret=interpret)
    else:
        y_RxO = jax.lax.ragged_dot(x_RxI, kernel_XxIxO, sizes_X)
    return jnp.where(is_in_Rx1, y_RxO, 0)


def load_balance(logits_BxLxX: jax.Array, chosen_BxLxC: jax.Array, segments_BxL: jax.Array) -> jax.Array:
    """Load-balancing loss and router z-loss of each row, over its real positions: float32 [2, B].

    The load-balancing loss is X * sum_x (fraction of choices that are x) * (mean probability of x), 1 if all experts
    are used equally (Switch, equation 4); the z-loss is the mean of logsumexp(logits)^2 (ST-MoE, Zoph et al. 2022,
    equation 5). They are per row, not per batch, so that a batch is the sum of its micro-batches.
    """
    experts, choices = logits_BxLxX.shape[-1], chosen_BxLxC.shape[-1]
    is_real_BxLx1 = (segments_BxL > 0)[..., None].astype(jnp.float32)
    count_Bx1 = jnp.maximum(is_real_BxLx1.sum(axis=1), 1)
    is_chosen_BxLxX = (chosen_BxLxC[..., None] == jnp.arange(experts)[None, None, None]).any(axis=2)
    share_BxX = (is_real_BxLx1 * is_chosen_BxLxX).sum(axis=1) / (choices * count_Bx1)
    mean_BxX = (is_real_BxLx1 * jax.nn.softmax(logits_BxLxX)).sum(axis=1) / count_Bx1
    squared_BxL = jnp.square(jax.nn.logsumexp(logits_BxLxX, axis=-1))
    z_B = (is_real_BxLx1[..., 0] * squared_BxL).sum(axis=1) / count_Bx1[:, 0]
    return jnp.stack([experts * (share_BxX * mean_BxX).sum(axis=1), z_B])
