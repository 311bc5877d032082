"""The warm-up's batches: what the generator is told, which summaries are taught, what is read."""

import dataclasses
import itertools
from typing import Any

import jax
import numpy as np
import pytest

from popi_jax.arrays import Demonstrations
from popi_jax.data import prompts, warmup_batches
from popi_jax.data.records import Reading, User
from popi_jax.data.tokenizer import Tokenizer
from popi_jax.errors import UserError
from tests.data.people import (
    ITEMS,
    USERS,
    decode_at,
    ids_at,
    make_config,
    make_tokenizer,
    take,
    warm_batches,
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


def test_items_are_listed_in_the_order_of_every_summary() -> None:
    oracles = ("z ; b", "b ; c", "c ; a", "", "alone")
    users = [dataclasses.replace(USERS[0], oracle=oracle) for oracle in oracles]
    assert warmup_batches.list_summary_items(users) == ("z", "b", "c", "a", "alone")
    assert warmup_batches.list_summary_items(users[::-1]) == ("z", "b", "c", "a", "alone")
    assert set(
        warmup_batches.list_summary_items([*users, dataclasses.replace(USERS[0], oracle="a ; z")])
    ) == set("zbca") | {"alone"}
    assert warmup_batches.list_summary_items(USERS[3:4]) == ("long answers", "formal tone")
    assert warmup_batches.list_summary_items([]) == ()


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
        for name in ("no_summary", "drop", "repeat", "wrong", "reading_survey", "shuffle")
    }
    changes = true | changes
    return take(warm_batches(users, tokenizer, make_config(**changes), seed=0, items=items), count)


def test_the_generator_may_learn_from_more_pairs_than_an_update_has(tokenizer) -> None:
    """As many warm-ups of K = 1 need; never more than users have."""
    few = warm(tokenizer, USERS, count=3, batch__pairs=1, warmup__generator_pairs=3)
    many = warm(tokenizer, USERS, count=3, batch__pairs=3)
    assert few[0].generator.mask.shape == (4, 3)
    jax.tree.map(np.testing.assert_array_equal, few, many)
    most = make_config(batch__pairs=1, warmup__generator_pairs=99)
    assert warmup_batches.count_pairs(most) == most.data.num_pairs
    assert warmup_batches.count_pairs(make_config(batch__pairs=2)) == 2


def told(tokenizer: Tokenizer, users: list[User], **changes: Any) -> list[list[str]]:
    """The items in the generator's contexts."""
    contexts = [
        b.generator.context for b in warm(tokenizer, users, warmup__reading_users=1, **changes)
    ]
    return [
        [item for item in decode_at(tokenizer, c, row).split(" ; ") if item]
        for c in contexts
        for row in range(len(c.ids))
    ]


def taught(tokenizer: Tokenizer, users: list[User], **changes: Any) -> list[list[str]]:
    """The items in the summaries that the inference model is taught."""
    answers = [
        b.summary.answers for b in warm(tokenizer, users, warmup__reading_users=1, **changes)
    ]
    return [
        decode_at(tokenizer, a, row, 0).split(" ; ") for a in answers for row in range(len(a.ids))
    ]


def test_baselines_have_the_warmup_of_all_runs(tokenizer: Tokenizer) -> None:
    """What the main stage tells the generator, or teaches the inference model, is not in it."""
    plain = warm(tokenizer, USERS, count=3)
    for reads, phase in (("signals", "generator 3"), ("summary", "supervised 3")):
        own = {"generator__reads": reads, "schedule__phases": (phase,)}
        for a, b in zip(plain, warm(tokenizer, USERS, count=3, **own), strict=True):
            jax.tree.map(np.testing.assert_array_equal, a, b)


