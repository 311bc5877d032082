"""One update as one jitted program, of one role or both: the number of the step decides which,
inside the program (POPI, arXiv 2510.17881 v1)."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

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
from popi_jax.popi.supervised_step import supervised_step

# the named scopes of an update, which planning/ reads from the compiled program
SCOPES = (
    *("sampling", "rewards", "reference"),
    *("generator_step", "inference_step", "supervised_step"),
)
Updated = tuple[RoleState, RoleState, Metrics]  # inference, generator


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
    not make them."""
    kinds = sorted(set(plan.kinds))  # what never occurs is not compiled
    scoring = PairScoring(plan, scorer)
    # jitted, so that finding the names of the metrics and compiling share one tracing
    branches = [jax.jit(pick_update(kind, scoring, sampler)) for kind in kinds]
    operands = (state, frozen, users, jax.random.fold_in(state.key, state.step))
    made = [jax.eval_shape(branch, *operands)[2] for branch in branches]
    idle = {name: Mean(jnp.zeros(()), jnp.zeros(())) for names in made for name in sorted(names)}

    def run(number: int) -> Updated:
        inference, generator, metrics = branches[number](*operands)
        return inference, generator, idle | metrics

    # beyond the plan the last kind repeats
    position = jnp.clip(state.step - plan.first_step, 0, len(plan.kinds) - 1)
    chosen = jnp.asarray([kinds.index(kind) for kind in plan.kinds])[position]
    runs = [partial(run, number) for number in range(len(kinds))]
    inference, generator, metrics = jax.lax.switch(chosen, runs)
    return TrainState(inference, generator, state.step + 1, state.key), metrics


def pick_update(kind: Kind, scoring: "PairScoring", sampler: Sampler) -> Callable[..., Updated]:
    """The update of a kind: (state, frozen, users, key) -> Updated."""
    if kind.supervised:
        return partial(teach_inference, kind, scoring)
    if scoring.plan.generator.reads_summaries and not kind.stored:
        return partial(update_roles, kind, sampler, scoring)
    return partial(update_told_generator, kind, scoring)


def update_roles(
    kind: Kind,
    sampler: Sampler,
    scoring: "PairScoring",
    state: TrainState,
    frozen: Frozen,
    users: UserBatch,
    key: Key[Array, ""],
) -> Updated:
    """Samples summaries, G per user if the inference model is trained, else one. The generator
    takes a preference step on the users' K pairs given the first summary. The inference model is
    rewarded by the judge's margins on the same pairs given each summary and takes policy-gradient
    steps.

    In a joint update both use the models from before it; where the current generator judges, its
    margins given the first summary come from its gradient pass and are not computed again."""
    plan, scorer = scoring.plan, scoring.scorer
    inference, generator, first_margins = state.inference, state.generator, None
    writer = plan.inference.role.join_policy(inference.params, frozen.inference)
    group_size = plan.inference.group_size if kind.inference else 1
    rollouts = sampler.sample(writer, users, key, group_size)
    contexts = splice(plan.generator_prefix, rollouts.summaries, rollouts.finished)
    reference = scoring.score_reference(frozen, contexts, users)
    metrics = count_turns(kind)
    sampled = jnp.sum(rollouts.summaries.lengths).astype(jnp.float32)
    metrics["sampled_tokens"] = Mean(sampled, jnp.float32(1.0))
    if kind.generator:
        first_contexts, first_reference = jax.tree.map(lambda x: x[:, :1], (contexts, reference))
        inputs = (frozen.generator, first_reference, first_contexts, users)
        with jax.named_scope("generator_step"):
            generator, new_metrics, first_margins = generator_step(
                generator, *inputs, plan=plan.generator, scorer=scorer
            )
        metrics |= new_metrics
    if kind.inference:
        judge = choose_judge(state, frozen, plan)
        if first_margins is None or plan.inference.judge is not Judge.CURRENT:
            margins = scoring.compute_margins(judge, contexts, reference, users)
        else:  # of the other summaries; a reference that does not see them has one column: it stays
            rest = jax.tree.map(lambda x: x[:, 1:] if x.shape[1] > 1 else x, (contexts, reference))
            others = scoring.compute_margins(judge, *rest, users)
            margins = jnp.concatenate([first_margins, others], axis=1)
        without = scoring.compute_margins_without_summary(judge, frozen, reference, users)
        given = (frozen.inference, margins, without, rollouts, users)
        with jax.named_scope("inference_step"):
            inference, new_metrics = inference_step(
                inference, *given, plan=plan.inference, scorer=scorer
            )
        metrics |= new_metrics
    return inference, generator, metrics


