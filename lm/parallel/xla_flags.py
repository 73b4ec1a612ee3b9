"""Flags of the TPU compiler that training sets, by chip and width of the model."""

import os
import sys

# XLA may cut a matrix product in pieces, to send each as soon as it is done. It pays on v5e, whose links are slow, for
# weights of some size (MiB); the pieces of smaller ones leave the matrix unit half empty (docs/performance.md).
WINDOWED_FROM_MIB = {"v5e": 24}
NEVER_MIB = 1_000_000
# Vector memory that one operation may use, MiB, in models narrower than WIDE and in others; the compiler's own are 16.
# With more, matrix products go in larger pieces, but less is left for results to stay in until they are used.
SCOPED_VMEM_MIB = {"v5e": (28, 46), "v5p": (48, 48)}
WIDE = 4096
TPU_DEVICES = ("/dev/accel0", "/dev/vfio/0")  # older and newer drivers; GKE says which TPU it is, a TPU VM may not


def windowed_from(device_kind: str) -> float:
    """Bytes of a weight from which on the compiler does so on such a device, named as `jax.Device.device_kind`."""
    chip = device_kind.removeprefix("TPU ").replace(" lite", "e")
    return WINDOWED_FROM_MIB.get(chip, NEVER_MIB) * 2**20


def libtpu(chip: str, embed_dim: int) -> str:
    """Flags of the TPU compiler that help a model of this width on a chip, 'v5e' or the like; see `spelled`."""
    narrow, wide = SCOPED_VMEM_MIB.get(chip, (0, 0))
    return spelled(WINDOWED_FROM_MIB.get(chip, NEVER_MIB), narrow if embed_dim < WIDE else wide)


def spelled(windowed_from_mib: int, scoped_vmem_mib: int) -> str:
    """Flags as LIBTPU_INIT_ARGS takes them: see WINDOWED_FROM_MIB and SCOPED_VMEM_MIB; 0 of the latter = not set."""
    windowed = f"--xla_jf_spmd_threshold_for_windowed_einsum_mib={windowed_from_mib}"
    return f"{windowed} --xla_tpu_scoped_vmem_limit_kib={1024 * scoped_vmem_mib}" if scoped_vmem_mib else windowed


def set_libtpu(embed_dim: int) -> None:
    """Sets them on a TPU VM, where the user has not set LIBTPU_INIT_ARGS; before JAX finds its devices."""
    kind = os.environ.get("TPU_ACCELERATOR_TYPE", "").replace("v5litepod", "v5e").partition("-")[0]
    if kind:
        os.environ.setdefault("LIBTPU_INIT_ARGS", libtpu(kind, embed_dim))
    elif "LIBTPU_INIT_ARGS" not in os.environ and any(map(os.path.exists, TPU_DEVICES)):
        wanted = "set TPU_ACCELERATOR_TYPE to this TPU's type, such as v5litepod-16"
        print(f"warning: the TPU compiler's flags for this model are not set; {wanted}", file=sys.stderr)
