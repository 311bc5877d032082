"""What users fill of their rows: measured on the batches of a run, the same for all processes."""

import dataclasses
import json

import numpy as np
import pytest

from popi_jax.data import fill as fills
from popi_jax.data.batches import user_batches
from popi_jax.data.fill import Spread
from tests.data.people import USERS, make_config, make_tokenizer

CFG, TOKENIZER = make_config(), make_tokenizer()


def test_a_budget_holds_for_nearly_all_batches() -> None:
    rng = np.random.default_rng(0)
    counts = np.maximum(rng.normal(100, 30, 4000), 1)
    spread = Spread(float(counts.mean()), float(counts.std()))
    for users, shards in ((4, 1), (16, 1), (4, 8)):
        sums = rng.choice(counts, (4000, shards, users)).sum(axis=2).max(axis=1)
        exceeded = np.mean(sums > spread.budget(users, shards))
        assert 0.002 < exceeded < 0.05, (users, shards, exceeded)
    assert Spread(10.0, 0.0).budget(3, 1) == 30
    assert Spread(0.0, 0.0).budget(3, 1) == 1  # rows without any place cannot be computed


def test_measures_the_batches_of_the_run() -> None:
    found = fills.measured_fill(USERS, TOKENIZER, CFG, items=())
    batches = [
        batch
        for _, batch in zip(
            range(8), iter(user_batches(USERS, TOKENIZER, CFG, seed=CFG.seed)), strict=False
        )
    ]
    contexts = np.concatenate([batch.context.lengths for batch in batches])
    pairs = np.concatenate(
        [sum(x.lengths.sum(axis=1) for x in (b.turns, b.chosen, b.rejected)) for b in batches]
    )
    assert found.contexts == pytest.approx((contexts.mean(), contexts.std()))
    assert found.pairs == pytest.approx((pairs.mean(), pairs.std()))
    assert found.answers.mean < found.pairs.mean
    assert set(found.warmup) == {"generator", "summary", "reading"}
    assert all(task.answers.mean < task.tokens.mean for task in found.warmup.values())
    assert fills.from_json(json.loads(json.dumps(fills.to_json(found)))) == found


def test_without_a_warmup_there_is_nothing_of_it() -> None:
    cfg = dataclasses.replace(CFG, warmup=dataclasses.replace(CFG.warmup, steps=0))
    assert fills.measured_fill(USERS, TOKENIZER, cfg, items=()).warmup == {}
