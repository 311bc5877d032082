"""What is measured of users: the lengths that texts need, what is cut, and what batches are filled
with."""

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest

from popi_jax.data import measure
from popi_jax.data.encode import Truncations, encode_user
from popi_jax.data.measure import Spread, Totals, measure_totals
from popi_jax.data.records import Reading, User
from popi_jax.data.tokens import encode_users
from popi_jax.errors import UserError
from tests.data.people import (
    ITEMS,
    USERS,
    make_config,
    make_tokenizer,
    take,
    user_batches,
    warm_batches,
)

CFG, TOKENIZER = make_config(), make_tokenizer()


def fill_of(cfg: Any) -> measure.Fill:
    made = warm_batches(USERS, TOKENIZER, cfg, seed=0, items=ITEMS) if cfg.warmup.steps else None
    return measure.measure_fill(user_batches(USERS, TOKENIZER, cfg, seed=0), made, users=len(USERS))


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


def test_the_most_tokens_of_a_shard_by_hand() -> None:
    """Of two batches of four rows; the rows of a microbatch lie apart."""
    found = measure_totals([np.array([1, 2, 4, 8]), np.array([9, 0, 0, 0])])
    assert found.budget(4, 1) == 15 and found.budget(2, 2) == 12
    assert found.budget(2, 1) == 10  # the second microbatch of the first batch: 2 + 8
    assert found.budget(1, 4) == found.budget(1, 1) == found.budget(1, 2) == 9
    assert found.budget(3, 1) == 27  # of another division than those of these batches
    # half a deviation of each of the rows
    spared = measure_totals([np.array([1, 2, 4, 8]), np.array([9, 0, 0, 0])], 0.5)
    assert spared.budget(4, 1) == math.ceil(15 + 4 * 0.5 * math.sqrt(11.75))
    assert Totals(()).budget(3, 1) == 1  # rows without any place cannot be computed


def test_totals_hold_for_nearly_all_other_batches() -> None:
    rng = np.random.default_rng(0)
    counts = rng.lognormal(5, 0.7, (1064, 16)).astype(int)
    found = measure_totals([*counts[:64]])
    for users, shards in ((16, 1), (8, 2), (4, 4), (2, 4)):
        sums = counts[64:].reshape(1000, shards, users, -1).sum(axis=2).max(axis=1)
        exceeded = np.mean(sums > found.budget(users, shards))
        assert exceeded < 0.05, (users, shards, exceeded)


def test_measures_the_batches_of_the_run() -> None:
    found = fill_of(CFG)
    made = take(user_batches(USERS, TOKENIZER, CFG, seed=0), 64)
    contexts = [batch.context.lengths for batch in made]
    pairs = [sum(x.lengths.sum(axis=1) for x in (b.turns, b.chosen, b.rejected)) for b in made]
    assert found.contexts == measure_totals(contexts)
    assert found.pairs == measure_totals(pairs)
    assert found.answers.budget(4, 1) < found.pairs.budget(4, 1)
    assert set(found.warmup) == {"generator", "summary", "reading"}
    for name, task in found.warmup.items():
        users = getattr(CFG.warmup, f"{name}_users")
        assert task.answers.budget(users, 1) < task.tokens.budget(users, 1)


def test_without_a_warmup_there_is_nothing_of_it() -> None:
    cfg = dataclasses.replace(CFG, warmup=dataclasses.replace(CFG.warmup, steps=0))
    assert fill_of(cfg).warmup == {}


def fit(users: list[User], cfg: Any) -> tuple[tuple[int, ...], Truncations]:
    """The padded lengths in the order of the fields, and what was cut."""
    lengths = encode_users(users, TOKENIZER, cfg).lengths
    found = measure.fit_lengths(lengths, TOKENIZER, cfg)
    assert list(found) == ["context_len", "turn_len", "answer_len"]
    return tuple(found.values()), measure.count_truncations(lengths)


