"""One gradient step of each role: loss, gradient, update. Nothing else: no jit, no logging, no
mesh."""

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from popi_jax.arrays import (
    Demonstrations,
    Mean,
    Metrics,
    Params,
    Rollouts,
    Tokens,
    UserBatch,
    WarmupBatch,
)
from popi_jax.config import Config
from popi_jax.losses.grpo import (
    finished_mask,
    group_advantages,
    high_entropy_mask,
    kl_estimates,
    policy_loss,
    policy_sums,
    policy_weights,
    summed_kl,
)
from popi_jax.losses.masked import masked_mean, metric
from popi_jax.losses.preference import (
    PairLengths,
    PairLogps,
    batch_terms,
    margins_of,
    preference_losses,
)
from popi_jax.losses.reward import summary_rewards
from popi_jax.models.packing import Budget, within
from popi_jax.models.transformer import TransformerConfig
from popi_jax.objectives import policy_objective, preference_objective
from popi_jax.popi.roles import (
    Budgets,
    Glue,
    Tree,
    pair_budget,
    pair_logps,
    pair_logps_of_both,
    pair_tree,
    summary_budget,
    summary_logps,
    summary_logps_of_both,
    summary_tree,
)
from popi_jax.popi.scorer import answer_logps, length_mask
from popi_jax.training.microbatches import by_parts, summed_gradients
from popi_jax.training.state import RoleState, TrainState, Transforms, policy


def idle_metrics(cfg: Config) -> Metrics:
    """The metrics of both roles' steps, with weight 0: of a role whose turn it is not."""
    names = [
        f"generator/{name}" for name in ("loss", "accuracy", "margin", "grad_norm", "unpadded")
    ]
    names += [
        f"inference/{name}"
        for name in ("loss", "kl", "entropy", "grad_norm", "reward", "reward_std")
    ]
    names += [f"inference/{name}" for name in ("accuracy", "summary_len", "finished", "unpadded")]
    names += ["inference/clip_fraction"] if cfg.inference.updates_per_rollout > 1 else []
    return {name: Mean(jnp.zeros(()), jnp.zeros(())) for name in names}


def apply_gradients(
    state: RoleState, grads: Params, tx: optax.GradientTransformation, ema_decay: float = 0.0
) -> tuple[RoleState, Float[Array, ""]]:
    """The updated role and the norm of its gradient before clipping."""
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    ema: Any = (
        state.ema
        if state.ema is None
        else optax.incremental_update(params, state.ema, 1.0 - ema_decay)
    )
    return RoleState(state.step + 1, params, opt_state, ema), optax.tree.norm(grads)


def generator_step(
    state: RoleState,
    frozen: Params,
    reference: PairLogps | None,
    contexts: Tokens,
    users: UserBatch,
    *,
    model: TransformerConfig,
    tx: optax.GradientTransformation,
    cfg: Config,
    budgets: Budgets | None = None,
) -> tuple[RoleState, Metrics, Float[Array, "users group pairs"]]:
    """The preference objective on the users' pairs behind sampled summaries; also the margins
    before the step.

    contexts: [users group seq]; reference: [users group pairs], or [users 1 pairs] where it does
    not see the summary. Of a generator with adapters it may be None, though the objective needs it:
    then it is the base behind the same contexts, out of the gradient's own pass."""
    objective = preference_objective(cfg)
    in_one_pass = reference is None and objective.needs_reference and cfg.generator.lora.rank > 0
    group = contexts.lengths.shape[1]
    within_budget = pair_budget(budgets, group)

    def behind_each(x: Array) -> Array:
        return jnp.broadcast_to(x[:, None], (x.shape[0], group, x.shape[1]))

    total = jnp.maximum(jnp.sum(behind_each(users.pair_mask)), 1)
    chosen_len = jnp.maximum(
        masked_mean(users.chosen.lengths.astype(jnp.float32), users.pair_mask), 1.0
    )

    def choose(part: Any, compute: Any) -> Any:
        users, contexts, _ = part
        return within(within_budget, *pair_tree(contexts, users), compute)

    def loss_fn(
        params: Params, part: Any, budget: Budget | None
    ) -> tuple[Array, tuple[Metrics, Array]]:
        users, contexts, reference = part
        mask = behind_each(users.pair_mask)
        lengths = PairLengths(
            behind_each(users.chosen.lengths), behind_each(users.rejected.lengths)
        )
        whole = policy(params, frozen, cfg.generator)
        if in_one_pass:
            logps, reference = pair_logps_of_both(
                whole, contexts, users, model=model, budget=budget
            )
        else:
            logps = pair_logps(whole, contexts, users, model=model, budget=budget)
        reference = jax.tree.map(lambda x: jnp.broadcast_to(x, mask.shape), reference)
        terms = batch_terms(logps, lengths, reference, mask, objective=objective)._replace(
            chosen_len=chosen_len
        )
        losses = preference_losses(logps, lengths, reference, terms, objective=objective)
        margins = jax.lax.stop_gradient(margins_of(logps, lengths, reference, objective=objective))
        metrics = {
            "generator/loss": metric(losses, mask),
            "generator/accuracy": metric((margins > 0) + 0.5 * (margins == 0), mask),
            "generator/margin": metric(margins, mask),
            "generator/unpadded": metric(jnp.full((), budget is not None, jnp.float32)),
        }
        return jnp.sum(jnp.where(mask, losses, 0.0)) / total, (metrics, margins)

    parts = users, contexts, reference
    grads, metrics, margins = summed_gradients(
        loss_fn, state.params, parts, cfg.batch.microbatches, choose
    )
    state, norm = apply_gradients(state, grads, tx, cfg.generator.ema_decay)
    return state, metrics | {"generator/grad_norm": metric(norm)}, margins


