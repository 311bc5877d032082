"""Which users each batch holds: a function of the seed and the number of the batch alone.

The users of an epoch are shuffled, and those of whole batches, about `WINDOW` at a time, dealt out
so that all batches, and the halves, quarters, ... of each, get about the same number of tokens: a
shard that holds few users then loses little to padding."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import grain
import numpy as np
from jaxtyping import Float, Int

from popi_jax.data.dealing import deal_evenly, group_evenly

WINDOW = 4096  # users that are dealt together, at most; an epoch of fewer is a window
_TOGETHER = 2  # windows that are kept


class Order:
    """The user in each row of each batch. Every user is drawn once per epoch; an epoch may end
    inside a batch.

    loads: [users kinds] tokens of each kind that a user brings, each kind to be spread evenly; None
    for users that are only shuffled. parts: rows of the parts of a batch, each of which is balanced
    by itself. microbatches: of a part; row i of microbatch j is row i * microbatches + j."""

    def __init__(
        self,
        loads: Float[np.ndarray, "users kinds"] | None,
        users: int,
        parts: tuple[int, ...],
        *,
        seed: int,
        microbatches: int = 1,
    ) -> None:
        self._loads, self._users, self._parts = loads, users, parts
        self._seed, self._microbatches = seed, microbatches
        self._shuffled = grain.MapDataset.range(users).seed(seed).shuffle().repeat()
        self._batches = max(min(WINDOW, users) // sum(parts), 1)
        self._windows: dict[int, np.ndarray] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        copy = partial(Order, seed=self._seed, microbatches=self._microbatches)
        return copy, (self._loads, self._users, self._parts)

    def take(self, step: int) -> Int[np.ndarray, " rows"]:
        """The numbers of the users of the global batch of a step."""
        window, batch = divmod(step, self._batches)
        if window not in self._windows:
            while len(self._windows) >= _TOGETHER:
                self._windows.pop(next(iter(self._windows)))
            self._windows[window] = self._deal(window)
        return self._windows[window][batch]

    def _deal(self, window: int) -> Int[np.ndarray, "batches rows"]:
        size = sum(self._parts)
        places = window * self._batches * size + np.arange(self._batches * size)
        users = np.array([self._shuffled[int(place)] for place in places])
        if self._loads is None:
            return users.reshape(-1, size)
        loads = standardise(self._loads[users])
        rng = np.random.default_rng((self._seed, window))
        sizes = np.tile(self._parts, self._batches)  # of the parts of all batches
        part_of = np.repeat(np.arange(len(sizes)), sizes)
        dealt: list[list[np.ndarray]] = [[] for _ in sizes]
        for epoch in np.unique(places // self._users):
            own = np.flatnonzero(places // self._users == epoch)
            # an epoch that ends inside a part leaves room for the next one there
            parts, rooms = np.unique(part_of[own], return_counts=True)
            for part, members in _fill(loads[own], rooms, sizes[parts], rng):
                dealt[parts[part]].append(own[members])
        rows = [interleave(balance(loads, some), self._microbatches) for some in dealt]
        return users[np.concatenate(rows)].reshape(-1, size)


def _fill(
    loads: Float[np.ndarray, "users kinds"],
    rooms: Int[np.ndarray, " parts"],
    sizes: Int[np.ndarray, " parts"],
    rng: np.random.Generator,
) -> Iterator[tuple[int, Int[np.ndarray, " rooms"]]]:
    """The users of each part of the batches: `rooms` of them, where parts have `sizes` rows."""
    lots = [np.flatnonzero((rooms == sizes) & (sizes == size)) for size in np.unique(sizes)]
    lots += [np.array([part]) for part in np.flatnonzero(rooms < sizes)]
    lots = [lot for lot in lots if len(lot)]
    members = deal_evenly(loads, [int(rooms[lot].sum()) for lot in lots])
    for lot, own in zip(lots, members, strict=True):
        groups = own[group_evenly(loads[own], int(rooms[lot[0]]))]
        yield from zip(lot.tolist(), rng.permutation(groups), strict=True)


def balance(
    loads: Float[np.ndarray, "users kinds"], pieces: list[np.ndarray]
) -> Int[np.ndarray, " rows"]:
    """The numbers of some users in an order whose halves have about the same loads."""
    own = np.concatenate(pieces)
    return own if len(pieces) == 1 else own[group_evenly(loads[own], len(own))[0]]


def interleave(rows: Int[np.ndarray, " rows"], parts: int) -> Int[np.ndarray, " rows"]:
    """One row of each of `parts` equal parts after the other, where they are equal."""
    return rows if len(rows) % parts else rows.reshape(parts, -1).T.reshape(-1)


def standardise(loads: Float[np.ndarray, "users kinds"]) -> Float[np.ndarray, "users kinds"]:
    """Each kind with mean 0 and standard deviation 1; 0 where all are the same."""
    spread = loads.std(axis=0)
    return (loads - loads.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
