"""lm/traffic.py: who talks to whom, along which axes of the mesh, in the forms in which HLO writes it."""

import pytest

from lm import aot, chips, hlo, traffic

MESH = {"dcn_data": 1, "data": 2, "fsdp": 4, "tensor": 1}


def op(text):
    """An all-reduce with these groups."""
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
def test_groups_of_devices_and_the_axes_they_run_along(written, groups, axes):
    found = traffic.device_groups(op(written))
    assert found == groups
    assert traffic.axes_of(found, MESH) == axes


def test_axes_of_a_mesh_that_is_not_known_or_not_this_one_are_left_out():
    assert traffic.axes_of([[0, 1]], {}) == ""
    assert traffic.axes_of([[0, 9]], MESH) == ""


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


def test_what_slices_send_each_other_is_counted_and_waited_for():
    program = hlo.parse(SLICES)
    (found,) = traffic.collectives(program, {"dcn_data": 2, "data": 1, "fsdp": 4})
    bytes_sent = 2 * 96 * 8 * 128
    assert found == ("all-reduce", "dcn_data", 2, "bf16", True, 1, bytes_sent)
    assert traffic.in_table([found, found]) == {
        "all-reduce bf16 over dcn_data (2) async": {"times": 2, "bytes": 2 * bytes_sent}
    }
    guess = aot.estimate(program, chips.topology("v5e:2x2", 2))
    # A ring of two passes the bytes twice, half of them each time; what is computed meanwhile is not waited for.
    passes = 2 * (1 / 2)
    copied = 2 * bytes_sent / 819e9  # read and written; less than the compiler's 10 us
    assert guess.other == pytest.approx(1e3 * copied)
    assert guess.between == pytest.approx(1e3 * (passes * bytes_sent / 3.125e9 - copied))
    assert guess.exposed == guess.hidden == 0