def update_told_generator(
    kind: Kind,
    scoring: "PairScoring",
    state: TrainState,
    frozen: Frozen,
    users: UserBatch,
    key: Key[Array, ""],
) -> Updated:
    """The generator takes a preference step on the users' pairs behind the summaries that are
    stored of them, or behind what the batch tells of them. Nothing is sampled."""
    del key
    if kind.stored:
        contexts = scoring.make_stored_contexts(frozen, users)
    else:
        contexts = scoring.make_told_contexts(users)
    reference = scoring.score_reference(frozen, contexts, users)
    inputs = (state.generator, frozen.generator, reference, contexts, users)
    with jax.named_scope("generator_step"):
        generator, metrics, _ = generator_step(
            *inputs, plan=scoring.plan.generator, scorer=scoring.scorer
        )
    return state.inference, generator, count_turns(kind) | metrics


def teach_inference(
    kind: Kind,
    scoring: "PairScoring",
    state: TrainState,
    frozen: Frozen,
    users: UserBatch,
    key: Key[Array, ""],
) -> Updated:
    """The inference model takes a likelihood step on the summaries that the batch teaches. Nothing
    is sampled."""
    del key
    role, scorer = scoring.plan.inference.role, scoring.scorer
    with jax.named_scope("supervised_step"):
        inference, metrics = supervised_step(
            state.inference, frozen.inference, users, role=role, scorer=scorer
        )
    return inference, state.generator, count_turns(kind) | metrics


def count_turns(kind: Kind) -> Metrics:
    """Which roles this update trains, as metrics."""
    trained = {"inference": kind.inference, "generator": kind.generator}
    return {f"turn/{role}": metric(jnp.float32(on)) for role, on in trained.items()}


def choose_judge(state: TrainState, frozen: Frozen, plan: UpdatePlan) -> Params:
    """The generator whose margins are the reward."""
    if plan.inference.judge is Judge.FROZEN:
        return frozen.generator
    ema = plan.inference.judge is Judge.EMA
    params: Any = state.generator.ema if ema else state.generator.params
    return plan.generator.role.join_policy(params, frozen.generator)


@dataclasses.dataclass(frozen=True)
class PairScoring:
    """Log-probs of the reference and margins of the judge on the pairs of a batch."""

    plan: UpdatePlan
    scorer: Scorer

    def make_empty_contexts(self, users: UserBatch) -> Tokens:
        """The generator's contexts with an empty summary: [users 1 seq]."""
        return repeat_ids(self.plan.generator_prefix, (users.index.shape[0], 1))

    def make_told_contexts(self, users: UserBatch) -> Tokens:
        """The generator's contexts with what the batch tells of the users: [users 1 seq]."""
        if users.told is None:
            return self.make_empty_contexts(users)
        told = jax.tree.map(lambda x: x[:, None], users.told)
        return splice(self.plan.generator_prefix, told, jnp.zeros(told.lengths.shape, bool))

    def make_stored_contexts(self, frozen: Frozen, users: UserBatch) -> Tokens:
        """The generator's contexts with the users' stored summaries: [users 1 seq]. A user whose
        pairs are all masked may get another's."""
        kept: Any = frozen.summaries
        numbers = users.pair_number[:, 0] // self.plan.num_pairs
        tokens, finished = jax.tree.map(lambda x: x[numbers][:, None], tuple(kept))
        return splice(self.plan.generator_prefix, tokens, finished)

    @jax.named_scope("reference")
    def score_reference(
        self, frozen: Frozen, contexts: Tokens, users: UserBatch
    ) -> PairLogps | None:
        """[users group pairs], or [users 1 pairs] where it does not see the summary."""
        match self.plan.generator.reference:
            case Reference.NONE:
                return None
            case Reference.STORED:
                return jax.tree.map(lambda x: x[users.pair_number][:, None], frozen.stored)
            case Reference.PROMPT:
                contexts = self.make_empty_contexts(users)
        return self.scorer.score_pairs(frozen.generator, contexts, users)

    @jax.named_scope("rewards")
    def compute_margins(
        self, judge: Params, contexts: Tokens, reference: PairLogps | None, users: UserBatch
    ) -> Float[Array, "users group pairs"]:
        """The judge's margins on the pairs of each user given each of the contexts."""
        logps = self.scorer.score_pairs(judge, contexts, users)
        lengths = PairLengths(users.chosen.lengths[:, None], users.rejected.lengths[:, None])
        objective = self.plan.generator.objective
        return pair_margins(logps, lengths, reference, objective=objective)

    @jax.named_scope("rewards")
    def compute_margins_without_summary(
        self, judge: Params, frozen: Frozen, reference: PairLogps | None, users: UserBatch
    ) -> Float[Array, "users pairs"] | None:
        """The same given an empty summary; None unless the reward has a baseline."""
        if not self.plan.inference.reward_baseline:
            return None
        empty = self.make_empty_contexts(users)
        if self.plan.generator.reference is Reference.SUMMARY:
            reference = self.score_reference(frozen, empty, users)
        return self.compute_margins(judge, empty, reference, users)[:, 0]
