"""Budgets by hand, for users whose texts are all of one length."""

import dataclasses

import jax
import pytest

from popi_jax.data.measure import Fill, TaskFill, Totals
from popi_jax.models.layout import UNSPLIT
from popi_jax.models.packing import Budget, Budgets
from popi_jax.training.setup import plan_budgets, plan_warmup_budgets
from tests.oracles.plain import MODEL
from tests.training import small

SAMPLED_WHOLE = dataclasses.replace(MODEL, rollout_rules=UNSPLIT)


def even(tokens: int) -> Totals:
    """Of users who have so many tokens each."""
    return Totals(((1, 1, tokens),))


FILL = Fill(
    contexts=even(100),
    pairs=even(30),
    answers=even(20),
    warmup={"generator": TaskFill(even(40), even(7))},
)
CFG = small.make_config()  # 8 users; summaries of 4 tokens at most
FILLED = 0.75


@pytest.mark.parametrize(
    ("shards", "microbatches", "users"), [(1, 1, 8), (2, 1, 4), (2, 2, 2), (8, 2, 1)]
)
def test_of_the_users_that_a_shard_has_of_a_part(
    shards: int, microbatches: int, users: int
) -> None:
    cfg = small.replace(CFG, "batch", microbatches=microbatches)
    with jax.set_mesh(small.make_mesh(shards, 1, 1)):
        found = plan_budgets(FILL, small.GLUE, SAMPLED_WHOLE, cfg, summary_fill=FILLED)
    assert found == Budgets(
        shards=shards,
        rollout_shards=1,
        rollout_signals=8 // microbatches * (100 + 2),
        signals=users * (100 + 2),
        contexts=users * (3 + 4),
        summaries=users * 3,
        pairs=users * 30,
        answers=users * 20,
    )
    assert found.for_pairs(5) == Budget(5 * users * (7 + 30), 5 * users * 20, shards)
    assert found.for_summaries(5) == Budget(users * (102 + 15), users * 15, shards)
    assert found.for_sampling() == Budget(8 // microbatches * (100 + 2), 0, 1)


def test_of_the_warmup() -> None:
    cfg = small.replace(CFG, "warmup", generator_users=6)
    with jax.set_mesh(small.make_mesh(2, 1, 1)):
        assert plan_warmup_budgets(FILL, MODEL, cfg) == {"generator": Budget(3 * 40, 3 * 7, 2)}


def test_more_spread_needs_more_room_and_many_shards_more_still() -> None:
    def plan(fill: Fill, shards: int) -> Budgets:
        with jax.set_mesh(small.make_mesh(shards, 1, 1)):
            return plan_budgets(fill, small.GLUE, MODEL, CFG, summary_fill=FILLED)

    uneven = FILL._replace(pairs=Totals(((8, 1, 250), (2, 4, 70), (1, 8, 40))))
    before, found = plan(FILL, 1), plan(uneven, 1)
    assert found.pairs == 250 and found._replace(pairs=0) == before._replace(pairs=0)
    assert plan(uneven, 4).pairs == 70
