"""What a generator of a baseline is trained behind is what the evaluation shows, token by token."""

import dataclasses

import jax
import numpy as np
import pytest

from popi_jax.config import Config
from popi_jax.data import encode, prompts
from popi_jax.evals import conditions
from popi_jax.evals.conditions import People
from tests.data.people import (
    USERS,
    ids_at,
    make_config,
    make_tokenizer,
    make_user,
    take,
    user_batches,
)

WORDS = make_tokenizer()
PHASES = ("generator 3",)


def config_for(reads: str, **changes: object) -> Config:
    return make_config(generator__reads=reads, schedule__phases=PHASES, **changes)


@pytest.mark.parametrize("context_len", [120, 40])
@pytest.mark.parametrize("reads", ["signals", "persona"])
def test_training_tells_what_the_evaluation_tells(reads: str, context_len: int) -> None:
    """Also where signals are too long: 40 tokens hold a part of them."""
    cfg = config_for(reads, data__context_len=context_len)
    name = {"signals": "raw_signals", "persona": "oracle"}[reads]
    (condition,) = (c for c in conditions.CONDITIONS if c.name == name)
    shown = condition.make_texts(People(USERS, WORDS, cfg))
    seen = set()
    for batch in take(user_batches(USERS, WORDS, cfg, seed=0), 6):
        assert batch.told.ids.shape[1] == (context_len if reads == "signals" else 24)
        for row in range(4):
            number = int(batch.pair_number[row, 0]) // cfg.data.num_pairs
            assert ids_at(batch.told, row) == list(shown[number])
            seen.add(number)
    assert seen == set(range(len(USERS)))
    texts = {
        "signals": [encode.fit_signals(user, WORDS, cfg).text for user in USERS],
        "persona": [user.oracle for user in USERS],
    }[reads]
    assert [list(ids) for ids in shown] == [
        prompts.encode_summary(WORDS, text, cfg)[: cfg.data.context_len] for text in texts
    ]


def test_batches_of_other_runs_have_no_such_texts() -> None:
    """Not an array more, and the others are the same."""
    (plain,) = take(user_batches(USERS, WORDS, make_config(), seed=0), 1)
    assert plain.told is None and plain.taught is None and len(jax.tree.leaves(plain)) == 11
    for reads in ("signals", "nothing"):
        (batch,) = take(user_batches(USERS, WORDS, config_for(reads), seed=0), 1)
        jax.tree.map(np.testing.assert_array_equal, batch._replace(told=None), plain)
        assert (batch.told is None) == (reads == "nothing")


def test_users_without_persona_are_left_out() -> None:
    users = [dataclasses.replace(make_user(n, 3), oracle=" " if n % 2 else "") for n in range(3)]
    users.append(make_user(3, 3))
    cfg = config_for("persona")
    for batch in take(user_batches(users, WORDS, cfg, seed=0), 2):
        known = batch.told.lengths > 0
        assert sorted(known) == [False, False, False, True]
        assert (batch.pair_mask.sum(axis=1) == np.where(known, 3, 0)).all()


def test_what_is_taught_is_the_persona_as_a_reply() -> None:
    users = [*USERS[:3], dataclasses.replace(make_user(3, 3), oracle="")]
    cfg = make_config(schedule__phases=("supervised 2", "generator 1"))
    (batch,) = take(user_batches(users, WORDS, cfg, seed=0), 1)
    for row in range(4):
        user = users[int(batch.pair_number[row, 0]) // cfg.data.num_pairs]
        expected = [*WORDS.encode(user.oracle), WORDS.eos_id] if user.oracle else []
        assert ids_at(batch.taught, row) == expected
    assert batch.pair_mask.any(axis=1).all()  # pairs of all of them count for the generator
