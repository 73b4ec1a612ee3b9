"""What a step costs on a TPU slice, from the TPU compiler without a TPU: memory, FLOPs, communication, a guess at time.

The compiler is libtpu's, as on the pod (Python package 'jax[tpu]'). `prepare` comes before anything imports JAX.
"""

import hashlib
import importlib.metadata
import importlib.util
import itertools
import math
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lm.config import Config
from lm.config.schema import ConfigError
from lm.evaluation import flops
from lm.parallel import mesh as mesh_lib
from lm.parallel.mesh import AXES
from lm.planner import collectives, hlo
from lm.planner.topology import GIB, Topology

# Share of the peak that custom kernels are taken to reach; the compiler gives no cycles for them.
KERNEL_EFFICIENCY = 0.75
# How far model FLOPs may be above the compiled ones, for what the two round differently.
RATIO_TOLERANCE = 0.02


def prepare(flags: str) -> None:
    """Sets what libtpu reads once, when it is loaded. `flags`: as in LIBTPU_INIT_ARGS.

    Raises:
      ConfigError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("the TPU compiler is not installed: pip install -e '.[tpu]'")
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",  # of this host, which has none: libtpu only complains without
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "LIBTPU_INIT_ARGS": flags,
    }


def devices(where: Topology) -> list[Any]:
    """Descriptions of the devices of the slices.

    Raises:
      ConfigError: the compiler knows no such slice.
    """
    from jax.experimental import topologies

    options: dict[str, Any] = {"num_slices": where.slices} if where.slices > 1 else {}
    if where.links > len(where.shape):
        options["wrap"] = [*(n == where.chip.ring for n in where.shape), *[False] * (3 - len(where.shape))]
    if len(where.shape) == 2 and where.shape[0] * where.shape[1] > 16:
        options["chips_per_host_bounds"] = [2, 2, 1]
    try:
        return list(topologies.get_topology_desc(topology_name=where.name, platform="tpu", **options).devices)
    except Exception as error:
        raise ConfigError(f"--topology={where.name}: the compiler knows no such slice: {error}") from None


class Ids:
    """Stands for a tokenizer that is not trained yet: its size is all that a step's cost depends on."""

    eos_id = 2

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.is_control_V = np.arange(vocab_size) < 4

    def token_bytes(self) -> np.ndarray:
        """float32 [V]."""
        return np.ones(self.vocab_size, np.float32)


class Lowered(NamedTuple):
    """A step before it is compiled, and what is known of it by then.

    Attributes:
      stage: of JAX.
      mesh: 'dcn_data' and all axes of the mesh -> size.
      state: bytes on a chip of 'parameters', 'optimizer' and, where there are any, other parts of the state.
      parameters, trained: how many the model has, and how many of them learn.
      largest_replicated: bytes and path of the largest parameter that every chip holds whole.
      model_flops: of one step on one chip, attention counted in full; None where they are not counted.
      model_flops_causal: the same, of attention only what a causal mask lets through.
      needed_flops: what the program must multiply at least, see `check_ratio`; None as above.
      tokens: positions of one step, over all chips.
      chips: over all slices.
      saved: bytes that a save of the state takes, over all hosts; each array once.
      beside: bytes on a chip of what the step leaves alone and stays there meanwhile: in an evaluation the optimizer's.
      experts: of the model; 0 = it has none.
      links: axes of the mesh, as `lm.planner.collectives` names them -> a chip's links that carry what goes along them.
    """

    stage: Any
    mesh: dict[str, int]
    state: dict[str, float]
    parameters: int
    trained: int
    largest_replicated: tuple[int, str]
    model_flops: float | None
    model_flops_causal: float | None
    needed_flops: float | None
    tokens: int
    chips: int
    saved: float
    beside: float
    experts: int
    links: dict[str, float]


class Compiled(NamedTuple):
    """A compiled step.

    Attributes:
      text: HLO after all passes.
      memory: bytes on a chip: 'arguments', 'temporaries', 'peak'; and 'host', bytes of the host's memory for this chip.
      seconds: of compilation.
    """

    text: str
    memory: dict[str, float]
    seconds: float


class DoesNotFit(Exception):
    """The compiler found no way to hold the step in memory; the message says what takes most of it.

    `needed`: bytes of a chip, as far as the compiler says; else 0.
    """

    needed = 0.0


