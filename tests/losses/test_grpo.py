"""The policy-gradient losses against float64 numpy, and their properties."""

import dataclasses

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popi_jax.losses import grpo
from popi_jax.losses.grpo import (
    PolicyObjective,
    clipped_surrogates,
    group_advantages,
    kl_estimates,
    policy_loss,
    policy_sums,
)
from tests.oracles import losses as oracle
from tests.oracles import objectives

few = hypothesis.settings(max_examples=15, deadline=None)
scales = st.sampled_from(grpo.SCALES)
baselines = st.sampled_from(grpo.BASELINES)
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

    def loss_and_grad(
        self, clip_eps: float = 0.2, kl_coef: float = 0.05
    ) -> tuple[jax.Array, jax.Array]:
        rest = map(jnp.asarray, (self.old, self.reference, self.advantages, self.mask))
        objective = PolicyObjective(clip_low=clip_eps, clip_high=clip_eps, kl_coef=kl_coef)

        def loss(logps: jax.Array, *rest: jax.Array) -> jax.Array:
            return policy_loss(policy_sums(logps, *rest, objective=objective), objective=objective)

        return jax.value_and_grad(loss)(jnp.asarray(self.logps), *rest)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("clip_eps", "kl_coef"), [(0.2, 0.0), (0.1, 0.05), (5.0, 1.0)])
def test_loss_and_gradient_equal_the_equation(seed: int, clip_eps: float, kl_coef: float) -> None:
    case = Case(seed)
    expected, slope = oracle.grpo(
        case.logps, case.old, case.reference, case.advantages, case.mask, clip_eps, kl_coef
    )
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
@hypothesis.given(rewards, scales, baselines)
def test_advantages_equal_the_equation(r: np.ndarray, scale: str, baseline: str) -> None:
    # float32 leaves a rounding of the mean behind, which a tiny standard deviation magnifies
    hypothesis.assume(all(np.ptp(row) > 1e-2 for row in r))
    found = group_advantages(jnp.asarray(r), scale=scale, baseline=baseline)
    np.testing.assert_allclose(
        found, objectives.advantages(r, baseline, scale), rtol=1e-3, atol=1e-4
    )


@few
@hypothesis.given(rewards, st.permutations(range(4)), st.permutations(range(3)), scales, baselines)
def test_permuted_summaries_and_users_have_permuted_advantages(
    r: np.ndarray, order: list[int], users: list[int], scale: str, baseline: str
) -> None:
    hypothesis.assume(all(np.ptp(row) > 1e-2 for row in r))
    straight = np.asarray(group_advantages(jnp.asarray(r), scale=scale, baseline=baseline))
    permuted = group_advantages(jnp.asarray(r[users][:, order]), scale=scale, baseline=baseline)
    np.testing.assert_allclose(permuted, straight[users][:, order], rtol=1e-3, atol=1e-4)


@few
@hypothesis.given(st.floats(-8, 0, width=32), st.sampled_from([2, 3, 4, 7]), scales, baselines)
def test_equal_rewards_have_no_advantage(
    reward: float, group: int, scale: str, baseline: str
) -> None:
    found = group_advantages(
        jnp.full((2, group), reward, jnp.float32), scale=scale, baseline=baseline
    )
    np.testing.assert_array_equal(found, 0.0)
    if scale != "whiten" and baseline != "batch":  # and beside a group whose rewards differ
        mixed = np.stack([np.full(group, reward, np.float32), np.arange(group, dtype=np.float32)])
        found = np.asarray(group_advantages(jnp.asarray(mixed), scale=scale, baseline=baseline))
        np.testing.assert_array_equal(found[0], 0.0)
        assert (found[1] != 0).any()


def test_leaving_one_out_needs_two() -> None:
    for settings in (
        {"scale": "none", "baseline": "leave_one_out"},
        {"scale": "group"},
        {"scale": "sigma"},
    ):
        with pytest.raises(ValueError, match="two summaries|allowed: none, group"):
            group_advantages(jnp.zeros((3, 1)), **settings)


@few
@hypothesis.given(hnp.arrays(np.float32, (1, 2, 3), elements=st.floats(-9, 0, width=32)))
def test_kl_estimate_is_positive_and_0_at_the_reference(x: np.ndarray) -> None:
    assert (
        np.asarray(kl_estimates(jnp.asarray(x), jnp.asarray(x[..., ::-1].copy()))) >= -1e-6
    ).all()
    np.testing.assert_array_equal(kl_estimates(jnp.asarray(x), jnp.asarray(x)), 0.0)


def test_kl_estimate_is_unbiased() -> None:
    rng = np.random.default_rng(0)
    p, q = (oracle.log_softmax(rng.normal(size=7)) for _ in range(2))
    estimates = kl_estimates(
        jnp.asarray(p, jnp.float32)[None, None], jnp.asarray(q, jnp.float32)[None, None]
    )
    np.testing.assert_allclose(
        np.sum(np.exp(p) * estimates[0, 0]), np.sum(np.exp(p) * (p - q)), rtol=1e-5
    )


