"""Parses a compiled program (HLO text) and counts its FLOPs, memory traffic and loop trips.

Collectives are in `lm.planner.collectives`.

XLA's own `cost_analysis` counts the body of a loop once, so that a scanned model looks as cheap as one layer. Here the
trip counts of loops are multiplied in. Plain text in, numbers out: no JAX.
"""

import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

ITEM_BYTES = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2", "f8e4m3"), 1),
    **dict.fromkeys(("s16", "u16", "bf16", "f16"), 2),
    **dict.fromkeys(("s32", "u32", "f32"), 4),
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 8),
    "c128": 16,
}
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,]*)\]")
_OP = re.compile(r"\s+(ROOT )?(%[\w.\-]+) = ")


class Unreadable(ValueError):
    """The program has an op that must be counted, in a form that this module does not know."""


class Array(NamedTuple):
    """Type of an array: dtype as HLO names it, and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size without padding."""
        return ITEM_BYTES[self.dtype] * math.prod(self.shape)


class Op(NamedTuple):
    """One instruction.

    Attributes:
      name: including the %.
      opcode: 'fusion', 'dot', ...
      result: type of the result as written, including layouts.
      operands: their names.
      text: the instruction from the opcode on.
      is_root: whether it is the result of its computation.
    """

    name: str
    opcode: str
    result: str
    operands: tuple[str, ...]
    text: str
    is_root: bool

    def attribute(self, pattern: str) -> str:
        """First group of a regular expression in the text; '' if it does not match."""
        found = re.search(pattern, self.text)
        return found[1] if found else ""


class Program(NamedTuple):
    """Computations by name, each a dict of its ops in order, and the name of the entry computation."""

    computations: dict[str, dict[str, Op]]
    entry: str


