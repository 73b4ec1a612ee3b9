"""What a run can be set to on a TPU slice without changing its batch, and what arithmetic says of each setting.

Mesh, remat policy, micro-batches, chunks of the loss, and flags of the compiler. Of every setting: what memory it takes
at least, and roughly what memory and time, from the sizes of the model alone; nothing is compiled.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax

from lm import build, checks, param_paths
from lm.config import Config
from lm.config.schema import ConfigError
from lm.models.remat import REMAT_POLICIES
from lm.optim import trainable
from lm.parallel import mesh as mesh_lib
from lm.parallel import sharding
from lm.parallel.mesh import AXES
from lm.parallel.xla_flags import NEVER_MIB, SCOPED_VMEM_MIB, WINDOWED_FROM_MIB, libtpu, spelled
from lm.planner import topology, train_compile

# From the one that keeps most on the chip to the one that keeps least; last, what keeps in the host's memory.
OFFLOAD = "offload"
POLICIES = (*(name for name in REMAT_POLICIES if name != OFFLOAD), OFFLOAD)
# Results of a layer's matmuls that a policy keeps at least; 'none' keeps more. 'core' is the attention kernel's.
_QKV = ("query", "key", "value")
_OUTSIDE_MLP = ("core", *_QKV, "out")
_KEPT = {
    "none": (*_OUTSIDE_MLP, "gate", "up"),
    "minimal": (*_OUTSIDE_MLP, "gate", "up"),
    "attention": _OUTSIDE_MLP,
    "qkv": _QKV,
    "full": (),
    OFFLOAD: (*_OUTSIDE_MLP, "gate", "up"),  # as 'minimal', but in the host's memory
}
MATMUL_EFFICIENCY = 0.85  # share of the peak, in the arithmetic only
_SHORT = {"windowed": "windowed_einsum_mib", "vmem_kib": "scoped_vmem_limit_kib"}  # how flags are shown


class Candidate(NamedTuple):
    """A setting.

    Attributes:
      mesh: sizes of `sharding.AXES`.
      remat: of `POLICIES`.
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
    """Of arithmetic: bytes of a chip that are taken `at_least`, all of them (`peak`), and `ms` of a step."""

    at_least: float
    peak: float
    ms: float


KEYS = (*(f"mesh.{axis}" for axis in AXES), "model.remat", "train.micro_batches", "loss.chunk_len")


def flag_sets(chip: str, model: "Sizes") -> list[str]:
    """The usual flags for a model on a chip, 'v5e' or the like, and others: see `lm.parallel.xla_flags.spelled`.

    From which size on kernels are multiplied in pieces makes no difference where no layer has one that large.
    """
    usual = WINDOWED_FROM_MIB.get(chip, NEVER_MIB)
    largest_mib = max((each.size_in * each.size_out for each in model.kernels), default=0) * model.item / 2**20
    others = [size for size in (*WINDOWED_FROM_MIB.values(), NEVER_MIB) if largest_mib >= min(size, usual)]
    vmem = sorted({16, 28, *SCOPED_VMEM_MIB.get(chip, SCOPED_VMEM_MIB["v5e"])})
    sets = itertools.product(dict.fromkeys([usual, *others]), vmem)
    return list(dict.fromkeys([libtpu(chip, model.width), *itertools.starmap(spelled, sets)]))


def space(cfg: Config, where: topology.Topology, flags: Sequence[str], pinned: Collection[str] = ()) -> list[Candidate]:
    """All settings that this run can have on these slices, its batch unchanged.

    Args:
      cfg: from `lm.config.build`.
      where: the slices.
      flags: sets of flags to try.
      pinned: config keys, of `KEYS`, whose values stay as they are.

    Raises:
      ConfigError: there is none; the config is not of these slices.
    """
    if cfg.mesh.dcn_data != where.slices:
        raise ConfigError(f"mesh.dcn_data={cfg.mesh.dcn_data}: expected {where.slices}, the number of slices")
    planned = build.plan(cfg, None)
    chips = math.prod(where.shape)
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
        one = Candidate(mesh, policies[0], micro, chunks[0], flags[0])
        try:
            changed = apply(planned.cfg, one, where.slices)
            checks.fit(changed)
            sizes = (mesh[0] * where.slices, *mesh[1:])
            abstract: Any = jax.sharding.AbstractMesh(sizes, AXES)
            checks.mesh_divides(changed, abstract, planned.abstract_params, planned.logical_axes)
        except ConfigError:
            continue
        rest = itertools.product(policies, chunks, flags)
        found += [Candidate(mesh, remat, micro, chunk, flag) for remat, chunk, flag in rest]
    if not found:
        raise ConfigError(f"no mesh of {chips} chips divides this model and its batch of {cfg.data.batch_size} rows")
    return found


