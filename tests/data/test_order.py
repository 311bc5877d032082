"""In which batch each user is drawn."""

import pickle

import numpy as np
import pytest

from popi_jax.data.order import Order, interleave, standardise


def make(users: int, *parts: int, seed: int = 0, kinds: int = 2, micro: int = 1) -> Order:
    loads = np.random.default_rng(users).lognormal(5, 0.5, (users, kinds))
    return Order(loads, users, parts, seed=seed, microbatches=micro)


@pytest.mark.parametrize(
    ("users", "parts"),
    [(1, (2,)), (3, (8,)), (11, (4,)), (11, (4, 2, 4)), (300, (16,)), (64, (8,)), (50, (12,))],
)
def test_no_user_is_drawn_twice_before_all_are_drawn_once(users: int, parts: tuple) -> None:
    order, drawn = make(users, *parts), np.zeros(users, int)
    for step in range(30):
        rows = order.take(step)
        assert rows.shape == (sum(parts),)
        np.add.at(drawn, rows, 1)
        assert drawn.max() - drawn.min() <= 1
    assert drawn.min() >= 30 * sum(parts) // users


def test_a_batch_follows_from_the_seed_and_its_number() -> None:
    order, whole = make(40, 8), [make(40, 8).take(step) for step in (2, 17, 33)]
    copy = pickle.loads(pickle.dumps(order))
    for step, expected in ((33, whole[2]), (2, whole[0]), (17, whole[1])):
        np.testing.assert_array_equal(order.take(step), expected)
        np.testing.assert_array_equal(copy.take(step), expected)
    assert (make(40, 8, seed=1).take(2) != whole[0]).any()
    far = 10**12
    np.testing.assert_array_equal(make(40, 8).take(far), make(40, 8).take(far))


def test_few_windows_are_kept() -> None:
    order = make(40, 8)  # an epoch each
    for step in range(0, 40, 5):
        order.take(step)
    assert len(order._windows) == 2


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_every_shard_of_a_microbatch_has_about_the_same_load(micro: int) -> None:
    """Of 16 users with two kinds of load that do not hang together; by chance alone the heaviest
    shard of two users has 1.4 times the mean."""
    loads = np.random.default_rng(0).normal(100, 20, (1000, 2))
    order = Order(loads, 1000, (16,), seed=0, microbatches=micro)
    rows = np.stack([order.take(step) for step in range(62)])
    for users, most in ((2, 1.2), (4, 1.07), (8, 1.05), (16, 1.04)):
        if 16 % (users * micro) == 0:
            parts = loads[rows].reshape(62, -1, users, micro, 2).sum(axis=2)
            heavy = np.quantile(parts.max(axis=1), 0.95) / (100 * users)
            assert heavy < most, (users, heavy)


def test_parts_of_a_batch_are_each_balanced() -> None:
    loads = np.random.default_rng(0).normal(100, 20, (480, 1))
    order = Order(loads, 480, (4, 8), seed=0)
    rows = np.stack([order.take(step) for step in range(40)])
    for part, size in ((rows[:, :4], 4), (rows[:, 4:], 8)):
        assert loads[part].sum(axis=1).max() < 1.07 * 100 * size


def test_batches_are_in_random_order() -> None:
    """Whoever is heaviest comes in any batch of a window."""
    loads = np.ones((128, 1))
    loads[5] = 9.0
    order = Order(loads, 128, (8,), seed=0)
    where = {n % 16 for n in range(320) if 5 in order.take(n)}  # a window is an epoch
    assert len(where) > 8


def test_without_loads_users_are_shuffled() -> None:
    order = Order(None, 20, (10,), seed=0)
    epochs = [np.concatenate([order.take(2 * e), order.take(2 * e + 1)]) for e in range(3)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_kinds_count_alike() -> None:
    found = standardise(np.array([[1.0, 100.0, 7.0], [3.0, 300.0, 7.0]]))
    np.testing.assert_allclose(found, [[-1, -1, 0], [1, 1, 0]])


def test_microbatches_lie_apart() -> None:
    assert interleave(np.arange(6), 2).tolist() == [0, 3, 1, 4, 2, 5]
    assert interleave(np.arange(6), 1).tolist() == [0, 1, 2, 3, 4, 5]
    assert interleave(np.arange(5), 2).tolist() == [0, 1, 2, 3, 4]
