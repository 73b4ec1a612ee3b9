"""The search space of a run on a TPU slice, and a quick estimate of the memory and time of each candidate.

A candidate sets the mesh, remat policy, micro-batches, loss chunk and compiler flags; the batch stays the same. The
estimate (a lower bound of the memory, and a guess at memory and time) comes from the sizes of the model; nothing is
compiled.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax

from lm import checks, config, optim, param_paths, program
from lm import run as run_lib
from lm.config import Config
from lm.config.schema import ConfigError
from lm.models.remat import REMAT_POLICIES
from lm.optim import trainable
from lm.parallel import mesh as mesh_lib
from lm.parallel import sharding
from lm.parallel.mesh import AXES
from lm.parallel.xla_flags import NEVER_MIB, SCOPED_VMEM_MIB, WINDOWED_FROM_MIB, libtpu, spelled
from lm.planner import train_compile
from lm.planner.topology import Topology

# Remat policies from the one that saves most activations to the one that saves least; last the one that offloads them.
OFFLOAD = "offload"
POLICIES = (*(name for name in REMAT_POLICIES if name != OFFLOAD), OFFLOAD)
# Activations of a layer that a policy saves, by the matmul they come from ('none' saves more); 'core' = attention
# kernel.
_QKV = ("query", "key", "value")
_OUTSIDE_MLP = ("core", *_QKV, "out")
_SAVED = {
    "none": (*_OUTSIDE_MLP, "gate", "up"),
    "minimal": (*_OUTSIDE_MLP, "gate", "up"),
    "attention": _OUTSIDE_MLP,
    "qkv": _QKV,
    "full": (),
    OFFLOAD: (*_OUTSIDE_MLP, "gate", "up"),  # as 'minimal', but in host memory
}
MATMUL_EFFICIENCY = 0.85  # share of the peak FLOP/s, in this module only
_SHORT = {"windowed": "windowed_einsum_mib", "vmem_kib": "scoped_vmem_limit_kib"}  # short names of compiler flags


class Candidate(NamedTuple):
    """A setting of a run.

    Attributes:
      mesh: sizes of `mesh.AXES`.
      remat: one of `POLICIES`.
      micro_batches: of a step.
      chunk_len: of the loss; 0 = all positions at once.
      flags: of the TPU compiler.
    """

    mesh: tuple[int, ...]
    remat: str
    micro_batches: int
    chunk_len: int
    flags: str

    def overrides(self) -> dict[str, Any]:
        """Config key -> value."""
        mesh = {f"mesh.{axis}": size for axis, size in zip(AXES, self.mesh, strict=True)}
        rest = {"model.remat": self.remat, "train.micro_batches": self.micro_batches, "loss.chunk_len": self.chunk_len}
        return mesh | rest

    def __str__(self) -> str:
        """Short: 'fsdp=16 minimal micro=1 chunk=0 windowed=24 vmem_kib=28672'."""
        axes = [f"{axis}={size}" for axis, size in zip(AXES, self.mesh, strict=True) if size > 1]
        known = {short: re.search(rf"{name}=(\d+)", self.flags) for short, name in _SHORT.items()}
        flags = [f"{short}={found[1]}" for short, found in known.items() if found] or [f"flags={self.flags or 'none'}"]
        return " ".join([*axes, self.remat, f"micro={self.micro_batches}", f"chunk={self.chunk_len}", *flags])


class Guess(NamedTuple):
    """What arithmetic says of a candidate.

    Attributes:
      at_least: lower bound of the bytes that it needs on a chip.
      peak: guess at the peak bytes of a chip.
      ms: guess at the time of a step.
    """

    at_least: float
    peak: float
    ms: float


KEYS = (*(f"mesh.{axis}" for axis in AXES), "model.remat", "train.micro_batches", "loss.chunk_len")


def flag_sets(chip: str, model: "ModelSizes") -> list[str]:
    """Compiler flags to try on a chip such as 'v5e', the usual ones for this model first.

    They vary the vector memory of an operation, and the weight size from which on matmuls are decomposed into pieces
    (windowed einsum). The latter is not varied for models without weights of that size.
    """
    usual = WINDOWED_FROM_MIB.get(chip, NEVER_MIB)
    largest_mib = max((each.size_in * each.size_out for each in model.kernels), default=0) * model.item / 2**20
    thresholds = [size for size in (*WINDOWED_FROM_MIB.values(), NEVER_MIB) if largest_mib >= min(size, usual)]
    vmem = sorted({16, 28, *SCOPED_VMEM_MIB.get(chip, SCOPED_VMEM_MIB["v5e"])})
    sets = itertools.product(dict.fromkeys([usual, *thresholds]), vmem)
    return list(dict.fromkeys([libtpu(chip, model.width), *itertools.starmap(spelled, sets)]))


def search_space(
    cfg: Config, topology: Topology, flags: Sequence[str], pinned: Collection[str] = ()
) -> list[Candidate]:
    """All candidates of a run on these slices, with its batch unchanged.

    Args:
      cfg: from `lm.config.build`.
      topology: the slices.
      flags: sets of compiler flags to try.
      pinned: keys of `KEYS` that keep the config's value.

    Raises:
      ConfigError: there is no candidate, or the config is for another number of slices.
    """
    if cfg.mesh.dcn_data != topology.slices:
        raise ConfigError(f"mesh.dcn_data={cfg.mesh.dcn_data}: expected {topology.slices}, the number of slices")
    planned = run_lib.plan(cfg, None)
    chips = math.prod(topology.shape)
    divisors = [n for n in range(1, chips + 1) if chips % n == 0]
    per_axis = [
        [getattr(cfg.mesh, axis)] if f"mesh.{axis}" in pinned and getattr(cfg.mesh, axis) != -1 else divisors
        for axis in AXES
    ]
    meshes = [sizes for sizes in itertools.product(*per_axis) if math.prod(sizes) == chips]
    chunks = [cfg.loss.chunk_len] if "loss.chunk_len" in pinned else sorted({0, cfg.data.seq_len // 4, 128})
    micros = [n for n in (1, 2, 4, 8) if cfg.data.batch_size % n == 0]
    micros = [cfg.train.micro_batches] if "train.micro_batches" in pinned else micros
    policies = (cfg.model.remat,) if "model.remat" in pinned else POLICIES
    found = []
    for mesh, micro in itertools.product(meshes, micros):
        first = Candidate(mesh, policies[0], micro, chunks[0], flags[0])
        try:
            changed = apply(planned.cfg, first, topology.slices)
            config.check(changed)
            checks.fit(changed)
            sizes = (mesh[0] * topology.slices, *mesh[1:])
            abstract: Any = jax.sharding.AbstractMesh(sizes, AXES)
            program.check_mesh(changed, abstract, planned.abstract_params, planned.logical_axes)
        except ConfigError:
            continue
        rest = itertools.product(policies, chunks, flags)
        found += [Candidate(mesh, remat, micro, chunk, flag) for remat, chunk, flag in rest]
    if not found:
        raise ConfigError(
            f"found no mesh of {chips} chips that divides the model and its batch of {cfg.data.batch_size} rows"
        )
    return found


def index_of_config(cfg: Config, candidates: Sequence[Candidate]) -> int | None:
    """Index of the candidate that is the config's own setting with the first set of flags; None if there is none."""
    chips_of_all = math.prod(candidates[0].mesh) * cfg.mesh.dcn_data
    try:
        mesh = tuple(mesh_lib.mesh_sizes(cfg.mesh, chips_of_all)[1:])
    except ConfigError:
        return None
    own = Candidate(mesh, cfg.model.remat, cfg.train.micro_batches, cfg.loss.chunk_len, candidates[0].flags)
    return candidates.index(own) if own in candidates else None


