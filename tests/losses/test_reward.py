"""The reward of a summary against float64 numpy."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from popi_jax.arrays import Tokens
from popi_jax.losses.reward import RewardObjective, count_repeats, pair_rewards, summary_rewards
from tests.oracles import losses as oracle

few = hypothesis.settings(max_examples=12, deadline=None)
margins_of_users = hnp.arrays(np.float32, (3, 4, 5), elements=st.floats(-30, 30, width=32))
masks = hnp.arrays(bool, (3, 5))
lengths_of_summaries = hnp.arrays(np.int32, (3, 4), elements=st.integers(1, 9))


@few
@hypothesis.given(margins_of_users, masks, lengths_of_summaries, st.sampled_from([0.0, 0.02]))
def test_rewards_equal_the_equation(margins, mask, lengths, penalty: float) -> None:
    objective = RewardObjective(length_penalty=penalty)
    found = summary_rewards(*map(jnp.asarray, (margins, mask, lengths)), objective=objective)
    np.testing.assert_allclose(
        found, oracle.rewards(margins, mask, lengths, penalty), rtol=1e-5, atol=1e-5
    )
    garbage = np.where(mask[:, None], margins, np.float32(-1e30))
    again = summary_rewards(*map(jnp.asarray, (garbage, mask, lengths)), objective=objective)
    np.testing.assert_array_equal(again, found)  # masked pairs do not matter


@pytest.mark.parametrize("kind", ["log_sigmoid", "accuracy", "margin"])
def test_kinds_baseline_and_kl(kind: str) -> None:
    rng = np.random.default_rng(0)
    margins, without = (rng.normal(size=s).astype(np.float32) for s in ((2, 3, 4), (2, 4)))
    margins[0, 0, 0] = 0.0
    mask, kl = rng.random((2, 4)) < 0.7, rng.normal(size=(2, 3)).astype(np.float32)
    mask[:, 0] = True
    worth = {
        "log_sigmoid": lambda m: -np.log1p(np.exp(-m)),
        "accuracy": lambda m: 1.0 if m > 0 else 0.5 if m == 0 else 0.0,
        "margin": lambda m: m,
    }[kind]
    expected = np.zeros((2, 3))
    for u, g in np.ndindex(2, 3):
        real = np.flatnonzero(mask[u])
        expected[u, g] = np.mean([worth(margins[u, g, k]) - worth(without[u, k]) for k in real])
        expected[u, g] -= 0.1 * 7 + 0.3 * kl[u, g]
    found = summary_rewards(
        *map(jnp.asarray, (margins, mask, np.full((2, 3), 7), without, kl)),
        objective=RewardObjective(kind, length_penalty=0.1, kl_coef=0.3),
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_over_beta_divides_what_pairs_are_worth_and_no_penalty() -> None:
    rng = np.random.default_rng(1)
    margins, without = (rng.normal(size=s).astype(np.float32) for s in ((2, 3, 4), (2, 4)))
    mask, lengths = np.ones((2, 4), bool), np.full((2, 3), 5)
    kl = rng.normal(size=(2, 3)).astype(np.float32)
    objective = RewardObjective(over=0.01, length_penalty=0.1, kl_coef=0.3)
    given = map(jnp.asarray, (margins, mask, lengths, without, kl))
    worth = -np.logaddexp(0.0, -margins.astype(np.float64))
    nothing = -np.logaddexp(0.0, -without.astype(np.float64))[:, None]
    expected = (worth - nothing).mean(-1) / 0.01 - 0.1 * lengths - 0.3 * kl
    np.testing.assert_allclose(summary_rewards(*given, objective=objective), expected, rtol=1e-4)


def test_repeats_and_cut_summaries_cost() -> None:
    margins, mask, lengths = jnp.zeros((1, 3, 2)), jnp.ones((1, 2), bool), jnp.full((1, 3), 4)
    repeats, finished = jnp.array([[0, 2, 1]]), jnp.array([[True, True, False]])
    objective = RewardObjective(length_penalty=0.1, repeat_penalty=0.01, unfinished_penalty=0.5)
    found = summary_rewards(
        margins, mask, lengths, None, None, repeats, finished, objective=objective
    )
    expected = -np.log(2) - 0.4 - np.array([[0.0, 0.02, 0.01 + 0.5]])
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_repeats_are_counted_within_a_summary_and_without_its_padding() -> None:
    texts = ["abcabd", "abab", "aaaa", "abcd", "a", "", "abcxab"]
    found = count_repeats(
        Tokens(
            jnp.array([[ord(c) for c in text.ljust(8, "a")] for text in texts]),
            jnp.array([len(text) for text in texts]),
        )
    )

    def count(text: str) -> int:
        neighbours = [text[i : i + 2] for i in range(len(text) - 1)]
        return sum(pair in neighbours[:i] for i, pair in enumerate(neighbours))

    assert found.tolist() == [count(text) for text in texts] == [1, 1, 2, 0, 0, 0, 1]


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="log_sigmoid, accuracy, margin"):
        pair_rewards(jnp.zeros(2), kind="win_rate")
