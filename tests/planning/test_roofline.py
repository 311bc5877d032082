"""Times of made traffic at made and published rates."""

import pytest

from popi_jax.planning.program import Access, Collective, Traffic
from popi_jax.planning.roofline import CHIPS, Chip, estimate

CHIP = Chip(100.0, 0.0, 0.0, 50.0, links=6, link_bandwidth=5.0, dcn_bandwidth=2.0)


def sent(wire: float, *axes: str, cross_slice: bool = False) -> Collective:
    return Collective("all-gather", axes, 2, int(wire), wire, 3.0, "", "", (), cross_slice)


def traffic(*collectives: Collective) -> Traffic:
    return Traffic((Access("copy", 25.0, 4.0, "", ()),), collectives, ())


def test_each_part_by_hand() -> None:
    times = estimate(300.0, traffic(sent(10, "fsdp"), sent(4, "data", cross_slice=True)), CHIP)
    assert times == (
        3.0,
        2.0,
        3.0,
        6.0,
    )  # 100 bytes of memory; 30 bytes over two links; 12 bytes between slices
    assert (times.serial, times.best, times.bound) == (14.0, 6.0, "cross_slice")
    assert times.serial_fraction == pytest.approx(3 / 14)


def test_links_follow_the_axes() -> None:
    def seconds(*axes: str, **lies_over: int) -> float:
        return estimate(0.0, traffic(sent(10, *axes)), CHIP, torus_axes=lies_over).interconnect

    assert seconds("fsdp") == 30 / 10
    assert seconds("fsdp", fsdp=2) == 30 / 20
    assert seconds("fsdp", "tensor", fsdp=2) == 30 / 30
    assert seconds("fsdp", "tensor", fsdp=3) == 30 / 30  # a chip has no more than six
    assert seconds() == 0  # a group of one device sends nothing


def test_devices_of_a_chip_share_it() -> None:
    halves = estimate(300.0, traffic(sent(10, "fsdp")), CHIP._replace(devices=2))
    assert halves == tuple(2 * part for part in estimate(300.0, traffic(sent(10, "fsdp")), CHIP))


def test_published_rates() -> None:
    """What the vendor calls bidirectional bandwidth per chip, in GB/s, is all links both ways."""
    both_ways = {name: 2 * chip.ici_bandwidth / 1e9 for name, chip in CHIPS.items()}
    assert both_ways == {"v4": 600, "v5e": 400, "v5p": 1200, "v6e": 800, "tpu7x": 1200}
    for chip in CHIPS.values():
        assert chip.usable_bytes * chip.devices <= 1.01 * chip.hbm_bytes
