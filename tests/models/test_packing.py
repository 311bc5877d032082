"""Slots and places: every token keeps its own, gradients go the way back, and what does not fit is
computed padded."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from popi_jax.arrays import Tokens
from popi_jax.models.packing import (
    Budget,
    Tree,
    assign_places,
    prefix_tree,
    run_packed_if_it_fits,
    take,
    to_places,
    to_slots,
)
from tests.training import small

BATCH, SLOTS = 4, 7


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), spare=st.integers(0, 3))
def test_tokens_keep_their_order_and_come_back(seed: int, spare: int) -> None:
    rng = np.random.default_rng(seed)
    valid = rng.random((BATCH, SLOTS)) < 0.6
    count = int(valid.sum())
    at = assign_places(jnp.asarray(valid), count + spare, 1)
    x = rng.normal(size=(1, BATCH * SLOTS, 2)).astype(np.float32)
    placed = to_places(jnp.asarray(x), at)
    np.testing.assert_array_equal(placed[0, :count], x[0][valid.ravel()])
    np.testing.assert_array_equal(at.used[0], np.arange(count + spare) < count)
    np.testing.assert_array_equal(to_slots(placed, at)[0][valid.ravel()], x[0][valid.ravel()])


def test_gradients_are_those_of_the_tokens_alone() -> None:
    """Whatever comes back for slots and places without a token."""
    rng = np.random.default_rng(0)
    valid = rng.random((BATCH, SLOTS)) < 0.6
    count, places = int(valid.sum()), int(valid.sum()) + 3
    at = assign_places(jnp.asarray(valid), places, 1)
    slots, weights = rng.normal(size=(1, BATCH * SLOTS, 2)), rng.normal(size=(1, places, 2))
    _, pull = jax.vjp(lambda x: to_places(x, at), jnp.asarray(slots, jnp.float32))
    (found,) = pull(jnp.asarray(weights, jnp.float32))
    expected = np.zeros((BATCH * SLOTS, 2))
    expected[valid.ravel()] = weights[0, :count]
    np.testing.assert_allclose(found[0], expected, rtol=1e-6)
    _, pull = jax.vjp(lambda x: to_slots(x, at), jnp.asarray(weights, jnp.float32))
    (found,) = pull(jnp.asarray(slots, jnp.float32))
    np.testing.assert_allclose(found[0, :count], slots[0][valid.ravel()], rtol=1e-6)
    np.testing.assert_array_equal(found[0, count:], 0)


def test_what_is_taken_twice_has_the_sum_of_both_gradients() -> None:
    index = jnp.array([[0, 2, 2]])
    grads = jax.grad(lambda x: jnp.sum(take(x, index) * jnp.array([[1.0, 2.0, 4.0]])))(
        jnp.zeros((1, 3))
    )
    np.testing.assert_array_equal(grads, [[1.0, 0.0, 6.0]])


def fits(budget: Budget | None, tree: Tree) -> jax.Array:
    return run_packed_if_it_fits(budget, tree, lambda given: jnp.array(given is not None))


def tokens(*lengths: int, room: int) -> Tokens:
    return Tokens(jnp.zeros((len(lengths), room), jnp.int32), jnp.array(lengths))


@pytest.mark.parametrize(
    ("tokens_left", "answers_left", "expected"),
    [(0, 0, True), (-1, 0, False), (0, -1, False), (2, 1, True)],
)
def test_a_tree_is_computed_without_padding_when_it_fits(
    tokens_left: int, answers_left: int, expected: bool
) -> None:
    tree = Tree(tokens(4, 2, room=9), tokens(2, 2, room=4), tokens(3, 1, room=5))
    budget = Budget(14 + tokens_left, 4 + answers_left)
    assert bool(jax.jit(partial(fits, budget))(tree)) is expected


def test_a_budget_that_spares_nothing_makes_no_second_branch() -> None:
    tree = Tree(tokens(4, 2, room=5), tokens(2, 2, room=2), tokens(3, 1, room=3))
    for budget, branches in ((None, False), (Budget(20, 6), False), (Budget(18, 6), True)):
        text = str(jax.make_jaxpr(partial(fits, budget))(tree))
        assert ("cond" in text) is branches


def test_one_shard_that_does_not_fit_decides_for_all() -> None:
    """Each shard has two rows and places of its own."""
    with jax.set_mesh(small.make_mesh(2, 2, 1)):
        turns = tokens(*[1] * 8, room=4)
        just, too_many = (tokens(5, 1, 3, 3, n, 4, 6, 0, room=9) for n in (2, 3))
        program = jax.jit(lambda *texts: fits(Budget(8, 0, 4), prefix_tree(*texts)))
        assert bool(program(just, turns))
        assert not bool(program(too_many, turns))
