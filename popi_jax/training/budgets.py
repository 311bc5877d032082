"""How many places the rows of a run get, from what its users are like. Guesses: they decide about the speed alone."""

import math

from popi_jax.config import Config
from popi_jax.data.fill import Fill
from popi_jax.models.dense import Budget
from popi_jax.models.roles import Budgets, Glue


def main_budgets(fill: Fill, glue: Glue, shards: int, *, cfg: Config) -> Budgets:
    """Of the users that one shard holds of each part of an update of the main stage."""
    users = max(cfg.batch.users // (shards * cfg.batch.microbatches), 1)
    return Budgets(
        signals=fill.contexts.budget(users, shards) + users * len(glue.summary_turn),
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
        budgets[task] = Budget(found.tokens.budget(users, shards), found.answers.budget(users, shards))
    return budgets
