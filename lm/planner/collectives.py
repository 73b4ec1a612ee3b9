"""What devices send each other in a compiled program (`lm.planner.hlo`): how much, how often, along which mesh axes."""

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from lm.planner import hlo
from lm.planner.hlo import Op, Program

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BETWEEN_SLICES = "dcn_data"  # the mesh axis that crosses the data-centre network

_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?\s*\{([^}]*)\}")


class Collective(NamedTuple):
    """One kind of communication.

    Attributes:
      kind: of `KINDS`.
      axes: of the mesh, as 'fsdp' or 'data+fsdp'; 'dcn_data' between slices; '' where the mesh is not known.
      devices: in a group.
      dtype: of the first array that travels.
      is_async: whether computation may go on meanwhile.
      times: how often, loops multiplied out.
      bytes: that arrive at or leave a device each time: all of what is gathered, all of what is reduced.
    """

    kind: str
    axes: str
    devices: int
    dtype: str
    is_async: bool
    times: int
    bytes: int


def collectives(program: Program, mesh: Mapping[str, int] | None = None) -> list[Collective]:
    """All communication of one run, also what is fused with computation.

    Args:
      program: of one slice.
      mesh: axis -> size, outermost first, of the devices in the order in which the program numbers them; 'dcn_data',
        the number of slices, is the first.
    """
    sizes = mesh or {}
    found = []
    for where, op, times in hlo.walk(program):
        if is_between_slices(op, "send"):
            sent = hlo.arrays(op.result)[0]
            kind = op.attribute(r'_xla_megascale_transfer_type="(\w+)"').lower().replace("_", "-")
            slices = sizes.get(BETWEEN_SLICES, 2)
            found.append(Collective(kind, BETWEEN_SLICES, slices, sent.dtype, True, times, sent.bytes))
        for inside, each, fused in _communicating(program, where, op):
            kind = each.opcode.removesuffix("-start")
            if fused and kind == "all-reduce" and _root(program, inside).opcode == "dynamic-slice":
                kind = "reduce-scatter"  # as a TPU writes it: the sum, of which each device keeps its part
            is_async = each.opcode.endswith("-start") or (fused and _is_async(program, op))
            operands = [
                array
                for name in each.operands
                if name in program.computations[inside]
                for array in hlo.arrays(program.computations[inside][name].result)[:1]
            ]
            bytes_sent = sum(array.bytes for array in operands)
            groups = device_groups(each)
            devices = 2 if kind == "collective-permute" else len(groups[0]) if groups else 1
            if kind == "all-gather":
                bytes_sent *= devices
            if devices > 1 and operands:
                axes = axes_of(groups, sizes)
                found.append(Collective(kind, axes, devices, operands[0].dtype, is_async, times, bytes_sent))
    return found


class HostCopy(NamedTuple):
    """A copy between a chip and its host's memory: which `way` ('to_host' or 'from_host'), its bytes, whether
    computation may go on meanwhile."""

    way: str
    bytes: int
    is_async: bool


_ON_HOST = "S(5)"  # in the layout of an array that lies in the host's memory
_COPIES = ("copy", "slice", "dynamic-slice", "dynamic-update-slice")


def host_copy(program: Program, where: str, op: Op) -> HostCopy | None:
    """What an op copies to or from the host's memory: a slice of a stack there, or all of an array; None = nothing."""
    opcode = op.opcode.removesuffix("-start")
    if opcode not in _COPIES:
        return None
    known = program.computations[where]
    types = [op.result, *(known[name].result for name in op.operands if name in known)]
    if not any(_ON_HOST in each for each in types):
        return None
    piece = min(array.bytes for each in types for array in hlo.arrays(each) if array.shape)
    is_written = _ON_HOST in op.result.lstrip("(").partition("]")[2].partition("}")[0]
    to_host = opcode == "dynamic-update-slice" or (opcode == "copy" and is_written)
    return HostCopy("to_host" if to_host else "from_host", piece, op.opcode.endswith("-start"))


def host_copies(program: Program) -> dict[str, int]:
    """Bytes of one run that go to and from the host's memory, loops multiplied out: 'to_host' and 'from_host'."""
    total = {"to_host": 0, "from_host": 0}
    for where, op, times in hlo.walk(program):
        if copy := host_copy(program, where, op):
            total[copy.way] += times * copy.bytes
    return total


