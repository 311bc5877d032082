"""The preference loss and the reward of a summary against float64 numpy, and their properties."""

import pathlib

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popi_jax.losses.preference import PairLogps, dpo_losses, preference_margins
from popi_jax.losses.reward import summary_rewards
from tests.oracles import losses as oracle

RECORDED = pathlib.Path(__file__).parents[3] / "shared" / "oracles" / "preference_losses.npz"
few = hypothesis.settings(max_examples=25, deadline=None)
logps = hnp.arrays(np.float32, (4, 5), elements=st.floats(-60, 0, width=32))


def pair(chosen: np.ndarray, rejected: np.ndarray) -> PairLogps:
    return PairLogps(jnp.asarray(chosen), jnp.asarray(rejected))


@few
@hypothesis.given(logps, logps, logps, logps, st.sampled_from([0.1, 0.3, 2.0]))
def test_loss_and_gradient_equal_the_equation(c, r, rc, rr, beta: float) -> None:
    expected, slope = oracle.dpo(c, r, rc, rr, beta)
    policy, reference = pair(c, r), pair(rc, rr)
    found = dpo_losses(policy, reference, beta=beta)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    grads = jax.grad(lambda p: jnp.sum(dpo_losses(p, reference, beta=beta)))(policy)
    np.testing.assert_allclose(grads.chosen, slope, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grads.rejected, -slope, rtol=1e-4, atol=1e-5)
    assert (np.asarray(found) >= 0).all()


@few
@hypothesis.given(logps, logps, st.floats(0.01, 10))
def test_is_log_2_where_policy_and_reference_agree(c, r, beta: float) -> None:
    np.testing.assert_allclose(dpo_losses(pair(c, r), pair(c, r), beta=beta), np.log(2), rtol=1e-6)


@few
@hypothesis.given(logps, logps, logps, logps)
def test_swapping_the_replies_negates_the_margin(c, r, rc, rr) -> None:
    margins = preference_margins(pair(c, r), pair(rc, rr), beta=0.3)
    swapped = preference_margins(pair(r, c), pair(rr, rc), beta=0.3)
    np.testing.assert_allclose(swapped, -np.asarray(margins), atol=1e-5)


def test_extreme_margins_stay_finite() -> None:
    far = jnp.array([1e4, -1e4])
    grads = jax.grad(lambda x: jnp.sum(dpo_losses(PairLogps(x, -x), pair(0 * far, 0 * far), beta=1.0)))(far)
    np.testing.assert_allclose(grads, [0.0, -2.0], atol=1e-6)


@few
@hypothesis.given(
    hnp.arrays(np.float32, (3, 4, 5), elements=st.floats(-30, 30, width=32)),
    hnp.arrays(bool, (3, 5)),
    hnp.arrays(np.int32, (3, 4), elements=st.integers(1, 9)),
    st.sampled_from([0.0, 0.02]),
)
def test_rewards_equal_the_equation(margins, mask, lengths, penalty: float) -> None:
    found = summary_rewards(jnp.asarray(margins), jnp.asarray(mask), jnp.asarray(lengths), length_penalty=penalty)
    np.testing.assert_allclose(found, oracle.rewards(margins, mask, lengths, penalty), rtol=1e-5, atol=1e-5)
    garbage = np.where(mask[:, None], margins, np.float32(-1e30))
    again = summary_rewards(jnp.asarray(garbage), jnp.asarray(mask), jnp.asarray(lengths), length_penalty=penalty)
    np.testing.assert_array_equal(again, found)  # masked pairs do not matter


@pytest.mark.skipif(not RECORDED.exists(), reason="the recorded values of TRL are not here")
@pytest.mark.parametrize(("case", "beta"), [("dpo_sigmoid", 0.1), ("dpo_sigmoid_beta05", 0.5)])
def test_equals_the_sigmoid_loss_of_trl(case: str, beta: float) -> None:
    recorded = np.load(RECORDED)
    reference = jnp.asarray(recorded["ref_token_logps"])

    def losses(tokens: jax.Array) -> jax.Array:  # rows: all chosen replies, then all rejected
        return dpo_losses(
            PairLogps(*jnp.split(tokens.sum(-1), 2)), PairLogps(*jnp.split(reference.sum(-1), 2)), beta=beta
        )

    tokens = jnp.asarray(recorded["policy_token_logps"])
    np.testing.assert_allclose(losses(tokens), recorded[f"{case}_per_pair"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jnp.mean(losses(tokens)), recorded[case], rtol=1e-5)
    grad = jax.grad(lambda t: jnp.mean(losses(t)))(tokens)
    mask = recorded["completion_mask"][:, 1:]
    np.testing.assert_allclose(grad * mask, recorded[f"{case}_grad"] * mask, atol=1e-6)