def inference_step(
    state: RoleState,
    frozen: Params,
    margins: Float[Array, "users group pairs"],
    margins_without_summary: Float[Array, "users pairs"] | None,
    rollouts: Rollouts,
    users: UserBatch,
    *,
    model: TransformerConfig,
    tx: optax.GradientTransformation,
    glue: Glue,
    cfg: Config,
    budgets: Budgets | None = None,
) -> tuple[RoleState, Metrics]:
    """Policy gradient on sampled summaries: `inference.updates_per_rollout` steps.

    `margins` are the generator's on the users' held-out pairs behind each summary. `frozen` is the
    reference; of a model with adapters it is scored in the gradient's own pass, where nothing asks
    for it before and there is but one."""
    c, objective = cfg.inference, policy_objective(cfg)
    settings: Any = {"model": model, "glue": glue, "temperature": c.temperature}
    within_budget = summary_budget(budgets, rollouts.finished.shape[1])

    def choose(part: Any, compute: Any) -> Any:
        return within(within_budget, *summary_tree(*part[:2], glue=glue), compute)

    def score_reference(part: Any) -> Float[Array, "users group seq"]:
        return choose(
            part, lambda budget: summary_logps(frozen, *part, **settings, budget=budget).logps
        )

    in_one_pass = c.lora.rank > 0 and c.kl != "k1" and c.updates_per_rollout == 1
    reference = (
        None
        if in_one_pass
        else by_parts(score_reference, (users, rollouts), cfg.batch.microbatches)
    )
    mask = length_mask(rollouts.summaries)
    counted = finished_mask(mask, rollouts.finished) if c.skip_unfinished else mask
    rewards = summary_rewards(
        margins,
        users.pair_mask,
        rollouts.summaries.lengths,
        margins_without_summary,
        summed_kl(rollouts.logps, reference, mask) if c.kl == "k1" else None,
        length_penalty=c.length_penalty,
        kind=c.reward,
        kl_coef=c.kl_coef,
    )
    advantages = group_advantages(rewards, scale=c.advantage_scale, baseline=c.advantage_baseline)
    weights = policy_weights(counted, objective=objective)
    wants_entropy = c.entropy_coef > 0 or c.high_entropy_share < 1

    def loss_fn(
        params: Params, part: Any, budget: Budget | None
    ) -> tuple[Array, tuple[Metrics, tuple]]:
        users, rollouts, reference, advantages, counted = part
        more: Any = {**settings, "entropies": wants_entropy, "budget": budget}
        if in_one_pass:
            scores, of_reference = summary_logps_of_both(
                policy(params, frozen, c), users, rollouts, **more
            )
            reference = of_reference.logps
        else:
            scores = summary_logps(policy(params, frozen, c), users, rollouts, **more)
        logps = scores.logps
        # one step per rollout: the policy that sampled is the present one
        old = rollouts.logps if c.updates_per_rollout > 1 else jax.lax.stop_gradient(logps)
        active = None
        if c.high_entropy_share < 1:
            active = high_entropy_mask(
                jax.lax.stop_gradient(scores.entropies), counted, share=c.high_entropy_share
            )
        sums = policy_sums(
            logps,
            old,
            reference,
            advantages,
            counted,
            scores.entropies,
            active,
            objective=objective,
        )
        loss = policy_loss(sums, None if active is not None else weights, objective=objective)
        kl = jnp.sum(jnp.where(scores.mask, kl_estimates(logps, reference), 0.0), axis=-1)
        metrics = {
            "inference/loss": Mean(loss, jnp.float32(1 / cfg.batch.microbatches)),
            "inference/kl": metric(kl),
            "inference/unpadded": metric(jnp.full((), budget is not None, jnp.float32)),
            "inference/entropy": metric(
                -logps if scores.entropies is None else scores.entropies, scores.mask
            ),
        }
        if c.updates_per_rollout > 1:
            ratios = jnp.exp(jnp.where(counted, logps - old, 0.0))
            outside = (ratios < 1 - c.clip_low) | (ratios > 1 + c.clip_high)
            metrics["inference/clip_fraction"] = metric(outside.astype(jnp.float32), counted)
        return loss, (jax.lax.stop_gradient(metrics), ())

    def update(state: RoleState, _: None) -> tuple[RoleState, Metrics]:
        parts = users, rollouts, reference, advantages, counted
        grads, metrics, _ = summed_gradients(
            loss_fn, state.params, parts, cfg.batch.microbatches, choose
        )
        state, norm = apply_gradients(state, grads, tx, c.ema_decay)
        return state, metrics | {"inference/grad_norm": metric(norm)}

    if c.updates_per_rollout == 1:
        state, metrics = update(state, None)
    else:
        state, each = jax.lax.scan(update, state, length=c.updates_per_rollout)
        metrics = jax.tree.map(lambda x: jnp.sum(x, axis=0), each)
    pair_mask = jnp.broadcast_to(users.pair_mask[:, None, :], margins.shape)
    return state, metrics | {
        "inference/reward": metric(rewards),
        "inference/reward_std": metric(jnp.std(rewards, axis=-1, ddof=1)),
        "inference/accuracy": metric((margins > 0) + 0.5 * (margins == 0), pair_mask),
        "inference/summary_len": metric(rollouts.summaries.lengths.astype(jnp.float32)),
        "inference/finished": metric(rollouts.finished.astype(jnp.float32)),
    }


