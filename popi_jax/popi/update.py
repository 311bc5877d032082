"""The alternation of both roles as one jitted program: which branch runs is decided inside, by the
step."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from popi_jax.arrays import Metrics, Params, Rollouts, Tokens, UserBatch
from popi_jax.config import Config, Phase
from popi_jax.losses.masked import metric
from popi_jax.losses.preference import PairLogps, margins_of
from popi_jax.models.packing import within
from popi_jax.models.sampling import Sampling
from popi_jax.models.transformer import TransformerConfig, for_rollout
from popi_jax.objectives import preference_objective
from popi_jax.popi.roles import (
    Budgets,
    Glue,
    empty_summary,
    pair_budget,
    pair_lengths,
    pair_logps,
    pair_logps_of_both,
    pair_tree,
    rollout,
    splice,
)
from popi_jax.popi.steps import generator_step, idle_metrics, inference_step
from popi_jax.training.microbatches import by_parts
from popi_jax.training.state import Frozen, RoleState, TrainState, Transforms, policy


class Parts(NamedTuple):
    """The static half of an update, bound once."""

    model: TransformerConfig
    transforms: Transforms
    glue: Glue
    sampling: Sampling
    cfg: Config
    first_step: int  # updates of the stages before this one
    budgets: Budgets | None = (
        None  # of a part of the users on one shard; None: all is computed with its padding
    )


def role_turns(phases: tuple[Phase, ...]) -> np.ndarray:
    """bool[updates, 2]: whether each update of the main stage trains (inference, generator)."""
    rows: list[tuple[bool, bool]] = []
    for phase in phases:
        cycle = {
            "inference": [(True, False)],
            "generator": [(False, True)],
            "joint": [(True, True)],
            "alternate": [(True, False)] * phase.num_inference
            + [(False, True)] * phase.num_generator,
        }[phase.mode]
        rows += [cycle[i % len(cycle)] for i in range(phase.steps)]
    return np.array(rows, bool).reshape(-1, 2)


def popi_update(
    state: TrainState, frozen: Frozen, users: UserBatch, *, parts: Parts, phases: tuple[Phase, ...]
) -> tuple[TrainState, Metrics]:
    """One update of one role or both, on one batch of users (POPI, arXiv 2510.17881 v1).

    If it is the inference model's turn, samples G summaries per user, rewards them by the
    generator's objective on K of the user's pairs and takes policy-gradient steps; if it is the
    generator's turn, takes a preference step on the same pairs behind the first summary of each
    group. In a joint update both see the models as they were before it, and the margins behind that
    first summary come from the generator's gradient pass."""
    cfg, model, prefix, budgets = parts.cfg, parts.model, parts.glue.generator_prefix, parts.budgets
    key = jax.random.fold_in(state.key, state.step)
    objective = preference_objective(cfg)
    writer = policy(state.inference.params, frozen.inference, cfg.inference)
    nothing = jax.tree.map(lambda x: x[:, None], empty_summary(prefix, users.index.shape[0]))
    sees_summary = cfg.generator.reference == "summary"
    # policy and reference of adapters behind the same summaries are scored in one pass
    in_one_pass = objective.needs_reference and sees_summary and cfg.generator.lora.rank > 0

    @jax.named_scope("sampling")
    def draw(group_size: int) -> tuple[Rollouts, Tokens]:
        """Summaries and the contexts that they make; a sample does not depend on how many there
        are."""
        weights = for_rollout(writer, model)  # once for all parts
        settings: Any = {
            "model": model,
            "glue": parts.glue,
            "sampling": parts.sampling,
            "group_size": group_size,
        }
        settings["budgets"] = budgets
        sampled = by_parts(
            lambda part: rollout(weights, part, key, **settings), users, cfg.batch.microbatches
        )
        return sampled, splice(prefix, sampled.summaries, sampled.finished)

    def logps(params: Params, contexts: Tokens, score: Callable[..., Any] = pair_logps) -> Any:
        budget = pair_budget(budgets, contexts.lengths.shape[1])

        def of_part(part: tuple[Tokens, UserBatch]) -> Any:
            compute = partial(score, params, *part, model=model)
            return within(budget, *pair_tree(*part), lambda budget: compute(budget=budget))

        return by_parts(of_part, (contexts, users), cfg.batch.microbatches)

    @jax.named_scope("reference")
    def reference_of(contexts: Tokens) -> PairLogps | None:
        if not objective.needs_reference:
            return None
        if sees_summary:
            return logps(frozen.generator, contexts)
        if frozen.pairs is not None:
            return jax.tree.map(lambda x: x[users.pair_number][:, None], frozen.pairs)
        return logps(frozen.generator, nothing)

    @jax.named_scope("generator_step")
    def of_generator(
        contexts: Tokens, reference: PairLogps | None
    ) -> tuple[RoleState, Metrics, Float[Array, "users group pairs"]]:
        """A step behind the first summary of each group, and its margins before the step. Without
        `reference` the step scores what it needs of it itself."""
        first, given = jax.tree.map(lambda x: x[:, :1], (contexts, reference))
        static: Any = {
            "model": model,
            "tx": parts.transforms.generator,
            "cfg": cfg,
            "budgets": budgets,
        }
        return generator_step(state.generator, frozen.generator, given, first, users, **static)

    def of_inference(
        rollouts: Rollouts,
        contexts: Tokens,
        reference: PairLogps | None,
        known: Float[Array, "users group pairs"] | None = None,
    ) -> tuple[RoleState, Metrics]:
        """A step by the rewards of the margins; `known` are those behind the first summary of each
        group. Without `reference` it is computed for the margins that are not known."""
        judged_by = {"current": state.generator.params, "ema": state.generator.ema}.get(
            cfg.inference.reward_generator
        )
        judge = (
            frozen.generator
            if judged_by is None
            else policy(judged_by, frozen.generator, cfg.generator)
        )

        @jax.named_scope("rewards")
        def margins_behind(
            contexts: Tokens, reference: PairLogps | None
        ) -> Float[Array, "users group pairs"]:
            if reference is None and in_one_pass and judged_by is not None:
                own, reference = logps(judge, contexts, pair_logps_of_both)
            else:
                own, reference = (
                    logps(judge, contexts),
                    reference_of(contexts) if reference is None else reference,
                )
            return margins_of(own, pair_lengths(users), reference, objective=objective)

        without = None
        if cfg.inference.reward_baseline:
            without = margins_behind(nothing, None if sees_summary else reference)[:, 0]
        if known is None or cfg.inference.reward_generator != "current":
            margins = margins_behind(contexts, reference)
        else:
            rest = jax.tree.map(lambda x: x[:, 1:] if x.shape[1] > 1 else x, (contexts, reference))
            margins = jnp.concatenate([known, margins_behind(*rest)], axis=1)
        tx, glue = parts.transforms.inference, parts.glue
        step = partial(inference_step, model=model, tx=tx, glue=glue, cfg=cfg, budgets=budgets)
        with jax.named_scope("inference_step"):
            return step(state.inference, frozen.inference, margins, without, rollouts, users)

    def inference_turn() -> tuple[RoleState, RoleState, Metrics]:
        rollouts, contexts = draw(cfg.inference.group_size)
        role, metrics = of_inference(
            rollouts, contexts, None if in_one_pass else reference_of(contexts)
        )
        return role, state.generator, metrics

    def generator_turn() -> tuple[RoleState, RoleState, Metrics]:
        _, contexts = draw(1)
        role, metrics, _ = of_generator(contexts, None if in_one_pass else reference_of(contexts))
        return state.inference, role, metrics

    def joint_turn() -> tuple[RoleState, RoleState, Metrics]:
        rollouts, contexts = draw(cfg.inference.group_size)
        # margins are known behind the first summary alone: what the step scored there is needed no
        # second time
        once = in_one_pass and cfg.inference.reward_generator == "current"
        reference = None if once else reference_of(contexts)
        generator, more, known = of_generator(contexts, reference)
        inference, metrics = of_inference(rollouts, contexts, reference, known)
        return inference, generator, metrics | more

    turns = {(True, False): inference_turn, (False, True): generator_turn, (True, True): joint_turn}
    table = [(bool(a), bool(b)) for a, b in role_turns(phases)]
    kinds = sorted(set(table))  # what never occurs is not compiled

    def turn_of(kind: tuple[bool, bool]) -> tuple[RoleState, RoleState, Metrics]:
        inference, generator, metrics = turns[kind]()
        counts = {
            f"turn/{role}": metric(jnp.full((), on, jnp.float32))
            for role, on in zip(Transforms._fields, kind, strict=True)
        }
        return inference, generator, idle_metrics(cfg) | metrics | counts

    step = jnp.clip(state.step - parts.first_step, 0, len(table) - 1)
    kind = jnp.asarray([kinds.index(row) for row in table])[step]
    inference, generator, metrics = jax.lax.switch(kind, [partial(turn_of, kind) for kind in kinds])
    return TrainState(inference, generator, state.step + 1, state.key), metrics
