"""The alternation of both roles as one jitted program: which branch runs is decided inside, by the step."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from popi_jax.arrays import Metrics, Params, Tokens, UserBatch
from popi_jax.config import Config, Phase
from popi_jax.losses.masked import metric
from popi_jax.losses.preference import PairLogps, margins_of
from popi_jax.models.roles import Glue, empty_summary, pair_lengths, pair_logps, rollout, splice
from popi_jax.models.sampling import Sampling
from popi_jax.models.transformer import TransformerConfig
from popi_jax.objectives import preference_objective
from popi_jax.training.microbatches import by_parts
from popi_jax.training.state import Frozen, RoleState, TrainState, Transforms, policy
from popi_jax.training.steps import generator_step, inference_step


class Parts(NamedTuple):
    """The static half of an update, bound once."""

    model: TransformerConfig
    transforms: Transforms
    glue: Glue
    sampling: Sampling
    cfg: Config
    first_step: int  # updates of the stages before this one


def role_turns(phases: tuple[Phase, ...]) -> np.ndarray:
    """bool[updates, 2]: whether each update of the main stage trains (inference, generator)."""
    rows: list[tuple[bool, bool]] = []
    for phase in phases:
        cycle = {
            "inference": [(True, False)],
            "generator": [(False, True)],
            "joint": [(True, True)],
            "alternate": [(True, False)] * phase.num_inference + [(False, True)] * phase.num_generator,
        }[phase.mode]
        rows += [cycle[i % len(cycle)] for i in range(phase.steps)]
    return np.array(rows, bool).reshape(-1, 2)


def phase_at(step: Int[Array, ""], phases: tuple[Phase, ...]) -> tuple[Bool[Array, ""], Bool[Array, ""]]:
    """Whether the update numbered `step` in the main stage trains (inference, generator)."""
    table = jnp.asarray(role_turns(phases))
    row = table[jnp.clip(step, 0, table.shape[0] - 1)]
    return row[0], row[1]


def popi_update(
    state: TrainState, frozen: Frozen, users: UserBatch, *, parts: Parts, phases: tuple[Phase, ...]
) -> tuple[TrainState, Metrics]:
    """One update of one role or both, on one batch of users (POPI, arXiv 2510.17881 v1).

    Samples G summaries per user; if it is the inference model's turn, rewards them by the generator's objective on K of
    the user's pairs and takes policy-gradient steps; if it is the generator's turn, takes a preference step on the same
    pairs behind the first summary of each group. In a joint update both see the models as they were before it.
    """
    cfg, model, prefix = parts.cfg, parts.model, parts.glue.generator_prefix
    train_inference, train_generator = phase_at(state.step - parts.first_step, phases)
    key = jax.random.fold_in(state.key, state.step)
    objective = preference_objective(cfg)
    draw = partial(
        rollout,
        key=key,
        model=model,
        glue=parts.glue,
        sampling=parts.sampling,
        group_size=cfg.inference.group_size,
    )
    writer = policy(state.inference.params, frozen.inference, cfg.inference)
    rollouts = by_parts(lambda part: draw(writer, part), users, cfg.batch.microbatches)
    contexts = splice(prefix, rollouts.summaries, rollouts.finished)

    def logps(params: Params, contexts: Tokens) -> PairLogps:
        score = partial(pair_logps, params, model=model)
        return by_parts(lambda part: score(*part), (contexts, users), cfg.batch.microbatches)

    nothing = jax.tree.map(lambda x: x[:, None], empty_summary(prefix, users.index.shape[0]))
    seen = contexts if cfg.generator.reference == "summary" else nothing
    reference = logps(frozen.generator, seen) if objective.needs_reference else None

    def of_inference(role: RoleState) -> tuple[RoleState, Metrics]:
        judged_by = {"current": state.generator.params, "ema": state.generator.ema}.get(cfg.inference.reward_generator)
        judge = frozen.generator if judged_by is None else policy(judged_by, frozen.generator, cfg.generator)

        def margins(contexts: Tokens, reference: PairLogps | None) -> Float[Array, "users group pairs"]:
            return margins_of(logps(judge, contexts), pair_lengths(users), reference, objective=objective)

        without = None
        if cfg.inference.reward_baseline:
            without_text = logps(frozen.generator, nothing) if reference is not None and seen is contexts else reference
            without = margins(nothing, without_text)[:, 0]
        return inference_step(
            role,
            frozen.inference,
            margins(contexts, reference),
            without,
            rollouts,
            users,
            model=model,
            tx=parts.transforms.inference,
            glue=parts.glue,
            cfg=cfg,
        )

    def of_generator(role: RoleState) -> tuple[RoleState, Metrics]:
        first, given = jax.tree.map(lambda x: x[:, :1], (contexts, reference))
        tx = parts.transforms.generator
        return generator_step(role, frozen.generator, given, first, users, model=model, tx=tx, cfg=cfg)

    def when(
        turn: Bool[Array, ""], step: Callable[[RoleState], tuple[RoleState, Metrics]], role: RoleState
    ) -> tuple[RoleState, Metrics]:
        shapes = jax.eval_shape(step, role)[1]
        skip = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.cond(turn, step, lambda r: (r, skip), role)

    inference, metrics = when(train_inference, of_inference, state.inference)
    generator, more = when(train_generator, of_generator, state.generator)
    counts = {
        "turn/inference": metric(train_inference.astype(jnp.float32)),
        "turn/generator": metric(train_generator.astype(jnp.float32)),
    }
    return TrainState(inference, generator, state.step + 1, state.key), metrics | more | counts
