"""What a step costs on a TPU slice, from the TPU compiler without a TPU: memory, FLOPs, communication, a guess at time.

The compiler is libtpu's, as on the pod (Python package 'jax[tpu]'). `prepare` comes before anything imports JAX.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lm import hlo, metrics, traffic
from lm.chips import GIB, Topology
from lm.config import Config
from lm.schema import ConfigError

# Share of the peak that the attention kernel is taken to reach; the compiler gives no cycles for it.
KERNEL_EFFICIENCY = 0.75


def prepare(flags: str) -> None:
    """Sets what libtpu reads once, when it is loaded. `flags`: as in LIBTPU_INIT_ARGS.

    Raises:
      ConfigError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("the TPU compiler is not installed: pip install 'lm[tpu]'")
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
      model_flops: of one step on one chip; None where they are not counted.
      tokens: positions of one step, over all chips.
      chips: over all slices.
      saved: bytes that a save of the state takes, over all hosts; each array once.
      beside: bytes on a chip of what the step leaves alone and stays there meanwhile: in an evaluation the optimizer's.
    """

    stage: Any
    mesh: dict[str, int]
    state: dict[str, float]
    parameters: int
    trained: int
    largest_replicated: tuple[int, str]
    model_flops: float | None
    tokens: int
    chips: int
    saved: float
    beside: float


class Compiled(NamedTuple):
    """A compiled step.

    Attributes:
      text: HLO after all passes.
      memory: bytes on a chip: 'arguments', 'temporaries', 'peak'.
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

    from lm import build, checks, program, selection, sharding, trees
    from lm.data.tasks import TASKS

    planned = build.plan(cfg, None)
    cfg = planned.cfg
    words = planned.tokenizer or Ids(cfg.tokenizer.vocab_size + cfg.tokenizer.extra_ids)
    mesh = sharding.make_mesh(cfg.mesh, devices(where))
    checks.mesh_divides(cfg, mesh, planned.abstract_params, planned.logical_axes)
    made = program.make(
        cfg,
        mesh,
        words if TASKS[cfg.data.task].texts else None,
        abstract_params=planned.abstract_params,
        logical_axes=planned.logical_axes,
        anchored=planned.anchored,
        epoch_examples=1_000 * cfg.data.batch_size,  # the schedule's length costs nothing
    )
    rows = checks.eval_batch_size(cfg) if evaluation else cfg.data.batch_size
    batch = program.abstract_batch(cfg, mesh, rows)
    state = made.abstract_state
    step, argument = (made.eval_step, state.params) if evaluation else (made.train_step, state)
    with jax.set_mesh(mesh):
        lowered = step.lower(argument, batch)
    flat = trees.flatten(state.params)
    trained = selection.trained_part(made.optimizer.selection, state.params)
    replicated = [
        (leaf.size * leaf.dtype.itemsize, path) for path, leaf in flat.items() if leaf.sharding.is_fully_replicated
    ]
    is_counted = TASKS[cfg.data.task].texts and build.predicts_tokens(cfg)
    per_token = metrics.train_flops_per_token(cfg.model, cfg.data.seq_len, words.vocab_size) if is_counted else None
    tokens = rows * cfg.data.seq_len
    return Lowered(
        stage=lowered,
        mesh=dict(zip((traffic.BETWEEN_SLICES, *sharding.AXES), sharding.mesh_sizes(cfg.mesh, mesh.size), strict=True)),
        state={
            "parameters": _bytes_a_chip(state.params),
            "optimizer": _bytes_a_chip(state.opt_state),
            **({"average": _bytes_a_chip(state.ema)} if state.ema is not None else {}),
            **({"start": _bytes_a_chip(state.start)} if state.start is not None else {}),
        },
        parameters=sum(leaf.size for leaf in flat.values()),
        trained=sum(leaf.size for leaf in jax.tree.leaves(trained)),
        largest_replicated=max(replicated, default=(0, "")),
        model_flops=per_token * tokens / (3 if evaluation else 1) / mesh.size if per_token else None,
        tokens=tokens,
        chips=mesh.size,
        saved=float(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))),
        beside=_bytes_a_chip(state) - _bytes_a_chip(argument) if evaluation else 0.0,
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
    analysis = compiled.memory_analysis()
    memory = {
        "arguments": analysis.argument_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
        "peak": analysis.peak_memory_in_bytes,
    }
    return Compiled(compiled.as_text(), memory, seconds)


