"""Budgets by hand, for users whose texts are all of one length."""

import pytest
from popi_jax.popi.roles import Budgets, pair_budget, summary_budget
from popi_jax.training.budgets import main_budgets, warmup_budgets

from popi_jax.data.measure import Fill, Spread, TaskFill
from popi_jax.models.packing import Budget
from tests.training import small

FILL = Fill(
    contexts=Spread(100.0, 0.0),
    pairs=Spread(30.0, 0.0),
    answers=Spread(20.0, 0.0),
    warmup={"generator": TaskFill(Spread(40.0, 0.0), Spread(7.0, 0.0))},
)
CFG = small.replace(
    small.make_config(), "batch", summary_fill=0.75
)  # 8 users; summaries of 4 tokens at most


@pytest.mark.parametrize(
    ("shards", "microbatches", "users"), [(1, 1, 8), (2, 1, 4), (2, 2, 2), (8, 2, 1)]
)
def test_of_the_users_that_a_shard_has_of_a_part(
    shards: int, microbatches: int, users: int
) -> None:
    cfg = small.replace(CFG, "batch", microbatches=microbatches)
    found = main_budgets(FILL, small.GLUE, shards, 1, cfg=cfg)
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
    assert pair_budget(found, 5) == Budget(5 * users * (7 + 30), 5 * users * 20, shards)
    assert summary_budget(found, 5) == Budget(users * (102 + 15), users * 15, shards)


def test_of_the_warmup() -> None:
    cfg = small.replace(CFG, "warmup", generator_users=6)
    assert warmup_budgets(FILL, 2, cfg=cfg) == {"generator": Budget(3 * 40, 3 * 7, 2)}


def test_more_spread_needs_more_room_and_many_shards_more_still() -> None:
    even = main_budgets(FILL, small.GLUE, 1, 1, cfg=CFG)
    uneven = FILL._replace(pairs=Spread(30.0, 5.0))
    found = main_budgets(uneven, small.GLUE, 1, 1, cfg=CFG)
    assert found.pairs > even.pairs and found._replace(pairs=0) == even._replace(pairs=0)
    assert 4 * main_budgets(uneven, small.GLUE, 4, 1, cfg=CFG).pairs > found.pairs


def test_without_budgets_there_are_none() -> None:
    assert pair_budget(None, 2) is None and summary_budget(None, 2) is None
