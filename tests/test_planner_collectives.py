"""lm/planner/collectives.py: device groups, mesh axes and bytes of collectives in every notation of HLO."""

import pytest

from lm.planner import collectives, hlo, train_compile
from lm.planner import topology as topology_lib

MESH = {"dcn_data": 1, "data": 2, "fsdp": 4, "tensor": 1}


def op(text):
    """An all-reduce with the given device groups."""
    return hlo.Op("%x", "all-reduce", "f32[8]", ("%y",), f"all-reduce(%y), channel_id=1, {text}, to_apply=%add", False)


@pytest.mark.parametrize(
    ("written", "groups", "axes"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", [[0, 1, 2, 3], [4, 5, 6, 7]], "fsdp"),
        ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]], "fsdp"),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]], "data"),
        ("replica_groups=[1,8]<=[8]", [[*range(8)]], "data+fsdp"),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]], "fsdp"),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, x=1", [[0, 4], [1, 5], [2, 6], [3, 7]], "data"),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", [[0, 4], [1, 5], [2, 6], [3, 7]], "data"),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", [[0, 1, 2, 3], [4, 5, 6, 7]], "fsdp"),
        ("source_target_pairs={{0,1},{1,2},{2,3},{3,0}}", [[0, 1], [1, 2], [2, 3], [3, 0]], "fsdp"),
        ("dimensions={0}", [], ""),
    ],
)
def test_device_groups_and_the_mesh_axes_that_they_span(written, groups, axes):
    found = collectives.device_groups(op(written))
    assert found == groups
    assert collectives.axes_of(found, MESH) == axes


def test_axes_are_empty_if_the_mesh_is_unknown_or_too_small():
    assert collectives.axes_of([[0, 1]], {}) == ""
    assert collectives.axes_of([[0, 9]], MESH) == ""


SLICES = """HloModule m
ENTRY %main (a: bf16[96,8,128]) -> bf16[96,8,128] {
  %a = bf16[96,8,128]{2,1,0} parameter(0)
  %token = token[] after-all()
  %send.1 = (bf16[96,8,128]{2,1,0}, u32[], token[]) send(%a, %token), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv.1 = (bf16[96,8,128]{2,1,0}, u32[], token[]) recv(%token), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"}
  %fusion.1 = bf16[96,8,128]{2,1,0} copy(%a), backend_config={"estimated_cycles":"15000"}
  %done.1 = (bf16[96,8,128]{2,1,0}, token[]) recv-done(%recv.1), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
  ROOT %out = bf16[96,8,128]{2,1,0} get-tuple-element(%done.1), index=0
}
"""  # noqa: E501


def test_transfers_between_slices_are_counted_and_waited_for():
    program = hlo.parse(SLICES)
    (found,) = collectives.collectives(program, {"dcn_data": 2, "data": 1, "fsdp": 4})
    bytes_sent = 2 * 96 * 8 * 128
    assert found == ("all-reduce", "dcn_data", 2, "bf16", True, 1, bytes_sent)
    assert collectives.summarize([found, found]) == {
        "all-reduce bf16 over dcn_data (2) async": {"times": 2, "bytes": 2 * bytes_sent}
    }
    estimate = train_compile.estimate(program, topology_lib.parse("v5e:2x2", 2))
    # A ring of two sends half of the bytes twice; the part that overlaps with computation is not waited for.
    passes = 2 * (1 / 2)
    copied = 2 * bytes_sent / 819e9  # read and written; shorter than the compiler's 10 us
    assert estimate.other == pytest.approx(1e3 * copied)
    assert estimate.between == pytest.approx(1e3 * (passes * bytes_sent / 3.125e9 - copied))
    assert estimate.exposed == estimate.hidden == 0


