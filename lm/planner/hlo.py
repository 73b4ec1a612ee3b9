"""Reads a compiled program (HLO text): what it multiplies, what it moves, how often each loop runs.

What it sends is read by `lm.planner.collectives`.

XLA's own `cost_analysis` counts the body of a loop once, so that a scanned model looks as cheap as one layer; here
everything is multiplied out. Plain text in, numbers out: no JAX.
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
    """A program of which something that has to be counted is in a form that is not known here."""


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
      name: with its %.
      opcode: 'fusion', 'dot', ...
      result: its type as written, layouts included.
      operands: names.
      text: all from the opcode on.
      is_root: whether it is what its computation returns.
    """

    name: str
    opcode: str
    result: str
    operands: tuple[str, ...]
    text: str
    is_root: bool

    def attribute(self, pattern: str) -> str:
        """First group of a regular expression in the text, '' where it does not match."""
        found = re.search(pattern, self.text)
        return found[1] if found else ""


class Program(NamedTuple):
    """Computations by name, each name -> op in order, and which is run."""

    computations: dict[str, dict[str, Op]]
    entry: str


def arrays(text: str) -> list[Array]:
    """The arrays of a type, also of a tuple. Example: '(f32[2,3]{1,0}, s32[])' -> f32 (2, 3) and s32 ()."""
    found = _ARRAY.findall(re.sub(r"\{[^{}]*\}", "", text))
    return [Array(dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in found if dtype in ITEM_BYTES]


def parse(text: str) -> Program:
    """HLO text as `compiled.as_text()` gives it.

    Raises:
      Unreadable: there is no ENTRY.
    """
    # Pallas writes a kernel's block sizes over three lines.
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
            end = _closing(rest, 0) + 1 if rest[0] == "(" else rest.index(" ")
            result, rest = rest[:end], rest[end:].lstrip()
            opening = rest.index("(")
            inside = rest[opening : _closing(rest, opening) + 1]
            operands = tuple(re.findall(r"%[\w.\-]+", inside))
            current[start[2]] = Op(start[2], rest[:opening], result, operands, rest, bool(start[1]))
    if not entry:
        raise Unreadable("no ENTRY computation: expected the text of a compiled program")
    return Program(computations, entry)


def _closing(text: str, at: int) -> int:
    depth = 0
    for i in range(at, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return len(text) - 1


def walk(program: Program) -> Iterator[tuple[str, Op, int]]:
    """(computation, op, how often it runs) of every op that a device executes; fusions are one op.

    Of a conditional all branches count.
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


def trip_count(program: Program, where: str, loop: Op) -> int:
    """How often a loop of a fixed number of turns runs: its counter goes up from a constant to below one.

    Raises:
      Unreadable: it is no such loop.
    """
    known = loop.attribute(r'known_trip_count\\?"?:\s*\{\\?"?n\\?"?:\s*\\?"?(\d+)')
    if known:
        return int(known)
    condition, body = (program.computations[loop.attribute(rf"{part}=(%[\w.\-]+)")] for part in ("condition", "body"))
    unreadable = Unreadable(f"{loop.name}: how often it runs cannot be read from its condition")
    compared = next((op for op in _ops_inside(program, condition) if op.opcode == "compare"), None)
    if compared is None or "direction=LT" not in compared.text:
        raise unreadable
    root = next(op for op in condition.values() if op.is_root)
    carried = [op for op in map(condition.get, root.operands) if op and op.opcode == "get-tuple-element"]
    indices = [int(op.attribute(r"index=(\d+)")) for op in carried]
    bounds = _constants(program, condition, condition)
    given = program.computations[where][loop.operands[0]]
    while given.opcode in ("copy", "bitcast", "optimization-barrier") and given.operands:
        given = program.computations[where][given.operands[0]]
    start = given.operands if given.opcode == "tuple" else ()
    if not bounds and len(indices) == 2:  # the bound is carried too: of the two it is the one that starts above 0
        begins = [_constants(program, program.computations[where], [start[index]]) for index in indices]
        bounds = {value for values in begins for value in values if value > 0}
        indices = [index for index, values in zip(indices, begins, strict=True) if values != bounds]
    update = next(op for op in body.values() if op.is_root).operands[indices[0]] if len(indices) == 1 else ""
    while update in body and body[update].opcode == "copy":
        update = body[update].operands[0]
    steps = _constants(program, body, [update, *body[update].operands]) if update in body else set()
    if len(bounds) != 1 or len(steps) != 1:
        raise unreadable
    # The compiler may take turns out of a loop, to be done before it: the counter then starts above 0.
    begins_at = _constants(program, program.computations[where], start[indices[0] : indices[0] + 1]) or {0}
    return math.ceil((bounds.pop() - begins_at.pop()) / steps.pop())


def _constants(program: Program, computation: dict[str, Op], names: Iterable[str]) -> set[int]:
    """Values of those of the named ops that are constants, also inside a fusion or behind a copy."""
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
    """Its ops and those of its fusions."""
    for op in computation.values():
        yield op
        called = op.attribute(r"calls=(%[\w.\-]+)")
        if called:
            yield from _ops_inside(program, program.computations[called])


# Arithmetic -----------------------------------------------------------------------------------------------------------


def flops(program: Program, experts: int = 0) -> float:
    """FLOPs of all matrix products of one run, those of custom kernels included, loops multiplied out.

    Args:
      program: of one device.
      experts: of the model, over all devices; 0 = it has none. See `kernel`.
    """
    return sum(
        times * (op_flops(program, where, op) + sum(each.flops for each in kernels(program, where, op, experts)))
        for where, op, times in walk(program)
    )


def op_flops(program: Program, where: str, op: Op) -> float:
    """FLOPs of the matrix products in one op, those inside a fusion included. Custom kernels are in `kernels`."""
    called = op.attribute(r"calls=(%[\w.\-]+)")
    if not called:
        return _product_flops(program, where, op)
    return sum(op_flops(program, called, each) for each in program.computations.get(called, {}).values())


def _product_flops(program: Program, where: str, op: Op) -> float:
    """2 x (entries of the result) x (length of the contraction), of a dot or of a convolution that is one.

    A ragged dot multiplies each row with the kernel of its group only, as much as a plain dot of the same rows.
    """
    if op.opcode not in ("dot", "ragged-dot", "convolution"):
        return 0.0
    left, right = (arrays(program.computations[where][name].result)[0].shape for name in op.operands[:2])
    result = arrays(op.result)[0].shape
    if op.opcode in ("dot", "ragged-dot"):
        dims, ragged = (
            op.attribute(rf"lhs_{name}_dims=\{{([\d,]*)\}}").split(",") for name in ("contracting", "ragged")
        )
        groups = result[0] if ragged[0] and ragged[0] in dims else 1  # each group contracts its own rows only
        return 2.0 * math.prod(result) * math.prod(left[int(d)] for d in dims if d) / groups
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.text)
    if labels is None:
        raise Unreadable(f"{op.name}: a convolution without dim_labels")
    of_left, of_right, of_result = labels.groups()
    flops = 2.0 * right[of_right.index("i")] * result[of_result.index("f")] * result[of_result.index("b")]
    window = dict(pair.split("=") for pair in op.attribute(r"window=\{([^}]*)\}").split())
    for number, label in enumerate(c for c in of_left if c.isdigit()):
        option = {key: value.split("x")[number] for key, value in window.items()}
        flops *= _window_products(left[of_left.index(label)], result[of_result.index(label)], option)
    return flops / int(op.attribute(r"batch_group_count=(\d+)") or 1)


def _window_products(inputs: int, outputs: int, option: dict[str, str]) -> int:
    """How many pairs of a window's places and an input meet along one dimension, padding and dilation left out."""
    size, stride = int(option.get("size", 1)), int(option.get("stride", 1))
    low = int(option.get("pad", "0_0").split("_")[0])
    stretch, spread = int(option.get("lhs_dilate", 1)), int(option.get("rhs_dilate", 1))
    if size == 1 and stride == 1 and low == 0 and stretch == 1:
        return outputs
    starts = range(-low, -low + outputs * stride, stride)
    places = (start + k * spread for start in starts for k in range(size))
    return sum(place % stretch == 0 and 0 <= place // stretch < inputs for place in places)


def is_in_8_bits(program: Program, where: str, op: Op) -> bool:
    """Whether the products in an op, those inside a fusion included, multiply 8-bit numbers."""
    called = op.attribute(r"calls=(%[\w.\-]+)")
    if called:
        return any(is_in_8_bits(program, called, each) for each in program.computations.get(called, {}).values())
    if op.opcode not in ("dot", "convolution") or not all(name in program.computations[where] for name in op.operands):
        return False
    return all(ITEM_BYTES[arrays(program.computations[where][name].result)[0].dtype] == 1 for name in op.operands[:2])


# Custom kernels -------------------------------------------------------------------------------------------------------

# Custom calls that multiply nothing: they allocate, reinterpret or move arrays, or begin and end a transfer.
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


# Custom kernels of which the same is true.
_ONLY_INDICES = "ragged-dot-metadata"


class Kernel(NamedTuple):
    """What one call of a custom kernel costs, from the shapes of its operands.

    Attributes:
      name: as 'splash_mha_fwd_segmented' or 'gmm'.
      flops: of its matrix products.
      bytes: that it moves to and from HBM, by the kernel's own statement; 0 = it states none.
    """

    name: str
    flops: float
    bytes: float


def kernels(program: Program, where: str, op: Op, experts: int = 0, lanes: int = 1) -> list[Kernel]:
    """The custom kernels in one op, those inside a fusion included: splash attention, and grouped products, megablox's
    and those that XLA makes of a ragged dot.

    Args:
      program: of one device.
      where: the op's computation.
      op: any op.
      experts: of the model, over all devices; 0 = it has none. Where they are split over devices a grouped product has
        room for rows of other devices' experts, which it skips: the router is taken to use all experts alike.
      lanes: the width of attention heads is filled up to a multiple of this.
    """
    called = op.attribute(r"calls=(%[\w.\-]+)")
    if called:
        inside = program.computations.get(called, {})
        return [kernel for each in inside.values() for kernel in kernels(program, called, each, experts, lanes)]
    if op.opcode != "custom-call" or 'custom_call_target="tpu_custom_call"' not in op.text:
        return []
    name, known = kernel_name(op), program.computations[where]
    operands = [array for each in op.operands if each in known for array in arrays(known[each].result)]
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
    """Custom calls whose products nothing here counts: name -> how often they run, loops multiplied out."""
    found: dict[str, int] = {}

    def look(where: str, op: Op, times: int) -> None:
        called = op.attribute(r"calls=(%[\w.\-]+)")
        for each in program.computations.get(called, {}).values():
            look(called, each, times)
        target = op.attribute(r'custom_call_target="([^"]*)"') if op.opcode == "custom-call" else ""
        if not target or target in WITHOUT_PRODUCTS or kernels(program, where, op):
            return
        name = f"{target} {kernel_name(op)}" if target == "tpu_custom_call" else target
        found[name] = found.get(name, 0) + times

    for where, op, times in walk(program):
        look(where, op, times)
    return found


def kernel_name(op: Op) -> str:
    """Of a Pallas kernel: the last part of its op_name, as 'gmm' of '.../jit(gmm)/pallas_call'."""
    path = op.attribute(r'op_name="([^"]*)"').removesuffix("/pallas_call")
    name = path.rpartition("/")[2] or re.sub(r"\.\d+$", "", op.name.removeprefix("%"))
    return re.sub(r"^jit\((.*)\)$", r"\1", name)


def _attention_flops(op: Op, name: str, operands: list[Array], lanes: int) -> float:
    """Of a splash attention kernel, from its queries [(rows,) heads, length, width] and its schedule of blocks.

    Forward: scores and their sum over values; backward: the four products that these two give, without the scores that
    it makes again. The width is filled up to a multiple of `lanes`. There are more keys than queries where positions
    are split over devices, which share the causal mask out evenly.

    A schedule is int8 [.., blocks of queries, blocks of keys], of which the keys forward and the queries backward are
    as few as the mask allows: all of the row for a causal mask, counted in blocks of 512; fewer for a window, counted
    in the kernel's own blocks. A mask that hides nothing has none.
    """
    shapes = [
        array.shape
        for array in operands
        if array.dtype in ("bf16", "f32") and len(array.shape) in (3, 4) and array.shape[-1] >= 32
    ]
    if not shapes:
        raise Unreadable(f"{op.name}: an attention kernel without queries: {op.text[:200]}")
    shapes.sort(key=len, reverse=True)  # a device with one row drops that axis
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
    """Of a grouped product: FLOPs of all its rows, each with one group's kernel, and how many groups it has.

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
    raise Unreadable(f"{op.name}: a grouped product of shapes {floats} -> {result}, which is not known")


# Time -----------------------------------------------------------------------------------------------------------------


def hbm_bytes(program: Program, where: str, op: Op) -> float:
    """Bytes that an op moves to and from HBM: operands and result, or what is sliced of them and written into them."""
    known = program.computations[where]
    inside = program.computations.get(op.attribute(r"calls=(%[\w.\-]+)"), {}) if op.opcode == "fusion" else {}
    parameters = {
        int(each.attribute(r"parameter\((\d+)\)")): each for each in inside.values() if each.opcode == "parameter"
    }
    total = 0.0
    for number, name in enumerate(op.operands):
        whole = _far_bytes(known[name].result) if name in known else 0
        total += min(whole, _read_of(inside, parameters[number].name)) if number in parameters else whole
    written = _far_bytes(op.result)
    for each in inside.values():
        if each.opcode == "dynamic-update-slice":
            update = inside.get(each.operands[1])
            written -= _far_bytes(each.result) - (_far_bytes(update.result) if update else 0)
    return total + max(written, 0)


_NEAR = re.compile(r"[a-z]\w*\[[\d,]*\]\{[^{}]*S\([1-9]\)[^{}]*\}")  # an array in the chip's vector memory


def _far_bytes(text: str) -> int:
    return sum(array.bytes for array in arrays(_NEAR.sub("", text)))


def _read_of(inside: dict[str, Op], name: str) -> float:
    """Bytes that a fusion reads of its parameter `name`."""
    read = 0.0
    for each in inside.values():
        if name not in each.operands:
            continue
        if each.opcode in ("bitcast", "reshape", "copy", "convert", "transpose"):
            read = max(read, _read_of(inside, each.name))
        elif each.opcode in ("dynamic-slice", "slice", "gather") and each.operands[0] == name:
            read = max(read, _far_bytes(each.result))
        elif each.opcode == "dynamic-update-slice" and each.operands[0] == name:
            continue
        else:
            return math.inf
    return read
