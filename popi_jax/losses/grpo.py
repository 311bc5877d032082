"""Group-relative policy gradients (GRPO, arXiv 2402.03300, and its kin) for summaries.

docs/objectives.md has the table of variants. Losses are returned as sums and their weights: those
of the parts of a batch add up to those of the whole, and one division at the end makes the loss.
Old log-probs are those of the policy that sampled, at the temperature of the sampling, and so are
`logps` and the reference's."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from popi_jax.arrays import Mean
from popi_jax.losses.masked import divided, masked_mean_last

BASELINES = ("group", "leave_one_out", "batch")
SCALES = ("none", "group", "batch", "batch_rewards", "whiten")
RATIOS = ("token", "sequence", "sequence_token")
NORMALISATIONS = ("samples", "sequences", "tokens", "max_len")
ESTIMATORS = ("k1", "k2", "k3")
EPS = 1e-4  # beside every standard deviation, as in TRL


def _check_word(field: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{field} is {value!r}; allowed: {', '.join(allowed)}")


def group_advantages(
    rewards: Float[Array, "users group"], *, scale: str, baseline: str = "group"
) -> Float[Array, "users group"]:
    """(reward - baseline) / (scale + 1e-4); exactly 0 where the rewards compared are all equal.

    Baselines: "group", the mean of the user's G rewards (GRPO); "leave_one_out", that of the other
    G - 1 (RLOO, arXiv 2402.14740: G / (G - 1) times the former); "batch", the mean of all rewards
    (REINFORCE with a baseline).

    Scales: "none" (Dr. GRPO, arXiv 2503.20783); "group", the standard deviation of the group
    (GRPO); "batch_rewards", that of all rewards (TRL "batch", REINFORCE++); "batch", that of all
    centred rewards, without the differences between users and biased: a group whose summaries
    hardly differ weighs little; "whiten", less the mean of all advantages, over their standard
    deviation (TRL's RLOO with normalize_advantages). Unbiased but for "batch".

    Raises ValueError for an unknown name, and for a group of one that must be compared with itself.
    """
    _check_word("scale", scale, SCALES)
    _check_word("baseline", baseline, BASELINES)
    group = rewards.shape[-1]
    if group < 2 and (scale == "group" or baseline == "leave_one_out"):
        raise ValueError(
            f"scale {scale!r} with baseline {baseline!r} needs groups of two summaries or more"
        )
    axis = None if baseline == "batch" else -1
    centred = rewards - jnp.mean(rewards, axis=axis, keepdims=True)
    # the mean of equal numbers may differ from them in the last bit, which 1e-4 would magnify
    equal = jnp.max(rewards, axis=axis, keepdims=True) == jnp.min(rewards, axis=axis, keepdims=True)
    centred = jnp.where(equal, 0.0, centred)
    if baseline == "leave_one_out":
        centred = centred * (group / (group - 1))
    match scale:
        case "batch":
            return centred / (jnp.std(centred) + EPS)
        case "batch_rewards":
            return centred / (jnp.std(rewards, ddof=1) + EPS)
        case "group":
            return centred / (jnp.std(rewards, axis=-1, keepdims=True, ddof=1) + EPS)
        case "whiten":
            return (centred - jnp.mean(centred)) / (jnp.std(centred, ddof=1) + EPS)
    return centred


def kl_estimates(
    logps: Float[Array, "users group seq"],
    reference_logps: Float[Array, "users group seq"],
    *,
    estimator: str = "k3",
) -> Float[Array, "users group seq"]:
    """Estimates of KL(policy || reference) at the sampled tokens, nats; d = log ref - log policy.

    k1 = -d, unbiased; k2 = d^2 / 2, biased, >= 0; k3 = exp(d) - d - 1, unbiased, >= 0 (Schulman,
    "Approximating KL divergence", 2020). Of their gradients see docs/objectives.md."""
    _check_word("estimator", estimator, ESTIMATORS)
    log_ratio = reference_logps - logps
    match estimator:
        case "k1":
            return -log_ratio
        case "k2":
            return 0.5 * log_ratio**2
    return jnp.exp(log_ratio) - log_ratio - 1.0


def summed_kl(
    logps: Float[Array, "users group seq"],
    reference_logps: Float[Array, "users group seq"],
    mask: Bool[Array, "users group seq"],
) -> Float[Array, "users group"]:
    """k1 of whole samples (nats), for `summary_rewards`: sum over tokens of log policy - log ref,
    without gradient.

    In the reward k1 is the right estimator: the gradient of E[reward] is then that of the KL (TRL's
    RLOO)."""
    estimates = kl_estimates(
        *(jnp.where(mask, x, 0.0) for x in (logps, reference_logps)), estimator="k1"
    )
    return jax.lax.stop_gradient(jnp.sum(jnp.where(mask, estimates, 0.0), axis=-1))


@dataclasses.dataclass(frozen=True)
class PolicyObjective:
    """Static settings of the policy loss; docs/objectives.md has what each stands for. The defaults
    are those of this project, not of GRPO.

    k1 is refused as `kl`: its gradient, that of log pi at the policy's own samples, is 0 in
    expectation, whatever the reference; it belongs in the reward (`summed_kl`)."""

    ratio: str = "token"  # r = pi / old of a token; sequence: their geometric mean (GSPO)
    clip_low: float = 0.2  # r is clipped to [1 - clip_low, 1 + clip_high]
    clip_high: float = 0.2
    clip_max: float | None = None  # bound of r where the advantage is negative; None: unbounded
    normalise: str = "samples"  # what the sum over tokens is divided by
    max_len: int | None = None  # tokens, with normalise = "max_len"
    kl: str = "k3"  # estimator of the KL that is added
    kl_coef: float = 0.0  # per nat
    kl_corrected: bool = False  # k3 times r
    entropy_coef: float = 0.0  # of the mean entropy per token, which is subtracted

    def __post_init__(self) -> None:
        _check_word("ratio", self.ratio, RATIOS)
        _check_word("normalise", self.normalise, NORMALISATIONS)
        if self.kl == "k1":
            raise ValueError(
                "kl is 'k1': as a loss its on-policy gradient is 0 in expectation, so it would "
                "regularise nothing; put it in the reward (summed_kl) or take k2 or k3"
            )
        _check_word("kl", self.kl, ("k2", "k3"))
        if self.kl_corrected and self.kl != "k3":
            raise ValueError(
                f"kl_corrected goes with kl 'k3', not {self.kl!r}, whose gradient it would spoil"
            )
        if self.clip_max is not None and self.clip_max <= 1.0:
            raise ValueError(
                f"clip_max is {self.clip_max}; allowed: more than 1, sensibly more than 1 + "
                "clip_high"
            )
        if (self.normalise == "max_len") != (self.max_len is not None):
            raise ValueError(
                f"max_len is {self.max_len} and normalise {self.normalise!r}: they go together"
            )


class PolicyWeights(NamedTuple):
    """What the sums over tokens are divided by. It depends on masks alone."""

    policy: Float[Array, ""]
    entropy: Float[Array, ""]


class PolicySums(NamedTuple):
    """Sums over tokens with their weights; those of the parts of a batch add up."""

    policy: Mean
    entropy: Mean


def finished_mask(
    mask: Bool[Array, "users group seq"], finished: Bool[Array, "users group"]
) -> Bool[Array, "users group seq"]:
    """The mask without the samples that were cut at the length limit: DAPO's overlong filtering
    (arXiv 2503.14476; TRL "mask_truncated_completions"). They still count among the samples of
    "samples", "sequences" and "max_len"."""
    return mask & finished[..., None]


def high_entropy_mask(
    entropies: Float[Array, "users group seq"],
    mask: Bool[Array, "users group seq"],
    *,
    share: float,
) -> Bool[Array, "users group seq"]:
    """The tokens whose entropy is at least the (1 - share) quantile of all that count (arXiv
    2506.01939; TRL "top_entropy_quantile"); the quantile interpolates linearly. Of the whole batch,
    not of its parts."""
    values = jnp.sort(jnp.where(mask, entropies, jnp.inf).reshape(-1))
    rank = (1.0 - share) * (jnp.maximum(jnp.sum(mask), 1) - 1).astype(jnp.float32)
    low = jnp.floor(rank).astype(jnp.int32)
    below, above = values[low], values[jnp.minimum(low + 1, jnp.maximum(jnp.sum(mask), 1) - 1)]
    part = rank - low.astype(jnp.float32)
    threshold = jnp.where(part > 0, below + (above - below) * part, below)
    return mask & (entropies >= threshold)


def _log_ratios(
    logps: Float[Array, "users group seq"],
    old_logps: Float[Array, "users group seq"],
    mask: Bool[Array, "users group seq"],
    ratio: str,
) -> Float[Array, "users group seq"]:
    log_ratios = logps - old_logps
    if ratio == "token":
        return log_ratios
    mean = jnp.broadcast_to(masked_mean_last(log_ratios, mask)[..., None], mask.shape)
    if ratio == "sequence":
        return mean
    return jax.lax.stop_gradient(mean) + logps - jax.lax.stop_gradient(logps)


def clipped_surrogates(
    ratios: Float[Array, "users group seq"],
    advantages: Float[Array, "users group"],
    *,
    clip_low: float,
    clip_high: float,
    clip_max: float | None = None,
) -> Float[Array, "users group seq"]:
    """-min(min(r, clip_max) A, clip(r, 1 - clip_low, 1 + clip_high) A) (PPO, 1707.06347)."""
    a = advantages[..., None]
    bounded = ratios if clip_max is None else jnp.minimum(ratios, clip_max)
    return -jnp.minimum(bounded * a, jnp.clip(ratios, 1.0 - clip_low, 1.0 + clip_high) * a)


def policy_weights(
    mask: Bool[Array, "users group seq"],
    active: Bool[Array, "users group seq"] | None = None,
    *,
    objective: PolicyObjective,
) -> PolicyWeights:
    """The weights of `policy_sums` of the same masks."""
    samples = jnp.float32(mask.shape[0] * mask.shape[1])
    tokens = jnp.sum(mask).astype(jnp.float32)
    policy = {"samples": samples, "sequences": samples, "tokens": tokens}
    policy["max_len"] = samples * (objective.max_len or 1)
    counted = tokens if active is None else jnp.sum(mask & active).astype(jnp.float32)
    return PolicyWeights(policy[objective.normalise], counted)


def policy_sums(
    logps: Float[Array, "users group seq"],
    old_logps: Float[Array, "users group seq"],
    reference_logps: Float[Array, "users group seq"] | None,
    advantages: Float[Array, "users group"],
    mask: Bool[Array, "users group seq"],
    entropies: Float[Array, "users group seq"] | None = None,
    active: Bool[Array, "users group seq"] | None = None,
    *,
    objective: PolicyObjective,
) -> PolicySums:
    """The clipped surrogate plus kl_coef times the KL of each token, summed; and the entropies,
    summed.

    One update per rollout: old_logps = stop_gradient(logps). Several: those that were stored with
    the samples. `active` (`high_entropy_mask`) restricts the surrogate and the entropy, not the KL
    and not the denominator of the surrogate, as TRL does. reference_logps may be None where kl_coef
    is 0, entropies where entropy_coef is 0."""
    o = objective
    if o.kl_coef and reference_logps is None:
        raise ValueError("kl_coef is not 0: the log-probs of the reference are needed")
    if o.entropy_coef and entropies is None:
        raise ValueError("entropy_coef is not 0: the entropies of the tokens are needed")
    # what stands in the padding must not reach exp: the gradient of an infinity that is masked is
    # not a number
    logps, old_logps = jnp.where(mask, logps, 0.0), jnp.where(mask, old_logps, 0.0)
    ratios = jnp.exp(_log_ratios(logps, old_logps, mask, o.ratio))
    tokens = clipped_surrogates(
        ratios, advantages, clip_low=o.clip_low, clip_high=o.clip_high, clip_max=o.clip_max
    )
    if active is not None:
        tokens = jnp.where(active, tokens, 0.0)
    if o.kl_coef and reference_logps is not None:
        kl = kl_estimates(logps, jnp.where(mask, reference_logps, 0.0), estimator=o.kl)
        tokens = tokens + o.kl_coef * (ratios * kl if o.kl_corrected else kl)
    if o.normalise == "sequences":
        total = jnp.sum(masked_mean_last(tokens, mask))
    else:
        total = jnp.sum(jnp.sum(jnp.where(mask, tokens, 0.0), axis=-1))
    counted = mask if active is None else mask & active
    entropy = jnp.zeros(()) if entropies is None else jnp.sum(jnp.where(counted, entropies, 0.0))
    weights = policy_weights(mask, active, objective=o)
    return PolicySums(Mean(total, weights.policy), Mean(entropy, weights.entropy))


def policy_loss(
    sums: PolicySums, weights: PolicyWeights | None = None, *, objective: PolicyObjective
) -> Float[Array, ""]:
    """The policy's sum over its weight, less entropy_coef times the mean entropy per token.

    With the `weights` of a whole batch, the losses of its parts, and their gradients, add up to
    those of the whole."""
    if weights is not None:
        sums = PolicySums(
            Mean(sums.policy.total, weights.policy), Mean(sums.entropy.total, weights.entropy)
        )
    loss = divided(sums.policy)
    return loss - objective.entropy_coef * divided(sums.entropy) if objective.entropy_coef else loss
