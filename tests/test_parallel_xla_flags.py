"""lm/parallel/xla_flags.py: the TPU compiler's flags that training sets."""

import os

import pytest

from lm.parallel import xla_flags


@pytest.mark.parametrize(
    ("machine", "width", "given", "expected"),
    [
        ("v5litepod-16", 2048, "", ["windowed_einsum_mib=24", f"vmem_limit_kib={28 * 1024}"]),
        ("v5litepod-16", 4096, "", ["windowed_einsum_mib=24", f"vmem_limit_kib={46 * 1024}"]),
        ("v5p-64", 2048, "", ["windowed_einsum_mib=1000000", f"vmem_limit_kib={48 * 1024}"]),
        ("v6e-16", 4096, "", ["windowed_einsum_mib=1000000"]),
        ("", 2048, "", []),
        ("v5p-64", 2048, "--mine", ["--mine"]),
    ],
)
def test_training_sets_the_compilers_flags_unless_the_user_has(monkeypatch, machine, width, given, expected):
    environment = {"TPU_ACCELERATOR_TYPE": machine} | ({"LIBTPU_INIT_ARGS": given} if given else {})
    monkeypatch.setattr(os, "environ", environment)
    xla_flags.set_libtpu(width)
    found = environment.get("LIBTPU_INIT_ARGS", "").split()
    assert len(found) == len(expected)
    assert all(flag.endswith(end) for flag, end in zip(found, expected, strict=True))


def test_a_tpu_of_unknown_type_is_warned_about_in_one_line(monkeypatch, capsys, tmp_path):
    (tmp_path / "accel0").touch()
    for devices, environment, lines in (
        ("accel0", {}, 1),
        ("accel1", {}, 0),
        ("accel0", {"LIBTPU_INIT_ARGS": ""}, 0),
        ("accel0", {"TPU_ACCELERATOR_TYPE": "v5p-8"}, 0),
    ):
        monkeypatch.setattr(xla_flags, "TPU_DEVICES", (str(tmp_path / devices),))
        monkeypatch.setattr(os, "environ", environment)
        xla_flags.set_libtpu(2048)
        lines_printed = capsys.readouterr().err.splitlines()
        assert len(lines_printed) == lines and all("set TPU_ACCELERATOR_TYPE" in line for line in lines_printed)
