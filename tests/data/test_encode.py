"""Token ids of users: what is cut and in which order, what is counted, and the lengths that texts
need."""

import dataclasses
import itertools

import pytest

from popi_jax.data import encode, prompts
from popi_jax.data.encode import Truncations
from popi_jax.data.records import Comment, Pair, Reading
from popi_jax.data.tokenizer import Tokenizer
from popi_jax.errors import UserError
from tests.data.people import ITEMS, USERS, make_config, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


def test_encode_user_without_cuts(tokenizer: Tokenizer) -> None:
    user = USERS[1]
    found = encode.encode_user(user, tokenizer, make_config())
    assert found.context == prompts.inference_context(
        tokenizer, prompts.signals_text(user, "grouped")
    )
    assert found.turns == [prompts.generator_turn(tokenizer, p.prompt) for p in user.pairs]
    assert found.chosen == [prompts.answer(tokenizer, p.chosen) for p in user.pairs]
    assert found.rejected == [prompts.answer(tokenizer, p.rejected) for p in user.pairs]
    assert tokenizer.decode(found.oracle) == found.oracle_text == user.oracle
    assert found.stated_text == user.stated
    assert tokenizer.decode(found.profile) == user.profile
    assert found.readings[2] == (
        prompts.reading_turn(tokenizer, "read 1 2 ?"),
        prompts.answer(tokenizer, "technical terms"),
    )
    assert found.contrasts == [(ITEMS[2 * k + 1], ITEMS[2 * k]) for k in range(3)]
    assert found.truncations == Truncations(
        contexts=0, turns=0, answers=0, oracles=0, users=1, pairs=2
    )


def test_context_loses_comments_then_old_shots_then_survey_then_profile(
    tokenizer: Tokenizer,
) -> None:
    user = dataclasses.replace(USERS[1], comments=(Comment("a ?", "old"), Comment("b ?", "new")))
    lines = ["i am number 1", "i keep bees", "old", "new", "shot 1 0", "shot 1 1", "shot 1 2"]
    seen, parts, cfg = [], [], make_config()
    whole = len(encode.encode_user(user, tokenizer, cfg).context)
    for limit in range(whole, 3, -1):
        tight = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, context_len=limit))
        ids, cut = encode.fit_context(user, tokenizer, tight)
        assert len(ids) <= limit and cut == (limit < whole)
        parts.append(tokenizer.decode(ids))
        kept = [line for line in lines if line in parts[-1]]
        if kept not in seen:
            seen.append(kept)
    gone = [
        [],
        ["old"],
        ["new"],
        ["shot 1 0"],
        ["shot 1 1"],
        ["shot 1 2"],
        ["i keep bees"],
        ["i am number 1"],
    ]
    assert seen == [
        [line for line in lines if line not in some] for some in itertools.accumulate(gone)
    ]
    assert "profile: i am number 1 .\nsurvey: i keep" in parts  # tails are cut, not heads
    assert "profile: i am" in parts


def test_a_shortened_context_has_no_reading_exercises(tokenizer: Tokenizer) -> None:
    whole = encode.encode_user(USERS[1], tokenizer, make_config())
    cut = encode.encode_user(
        USERS[1], tokenizer, make_config(data__context_len=len(whole.context) - 1)
    )
    assert len(whole.readings) == 3 and cut.readings == []  # the pair that is asked for may be gone


def test_questions_lose_their_start_and_their_answers_the_end(tokenizer: Tokenizer) -> None:
    user = dataclasses.replace(USERS[0], readings=(Reading("yes " * 20 + "bees", "no " * 20, ""),))
    ((turn, answer),) = encode.encode_user(user, tokenizer, make_config()).readings
    assert len(turn) <= 16 and tokenizer.decode(turn).strip().endswith("yes bees")
    assert answer == prompts.answer(tokenizer, "no " * 20)[:8]


def test_turns_lose_old_messages_then_the_start_of_the_last(tokenizer: Tokenizer) -> None:
    prompt = [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "bees ?"},
        {"role": "assistant", "content": "they sing"},
        {"role": "user", "content": "shot 1 shot 2 shot 3 ?"},
    ]
    user = dataclasses.replace(USERS[0], pairs=(Pair("r", prompt, "yes", "no"),), readings=())

    def turn_at(limit: int) -> list[int]:
        found = encode.encode_user(user, tokenizer, make_config(data__turn_len=limit))
        assert found.truncations.turns == (limit < len(whole))
        return found.turns[0]

    whole = prompts.generator_turn(tokenizer, prompt)
    last = prompts.generator_turn(tokenizer, prompt[-1:])
    assert turn_at(len(whole)) == whole
    assert turn_at(len(whole) - 1) == prompts.generator_turn(tokenizer, prompt[1:])
    assert (
        turn_at(len(prompts.generator_turn(tokenizer, prompt[1:])) - 1) == last
    )  # no answer without its question
    assert turn_at(len(last)) == last
    assert (
        turn_at(len(last) - 1) == last[:2] + last[3:]
    )  # end, header, then the content without its first token
    assert turn_at(4) == prompts.generator_turn(tokenizer, [{"role": "user", "content": ""}])
    with pytest.raises(UserError, match="data.turn_len: 3 is less than the 4 tokens"):
        turn_at(3)


