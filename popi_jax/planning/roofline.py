"""Seconds of a program from its FLOPs and its traffic, at the published rates of a chip: a bound,
not a forecast."""

from collections.abc import Mapping
from typing import NamedTuple

from popi_jax.planning.program import Traffic


class Chip(NamedTuple):
    """Rates of one chip, per second. Where a chip is several devices to JAX, each has its share of
    everything."""

    flops: float  # of products in bfloat16
    hbm_bytes: float  # capacity, as published
    usable_bytes: float  # of one device, by its compiler: what a program must fit into
    hbm_bandwidth: float  # bytes
    links: int  # to neighbours: two along each axis of the torus
    link_bandwidth: float  # bytes that one link carries one way; it carries as many the other way
    dcn_bandwidth: float  # bytes that a chip sends to other slices
    devices: int = 1  # that JAX counts

    @property
    def ici_bandwidth(self) -> float:
        """Bytes that a chip sends over all of its links; half of what the vendor calls
        bidirectional bandwidth."""
        return self.links * self.link_bandwidth


_GIB = 2**30
# Sources: the pages of each TPU at https://docs.cloud.google.com/tpu/docs/ (v4, v5e, v5p, v6e,
# tpu7x), whose bidirectional interconnect per chip is 400 GB/s (v5e), 1200 (v5p, tpu7x) and 800
# (v6e): links x both ways. Of v4 the links are those of arXiv 2304.01433 (six of 50 GB/s), and its
# network, which is not published, is taken to be that of v5p. The network is 50 Gbit/s per chip
# (v5p) and 100 (v6e, tpu7x), and of v5e two of 100 Gbit/s for 8 chips. usable_bytes: "exceeds
# available HBM" of the ahead-of-time compiler of libtpu 0.0.42.1.
CHIPS: dict[str, Chip] = {
    "v4": Chip(275e12, 32 * _GIB, 15.25 * _GIB, 1200e9, 6, 50e9, 50e9 / 8, devices=2),
    "v5e": Chip(197e12, 16 * _GIB, 15.75 * _GIB, 819e9, 4, 50e9, 25e9 / 8),
    "v5p": Chip(459e12, 95 * _GIB, 95.74 * _GIB, 2765e9, 6, 100e9, 50e9 / 8),
    "v6e": Chip(918e12, 32 * _GIB, 31.25 * _GIB, 1638e9, 4, 100e9, 100e9 / 8),
    "tpu7x": Chip(2307e12, 192 * _GIB, 94.75 * _GIB, 7380e9, 6, 100e9, 100e9 / 8, devices=2),
}


class Seconds(NamedTuple):
    """What each part of the machine takes when it works alone at its full rate."""

    compute: float
    hbm: float
    interconnect: float
    cross_slice: float

    @property
    def serial(self) -> float:
        """If nothing overlapped."""
        return sum(self)

    @property
    def best(self) -> float:
        """If everything overlapped."""
        return max(self)

    @property
    def bound(self) -> str:
        """The part that takes longest."""
        return max(self._fields, key=lambda name: getattr(self, name))

    @property
    def serial_fraction(self) -> float:
        """Share of the peak FLOP/s if nothing overlapped; 0 for a program without products."""
        return self.compute / self.serial if self.serial else 0.0


def estimate(
    flops_per_device: float,
    traffic: Traffic,
    chip: Chip,
    *,
    torus_axes: Mapping[str, int] | None = None,
) -> Seconds:
    """The four times of one execution on one device.

    Assumed: products at the peak rate in bfloat16; each byte of the main memory at its full
    bandwidth, counted as program.py does, so an operand that a product reads more than once counts
    once; collectives by rings that go both ways round, in the bytes that `Collective.wire_bytes`
    counts, one after the other. A ring along one axis of the mesh uses two links, those of one axis
    of the torus, and a collective over several axes the links of all of them. `torus_axes` says of
    a mesh axis over how many axes of the torus it lies (1 where it says nothing): an axis of 16
    devices on a v5p of 4x4x4 lies over 2. Rings are taken to close, which they do on whole pods and
    cubes alone. Left out: latency, which is what small collectives take (those of decoding),
    elementwise arithmetic, the start of the program, and what the hosts do."""
    lies_over, interconnect, across = dict(torus_axes or {}), 0.0, 0.0
    for c in traffic.collectives:
        sent = c.wire_bytes * c.executions
        if c.cross_slice:
            across += sent
        elif c.axes:
            links = min(2 * sum(lies_over.get(axis, 1) for axis in c.axes), chip.links)
            interconnect += sent / (links * chip.link_bandwidth)
    share = chip.devices  # devices of a chip use its parts at the same time
    return Seconds(
        flops_per_device * share / chip.flops,
        traffic.hbm_bytes * share / chip.hbm_bandwidth,
        interconnect * share,
        across * share / chip.dcn_bandwidth,
    )