OBJECTIVES = {
    "samples": PolicyObjective(kl_coef=0.05),
    "grpo": PolicyObjective(normalise="sequences", kl_coef=0.04),
    "dapo, clip-higher, entropy": PolicyObjective(
        normalise="tokens", clip_high=0.28, entropy_coef=0.02
    ),
    "dr. grpo, two-sided clip": PolicyObjective(normalise="max_len", max_len=9, clip_max=1.25),
    "gspo": PolicyObjective(
        ratio="sequence", normalise="sequences", clip_low=0.04, clip_high=0.06, kl_coef=0.04
    ),
    "gspo-token": PolicyObjective(
        ratio="sequence_token", normalise="sequences", clip_low=0.04, clip_high=0.06
    ),
    "k2": PolicyObjective(kl="k2", kl_coef=0.3),
    "k3, corrected": PolicyObjective(kl_coef=0.3, kl_corrected=True, normalise="tokens"),
}
each = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)


def sums_of(
    case: Case, logps, objective: PolicyObjective, rows: slice = slice(None), active=None
) -> grpo.PolicySums:
    arrays = (case.old, case.reference, case.advantages, case.mask, -0.3 * case.reference)
    old, reference, advantages, mask, entropies = (jnp.asarray(x[rows]) for x in arrays)
    return grpo.policy_sums(
        logps[rows],
        old,
        reference,
        advantages,
        mask,
        entropies,
        None if active is None else active[rows],
        objective=objective,
    )


def loss_and_grad(case: Case, objective: PolicyObjective) -> tuple[jax.Array, jax.Array]:
    return jax.value_and_grad(
        lambda x: grpo.policy_loss(sums_of(case, x, objective), objective=objective)
    )(jnp.asarray(case.logps))