def own(cfg: Config, candidates: Sequence[Candidate]) -> int | None:
    """Index of the candidate that is the config's own setting, with the flags that were tried first; None = of none."""
    chips_of_all = math.prod(candidates[0].mesh) * cfg.mesh.dcn_data
    try:
        mesh = tuple(mesh_lib.mesh_sizes(cfg.mesh, chips_of_all)[1:])
    except ConfigError:
        return None
    one = Candidate(mesh, cfg.model.remat, cfg.train.micro_batches, cfg.loss.chunk_len, candidates[0].flags)
    return candidates.index(one) if one in candidates else None


def apply(cfg: Config, candidate: Candidate, slices: int) -> Config:
    """The config with a setting."""
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
    """Of all layers: how many they are, what one multiplies, by logical axes; `choices`: experts a position goes
    through, 0 = it is no expert's."""

    name: str
    layers: int
    size_in: int
    size_out: int
    axis_in: str | None
    axis_out: str | None
    choices: int


class Sizes(NamedTuple):
    """What the arithmetic knows of a model.

    Attributes:
      kernels: of the layers.
      parameters: (size, logical axes) of all.
      chosen: share of the experts that a position goes through.
      state_bytes: of the state, on average of a parameter.
      item: bytes of an activation.
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


def sizes(cfg: Config) -> Sizes:
    """Of a config's model and optimizer."""
    planned = build.plan(cfg, None)
    cfg, flat, axes = planned.cfg, param_paths.flatten(planned.abstract_params), planned.logical_axes
    trained = trainable.trained_part(planned.optimizer.selection, planned.abstract_params)
    moments = jax.eval_shape(planned.optimizer.init, trained)

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
            kernels.append(Kernel(name, N, before, after, axis_in, axis_out, cfg.model.experts[1] if is_expert else 0))
    parameters = [(leaf.size, axes[path]) for path, leaf in flat.items()]
    item = 4 if cfg.model.dtype == "float32" else 2
    per_parameter = copies / sum(size for size, _ in parameters)
    chosen = cfg.model.experts[1] / max(cfg.model.experts[0], 1)
    return Sizes(kernels, parameters, chosen, per_parameter, item, cfg.model.vocab_size, cfg.model.embed_dim)


