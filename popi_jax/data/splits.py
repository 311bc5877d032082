"""Which split a user belongs to: a function of the name alone, never of the order or number of
rows."""

import hashlib
from collections.abc import Iterable


def choose_split(name: str, validation_fraction: float, test_fraction: float) -> str:
    """Returns train, validation or test by the sha256 of `name`; test does not depend on
    validation_fraction."""
    place = _hash(name)
    if place < test_fraction:
        return "test"
    return "validation" if place < test_fraction + validation_fraction else "train"


def split_topics(
    topics: Iterable[str], validation_fraction: float, test_fraction: float
) -> dict[str, str]:
    """Returns the split of each topic: topics in the order of their sha256, at least one for each
    fraction above 0."""
    order = sorted(set(topics), key=_hash)
    parts = (("test", test_fraction), ("validation", validation_fraction))
    splits: list[str] = []
    for split, fraction in parts:
        splits += [split] * (max(1, round(fraction * len(order))) if fraction > 0 else 0)
    return dict(zip(order, splits + ["train"] * len(order), strict=False))


def _hash(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48  # in [0, 1)