def arrays(text: str) -> list[Array]:
    """The arrays of a type, which may be a tuple. Example: '(f32[2,3]{1,0}, s32[])' -> f32 (2, 3) and s32 ()."""
    found = _ARRAY.findall(re.sub(r"\{[^{}]*\}", "", text))
    return [Array(dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in found if dtype in ITEM_BYTES]


def parse(text: str) -> Program:
    """Parses HLO text as `compiled.as_text()` returns it.

    Raises:
      Unreadable: there is no ENTRY.
    """
    # Pallas spreads a kernel's metadata over three lines.
    text = re.sub(r"kernel_metadata=\{\n(.*?)\n\}\}", r"kernel_metadata={\1}}", text, flags=re.S)
    computations: dict[str, dict[str, Op]] = {}
    current: dict[str, Op] | None = None
    entry = ""
    for line in text.splitlines():
        if line[:1] not in (" ", ""):
            head = re.match(r"(ENTRY )?(%[\w.\-]+) \(", line)
            current = computations.setdefault(head[2], {}) if head and line.rstrip().endswith("{") else None
            entry = head[2] if head and head[1] else entry
        elif current is not None and (start := _OP.match(line)):
            rest = line[start.end() :]
            end = _closing_parenthesis(rest, 0) + 1 if rest[0] == "(" else rest.index(" ")
            result, rest = rest[:end], rest[end:].lstrip()
            opening = rest.index("(")
            inside = rest[opening : _closing_parenthesis(rest, opening) + 1]
            operands = tuple(re.findall(r"%[\w.\-]+", inside))
            current[start[2]] = Op(start[2], rest[:opening], result, operands, rest, bool(start[1]))
    if not entry:
        raise Unreadable("no ENTRY computation: expected the text of a compiled program")
    return Program(computations, entry)


def _closing_parenthesis(text: str, at: int) -> int:
    depth = 0
    for i in range(at, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return len(text) - 1


def executed_ops(program: Program) -> Iterator[tuple[str, Op, int]]:
    """(computation, op, how often it runs) of every op that a device executes; a fusion is one op.

    All branches of a conditional count.
    """

    def visit(name: str, times: int) -> Iterator[tuple[str, Op, int]]:
        for op in program.computations[name].values():
            if op.opcode == "while":
                yield from visit(op.attribute(r"body=(%[\w.\-]+)"), times * trip_count(program, name, op))
            elif op.opcode in ("call", "conditional"):
                for callees in re.findall(r"(?:to_apply|\w+_computations?)=(\{[^}]*\}|%[\w.\-]+)", op.text):
                    for callee in re.findall(r"%[\w.\-]+", callees):
                        yield from visit(callee, times)
            else:
                yield name, op, times

    return visit(program.entry, 1)


def trip_count(program: Program, computation: str, loop: Op) -> int:
    """Trip count of a loop whose counter goes up by a constant step, from one constant to below another.

    Raises:
      Unreadable: the loop has another form.
    """
    known = loop.attribute(r'known_trip_count\\?"?:\s*\{\\?"?n\\?"?:\s*\\?"?(\d+)')
    if known:
        return int(known)
    condition, body = (program.computations[loop.attribute(rf"{part}=(%[\w.\-]+)")] for part in ("condition", "body"))
    unreadable = Unreadable(f"{loop.name}: the trip count cannot be read from its condition")
    compared = next((op for op in _ops_inside(program, condition) if op.opcode == "compare"), None)
    if compared is None or "direction=LT" not in compared.text:
        raise unreadable
    root = next(op for op in condition.values() if op.is_root)
    carried = [op for op in map(condition.get, root.operands) if op and op.opcode == "get-tuple-element"]
    indices = [int(op.attribute(r"index=(\d+)")) for op in carried]
    bounds = _constants(program, condition, condition)
    given = program.computations[computation][loop.operands[0]]
    while given.opcode in ("copy", "bitcast", "optimization-barrier") and given.operands:
        given = program.computations[computation][given.operands[0]]
    start = given.operands if given.opcode == "tuple" else ()
    if not bounds and len(indices) == 2:  # the bound is a loop variable too: the one of the two that starts above 0
        begins = [_constants(program, program.computations[computation], [start[index]]) for index in indices]
        bounds = {value for values in begins for value in values if value > 0}
        indices = [index for index, values in zip(indices, begins, strict=True) if values != bounds]
    update = next(op for op in body.values() if op.is_root).operands[indices[0]] if len(indices) == 1 else ""
    while update in body and body[update].opcode == "copy":
        update = body[update].operands[0]
    steps = _constants(program, body, [update, *body[update].operands]) if update in body else set()
    if len(bounds) != 1 or len(steps) != 1:
        raise unreadable
    # The compiler may peel iterations off the start of a loop: the counter then starts above 0.
    begins_at = _constants(program, program.computations[computation], start[indices[0] : indices[0] + 1]) or {0}
    return math.ceil((bounds.pop() - begins_at.pop()) / steps.pop())


def _constants(program: Program, computation: dict[str, Op], names: Iterable[str]) -> set[int]:
    """Values of the named ops that are constants, directly, inside a fusion or through a copy."""
    found = set()
    for name in names:
        op = computation.get(name)
        if op is None:
            continue
        inside = program.computations.get(op.attribute(r"calls=(%[\w.\-]+)"), {})
        found |= _constants(program, inside, inside)
        if op.opcode in ("copy", "bitcast", "convert", "copy-start", "copy-done"):
            found |= _constants(program, computation, op.operands)
        value = op.attribute(r"^constant\((-?\d+)\)")
        found |= {int(value)} if value else set()
    return found


def _ops_inside(program: Program, computation: dict[str, Op]) -> Iterator[Op]:
    """The ops of a computation and of its fusions."""
    for op in computation.values():
        yield op
        called = op.attribute(r"calls=(%[\w.\-]+)")
        if called:
            yield from _ops_inside(program, program.computations[called])


# Arithmetic -----------------------------------------------------------------------------------------------------------


def flops(program: Program, experts: int = 0) -> float:
    """FLOPs of all matrix products of one execution, custom kernels included, loops multiplied out.

    Args:
      program: of one device.
      experts: number of experts of the model, over all devices; 0 = none. See `kernels`.
    """
    return sum(
        times
        * (op_flops(program, computation, op) + sum(each.flops for each in kernels(program, computation, op, experts)))
        for computation, op, times in executed_ops(program)
    )


def op_flops(program: Program, computation: str, op: Op) -> float:
    """FLOPs of the matrix products in one op, those inside a fusion included. Custom kernels are in `kernels`."""
    called = op.attribute(r"calls=(%[\w.\-]+)")
    if not called:
        return _product_flops(program, computation, op)
    return sum(op_flops(program, called, each) for each in program.computations.get(called, {}).values())


def _product_flops(program: Program, computation: str, op: Op) -> float:
    """2 x (entries of the result) x (length of the contraction), for a dot or a convolution; 0 for other ops.

    A ragged dot multiplies each row with the kernel of its group only, as many FLOPs as a plain dot of the same rows.
    """
    if op.opcode not in ("dot", "ragged-dot", "convolution"):
        return 0.0
    left, right = (arrays(program.computations[computation][name].result)[0].shape for name in op.operands[:2])
    result = arrays(op.result)[0].shape
    if op.opcode in ("dot", "ragged-dot"):
        dims, ragged = (
            op.attribute(rf"lhs_{name}_dims=\{{([\d,]*)\}}").split(",") for name in ("contracting", "ragged")
        )
        groups = result[0] if ragged[0] and ragged[0] in dims else 1  # each group contracts its own rows only
        return 2.0 * math.prod(result) * math.prod(left[int(d)] for d in dims if d) / groups
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.text)
    if labels is None:
        raise Unreadable(f"{op.name}: found a convolution without dim_labels")
    of_left, of_right, of_result = labels.groups()
    flops = 2.0 * right[of_right.index("i")] * result[of_result.index("f")] * result[of_result.index("b")]
    window = dict(pair.split("=") for pair in op.attribute(r"window=\{([^}]*)\}").split())
    for number, label in enumerate(c for c in of_left if c.isdigit()):
        option = {key: value.split("x")[number] for key, value in window.items()}
        flops *= _window_products(left[of_left.index(label)], result[of_result.index(label)], option)
    return flops / int(op.attribute(r"batch_group_count=(\d+)") or 1)


def _window_products(inputs: int, outputs: int, option: dict[str, str]) -> int:
    """Number of (window place, input) pairs multiplied along one dimension, without padding and dilation."""
    size, stride = int(option.get("size", 1)), int(option.get("stride", 1))
    low = int(option.get("pad", "0_0").split("_")[0])
    stretch, spread = int(option.get("lhs_dilate", 1)), int(option.get("rhs_dilate", 1))
    if size == 1 and stride == 1 and low == 0 and stretch == 1:
        return outputs
    starts = range(-low, -low + outputs * stride, stride)
    places = (start + k * spread for start in starts for k in range(size))
    return sum(place % stretch == 0 and 0 <= place // stretch < inputs for place in places)


def multiplies_8_bit(program: Program, computation: str, op: Op) -> bool:
    """Whether a matrix product in an op, or inside its fusion, has 8-bit operands."""
    called = op.attribute(r"calls=(%[\w.\-]+)")
    if called:
        return any(multiplies_8_bit(program, called, each) for each in program.computations.get(called, {}).values())
    if op.opcode not in ("dot", "convolution") or not all(
        name in program.computations[computation] for name in op.operands
    ):
        return False
    return all(
        ITEM_BYTES[arrays(program.computations[computation][name].result)[0].dtype] == 1 for name in op.operands[:2]
    )


# Custom kernels -------------------------------------------------------------------------------------------------------

# Custom calls without matrix products: they allocate, reinterpret or move arrays, or start and finish a transfer.
WITHOUT_PRODUCTS = frozenset(
    (
        "AllocateBuffer",
        "ApproxTopK",
        "AssumeGatherIndicesInBound",
        "AsyncCollectiveDone",
        "AsyncCollectiveStart",
        "ConcatBitcast",
        "GatherScatterIndicesBitpacked",
        "LayoutConstraint",
        "MoveToDevice",
        "MoveToHost",
        "PadToStatic",
        "PartialReduce",
        "PrepareAsyncCallDone",
        "PrepareAsyncCallStart",
        "SetBound",
        "Sharding",
        "SliceBitcast",
        "SliceToDynamic",
        "TopK",
        "annotate_device_placement",
    )
)


# A custom kernel without matrix products.
_ONLY_INDICES = "ragged-dot-metadata"


class Kernel(NamedTuple):
    """Cost of one call of a custom kernel, from the shapes of its operands.

    Attributes:
      name: such as 'splash_mha_fwd_segmented' or 'gmm'.
      flops: of its matrix products.
      bytes: HBM traffic by the kernel's own cost estimate; 0 = it has none.
    """

    name: str
    flops: float
    bytes: float


def kernels(program: Program, computation: str, op: Op, experts: int = 0, lanes: int = 1) -> list[Kernel]:
    """The custom kernels in an op or inside its fusion: splash attention and grouped matrix products.

    Grouped matrix products are megablox's, and those that XLA makes of a ragged dot.

    Args:
      program: of one device.
      computation: name of the op's computation.
      op: any op.
      experts: number of experts of the model, over all devices; 0 = none. If they are sharded, a grouped product has
        rows of other devices' experts, which it skips; the router is assumed to be balanced.
      lanes: the width of attention heads is padded to a multiple of this.
    """
    called = op.attribute(r"calls=(%[\w.\-]+)")
    if called:
        inside = program.computations.get(called, {})
        return [kernel for each in inside.values() for kernel in kernels(program, called, each, experts, lanes)]
    if op.opcode != "custom-call" or 'custom_call_target="tpu_custom_call"' not in op.text:
        return []
    name, ops = kernel_name(op), program.computations[computation]
    operands = [array for each in op.operands if each in ops for array in arrays(ops[each].result)]
    stated = float(op.attribute(r'"bytes_accessed":"(\d+)"') or 0)
    if name.startswith("splash"):
        return [Kernel(name, _attention_flops(op, name, operands, lanes), stated)]
    if name == _ONLY_INDICES:
        return [Kernel(name, 0.0, stated)]
    if name in ("gmm", "tgmm") or name.startswith("ragged-dot"):
        flops, groups = _grouped_flops(op, operands)
        share = groups / experts if experts else 1.0
        return [Kernel(name, share * flops, share * stated)]
    return []


def uncounted(program: Program) -> dict[str, int]:
    """Custom calls of unknown FLOPs: name -> how often they run, loops multiplied out."""
    found: dict[str, int] = {}

    def look(computation: str, op: Op, times: int) -> None:
        called = op.attribute(r"calls=(%[\w.\-]+)")
        for each in program.computations.get(called, {}).values():
            look(called, each, times)
        target = op.attribute(r'custom_call_target="([^"]*)"') if op.opcode == "custom-call" else ""
        if not target or target in WITHOUT_PRODUCTS or kernels(program, computation, op):
            return
        name = f"{target} {kernel_name(op)}" if target == "tpu_custom_call" else target
        found[name] = found.get(name, 0) + times

    for computation, op, times in executed_ops(program):
        look(computation, op, times)
    return found


def kernel_name(op: Op) -> str:
    """Name of a Pallas kernel: the last part of its op_name, such as 'gmm' of '.../jit(gmm)/pallas_call'."""
    path = op.attribute(r'op_name="([^"]*)"').removesuffix("/pallas_call")
    name = path.rpartition("/")[2] or re.sub(r"\.\d+$", "", op.name.removeprefix("%"))
    return re.sub(r"^jit\((.*)\)$", r"\1", name)


def _attention_flops(op: Op, name: str, operands: list[Array], lanes: int) -> float:
    """FLOPs of a splash attention kernel, from its queries [(rows,) heads, length, width] and its block schedule.

    Forward: two products (scores, weighted values). Backward: four products; recomputed scores do not count. The width
    is padded to a multiple of `lanes`. With context parallelism a device has more keys than queries, and an equal share
    of the causal mask.

    The schedule is int8 [.., query blocks, key blocks]. Its key axis (forward) or query axis (backward) is only as long
    as the mask needs: the full length for a causal mask, which is counted in blocks of 512; shorter for a sliding
    window, which is counted in the kernel's own blocks. Without a mask there is no schedule.
    """
    shapes = [
        array.shape
        for array in operands
        if array.dtype in ("bf16", "f32") and len(array.shape) in (3, 4) and array.shape[-1] >= 32
    ]
    if not shapes:
        raise Unreadable(f"{op.name}: found an attention kernel without queries: {op.text[:200]}")
    shapes.sort(key=len, reverse=True)  # with one row on the device the row axis is dropped
    *rows, length, width = shapes[0]
    keys = max(shape[-2] for shape in shapes if shape[-1] == width)
    width = math.ceil(width / lanes) * lanes
    is_backward = "dkv" in name
    products = 4 if is_backward else 2
    blocks = max(keys // 512, 1)
    share = (blocks + 1) / (2 * blocks)
    schedule = next((array.shape for array in operands if array.dtype == "s8" and len(array.shape) >= 2), None)
    block = int(op.attribute(rf"block_{'q_dkv' if is_backward else 'kv'}\W+(\d+)") or 0)
    if schedule is None:
        share = 1.0 if any(array.dtype == "s32" and len(array.shape) >= 2 for array in operands) else share
    elif block:
        across = (length if is_backward else keys) // block
        narrow, lines = (schedule[-2], schedule[-1]) if is_backward else (schedule[-1], schedule[-2])
        if narrow < across:
            share = sum(min(line * across // lines + 1, narrow) for line in range(lines)) / (lines * across)
    return products * 2.0 * math.prod(rows) * length * keys * width * share


def _grouped_flops(op: Op, operands: list[Array]) -> tuple[float, int]:
    """(FLOPs, number of groups) of a grouped matrix product; each row is multiplied with the kernel of one group.

    [rows, in] x [groups, in, out] (or [groups, out, in]) -> [rows, out]; and the gradient of the kernels, [rows, in]
    and [rows, out] -> [groups, in, out].
    """
    result = arrays(op.result)[0].shape
    floats = [array.shape for array in operands if array.dtype[0] in "bf" or array.dtype == "s8"]
    flat = [shape for shape in floats if len(shape) == 2]
    stacked = [shape for shape in floats if len(shape) == 3]
    if len(result) == 2 and len(flat) == len(stacked) == 1:
        return 2.0 * math.prod(flat[0]) * result[1], stacked[0][0]
    if len(result) == 3 and len(flat) == 2 and not stacked:
        return 2.0 * math.prod(flat[0]) * result[2], result[0]
    raise Unreadable(f"{op.name}: found a grouped product of unknown form, {floats} -> {result}")


# Time -----------------------------------------------------------------------------------------------------------------


def hbm_bytes(program: Program, computation: str, op: Op) -> float:
    """HBM traffic of an op in bytes: operands and result, or only the slices that it reads and writes of them."""
    ops = program.computations[computation]
    inside = program.computations.get(op.attribute(r"calls=(%[\w.\-]+)"), {}) if op.opcode == "fusion" else {}
    parameters = {
        int(each.attribute(r"parameter\((\d+)\)")): each for each in inside.values() if each.opcode == "parameter"
    }
    total = 0.0
    for number, name in enumerate(op.operands):
        whole = _hbm_size(ops[name].result) if name in ops else 0
        total += min(whole, _bytes_read(inside, parameters[number].name)) if number in parameters else whole
    written = _hbm_size(op.result)
    for each in inside.values():
        if each.opcode == "dynamic-update-slice":
            update = inside.get(each.operands[1])
            written -= _hbm_size(each.result) - (_hbm_size(update.result) if update else 0)
    return total + max(written, 0)


_IN_VMEM = re.compile(r"[a-z]\w*\[[\d,]*\]\{[^{}]*S\([1-9]\)[^{}]*\}")  # an array in vector memory


def _hbm_size(text: str) -> int:
    """Bytes of the arrays of a type that lie in HBM."""
    return sum(array.bytes for array in arrays(_IN_VMEM.sub("", text)))


def _bytes_read(inside: dict[str, Op], name: str) -> float:
    """Bytes that a fusion reads of its parameter `name`; inf if it reads all of it."""
    read = 0.0
    for each in inside.values():
        if name not in each.operands:
            continue
        if each.opcode in ("bitcast", "reshape", "copy", "convert", "transpose"):
            read = max(read, _bytes_read(inside, each.name))
        elif each.opcode in ("dynamic-slice", "slice", "gather") and each.operands[0] == name:
            read = max(read, _hbm_size(each.result))
        elif each.opcode == "dynamic-update-slice" and each.operands[0] == name:
            continue
        else:
            return math.inf
    return read