def key(lowered: Lowered, where: Topology, flags: str) -> str:
    """What a result is remembered by: a hash of the step, the slices, the compiler, its flags, and what reads its
    program."""
    parts = [lowered.stage.as_text(), repr(where), flags, importlib.metadata.version("libtpu")]
    parts += [Path(module.__file__ or "").read_text(encoding="utf-8") for module in (hlo, traffic)]
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
      matmul: the compiler's cycles of what holds a matrix product.
      kernel: attention kernels, at `KERNEL_EFFICIENCY` of the peak.
      other: what only moves memory: the smaller of the compiler's cycles and all its operands over the bandwidth.
      exposed: communication that computation waits for: all that is synchronous, and what of the rest is longer than
        the computation.
      hidden: communication meanwhile.
      between: waits for other slices: what of a transfer is longer than the computation from its start to its end.
    """

    matmul: float
    kernel: float
    other: float
    exposed: float
    hidden: float
    between: float

    @property
    def total(self) -> float:
        """Of the step."""
        return self.matmul + self.kernel + self.other + self.exposed + self.between


def estimate(program: hlo.Program, where: Topology) -> Estimate:
    """Guesses the time of a step; latencies, stragglers and the host are left out."""
    chip = where.chip
    matmul = kernel = other = between = 0.0
    on_wire = 0.0  # when the network between slices is free again, on the clock of computation
    ends: dict[str, float] = {}  # receiving op -> when all of it is there
    for inside, op, times in hlo.walk(program):
        now = matmul + kernel + other + between
        if traffic.is_between_slices(op, "recv"):
            passes = 2 * (where.slices - 1) / where.slices  # a ring of slices reduces, then gathers
            on_wire = max(on_wire, now) + times * passes * hlo.arrays(op.result)[0].bytes / chip.dcn_bandwidth
            ends[op.name] = on_wire
        elif traffic.is_between_slices(op, "recv-done"):
            between += max(0.0, ends[op.operands[0]] - now)
        cycles = float(op.attribute(r'"estimated_cycles":"(\d+)"') or 0)
        seconds = cycles / chip.clock if cycles < 2**62 else 0.0
        if flops := hlo.kernel_flops(program, inside, op, lanes=128):
            kernel += times * flops / (chip.peak_flops * KERNEL_EFFICIENCY)
        elif hlo.op_flops(program, inside, op):
            matmul += times * seconds
        elif seconds:
            other += times * min(seconds, hlo.hbm_bytes(program, inside, op) / chip.hbm_bandwidth)
    waits = hides = 0.0
    for each in traffic.collectives(program):
        if each.axes == traffic.BETWEEN_SLICES:
            continue
        seconds = each.times * _wire_seconds(each, where)
        waits, hides = (waits, hides + seconds) if each.is_async else (waits + seconds, hides)
    exposed = waits + max(0.0, hides - matmul - kernel - other)
    return Estimate(*(1e3 * seconds for seconds in (matmul, kernel, other, exposed, hides, between)))


def _wire_seconds(each: traffic.Collective, where: Topology) -> float:
    """A ring along every link of the chip at once, where all chips of the slice take part; else along one axis."""
    chips = int(np.prod(where.shape))
    links = where.links if each.devices >= chips else 1
    if each.kind == "collective-permute":
        return each.bytes / where.chip.link_bandwidth / 2
    passes = {"all-reduce": 2.0, "all-to-all": 0.25}.get(each.kind, 1.0)
    return passes * each.bytes * (each.devices - 1) / each.devices / (links * where.chip.link_bandwidth)