def lower_step(cfg: Config, where: Topology, *, evaluation: bool = False) -> Lowered:
    """Traces the step that a run of this config would take.

    Args:
      cfg: from `lm.config.build`.
      where: the slices.
      evaluation: the step of an evaluation instead.

    Raises:
      ConfigError: the config does not fit itself, or the slices.
    """
    import jax

    from lm import param_paths, program
    from lm import run as run_lib
    from lm.optim import trainable
    from lm.tasks import task_of

    planned = run_lib.plan(cfg, None)
    cfg = planned.cfg
    words = planned.tokenizer or Ids(cfg.tokenizer.vocab_size + cfg.tokenizer.extra_ids)
    mesh = mesh_lib.make_mesh(cfg.mesh, devices(where))
    program.check_mesh(cfg, mesh, planned.abstract_params, planned.logical_axes)
    made = program.make(
        cfg,
        mesh,
        words if task_of(cfg).texts else None,
        abstract_params=planned.abstract_params,
        logical_axes=planned.logical_axes,
        anchored=planned.anchored,
        epoch_examples=1_000 * cfg.data.batch_size,  # the schedule's length costs nothing
    )
    rows = program.eval_batch_size(cfg) if evaluation else cfg.data.batch_size
    batch = program.abstract_batch(cfg, mesh, rows)
    state = made.abstract_state
    step, argument = (made.eval_step, state.params) if evaluation else (made.train_step, state)
    with jax.set_mesh(mesh):
        lowered = step.lower(argument, batch)
    flat = param_paths.flatten(state.params)
    trained = trainable.trained_part(made.optimizer.selection, state.params)
    replicated = [
        (leaf.size * leaf.dtype.itemsize, path) for path, leaf in flat.items() if leaf.sharding.is_fully_replicated
    ]
    tokens = rows * cfg.data.seq_len
    is_counted = task_of(cfg).texts and run_lib.predicts_tokens(cfg)
    predicting = (
        words.vocab_size if cfg.task.name in ("causal_lm", "prefix_lm", "chat") else 0
    )  # others need not predict at every position
    full, causal, needed = (
        flops.train_flops_per_token(cfg.model, cfg.data.seq_len, vocab, causal_half=half) if is_counted else None
        for vocab, half in ((words.vocab_size, False), (words.vocab_size, True), (predicting, True))
    )

    def a_chip(per_token: float | None, share: float = 1.0) -> float | None:
        return share * per_token * tokens / mesh.size if per_token else None

    forward = 1 / 3  # of a training step's
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (state.params, trained)]
    is_all_trained = sizes[0] == sizes[1]
    return Lowered(
        stage=lowered,
        mesh=dict(zip((collectives.BETWEEN_SLICES, *AXES), mesh_lib.mesh_sizes(cfg.mesh, mesh.size), strict=True)),
        state={
            "parameters": _bytes_a_chip(state.params),
            "optimizer": _bytes_a_chip(state.opt_state),
            **({"average": _bytes_a_chip(state.ema)} if state.ema is not None else {}),
            **({"start": _bytes_a_chip(state.start)} if state.start is not None else {}),
        },
        parameters=sizes[0],
        trained=sizes[1],
        largest_replicated=max(replicated, default=(0, "")),
        model_flops=a_chip(full, forward if evaluation else 1.0),
        model_flops_causal=a_chip(causal, forward if evaluation else 1.0),
        needed_flops=a_chip(needed, 1.0 if is_all_trained and not evaluation else forward),
        tokens=tokens,
        chips=mesh.size,
        saved=float(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))),
        beside=_bytes_a_chip(state) - _bytes_a_chip(argument) if evaluation else 0.0,
        experts=cfg.model.experts[0],
        links=links(mesh, where),
    )