def test_a_cut_answer_has_no_end_token_and_is_counted(tokenizer: Tokenizer) -> None:
    user = dataclasses.replace(
        USERS[0], pairs=(Pair("r", USERS[0].pairs[0].prompt, "yes " * 20, "no"),)
    )
    found = encode.encode_user(user, tokenizer, make_config())
    assert len(found.chosen[0]) == 8 and tokenizer.eos_id not in found.chosen[0]
    assert found.rejected[0][-1] == tokenizer.eos_id
    tight = make_config(data__context_len=40, data__summary_len=2)
    users = [encode.encode_user(u, tokenizer, tight) for u in (user, USERS[1])]
    assert encode.truncations(users) == Truncations(
        contexts=2, turns=0, answers=1, oracles=2, users=2, pairs=3
    )
    assert encode.truncations([]) == Truncations(0, 0, 0, 0, 0, 0)


def test_a_limit_below_the_headers_is_told(tokenizer: Tokenizer) -> None:
    with pytest.raises(
        UserError, match="data.context_len: 1 is less than the 2 tokens of the headers"
    ):
        encode.encode_user(USERS[0], tokenizer, make_config(data__context_len=1))


def lengths(data: object) -> tuple[int, int, int]:
    return data.context_len, data.turn_len, data.answer_len


def test_fitted_lengths_are_the_longest_rounded_up(tokenizer: Tokenizer) -> None:
    cfg = make_config(data__context_len=400, data__turn_len=100, data__answer_len=100)
    data, cut = encode.fitted_lengths(USERS, tokenizer, cfg)
    encoded = [encode.encode_user(u, tokenizer, cfg) for u in USERS]
    longest = (
        max(len(u.context) for u in encoded),
        max(len(turn) for u in encoded for turn in (*u.turns, *(t for t, _ in u.readings))),
        max(
            len(ids)
            for u in encoded
            for ids in (*u.chosen, *u.rejected, *(a for _, a in u.readings))
        ),
    )
    assert all(
        least <= n < least + 4 and n % 4 == 0
        for n, least in zip(lengths(data), longest, strict=True)
    )
    assert (
        dataclasses.replace(data, context_len=400, turn_len=100, answer_len=100) == cfg.data
    )  # all else is kept
    assert cut == Truncations(0, 0, 0, 0, users=11, pairs=sum(len(u.pairs) for u in USERS))


def test_fitted_lengths_never_exceed_the_limits(tokenizer: Tokenizer) -> None:
    cfg = make_config(data__context_len=15, data__turn_len=7, data__answer_len=3)
    data, cut = encode.fitted_lengths(USERS, tokenizer, cfg)
    assert lengths(data) == (15, 7, 3)
    assert (
        cut.contexts == cut.users == 11 and cut.turns == cut.pairs and cut.answers == 2 * cut.pairs
    )


def test_fitted_lengths_count_readings_and_the_request_for_a_summary(tokenizer: Tokenizer) -> None:
    def fitted(readings: tuple[Reading, ...], instruction: str = "") -> tuple[int, int, int]:
        user = dataclasses.replace(USERS[0], readings=readings)
        cfg = make_config(
            data__turn_len=100, data__answer_len=100, model__summary_instruction=instruction
        )
        return lengths(encode.fitted_lengths([user], tokenizer, cfg)[0])

    context, turn, answer = fitted(())
    assert fitted((Reading("yes " * 20, "no " * 30, ""),)) == (
        context,
        24,
        32,
    )  # 20 and 4 of headers; 30 and the end
    assert fitted((), "yes " * 20) == (context, 24, answer)
    assert turn < 24 and answer < 32


def test_fitted_lengths_of_a_user_without_texts(tokenizer: Tokenizer) -> None:
    bare = dataclasses.replace(
        USERS[0], profile="", survey="", shots=(), comments=(), pairs=(), readings=()
    )
    data, cut = encode.fitted_lengths([bare], tokenizer, make_config(model__summary_instruction=""))
    assert lengths(data) == (
        4,
        4,
        4,
    )  # headers of 2 and 4 tokens; answers are never without room for one
    assert cut == Truncations(0, 0, 0, 0, users=1, pairs=0)


def test_some_users_are_measured_of_many(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "_MEASURED_USERS", 3)
    _, cut = encode.fitted_lengths(USERS, tokenizer, make_config())
    assert (cut.users, cut.pairs) == (3, sum(len(USERS[n].pairs) for n in (0, 4, 8)))
