"""Group-relative policy gradient (GRPO, arXiv 2402.03300) for the summaries of a user."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def group_advantages(rewards: Float[Array, "users group"], *, scale: str) -> Float[Array, "users group"]:
    """Rewards less the mean of their group. Scale "group" divides by the group's standard deviation (unbiased, + 1e-4),
    "batch" by that of all centred rewards: a group whose summaries hardly differ then weighs little."""
    centred = rewards - jnp.mean(rewards, axis=-1, keepdims=True)
    if scale == "none":
        return centred
    if scale == "batch":
        return centred / (jnp.std(centred) + 1e-4)
    return centred / (jnp.std(rewards, axis=-1, keepdims=True, ddof=1) + 1e-4)


def policy_losses(
    logps: Float[Array, "users group seq"],
    old_logps: Float[Array, "users group seq"],
    advantages: Float[Array, "users group"],
    *,
    clip_eps: float,
) -> Float[Array, "users group seq"]:
    """Clipped surrogate of each token: -min(r A, clip(r, 1 - eps, 1 + eps) A), r = exp(logp - old logp)."""
    ratio = jnp.exp(logps - old_logps)
    a = advantages[..., None]
    return -jnp.minimum(ratio * a, jnp.clip(ratio, 1.0 - clip_eps, 1.0 + clip_eps) * a)


def kl_estimates(
    logps: Float[Array, "users group seq"], reference_logps: Float[Array, "users group seq"]
) -> Float[Array, "users group seq"]:
    """k3 estimate of KL(policy || reference) at each token, >= 0 and unbiased (nats)."""
    log_ratio = reference_logps - logps
    return jnp.exp(log_ratio) - log_ratio - 1.0


def grpo_loss(
    logps: Float[Array, "users group seq"],
    old_logps: Float[Array, "users group seq"],
    reference_logps: Float[Array, "users group seq"],
    advantages: Float[Array, "users group"],
    mask: Bool[Array, "users group seq"],
    *,
    clip_eps: float,
    kl_coef: float,
) -> Float[Array, ""]:
    """Mean over samples of the summed token losses, each policy loss + kl_coef * KL.

    Sums over tokens are divided by the number of samples, not of tokens: no length bias within a group (Dr. GRPO,
    arXiv 2503.20783, up to its constant).
    """
    # what stands in the padding must not reach exp: the gradient of an infinity that is masked is not a number
    logps, old_logps, reference_logps = (jnp.where(mask, x, 0.0) for x in (logps, old_logps, reference_logps))
    tokens = policy_losses(logps, old_logps, advantages, clip_eps=clip_eps)
    tokens = tokens + kl_coef * kl_estimates(logps, reference_logps)
    samples = jnp.sum(jnp.where(mask, tokens, 0.0), axis=-1)
    return jnp.sum(samples) / samples.size
