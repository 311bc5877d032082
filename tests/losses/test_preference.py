"""The preference objectives against float64 numpy, and their properties."""

import dataclasses
from functools import partial

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popi_jax.losses import preference
from popi_jax.losses.masked import masked_mean
from popi_jax.losses.preference import (
    PairLengths,
    PairLogps,
    PreferenceObjective,
    dpo_losses,
    preference_margins,
)
from tests.oracles import losses as oracle
from tests.oracles import objectives

few = hypothesis.settings(max_examples=12, deadline=None)
logps = hnp.arrays(np.float32, (4, 5), elements=st.floats(-60, 0, width=32))
betas = st.sampled_from([0.1, 0.3, 2.0])

OBJECTIVES = {
    "dpo": PreferenceObjective(beta=0.2),
    "cdpo": PreferenceObjective(beta=0.2, label_smoothing=0.2),
    "length-normalised dpo": PreferenceObjective(beta=2.0, length_normalised=True),
    "dpo and sft": PreferenceObjective(sft_coef=0.3),
    "robust": PreferenceObjective("robust", label_smoothing=0.3),
    "dpo over beta and sft": PreferenceObjective(beta=0.02, over_beta=True, sft_coef=0.3),
    "slic over beta": PreferenceObjective("slic", beta=0.05, over_beta=True),
    "ipo": PreferenceObjective("ipo", beta=0.4),
    "hinge": PreferenceObjective("hinge"),
    "kto": PreferenceObjective("kto", desirable_weight=0.7, undesirable_weight=1.4),
    "slic": PreferenceObjective("slic", beta=0.05, sft_coef=0.1),
    "cpo": PreferenceObjective("cpo", sft_coef=1.0),
    "simpo": PreferenceObjective("simpo", beta=2.0, gamma=0.6, sft_coef=0.5),
    "orpo": PreferenceObjective("orpo", beta=0.5, sft_coef=1.0),
    "rrhf": PreferenceObjective("rrhf", sft_coef=1.0),
}
each = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)


def pair(chosen: np.ndarray, rejected: np.ndarray) -> PairLogps:
    return PairLogps(jnp.asarray(chosen), jnp.asarray(rejected))


class Batch:
    """Replies of 1 to 9 tokens of two users, with pairs that do not count."""

    def __init__(self, seed: int, shape: tuple[int, ...] = (2, 5)) -> None:
        rng = np.random.default_rng(seed)
        self.lengths = PairLengths(*(rng.integers(1, 10, shape).astype(np.int32) for _ in range(2)))
        self.policy, self.reference = (
            PairLogps(
                *((-n * rng.uniform(0.05, 3.0, shape)).astype(np.float32) for n in self.lengths)
            )
            for _ in range(2)
        )
        self.mask = rng.random(shape) < 0.7
        self.mask.flat[0] = True

    def losses(self, objective: PreferenceObjective, policy: PairLogps | None = None) -> jax.Array:
        arrays = jax.tree.map(jnp.asarray, (self.policy, self.lengths, self.reference, self.mask))
        terms = preference.batch_terms(*arrays, objective=objective)
        _, lengths, reference, _ = arrays
        return preference.preference_losses(
            policy or arrays[0], lengths, reference, terms, objective=objective
        )

    def mean(self, objective: PreferenceObjective) -> tuple[jax.Array, PairLogps]:
        policy = jax.tree.map(jnp.asarray, self.policy)
        return jax.value_and_grad(
            lambda p: masked_mean(self.losses(objective, p), jnp.asarray(self.mask))
        )(policy)


def rows(x: tuple) -> np.ndarray:
    return np.stack([np.ravel(x.chosen), np.ravel(x.rejected)], -1).astype(np.float64)


@each
@pytest.mark.parametrize("seed", range(2))
def test_value_and_gradient_equal_the_equation(objective: PreferenceObjective, seed: int) -> None:
    b = Batch(seed)
    ratios = [
        (p - r)[b.mask].astype(np.float64).mean()
        for p, r in zip(b.policy, b.reference, strict=True)
    ]
    equation = partial(
        objectives.preference,
        objective,
        lengths=rows(b.lengths),
        reference=rows(b.reference),
        chosen_len=b.lengths.chosen[b.mask].mean(),
        baseline=[max(0.0, x) for x in reversed(ratios)],
    )
    np.testing.assert_allclose(
        np.ravel(b.losses(objective)), equation(rows(b.policy)), rtol=1e-5, atol=1e-5
    )
    value, grads = b.mean(objective)
    real = np.ravel(b.mask)
    np.testing.assert_allclose(value, equation(rows(b.policy))[real].mean(), rtol=1e-5, atol=1e-5)
    slope = objectives.slope(lambda x: equation(x)[real].mean(), rows(b.policy))
    np.testing.assert_allclose(rows(grads), slope, rtol=1e-4, atol=1e-6)
    assert np.abs(slope).max() > 1e-3


@each
def test_the_order_of_the_pairs_and_pairs_that_do_not_count_do_not_matter(
    objective: PreferenceObjective,
) -> None:
    b = Batch(3)
    value, grads = b.mean(objective)
    order = np.random.default_rng(0).permutation(5)
    moved = Batch(3)
    moved.policy, moved.lengths, moved.reference, moved.mask = jax.tree.map(
        lambda x: x[::-1, order], (b.policy, b.lengths, b.reference, b.mask)
    )
    again, grads_again = moved.mean(objective)
    np.testing.assert_allclose(again, value, rtol=1e-5)
    np.testing.assert_allclose(grads_again.chosen, grads.chosen[::-1, order], rtol=1e-5, atol=1e-7)
    b.policy = jax.tree.map(lambda x: np.where(b.mask, x, np.float32(-7)), b.policy)
    b.lengths = jax.tree.map(lambda x: np.where(b.mask, x, np.int32(0)), b.lengths)
    np.testing.assert_allclose(b.mean(objective)[0], value, rtol=1e-6)


