"""lm/planner/hlo.py: FLOPs, loop trips and traffic of compiled programs, against figures computed by hand."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from lm.config import MeshConfig
from lm.parallel.mesh import make_mesh
from lm.planner import collectives, hlo

LAYERS, ROWS, WIDTH, INNER = 5, 16, 32, 48


def scanned(params, x):
    """`LAYERS` times two matrix products."""

    def body(x, layer):
        return jnp.tanh(jnp.tanh(x @ layer["up"]) @ layer["down"]), None

    return jax.lax.scan(body, x, params)[0].sum()


def shapes():
    """Abstract arguments of `scanned`."""
    kernel = jax.ShapeDtypeStruct((LAYERS, WIDTH, INNER), jnp.float32)
    other = jax.ShapeDtypeStruct((LAYERS, INNER, WIDTH), jnp.float32)
    return {"up": kernel, "down": other}, jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)


@pytest.mark.parametrize(("fn", "passes"), [(scanned, 1), (jax.grad(scanned), 3)])
def test_flops_of_a_scan_count_every_layer(fn, passes):
    program = hlo.parse(jax.jit(fn).lower(*shapes()).compile().as_text())
    once = 2 * 2 * ROWS * WIDTH * INNER  # two products a layer
    # The gradient of the first layer's input is not needed, but the scan computes it too.
    assert hlo.flops(program) == passes * LAYERS * once


def test_a_loop_without_a_fixed_trip_count_is_refused():
    def fn(x):
        return jax.lax.while_loop(lambda x: x.sum() < 100, lambda x: x @ x, x)

    program = hlo.parse(jax.jit(fn).lower(jnp.ones((4, 4))).compile().as_text())
    with pytest.raises(ValueError, match="trip count"):
        hlo.flops(program)


@pytest.mark.parametrize("branches", [2, 3])
def test_all_branches_of_a_conditional_count(branches):
    def fn(index, x):
        return jax.lax.switch(index, [lambda x, n=n: jnp.tanh(x @ x) * n for n in range(1, branches + 1)], x)

    text = jax.jit(fn).lower(0, jnp.ones((4, 4))).compile().as_text()
    assert " conditional(" in text
    assert hlo.flops(hlo.parse(text)) == branches * 2 * 4**3


@pytest.mark.parametrize(("queries", "blocks"), [(4096, 8), (1024, 8)])
@pytest.mark.parametrize(("kernel", "products"), [("mha_fwd", 2), ("mha_dkv", 4)])
def test_flops_of_an_attention_kernel(queries, blocks, kernel, products):
    """Causal: of 8 x 8 blocks of 512 those on and below the diagonal; a quarter of them under context parallelism."""
    text = f"""
ENTRY %main (q: bf16[8,{queries},64], k: bf16[2,4096,64]) -> bf16[8,{queries},64] {{
  %q = bf16[8,{queries},64]{{2,1,0}} parameter(0)
  %k = bf16[2,4096,64]{{2,1,0}} parameter(1)
  %lse = f32[8,8,{queries}]{{2,1,0}} broadcast(%q)
  ROOT %out = bf16[8,{queries},64]{{2,1,0}} custom-call(%q, %k, %k, %lse), custom_call_target="tpu_custom_call", metadata={{op_name="splash_{kernel}"}}
}}
"""  # noqa: E501
    below = 8 * 512**2 * blocks * (blocks + 1) / 2 * queries / 4096
    assert hlo.flops(hlo.parse(text)) == products * 2 * 64 * below


def kernel(name, operands, result, more=""):
    """One call of a custom kernel in a loop of 3 trips inside a loop of 2, like layers inside micro-batches."""
    names = [f"%a.{i}" for i in range(len(operands))]
    parameters = "\n".join(
        f"  {n} = {shape} parameter({i})" for i, (n, shape) in enumerate(zip(names, operands, strict=True))
    )
    call = f'custom-call({", ".join(names)}), custom_call_target="tpu_custom_call"{more}'
    three, two = ('backend_config={"known_trip_count":{"n":"' + n + '"}}' for n in "32")
    return f"""
%condition (c: s32[]) -> pred[] {{
  ROOT %less = pred[] constant(true)
}}

%inner (p: s32[]) -> s32[] {{
  %p = s32[] parameter(0)
{parameters}
  %call.1 = {result} {call}, metadata={{op_name="jit(train_step)/while/body/layers/{name}/pallas_call"}}
  ROOT %next = s32[] copy(%p)
}}

