"""One gradient step of each role: loss, gradient, update. Nothing else: no jit, no logging, no mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from popi_jax.arrays import Demonstrations, Mean, Metrics, Params, Rollouts, Tokens, UserBatch, WarmupBatch
from popi_jax.config import Config
from popi_jax.losses.grpo import group_advantages, grpo_loss, kl_estimates
from popi_jax.losses.masked import masked_mean, metric
from popi_jax.losses.preference import PairLogps, dpo_losses, preference_margins
from popi_jax.losses.reward import summary_rewards
from popi_jax.models.roles import Glue, pair_logps, summary_logps
from popi_jax.models.scoring import answer_logps
from popi_jax.models.transformer import TransformerConfig
from popi_jax.training.state import RoleState, TrainState, Transforms


def apply_gradients(
    state: RoleState, grads: Params, tx: optax.GradientTransformation
) -> tuple[RoleState, Float[Array, ""]]:
    """The updated role and the norm of its gradient before clipping."""
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    return RoleState(state.step + 1, params, opt_state), optax.global_norm(grads)


def generator_step(
    state: RoleState,
    reference: PairLogps,
    contexts: Tokens,
    users: UserBatch,
    *,
    model: TransformerConfig,
    tx: optax.GradientTransformation,
    cfg: Config,
) -> tuple[RoleState, Metrics]:
    """DPO on the users' pairs behind sampled summaries. contexts: [users group seq]; reference: [users 1 pairs]."""
    mask = jnp.broadcast_to(users.pair_mask[:, None, :], (*contexts.lengths.shape, users.pair_mask.shape[1]))

    def loss_fn(params: Params) -> tuple[Array, Array]:
        policy = pair_logps(params, contexts, users, model=model)
        both = jax.tree.map(lambda x: jnp.broadcast_to(x, mask.shape), reference)
        losses = dpo_losses(policy, both, beta=cfg.generator.beta)
        return masked_mean(losses, mask), preference_margins(policy, both, beta=cfg.generator.beta)

    (_, margins), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    state, norm = apply_gradients(state, grads, tx)
    return state, {
        "generator/loss": metric(-jax.nn.log_sigmoid(margins), mask),
        "generator/accuracy": metric((margins > 0) + 0.5 * (margins == 0), mask),
        "generator/margin": metric(margins, mask),
        "generator/grad_norm": metric(norm),
    }


def inference_step(
    state: RoleState,
    reference_params: Params,
    margins: Float[Array, "users group pairs"],
    rollouts: Rollouts,
    users: UserBatch,
    *,
    model: TransformerConfig,
    tx: optax.GradientTransformation,
    glue: Glue,
    cfg: Config,
) -> tuple[RoleState, Metrics]:
    """GRPO on sampled summaries; `margins` are the generator's on the users' held-out pairs behind each summary."""
    c = cfg.inference
    rewards = summary_rewards(margins, users.pair_mask, rollouts.summaries.lengths, length_penalty=c.length_penalty)
    advantages = group_advantages(rewards, scale=c.advantage_scale)
    reference, mask = summary_logps(
        reference_params, users, rollouts, model=model, glue=glue, temperature=c.temperature
    )

    def loss_fn(params: Params) -> tuple[Array, Array]:
        logps, _ = summary_logps(params, users, rollouts, model=model, glue=glue, temperature=c.temperature)
        old = jax.lax.stop_gradient(logps)  # one step per rollout: the sampling policy is the present one
        loss = grpo_loss(logps, old, reference, advantages, mask, clip_eps=c.clip_eps, kl_coef=c.kl_coef)
        return loss, logps

    (loss, logps), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    state, norm = apply_gradients(state, grads, tx)
    pair_mask = jnp.broadcast_to(users.pair_mask[:, None, :], margins.shape)
    kl = jnp.sum(jnp.where(mask, kl_estimates(logps, reference), 0.0), axis=-1)
    return state, {
        "inference/loss": metric(loss),
        "inference/reward": metric(rewards),
        "inference/reward_std": metric(jnp.std(rewards, axis=-1, ddof=1)),
        "inference/accuracy": metric((margins > 0) + 0.5 * (margins == 0), pair_mask),
        "inference/kl": metric(kl),
        "inference/entropy": metric(-logps, mask),
        "inference/summary_len": metric(rollouts.summaries.lengths.astype(jnp.float32)),
        "inference/finished": metric(rollouts.finished.astype(jnp.float32)),
        "inference/grad_norm": metric(norm),
    }


def demonstration_loss(
    params: Params, batch: Demonstrations, *, model: TransformerConfig
) -> tuple[Float[Array, ""], Mean]:
    """Mean negative log-likelihood of the answers' tokens (nats per token), as a loss and as a metric."""
    answers = jax.tree.map(lambda x: x[:, :, None], batch.answers)
    scores = answer_logps(params, batch.context, batch.turns, answers, model=model)
    mask = scores.mask & batch.mask[:, :, None, None]
    return -masked_mean(scores.logps, mask), metric(-scores.logps, mask)


def warmup_step(
    state: TrainState, batch: WarmupBatch, *, model: TransformerConfig, transforms: Transforms
) -> tuple[TrainState, Metrics]:
    """One likelihood step of both roles; the inference model's two tasks, summaries and readings, weigh the same."""

    def role_step(
        role: RoleState, tasks: dict[str, Demonstrations], tx: optax.GradientTransformation, name: str
    ) -> tuple[RoleState, Metrics]:
        def loss_fn(params: Params) -> tuple[Array, Metrics]:
            losses = {task: demonstration_loss(params, data, model=model) for task, data in tasks.items()}
            metrics = {f"warmup/{task}_nll": nll for task, (_, nll) in losses.items()}
            return sum(loss for loss, _ in losses.values()), metrics

        (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(role.params)
        role, norm = apply_gradients(role, grads, tx)
        return role, metrics | {f"warmup/{name}_grad_norm": metric(norm)}

    tasks = {"summary": batch.summary, "reading": batch.reading}
    inference, of_inference = role_step(state.inference, tasks, transforms.inference, "inference")
    generator, of_generator = role_step(
        state.generator, {"generator": batch.generator}, transforms.generator, "generator"
    )
    return TrainState(inference, generator, state.step + 1, state.key), of_inference | of_generator