def links(mesh: Any, where: Topology) -> dict[str, float]:
    """Axes of a mesh, as 'fsdp' or 'data+fsdp' -> links of a chip that carry what goes along them, see `links_of`.

    Of one slice; axes of size 1 are left out.
    """
    names = [name for name, size in mesh.shape.items() if size > 1]
    first = mesh.devices[: mesh.devices.shape[0] // where.slices]
    found = {}
    for count in range(1, len(names) + 1):
        for chosen in itertools.combinations(names, count):
            group = first[tuple(slice(None) if name in chosen else 0 for name in mesh.axis_names)]
            found["+".join(chosen)] = where.links_of([tuple(device.coords) for device in group.ravel()])
    return found


class ImpossibleRatio(ValueError):
    """Model FLOPs are above what a program can do with fewer: something in it is not counted, or counted wrong."""


def check_ratio(lowered: Lowered, compiled_flops: float) -> None:
    """Refuses compiled FLOPs below what the step needs at the least, as no program can leave them out.

    That is the model's FLOPs with attention's causal half, without the output projection where not every position
    predicts; of a step that does not train all parameters, and of an evaluation, those of the forward pass. So model
    FLOPs with attention in full may be above the compiled ones by what the mask hides, and by nothing else.

    Raises:
      ImpossibleRatio: naming both.
    """
    needed = lowered.needed_flops
    if needed and needed > (1 + RATIO_TOLERANCE) * compiled_flops:
        raise ImpossibleRatio(
            f"the compiled program's {compiled_flops:.4g} FLOPs of a chip and step are fewer than the {needed:.4g} "
            f"that the model needs even with attention's causal half: the ratio {needed / compiled_flops:.2f} cannot "
            "be above 1. Some products of the program are not counted (lm/planner/hlo.py), so that its time is guessed "
            "too short"
        )


def compile_step(lowered: Lowered) -> Compiled:
    """Compiles it.

    Raises:
      DoesNotFit: it needs more memory than the chip has.
    """
    began = time.monotonic()
    try:
        compiled = lowered.stage.compile()
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        answer = DoesNotFit(_why(str(error), lowered.stage.as_text()))
        answer.needed = _needed(str(error), sum(lowered.state.values()))
        raise answer from None
    seconds = time.monotonic() - began
    return Compiled(compiled.as_text(), memory(compiled.memory_analysis()), seconds)


def memory(analysis: Any) -> dict[str, float]:
    """Of `compiled.memory_analysis()`: see `Compiled.memory`.

    Its peak is of the chip's and the host's memory together. Where the program uses the host's, the chip's is taken to
    be all that is laid out there: arguments, results that are not written over them, temporaries.
    """
    host = analysis.host_argument_size_in_bytes + analysis.host_temp_size_in_bytes
    host += analysis.host_output_size_in_bytes - analysis.host_alias_size_in_bytes
    arguments, temporaries = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    peak = analysis.peak_memory_in_bytes
    if host:
        peak = min(peak, arguments + results + temporaries)
    return {"arguments": arguments, "temporaries": temporaries, "peak": peak, "host": host}


def key(lowered: Lowered, where: Topology, flags: str) -> str:
    """What a result is remembered by: a hash of the step, the slices, the compiler, its flags, and what reads its
    program."""
    parts = [lowered.stage.as_text(), repr(where), flags, importlib.metadata.version("libtpu")]
    parts += [Path(module.__file__ or "").read_text(encoding="utf-8") for module in (hlo, collectives)]
    parts += [Path(__file__).read_text(encoding="utf-8")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _bytes_a_chip(tree: Any) -> float:
    import jax

    leaves = jax.tree.leaves(tree)
    return float(sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in leaves))


_SIZE = r"([\d.]+[KMGT])"


def _needed(message: str, state: float) -> float:
    """Bytes that a step would take, of the compiler's refusal; 0 where it does not say. `state`: bytes of it, which one
    form of the message leaves out."""
    used = re.search(rf"Used {_SIZE} of {_SIZE} hbm", message)
    beside = re.search(rf"HLO temporaries \({_SIZE}\) exceeds", message)
    found = used or beside
    if found is None:
        return 0.0
    size = float(found[1][:-1]) * {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}[found[1][-1]]
    return size if used else size + state


def _why(message: str, program: str) -> str:
    """How much is needed, and the five largest buffers: of the compiler's report, or, where it gives none, the five
    largest types of array in the program before it is split over the chips."""
    needed = re.search(rf"Used {_SIZE} of {_SIZE} hbm", message)
    head = f"it needs {needed[1]} of the chip's {needed[2]}" if needed else message.splitlines()[0].strip()
    reported = re.findall(r"Size: ([\d.]+\w).*?Operator: op_name=\"([^\"]*)\".*?Shape: ([^\s{]+)", message, re.S)
    if reported:
        rows = [f"{size:>8}  {shape}  {name}" for size, name, shape in reported[:5]]
        return "\n  ".join([head, "largest buffers of a chip:", *rows])
    sizes = {}
    for dims, dtype in set(re.findall(r"tensor<((?:\d+x)+)([a-z]+\d+)>", program)):
        name = {"i": "s"}.get(dtype[0], dtype[0]) + dtype[1:]
        if name in hlo.ITEM_BYTES:
            shape = tuple(map(int, dims.strip("x").split("x")))
            sizes[f"{name}{list(shape)}"] = hlo.Array(name, shape).bytes
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:5]
    rows = [f"{size / GIB:>8.1f}G  {array}" for array, size in largest]
    return "\n  ".join([head, "largest arrays of the program, over all chips:", *rows])


# The estimate ---------------------------------------------------------------------------------------------------------


