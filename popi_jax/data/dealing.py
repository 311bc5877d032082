"""Which examples share a batch when the lengths of all are known beforehand, so that every batch
has the same shape and next to no padding. Numpy alone."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

_MOST = 3  # groups of examples, each with a program of its own
_SHORTER = 0.7  # of the longest of the group before: so much shorter is worth another group


def group_by_length(
    lengths: Int[np.ndarray, " examples"], rows: int
) -> list[Int[np.ndarray, " members"]]:
    """The numbers of the examples in groups of similar lengths, the longest first.

    A group begins where a whole batch of `rows` examples is much shorter than the longest of the
    group before, so that short texts are not padded to the longest of all."""
    order = np.argsort(-lengths, kind="stable")
    groups: list[np.ndarray] = []
    begin = 0
    for start in range(rows, len(order) - rows + 1, rows):
        shorter = lengths[order[start]] <= _SHORTER * lengths[order[begin]]
        if shorter and len(groups) + 1 < _MOST:
            groups.append(order[begin:start])
            begin = start
    return [*groups, order[begin:]]


def deal(
    loads: Int[np.ndarray, " examples"], rows: int, shards: int
) -> Int[np.ndarray, "batches rows"]:
    """The number of the example in each row of each batch, -1 in rows that none is left for.

    Each of the `shards` equal parts of a batch gets about the same load: the examples are dealt out
    by falling load, forth and back. `shards` divides `rows`."""
    batches = -(-len(loads) // rows)
    hands = batches * shards
    turn, hand = np.divmod(np.arange(len(loads)), max(hands, 1))
    hand = np.where(turn % 2, hands - 1 - hand, hand)
    dealt = np.full((hands, rows // shards), -1)
    dealt[hand, turn] = np.argsort(-loads, kind="stable")
    return dealt.reshape(batches, rows)


def find_heaviest(
    loads: Int[np.ndarray, " examples"], dealt: Int[np.ndarray, "batches rows"], shards: int
) -> int:
    """The largest load of a part of a batch."""
    own = np.where(dealt < 0, 0, loads[dealt])
    return int(own.reshape(len(dealt), shards, -1).sum(axis=-1).max(initial=0))


def choose_rows(examples: int, most: int, unit: int) -> int:
    """The rows of a batch: `most`, or fewer where there are fewer examples; a multiple of `unit`,
    which divides `most`."""
    rows = unit
    while rows < min(examples, most):
        rows *= 2
    return min(rows, most)


def round_up(length: int) -> int:
    """A length as programs are compiled for it: rounded up to six binary digits, so that similar
    data share programs."""
    step = 1 << max(length.bit_length() - 6, 0)
    return -(-length // step) * step


def find_longest(lengths: Sequence[int] | np.ndarray) -> int:
    """The padded length of texts, at least 1."""
    return round_up(int(max(np.max(lengths, initial=0), 1)))


def deal_evenly(
    loads: Float[np.ndarray, "examples kinds"], rooms: Sequence[int]
) -> list[Int[np.ndarray, " members"]]:
    """The numbers of the examples in each part: `rooms` of them, so that each part has about its
    share of every kind of load.

    The largest examples come first; each goes where it evens out best what is there."""
    left, sums = np.array(rooms), np.zeros((len(rooms), loads.shape[1]))
    size = np.array(rooms, float)
    loads = loads - loads.mean(axis=0)
    dealt = np.zeros(len(loads), int)
    for example in np.argsort(-(loads**2).sum(axis=1), kind="stable"):
        # to the square of a part's sum, which by chance alone grows with its room
        added = (2 * sums @ loads[example] + loads[example] @ loads[example]) / size
        added[left == 0] = np.inf
        dealt[example] = part = int(added.argmin())
        sums[part] += loads[example]
        left[part] -= 1
    return [np.flatnonzero(dealt == part) for part in range(len(rooms))]


def group_evenly(
    loads: Float[np.ndarray, "examples kinds"], size: int
) -> Int[np.ndarray, "groups size"]:
    """The numbers of the examples in groups of about the same loads; the halves of a group have
    about the same loads too, and so have their halves. `size` divides the examples.

    Pairs are made of examples that even out best, the largest examples first, then pairs of pairs;
    what cannot be halved is dealt out."""
    if size == 1:
        return np.arange(len(loads))[:, None]
    if size % 2:
        return np.stack(deal_evenly(loads, [size] * (len(loads) // size)))
    loads = loads - loads.mean(axis=0)
    squares = (loads**2).sum(axis=1)
    left, pairs = squares.copy(), list[tuple[int, int]]()
    for first in np.argsort(-squares, kind="stable"):
        if left[first] < np.inf:
            left[first] = np.inf
            # the square of their sum, but for that of the first
            second = int((left + 2 * loads @ loads[first]).argmin())
            left[second] = np.inf
            pairs.append((int(first), second))
    made = np.array(pairs)
    whole = group_evenly(loads[made].sum(axis=1), size // 2)
    return made[whole].reshape(len(whole), size)