def test_lengths_are_the_longest_rounded_up() -> None:
    cfg = make_config(data__context_len=400, data__turn_len=100, data__answer_len=100)
    lengths, cut = fit(USERS, cfg)
    encoded = [encode_user(u, TOKENIZER, cfg) for u in USERS]
    turns = [turn for u in encoded for turn in (*u.turns, *(t for t, _ in u.readings))]
    readings = [answer for u in encoded for _, answer in u.readings]
    answers = [ids for u in encoded for ids in (*u.chosen, *u.rejected)] + readings
    longest = [max(map(len, texts)) for texts in ([u.context for u in encoded], turns, answers)]
    assert all(
        least <= n < least + 4 and n % 4 == 0 for n, least in zip(lengths, longest, strict=True)
    )
    assert cut == Truncations(0, 0, 0, users=11, pairs=sum(len(u.pairs) for u in USERS))


def test_every_user_is_measured() -> None:
    """The longest may be any of many."""
    cfg = make_config(data__context_len=400)
    users = USERS * 3
    before, _ = fit(users, cfg)
    users[20] = dataclasses.replace(users[20], survey="tea " * 100)
    after, cut = fit(users, cfg)
    assert after[0] > before[0] + 50 and after[1:] == before[1:]
    assert (cut.contexts, cut.users) == (0, 33)


def test_lengths_never_exceed_the_limits() -> None:
    lengths, cut = fit(USERS, make_config(data__context_len=15, data__turn_len=7))
    assert lengths == (12, 7, 4)  # of 15; no item but the profile fits
    assert cut.contexts == cut.users == 11
    assert cut.turns == cut.pairs
    lengths, cut = fit(USERS, make_config(data__answer_len=3))
    assert lengths[2] == 3 and cut.answers == 2 * cut.pairs


def test_lengths_count_readings_and_the_request_for_a_summary() -> None:
    def fit_one(readings: tuple[Reading, ...], instruction: str = "") -> tuple[int, ...]:
        user = dataclasses.replace(USERS[0], readings=readings)
        limits = {"data__turn_len": 100, "data__answer_len": 100}
        return fit([user], make_config(**limits, model__summary_instruction=instruction))[0]

    context, turn, answer = fit_one(())
    # 20 and 4 of headers; 30 and the end
    assert fit_one((Reading("yes " * 20, "no " * 30, ""),)) == (context, 24, 32)
    assert fit_one((), " yes" * 20) == (context, 24, answer)
    assert turn < 24 and answer < 32


def test_lengths_of_a_user_without_texts() -> None:
    nothing = {"shots": (), "comments": (), "pairs": (), "readings": ()}
    bare = dataclasses.replace(USERS[0], profile="", survey="", **nothing)
    lengths, cut = fit([bare], make_config(model__summary_instruction=""))
    # headers of 2 and 4 tokens; answers are never without room for one
    assert lengths == (4, 4, 4)
    assert cut == Truncations(0, 0, 0, users=1, pairs=0)


def test_what_is_stored_is_read_by_names() -> None:
    lengths = encode_users(USERS, TOKENIZER, CFG).lengths
    fitted, cut = measure.fit_lengths(lengths, TOKENIZER, CFG), measure.count_truncations(lengths)
    made = measure.Measured(fitted, cut, fill_of(CFG))
    text = measure.to_json(made)
    assert measure.from_json(text) == made and not measure.is_outdated(text)
    assert measure.is_outdated(text.replace('"most": ', '"mean": 1.0, "std": '))

    def turn_around(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: turn_around(part) for name, part in reversed(value.items())}

    assert measure.from_json(json.dumps(turn_around(json.loads(text)))) == made


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"lengths": {}, "truncations": [1, 2]}'])
def test_what_was_stored_otherwise_is_told(text: str) -> None:
    with pytest.raises(UserError, match="run/measured.json: not readable .* delete it"):
        measure.from_json(text, "run/measured.json")
