"""How many places the rows of a run get, from what its users are like. Guesses: they decide about
the speed alone."""

import math

from popi_jax.config import Config
from popi_jax.data.measure import Fill
from popi_jax.models.packing import Budget
from popi_jax.popi.roles import Budgets, Glue


def main_budgets(
    fill: Fill, glue: Glue, shards: int, rollout_shards: int, *, cfg: Config
) -> Budgets:
    """Of the users that one shard holds of each part of an update of the main stage, while training
    and sampling."""

    def users_of(shards: int) -> int:
        return max(cfg.batch.users // (shards * cfg.batch.microbatches), 1)

    def signals(shards: int) -> int:
        return fill.contexts.budget(users_of(shards), shards) + users_of(shards) * len(
            glue.summary_turn
        )

    users = users_of(shards)
    return Budgets(
        shards=shards,
        rollout_shards=rollout_shards,
        rollout_signals=signals(rollout_shards),
        signals=signals(shards),
        contexts=users * (len(glue.generator_prefix) + cfg.data.summary_len),
        summaries=math.ceil(users * cfg.data.summary_len * cfg.batch.summary_fill),
        pairs=fill.pairs.budget(users, shards),
        answers=fill.answers.budget(users, shards),
    )


def warmup_budgets(fill: Fill, shards: int, *, cfg: Config) -> dict[str, Budget]:
    """Of each task of the warm-up."""
    budgets = {}
    for task, found in fill.warmup.items():
        users = max(getattr(cfg.warmup, f"{task}_users") // shards, 1)
        budgets[task] = Budget(
            found.tokens.budget(users, shards), found.answers.budget(users, shards), shards
        )
    return budgets
