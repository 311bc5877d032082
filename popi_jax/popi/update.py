"""One update of both roles as one jitted program: which roles it trains is decided inside, by the
step (POPI, arXiv 2510.17881 v1)."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from popi_jax.arrays import (
    Frozen,
    Mean,
    Metrics,
    PairLengths,
    PairLogps,
    Params,
    RoleState,
    Tokens,
    TrainState,
    UserBatch,
)
from popi_jax.losses.masked import metric
from popi_jax.losses.preference import pair_margins
from popi_jax.popi.generator_step import generator_step
from popi_jax.popi.inference_step import inference_step
from popi_jax.popi.plan import Judge, Kind, Reference, UpdatePlan
from popi_jax.popi.rollout import Sampler, splice
from popi_jax.popi.scorer import Scorer, repeat_ids

# the named scopes of an update, which planning/ reads from the compiled program
SCOPES = ("sampling", "rewards", "reference", "generator_step", "inference_step")


def popi_update(
    state: TrainState,
    frozen: Frozen,
    users: UserBatch,
    *,
    plan: UpdatePlan,
    scorer: Scorer,
    sampler: Sampler,
) -> tuple[TrainState, Metrics]:
    """Trains one role or both on one batch of users, as the plan has it for this step.

    The metrics are those of all kinds of update that the plan has; weight 0 where this one does
    not make them.
    """
    kinds = sorted(set(plan.kinds))  # what never occurs is not compiled
    # jitted, so that finding the names of the metrics and compiling share one tracing
    run_kind = partial(update_roles, plan=plan, scorer=scorer, sampler=sampler)
    branches = [jax.jit(partial(run_kind, kind=kind)) for kind in kinds]
    key = jax.random.fold_in(state.key, state.step)
    operands = (state, frozen, users, key)
    made = [jax.eval_shape(branch, *operands)[2] for branch in branches]
    idle = {name: Mean(jnp.zeros(()), jnp.zeros(())) for names in made for name in sorted(names)}

    def run(branch: int) -> tuple[RoleState, RoleState, Metrics]:
        inference, generator, metrics = branches[branch](*operands)
        return inference, generator, idle | metrics

    step = jnp.clip(state.step - plan.first_step, 0, len(plan.kinds) - 1)
    branch = jnp.asarray([kinds.index(kind) for kind in plan.kinds])[step]
    runs = [partial(run, number) for number in range(len(kinds))]
    inference, generator, metrics = jax.lax.switch(branch, runs)
    return TrainState(inference, generator, state.step + 1, state.key), metrics


def update_roles(
    state: TrainState,
    frozen: Frozen,
    users: UserBatch,
    key: Key[Array, ""],
    *,
    kind: Kind,
    plan: UpdatePlan,
    scorer: Scorer,
    sampler: Sampler,
) -> tuple[RoleState, RoleState, Metrics]:
    """The inference model samples G summaries per user, is rewarded by the judge's margins on K of
    the user's pairs and takes policy-gradient steps; the generator takes a preference step on the
    same pairs behind the first summary of each group.

    In a joint update both see the models as they were before it, and the current generator's
    margins behind that first summary come from its gradient pass.
    """
    writer = plan.inference.role.join_policy(state.inference.params, frozen.inference)
    group_size = plan.inference.group_size if kind.inference else 1
    rollouts = sampler.sample(writer, users, key, group_size)
    contexts = splice(plan.generator_prefix, rollouts.summaries, rollouts.finished)
    reference = score_reference(frozen, contexts, users, plan, scorer)
    metrics = {f"turn/{role}": metric(jnp.float32(on)) for role, on in kind._asdict().items()}
    metrics["sampled_tokens"] = Mean(
        jnp.sum(rollouts.summaries.lengths).astype(jnp.float32), jnp.float32(1.0)
    )
    generator, inference, known = state.generator, state.inference, None
    if kind.generator:
        with jax.named_scope("generator_step"):
            first, given = jax.tree.map(lambda x: x[:, :1], (contexts, reference))
            generator, made, known = generator_step(
                state.generator,
                frozen.generator,
                given,
                first,
                users,
                plan=plan.generator,
                scorer=scorer,
            )
        metrics |= made
    if kind.inference:
        judge = choose_judge(state, frozen, plan)
        if known is None or plan.inference.judge is not Judge.CURRENT:
            margins = find_margins(judge, contexts, reference, users, plan, scorer)
        else:
            rest = jax.tree.map(lambda x: x[:, 1:] if x.shape[1] > 1 else x, (contexts, reference))
            margins = jnp.concatenate(
                [known, find_margins(judge, *rest, users, plan, scorer)], axis=1
            )
        without = find_baseline_margins(judge, frozen, reference, users, plan, scorer)
        with jax.named_scope("inference_step"):
            inference, made = inference_step(
                state.inference,
                frozen.inference,
                margins,
                without,
                rollouts,
                users,
                plan=plan.inference,
                scorer=scorer,
            )
        metrics |= made
    return inference, generator, metrics


@jax.named_scope("reference")
def score_reference(
    frozen: Frozen, contexts: Tokens, users: UserBatch, plan: UpdatePlan, scorer: Scorer
) -> PairLogps | None:
    """[users group pairs], or [users 1 pairs] where it does not see the summary."""
    match plan.generator.reference:
        case Reference.NONE:
            return None
        case Reference.STORED:
            return jax.tree.map(lambda x: x[users.pair_number][:, None], frozen.stored)
        case Reference.PROMPT:
            nothing = repeat_ids(plan.generator_prefix, (users.index.shape[0], 1))
            return scorer.score_pairs(frozen.generator, nothing, users)
        case Reference.SUMMARY:
            return scorer.score_pairs(frozen.generator, contexts, users)


def choose_judge(state: TrainState, frozen: Frozen, plan: UpdatePlan) -> Params:
    """The generator whose margins are the reward."""
    if plan.inference.judge is Judge.FROZEN:
        return frozen.generator
    ema = plan.inference.judge is Judge.EMA
    params = state.generator.ema if ema else state.generator.params
    return plan.generator.role.join_policy(params, frozen.generator)


@jax.named_scope("rewards")
def find_margins(
    judge: Params,
    contexts: Tokens,
    reference: PairLogps | None,
    users: UserBatch,
    plan: UpdatePlan,
    scorer: Scorer,
) -> Float[Array, "users group pairs"]:
    """The judge's margins on the pairs of each user behind each of the contexts."""
    logps = scorer.score_pairs(judge, contexts, users)
    lengths = PairLengths(users.chosen.lengths[:, None], users.rejected.lengths[:, None])
    return pair_margins(logps, lengths, reference, objective=plan.generator.objective)


def find_baseline_margins(
    judge: Params,
    frozen: Frozen,
    reference: PairLogps | None,
    users: UserBatch,
    plan: UpdatePlan,
    scorer: Scorer,
) -> Float[Array, "users pairs"] | None:
    """The same behind no summary, where the reward has a baseline."""
    if not plan.inference.reward_baseline:
        return None
    nothing = repeat_ids(plan.generator_prefix, (users.index.shape[0], 1))
    if plan.generator.reference is Reference.SUMMARY:
        reference = score_reference(frozen, nothing, users, plan, scorer)
    return find_margins(judge, nothing, reference, users, plan, scorer)[:, 0]
