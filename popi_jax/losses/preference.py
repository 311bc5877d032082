"""The preference objectives, from summed log-probs of chosen and rejected replies.
docs/objectives.md has the table.

The default is L = -E log sigmoid(beta * [(log pi(y_w|x,z) - log ref(y_w|x)) - (log pi(y_l|x,z) -
log ref(y_l|x))]) (POPI, arXiv 2510.17881 v1; DPO, arXiv 2305.18290 equation 7). Whether the
reference is conditioned on x alone or on (x, z) is decided by whoever computes `reference`: these
functions see log-probs only.

Every objective gives one loss per pair; the caller forms the mean over real pairs
(losses/masked.py). What a pair needs to know of the whole batch comes in as `BatchTerms`, so that
parts of a batch add up to the whole."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from popi_jax.arrays import PairLengths, PairLogps
from popi_jax.losses.masked import masked_mean

WITH_REFERENCE = ("dpo", "robust", "ipo", "hinge", "kto")
REFERENCE_FREE = ("slic", "cpo", "simpo", "orpo", "rrhf")
# whose loss is a function of beta (s_w - s_l) alone: over beta its slope at 0 does not depend on it
OVER_BETA = ("dpo", "robust", "hinge", "slic", "cpo")


class BatchTerms(NamedTuple):
    """What the loss of a pair needs to know of the whole batch; without gradient."""

    chosen_len: Float[Array, ""]  # tokens: mean length of the chosen replies
    kto_baseline: PairLogps  # nats: what the log-ratio of a reply of each side is compared with


@dataclasses.dataclass(frozen=True)
class PreferenceObjective:
    """Static settings; docs/objectives.md says which of them an objective reads."""

    name: str = "dpo"  # one of WITH_REFERENCE and REFERENCE_FREE
    beta: float = 0.1  # per nat, or per nat per token; of ORPO the weight of the odds ratio
    over_beta: bool = False  # of OVER_BETA: the loss is divided by beta, but for sft_coef's part
    label_smoothing: float = 0.0  # probability of swapped labels, < 0.5: dpo, robust, cpo, simpo
    length_normalised: bool = False  # of dpo, robust, hinge, kto, slic, cpo; the others always are
    gamma: float = 0.0  # nats: the margin that SimPO asks for
    sft_coef: float = 0.0  # of the chosen reply's likelihood per token; 1 in ORPO, CPO and RRHF
    desirable_weight: float = 1.0  # kto
    undesirable_weight: float = 1.0  # kto

    def __post_init__(self) -> None:
        allowed = WITH_REFERENCE + REFERENCE_FREE
        if self.name not in allowed:
            raise ValueError(
                f"the preference objective {self.name!r} is unknown; allowed: {', '.join(allowed)}"
            )
        if self.over_beta and self.name not in OVER_BETA:
            raise ValueError(f"over_beta goes with {', '.join(OVER_BETA)}, not with {self.name!r}")
        if not 0.0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"label_smoothing is {self.label_smoothing}; allowed: from 0 to less than 0.5"
            )

    @property
    def needs_reference(self) -> bool:
        return self.name in WITH_REFERENCE

    @property
    def needs_batch_logps(self) -> bool:
        """Whether `batch_terms` needs the policy's log-probs of the whole batch."""
        return self.name == "kto"


def _scores(
    policy: PairLogps, reference: PairLogps | None, lengths: PairLengths | None
) -> PairLogps:
    """Log-probs less those of the reference (if any), over the number of tokens (if given)."""
    if reference is not None:
        policy = PairLogps(policy.chosen - reference.chosen, policy.rejected - reference.rejected)
    if lengths is None:
        return policy
    return PairLogps(
        policy.chosen / jnp.maximum(lengths.chosen, 1),
        policy.rejected / jnp.maximum(lengths.rejected, 1),
    )


def preference_margins(
    policy: PairLogps,
    reference: PairLogps | None,
    lengths: PairLengths | None = None,
    *,
    beta: float,
) -> Float[Array, "*rows"]:
    """Implicit reward of the chosen reply less that of the rejected one, times beta (nats).

    The reward of a reply is s = log pi - log ref (without a reference log pi), divided by its
    tokens if `lengths` are given."""
    scores = _scores(policy, reference, lengths)
    return beta * (scores.chosen - scores.rejected)