def test_warmup_of_the_generator(tokenizer: Tokenizer) -> None:
    prefix = prompts.render_generator_prefix(tokenizer, make_config())
    d = warm(tokenizer, USERS, count=1)[0].generator
    assert (
        d.context.ids.shape == (4, len(prefix) + 24)
        and d.turns.ids.shape == (4, 3, 16)
        and d.mask.shape == (4, 3)
    )
    for row in range(4):
        n = decode_at(tokenizer, d.turns, row, 0).split()[1]
        user = USERS[int(n)]
        assert ids_at(d.context, row) == prefix + tokenizer.encode(user.oracle)
        assert d.mask[row].sum() == min(3, len(user.pairs))
        for k in np.flatnonzero(d.mask[row]):
            number = decode_at(tokenizer, d.turns, row, k).split()[2]
            assert ids_at(d.answers, row, k) == prompts.encode_answer(
                tokenizer, f"yes {n} {number}"
            )


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
    (n,) = (n for n in range(11) if f"number {n} ." in decode_at(tokenizer, d.context, row))
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
            assert ids_at(d.context, row) == prompts.render_inference_context(
                tokenizer, prompts.render_signals(user, "grouped")
            )
            assert ids_at(d.turns, row, 0) == prompts.render_summary_turn(tokenizer, cfg)
            assert ids_at(d.answers, row, 0) == prompts.encode_answer(tokenizer, user.stated)
            asked = [int(decode_at(tokenizer, d.turns, row, k).split()[2]) for k in (1, 2)]
            assert len(set(asked)) == 2
            for k, number in zip((1, 2), asked, strict=True):
                assert ids_at(d.turns, row, k) == prompts.render_reading_turn(
                    tokenizer, f"read {n} {number} ?"
                )
                assert ids_at(d.answers, row, k) == prompts.encode_answer(
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


def test_items_come_in_any_order(tokenizer: Tokenizer) -> None:
    """Of what the generator is told, of the summaries that are taught and of what is read in the
    survey; none is lost, and with 0 the order is that of the list."""
    stated = " ; ".join((ITEMS[0], ITEMS[2], ITEMS[4]))
    user = dataclasses.replace(USERS[0], stated=stated, oracle=stated)

    def list_texts(shuffle: float) -> list[list[tuple[str, ...]]]:
        own = {"warmup__shuffle": shuffle, "warmup__guess": 0.0, "warmup__reading_survey": 1.0}
        found: list[list[tuple[str, ...]]] = [[], [], []]
        for b in warm(tokenizer, [user], **own):
            for number, answers in enumerate((b.summary.answers, b.reading.answers)):
                for row in range(len(answers.ids)):
                    found[number].append(tuple(decode_at(tokenizer, answers, row, 0).split(" ; ")))
            for row in range(len(b.generator.context.ids)):
                told = tokenizer.decode(ids_at(b.generator.context, row))
                found[2].append(tuple(sorted((ITEMS[n] for n in (0, 2, 4)), key=told.index)))
        return found

    fixed, shuffled = list_texts(0.0), list_texts(1.0)
    for before, after in zip(fixed, shuffled, strict=True):
        assert len(set(before)) == 1 and len(set(after)) == 6
        assert {tuple(sorted(text)) for text in after} == {tuple(sorted(before[0]))}


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
            _, n, k, _ = decode_at(tokenizer, d.turns, row, 0).split()[:4]
            user = USERS[int(n)]
            assert ids_at(d.turns, row, 0) == prompts.render_reading_turn(
                tokenizer, f"read {n} {k} ?"
            )
            assert ids_at(d.answers, row, 0) == prompts.encode_answer(
                tokenizer, user.readings[int(k)].answer
            )
            present = [s for s in user.shots if s.prompt in decode_at(tokenizer, d.context, row)]
            assert user.shots[int(k)] in present
            only = dataclasses.replace(
                user, profile="", survey="", comments=(), shots=tuple(present)
            )
            assert ids_at(d.context, row) == prompts.render_inference_context(
                tokenizer, prompts.render_signals(only, "grouped")
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
            assert ids_at(d.context, row) == prompts.render_inference_context(
                tokenizer, prompts.render_signals(alone, "grouped")
            )
            assert ids_at(d.turns, row, 0) == prompts.render_summary_turn(tokenizer, cfg)
            assert ids_at(d.answers, row, 0) == prompts.encode_answer(tokenizer, user.stated)
    both = [b.reading for b in warm(tokenizer, USERS, warmup__reading_survey=0.5)]
    asked = ["read" in decode_at(tokenizer, d.turns, row, 0) for d in both for row in range(4)]
    assert 0.3 < np.mean(asked) < 0.7
    silent = [dataclasses.replace(user, stated="") for user in USERS]
    for d in (b.reading for b in warm(tokenizer, silent, count=4, warmup__reading_survey=1.0)):
        assert all("read" in decode_at(tokenizer, d.turns, row, 0) for row in range(4))


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
    found = [warmup_batches._draw_exercise(USERS[1], 3, rng) for rng in rngs]
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
    assert warmup_batches._draw_exercise(bare, 2, rngs[0]).readings == ()


def test_instruction_that_leaves_no_room_is_told(tokenizer: Tokenizer) -> None:
    with pytest.raises(
        UserError, match="data.turn_len: 16 is less than the 22 tokens of model.summary_instruction"
    ):
        warm(tokenizer, USERS, model__summary_instruction=" yes" * 20)
