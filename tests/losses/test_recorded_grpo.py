"""Every policy objective against the values and gradients that TRL computed (docs/objectives.md
names the cases)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popi_jax.losses import grpo
from popi_jax.losses.grpo import PolicyObjective
from tests.oracles import recorded

R = recorded.load("grpo_losses.npz")
A = recorded.load("grpo_advantages.npz")
pytestmark = recorded.needed
FORMS = {
    "grpo": PolicyObjective(normalise="sequences"),
    "bnpo": PolicyObjective(normalise="tokens"),
    "dapo": PolicyObjective(normalise="tokens"),
    "dr_grpo": PolicyObjective(normalise="max_len", max_len=10),
}
CASES = {f"{name}_nokl": form for name, form in FORMS.items()}
for name, form in FORMS.items():
    CASES[f"{name}_kl004"] = PolicyObjective(
        normalise=form.normalise, max_len=form.max_len, kl_coef=0.04
    )
CASES |= {
    "grpo_cliphigher028": PolicyObjective(normalise="sequences", clip_high=0.28),
    "dapo_cliphigher028": PolicyObjective(normalise="tokens", clip_high=0.28),
    "grpo_delta13": PolicyObjective(normalise="sequences", clip_max=1.3),
    "gspo_sequence_level": PolicyObjective(
        normalise="sequences", ratio="sequence", clip_low=0.05, clip_high=0.08
    ),
    "gspo_sequence_level_kl004": PolicyObjective(
        normalise="sequences", ratio="sequence", clip_low=0.05, clip_high=0.08, kl_coef=0.04
    ),
    "grpo_kl004_biascorrected": PolicyObjective(
        normalise="sequences", kl_coef=0.04, kl_corrected=True
    ),
    "grpo_top_entropy_20pct": PolicyObjective(normalise="sequences"),
    "grpo_entropy_bonus_001": PolicyObjective(normalise="sequences", entropy_coef=0.01),
    "grpo_onpolicy_nokl": PolicyObjective(normalise="sequences"),
    "grpo_onpolicy_kl004": PolicyObjective(normalise="sequences", kl_coef=0.04),
    "grpo_accum4": PolicyObjective(normalise="sequences"),
}


def grouped(x: np.ndarray) -> jax.Array:
    return jnp.asarray(x).reshape(2, -1, *x.shape[1:])


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient(case: str) -> None:
    objective = CASES[case]
    mask = grouped(R["completion_mask"].astype(bool))
    entropies, reference = grouped(R["entropies"]), grouped(R["ref_logps"])
    active = grpo.high_entropy_mask(entropies, mask, share=0.2) if "top_entropy" in case else None
    weights = grpo.policy_weights(mask, active, objective=objective)
    if case == "grpo_accum4":  # one of four equal parts of a batch
        weights = jax.tree.map(lambda x: 4 * x, weights)

    def loss(logps: jax.Array) -> jax.Array:
        old = jax.lax.stop_gradient(logps) if "onpolicy" in case else grouped(R["old_logps"])
        sums = grpo.policy_sums(
            logps,
            old,
            reference,
            grouped(R["advantages"]),
            mask,
            entropies,
            active,
            objective=objective,
        )
        return grpo.policy_loss(sums, weights, objective=objective)

    value, grad = jax.value_and_grad(loss)(grouped(R["policy_logps"]))
    np.testing.assert_allclose(value, R[case], rtol=1e-5, atol=1e-6)
    expected = grouped(R[f"{case}_grad"]) * mask
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("scale", "theirs"), [("group", "group"), ("none", "none"), ("batch_rewards", "batch")]
)
def test_advantages(scale: str, theirs: str) -> None:
    rewards = jnp.asarray(A["rewards"]).reshape(-1, int(A["num_generations"]))
    found = np.asarray(grpo.group_advantages(rewards, scale=scale)).reshape(-1)
    np.testing.assert_allclose(found, A[f"advantages_scale_{theirs}"], rtol=1e-4, atol=1e-5)
    equal = np.ptp(rewards, axis=-1) == 0
    assert equal.any() and (found.reshape(rewards.shape)[equal] == 0).all()
