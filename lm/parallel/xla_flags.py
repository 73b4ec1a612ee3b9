"""Flags of the TPU compiler that training sets, by chip and width of the model."""

import os
import sys

from lm.terminal import say

# Smallest weight, in MiB, for XLA's windowed einsum, which splits a matmul into pieces that overlap with their
# communication. It pays on v5e, whose links are slow; pieces of smaller weights underuse the matrix unit
# (docs/performance.md).
WINDOWED_FROM_MIB = {"v5e": 24}
NEVER_MIB = 1_000_000
# Scoped vector memory of one operation, in MiB, in models narrower than WIDE and in others; XLA's default is 16. With
# more, matmuls use larger tiles, but less is left to keep results in until they are used.
SCOPED_VMEM_MIB = {"v5e": (28, 46), "v5p": (48, 48)}
WIDE = 4096
# What the user has set: importing JAX on a TPU VM adds a flag of its own, so that it is read before.
GIVEN = os.environ.get("LIBTPU_INIT_ARGS")
TPU_DEVICES = ("/dev/accel0", "/dev/vfio/0")  # older and newer drivers; GKE names the type of TPU, a TPU VM may not


def windowed_from(device_kind: str) -> float:
    """Smallest weight, in bytes, for windowed einsum on a device of kind `jax.Device.device_kind`."""
    chip = device_kind.removeprefix("TPU ").replace(" lite", "e")
    return WINDOWED_FROM_MIB.get(chip, NEVER_MIB) * 2**20


def libtpu(chip: str, embed_dim: int) -> str:
    """Flags of the TPU compiler for a model of this width on `chip`, such as 'v5e'; see `spelled`."""
    narrow, wide = SCOPED_VMEM_MIB.get(chip, (0, 0))
    return spelled(WINDOWED_FROM_MIB.get(chip, NEVER_MIB), narrow if embed_dim < WIDE else wide)


def spelled(windowed_from_mib: int, scoped_vmem_mib: int) -> str:
    """The flags in the format of LIBTPU_INIT_ARGS: see WINDOWED_FROM_MIB and SCOPED_VMEM_MIB (0 = not set)."""
    windowed = f"--xla_jf_spmd_threshold_for_windowed_einsum_mib={windowed_from_mib}"
    return f"{windowed} --xla_tpu_scoped_vmem_limit_kib={1024 * scoped_vmem_mib}" if scoped_vmem_mib else windowed


def set_libtpu(embed_dim: int) -> None:
    """Adds the flags of `libtpu` to LIBTPU_INIT_ARGS on a TPU VM, unless the user has set it, if only to ''.

    To be called before JAX initialises its devices; this module must be imported before JAX.
    """
    if GIVEN is not None:
        return
    kind = os.environ.get("TPU_ACCELERATOR_TYPE", "").replace("v5litepod", "v5e").partition("-")[0]
    if kind:
        flags = os.environ.get("LIBTPU_INIT_ARGS", ""), libtpu(kind, embed_dim)
        os.environ["LIBTPU_INIT_ARGS"] = " ".join(filter(None, map(str.strip, flags)))
    elif any(map(os.path.exists, TPU_DEVICES)):
        wanted = "set TPU_ACCELERATOR_TYPE to this TPU's type, such as v5litepod-16"
        say(f"warning: the TPU compiler's flags for this model are not set; {wanted}", file=sys.stderr)
