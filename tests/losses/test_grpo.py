"""The policy-gradient loss against float64 numpy, and its properties."""

import pathlib

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popi_jax.losses.grpo import group_advantages, grpo_loss, kl_estimates
from tests.oracles import losses as oracle

RECORDED = pathlib.Path(__file__).parents[3] / "shared" / "oracles"
few = hypothesis.settings(max_examples=25, deadline=None)
scales = st.sampled_from(["group", "batch", "none"])
rewards = hnp.arrays(np.float32, (3, 4), elements=st.floats(-8, 0, width=32))


class Case:
    """Random log-probs near those that sampled, with tokens on both sides of the clip range."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        shape = (3, 4, 6)
        self.logps = -rng.exponential(2.0, shape).astype(np.float32)
        self.old = (self.logps + rng.normal(0, 0.3, shape)).astype(np.float32)
        self.reference = (self.logps + rng.normal(0, 0.5, shape)).astype(np.float32)
        self.advantages = rng.normal(size=shape[:2]).astype(np.float32)
        self.mask = np.arange(6) < rng.integers(0, 7, shape[:2])[..., None]

    def loss_and_grad(self, clip_eps: float = 0.2, kl_coef: float = 0.05) -> tuple[jax.Array, jax.Array]:
        rest = (self.old, self.reference, self.advantages, self.mask)
        return jax.value_and_grad(grpo_loss)(
            jnp.asarray(self.logps), *map(jnp.asarray, rest), clip_eps=clip_eps, kl_coef=kl_coef
        )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("clip_eps", "kl_coef"), [(0.2, 0.0), (0.1, 0.05), (5.0, 1.0)])
def test_loss_and_gradient_equal_the_equation(seed: int, clip_eps: float, kl_coef: float) -> None:
    case = Case(seed)
    expected, slope = oracle.grpo(case.logps, case.old, case.reference, case.advantages, case.mask, clip_eps, kl_coef)
    loss, grad = case.loss_and_grad(clip_eps, kl_coef)
    np.testing.assert_allclose(loss, expected, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(grad, slope, rtol=2e-4, atol=1e-6)


def test_what_stands_in_the_padding_does_not_matter() -> None:
    case = Case(0)
    loss, grad = case.loss_and_grad()
    for garbage in (-1e4, 1e4):  # exp of a difference overflows there
        case.reference = np.where(case.mask, case.reference, np.float32(garbage))
        case.old = np.where(case.mask, case.old, np.float32(-garbage))
        again, grad_again = case.loss_and_grad()
        np.testing.assert_array_equal(again, loss)
        np.testing.assert_array_equal(grad_again, grad)


@few
@hypothesis.given(rewards, scales)
def test_advantages_equal_the_equation(r: np.ndarray, scale: str) -> None:
    # float32 leaves a rounding of the mean behind, which a tiny standard deviation magnifies
    hypothesis.assume(all(np.ptp(row) > 1e-2 for row in r))
    found = group_advantages(jnp.asarray(r), scale=scale)
    np.testing.assert_allclose(found, oracle.advantages(r, scale), rtol=1e-3, atol=1e-4)


@few
@hypothesis.given(rewards, st.permutations(range(4)), scales)
def test_a_permuted_group_has_permuted_advantages(r: np.ndarray, order: list[int], scale: str) -> None:
    hypothesis.assume(all(np.ptp(row) > 1e-2 for row in r))
    straight = np.asarray(group_advantages(jnp.asarray(r), scale=scale))
    permuted = group_advantages(jnp.asarray(r[:, order]), scale=scale)
    np.testing.assert_allclose(permuted, straight[:, order], rtol=1e-3, atol=1e-4)


@few
@hypothesis.given(st.floats(-8, 0, width=32), st.sampled_from([2, 3, 4, 8]), scales)
def test_equal_rewards_have_no_advantage(reward: float, group: int, scale: str) -> None:
    found = group_advantages(jnp.full((2, group), reward, jnp.float32), scale=scale)
    # a mean of equal numbers may differ from them in the last bit, which is divided by 1e-4
    np.testing.assert_allclose(found, 0.0, atol=2e-2)
    assert np.abs(found).max() <= 2e4 * np.finfo(np.float32).eps * max(abs(reward), 1e-30)


@few
@hypothesis.given(hnp.arrays(np.float32, (1, 2, 3), elements=st.floats(-9, 0, width=32)))
def test_kl_estimate_is_positive_and_0_at_the_reference(x: np.ndarray) -> None:
    assert (np.asarray(kl_estimates(jnp.asarray(x), jnp.asarray(x[..., ::-1].copy()))) >= -1e-6).all()
    np.testing.assert_array_equal(kl_estimates(jnp.asarray(x), jnp.asarray(x)), 0.0)


def test_kl_estimate_is_unbiased() -> None:
    rng = np.random.default_rng(0)
    p, q = (oracle.log_softmax(rng.normal(size=7)) for _ in range(2))
    estimates = kl_estimates(jnp.asarray(p, jnp.float32)[None, None], jnp.asarray(q, jnp.float32)[None, None])
    np.testing.assert_allclose(np.sum(np.exp(p) * estimates[0, 0]), np.sum(np.exp(p) * (p - q)), rtol=1e-5)


@pytest.mark.skipif(not RECORDED.exists(), reason="the recorded values of TRL are not here")
class TestRecorded:
    def test_advantages_equal_those_of_trl(self) -> None:
        """But for scale "batch": TRL divides by the deviation of the rewards, we by that of the centred rewards."""
        recorded = np.load(RECORDED / "grpo_advantages.npz")
        r = jnp.asarray(recorded["rewards"]).reshape(-1, int(recorded["num_generations"]))
        for scale in ("group", "none"):
            found = group_advantages(r, scale=scale).reshape(-1)
            np.testing.assert_allclose(found, recorded[f"advantages_scale_{scale}"], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(("case", "kl_coef"), [("dr_grpo_nokl", 0.0), ("dr_grpo_kl004", 0.04)])
    def test_loss_equals_dr_grpo_of_trl(self, case: str, kl_coef: float) -> None:
        """TRL's dr_grpo divides the sum over tokens by samples x padded length; ours by samples."""
        recorded = np.load(RECORDED / "grpo_losses.npz")
        rest = [recorded[name][None] for name in ("old_logps", "ref_logps", "advantages")]
        mask = recorded["completion_mask"][None].astype(bool)
        length = mask.shape[-1]
        loss, grad = jax.value_and_grad(grpo_loss)(
            jnp.asarray(recorded["policy_logps"][None]), *map(jnp.asarray, [*rest, mask]), clip_eps=0.2, kl_coef=kl_coef
        )
        np.testing.assert_allclose(loss / length, recorded[case], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(grad[0] / length, recorded[f"{case}_grad"] * mask[0], rtol=1e-4, atol=1e-7)