def demonstration_tree(batch: Demonstrations) -> Tree:
    return Tree(batch.context, batch.turns, jax.tree.map(lambda x: x[:, :, None], batch.answers))


def demonstration_loss(
    params: Params, batch: Demonstrations, *, model: TransformerConfig, budget: Budget | None = None
) -> tuple[Float[Array, ""], Mean]:
    """Mean negative log-likelihood of the answers' tokens (nats per token), as a loss and as a
    metric."""
    scores = answer_logps(params, *demonstration_tree(batch), model=model, budget=budget)
    mask = scores.mask & batch.mask[:, :, None, None]
    return -masked_mean(scores.logps, mask), metric(-scores.logps, mask)


def warmup_step(
    state: TrainState,
    batch: WarmupBatch,
    *,
    model: TransformerConfig,
    transforms: Transforms,
    budgets: Mapping[str, Budget] = MappingProxyType({}),
) -> tuple[TrainState, Metrics]:
    """One likelihood step of both roles; the inference model's two tasks, summaries and readings,
    weigh the same.

    `budgets` are those of tasks, see models/dense.py.
    """

    def role_step(
        role: RoleState,
        tasks: dict[str, Demonstrations],
        tx: optax.GradientTransformation,
        name: str,
    ) -> tuple[RoleState, Metrics]:
        def gradient(task: str) -> tuple[Params, Mean]:
            def compute(budget: Budget | None) -> tuple[Params, Mean]:
                loss_fn = partial(demonstration_loss, batch=tasks[task], model=model, budget=budget)
                return jax.grad(loss_fn, has_aux=True)(role.params)

            return within(budgets.get(task), *demonstration_tree(tasks[task]), compute)

        of_tasks = {task: gradient(task) for task in tasks}
        metrics = {f"warmup/{task}_nll": nll for task, (_, nll) in of_tasks.items()}
        grads = jax.tree.map(lambda *parts: sum(parts), *(grads for grads, _ in of_tasks.values()))
        role, norm = apply_gradients(role, grads, tx)
        return role, metrics | {f"warmup/{name}_grad_norm": metric(norm)}

    tasks = {"summary": batch.summary, "reading": batch.reading}
    inference, of_inference = role_step(state.inference, tasks, transforms.inference, "inference")
    generator, of_generator = role_step(
        state.generator, {"generator": batch.generator}, transforms.generator, "generator"
    )
    return TrainState(inference, generator, state.step + 1, state.key), of_inference | of_generator