def apply(cfg: Config, candidate: Candidate, slices: int) -> Config:
    """The config with a candidate's settings."""
    mesh = dict(zip(AXES, candidate.mesh, strict=True), dcn_data=slices)
    remat: Any = candidate.remat
    return dataclasses.replace(
        cfg,
        mesh=dataclasses.replace(cfg.mesh, **mesh),
        model=dataclasses.replace(cfg.model, remat=remat),
        train=dataclasses.replace(cfg.train, micro_batches=candidate.micro_batches),
        loss=dataclasses.replace(cfg.loss, chunk_len=candidate.chunk_len),
    )


# Arithmetic -----------------------------------------------------------------------------------------------------------


class Kernel(NamedTuple):
    """A kernel that all layers have.

    Attributes:
      name: such as 'query' or 'up'.
      layers: number of layers.
      size_in, size_out: of one layer's kernel.
      axis_in, axis_out: logical axes.
      choices: experts that a position goes through; 0 = not an expert's kernel.
    """

    name: str
    layers: int
    size_in: int
    size_out: int
    axis_in: str | None
    axis_out: str | None
    choices: int


class ModelSizes(NamedTuple):
    """The sizes of a model that the arithmetic uses.

    Attributes:
      kernels: of the layers.
      parameters: (size, logical axes) of every parameter.
      chosen: share of the experts that a position goes through.
      state_bytes: bytes of the training state per parameter, on average.
      item: bytes of an entry of an activation.
      vocab: columns of the output projection.
      width: of the layers.
    """

    kernels: list[Kernel]
    parameters: list[tuple[int, sharding.LogicalAxes]]
    chosen: float
    state_bytes: float
    item: int
    vocab: int
    width: int