@each
def test_parts_of_a_batch_add_up_to_the_whole(objective: PreferenceObjective) -> None:
    b = Batch(4, (6, 3))
    value, grads = b.mean(objective)
    arrays = jax.tree.map(jnp.asarray, (b.policy, b.lengths, b.reference, b.mask))
    terms = preference.batch_terms(*arrays, objective=objective)
    total, parts = 0.0, []
    for i in (0, 2, 4):
        policy, lengths, reference, mask = jax.tree.map(lambda x, i=i: x[i : i + 2], arrays)

        def part(policy: PairLogps, lengths=lengths, reference=reference, mask=mask) -> jax.Array:
            losses = preference.preference_losses(
                policy, lengths, reference, terms, objective=objective
            )
            return jnp.sum(jnp.where(mask, losses, 0.0)) / jnp.sum(arrays[3])

        found, grad = jax.value_and_grad(part)(policy)
        total += found
        parts.append(grad)
    np.testing.assert_allclose(total, value, rtol=1e-5)
    np.testing.assert_allclose(
        jnp.concatenate([g.chosen for g in parts]), grads.chosen, rtol=1e-5, atol=1e-8
    )
    np.testing.assert_allclose(
        jnp.concatenate([g.rejected for g in parts]), grads.rejected, rtol=1e-5, atol=1e-8
    )


@each
def test_a_better_pair_has_a_larger_margin_and_no_larger_loss(
    objective: PreferenceObjective,
) -> None:
    b = Batch(5)
    arrays = jax.tree.map(jnp.asarray, (b.policy, b.lengths, b.reference))
    better = arrays[0]._replace(chosen=arrays[0].chosen * 0.9)
    margins, improved = (
        preference.pair_margins(p, *arrays[1:], objective=objective) for p in (arrays[0], better)
    )
    assert (improved > margins).all()
    if objective.name != "ipo" and objective != OBJECTIVES["cdpo"]:  # their best margin is finite
        assert (b.losses(objective, better) <= b.losses(objective)).all()
    same = PairLogps(arrays[0].chosen, arrays[0].chosen)
    twice = PairLengths(arrays[1].chosen, arrays[1].chosen)
    np.testing.assert_array_equal(
        preference.pair_margins(same, twice, same, objective=objective), 0.0
    )


@few
@hypothesis.given(logps, logps, logps, logps, betas)
def test_dpo_and_its_gradient_equal_the_equation(c, r, rc, rr, beta: float) -> None:
    expected, slope = oracle.dpo(c, r, rc, rr, beta)
    policy, reference = pair(c, r), pair(rc, rr)
    found = dpo_losses(policy, reference, beta=beta)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    grads = jax.grad(lambda p: jnp.sum(dpo_losses(p, reference, beta=beta)))(policy)
    np.testing.assert_allclose(grads.chosen, slope, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grads.rejected, -slope, rtol=1e-4, atol=1e-5)
    assert (np.asarray(found) >= 0).all()


@few
@hypothesis.given(logps, logps, st.floats(0.01, 10), st.sampled_from([0.0, 0.2]))
def test_dpo_is_log_2_where_policy_and_reference_agree(c, r, beta: float, smoothing: float) -> None:
    found = dpo_losses(pair(c, r), pair(c, r), beta=beta, label_smoothing=smoothing)
    np.testing.assert_allclose(found, np.log(2), rtol=1e-6)


@few
@hypothesis.given(logps, logps, logps, logps)
def test_swapping_the_replies_negates_the_margin(c, r, rc, rr) -> None:
    margins = preference_margins(pair(c, r), pair(rc, rr), beta=0.3)
    swapped = preference_margins(pair(r, c), pair(rr, rc), beta=0.3)
    np.testing.assert_allclose(swapped, -np.asarray(margins), atol=1e-5)


def test_extreme_margins_stay_finite() -> None:
    far = jnp.array([1e4, -1e4])
    grads = jax.grad(
        lambda x: jnp.sum(dpo_losses(PairLogps(x, -x), pair(0 * far, 0 * far), beta=1.0))
    )(far)
    np.testing.assert_allclose(grads, [0.0, -2.0], atol=1e-6)


def test_odds_of_certain_and_of_hopeless_replies_stay_finite() -> None:
    policy = PairLogps(jnp.array([0.0, -1e4, -1e-5]), jnp.array([-1e4, 0.0, -1e-5]))
    ones = PairLengths(jnp.ones(3, jnp.int32), jnp.ones(3, jnp.int32))
    value, grads = jax.value_and_grad(lambda p: jnp.sum(preference.orpo_losses(p, ones, beta=1.0)))(
        policy
    )
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in grads)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "ppo"}, "dpo, robust, .*rrhf"),
        ({"name": "robust", "label_smoothing": 0.5}, "less than 0.5"),
        ({"name": "ipo", "over_beta": True}, "dpo, robust, hinge, slic, cpo, not with 'ipo'"),
    ],
)
def test_what_is_not_allowed_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PreferenceObjective(), **settings)


def test_a_missing_reference_is_refused() -> None:
    b = Batch(0)
    arrays = jax.tree.map(jnp.asarray, (b.policy, b.lengths))
    for name in preference.WITH_REFERENCE:
        with pytest.raises(ValueError, match="needs the log-probs of a reference"):
            preference.pair_margins(*arrays, None, objective=PreferenceObjective(name))
    for name in preference.REFERENCE_FREE:
        assert np.isfinite(
            preference.pair_margins(*arrays, None, objective=PreferenceObjective(name))
        ).all()
