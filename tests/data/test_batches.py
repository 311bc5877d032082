"""Batches: what is drawn, what each row holds, and that the order depends on the seed alone."""

import dataclasses
import itertools
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest

from popi_jax.arrays import Demonstrations
from popi_jax.config import Config
from popi_jax.data import batches, prompts
from popi_jax.data.records import Reading, User
from popi_jax.data.tokenizer import Tokenizer
from popi_jax.errors import UserError
from tests.data.people import ITEMS, USERS, ids_at, make_config, make_tokenizer, make_user


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture
def cfg() -> Config:
    return make_config()


def assert_equal(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def text(tokenizer: Tokenizer, tokens: Any, *at: int) -> str:
    return tokenizer.decode(ids_at(tokens, *at))


def take(dataset: Any, count: int) -> list[Any]:
    return list(itertools.islice(iter(dataset), count))


def test_rows_belong_together(tokenizer: Tokenizer, cfg: Config) -> None:
    batch = next(iter(batches.user_batches(USERS, tokenizer, cfg, seed=0)))
    assert batch.context.ids.shape == (4, 120) and batch.turns.ids.shape == (4, 3, 16)
    assert batch.chosen.ids.shape == batch.rejected.ids.shape == (4, 3, 8)
    assert all(leaf.dtype in (np.int32, np.bool_) for leaf in jax.tree.leaves(batch))
    for row in range(4):
        (n,) = (n for n in range(11) if f"number {n} ." in text(tokenizer, batch.context, row))
        assert batch.pair_mask[row].sum() == min(3, len(USERS[n].pairs))
        seen = set()
        for k in np.flatnonzero(batch.pair_mask[row]):
            words = text(tokenizer, batch.turns, row, k).split()
            assert words[:2] == ["pair", str(n)]
            assert text(tokenizer, batch.chosen, row, k) == f"yes {n} {words[2]}"
            assert text(tokenizer, batch.rejected, row, k) == f"no {n} {words[2]}"
            seen.add(words[2])
        assert len(seen) == batch.pair_mask[row].sum()  # without replacement
    unused = ~batch.pair_mask
    assert (
        not batch.turns.lengths[unused].any()
        and (batch.turns.ids[unused] == tokenizer.pad_id).all()
    )


def test_a_pair_has_the_same_number_wherever_it_is_drawn(tokenizer: Tokenizer, cfg: Config) -> None:
    """In training batches and in those of all pairs, from which the reference's log-probs are
    stored."""
    whole = [batch.batch for batch in batches.eval_batches(USERS, tokenizer, cfg)]
    known = {
        int(b.pair_number[at]): (text(tokenizer, b.turns, *at), text(tokenizer, b.chosen, *at))
        for b in whole
        for at in zip(*np.nonzero(b.pair_mask), strict=True)
    }
    assert len(known) == sum(len(user.pairs) for user in USERS)
    flat = np.concatenate([b.pair_number for b in whole])[: len(USERS)]
    first = np.arange(len(USERS)) * cfg.data.num_pairs
    np.testing.assert_array_equal(flat[:, 0], first)  # rows of users, one after the other
    for b in take(batches.user_batches(USERS, tokenizer, cfg, seed=0), 5):
        for at in zip(*np.nonzero(b.pair_mask), strict=True):
            assert known[int(b.pair_number[at])] == (
                text(tokenizer, b.turns, *at),
                text(tokenizer, b.chosen, *at),
            )


def test_every_user_once_per_epoch_and_another_order_each_epoch(
    tokenizer: Tokenizer, cfg: Config
) -> None:
    made = take(batches.user_batches(USERS, tokenizer, cfg, seed=0), 11)  # 4 epochs of 11 users
    who = [text(tokenizer, b.context, row).split("\n")[0] for b in made for row in range(4)]
    epochs = [who[start : start + 11] for start in range(0, 44, 11)]
    assert all(len(set(epoch)) == 11 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert np.concatenate([b.index for b in made]).tolist() == list(range(44))


def test_pairs_are_drawn_anew_and_all_in_the_end(tokenizer: Tokenizer, cfg: Config) -> None:
    users = [make_user(0, 6)]
    made = take(batches.user_batches(users, tokenizer, cfg, seed=0, num_pairs=2), 5)
    draws = [
        tuple(text(tokenizer, b.turns, row, k) for k in range(2)) for b in made for row in range(4)
    ]
    assert len(set(draws)) > 5 and len({turn for draw in draws for turn in draw}) == 6


def test_seed_alone_decides(tokenizer: Tokenizer, cfg: Config) -> None:
    first = take(batches.user_batches(USERS, tokenizer, cfg, seed=3), 4)
    assert_equal(first, take(batches.user_batches(USERS, tokenizer, cfg, seed=3), 4))
    other = take(batches.user_batches(USERS, tokenizer, cfg, seed=4), 4)
    assert any((a.context.ids != b.context.ids).any() for a, b in zip(first, other, strict=True))


def test_processes_share_the_global_batch(tokenizer: Tokenizer, cfg: Config) -> None:
    whole = take(batches.user_batches(USERS, tokenizer, cfg, seed=0), 4)
    warm = take(batches.warmup_batches(USERS, tokenizer, cfg, seed=0, items=ITEMS), 4)
    halves, warm_halves = [], []
    for p in range(2):
        place = {"seed": 0, "process_index": p, "process_count": 2}
        halves.append(take(batches.user_batches(USERS, tokenizer, cfg, **place), 4))
        warm_halves.append(
            take(batches.warmup_batches(USERS, tokenizer, cfg, items=ITEMS, **place), 4)
        )
    assert_equal(whole, jax.tree.map(lambda *parts: np.concatenate(parts), *halves))
    assert_equal(warm, jax.tree.map(lambda *parts: np.concatenate(parts), *warm_halves))
    with pytest.raises(
        UserError, match="batch.users: 4 users cannot be divided among 3 processes; try 3"
    ):
        batches.user_batches(USERS, tokenizer, cfg, seed=0, process_count=3)


@pytest.mark.parametrize("make", [batches.user_batches, batches.warmup_batches])
def test_resume_is_exact(tokenizer: Tokenizer, cfg: Config, make: Any) -> None:
    iterator = iter(make(USERS, tokenizer, cfg, seed=0))
    for _ in range(3):
        next(iterator)
    state = iterator.get_state()
    expected = [next(iterator) for _ in range(4)]
    resumed = iter(make(USERS, tokenizer, cfg, seed=0))
    resumed.set_state(state)
    assert_equal(expected, [next(resumed) for _ in range(4)])


WORKERS = """
import itertools
import jax, numpy as np
from absl import flags
from popi_jax.data import batches
from tests.data.people import ITEMS, USERS, make_config, make_tokenizer

if __name__ == "__main__":
    flags.FLAGS(["x"])
    tokenizer = make_tokenizer()

    def batches(workers, make, **how):
        return iter(make(USERS, tokenizer, make_config(data__workers=workers), seed=0, **how))

    for make, how in ((batches.user_batches, {}), (batches.warmup_batches, {"items": ITEMS})):
        expected = list(itertools.islice(batches(0, make, **how), 6))
        iterator = batches(2, make, **how)
        first = [next(iterator) for _ in range(3)]
        state = iterator.get_state()
        next(iterator)
        iterator.set_state(state)
        jax.tree.map(np.testing.assert_array_equal, expected, first + [next(iterator) for _ in range(3)])
        iterator.close()
    print("equal")
"""


@pytest.mark.slow
def test_worker_processes_give_the_same_batches_and_resume(tmp_path: pathlib.Path) -> None:
    # A process of its own: closures whose shapes are checked, as in these tests, cannot be sent to
    # a worker.
    (tmp_path / "run.py").write_text(WORKERS)
    root = str(pathlib.Path(__file__).parents[2])
    command = [sys.executable, str(tmp_path / "run.py")]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": root}, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.strip().endswith("equal"), done.stderr


def test_no_users_is_told(tokenizer: Tokenizer, cfg: Config) -> None:
    with pytest.raises(UserError, match="data.path: no user"):
        batches.user_batches([], tokenizer, cfg, seed=0)


def test_eval_batches(tokenizer: Tokenizer) -> None:
    cfg = make_config(data__num_pairs=5)
    made = list(batches.eval_batches(USERS, tokenizer, cfg))
    assert [b.user_mask.tolist() for b in made] == [[True] * 4, [True] * 4, [True] * 3 + [False]]
    assert [i for b in made for i in b.user_ids] == [u.user_id for u in USERS] + [""]
    assert np.concatenate([b.batch.index for b in made]).tolist() == list(range(12))
    masks = np.concatenate([b.batch.pair_mask for b in made])
    assert masks.sum(1).tolist() == [min(5, len(u.pairs)) for u in USERS] + [0]
    assert (np.concatenate([b.batch.context.lengths for b in made]) > 0).all()
    for n, user in enumerate(USERS):
        b, row = made[n // 4], n % 4
        assert text(tokenizer, b.oracle, row) == user.oracle
        turns = [
            text(tokenizer, b.batch.turns, row, k) for k in np.flatnonzero(b.batch.pair_mask[row])
        ]
        assert turns == [f"pair {n} {k} ?" for k in range(min(5, len(user.pairs)))]


def test_items_are_listed_in_the_order_of_every_summary() -> None:
    oracles = ("z ; b", "b ; c", "c ; a", "", "alone")
    users = [dataclasses.replace(USERS[0], oracle=oracle) for oracle in oracles]
    assert batches.summary_items(users) == ("z", "b", "c", "a", "alone")
    assert batches.summary_items(users[::-1]) == ("z", "b", "c", "a", "alone")
    assert set(
        batches.summary_items([*users, dataclasses.replace(USERS[0], oracle="a ; z")])
    ) == set("zbca") | {"alone"}
    assert batches.summary_items(USERS[3:4]) == ("long answers", "formal tone")
    assert batches.summary_items([]) == ()


def warm(
    tokenizer: Tokenizer,
    users: list[User],
    *,
    count: int = 20,
    items: tuple[str, ...] = ITEMS,
    **changes: Any,
) -> list[Any]:
    """The first batches; without `changes` the generator's summaries are true and readings are of
    pairs."""
    true = {
        f"warmup__{name}": 0.0
        for name in ("no_summary", "drop", "repeat", "wrong", "reading_survey")
    }
    changes = true | changes
    return take(
        batches.warmup_batches(users, tokenizer, make_config(**changes), seed=0, items=items), count
    )


def told(tokenizer: Tokenizer, users: list[User], **changes: Any) -> list[list[str]]:
    """The items in the generator's contexts."""
    contexts = [
        b.generator.context for b in warm(tokenizer, users, warmup__reading_users=1, **changes)
    ]
    return [
        [item for item in text(tokenizer, c, row).split(" ; ") if item]
        for c in contexts
        for row in range(len(c.ids))
    ]


def taught(tokenizer: Tokenizer, users: list[User], **changes: Any) -> list[list[str]]:
    """The items in the summaries that the inference model is taught."""
    answers = [
        b.summary.answers for b in warm(tokenizer, users, warmup__reading_users=1, **changes)
    ]
    return [text(tokenizer, a, row, 0).split(" ; ") for a in answers for row in range(len(a.ids))]


def test_warmup_of_the_generator(tokenizer: Tokenizer) -> None:
    prefix = prompts.generator_prefix(tokenizer, make_config())
    d = warm(tokenizer, USERS, count=1)[0].generator
    assert (
        d.context.ids.shape == (4, len(prefix) + 24)
        and d.turns.ids.shape == (4, 3, 16)
        and d.mask.shape == (4, 3)
    )
    for row in range(4):
        n = text(tokenizer, d.turns, row, 0).split()[1]
        user = USERS[int(n)]
        assert ids_at(d.context, row) == prefix + tokenizer.encode(user.oracle)
        assert d.mask[row].sum() == min(3, len(user.pairs))
        for k in np.flatnonzero(d.mask[row]):
            number = text(tokenizer, d.turns, row, k).split()[2]
            assert ids_at(d.answers, row, k) == prompts.answer(tokenizer, f"yes {n} {number}")


@pytest.mark.parametrize(
    ("oracle", "stated", "items", "expected"),
    [
        ("", "warm tone", ITEMS, ["warm tone"]),
        ("", "", ITEMS, []),
        ("be brief ; yes", "", (), ["be brief", "yes"]),  # free text is told as it stands
        ("plain words ; short answers", "", ITEMS, ["short answers", "plain words"]),
    ],
)
def test_what_the_generator_is_told(
    tokenizer: Tokenizer, oracle: str, stated: str, items: tuple[str, ...], expected: list[str]
) -> None:
    users = [dataclasses.replace(USERS[1], oracle=oracle, stated=stated)]
    assert told(tokenizer, users, items=items, count=1) == [expected] * 4


def test_noise_in_what_the_generator_is_told(tokenizer: Tokenizer) -> None:
    without = told(tokenizer, USERS, warmup__no_summary=0.5)  # 80 rows
    assert 0.3 < np.mean([named == [] for named in without]) < 0.7
    kept = told(tokenizer, USERS, warmup__drop=0.25)
    assert 1.3 < np.mean([len(named) for named in kept]) < 1.7  # of 2 items
    assert all(named == sorted(named, key=ITEMS.index) for named in kept)
    assert told(tokenizer, USERS, warmup__drop=1.0, count=1) == [[]] * 4
    added = told(tokenizer, USERS, warmup__drop=1.0, warmup__wrong=0.1)
    assert (
        0.5 < np.mean([len(named) for named in added]) < 1.1
    )  # 0.8 of 8 slots; standard error 0.1
    assert {item for named in added for item in named} == set(ITEMS)
    assert told(tokenizer, USERS, warmup__wrong=1.0, count=1) == [list(ITEMS)] * 4
    once = told(tokenizer, USERS, count=1)
    assert told(tokenizer, USERS, warmup__repeat=1.0, count=1) == [
        [i for i in row for _ in range(2)] for row in once
    ]
    again = [len(row) - len(set(row)) for row in told(tokenizer, USERS, warmup__repeat=0.5)]
    assert 0.7 < np.mean(again) < 1.3  # of 2 items


def number_of(tokenizer: Tokenizer, d: Demonstrations, row: int) -> int:
    (n,) = (n for n in range(11) if f"number {n} ." in text(tokenizer, d.context, row))
    return n


def test_summaries_and_readings_of_the_same_signals(tokenizer: Tokenizer) -> None:
    cfg = make_config()
    questions = set()
    for d in (b.summary for b in warm(tokenizer, USERS, warmup__guess=0.0)):
        assert (
            d.context.ids.shape == (2, 120)
            and d.turns.ids.shape == (2, 3, 16)
            and d.answers.ids.shape == (2, 3, 24)
        )
        assert d.mask.all()
        for row in range(2):
            n = number_of(tokenizer, d, row)
            user = USERS[n]
            assert ids_at(d.context, row) == prompts.inference_context(
                tokenizer, prompts.signals_text(user, "grouped")
            )
            assert ids_at(d.turns, row, 0) == prompts.summary_turn(tokenizer, cfg)
            assert ids_at(d.answers, row, 0) == prompts.answer(tokenizer, user.stated)
            asked = [int(text(tokenizer, d.turns, row, k).split()[2]) for k in (1, 2)]
            assert len(set(asked)) == 2
            for k, number in zip((1, 2), asked, strict=True):
                assert ids_at(d.turns, row, k) == prompts.reading_turn(
                    tokenizer, f"read {n} {number} ?"
                )
                assert ids_at(d.answers, row, k) == prompts.answer(
                    tokenizer, user.readings[number].answer
                )
            questions.update(asked)
    assert questions == {0, 1, 2}


def test_without_readings_the_answers_are_as_long_as_a_summary(tokenizer: Tokenizer) -> None:
    d = warm(tokenizer, USERS, count=1, warmup__readings=0, data__answer_len=40)[0].summary
    assert d.turns.ids.shape == (2, 1, 16) and d.answers.ids.shape == (2, 1, 24)


def test_guesses_tell_nothing_of_the_choices(tokenizer: Tokenizer) -> None:
    assert taught(tokenizer, USERS[:1], warmup__guess=0.0, count=1) == [["plain words"]] * 2
    named = {}
    for n in (0, 1):  # who chose opposite sides of each contrast
        stated = USERS[n].stated
        summaries = taught(tokenizer, USERS[n : n + 1], warmup__guess=1.0, warmup__summary_users=10)
        assert all(
            s[2:] == [stated] for s in summaries
        )  # the side that the survey states is never contradicted
        assert {tuple(s[:2]) for s in summaries} == set(itertools.product(ITEMS[:2], ITEMS[2:4]))
        named[n] = np.mean([[s[0] == ITEMS[0], s[1] == ITEMS[2]] for s in summaries], axis=0)
    np.testing.assert_allclose(
        [named[0], named[1]], 0.5, atol=0.12
    )  # 200 summaries: standard error 0.035
    some = taught(tokenizer, USERS[:1], warmup__guess=0.3, warmup__summary_users=10)
    assert 0.45 < np.mean([len(s) - 1 for s in some]) < 0.75  # of two contrasts


def test_contrasts_shown_twice_count_once_and_words_for_nothing_go(tokenizer: Tokenizer) -> None:
    pair = (
        Reading("a ?", ITEMS[0], ITEMS[1]),
        Reading("b ?", ITEMS[1], ITEMS[0]),
        Reading("c ?", ITEMS[0], ITEMS[1]),
    )
    users = [dataclasses.replace(USERS[0], stated="no idea", readings=pair)]
    assert taught(tokenizer, users, warmup__guess=0.0, count=1) == [["no idea"]] * 2
    summaries = taught(tokenizer, users, warmup__guess=1.0)
    assert {tuple(s) for s in summaries} == {("short answers",), ("long answers",)}


def test_data_that_states_nothing_is_summarised_by_its_profile(tokenizer: Tokenizer) -> None:
    user = dataclasses.replace(USERS[0], stated="", readings=())
    d = warm(tokenizer, [user], count=1, data__summary_len=4, warmup__guess=1.0)[0].summary
    assert ids_at(d.answers, 0, 0) == [*tokenizer.encode("i am number"), tokenizer.eos_id]
    assert d.mask.tolist() == [[True, False, False]] * 2
    d = warm(tokenizer, [dataclasses.replace(user, profile="")], count=1)[0].summary
    assert not d.mask.any()


@pytest.mark.parametrize("shots", [1, 2])
def test_readings_of_a_few_past_pairs(tokenizer: Tokenizer, shots: int) -> None:
    asked, shown = set(), set()
    for d in (b.reading for b in warm(tokenizer, USERS, warmup__reading_shots=shots)):
        assert (
            d.turns.ids.shape == (4, 1, 16) and d.answers.ids.shape == (4, 1, 24) and d.mask.all()
        )
        for row in range(4):
            _, n, k, _ = text(tokenizer, d.turns, row, 0).split()[:4]
            user = USERS[int(n)]
            assert ids_at(d.turns, row, 0) == prompts.reading_turn(tokenizer, f"read {n} {k} ?")
            assert ids_at(d.answers, row, 0) == prompts.answer(
                tokenizer, user.readings[int(k)].answer
            )
            present = [s for s in user.shots if s.prompt in text(tokenizer, d.context, row)]
            assert user.shots[int(k)] in present
            only = dataclasses.replace(
                user, profile="", survey="", comments=(), shots=tuple(present)
            )
            assert ids_at(d.context, row) == prompts.inference_context(
                tokenizer, prompts.signals_text(only, "grouped")
            )
            asked.add(k)
            shown.add(len(present))
    assert asked == {"0", "1", "2"} and shown == set(range(1, shots + 1))


def test_readings_of_the_survey_alone(tokenizer: Tokenizer) -> None:
    """Summaries of what it states, without past pairs; data that states nothing keeps to the
    pairs."""
    cfg = make_config()
    for d in (b.reading for b in warm(tokenizer, USERS, warmup__reading_survey=1.0)):
        for row in range(4):
            user = USERS[number_of(tokenizer, d, row)]
            alone = dataclasses.replace(user, shots=(), comments=())
            assert ids_at(d.context, row) == prompts.inference_context(
                tokenizer, prompts.signals_text(alone, "grouped")
            )
            assert ids_at(d.turns, row, 0) == prompts.summary_turn(tokenizer, cfg)
            assert ids_at(d.answers, row, 0) == prompts.answer(tokenizer, user.stated)
    both = [b.reading for b in warm(tokenizer, USERS, warmup__reading_survey=0.5)]
    asked = ["read" in text(tokenizer, d.turns, row, 0) for d in both for row in range(4)]
    assert 0.3 < np.mean(asked) < 0.7
    silent = [dataclasses.replace(user, stated="") for user in USERS]
    for d in (b.reading for b in warm(tokenizer, silent, count=4, warmup__reading_survey=1.0)):
        assert all("read" in text(tokenizer, d.turns, row, 0) for row in range(4))


def test_contexts_of_readings_are_as_long_as_past_pairs_need(tokenizer: Tokenizer) -> None:
    users = [dataclasses.replace(user, stated="") for user in USERS]

    def room(shots: int) -> tuple[int, int]:
        contexts = [
            b.reading.context for b in warm(tokenizer, users, count=8, warmup__reading_shots=shots)
        ]
        return contexts[0].ids.shape[1], max(int(c.lengths.max()) for c in contexts)

    (one, longest), (two, longest_of_two) = room(1), room(2)
    assert longest <= one < longest + 4 and longest_of_two <= two < longest_of_two + 4
    assert one % 4 == two % 4 == 0 and one < two < 120
    tight = warm(tokenizer, users, count=1, data__context_len=14)[0].reading
    assert (
        tight.context.ids.shape == (4, 4) and not tight.mask.any()
    )  # a pair that does not fit asks for nothing


@pytest.mark.parametrize("readings", [(), USERS[0].readings[:2]])
def test_data_without_an_exercise_for_each_pair_has_no_readings(
    tokenizer: Tokenizer, readings: tuple[Reading, ...]
) -> None:
    users = [dataclasses.replace(user, readings=readings) for user in USERS]
    b = warm(tokenizer, users, count=1)[0]
    assert b.reading.turns.ids.shape == (4, 1, 16) and not b.reading.mask.any()
    assert (b.reading.answers.ids == tokenizer.pad_id).all() and not b.reading.answers.lengths.any()
    assert b.summary.mask.tolist() == [[True, *(k < len(readings) for k in range(2))]] * 2


def test_reading_exercise() -> None:
    rngs = [np.random.default_rng(seed) for seed in range(60)]
    found = [batches._reading_exercise(USERS[1], 3, rng) for rng in rngs]
    for user in found:
        assert (user.profile, user.survey, user.comments, user.pairs) == ("", "", (), ())
        numbers = [USERS[1].shots.index(s) for s in user.shots]
        assert numbers == sorted(
            numbers
        )  # in the order of the signals, wherever the asked one stands
        (reading,) = user.readings
        assert USERS[1].readings.index(reading) in numbers
    assert {len(user.shots) for user in found} == {1, 2, 3}
    last = [
        user.readings[0] == USERS[1].readings[USERS[1].shots.index(user.shots[-1])]
        for user in found
    ]
    assert 0.2 < np.mean(last) < 0.9
    bare = dataclasses.replace(USERS[1], shots=())
    assert batches._reading_exercise(bare, 2, rngs[0]).readings == ()


def test_instruction_that_leaves_no_room_is_told(tokenizer: Tokenizer) -> None:
    with pytest.raises(
        UserError, match="data.turn_len: 16 is less than the 22 tokens of model.summary_instruction"
    ):
        warm(tokenizer, USERS, model__summary_instruction="yes " * 20)
