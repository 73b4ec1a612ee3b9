"""Compiles a step for a TPU slice without a TPU: memory, FLOPs, communication, and an estimate of the time.

The compiler is libtpu's, the same as on a pod (Python package 'jax[tpu]'). Call `prepare` before JAX looks for its
devices.
"""

import hashlib
import importlib.metadata
import importlib.util
import itertools
import math
import os
import re
import sys
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

# Share of the peak that custom kernels are assumed to reach; the compiler estimates no cycles for them.
KERNEL_EFFICIENCY = 0.75
# By how much the needed FLOPs may exceed the compiled FLOPs: the two count small terms differently.
RATIO_TOLERANCE = 0.02


def prepare(flags: str) -> None:
    """Sets the environment that libtpu reads once, when it is loaded. `flags`: as in LIBTPU_INIT_ARGS.

    Raises:
      ConfigError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("the TPU compiler is not installed: pip install -e '.[tpu]'")
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",  # this host has no TPU; without a type libtpu prints warnings
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "LIBTPU_INIT_ARGS": flags,
    }
    if "jax" in sys.modules:  # which has read JAX_PLATFORMS already, but has no devices yet
        sys.modules["jax"].config.update("jax_platforms", "cpu")


def devices(topology: Topology) -> list[Any]:
    """Abstract devices of the slices.

    Raises:
      ConfigError: the compiler does not support such a slice.
    """
    from jax.experimental import topologies

    options: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if topology.links > len(topology.shape):
        options["wrap"] = [*(n == topology.chip.ring for n in topology.shape), *[False] * (3 - len(topology.shape))]
    if len(topology.shape) == 2 and topology.shape[0] * topology.shape[1] > 16:
        options["chips_per_host_bounds"] = [2, 2, 1]
    try:
        return list(topologies.get_topology_desc(topology_name=topology.name, platform="tpu", **options).devices)
    except Exception as error:
        raise ConfigError(f"--topology={topology.name}: the compiler does not support this slice: {error}") from None


class FakeTokenizer:
    """Stands in for a tokenizer that is not trained yet: the cost of a step depends on its size only."""

    eos_id = 2
    added_space = 0

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.is_control_V = np.arange(vocab_size) < 4

    def token_bytes(self) -> np.ndarray:
        """float32 [V]."""
        return np.ones(self.vocab_size, np.float32)


class Lowered(NamedTuple):
    """A lowered step, before compilation.

    Attributes:
      stage: `jax.stages.Lowered`.
      mesh: 'dcn_data' and all axes of the mesh -> size.
      state: bytes on a chip of 'parameters', 'optimizer' and any other parts of the state.
      parameters, trained: number of parameters, and of trained parameters.
      largest_replicated: bytes and path of the largest parameter that is replicated on every chip.
      model_flops: of one step on one chip, attention counted in full; None if the task predicts no tokens.
      model_flops_causal: the same, with attention's causal half only.
      needed_flops: lower bound of the compiled FLOPs, see `check_ratio`; None as above.
      tokens: positions of one step, over all chips.
      chips: over all slices.
      checkpoint_bytes: size of a checkpoint of the state, over all hosts.
      resident_bytes: bytes on a chip that stay allocated and are no argument of the step: an evaluation's optimizer
        state.
      experts: number of experts of the model; 0 = none.
      links: mesh axes, named as in `lm.planner.collectives` -> links of a chip that a collective along them can send
        on.
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
    checkpoint_bytes: float
    resident_bytes: float
    experts: int
    links: dict[str, float]


class Compiled(NamedTuple):
    """A compiled step.

    Attributes:
      text: HLO after all passes.
      memory: bytes on a chip: 'arguments', 'temporaries', 'peak'; and 'host', bytes of host memory for each chip.
      seconds: of compilation.
    """

    text: str
    memory: dict[str, float]
    seconds: float


class DoesNotFit(Exception):
    """The step does not fit a chip's memory; the message lists the largest buffers.

    Attributes:
      needed: bytes that it needs on a chip; 0 if the compiler does not say.
    """

    needed = 0.0