def model_sizes(cfg: Config) -> ModelSizes:
    """Sizes of a config's model and its training state."""
    planned = run_lib.plan(cfg, None)
    cfg, flat, axes = planned.cfg, param_paths.flatten(planned.abstract_params), planned.logical_axes
    trained = trainable.trained_part(planned.selection, planned.abstract_params)
    constant = dataclasses.replace(cfg.optim, schedule="constant")  # which has no phases that must fit in the run
    optimizer = optim.build(constant, planned.abstract_params, total_steps=1, warmup_steps=0, decay_steps=0)
    moments = jax.eval_shape(optimizer.init, trained)

    def total(tree: Any) -> float:
        return float(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)))

    copies = total(planned.abstract_params) + total(moments) + total(trained) * (cfg.optim.ema_decay > 0)
    kernels = []
    for path, leaf in flat.items():
        *_, name, last = path.split("/")
        is_expert = "experts" in axes[path]  # [layers, experts, in, out], 'up_kernel'
        if is_expert or ("/layers/" in path and last == "kernel" and len(leaf.shape) == 3):
            name = last.removesuffix("_kernel") if is_expert else name
            N, *_, before, after = leaf.shape
            axis_in, axis_out = axes[path][-2:]
            kernels.append(
                Kernel(name, N, before, after, axis_in, axis_out, cfg.model.experts_per_token if is_expert else 0)
            )
    parameters = [(leaf.size, axes[path]) for path, leaf in flat.items()]
    item = 4 if cfg.model.dtype == "float32" else 2
    per_parameter = copies / sum(size for size, _ in parameters)
    chosen = cfg.model.experts_per_token / max(cfg.model.num_experts, 1)
    return ModelSizes(kernels, parameters, chosen, per_parameter, item, cfg.model.vocab_size, cfg.model.embed_dim)