OFFLOADED = """HloModule m
%condition (c: (s32[], bf16[4,8,128], bf16[8,128])) -> pred[] {
  ROOT %less = pred[] constant(true)
}

%body (p: (s32[], bf16[4,8,128], bf16[8,128])) -> (s32[], bf16[4,8,128], bf16[8,128]) {
  %p = (s32[], bf16[4,8,128]{2,1,0:T(8,128)(2,1)S(5)}, bf16[8,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %kept = bf16[4,8,128]{2,1,0:T(8,128)(2,1)S(5)} get-tuple-element(%p), index=1
  %x = bf16[8,128]{1,0} get-tuple-element(%p), index=2
  %piece = bf16[1,8,128]{2,1,0} bitcast(%x)
  %up.1 = ((bf16[4,8,128]{2,1,0:T(8,128)(2,1)S(5)}, bf16[1,8,128]{2,1,0}, s32[]), bf16[4,8,128]{2,1,0:T(8,128)(2,1)S(5)}, u32[]{:S(2)}) dynamic-update-slice-start(%kept, %piece, %i)
  %other = bf16[8,128]{1,0} copy(%x), backend_config={"estimated_cycles":"15"}
  %up.2 = bf16[4,8,128]{2,1,0:T(8,128)(2,1)S(5)} dynamic-update-slice-done(%up.1)
  %down.1 = ((bf16[4,8,128]{2,1,0:T(8,128)(2,1)S(5)}, s32[]), bf16[1,8,128]{2,1,0}, u32[]{:S(2)}) dynamic-slice-start(%kept, %i), dynamic_slice_sizes={1,8,128}
  %down.2 = bf16[1,8,128]{2,1,0} dynamic-slice-done(%down.1)
  ROOT %out = (s32[], bf16[4,8,128]{2,1,0:S(5)}, bf16[8,128]{1,0}) tuple(%i, %up.2, %other)
}

ENTRY %main (s: (s32[], bf16[4,8,128], bf16[8,128])) -> bf16[4,8,128] {
  %s = (s32[], bf16[4,8,128]{2,1,0:S(5)}, bf16[8,128]{1,0}) parameter(0)
  %loop = (s32[], bf16[4,8,128]{2,1,0:S(5)}, bf16[8,128]{1,0}) while(%s), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"4"}}
  %all = bf16[4,8,128]{2,1,0:T(8,128)(2,1)S(5)} get-tuple-element(%loop), index=1
  ROOT %back = bf16[4,8,128]{2,1,0} copy(%all)
}
"""  # noqa: E501


@pytest.mark.parametrize(("chip", "bandwidth"), [("v5e:2x2", 1.6e10), ("v6e:2x2", 3.2e10)])
def test_copies_to_and_from_host_memory_are_counted_and_waited_for(chip, bandwidth):
    """Four slices of an array are copied to the host and back, and the whole array back at the end."""
    program, size = hlo.parse(OFFLOADED), 2 * 8 * 128
    assert collectives.host_copies(program) == {"to_host": 4 * size, "from_host": 4 * size + 4 * size}
    topology = topology_lib.parse(chip, 1)
    estimate = train_compile.estimate(program, topology)
    copied = 4 * min(
        15 / topology.chip.clock, 2 * size / topology.chip.hbm_bandwidth
    )  # overlaps with the copies to the host
    assert estimate.other == pytest.approx(1e3 * copied)
    assert estimate.host == pytest.approx(1e3 * (12 * size / bandwidth - copied)) and estimate.total > estimate.host
    assert estimate.host_hidden == pytest.approx(1e3 * copied)
    assert collectives.host_copies(hlo.parse(SLICES)) == {"to_host": 0, "from_host": 0}


@pytest.mark.parametrize(
    ("name", "places", "links"),
    [
        ("v5e:16x16", [(x, y, 0) for x in range(16) for y in range(16)], 4),  # all of it, two rings
        ("v5e:16x16", [(x, 3, 0) for x in range(16)], 2),  # a ring
        ("v5e:16x16", [(x, 3, 0) for x in range(8)], 1),  # a part of a ring
        ("v5e:16x16", [(x, 3, 0) for x in range(0, 16, 2)], 1 / 2),  # every other chip: two groups share the links
        ("v5e:16x16", [(x, y, 0) for x in range(16) for y in (0, 8)], 2 + 1 / 8),
        ("v5e:4x4", [(x, y, 0) for x in range(4) for y in range(4)], 2),
        ("v5p:2x4x4", [(x, y, z) for x in range(2) for y in range(4) for z in range(4)], 3),
        ("v5p:2x4x4", [(0, y, 1) for y in range(4)], 1),
        ("v6e:4x4", [(2, 2, 0)], 1),
    ],
)
def test_links_of_a_group_of_chips(name, places, links):
    assert topology_lib.parse(name, 1).links_of(places) == links


def test_a_collective_along_a_part_of_a_ring_is_slower():
    text = """HloModule m
ENTRY %main (a: bf16[1024,128]) -> bf16[8192,128] {
  %a = bf16[1024,128]{1,0} parameter(0)
  ROOT %g = bf16[8192,128]{1,0} all-gather(%a), replica_groups=[32,8]<=[256], dimensions={0}
}
"""
    topology, mesh = topology_lib.parse("v6e:16x16", 1), {"dcn_data": 1, "data": 1, "fsdp": 32, "expert": 8}
    sent = 1e3 * 2 * 8192 * 128 * 7 / 8 / 9e10
    for links in (0.5, 1.0, 2.0):
        estimate = train_compile.estimate(hlo.parse(text), topology, mesh=mesh, links={"expert": links})
        assert estimate.exposed == pytest.approx(sent / links)
    assert train_compile.estimate(hlo.parse(text), topology).exposed == pytest.approx(sent)