def is_between_slices(op: Op, opcode: str) -> bool:
    """Whether an op is that ('send', 'recv-done', …) of a transfer over the data-centre network."""
    return op.opcode == opcode and "xla_megascale_runtime" in op.text


def axes_of(groups: list[list[int]], mesh: Mapping[str, int]) -> str:
    """The mesh axes along which the members of a group differ.

    Example, {'data': 2, 'fsdp': 4}: [[0, 1, 2, 3], [4, 5, 6, 7]] -> 'fsdp', [[0, 4], [1, 5], …] -> 'data'.
    """
    sizes = [size for axis, size in mesh.items() if axis != BETWEEN_SLICES]
    names = [axis for axis in mesh if axis != BETWEEN_SLICES]
    if not names or max(itertools.chain(*groups), default=0) >= math.prod(sizes):
        return ""
    differs = np.zeros(len(names), bool)
    for group in groups:
        at = np.stack(np.unravel_index(group, sizes))  # [axes, members]
        differs |= (at != at[:, :1]).any(axis=1)
    return "+".join(name for name, crossed in zip(names, differs, strict=True) if crossed)


def device_groups(op: Op) -> list[list[int]]:
    """The devices that talk to each other, of the several ways in which HLO writes groups; [] where it says none."""
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", op.text):
        return _iota(found[2], found[3]).reshape(*map(int, found[1].split(","))).tolist()
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]+\})\}", op.text):
        return [list(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", found[1])]
    if found := _MESH.search(op.text):
        named = re.findall(r"'([^']+)'=(\d+)", found[1])
        inside = re.findall(r"'([^']+)'", found[4])
        sizes = [int(size) for _, size in named]
        rest = [i for i, (axis, _) in enumerate(named) if axis not in inside]
        within = [i for i, (axis, _) in enumerate(named) if axis in inside]
        ids = _iota(found[2] or str(math.prod(sizes)), found[3]).reshape(sizes).transpose(rest + within)
        return ids.reshape(-1, math.prod(sizes[i] for i in within)).tolist()
    return []


def _iota(dims: str, order: str | None) -> np.ndarray:
    """Numbers of devices in the order that '2,3' and '1,0' stand for: [0, 3, 1, 4, 2, 5]."""
    shape = list(map(int, dims.split(",")))
    return (
        np.arange(math.prod(shape)).reshape(shape).transpose([*map(int, order.split(","))] if order else None).ravel()
    )


def _communicating(program: Program, where: str, op: Op) -> Iterator[tuple[str, Op, bool]]:
    if op.opcode.removesuffix("-start") in KINDS:
        yield where, op, False
    elif op.opcode in ("fusion", "async-start"):
        called = op.attribute(r"calls=(%[\w.\-]+)")
        inside = program.computations.get(called, {})
        targets = " ".join(each.text for each in inside.values() if each.opcode == "custom-call")
        # Fusions carry a collective on from its start to its end; it is counted at the start.
        if targets and "AsyncCollectiveStart" not in targets:
            return
        for each in inside.values():
            carried = "async_collective_fusion_config" in each.text and not targets
            if each.opcode.removesuffix("-start") in KINDS and not carried:
                yield called, each, True


def _root(program: Program, computation: str) -> Op:
    return next(op for op in program.computations[computation].values() if op.is_root)


def _is_async(program: Program, op: Op) -> bool:
    inside = program.computations.get(op.attribute(r"calls=(%[\w.\-]+)"), {})
    return op.opcode == "async-start" or any("AsyncCollectiveStart" in each.text for each in inside.values())


def in_table(found: Iterable[Collective]) -> dict[str, dict[str, int]]:
    """What is sent, by kind, dtype and axes: 'all-gather bf16 over fsdp (16) async' -> times and bytes of one step."""
    table: dict[str, dict[str, int]] = {}
    for each in found:
        over = f"{each.axes} ({each.devices})" if each.kind != "collective-permute" else each.axes
        name = f"{each.kind} {each.dtype} over {over} {'async' if each.is_async else 'sync'}"
        row = table.setdefault(name, {"times": 0, "bytes": 0})
        row["times"] += each.times
        row["bytes"] += each.times * each.bytes
    return table
