"""lm/parallel/xla_flags.py: the TPU compiler's flags that training sets."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lm.parallel import xla_flags

ROOT = Path(__file__).resolve().parents[1]


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
    monkeypatch.setattr(xla_flags, "GIVEN", environment.get("LIBTPU_INIT_ARGS"))
    xla_flags.set_libtpu(width)
    found = environment.get("LIBTPU_INIT_ARGS", "").split()
    assert len(found) == len(expected)
    assert all(flag.endswith(end) for flag, end in zip(found, expected, strict=True))


@pytest.mark.parametrize(("given", "ours"), [(None, True), ("", False), ("--xla_mine=1", False)])
@pytest.mark.parametrize("first", ["lm.main", "tools.bench"])
def test_the_flag_that_jax_adds_on_a_tpu_vm_is_not_taken_for_the_users(first, given, ours):
    """Recipes import JAX while flags are parsed, and with a TPU JAX then writes LIBTPU_INIT_ARGS."""
    program = f"""if True:
        import os, sys, {first}
        assert "jax" not in sys.modules
        jaxs = "--xla_tpu_use_enhanced_launch_barrier=true"
        os.environ["LIBTPU_INIT_ARGS"] = os.environ.get("LIBTPU_INIT_ARGS", "") + " " + jaxs
        from lm.parallel import xla_flags
        xla_flags.set_libtpu(2048)
        print(os.environ["LIBTPU_INIT_ARGS"])"""
    environment = {key: value for key, value in os.environ.items() if key != "LIBTPU_INIT_ARGS"}
    environment |= {"TPU_ACCELERATOR_TYPE": "v5litepod-16"} | ({} if given is None else {"LIBTPU_INIT_ARGS": given})
    done = subprocess.run([sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True)
    found = done.stdout.split()
    assert "--xla_tpu_use_enhanced_launch_barrier=true" in found, done.stderr
    assert ("--xla_jf_spmd_threshold_for_windowed_einsum_mib=24" in found) == ours
    assert ("--xla_mine=1" in found) == (given == "--xla_mine=1")


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
        monkeypatch.setattr(xla_flags, "GIVEN", environment.get("LIBTPU_INIT_ARGS"))
        xla_flags.set_libtpu(2048)
        lines_printed = capsys.readouterr().err.splitlines()
        assert len(lines_printed) == lines and all("set TPU_ACCELERATOR_TYPE" in line for line in lines_printed)