def lower_step(cfg: Config, topology: Topology, *, evaluation: bool = False) -> Lowered:
    """Traces and lowers the training step of a config.

    Args:
      cfg: from `lm.config.build`.
      topology: the slices.
      evaluation: lower the evaluation step instead.

    Raises:
      ConfigError: the config is inconsistent, or does not fit the slices.
    """
    import jax

    from lm import param_paths, program
    from lm import run as run_lib
    from lm.optim import trainable
    from lm.tasks import task_of

    planned = run_lib.plan(cfg, None)
    cfg = planned.cfg
    words = planned.tokenizer or FakeTokenizer(cfg.tokenizer.vocab_size + cfg.tokenizer.extra_ids)
    mesh = mesh_lib.make_mesh(cfg.mesh, devices(topology))
    program.check_mesh(cfg, mesh, planned.abstract_params, planned.logical_axes)
    functions = program.make(
        cfg,
        mesh,
        words if task_of(cfg).texts else None,
        abstract_params=planned.abstract_params,
        logical_axes=planned.logical_axes,
        anchored=planned.anchored,
        epoch_examples=1_000 * cfg.data.batch_size,  # the length of the schedule does not change the cost
    )
    rows = program.eval_batch_size(cfg) if evaluation else cfg.data.batch_size
    batch = program.abstract_batch(cfg, mesh, rows)
    state = functions.abstract_state
    step, argument = (functions.eval_step, state.params) if evaluation else (functions.train_step, state)
    start = {"start": state.start} if evaluation and task_of(cfg).needs_start else {}
    with jax.set_mesh(mesh):
        lowered = step.lower(argument, batch, **start)
    flat = param_paths.flatten(state.params)
    trained = trainable.trained_part(functions.optimizer.selection, state.params)
    replicated = [
        (leaf.size * leaf.dtype.itemsize, path) for path, leaf in flat.items() if leaf.sharding.is_fully_replicated
    ]
    tokens = rows * cfg.data.seq_len
    is_counted = task_of(cfg).texts and run_lib.predicts_tokens(cfg)
    predicting = words.vocab_size if task_of(cfg).predicts_every_position else 0
    full, causal, needed = (
        flops.train_flops_per_token(cfg.model, cfg.data.seq_len, vocab, causal_half=half) if is_counted else None
        for vocab, half in ((words.vocab_size, False), (words.vocab_size, True), (predicting, True))
    )

    def per_chip(per_token: float | None, share: float = 1.0) -> float | None:
        return share * per_token * tokens / mesh.size if per_token else None

    forward = 1 / 3  # of the FLOPs of a training step
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (state.params, trained)]
    is_all_trained = sizes[0] == sizes[1]
    return Lowered(
        stage=lowered,
        mesh=dict(zip((collectives.BETWEEN_SLICES, *AXES), mesh_lib.mesh_sizes(cfg.mesh, mesh.size), strict=True)),
        state={
            "parameters": _bytes_per_chip(state.params),
            "optimizer": _bytes_per_chip(state.opt_state),
            **({"average": _bytes_per_chip(state.ema)} if state.ema is not None else {}),
            **({"start": _bytes_per_chip(state.start)} if state.start is not None else {}),
        },
        parameters=sizes[0],
        trained=sizes[1],
        largest_replicated=max(replicated, default=(0, "")),
        model_flops=per_chip(full, forward if evaluation else 1.0),
        model_flops_causal=per_chip(causal, forward if evaluation else 1.0),
        needed_flops=per_chip(needed, 1.0 if is_all_trained and not evaluation else forward),
        tokens=tokens,
        chips=mesh.size,
        checkpoint_bytes=float(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))),
        resident_bytes=_bytes_per_chip(state) - _bytes_per_chip((argument, start)) if evaluation else 0.0,
        experts=cfg.model.num_experts,
        links=links(mesh, topology),
    )