def guess(cfg: Config, model: ModelSizes, topology: Topology, candidate: Candidate) -> Guess:
    """Estimates memory and time of a candidate by arithmetic.

    The lower bound of the memory is the training state and the activations saved for the backward pass. Gathered
    weights, logits and gradients come on top; how many of them are alive at once only the compiler knows. Offloaded
    activations take no memory of the chip, but are copied while the forward and the backward pass are computed. If the
    host has too little memory for them, `at_least` is infinite.
    """
    over = dict(zip(AXES, candidate.mesh, strict=True))

    def shards(logical: str | None) -> int:
        return math.prod(over[axis] for axis in sharding.mesh_axes(logical))

    def shard_size(size: int, axes: sharding.LogicalAxes, whole: tuple[str, ...] = ()) -> float:
        return size / math.prod(shards(axis) for axis in axes if axis not in whole)

    chip, micro, saved = topology.chip, candidate.micro_batches, _SAVED[candidate.remat]
    rows = cfg.data.batch_size / topology.slices / (over["data"] * over["fsdp"] * over["expert"])
    tokens = rows * cfg.data.seq_len / over["context"]  # per chip and step
    sharded = sum(shard_size(*each) for each in model.parameters)
    gathered = sum(shard_size(*each, whole=("embed", "expert_embed")) for each in model.parameters)
    state = sharded * model.state_bytes
    activations = recomputed = attention = layers = inputs = 0.0
    experts = sum(shard_size(*each, whole=("expert_embed",)) for each in model.parameters if "experts" in each[1])
    used = gathered - experts * (
        1 - model.chosen * over["expert"]
    )  # fewer experts on a device, more positions for each
    products = 3 * 2 * used * tokens  # forward, and twice that backward; without the embedding look-up
    for name, N, before, after, axis_in, axis_out, choices in model.kernels:
        width_in, width_out = before / _activation_shards(shards, axis_in), after / _activation_shards(shards, axis_out)
        room = choices * over["expert"] or 1  # space for all positions of the devices that share the experts
        activations += N * width_out * room * (name in saved)
        inputs += N * width_in * room * (name in ("query", "gate", "up", "down"))
        recomputed += N * 2 * width_in * width_out * (choices or 1) * tokens * (name not in (*saved, "down"))
        if name == "out":
            layers += N
            activations += N * (width_in * ("core" in saved) + model.width)  # and the layer's input
            attention += N * 2 * 2 * width_in * tokens * cfg.data.seq_len / 2  # causal
    attention *= (
        3.5 if "core" in saved else 4.5
    )  # forward, 2.5 times that backward, and forward again if it is not saved
    activation_bytes = tokens / micro * model.item * activations
    on_host = (
        activation_bytes - tokens / micro * model.item * layers * model.width if candidate.remat == OFFLOAD else 0.0
    )
    activation_bytes -= on_host
    at_least = state + activation_bytes + (4 * sharded if micro > 1 else 0)
    chunk = min(1.0, (candidate.chunk_len or cfg.data.seq_len) / (cfg.data.seq_len / over["context"]))
    logits = tokens / micro * chunk * model.vocab / over["tensor"] * (4 + model.item)
    # Without remat the results between the matmuls are saved too, many in float32: about 4 times the matmuls' inputs.
    inputs *= 4 * tokens / micro * model.item * (candidate.remat == "none")
    peak = at_least + inputs + logits + 2 * model.item * gathered / max(layers, 1) + 4 * sharded
    # Time. A collective over all chips of a slice uses all links of a chip, one along a part of the mesh a single one.
    copies = over["fsdp"] * over["expert"] * over["context"]

    def wire_seconds(payload: float, n: int, passes: float) -> float:
        links = topology.links if n == math.prod(topology.shape) else 1
        return passes * payload * (n - 1) / n / (links * chip.link_bandwidth)

    gathers = wire_seconds(model.item * gathered * micro, copies, 2)
    waits = wire_seconds(model.item * gathered * micro, copies, 1)
    waits += wire_seconds(4 * sharded * micro, over["data"], 2)
    waits += wire_seconds(layers * tokens * model.width * model.item, over["tensor"], 2 * (4 if "out" in saved else 5))
    kv = sum(
        each.layers * each.size_out / _activation_shards(shards, each.axis_out)
        for each in model.kernels
        if each.name in _QKV[1:]
    )
    waits += wire_seconds(tokens * over["context"] * kv * model.item, over["context"], 3)
    seconds = (products + recomputed) / MATMUL_EFFICIENCY + attention / train_compile.KERNEL_EFFICIENCY
    seconds /= chip.peak_flops
    if on_host:
        one_way = micro * on_host / chip.host_bandwidth  # overlaps with the forward, and back with the backward pass
        waits += max(0.0, one_way - seconds / 3) + max(0.0, one_way - seconds * 2 / 3)
        at_least = math.inf if on_host > chip.host_bytes else at_least
    moved = 2 * state + micro * (3 * model.item * gathered + 8 * sharded) + 6 * tokens * model.item * activations
    return Guess(at_least, peak, 1e3 * (max(seconds, gathers) + moved / chip.hbm_bandwidth + waits))


def _activation_shards(shards: Callable[[str | None], int], axis: str | None) -> int:
    """In how many parts an activation is sharded along a logical axis of its kernel."""
    return 1 if axis in ("embed", "expert_embed", None) else shards(axis)


def needs_no_less_memory(a: Candidate, b: Candidate) -> bool:
    """Whether `a` certainly needs no less memory than `b`: the same setting, but more saved at once."""

    def chunk(candidate: Candidate) -> float:
        return candidate.chunk_len or math.inf

    def rank(candidate: Candidate) -> int:
        return POLICIES.index(candidate.remat)

    return (
        (a.mesh, a.flags) == (b.mesh, b.flags)
        and (a.remat == b.remat or (OFFLOAD not in (a.remat, b.remat) and rank(a) <= rank(b)))
        and a.micro_batches == b.micro_batches
        and chunk(a) >= chunk(b)
    )
