"""Token ids of users: what is cut and in which order, what is counted, and the lengths that texts
need."""

import dataclasses
import itertools
import re
from typing import Any

import pytest

from popi_jax.data import encode, prompts
from popi_jax.data.encode import Truncations
from popi_jax.data.records import Comment, Pair, Reading, Shot, User
from popi_jax.data.tokenizer import Tokenizer
from popi_jax.errors import UserError
from tests.data.people import ITEMS, USERS, make_config, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


def test_encode_user_without_cuts(tokenizer: Tokenizer) -> None:
    user = USERS[1]
    found = encode.encode_user(user, tokenizer, make_config())
    assert found.context == prompts.render_inference_context(
        tokenizer, prompts.render_signals(user, "grouped")
    )
    assert found.turns == [prompts.render_generator_turn(tokenizer, p.prompt) for p in user.pairs]
    assert found.chosen == [prompts.encode_answer(tokenizer, p.chosen) for p in user.pairs]
    assert found.rejected == [prompts.encode_answer(tokenizer, p.rejected) for p in user.pairs]
    assert tokenizer.decode(found.oracle) == found.oracle_text == user.oracle
    assert found.stated_text == user.stated
    assert tokenizer.decode(found.profile) == user.profile
    assert found.readings[2] == (
        prompts.render_reading_turn(tokenizer, "read 1 2 ?"),
        prompts.encode_answer(tokenizer, "technical terms"),
    )
    assert found.contrasts == [(ITEMS[2 * k + 1], ITEMS[2 * k]) for k in range(3)]
    assert found.truncations == Truncations(contexts=0, turns=0, answers=0, users=1, pairs=2)


def test_context_loses_comments_then_old_shots_then_survey_then_profile(
    tokenizer: Tokenizer,
) -> None:
    comments = (Comment("a ?", "old"), Comment("b ?", "new"))
    user = dataclasses.replace(USERS[1], comments=comments, survey="bees: yes; tone: warm")
    lines = ["i am number 1", "bees: yes", "tone: warm", "old", "new"]
    lines += ["shot 1 0", "shot 1 1", "shot 1 2"]
    seen, parts, cfg = [], [], make_config()
    whole = len(encode.encode_user(user, tokenizer, cfg).context)
    for limit in range(whole, 3, -1):
        tight = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, context_len=limit))
        signals = encode.fit_signals(user, tokenizer, tight)
        ids = signals.context
        assert len(ids) <= limit and signals.shortened == (limit < whole)
        assert ids == prompts.render_inference_context(tokenizer, signals.text)
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
        ["tone: warm"],
        ["bees: yes"],
        ["i am number 1"],
    ]
    assert seen == [
        [line for line in lines if line not in some] for some in itertools.accumulate(gone)
    ]
    for part in parts:  # never inside an item
        pieces = re.split(r"\n|; ", prompts.render_signals(user, "grouped"))
        assert {*re.split(r"\n|; ", part)} <= {*pieces, ""}
    emptied = [parts[-1] == "", encode.encode_user(user, tokenizer, tight).truncations.emptied]
    assert emptied == [True, 1]


@pytest.mark.parametrize("survey", ["a: 1; b: 2; c: 3", "a: 1; 2\nb: 3\nc: 4", "one answer", ""])
def test_as_few_items_as_possible_are_dropped(tokenizer: Tokenizer, survey: str) -> None:
    """As when they are dropped one by one, and each is counted; far fewer texts are encoded."""
    comments = tuple(Comment(f"tea {k} ?", "too long " * (k % 5)) for k in range(20))
    shots = tuple(Shot(f"p {k}", "yes " * (3 * k % 7), "no " * (k % 3)) for k in range(20))
    user = dataclasses.replace(USERS[1], comments=comments, shots=shots, survey=survey)

    def drop_one(some: User) -> User:
        if some.comments:
            return dataclasses.replace(some, comments=some.comments[1:])
        if some.shots:
            return dataclasses.replace(some, shots=some.shots[1:])
        if some.survey:
            between = "\n" if "\n" in survey else "; "
            left = between.join(some.survey.split(between)[:-1])
            return dataclasses.replace(some, survey=left)
        return dataclasses.replace(some, profile="")

    counted, render = list[int](), prompts.render_inference_context

    def count(*texts: Any) -> list[int]:
        counted.append(0)
        return render(*texts)

    for limit in (*range(3, 60, 4), *range(60, 500, 37)):
        cfg, some = make_config(data__context_len=limit), user
        while True:
            text = prompts.render_signals(some, "grouped")
            ids = prompts.render_inference_context(tokenizer, text)
            if len(ids) <= limit:
                break
            some = drop_one(some)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prompts, "render_inference_context", count)
            counted.clear()
            found = encode.fit_signals(user, tokenizer, cfg)
        assert (found.text, found.context) == (text, ids)
        assert found.emptied == (text == "")
        assert len(counted) <= 12, limit


