import numpy as np
import pytest

from popi_jax.data import dealing

RNG = np.random.default_rng(0)


def test_groups_begin_where_a_batch_is_much_shorter():
    lengths = np.array([100, 20, 90, 21, 80, 95, 19, 22, 5, 6])
    groups = dealing.group_by_length(lengths, 4)
    assert [sorted(lengths[g].tolist()) for g in groups] == [
        [80, 90, 95, 100],
        [5, 6, 19, 20, 21, 22],  # two more would not fill a batch
    ]
    assert sorted(np.concatenate(groups).tolist()) == [*range(10)]


def test_alike_texts_are_one_group_and_few_are_too():
    (whole,) = dealing.group_by_length(np.array([9, 8, 7, 9, 8]), 2)
    assert sorted(whole.tolist()) == [0, 1, 2, 3, 4]
    assert len(dealing.group_by_length(np.array([500, 1]), 2)) == 1
    assert len(dealing.group_by_length(np.array([512, 300, 200, 100, 50, 20, 10, 5]), 1)) == 3


@pytest.mark.parametrize(("count", "rows", "shards"), [(23, 8, 4), (64, 16, 1), (5, 8, 2)])
def test_parts_of_batches_get_the_same_load(count: int, rows: int, shards: int) -> None:
    loads = RNG.integers(50, 200, count)
    dealt = dealing.deal(loads, rows, shards)
    assert dealt.shape == (-(-count // rows), rows)
    assert sorted(dealt[dealt >= 0].tolist()) == [*range(count)]  # each once
    sizes = (dealt >= 0).reshape(-1, rows // shards).sum(axis=1)
    assert sizes.max() - sizes.min() <= 1
    parts = np.where(dealt < 0, 0, loads[dealt]).reshape(-1, rows // shards).sum(axis=1)
    assert dealing.find_heaviest(loads, dealt, shards) == parts.max()
    full = parts[sizes == sizes.max()]
    assert full.max() - full.min() <= loads.max() - loads.min()


@pytest.mark.parametrize(
    ("examples", "most", "unit", "rows"),
    [(1, 32, 1, 1), (3, 32, 1, 4), (500, 32, 8, 32), (9, 32, 8, 16), (100, 24, 8, 24)],
)
def test_rows(examples: int, most: int, unit: int, rows: int) -> None:
    assert dealing.choose_rows(examples, most, unit) == rows


def test_lengths_are_rounded_up_by_a_thirtysecond_at_most():
    assert [dealing.round_up(n) for n in (0, 1, 63, 64, 65, 129, 263)] == [
        *(0, 1, 63, 64, 66, 132, 264)
    ]
    for n in range(1, 5000):
        assert n <= dealing.round_up(n) <= n * (1 + 1 / 32)
    assert dealing.find_longest(np.zeros(0, int)) == 1


def test_parts_get_their_share_of_each_kind_of_load() -> None:
    """Two kinds that cannot be balanced by their sum: who has much of one has little of the
    other."""
    one = np.repeat([0.0, 10.0], 6)
    loads = np.stack([one, 10 - one], axis=1)
    parts = dealing.deal_evenly(loads, [2, 4, 6])
    assert [len(part) for part in parts] == [2, 4, 6]
    assert sorted(np.concatenate(parts)) == list(range(12))
    assert [loads[part].mean(axis=0).tolist() for part in parts] == [[5.0, 5.0]] * 3


def test_groups_are_balanced_and_their_halves_too() -> None:
    loads = np.arange(16.0)[:, None]
    groups = dealing.group_evenly(loads, 8)
    assert sorted(groups.reshape(-1)) == list(range(16))
    assert loads[groups].sum(axis=(1, 2)).tolist() == [60.0, 60.0]
    assert (loads[groups].reshape(-1, 2).sum(axis=1) == 15).all()  # pairs: 15 + 0, 14 + 1, ...


@pytest.mark.parametrize(("users", "size"), [(1, 1), (6, 3), (12, 6), (12, 12), (30, 10), (7, 7)])
def test_groups_of_any_size_hold_each_example_once(users: int, size: int) -> None:
    found = dealing.group_evenly(np.random.default_rng(0).normal(size=(users, 2)), size)
    assert found.shape == (users // size, size)
    assert sorted(found.reshape(-1)) == list(range(users))
