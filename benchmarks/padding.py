"""How much of the rows that the models compute holds no token."""

from collections.abc import Iterable, Mapping

import numpy as np

from popi_jax.arrays import Tokens, UserBatch

ROWS: Mapping[str, tuple[str, ...]] = {
    "inference rows": ("context",),
    "generator rows": ("turns", "chosen", "rejected"),
}  # row -> the parts of a batch that are packed into it, beside the summary


def padding(batches: Iterable[UserBatch]) -> dict[str, float]:
    """Share of the slots of each kind of row, and of each part of a batch, that are padding; missing pairs included."""
    slots: dict[str, int] = {}
    used: dict[str, int] = {}
    for batch in batches:
        for name in ("context", "turns", "chosen", "rejected"):
            part: Tokens = getattr(batch, name)
            slots[name] = slots.get(name, 0) + part.ids.size
            used[name] = used.get(name, 0) + int(np.sum(part.lengths))
    groups = {**ROWS, **{name: (name,) for name in slots}}
    return {
        name: 1 - sum(used[part] for part in parts) / sum(slots[part] for part in parts)
        for name, parts in groups.items()
    }