class Estimate(NamedTuple):
    """Milliseconds of one step, guessed.

    Attributes:
      matmul: the compiler's cycles of what holds a matrix product, at least its FLOPs at the peak.
      kernel: custom kernels, attention's and the experts': their FLOPs at `KERNEL_EFFICIENCY` of the peak, or what they
        say they move over the bandwidth, whichever is longer.
      other: what only moves memory: the smaller of the compiler's cycles and all its operands over the bandwidth.
      exposed: communication that computation waits for: all that is synchronous, and what of the rest is longer than
        the computation.
      hidden: communication meanwhile.
      between: waits for other slices: what of a transfer is longer than the computation from its start to its end.
      host: waits for copies to and from the host's memory, the same way.
      host_hidden: such copies meanwhile.
    """

    matmul: float
    kernel: float
    other: float
    exposed: float
    hidden: float
    between: float
    host: float = 0.0
    host_hidden: float = 0.0

    @property
    def total(self) -> float:
        """Of the step."""
        return self.matmul + self.kernel + self.other + self.exposed + self.between + self.host


def estimate(
    program: hlo.Program,
    where: Topology,
    *,
    mesh: Mapping[str, int] | None = None,
    links: Mapping[str, float] | None = None,
    experts: int = 0,
) -> Estimate:
    """Guesses the time of a step; latencies, stragglers and the host's own work are left out.

    Args:
      program: of one slice.
      where: the slices.
      mesh: axis -> size, see `traffic.collectives`.
      links: see `Lowered.links`; None = all of a chip's for what all chips take part in, one for anything else.
      experts: of the model; see `hlo.kernels`.
    """
    chip = where.chip
    matmul = kernel = other = between = host = 0.0
    on_wire = 0.0  # when the network between slices is free again, on the clock of computation
    on_bus = {"to_host": 0.0, "from_host": 0.0}  # when the host's bus is, each way
    ends: dict[str, float] = {}  # receiving op -> when all of it is there
    copying = 0.0
    for inside, op, times in hlo.walk(program):
        now = matmul + kernel + other + between + host
        if collectives.is_between_slices(op, "recv"):
            passes = 2 * (where.slices - 1) / where.slices  # a ring of slices reduces, then gathers
            on_wire = max(on_wire, now) + times * passes * hlo.arrays(op.result)[0].bytes / chip.dcn_bandwidth
            ends[op.name] = on_wire
        elif collectives.is_between_slices(op, "recv-done"):
            between += max(0.0, ends[op.operands[0]] - now)
        elif copy := collectives.host_copy(program, inside, op):
            seconds = times * copy.bytes / chip.host_bandwidth
            copying += seconds
            on_bus[copy.way] = ends[op.name] = max(on_bus[copy.way], now) + seconds
            if not copy.is_async:
                host += ends[op.name] - now
            continue
        elif op.opcode.endswith("-done") and op.operands and op.operands[0] in ends:
            host += max(0.0, ends[op.operands[0]] - now)
        cycles = float(op.attribute(r'"estimated_cycles":"(\d+)"') or 0)
        seconds = cycles / chip.clock if cycles < 2**62 else 0.0
        flops = hlo.op_flops(program, inside, op)
        for call in hlo.kernels(program, inside, op, experts, lanes=128):
            at_peak = call.flops / (chip.peak_flops * KERNEL_EFFICIENCY)
            kernel += times * max(at_peak, call.bytes / chip.hbm_bandwidth)
        if flops:
            narrow = hlo.is_in_8_bits(program, inside, op)  # which the chip multiplies twice as fast
            matmul += times * max(seconds, flops / (chip.peak_flops * (2 if narrow else 1)))
        elif seconds:
            other += times * min(seconds, hlo.hbm_bytes(program, inside, op) / chip.hbm_bandwidth)
    waits = hides = 0.0
    for each in collectives.collectives(program, mesh):
        if each.axes == collectives.BETWEEN_SLICES:
            continue
        is_whole = each.devices == math.prod((mesh or {}).get(axis, 1) for axis in each.axes.split("+"))
        is_whole |= each.kind == "collective-permute"
        seconds = each.times * _wire_seconds(each, where, (links or {}).get(each.axes) if is_whole else None)
        waits, hides = (waits, hides + seconds) if each.is_async else (waits + seconds, hides)
    exposed = waits + max(0.0, hides - matmul - kernel - other)
    seconds_of = (matmul, kernel, other, exposed, hides, between, host, max(0.0, copying - host))
    return Estimate(*(1e3 * seconds for seconds in seconds_of))


def _wire_seconds(each: collectives.Collective, where: Topology, links: float | None) -> float:
    """A ring along every link of the chip at once that carries such a group's data.

    Where the axes' links are not known: all of the chip's where all chips of the slice take part, else one.
    """
    chips = int(np.prod(where.shape))
    if links is None:
        links = where.links if each.devices >= chips else 1
    if each.kind == "collective-permute":  # half goes either way; neighbours on the mesh may be far from each other
        return each.bytes / where.chip.link_bandwidth / 2 / min(links, 1)
    passes = {"all-reduce": 2.0, "all-to-all": 0.25}.get(each.kind, 1.0)
    return passes * each.bytes * (each.devices - 1) / each.devices / (links * where.chip.link_bandwidth)
