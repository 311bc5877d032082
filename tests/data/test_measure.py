"""What is measured of users: the lengths that texts need, what is cut, and what batches are filled
with."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from popi_jax.data import encode, measure, warmup_batches
from popi_jax.data.batches import make_user_batches
from popi_jax.data.encode import Truncations, encode_user
from popi_jax.data.measure import Spread
from popi_jax.data.records import Reading
from popi_jax.errors import UserError
from tests.data.people import ITEMS, USERS, make_config, make_tokenizer, take

CFG, TOKENIZER = make_config(), make_tokenizer()


def fill_of(cfg: Any) -> measure.Fill:
    make = warmup_batches.make_warmup_batches
    warmup = make(USERS, TOKENIZER, cfg, seed=0, items=ITEMS) if cfg.warmup.steps else None
    return measure.measure_fill(make_user_batches(USERS, TOKENIZER, cfg, seed=0), warmup)


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
    found = fill_of(CFG)
    batches = take(make_user_batches(USERS, TOKENIZER, CFG, seed=0), 8)
    contexts = np.concatenate([batch.context.lengths for batch in batches])
    pairs = np.concatenate(
        [sum(x.lengths.sum(axis=1) for x in (b.turns, b.chosen, b.rejected)) for b in batches]
    )
    assert found.contexts == pytest.approx((contexts.mean(), contexts.std()))
    assert found.pairs == pytest.approx((pairs.mean(), pairs.std()))
    assert found.answers.mean < found.pairs.mean
    assert set(found.warmup) == {"generator", "summary", "reading"}
    assert all(task.answers.mean < task.tokens.mean for task in found.warmup.values())


def test_without_a_warmup_there_is_nothing_of_it() -> None:
    cfg = dataclasses.replace(CFG, warmup=dataclasses.replace(CFG.warmup, steps=0))
    assert fill_of(cfg).warmup == {}


def read_lengths(lengths: dict[str, int]) -> tuple[int, ...]:
    assert list(lengths) == ["context_len", "turn_len", "answer_len"]
    return tuple(lengths.values())


def test_lengths_are_the_longest_rounded_up() -> None:
    cfg = make_config(data__context_len=400, data__turn_len=100, data__answer_len=100)
    lengths, cut = encode.fit_lengths(USERS, TOKENIZER, cfg)
    encoded = [encode_user(u, TOKENIZER, cfg) for u in USERS]
    turns = [turn for u in encoded for turn in (*u.turns, *(t for t, _ in u.readings))]
    readings = [answer for u in encoded for _, answer in u.readings]
    answers = [ids for u in encoded for ids in (*u.chosen, *u.rejected)] + readings
    longest = [max(map(len, texts)) for texts in ([u.context for u in encoded], turns, answers)]
    assert all(
        least <= n < least + 4 and n % 4 == 0
        for n, least in zip(read_lengths(lengths), longest, strict=True)
    )
    assert cut == Truncations(0, 0, 0, users=11, pairs=sum(len(u.pairs) for u in USERS))


def test_lengths_never_exceed_the_limits() -> None:
    cfg = make_config(data__context_len=15, data__turn_len=7, data__answer_len=3)
    lengths, cut = encode.fit_lengths(USERS, TOKENIZER, cfg)
    assert read_lengths(lengths) == (12, 7, 3)  # of 15; no item but the profile fits
    assert cut.contexts == cut.users == 11
    assert cut.turns == cut.pairs and cut.answers == 2 * cut.pairs


def test_lengths_count_readings_and_the_request_for_a_summary() -> None:
    def fit(readings: tuple[Reading, ...], instruction: str = "") -> tuple[int, ...]:
        user = dataclasses.replace(USERS[0], readings=readings)
        limits = {"data__turn_len": 100, "data__answer_len": 100}
        cfg = make_config(**limits, model__summary_instruction=instruction)
        return read_lengths(encode.fit_lengths([user], TOKENIZER, cfg)[0])

    context, turn, answer = fit(())
    # 20 and 4 of headers; 30 and the end
    assert fit((Reading("yes " * 20, "no " * 30, ""),)) == (context, 24, 32)
    assert fit((), " yes" * 20) == (context, 24, answer)
    assert turn < 24 and answer < 32


def test_lengths_of_a_user_without_texts() -> None:
    nothing = {"shots": (), "comments": (), "pairs": (), "readings": ()}
    bare = dataclasses.replace(USERS[0], profile="", survey="", **nothing)
    cfg = make_config(model__summary_instruction="")
    lengths, cut = encode.fit_lengths([bare], TOKENIZER, cfg)
    # headers of 2 and 4 tokens; answers are never without room for one
    assert read_lengths(lengths) == (4, 4, 4)
    assert cut == Truncations(0, 0, 0, users=1, pairs=0)


def test_some_users_are_measured_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "_MEASURED_USERS", 3)
    _, cut = encode.fit_lengths(USERS, TOKENIZER, make_config())
    assert (cut.users, cut.pairs) == (3, sum(len(USERS[n].pairs) for n in (0, 4, 8)))


def test_what_is_stored_is_read_by_names() -> None:
    made = measure.Measured(*encode.fit_lengths(USERS, TOKENIZER, CFG), fill_of(CFG))
    text = measure.to_json(made)
    assert measure.from_json(text) == made

    def turn_around(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: turn_around(part) for name, part in reversed(value.items())}

    assert measure.from_json(json.dumps(turn_around(json.loads(text)))) == made


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"lengths": {}, "truncations": [1, 2]}'])
def test_what_was_stored_otherwise_is_told(text: str) -> None:
    with pytest.raises(UserError, match="run/measured.json: not readable .* delete it"):
        measure.from_json(text, "run/measured.json")