%outer (q: s32[]) -> s32[] {{
  %q = s32[] parameter(0)
  ROOT %loop.1 = s32[] while(%q), condition=%condition, body=%inner, {three}
}}

ENTRY %main (x: s32[]) -> s32[] {{
  %x = s32[] parameter(0)
  ROOT %loop.2 = s32[] while(%x), condition=%condition, body=%outer, {two}
}}
"""


@pytest.mark.parametrize(("rows", "inner", "outer", "groups"), [(1024, 256, 512, 8), (512, 128, 384, 3)])
def test_flops_of_grouped_products_multiply_each_row_with_one_kernel(rows, inner, outer, groups):
    """megablox's (rows by kernels, by transposed kernels, and the kernels' gradient), and XLA's for a ragged dot."""
    sizes = ["s32[9]{0}", "s32[71]{0}", "s32[71]{0}", "s32[1]{0}"]
    into, out = f"bf16[{rows},{inner}]{{1,0}}", f"bf16[{rows},{outer}]{{1,0}}"
    widening, narrowing = (f"bf16[{groups},{a},{b}]{{2,1,0}}" for a, b in ((inner, outer), (outer, inner)))
    calls = [("jit(gmm)", [into, widening], out), ("jit(gmm)", [into, narrowing], out)]
    calls += [("jit(tgmm)", [into, out], widening), ("ragged-dot-none", [into, widening], out)]
    for name, operands, result in calls:
        program = hlo.parse(kernel(name, sizes + operands, result))
        once = 2 * rows * inner * outer
        assert hlo.flops(program) == hlo.flops(program, groups) == 2 * 3 * once, name
        assert hlo.flops(program, 4 * groups) == 2 * 3 * once / 4, "rows of other devices' experts are skipped"
        assert hlo.uncounted(program) == {}


def test_a_grouped_product_of_unknown_form_is_an_error():
    with pytest.raises(ValueError, match="a grouped product of unknown form"):
        hlo.flops(hlo.parse(kernel("jit(gmm)", ["bf16[8,8]{1,0}"], "bf16[8,8]{1,0}")))


def test_custom_calls_of_unknown_flops_are_listed():
    program = hlo.parse(kernel("jit(my_kernel)", ["bf16[8,8]{1,0}"], "bf16[8,8]{1,0}"))
    assert hlo.flops(program) == 0 and hlo.uncounted(program) == {"tpu_custom_call my_kernel": 6}
    indices = hlo.parse(kernel("ragged-dot-metadata", ["s32[8]{0}"], "s32[24]{0}"))
    assert hlo.flops(indices) == 0 and hlo.uncounted(indices) == {}
    for target, counted in (("Eigh", False), ("AllocateBuffer", True), ("ConcatBitcast", True)):
        text = kernel("x", ["f32[8,8]{1,0}"], "f32[8,8]{1,0}").replace("tpu_custom_call", target)
        assert hlo.uncounted(hlo.parse(text)) == ({} if counted else {target: 6})


def test_a_kernel_inside_a_fusion_counts():
    text = """
%fused (p: bf16[512,128], k: bf16[4,128,256]) -> bf16[512,256] {
  %p = bf16[512,128]{1,0} parameter(0)
  %k = bf16[4,128,256]{2,1,0} parameter(1)
  ROOT %c = bf16[512,256]{1,0} custom-call(%p, %k), custom_call_target="tpu_custom_call", metadata={op_name="a/jit(gmm)/pallas_call"}
}

ENTRY %main (p: bf16[512,128], k: bf16[4,128,256]) -> bf16[512,256] {
  %p = bf16[512,128]{1,0} parameter(0)
  %k = bf16[4,128,256]{2,1,0} parameter(1)
  ROOT %f = bf16[512,256]{1,0} fusion(%p, %k), kind=kCustom, calls=%fused
}
"""  # noqa: E501
    assert hlo.flops(hlo.parse(text)) == 2 * 512 * 128 * 256
    assert hlo.uncounted(hlo.parse(text.replace("jit(gmm)", "other"))) == {"tpu_custom_call other": 1}


BLOCKS = """, frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512, \\"block_kv\\": 512, \\"block_q_dkv\\": 512, \\"block_kv_dkv\\": 512}"
}}"""


