"""Collectives and host copies of a compiled program (`lm.planner.hlo`): bytes, counts, and the mesh axes they span."""

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
    """A collective operation.

    Attributes:
      kind: one of `KINDS`; between slices what the compiler names it.
      axes: mesh axes it spans, such as 'fsdp' or 'data+fsdp'; 'dcn_data' between slices; '' if the mesh is not known.
      devices: in a group.
      dtype: of its first operand.
      is_async: whether computation can overlap with it.
      times: how often it runs, loops multiplied out.
      bytes: of a device each time: the gathered result of an all-gather, the operands of the others.
    """

    kind: str
    axes: str
    devices: int
    dtype: str
    is_async: bool
    times: int
    bytes: int


def collectives(program: Program, mesh: Mapping[str, int] | None = None) -> list[Collective]:
    """All collectives of a program, those fused with computation included.

    Args:
      program: of one slice.
      mesh: axis -> size, outermost first, in the order in which the program numbers the devices. The first axis is
        'dcn_data', the number of slices.
    """
    sizes = mesh or {}
    found = []
    for computation, op, times in hlo.executed_ops(program):
        if is_between_slices(op, "send"):
            sent = hlo.arrays(op.result)[0]
            kind = op.attribute(r'_xla_megascale_transfer_type="(\w+)"').lower().replace("_", "-")
            slices = sizes.get(BETWEEN_SLICES, 2)
            found.append(Collective(kind, BETWEEN_SLICES, slices, sent.dtype, True, times, sent.bytes))
        for inside, each, fused in _collective_ops(program, computation, op):
            kind = each.opcode.removesuffix("-start")
            if fused and kind == "all-reduce" and _root(program, inside).opcode == "dynamic-slice":
                kind = "reduce-scatter"  # the TPU compiler's form: an all-reduce whose result is sliced
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
    """A copy between a chip and its host's memory; `way` is 'to_host' or 'from_host'."""

    way: str
    bytes: int
    is_async: bool


_ON_HOST = "S(5)"  # memory space of host memory, in an array's layout
_COPIES = ("copy", "slice", "dynamic-slice", "dynamic-update-slice")


def host_copy(program: Program, computation: str, op: Op) -> HostCopy | None:
    """The copy to or from host memory that an op does (of an array or of a slice of one); None = it does none."""
    opcode = op.opcode.removesuffix("-start")
    if opcode not in _COPIES:
        return None
    ops = program.computations[computation]
    types = [op.result, *(ops[name].result for name in op.operands if name in ops)]
    if not any(_ON_HOST in each for each in types):
        return None
    copied_bytes = min(array.bytes for each in types for array in hlo.arrays(each) if array.shape)
    is_written = _ON_HOST in op.result.lstrip("(").partition("]")[2].partition("}")[0]
    to_host = opcode == "dynamic-update-slice" or (opcode == "copy" and is_written)
    return HostCopy("to_host" if to_host else "from_host", copied_bytes, op.opcode.endswith("-start"))


def host_copies(program: Program) -> dict[str, int]:
    """Bytes that one execution copies 'to_host' and 'from_host', loops multiplied out."""
    total = {"to_host": 0, "from_host": 0}
    for computation, op, times in hlo.executed_ops(program):
        if copy := host_copy(program, computation, op):
            total[copy.way] += times * copy.bytes
    return total


def is_between_slices(op: Op, opcode: str) -> bool:
    """Whether an op has this opcode ('send', 'recv-done', …) and belongs to a transfer over the data-centre network."""
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
    """Groups of devices of a collective, from any of the three notations of HLO; [] if it names none."""
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
    """Device ids of HLO's iota notation. Example: '2,3' transposed by '1,0' -> [0, 3, 1, 4, 2, 5]."""
    shape = list(map(int, dims.split(",")))
    return (
        np.arange(math.prod(shape)).reshape(shape).transpose([*map(int, order.split(","))] if order else None).ravel()
    )


def _collective_ops(program: Program, computation: str, op: Op) -> Iterator[tuple[str, Op, bool]]:
    """(computation, op, whether it is fused) of the collectives in an op."""
    if op.opcode.removesuffix("-start") in KINDS:
        yield computation, op, False
    elif op.opcode in ("fusion", "async-start"):
        called = op.attribute(r"calls=(%[\w.\-]+)")
        inside = program.computations.get(called, {})
        targets = " ".join(each.text for each in inside.values() if each.opcode == "custom-call")
        # An async collective goes through several fusions from start to done; it is counted at its start.
        if targets and "AsyncCollectiveStart" not in targets:
            return
        for each in inside.values():
            is_continued = "async_collective_fusion_config" in each.text and not targets
            if each.opcode.removesuffix("-start") in KINDS and not is_continued:
                yield called, each, True


def _root(program: Program, computation: str) -> Op:
    return next(op for op in program.computations[computation].values() if op.is_root)


def _is_async(program: Program, op: Op) -> bool:
    inside = program.computations.get(op.attribute(r"calls=(%[\w.\-]+)"), {})
    return op.opcode == "async-start" or any("AsyncCollectiveStart" in each.text for each in inside.values())


def summarize(found: Iterable[Collective]) -> dict[str, dict[str, int]]:
    """Sums by kind, dtype and axes: 'all-gather bf16 over fsdp (16) async' -> times and bytes of one step."""
    table: dict[str, dict[str, int]] = {}
    for each in found:
        over = f"{each.axes} ({each.devices})" if each.kind != "collective-permute" else each.axes
        name = f"{each.kind} {each.dtype} over {over} {'async' if each.is_async else 'sync'}"
        row = table.setdefault(name, {"times": 0, "bytes": 0})
        row["times"] += each.times
        row["bytes"] += each.times * each.bytes
    return table
