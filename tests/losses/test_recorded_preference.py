"""Preference objectives against the values and gradients that TRL computed (docs/objectives.md
names the cases)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popi_jax.losses import preference
from popi_jax.losses.masked import masked_mean
from popi_jax.losses.preference import BatchTerms, PairLengths, PairLogps, PreferenceObjective
from tests.oracles import recorded

R = recorded.load("preference_losses.npz")
pytestmark = recorded.needed
NO_TERMS = BatchTerms(jnp.ones(()), PairLogps(jnp.zeros(()), jnp.zeros(())))

CASES = {  # case of the file: the objective; gradients by the log-prob of each token
    "dpo_sigmoid": PreferenceObjective("dpo"),
    "dpo_sigmoid_beta05": PreferenceObjective("dpo", beta=0.5),
    "dpo_sigmoid_norm": PreferenceObjective("dpo", length_normalised=True),
    "dpo_sigmoid_plus_sft_w1_w02": PreferenceObjective("dpo", sft_coef=0.2),
    "dpo_hinge": PreferenceObjective("hinge"),
    "dpo_hinge_beta05": PreferenceObjective("hinge", beta=0.5),
    "dpo_ipo": PreferenceObjective("ipo"),
    "dpo_ipo_beta05": PreferenceObjective("ipo", beta=0.5),
    "dpo_robust_ls01": PreferenceObjective("robust", label_smoothing=0.1),
    "kto_d1p0_u1p0": PreferenceObjective("kto"),
    "kto_d1p0_u1p5": PreferenceObjective("kto", undesirable_weight=1.5),
}
OF_SUMS = {  # cases whose gradients are by the log-probs of whole replies
    "cdpo_sigmoid_ls01": PreferenceObjective("dpo", label_smoothing=0.1),
    "cdpo_sigmoid_ls03": PreferenceObjective("dpo", label_smoothing=0.3),
    "cpo_sigmoid": PreferenceObjective("cpo"),
    "cpo_hinge": PreferenceObjective("slic"),
    "simpo": PreferenceObjective("simpo", beta=2.0, gamma=1.0),
    "simpo_ls01": PreferenceObjective("simpo", beta=2.0, gamma=1.0, label_smoothing=0.1),
    "orpo": PreferenceObjective("orpo"),
}


def halves(x: jax.Array) -> PairLogps:
    return PairLogps(*jnp.split(x, 2))


def replies() -> tuple[jax.Array, PairLengths, PairLogps, np.ndarray]:
    """Tokens of the policy, lengths, reference, mask. Rows: all chosen replies, then all
    rejected."""
    mask = R["completion_mask"][:, 1:]
    lengths = PairLengths(*map(jnp.asarray, np.split(mask.sum(-1).astype(np.int32), 2)))
    return (
        jnp.asarray(R["policy_token_logps"]),
        lengths,
        halves(jnp.asarray(R["ref_token_logps"].sum(-1))),
        mask,
    )


@pytest.mark.parametrize("case", CASES)
def test_of_tokens(case: str) -> None:
    objective = CASES[case]
    tokens, lengths, reference, mask = replies()
    everyone = jnp.ones(lengths.chosen.shape, bool)

    def losses(tokens: jax.Array) -> jax.Array:
        policy = halves((tokens * mask).sum(-1))
        terms = preference.batch_terms(policy, lengths, reference, everyone, objective=objective)
        if objective.name == "kto":  # TRL's comes from the replies of other prompts
            kl = jnp.float32(R[f"{case}_kl"])
            terms = terms._replace(kto_baseline=PairLogps(kl, kl))
        return preference.preference_losses(policy, lengths, reference, terms, objective=objective)

    if f"{case}_per_pair" in R:
        np.testing.assert_allclose(losses(tokens), R[f"{case}_per_pair"], rtol=1e-5, atol=1e-6)
    value, grad = jax.value_and_grad(lambda t: masked_mean(losses(t), everyone))(tokens)
    np.testing.assert_allclose(value, R[case], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grad, R[f"{case}_grad"] * mask, rtol=1e-4, atol=1e-8)


def test_likelihood_alone() -> None:
    tokens, lengths, _, mask = replies()
    chosen_len = jnp.mean(lengths.chosen.astype(jnp.float32))

    def mean(tokens: jax.Array) -> jax.Array:
        return jnp.mean(preference.sft_losses(halves((tokens * mask).sum(-1)), chosen_len))

    value, grad = jax.value_and_grad(mean)(tokens)
    np.testing.assert_allclose(value, R["dpo_sft"], rtol=1e-5)
    np.testing.assert_allclose(grad, R["dpo_sft_grad"] * mask, rtol=1e-4, atol=1e-8)


def inputs(
    case: str, objective: PreferenceObjective
) -> tuple[PairLogps, PairLengths, PairLogps | None]:
    """As the case was computed: from averages (of one token, then), or from log-ratios (a reference
    of 0, then)."""
    policy = PairLogps(jnp.asarray(R[f"{case}_in_chosen"]), jnp.asarray(R[f"{case}_in_rejected"]))
    ones = jnp.ones(policy.chosen.shape, jnp.int32)
    zeros = jax.tree.map(jnp.zeros_like, policy)
    return policy, PairLengths(ones, ones), zeros if objective.needs_reference else None


@pytest.mark.parametrize("case", OF_SUMS)
def test_of_sums(case: str) -> None:
    objective = OF_SUMS[case]
    policy, lengths, reference = inputs(case, objective)

    def losses(policy: PairLogps) -> jax.Array:
        return preference.preference_losses(
            policy, lengths, reference, NO_TERMS, objective=objective
        )

    if (
        case == "orpo"
    ):  # kept with the other sign, and the gradient is that of the mean of what is kept
        np.testing.assert_allclose(
            losses(policy), -R["orpo_beta_logsigmoid_per_pair"], rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(
            jnp.mean(preference.log_odds_ratios(policy, lengths)),
            R["orpo_mean_log_odds"],
            rtol=1e-5,
        )
        sign = -1.0
    else:
        np.testing.assert_allclose(losses(policy), R[f"{case}_per_pair"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(jnp.mean(losses(policy)), R[case], rtol=1e-5)
        margins = preference.pair_margins(policy, lengths, reference, objective=objective)
        np.testing.assert_allclose(
            margins,
            R[f"{case}_chosen_rewards"] - R[f"{case}_rejected_rewards"],
            rtol=1e-5,
            atol=1e-6,
        )
        sign = 1.0
    grads = jax.grad(lambda p: jnp.mean(losses(p)))(policy)
    np.testing.assert_allclose(sign * grads.chosen, R[f"{case}_grad_chosen"], rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(
        sign * grads.rejected, R[f"{case}_grad_rejected"], rtol=1e-4, atol=1e-8
    )


def test_averages_over_tokens_are_taken_inside() -> None:
    """SimPO, ORPO and their like take sums and lengths: the averages that TRL was given."""
    tokens, lengths, _, mask = replies()
    policy = halves((tokens * mask).sum(-1))
    for case in ("simpo", "orpo"):
        averages, ones, _ = inputs(case, OF_SUMS[case])
        whole, direct = (
            preference.preference_losses(p, n, None, NO_TERMS, objective=OF_SUMS[case])
            for p, n in ((policy, lengths), (averages, ones))
        )
        np.testing.assert_allclose(whole, direct, rtol=1e-5)


def test_ipo_without_reference_and_average() -> None:
    policy = PairLogps(jnp.asarray(R["cpo_ipo_in_chosen"]), jnp.asarray(R["cpo_ipo_in_rejected"]))
    np.testing.assert_allclose(
        preference.ipo_losses(policy, None, None, beta=0.1), R["cpo_ipo_per_pair"], rtol=1e-5
    )
    grads = jax.grad(lambda p: jnp.mean(preference.ipo_losses(p, None, None, beta=0.1)))(policy)
    np.testing.assert_allclose(grads.chosen, R["cpo_ipo_grad_chosen"], rtol=1e-4)
    np.testing.assert_allclose(grads.rejected, R["cpo_ipo_grad_rejected"], rtol=1e-4)