@pytest.mark.parametrize("phase", ["fwd", "dkv"])
@pytest.mark.parametrize(("window", "width"), [(512, 2), (1024, 3), (0, 8), (None, None)])
def test_attention_kernels_count_the_blocks_that_their_mask_touches(phase, window, width):
    """Rows of 4,096 in blocks of 512, against the mask itself; window 0 = causal only, None = no mask."""
    length, block = 4096, 512
    small, tile = length // 8, block // 8  # the same mask at an eighth of the size
    query, key = np.arange(small)[:, None], np.arange(small)[None, :]
    visible = np.ones((small, small), bool) if window is None else key <= query
    if window:
        visible &= query - key < window // 8
    touched = visible.reshape(small // tile, tile, small // tile, tile).any(axis=(1, 3)).sum()
    schedule = (width, 8) if phase == "dkv" else (8, width)
    operands = [] if window is None else [f"s8[1,{schedule[0]},{schedule[1]}]{{2,1,0}}"] * 2
    operands += [f"bf16[2,{length},64]{{2,1,0}}"] * 3 + [f"s32[{length},128]{{1,0}}", f"s32[8,{length}]{{1,0}}"]
    text = kernel(f"splash_mha_{phase}_segmented", operands, f"bf16[2,{length},64]{{2,1,0}}", BLOCKS)
    products = {"fwd": 2, "dkv": 4}[phase]
    assert hlo.flops(hlo.parse(text)) == 2 * 3 * products * 2 * 2 * 64 * block**2 * touched


@pytest.mark.parametrize("is_gradient", [False, True])
def test_flops_of_a_ragged_dot(is_gradient):
    """Both forms that `jax.lax.ragged_dot` lowers to: rows by their groups' kernels, and the kernels' gradient."""
    left, right = "bf16[96,32]{1,0}", "bf16[96,48]{1,0}" if is_gradient else "bf16[4,32,48]{2,1,0}"
    result = "bf16[4,32,48]{2,1,0}" if is_gradient else "bf16[96,48]{1,0}"
    over = 0 if is_gradient else 1
    dims = f"lhs_contracting_dims={{{over}}}, rhs_contracting_dims={{{over}}}, lhs_ragged_dims={{0}}"
    text = f"""
ENTRY %main (x: bf16[96,32]) -> {result.partition("{")[0]} {{
  %x = {left} parameter(0)
  %y = {right} parameter(1)
  %g = s32[4]{{0}} parameter(2)
  ROOT %r = {result} ragged-dot(%x, %y, %g), {dims}{"" if is_gradient else ", rhs_group_dims={0}"}
}}
"""
    assert hlo.flops(hlo.parse(text)) == 2 * 96 * 32 * 48


@pytest.mark.parametrize(("begin", "step", "trips"), [(0, 1, 10), (0, 3, 4), (0, 10, 1), (1, 1, 9), (1, 4, 3)])
def test_a_loop_counter_may_start_above_0_and_have_a_step_above_1(begin, step, trips):
    def fn(x):
        return jax.lax.while_loop(lambda c: c[0] < 10, lambda c: (c[0] + step, jnp.tanh(c[1] @ c[1])), (begin, x))[1]

    text = jax.jit(fn).lower(jnp.ones((4, 4))).compile().as_text()
    # With XLA's own trip count and without; without it only where the start is a constant in the CPU's program.
    without = [re.sub(r'"known_trip_count":\{[^}]*\},?', "", text)] if begin == 0 else []
    for form in (text, *without):
        assert hlo.flops(hlo.parse(form)) == trips * 2 * 4**3


def test_collectives_inside_a_loop_are_counted_with_its_trips():
    """ZeRO-3 by hand: an all-gather of the kernel in each layer, and one all-reduce at the end."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))

    def fn(kernels, x):
        def body(x, kernel):
            return jnp.tanh(x @ jax.lax.with_sharding_constraint(kernel, PartitionSpec())), None

        return jax.lax.scan(body, x, kernels)[0].sum()

    shardings = [jax.NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((None, "fsdp"), ("fsdp",))]
    kernels = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32, sharding=shardings[0])
    x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32, sharding=shardings[1])
    with jax.set_mesh(mesh):
        program = hlo.parse(jax.jit(fn).lower(kernels, x).compile().as_text())
    found = {
        (each.kind, each.axes, each.devices, each.times, each.bytes)
        for each in collectives.collectives(program, dict(mesh.shape))
    }
    assert found == {("all-gather", "fsdp", 8, LAYERS, 4 * WIDTH**2), ("all-reduce", "fsdp", 8, 1, 4)}


LOOP = """HloModule m, is_scheduled=true

%condition.1 (p.1: (s32[], f32[4])) -> pred[] {
  %p.1 = (s32[], f32[4]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %n.1 = s32[] constant(3)
  ROOT %less.1 = pred[] compare(%i.1, %n.1), direction=LT
}

%body.1 (p.2: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p.2 = (s32[], f32[4]{0}) parameter(0)
  %i.2 = s32[] get-tuple-element(%p.2), index=0
  %x.2 = f32[4]{0} get-tuple-element(%p.2), index=1
  %one.2 = s32[] constant(1)
  %next.2 = s32[] add(%i.2, %one.2)
  %copy.2 = s32[] copy(%next.2)
  ROOT %both.2 = (s32[], f32[4]{0}) tuple(%copy.2, %x.2)
}

ENTRY %main (x: f32[4]) -> (s32[], f32[4]) {
  %x = f32[4]{0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[4]{0}) tuple(%zero, %x)
  ROOT %loop = (s32[], f32[4]{0}) while(%start), condition=%condition.1, body=%body.1
}
"""


def test_a_loop_counter_may_be_copied():
    program = hlo.parse(LOOP)
    assert hlo.trip_count(program, "%main", program.computations["%main"]["%loop"]) == 3


SCATTERED = """HloModule m, is_scheduled=true

%all-reduce-scatter.1 (input.1: bf16[8,64]) -> bf16[2,64] {
  %input.1 = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.1 = bf16[8,64]{1,0:T(8,128)(2,1)} all-reduce(%input.1), replica_groups={{0,1,2,3}}, to_apply=%add.1
  %place.1 = u32[] constant(0)
  ROOT %mine.1 = bf16[2,64]{1,0} dynamic-slice(%all-reduce.1, %place.1, %place.1), dynamic_slice_sizes={2,64}
}

ENTRY %main (a: bf16[8,64]) -> bf16[2,64] {
  %a = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %fusion.1 = bf16[2,64]{1,0:T(8,128)(2,1)} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_an_all_reduce_whose_result_is_sliced_is_a_reduce_scatter():
    for text, kind in ((SCATTERED, "reduce-scatter"), (SCATTERED.replace("dynamic-slice(", "copy("), "all-reduce")):
        (found,) = collectives.collectives(hlo.parse(text), {"fsdp": 4})
        assert found == (kind, "fsdp", 4, "bf16", False, 1, 2 * 8 * 64)


def test_types_are_parsed_with_and_without_layouts():
    found = hlo.arrays("(f32[2,3]{1,0:T(8,128)S(1)}, /*index=1*/ bf16[4], s32[], token[])")
    assert found == [hlo.Array("f32", (2, 3)), hlo.Array("bf16", (4,)), hlo.Array("s32", ())]
    assert [array.bytes for array in found] == [24, 8, 4]


TPU = """HloModule m, is_scheduled=true

%fused.1 (p.0: bf16[24,64,128], p.1: s32[]) -> bf16[64,128] {
  %p.0 = bf16[24,64,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p.1 = s32[]{:T(128)S(6)} parameter(1)
  ROOT %slice.1 = bf16[64,128]{1,0:T(8,128)(2,1)} dynamic-slice(%p.0, %p.1), dynamic_slice_sizes={1,64,128}
}

ENTRY %main (a: bf16[24,64,128], b: s32[]) -> bf16[64,128] {
  %a = bf16[24,64,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %b = s32[]{:T(128)S(6)} parameter(1)
  %conv.1 = f32[64,256]{1,0:T(8,128)} convolution(%x, %y), window={size=1}, dim_labels=0bf_0io->0bf
  ROOT %fusion.1 = bf16[64,128]{1,0:T(8,128)(2,1)} fusion(%a, %b), kind=kLoop, calls=%fused.1
}
"""


def test_a_fusion_reads_only_the_slice_that_it_takes_of_an_array():
    program = hlo.parse(TPU)
    op = program.computations["%main"]["%fusion.1"]
    assert hlo.hbm_bytes(program, "%main", op) == 2 * (2 * 64 * 128)  # read and written
    assert hlo.op_flops(program, "%main", op) == 0
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.parse("not a program")