@each
def test_every_form_equals_its_equation(objective: PolicyObjective) -> None:
    case = Case(5)
    assert not case.mask.any(-1).all()  # a sample without a token
    lengths = np.maximum(case.mask.sum(-1), 1)
    start = case.logps.astype(np.float64)
    fixed = (np.exp(np.where(case.mask, start - case.old, 0).sum(-1) / lengths), start)

    def equation(x: np.ndarray) -> float:
        entropies = -0.3 * case.reference.astype(np.float64)
        rest = (case.old, case.reference, case.advantages)
        return objectives.policy(
            objective, x, *(y.astype(np.float64) for y in rest), case.mask, entropies, fixed
        )

    value, grad = loss_and_grad(case, objective)
    np.testing.assert_allclose(value, equation(start), rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(grad, objectives.slope(equation, start), rtol=2e-4, atol=1e-6)


@each
def test_padding_and_order_do_not_matter(objective: PolicyObjective) -> None:
    case = Case(6)
    value, grad = loss_and_grad(case, objective)
    users, group = [2, 0, 1], [3, 1, 0, 2]
    for name in ("logps", "old", "reference", "advantages", "mask"):
        x = getattr(case, name)[users][:, group]
        if x.ndim == 3:
            garbage = False if name == "mask" else 1e4 if name == "old" else -1e4
            x = np.pad(x, ((0, 0), (0, 0), (0, 3)), constant_values=garbage)
        setattr(case, name, x)
    again, grad_again = loss_and_grad(case, objective)
    np.testing.assert_allclose(again, value, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(
        grad_again[..., :6], np.asarray(grad)[users][:, group], rtol=1e-5, atol=1e-7
    )
    np.testing.assert_array_equal(grad_again[..., 6:], 0.0)


@each
def test_parts_of_a_batch_add_up_to_the_whole(objective: PolicyObjective) -> None:
    case = Case(7)
    mask = jnp.asarray(case.mask)
    active = grpo.high_entropy_mask(-0.3 * jnp.asarray(case.reference), mask, share=0.5)
    logps, parts = jnp.asarray(case.logps), [slice(i, i + 1) for i in range(3)]

    def loss(x: jax.Array) -> jax.Array:
        return grpo.policy_loss(sums_of(case, x, objective, active=active), objective=objective)

    value, grad = jax.value_and_grad(loss)(logps)
    sums = [sums_of(case, logps, objective, rows, active) for rows in parts]
    added = jax.tree.map(lambda *x: sum(x), *sums)
    np.testing.assert_allclose(
        grpo.policy_loss(added, objective=objective), value, rtol=1e-5, atol=1e-7
    )
    weights = grpo.policy_weights(mask, active, objective=objective)
    grads = [
        jax.grad(
            lambda x, rows=rows: grpo.policy_loss(
                sums_of(case, x, objective, rows, active), weights, objective=objective
            )
        )(logps)
        for rows in parts
    ]
    np.testing.assert_allclose(sum(grads), grad, rtol=1e-5, atol=1e-8)


def test_gradients_of_the_kl_estimators() -> None:
    """In expectation over the policy's own samples: k2 and the corrected k3 have the gradient of
    KL(policy || ref), k3 that of KL(ref || policy), and k1 none, so that it is refused in the
    loss."""
    rng = np.random.default_rng(0)
    x, ref = rng.normal(size=7), oracle.log_softmax(rng.normal(size=7))
    p = np.exp(oracle.log_softmax(x))

    def kl(z: np.ndarray) -> float:
        return float(np.sum(np.exp(oracle.log_softmax(z)) * (oracle.log_softmax(z) - ref)))

    reverse = objectives.slope(kl, x)
    forward = objectives.slope(lambda z: -np.sum(np.exp(ref) * oracle.log_softmax(z)), x)

    def gradient(estimator: str, corrected: bool) -> jax.Array:
        def expected(z: jax.Array) -> jax.Array:
            logps = jax.nn.log_softmax(z)[None, None]
            k = kl_estimates(logps, jnp.asarray(ref, jnp.float32)[None, None], estimator=estimator)
            ratio = jnp.exp(logps - jax.lax.stop_gradient(logps)) if corrected else 1.0
            return jnp.sum(jnp.asarray(p, jnp.float32)[None, None] * ratio * k)

        return jax.grad(expected)(jnp.asarray(x, jnp.float32))

    np.testing.assert_allclose(gradient("k1", False), 0.0, atol=1e-6)
    np.testing.assert_allclose(gradient("k2", False), reverse, atol=1e-5)
    np.testing.assert_allclose(gradient("k3", True), reverse, atol=1e-5)
    np.testing.assert_allclose(gradient("k3", False), forward, atol=1e-5)
    with pytest.raises(ValueError, match="gradient is 0 in expectation"):
        PolicyObjective(kl="k1")


def test_kl_for_the_reward_is_summed_k1_without_gradient() -> None:
    case = Case(8)
    args = [jnp.asarray(x) for x in (case.logps, case.reference, case.mask)]
    expected = np.where(case.mask, case.logps.astype(np.float64) - case.reference, 0).sum(-1)
    np.testing.assert_allclose(grpo.summed_kl(*args), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(
        jax.grad(lambda x: jnp.sum(grpo.summed_kl(x, *args[1:])))(args[0]), 0.0
    )


@few
@hypothesis.given(
    hnp.arrays(np.float32, (2, 3, 4), elements=st.floats(0, 4, width=32)),
    hnp.arrays(bool, (2, 3, 4)),
    st.sampled_from([0.2, 0.5, 1.0]),
)
def test_high_entropy_tokens_are_those_above_the_quantile(entropies, mask, share: float) -> None:
    found = np.asarray(
        grpo.high_entropy_mask(jnp.asarray(entropies), jnp.asarray(mask), share=share)
    )
    assert not found[~mask].any()
    if mask.any():
        threshold = np.quantile(entropies[mask].astype(np.float64), 1 - share)
        sure = np.abs(entropies - threshold) > 1e-5
        np.testing.assert_array_equal(found[sure], (mask & (entropies > threshold))[sure])
        assert found.sum() >= share * (mask.sum() - 1)


def test_unfinished_samples_leave_the_loss() -> None:
    case = Case(9)
    finished = np.array([[True, False, True, True]] * 3)
    before = case.mask
    case.mask = np.asarray(grpo.finished_mask(jnp.asarray(before), jnp.asarray(finished)))
    objective = PolicyObjective(normalise="tokens", kl_coef=0.1)
    _, grad = loss_and_grad(case, objective)
    np.testing.assert_array_equal(np.asarray(grad)[:, 1], 0.0)
    assert (np.abs(np.asarray(grad)[:, 0]).sum(-1) > 0).any()
    np.testing.assert_array_equal(case.mask[:, [0, 2, 3]], before[:, [0, 2, 3]])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": "word"}, "token, sequence, sequence_token"),
        ({"normalise": "mean"}, "samples, sequences, tokens, max_len"),
        ({"normalise": "max_len"}, "go together"),
        ({"kl": "k4"}, "k2, k3"),
        ({"kl": "k2", "kl_corrected": True}, "goes with kl 'k3'"),
        ({"clip_max": 0.9}, "more than 1"),
    ],
)
def test_what_is_not_allowed_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PolicyObjective(), **settings)


def test_clips_by_hand() -> None:
    """Ratios 5, 1 and 0.1 with advantages -1 and 1."""
    ratios = jnp.broadcast_to(jnp.array([5.0, 1.0, 0.1]), (1, 2, 3))
    advantages = jnp.array([[-1.0, 1.0]])

    for clip_max, first in ((None, 5.0), (3.0, 3.0)):
        found = clipped_surrogates(
            ratios, advantages, clip_low=0.2, clip_high=0.3, clip_max=clip_max
        )
        np.testing.assert_allclose(found[0], [[first, 1.0, 0.8], [-1.3, -1.0, -0.1]], rtol=1e-6)