def links(mesh: Any, topology: Topology) -> dict[str, float]:
    """Mesh axes, such as 'fsdp' or 'data+fsdp' -> links of a chip for collectives along them, see `Topology.links_of`.

    Inside one slice; axes of size 1 are left out.
    """
    names = [name for name, size in mesh.shape.items() if size > 1]
    first = mesh.devices[: mesh.devices.shape[0] // topology.slices]
    links_along = {}
    for count in range(1, len(names) + 1):
        for chosen in itertools.combinations(names, count):
            group = first[tuple(slice(None) if name in chosen else 0 for name in mesh.axis_names)]
            links_along["+".join(chosen)] = topology.links_of([tuple(device.coords) for device in group.ravel()])
    return links_along


class ImpossibleRatio(ValueError):
    """The compiled FLOPs are below the least that the model needs: some products are missed or miscounted."""


def check_ratio(lowered: Lowered, compiled_flops: float) -> None:
    """Checks that the compiled FLOPs are at least what the step needs.

    The lower bound is the model FLOPs with attention's causal half; without the output projection if not every position
    predicts; and of the forward pass only, if some parameters are frozen or the step is an evaluation. Model FLOPs with
    attention in full may therefore exceed the compiled FLOPs only by what the mask hides.

    Raises:
      ImpossibleRatio: the compiled FLOPs are below the bound.
    """
    needed = lowered.needed_flops
    if needed and needed > (1 + RATIO_TOLERANCE) * compiled_flops:
        raise ImpossibleRatio(
            f"the compiled program's {compiled_flops:.4g} FLOPs per chip and step are fewer than the {needed:.4g} that "
            f"the model needs even with attention's causal half; the ratio {needed / compiled_flops:.2f} cannot be "
            "above 1. lm/planner/hlo.py misses some matrix products, so that the estimated time is too short"
        )


def compile_step(lowered: Lowered) -> Compiled:
    """Compiles a lowered step.

    Raises:
      DoesNotFit: the step needs more memory than the chip has.
    """
    began = time.monotonic()
    try:
        compiled = lowered.stage.compile()
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        does_not_fit = DoesNotFit(_explain_refusal(str(error), lowered.stage.as_text()))
        does_not_fit.needed = _needed_bytes(str(error), sum(lowered.state.values()))
        raise does_not_fit from None
    seconds = time.monotonic() - began
    return Compiled(compiled.as_text(), memory(compiled.memory_analysis()), seconds)


def memory(analysis: Any) -> dict[str, float]:
    """`Compiled.memory` from `compiled.memory_analysis()`.

    The analysis reports one peak for the chip's and the host's memory together. If the program uses host memory, the
    chip's peak is bounded by the sum of its arguments, temporaries, and results that alias no argument.
    """
    host = analysis.host_argument_size_in_bytes + analysis.host_temp_size_in_bytes
    host += analysis.host_output_size_in_bytes - analysis.host_alias_size_in_bytes
    arguments, temporaries = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    peak = analysis.peak_memory_in_bytes
    if host:
        peak = min(peak, arguments + results + temporaries)
    return {"arguments": arguments, "temporaries": temporaries, "peak": peak, "host": host}


def key(lowered: Lowered, topology: Topology, flags: str) -> str:
    """Cache key of a result: a hash of the lowered step, the slices, the compiler, its flags and this code."""
    parts = [lowered.stage.as_text(), repr(topology), flags, importlib.metadata.version("libtpu")]
    parts += [Path(module.__file__ or "").read_text(encoding="utf-8") for module in (hlo, collectives)]
    parts += [Path(__file__).read_text(encoding="utf-8")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _bytes_per_chip(tree: Any) -> float:
    import jax

    leaves = jax.tree.leaves(tree)
    return float(sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in leaves))


_SIZE = r"([\d.]+[KMGT])"


def _needed_bytes(message: str, state: float) -> float:
    """Bytes that a step needs, from the compiler's error message; 0 if it does not say.

    `state`: bytes of the state on a chip, which one form of the message does not include.
    """
    used = re.search(rf"Used {_SIZE} of {_SIZE} hbm", message)
    temporaries = re.search(rf"HLO temporaries \({_SIZE}\) exceeds", message)
    match = used or temporaries
    if match is None:
        return 0.0
    size = float(match[1][:-1]) * {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}[match[1][-1]]
    return size if used else size + state


def _explain_refusal(message: str, program: str) -> str:
    """How much memory is needed, and the five largest buffers of the compiler's report.

    If the compiler reports none, the five largest array types of the program before partitioning are listed.
    """
    needed = re.search(rf"Used {_SIZE} of {_SIZE} hbm", message)
    head = f"it needs {needed[1]} of the chip's {needed[2]}" if needed else message.splitlines()[0].strip()
    reported = re.findall(r"Size: ([\d.]+\w).*?Operator: op_name=\"([^\"]*)\".*?Shape: ([^\s{]+)", message, re.S)
    if reported:
        rows = [f"{size:>8}  {shape}  {name}" for size, name, shape in reported[:5]]
        return "\n  ".join([head, "largest buffers on a chip:", *rows])
    sizes = {}
    for dims, dtype in set(re.findall(r"tensor<((?:\d+x)+)([a-z]+\d+)>", program)):
        name = {"i": "s"}.get(dtype[0], dtype[0]) + dtype[1:]
        if name in hlo.ITEM_BYTES:
            shape = tuple(map(int, dims.strip("x").split("x")))
            sizes[f"{name}{list(shape)}"] = hlo.Array(name, shape).bytes
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:5]
    rows = [f"{size / GIB:>8.1f}G  {array}" for array, size in largest]
    return "\n  ".join([head, "largest arrays of the program, before partitioning:", *rows])


# The estimate ---------------------------------------------------------------------------------------------------------


