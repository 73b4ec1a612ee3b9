"""TPU chips, and the slices they come in: what the plan of a run is for."""

import re
from collections.abc import Collection
from typing import NamedTuple

from lm.config.schema import ConfigError
from lm.evaluation import flops
from lm.parallel.mesh import RING

GIB = 2.0**30


class Chip(NamedTuple):
    """A TPU chip, from its data sheet (cloud.google.com/tpu/docs).

    Attributes:
      dimensions: of its slices, which are tori.
      kind: as `jax.Device.device_kind` begins.
      hbm_bytes: memory.
      hbm_bandwidth: bytes/s.
      link_bandwidth: bytes/s of one link of the interconnect, one way.
      dcn_bandwidth: bytes/s of a chip's share of its host's network cards, one way.
      clock: Hz of the core, which the compiler's cycles are counted in.
      host_bytes: a chip's share of its host's memory: of v5e and v6e the page of each version (512 and 1,536 GiB a host
        of 8 chips), of v5p the VM's (ct5p-hightpu-4t: 448 GB, 4 chips). A VM may be given less.
      host_bandwidth: bytes/s between a chip and its host's memory, one way. No data sheet gives it: taken are 16 GB/s,
        PCIe Gen 3 with 16 lanes, and 32 GB/s on v6e, whose page says Gen 5, with 8 lanes.
      ring: slices of so many chips along an axis close to a ring there; 0 = taken not to (v5p: the guess is high for
        slices of whole cubes, which do).
    """

    dimensions: int
    kind: str
    hbm_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float
    dcn_bandwidth: float
    clock: float
    host_bytes: float
    host_bandwidth: float
    ring: int

    @property
    def peak_flops(self) -> float:
        """bfloat16 FLOP/s."""
        return flops.peak_flops(self.kind) or 0.0


CHIPS = {
    "v5e": Chip(2, "TPU v5e", 16 * GIB, 819e9, 4.5e10, 3.125e9, 1.5e9, 64 * GIB, 1.6e10, RING),
    "v5p": Chip(3, "TPU v5p", 95 * GIB, 2765e9, 9e10, 6.25e9, 1.75e9, 112e9, 1.6e10, 0),
    "v6e": Chip(2, "TPU v6e", 32 * GIB, 1640e9, 9e10, 12.5e9, 1.75e9, 192 * GIB, 3.2e10, RING),
}


class Topology(NamedTuple):
    """A slice: 'v5e:4x4' is chip v5e, shape (4, 4)."""

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int

    @property
    def links(self) -> int:
        """Links of a chip that carry data one way: two along an axis that closes to a ring, else one."""
        return sum(2 if n == self.chip.ring else 1 for n in self.shape if n > 1) or 1

    def links_of(self, places: Collection[tuple[int, ...]]) -> float:
        """Links of a chip that carry what a group of chips sends round among itself.

        Along each dimension of the slice that the group extends over: two where it has all of a ring, else one, for a
        part of a ring does not close. Where it has only every s-th chip, s such groups share the links between, and a
        group has 1/s of them.

        Args:
          places: coordinates of the group's chips.
        """
        links = 0.0
        for dim, size in enumerate(self.shape):
            at = sorted({place[dim] for place in places})
            if len(at) > 1:
                stride = (at[-1] - at[0]) / (len(at) - 1)
                links += (2 if len(at) == size == self.chip.ring else 1) / stride
        return links or 1.0


def topology(name: str, slices: int) -> Topology:
    """Reads 'CHIP:AxB' or 'CHIP:AxBxC', as many numbers as slices of this chip have dimensions.

    Raises:
      ConfigError: no such chip or shape.
    """
    chip, _, shape = name.partition(":")
    if chip not in CHIPS or not re.fullmatch(rf"[1-9]\d*(x[1-9]\d*){{{CHIPS[chip].dimensions - 1}}}", shape):
        forms = ", ".join(f"{known}:{'x'.join('ABC'[: each.dimensions])}" for known, each in CHIPS.items())
        raise ConfigError(f"--topology={name}: expected one of {forms}")
    return Topology(name, CHIPS[chip], tuple(map(int, shape.split("x"))), slices)
