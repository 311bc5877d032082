"""A policy-gradient step of the inference model on sampled summaries."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from popi_jax.arrays import Mean, Metrics, Params, RoleState, Rollouts, UserBatch
from popi_jax.losses import grpo
from popi_jax.losses.masked import metric
from popi_jax.losses.reward import count_repeats, summary_rewards
from popi_jax.models.packing import length_mask
from popi_jax.popi.health_metrics import health_metrics
from popi_jax.popi.plan import InferencePlan
from popi_jax.popi.scorer import AnswerLogps, Scorer


def inference_step(
    state: RoleState,
    frozen: Params,
    margins: Float[Array, "users group pairs"],
    margins_without_summary: Float[Array, "users pairs"] | None,
    rollouts: Rollouts,
    users: UserBatch,
    *,
    plan: InferencePlan,
    scorer: Scorer,
) -> tuple[RoleState, Metrics]:
    """Rewards of the sampled summaries, their advantages, then `steps_per_rollout` steps.

    margins: the judge's on the batch's pairs given each summary; without a summary: given an empty
    one, None unless the reward has a baseline. frozen: the reference, and the base of adapters."""
    reference = scorer.score_summaries(frozen, users, rollouts)
    mask = length_mask(rollouts.summaries)
    counted = grpo.finished_mask(mask, rollouts.finished) if plan.skip_unfinished else mask
    rewards = summary_rewards(
        margins,
        users.pair_mask,
        rollouts.summaries.lengths,
        margins_without_summary,
        grpo.summed_kl(rollouts.logps, reference, mask) if plan.reward.kl_coef else None,
        count_repeats(rollouts.summaries) if plan.reward.repeat_penalty else None,
        rollouts.finished,
        objective=plan.reward,
    )
    scale, baseline = plan.advantage_scale, plan.advantage_baseline
    advantages = grpo.group_advantages(rewards, scale=scale, baseline=baseline)
    weights = grpo.policy_weights(counted, objective=plan.objective)
    loss_fn = partial(summary_loss, weights=weights, share=1 / scorer.microbatches, plan=plan)
    whole = partial(plan.role.join_policy, frozen=frozen)
    wants_entropies = plan.objective.entropy_coef > 0 or plan.high_entropy_share < 1

    def update(state: RoleState, _: None) -> tuple[RoleState, Metrics]:
        batch = (users, rollouts, reference, advantages, counted)
        differentiate = partial(scorer.differentiate_summaries, entropies=wants_entropies)
        grads, metrics, _ = differentiate(loss_fn, state.params, whole, batch)
        state, norm = plan.role.apply_gradients(state, grads)
        return state, metrics | {"grad_norm": metric(norm)}

    if plan.steps_per_rollout == 1:
        state, metrics = update(state, None)
    else:
        state, each = jax.lax.scan(update, state, length=plan.steps_per_rollout)
        metrics = jax.tree.map(lambda x: jnp.sum(x, axis=0), each)
    pair_mask = jnp.broadcast_to(users.pair_mask[:, None, :], margins.shape)
    metrics |= health_metrics(
        margins, users.pair_mask, rewards, rollouts.summaries, kind=plan.reward.kind
    )
    metrics |= {
        "reward": metric(rewards),
        "reward_std": metric(jnp.std(rewards, axis=-1, ddof=1)),
        "accuracy": metric((margins > 0) + 0.5 * (margins == 0), pair_mask),
        "summary_len": metric(rollouts.summaries.lengths.astype(jnp.float32)),
        "finished": metric(rollouts.finished.astype(jnp.float32)),
    }
    return state, {f"inference/{name}": mean for name, mean in metrics.items()}


def summary_loss(
    scores: AnswerLogps, *part: Any, weights: grpo.PolicyWeights, share: float, plan: InferencePlan
) -> tuple[Float[Array, ""], tuple[Metrics, tuple]]:
    """The loss of a microbatch, a `share` of the batch; `weights` are of the whole batch. The part:
    users, rollouts, log-probs of the reference, advantages and the tokens that count."""
    _, rollouts, reference, advantages, counted = part
    o, logps, entropies = plan.objective, scores.logps, scores.entropies
    # one step per rollout: the policy that sampled is the present one
    old = rollouts.logps if plan.steps_per_rollout > 1 else jax.lax.stop_gradient(logps)
    active = None
    if plan.high_entropy_share < 1:  # of the whole batch: config refuses microbatches with it
        active = grpo.high_entropy_mask(
            jax.lax.stop_gradient(entropies), counted, share=plan.high_entropy_share
        )
    sums = grpo.policy_sums(
        logps, old, reference, advantages, counted, entropies, active, objective=o
    )
    loss = grpo.policy_loss(sums, None if active is not None else weights, objective=o)
    kl = jnp.sum(jnp.where(scores.mask, grpo.kl_estimates(logps, reference), 0.0), axis=-1)
    metrics = {
        "loss": Mean(loss, jnp.float32(share)),
        "kl": metric(kl),
        # unless entropies are computed: -log p of the sampled tokens, an unbiased estimate
        "entropy": metric(-logps if entropies is None else entropies, scores.mask),
    }
    if plan.steps_per_rollout > 1:
        ratios = jnp.exp(jnp.where(counted, logps - old, 0.0))
        outside = (ratios < 1 - o.clip_low) | (ratios > 1 + o.clip_high)
        metrics["clip_fraction"] = metric(outside.astype(jnp.float32), counted)
    return loss, (jax.lax.stop_gradient(metrics), ())