class Estimate(NamedTuple):
    """Estimated milliseconds of one step: a roofline model of each op, with the compiler's cycles where it has them.

    Attributes:
      matmul: ops with matrix products: the compiler's cycles, but at least their FLOPs at the peak.
      kernel: custom kernels (attention, experts): the longer of their FLOPs at `KERNEL_EFFICIENCY` of the peak and
        their stated HBM traffic at the bandwidth.
      other: ops without products: the shorter of the compiler's cycles and their HBM traffic at the bandwidth.
      exposed: collectives that computation waits for: all synchronous ones, and the part of the asynchronous ones that
        is longer than all computation.
      hidden: asynchronous collectives.
      between: waits for transfers between slices: the part that is longer than the computation between their start
        and their end.
      host: waits for copies to and from host memory, counted in the same way.
      host_hidden: the part of these copies that overlaps with computation.
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
        """Milliseconds of the step."""
        return self.matmul + self.kernel + self.other + self.exposed + self.between + self.host


def estimate(
    program: hlo.Program,
    topology: Topology,
    *,
    mesh: Mapping[str, int] | None = None,
    links: Mapping[str, float] | None = None,
    experts: int = 0,
) -> Estimate:
    """Estimates the time of a step; latencies, stragglers and the host's own work are left out.

    Args:
      program: of one slice.
      topology: the slices.
      mesh: axis -> size, see `collectives.collectives`.
      links: see `Lowered.links`; None = all links of a chip for a collective of all chips, one link for any other.
      experts: number of experts of the model; see `hlo.kernels`.
    """
    chip = topology.chip
    matmul = kernel = other = between = host = 0.0
    dcn_free = 0.0  # when the network between slices is free again, in seconds of the step
    bus_free = {"to_host": 0.0, "from_host": 0.0}  # when the bus to the host is free again, each way
    ends: dict[str, float] = {}  # op that starts a transfer -> when the transfer is complete
    copying = 0.0
    for computation, op, times in hlo.executed_ops(program):
        now = matmul + kernel + other + between + host
        if collectives.is_between_slices(op, "recv"):
            passes = 2 * (topology.slices - 1) / topology.slices  # a ring of slices: reduce-scatter, then all-gather
            dcn_free = max(dcn_free, now) + times * passes * hlo.arrays(op.result)[0].bytes / chip.dcn_bandwidth
            ends[op.name] = dcn_free
        elif collectives.is_between_slices(op, "recv-done"):
            between += max(0.0, ends[op.operands[0]] - now)
        elif copy := collectives.host_copy(program, computation, op):
            seconds = times * copy.bytes / chip.host_bandwidth
            copying += seconds
            bus_free[copy.way] = ends[op.name] = max(bus_free[copy.way], now) + seconds
            if not copy.is_async:
                host += ends[op.name] - now
            continue
        elif op.opcode.endswith("-done") and op.operands and op.operands[0] in ends:
            host += max(0.0, ends[op.operands[0]] - now)
        cycles = float(op.attribute(r'"estimated_cycles":"(\d+)"') or 0)
        seconds = cycles / chip.clock if cycles < 2**62 else 0.0
        flops = hlo.op_flops(program, computation, op)
        for call in hlo.kernels(program, computation, op, experts, lanes=128):
            at_peak = call.flops / (chip.peak_flops * KERNEL_EFFICIENCY)
            kernel += times * max(at_peak, call.bytes / chip.hbm_bandwidth)
        if flops:
            is_8_bit = hlo.multiplies_8_bit(program, computation, op)  # twice the peak
            matmul += times * max(seconds, flops / (chip.peak_flops * (2 if is_8_bit else 1)))
        elif seconds:
            other += times * min(seconds, hlo.hbm_bytes(program, computation, op) / chip.hbm_bandwidth)
    synchronous = asynchronous = 0.0
    for each in collectives.collectives(program, mesh):
        if each.axes == collectives.BETWEEN_SLICES:
            continue
        is_whole = each.devices == math.prod((mesh or {}).get(axis, 1) for axis in each.axes.split("+"))
        is_whole |= each.kind == "collective-permute"
        seconds = each.times * _wire_seconds(each, topology, (links or {}).get(each.axes) if is_whole else None)
        if each.is_async:
            asynchronous += seconds
        else:
            synchronous += seconds
    exposed = synchronous + max(0.0, asynchronous - matmul - kernel - other)
    parts = (matmul, kernel, other, exposed, asynchronous, between, host, max(0.0, copying - host))
    return Estimate(*(1e3 * seconds for seconds in parts))


def _wire_seconds(each: collectives.Collective, topology: Topology, links: float | None) -> float:
    """Seconds of a collective by the ring algorithm, on `links` links of each chip at once.

    `links` None: all links of the chip if all chips of the slice take part, else one.
    """
    chips = int(np.prod(topology.shape))
    if links is None:
        links = topology.links if each.devices >= chips else 1
    if each.kind == "collective-permute":  # half in each direction; neighbours in the mesh may be several hops apart
        return each.bytes / topology.chip.link_bandwidth / 2 / min(links, 1)
    passes = {"all-reduce": 2.0, "all-to-all": 0.25}.get(each.kind, 1.0)
    return passes * each.bytes * (each.devices - 1) / each.devices / (links * topology.chip.link_bandwidth)
