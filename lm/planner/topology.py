"""TPU chips and slices: memory, bandwidths, clock and interconnect that the planner computes with."""

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
      dimensions: of the torus or mesh that its slices form.
      kind: prefix of `jax.Device.device_kind`.
      hbm_bytes: HBM capacity.
      hbm_bandwidth: bytes/s.
      link_bandwidth: bytes/s of one ICI link, one way.
      dcn_bandwidth: bytes/s of a chip's share of its host's network cards, one way.
      clock: Hz of the core, the unit of the compiler's cycle estimates.
      host_bytes: a chip's share of its host's memory. v5e and v6e: from the page of each version (512 and 1,536 GiB a
        host of 8 chips); v5p: that of a VM (ct5p-hightpu-4t: 448 GB, 4 chips). Some VMs have less.
      host_bandwidth: bytes/s between a chip and its host's memory, one way. No data sheet gives it. Assumed are 16 GB/s
        (PCIe Gen 3 x16), and 32 GB/s on v6e, whose page says Gen 5 (x8).
      ring: length of a slice's axis whose links wrap around; 0 = no axis is taken to wrap around (so on v5p the
        estimate is too high for slices of whole cubes, which do).
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
        """Peak bfloat16 FLOP/s."""
        return flops.peak_flops(self.kind) or 0.0


CHIPS = {
    "v5e": Chip(2, "TPU v5e", 16 * GIB, 819e9, 4.5e10, 3.125e9, 1.5e9, 64 * GIB, 1.6e10, RING),
    "v5p": Chip(3, "TPU v5p", 95 * GIB, 2765e9, 9e10, 6.25e9, 1.75e9, 112e9, 1.6e10, 0),
    "v6e": Chip(2, "TPU v6e", 32 * GIB, 1640e9, 9e10, 12.5e9, 1.75e9, 192 * GIB, 3.2e10, RING),
}


class Topology(NamedTuple):
    """One or several equal slices. Example: 'v5e:4x4' has chip v5e and shape (4, 4).

    Attributes:
      name: as --topology gives it.
      chip: of all slices.
      shape: chips of a slice along each dimension.
      slices: how many, connected by the data-centre network.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int

    @property
    def links(self) -> int:
        """Links of a chip for a collective over the whole slice: two along an axis that wraps around, else one."""
        return sum(2 if n == self.chip.ring else 1 for n in self.shape if n > 1) or 1

    def links_of(self, places: Collection[tuple[int, ...]]) -> float:
        """Links of a chip that a collective among a group of chips can send on.

        Each dimension of the slice that the group spans counts two links if the group is a whole ring, else one,
        because a part of a ring does not wrap around. If the group has only every s-th chip of a dimension, s groups
        share the links, and each has 1/s of them.

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


def parse(name: str, slices: int) -> Topology:
    """Parses 'CHIP:AxB' or 'CHIP:AxBxC', with one number for each dimension of the chip's slices.

    Raises:
      ConfigError: unknown chip, or a shape of the wrong form.
    """
    chip, _, shape = name.partition(":")
    if chip not in CHIPS or not re.fullmatch(rf"[1-9]\d*(x[1-9]\d*){{{CHIPS[chip].dimensions - 1}}}", shape):
        forms = ", ".join(f"{known}:{'x'.join('ABC'[: each.dimensions])}" for known, each in CHIPS.items())
        raise ConfigError(f"--topology={name}: expected one of {forms}")
    return Topology(name, CHIPS[chip], tuple(map(int, shape.split("x"))), slices)
