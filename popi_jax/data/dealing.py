"""Which examples share a batch when the lengths of all are known beforehand, so that every batch
has the same shape and next to no padding. Numpy alone."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

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