def guess(cfg: Config, model: Sizes, where: topology.Topology, one: Candidate) -> Guess:
    """Arithmetic of one setting.

    At least taken: the state, and what is kept of the layers for the backward pass. On top come gathered weights,
    logits and gradients, of which how many are alive at once only the compiler knows. What is kept in the host's memory
    takes none of the chip's, but has to be copied while the forward and while the backward pass are computed; where the
    host has too little memory, nothing is enough (`at_least` is infinite).
    """
    over = dict(zip(AXES, one.mesh, strict=True))

    def parts(logical: str | None) -> int:
        return math.prod(over[axis] for axis in sharding.mesh_axes(logical))

    def shard(size: int, axes: sharding.LogicalAxes, whole: tuple[str, ...] = ()) -> float:
        return size / math.prod(parts(axis) for axis in axes if axis not in whole)

    chip, micro, kept = where.chip, one.micro_batches, _KEPT[one.remat]
    rows = cfg.data.batch_size / where.slices / (over["data"] * over["fsdp"] * over["expert"])
    tokens = rows * cfg.data.seq_len / over["context"]  # of a chip and a step
    mine = sum(shard(*each) for each in model.parameters)
    gathered = sum(shard(*each, whole=("embed", "expert_embed")) for each in model.parameters)
    state = mine * model.state_bytes
    activations = again = attention = layers = inputs = 0.0
    experts = sum(shard(*each, whole=("expert_embed",)) for each in model.parameters if "experts" in each[1])
    used = gathered - experts * (1 - model.chosen * over["expert"])  # as many positions more as there are experts less
    products = 3 * 2 * used * tokens  # forward and, twice that, backward; the look-up of the embedding aside
    for name, N, before, after, axis_in, axis_out, choices in model.kernels:
        width_in, width_out = before / _tensor(parts, axis_in), after / _tensor(parts, axis_out)
        room = choices * over["expert"] or 1  # for all positions of the devices that share the experts
        activations += N * width_out * room * (name in kept)
        inputs += N * width_in * room * (name in ("query", "gate", "up", "down"))
        again += N * 2 * width_in * width_out * (choices or 1) * tokens * (name not in (*kept, "down"))
        if name == "out":
            layers += N
            activations += N * (width_in * ("core" in kept) + model.width)  # and the layer's input
            attention += N * 2 * 2 * width_in * tokens * cfg.data.seq_len / 2  # causal
    attention *= 3.5 if "core" in kept else 4.5  # forward, 2.5 times that backward, forward again
    held = tokens / micro * model.item * activations
    on_host = held - tokens / micro * model.item * layers * model.width if one.remat == OFFLOAD else 0.0
    held -= on_host
    at_least = state + held + (4 * mine if micro > 1 else 0)
    chunk = min(1.0, (one.chunk_len or cfg.data.seq_len) / (cfg.data.seq_len / over["context"]))
    logits = tokens / micro * chunk * model.vocab / over["tensor"] * (4 + model.item)
    # Without remat what is between the matmuls is kept too, much of it in float32: about this often their inputs' size.
    inputs *= 4 * tokens / micro * model.item * (one.remat == "none")
    peak = at_least + inputs + logits + 2 * model.item * gathered / max(layers, 1) + 4 * mine
    # Time. A sum over all chips of a slice has all their links, one along a part of the mesh those of one axis.
    copies = over["fsdp"] * over["expert"] * over["context"]

    def wire(payload: float, n: int, passes: float) -> float:
        links = where.links if n == math.prod(where.shape) else 1
        return passes * payload * (n - 1) / n / (links * chip.link_bandwidth)

    gathers = wire(model.item * gathered * micro, copies, 2)
    waits = wire(model.item * gathered * micro, copies, 1)
    waits += wire(4 * mine * micro, over["data"], 2)
    waits += wire(layers * tokens * model.width * model.item, over["tensor"], 2 * (4 if "out" in kept else 5))
    kv = sum(
        each.layers * each.size_out / _tensor(parts, each.axis_out) for each in model.kernels if each.name in _QKV[1:]
    )
    waits += wire(tokens * over["context"] * kv * model.item, over["context"], 3)
    seconds = (products + again) / MATMUL_EFFICIENCY + attention / train_compile.KERNEL_EFFICIENCY
    seconds /= chip.peak_flops
    if on_host:
        one_way = micro * on_host / chip.host_bandwidth  # beside the forward, and beside the backward pass
        waits += max(0.0, one_way - seconds / 3) + max(0.0, one_way - seconds * 2 / 3)
        at_least = math.inf if on_host > chip.host_bytes else at_least
    moved = 2 * state + micro * (3 * model.item * gathered + 8 * mine) + 6 * tokens * model.item * activations
    return Guess(at_least, peak, 1e3 * (max(seconds, gathers) + moved / chip.hbm_bandwidth + waits))


def _tensor(parts: Callable[[str | None], int], axis: str | None) -> int:
    """In how many parts an activation is split along the axis that its kernel names so."""
    return 1 if axis in ("embed", "expert_embed", None) else parts(axis)


def keeps_more(one: Candidate, other: Candidate) -> bool:
    """Whether `one` needs no less memory than `other` does: all the same, but more kept on the chip, or at once."""

    def chunk(each: Candidate) -> float:
        return each.chunk_len or math.inf

    def place(each: Candidate) -> int:
        return POLICIES.index(each.remat)

    return (
        (one.mesh, one.flags) == (other.mesh, other.flags)
        and (one.remat == other.remat or (OFFLOAD not in (one.remat, other.remat) and place(one) <= place(other)))
        and one.micro_batches == other.micro_batches
        and chunk(one) >= chunk(other)
    )