def test_a_user_without_signals_is_not_emptied(tokenizer: Tokenizer) -> None:
    bare = dataclasses.replace(USERS[1], profile="", survey="", shots=(), comments=())
    found = encode.encode_user(bare, tokenizer, make_config(data__context_len=2))
    assert (found.truncations.contexts, found.truncations.emptied) == (0, 0)
    whole = encode.encode_user(USERS[1], tokenizer, make_config())
    assert encode.encode_context(USERS[1], tokenizer, make_config()) == whole.context


def test_grouped_signals_lose_whole_items_and_not_their_tail(tokenizer: Tokenizer) -> None:
    """The tail of the grouped layout holds the rejected replies of all past pairs."""
    shots = tuple(Shot(f"shot 1 {k} ?", f"they sing {k}", f"no idea {k}") for k in range(3))
    user = dataclasses.replace(USERS[1], comments=(), shots=shots)
    cfg = make_config()
    assert cfg.data.pair_layout == "grouped"
    whole = encode.fit_signals(user, tokenizer, cfg)
    tight = make_config(data__context_len=len(whole.context) - 1)
    text = encode.fit_signals(user, tokenizer, tight).text
    for k in (1, 2):
        assert f"shot 1 {k} ?" in text and f"they sing {k}" in text and f"no idea {k}" in text
    assert "shot 1 0 ?" not in text and "they sing 0" not in text and "no idea 0" not in text
    assert len(tokenizer.encode(text)) < tight.data.context_len


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
    assert answer == prompts.encode_answer(tokenizer, "no " * 20)[:8]


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

    whole = prompts.render_generator_turn(tokenizer, prompt)
    last = prompts.render_generator_turn(tokenizer, prompt[-1:])
    assert turn_at(len(whole)) == whole
    assert turn_at(len(whole) - 1) == prompts.render_generator_turn(tokenizer, prompt[1:])
    assert (
        turn_at(len(prompts.render_generator_turn(tokenizer, prompt[1:])) - 1) == last
    )  # no answer without its question
    assert turn_at(len(last)) == last
    assert (
        turn_at(len(last) - 1) == last[:2] + last[3:]
    )  # end, header, then the content without its first token
    assert turn_at(4) == prompts.render_generator_turn(tokenizer, [{"role": "user", "content": ""}])
    with pytest.raises(UserError, match="data.turn_len: 3 is less than the 4 tokens"):
        turn_at(3)


def test_a_cut_answer_has_no_end_token_and_is_counted(tokenizer: Tokenizer) -> None:
    user = dataclasses.replace(
        USERS[0], pairs=(Pair("r", USERS[0].pairs[0].prompt, "yes " * 20, "no"),)
    )
    found = encode.encode_user(user, tokenizer, make_config())
    assert len(found.chosen[0]) == 8 and tokenizer.eos_id not in found.chosen[0]
    assert found.rejected[0][-1] == tokenizer.eos_id
    assert found.truncations == Truncations(contexts=0, turns=0, answers=1, users=1, pairs=1)


def test_pairs_that_are_equal_after_the_cut_do_not_count(tokenizer: Tokenizer) -> None:
    asked, same = USERS[0].pairs[0].prompt, "yes " * 20
    pairs = (
        Pair("a", asked, same + "bees", same + "tea"),
        Pair("b", asked, "yes", "no"),
        Pair("c", asked, "no", "no"),
        Pair("d", asked, "yes", "yes yes"),
    )
    user = dataclasses.replace(USERS[0], pairs=pairs)
    found = encode.encode_user(user, tokenizer, make_config())
    assert found.usable == (1, 3) and len(found.turns) == len(found.chosen) == 4
    assert found.truncations == Truncations(0, 0, answers=2, users=1, pairs=4, equal=2)
    wide = encode.encode_user(user, tokenizer, make_config(data__answer_len=40))
    assert wide.usable == (0, 1, 3) and wide.truncations.equal == 1


def test_a_limit_below_the_headers_is_told(tokenizer: Tokenizer) -> None:
    with pytest.raises(
        UserError, match="data.context_len: 1 is less than the 2 tokens of the headers"
    ):
        encode.encode_user(USERS[0], tokenizer, make_config(data__context_len=1))