def _sigmoid_losses(
    margins: Float[Array, "*rows"], label_smoothing: float
) -> Float[Array, "*rows"]:
    if label_smoothing == 0.0:
        return -jax.nn.log_sigmoid(margins)
    agree, swapped = -jax.nn.log_sigmoid(margins), -jax.nn.log_sigmoid(-margins)
    return (1.0 - label_smoothing) * agree + label_smoothing * swapped


def dpo_losses(
    policy: PairLogps,
    reference: PairLogps | None,
    lengths: PairLengths | None = None,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Float[Array, "*rows"]:
    """-(1 - e) log sigmoid(m) - e log sigmoid(-m), m = `preference_margins`: nats, >= 0; log 2 at
    policy = reference.

    DPO (arXiv 2305.18290 equation 7; TRL "sigmoid"); e = label_smoothing > 0 is the conservative
    DPO of the same author (cDPO), which TRL's "sigmoid" leaves out; with `lengths` the form
    averaged over tokens (TRL "sigmoid_norm")."""
    return _sigmoid_losses(
        preference_margins(policy, reference, lengths, beta=beta), label_smoothing
    )


def robust_dpo_losses(
    policy: PairLogps,
    reference: PairLogps | None,
    lengths: PairLengths | None = None,
    *,
    beta: float,
    label_smoothing: float,
) -> Float[Array, "*rows"]:
    """[-(1 - e) log sigmoid(m) + e log sigmoid(-m)] / (1 - 2 e): unbiased where a share e of the
    labels is swapped.

    Robust DPO (arXiv 2403.00409; TRL "robust"). e < 1/2; not bounded below."""
    margins = preference_margins(policy, reference, lengths, beta=beta)
    agree, swapped = -jax.nn.log_sigmoid(margins), -jax.nn.log_sigmoid(-margins)
    return ((1.0 - label_smoothing) * agree - label_smoothing * swapped) / (
        1.0 - 2.0 * label_smoothing
    )


def ipo_losses(
    policy: PairLogps, reference: PairLogps | None, lengths: PairLengths | None, *, beta: float
) -> Float[Array, "*rows"]:
    """(s_w - s_l - 1 / (2 beta))^2, s the mean log-ratio per token.

    IPO (arXiv 2310.12036 equation 17, beta = tau; TRL "ipo"). The average over tokens is that of
    TRL; with lengths=None s is the sum, as the equation is printed."""
    return (preference_margins(policy, reference, lengths, beta=1.0) - 1.0 / (2.0 * beta)) ** 2


def hinge_losses(
    policy: PairLogps,
    reference: PairLogps | None,
    lengths: PairLengths | None = None,
    *,
    beta: float,
) -> Float[Array, "*rows"]:
    """max(0, 1 - m): with a reference the hinge of RSO (arXiv 2309.06657; TRL "hinge"), without one
    SLiC-HF (arXiv 2305.10425), whose margin delta is 1 / beta and whose loss is ours over beta; its
    likelihood term is `sft_losses`."""
    return jax.nn.relu(1.0 - preference_margins(policy, reference, lengths, beta=beta))


def kto_baseline(policy: PairLogps, reference: PairLogps, mask: Bool[Array, "*rows"]) -> PairLogps:
    """max(0, mean log-ratio of the other side): what a chosen reply is compared with is estimated
    from the rejected replies of the batch and the other way round, as KTO does for pairs (TRL's
    former "kto_pair").

    Biased, as every estimate from given replies: KTO for single replies (TRL's KTOTrainer) scores
    the replies of other prompts instead, which costs another forward pass; its number can be given
    in place of this one. No gradient."""
    chosen, rejected = (
        jax.lax.stop_gradient(jnp.maximum(masked_mean(p - r, mask), 0.0))
        for p, r in zip(policy, reference, strict=True)
    )
    return PairLogps(chosen=rejected, rejected=chosen)


def kto_losses(
    policy: PairLogps,
    reference: PairLogps,
    baseline: PairLogps,
    lengths: PairLengths | None = None,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Array, "*rows"]:
    """[w_d (1 - sigmoid(beta (s_w - b_w))) + w_u (1 - sigmoid(beta (b_l - s_l)))] / 2, s the
    log-ratio of a reply.

    KTO (arXiv 2402.01306; TRL KTOTrainer "kto"). Half the sum, because TRL averages over replies:
    the mean over pairs is its mean over both sides. `baseline`: scalars b, see `kto_baseline`."""
    scores = _scores(policy, reference, lengths)
    desirable = 1.0 - jax.nn.sigmoid(beta * (scores.chosen - baseline.chosen))
    undesirable = 1.0 - jax.nn.sigmoid(beta * (baseline.rejected - scores.rejected))
    return 0.5 * (desirable_weight * desirable + undesirable_weight * undesirable)


def log_odds_ratios(policy: PairLogps, lengths: PairLengths) -> Float[Array, "*rows"]:
    """log odds(y_w) - log odds(y_l), odds = p / (1 - p), p the geometric mean over tokens."""

    def log_odds(logps: Float[Array, "*rows"]) -> Float[Array, "*rows"]:
        logps = jnp.minimum(logps, -1e-6)  # the odds of a certain reply are infinite
        near_1 = logps > -0.6931472  # log(1 - p) by whichever form is exact, the other is finite
        log_not = jnp.where(
            near_1,
            jnp.log(-jnp.expm1(jnp.where(near_1, logps, -1.0))),
            jnp.log1p(-jnp.exp(jnp.where(near_1, -1.0, logps))),
        )
        return logps - log_not

    scores = _scores(policy, None, lengths)
    return log_odds(scores.chosen) - log_odds(scores.rejected)


def orpo_losses(policy: PairLogps, lengths: PairLengths, *, beta: float) -> Float[Array, "*rows"]:
    """-beta log sigmoid(log odds ratio), the term of ORPO (arXiv 2403.07691 equation 7) beside its
    likelihood term.

    The whole is this plus `sft_losses` with sft_coef 1. TRL's ORPOTrainer has the likelihood of
    prompt and reply there; ours is of the reply, as in the paper."""
    return -beta * jax.nn.log_sigmoid(log_odds_ratios(policy, lengths))


def simpo_losses(
    policy: PairLogps,
    lengths: PairLengths,
    *,
    beta: float,
    gamma: float,
    label_smoothing: float = 0.0,
) -> Float[Array, "*rows"]:
    """The loss of DPO on m = beta (log pi(y_w) / |y_w| - log pi(y_l) / |y_l|) - gamma.

    SimPO (arXiv 2405.14734 equation 6; TRL CPOTrainer "simpo" with simpo_gamma). With sft_coef > 0:
    CPO-SimPO."""
    return _sigmoid_losses(
        preference_margins(policy, None, lengths, beta=beta) - gamma, label_smoothing
    )


def cpo_losses(
    policy: PairLogps,
    lengths: PairLengths | None = None,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Float[Array, "*rows"]:
    """The loss of DPO on m = beta (log pi(y_w) - log pi(y_l)), a uniform reference.

    CPO (arXiv 2401.08417 equation 3; TRL CPOTrainer "sigmoid"); the whole is this plus `sft_losses`
    with sft_coef 1."""
    return dpo_losses(policy, None, lengths, beta=beta, label_smoothing=label_smoothing)


def rrhf_losses(policy: PairLogps, lengths: PairLengths) -> Float[Array, "*rows"]:
    """max(0, p_l - p_w), p the mean log-prob per token: the ranking term of RRHF (arXiv 2304.05302)
    for two replies.

    The whole is this plus `sft_losses` with sft_coef 1, the likelihood of the best reply."""
    return jax.nn.relu(-preference_margins(policy, None, lengths, beta=1.0))


def sft_losses(policy: PairLogps, chosen_len: Float[Array, ""]) -> Float[Array, "*rows"]:
    """-log pi(y_w) over the mean length of the chosen replies of the whole batch.

    The mean over pairs is then the negative log-likelihood per token of the batch (TRL "sft"), not
    a mean of means."""
    return -policy.chosen / chosen_len


def batch_terms(
    policy: PairLogps | None,
    lengths: PairLengths,
    reference: PairLogps | None,
    mask: Bool[Array, "*rows"],
    *,
    objective: PreferenceObjective,
) -> BatchTerms:
    """The terms of a whole batch whose real pairs `mask` tells, never of a part of it.

    `policy` may be None where the objective does not need it (`needs_batch_logps`)."""
    chosen_len = jnp.maximum(masked_mean(lengths.chosen.astype(jnp.float32), mask), 1.0)
    baseline = PairLogps(jnp.zeros(()), jnp.zeros(()))
    if objective.needs_batch_logps and policy is not None:
        per = lengths if objective.length_normalised else None
        given = _given(reference, objective)
        baseline = kto_baseline(_scores(policy, None, per), _scores(given, None, per), mask)
    return BatchTerms(chosen_len, baseline)


def _given(reference: PairLogps | None, objective: PreferenceObjective) -> PairLogps:
    if reference is None:
        raise ValueError(f"the objective {objective.name!r} needs the log-probs of a reference")
    return reference


def preference_losses(
    policy: PairLogps,
    lengths: PairLengths,
    reference: PairLogps | None,
    terms: BatchTerms,
    *,
    objective: PreferenceObjective,
) -> Float[Array, "*rows"]:
    """The loss of each pair: the objective's own, over beta if it asks for that, plus sft_coef
    times the likelihood of the chosen reply.

    `reference` is not looked at by the objectives of REFERENCE_FREE."""
    o, beta, smoothing = objective, objective.beta, objective.label_smoothing
    per = lengths if o.length_normalised else None
    given: Any = _given(reference, o) if o.needs_reference else None
    match o.name:
        case "dpo":
            losses = dpo_losses(policy, given, per, beta=beta, label_smoothing=smoothing)
        case "robust":
            losses = robust_dpo_losses(policy, given, per, beta=beta, label_smoothing=smoothing)
        case "ipo":
            losses = ipo_losses(policy, given, lengths, beta=beta)
        case "hinge" | "slic":
            losses = hinge_losses(policy, given, per, beta=beta)
        case "kto":
            weights = {
                "desirable_weight": o.desirable_weight,
                "undesirable_weight": o.undesirable_weight,
            }
            losses = kto_losses(policy, given, terms.kto_baseline, per, beta=beta, **weights)
        case "cpo":
            losses = cpo_losses(policy, per, beta=beta, label_smoothing=smoothing)
        case "simpo":
            losses = simpo_losses(
                policy, lengths, beta=beta, gamma=o.gamma, label_smoothing=smoothing
            )
        case "orpo":
            losses = orpo_losses(policy, lengths, beta=beta)
        case _:
            losses = rrhf_losses(policy, lengths)
    losses = losses / beta if o.over_beta else losses
    return losses + o.sft_coef * sft_losses(policy, terms.chosen_len) if o.sft_coef else losses


def pair_margins(
    policy: PairLogps,
    lengths: PairLengths,
    reference: PairLogps | None,
    *,
    objective: PreferenceObjective,
) -> Float[Array, "*rows"]:
    """Reward of the chosen reply less that of the rejected one as the objective implies it (nats):
    for accuracy, and for the reward of a summary.

    beta (s_w - s_l), s as in `preference_margins`, averaged over tokens and without a reference
    where the objective is; SimPO's gamma is a target and not part of the reward. ORPO: the log odds
    ratio. RRHF, which has no beta: s_w - s_l."""
    o = objective
    match o.name:
        case "orpo":
            return log_odds_ratios(policy, lengths)
        case "rrhf":
            return preference_margins(policy, None, lengths, beta=1.0)
        case "simpo":
            return preference_margins(policy, None, lengths, beta=o.beta)
        case "ipo":
            return preference_margins(policy, _given(reference, o), lengths, beta=o.beta)
    given = _given(reference, o) if o.needs_reference else None
    return preference_margins(policy, given, lengths if o.length_normalised else None, beta=o.beta)
