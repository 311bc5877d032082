"""Batches: what is cut, what is drawn, and that the order depends on the seed alone."""

import dataclasses
import itertools
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs.base import base
from popi_jax.data import pipeline, templates
from popi_jax.data import tokenizer as tokenizer_lib
from popi_jax.data.records import Comment, Pair, Reading, Shot, User
from popi_jax.errors import UserError

ITEMS = ("short answers", "warm tone", "plain words", "playful jokes")


def make_user(n: int, num_pairs: int) -> User:
    return User(
        user_id=f"u{n}",
        profile=f"i am number {n} .",
        survey="i keep bees .",
        shots=tuple(Shot(f"shot {n} {k} ?", "they sing", "no idea") for k in range(2)),
        comments=(Comment("tea ?", "too long"),),
        pairs=tuple(
            Pair(f"{n}/{k}", [{"role": "user", "content": f"pair {n} {k} ?"}], f"yes {n} {k}", f"no {n} {k}")
            for k in range(num_pairs)
        ),
        oracle=" ; ".join(ITEMS[n % 2 :: 2]),
        stated=ITEMS[n % 2],
        readings=tuple(Reading(f"read {n} {k} ?", ITEMS[k]) for k in range(3)),
    )


USERS = [make_user(n, 1 + n % 6) for n in range(11)]


@pytest.fixture(scope="module")
def tokenizer() -> tokenizer_lib.Tokenizer:
    texts = [f"{templates.signals_text(u)} {u.oracle} pair yes no read" for u in USERS]
    return tokenizer_lib.train(texts, 400)


@pytest.fixture
def cfg() -> ConfigDict:
    c = base()
    c.data.context_len = 90
    c.data.turn_len = 16
    c.data.answer_len = 8
    c.data.summary_len = 12
    c.batch.users, c.batch.pairs = 4, 3
    c.warmup.generator_users, c.warmup.inference_users, c.warmup.readings = 4, 2, 2
    c.evaluation.batch_users = 4
    return c


def assert_equal(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def text(tokenizer: tokenizer_lib.Tokenizer, tokens: Any, *at: int) -> str:
    return tokenizer.decode(tokens.ids[at][: tokens.lengths[at]])


def take(dataset: Any, count: int) -> list[Any]:
    return list(itertools.islice(iter(dataset), count))


def test_encode_user_without_cuts(tokenizer: tokenizer_lib.Tokenizer, cfg: ConfigDict) -> None:
    user = USERS[1]
    found = pipeline.encode_user(user, tokenizer, cfg)
    assert found.context == templates.inference_context(tokenizer, cfg, templates.signals_text(user))
    assert found.turns == [templates.generator_turn(tokenizer, p.prompt) for p in user.pairs]
    assert found.chosen == [templates.answer(tokenizer, p.chosen) for p in user.pairs]
    assert found.rejected == [templates.answer(tokenizer, p.rejected) for p in user.pairs]
    assert tokenizer.decode(found.oracle) == user.oracle
    assert tokenizer.decode(found.stated) == user.stated
    assert found.readings[2] == (
        templates.reading_turn(tokenizer, "read 1 2 ?"),
        templates.answer(tokenizer, ITEMS[2]),
    )
    assert found.truncations == pipeline.Truncations(contexts=0, turns=0, answers=0, oracles=0, users=1, pairs=2)


def test_context_loses_comments_then_old_shots_then_survey_then_profile(
    tokenizer: tokenizer_lib.Tokenizer, cfg: ConfigDict
) -> None:
    user = dataclasses.replace(USERS[1], comments=(Comment("a ?", "old"), Comment("b ?", "new")))
    lines = ["i am number 1", "i keep bees", "old", "new", "shot 1 0", "shot 1 1"]
    seen, parts = [], []
    for limit in range(pipeline.encode_user(user, tokenizer, cfg).context.__len__(), 3, -1):
        cfg.data.context_len = limit
        ids = pipeline.encode_user(user, tokenizer, cfg).context
        assert len(ids) <= limit
        parts.append(tokenizer.decode(ids))
        kept = [line for line in lines if line in parts[-1]]
        if kept not in seen:
            seen.append(kept)
    assert seen == [
        [line for line in lines if line not in gone]
        for gone in itertools.accumulate(
            [[], ["old"], ["new"], ["shot 1 0"], ["shot 1 1"], ["i keep bees"], ["i am number 1"]]
        )
    ]
    assert "profile: i am number 1 .\nsurvey: i keep" in parts  # tails are cut, not heads
    assert "profile: i am" in parts


def test_turns_lose_old_messages_then_the_start_of_the_last(
    tokenizer: tokenizer_lib.Tokenizer, cfg: ConfigDict
) -> None:
    prompt = [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "bees ?"},
        {"role": "assistant", "content": "they sing"},
        {"role": "user", "content": "shot 1 shot 2 shot 3 ?"},
    ]
    user = dataclasses.replace(USERS[0], pairs=(Pair("r", prompt, "yes", "no"),))

    def turn_at(limit: int) -> list[int]:
        cfg.data.turn_len = limit
        found = pipeline.encode_user(user, tokenizer, cfg)
        assert found.truncations.turns == (limit < len(whole))
        return found.turns[0]

    whole = templates.generator_turn(tokenizer, prompt)
    last = templates.generator_turn(tokenizer, prompt[-1:])
    assert turn_at(len(whole)) == whole
    assert turn_at(len(whole) - 1) == templates.generator_turn(tokenizer, prompt[1:])
    assert turn_at(len(templates.generator_turn(tokenizer, prompt[1:])) - 1) == last  # no answer without its question
    assert turn_at(len(last)) == last
    shortened = turn_at(len(last) - 1)
    assert shortened == last[:2] + last[3:]  # end, header, then the content without its first token
    bare = turn_at(4)
    assert bare == templates.generator_turn(tokenizer, [{"role": "user", "content": ""}])
    with pytest.raises(UserError, match="data.turn_len: 3 is less than the 4 tokens"):
        turn_at(3)


def test_a_cut_answer_has_no_end_token_and_is_counted(tokenizer: tokenizer_lib.Tokenizer, cfg: ConfigDict) -> None:
    user = dataclasses.replace(USERS[0], pairs=(Pair("r", USERS[0].pairs[0].prompt, "yes " * 20, "no"),))
    found = pipeline.encode_user(user, tokenizer, cfg)
    assert len(found.chosen[0]) == 8 and tokenizer.eos_id not in found.chosen[0]
    assert found.rejected[0][-1] == tokenizer.eos_id
    cfg.data.context_len, cfg.data.summary_len = 40, 2
    users = [pipeline.encode_user(u, tokenizer, cfg) for u in (user, USERS[1])]
    assert pipeline.truncations(users) == pipeline.Truncations(
        contexts=2, turns=0, answers=1, oracles=2, users=2, pairs=3
    )
    assert pipeline.truncations([]) == pipeline.Truncations(0, 0, 0, 0, 0, 0)


def test_instructions_longer_than_the_context_are_told(tokenizer: tokenizer_lib.Tokenizer, cfg: ConfigDict) -> None:
    cfg.model.summary_instruction = "i keep bees " * 50
    with pytest.raises(UserError, match="data.context_len: 90 is less than"):
        pipeline.encode_user(USERS[0], tokenizer, cfg)


def test_rows_belong_together(tokenizer: tokenizer_lib.Tokenizer, cfg: ConfigDict) -> None:
    batch = next(iter(pipeline.user_batches(USERS, tokenizer, cfg, seed=0)))
    assert batch.context.ids.shape == (4, 90) and batch.turns.ids.shape == (4, 3, 16)
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
    assert not batch.turns.lengths[unused].any() and (batch.turns.ids[unused] == tokenizer.pad_id).all()


def test_every_user_once_per_epoch_and_another_order_each_epoch(
    tokenizer: tokenizer_lib.Tokenizer, cfg: ConfigDict
) -> None:
    batches = take(pipeline.user_batches(USERS, tokenizer, cfg, seed=0), 11)  # 4 epochs of 11 users
    who = [text(tokenizer, b.context, row).split("\n")[0] for b in batches for row in range(4)]
    epochs = [who[start : start + 11] for start in range(0, 44, 11)]
    assert all(len(set(epoch)) == 11 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert np.concatenate([b.index for b in batches]).tolist() == list(range(44))


def test_pairs_are_drawn_anew_and_all_in_the_end(tokenizer: tokenizer_lib.Tokenizer, cfg: ConfigDict) -> None:
    users = [make_user(0, 6)]
    batches = take(pipeline.user_batches(users, tokenizer, cfg, seed=0, num_pairs=2), 5)
    draws = [tuple(text(tokenizer, b.turns, row, k) for k in range(2)) for b in batches for row in range(4)]
    assert len(set(draws)) > 5 and len({turn for draw in draws for turn in draw}) == 6


def test_seed_alone_decides(tokenizer: tokenizer_lib.Tokenizer, cfg: ConfigDict) -> None:
    first = take(pipeline.user_batches(USERS, tokenizer, cfg, seed=3), 4)
    assert_equal(first, take(pipeline.user_batches(USERS, tokenizer, cfg, seed=3), 4))
    other = take(pipeline.user_batches(USERS, tokenizer, cfg, seed=4), 4)
    assert any((a.context.ids != b.context.ids).any() for a, b in zip(first, other, strict=True))


def test_processes_share_the_global_batch(tokenizer: tokenizer_lib.Tokenizer, cfg: ConfigDict) -> None:
    whole = take(pipeline.user_batches(USERS, tokenizer, cfg, seed=0), 4)
    warm = take(pipeline.warmup_batches(USERS, tokenizer, cfg, seed=0, items=ITEMS), 4)
    halves, warm_halves = [], []
    for p in range(2):
        place = {"seed": 0, "process_index": p, "process_count": 2}
        halves.append(take(pipeline.user_batches(USERS, tokenizer, cfg, **place), 4))
        warm_halves.append(take(pipeline.warmup_batches(USERS, tokenizer, cfg, items=ITEMS, **place), 4))
    assert_equal(whole, jax.tree.map(lambda *parts: np.concatenate(parts), *halves))
    assert_equal(warm, jax.tree.map(lambda *parts: np.concatenate(parts), *warm_halves))
    with pytest.raises(UserError, match="batch.users: 4 users cannot be divided among 3 processes; try 3"):
        pipeline.user_batches(USERS, tokenizer, cfg, seed=0, process_count=3)


@pytest.mark.parametrize("make", [pipeline.user_batches, pipeline.warmup_batches])
def test_resume_is_exact(tokenizer: tokenizer_lib.Tokenizer, cfg: ConfigDict, make: Any) -> None:
    iterator = iter(make(USERS, tokenizer, cfg, seed=0))
    for _ in range(3):
        next(iterator)
    state = iterator.get_state()
    expected = [next(iterator) for _ in range(4)]
    resumed = iter(make(USERS, tokenizer, cfg, seed=0))
    resumed.set_state(state)
    assert_equal(expected, [next(resumed) for _ in range(4)])


WORKERS = """
import itertools, sys
import jax, numpy as np
from absl import flags
from configs.base import base
from popi_jax.data import pipeline, tokenizer
from popi_jax.data.records import Pair, User

if __name__ == "__main__":
    flags.FLAGS(["x"])
    pair = tuple(Pair(str(k), [{"role": "user", "content": str(k)}], "yes", "no") for k in range(6))
    users = [User(str(n), f"number {n}", "", (), (), pair) for n in range(11)]
    made, cfg = tokenizer.train(["number yes no"], 300), base()
    cfg.batch.users = 4
    expected = list(itertools.islice(pipeline.user_batches(users, made, cfg, seed=0), 6))
    cfg.data.workers = 2
    iterator = iter(pipeline.user_batches(users, made, cfg, seed=0))
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
    # A process of its own: closures whose shapes are checked, as in these tests, cannot be sent to a worker.
    (tmp_path / "run.py").write_text(WORKERS)
    root = str(pathlib.Path(__file__).parents[2])
    command = [sys.executable, str(tmp_path / "run.py")]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": root}, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip().endswith("equal"), done.stderr


def test_no_users_is_told(tokenizer: tokenizer_lib.Tokenizer, cfg: ConfigDict) -> None:
    with pytest.raises(UserError, match="data.path: no user"):
        pipeline.user_batches([], tokenizer, cfg, seed=0)


def warm(tokenizer: tokenizer_lib.Tokenizer, cfg: ConfigDict, users: list[User], **how: Any) -> Iterator[Any]:
    return iter(take(pipeline.warmup_batches(users, tokenizer, cfg, seed=0, **how), 20))


def test_warmup_of_the_generator(tokenizer: tokenizer_lib.Tokenizer, cfg: ConfigDict) -> None:
    cfg.warmup.no_summary = 0.0
    prefix = templates.generator_prefix(tokenizer, cfg)
    d = next(warm(tokenizer, cfg, USERS)).generator
    assert d.context.ids.shape == (4, len(prefix) + 12) and d.turns.ids.shape == (4, 3, 16) and d.mask.shape == (4, 3)
    for row in range(4):
        _, n, _ = text(tokenizer, d.turns, row, 0).split()[:3]
        user = USERS[int(n)]
        ids = d.context.ids[row][: d.context.lengths[row]].tolist()
        assert ids == prefix + tokenizer.encode(user.oracle)
        assert d.mask[row].sum() == min(3, len(user.pairs))
        for k in np.flatnonzero(d.mask[row]):
            number = text(tokenizer, d.turns, row, k).split()[2]
            answer = d.answers.ids[row, k][: d.answers.lengths[row, k]].tolist()
            assert answer == templates.answer(tokenizer, f"yes {n} {number}")


@pytest.mark.parametrize(("oracle", "stated", "expected"), [("", "warm tone", "warm tone"), ("", "", "")])
def test_warmup_of_the_generator_without_oracle(
    tokenizer: tokenizer_lib.Tokenizer, cfg: ConfigDict, oracle: str, stated: str, expected: str
) -> None:
    cfg.warmup.no_summary = 0.0
    users = [dataclasses.replace(USERS[1], oracle=oracle, stated=stated)]
    assert text(tokenizer, next(warm(tokenizer, cfg, users)).generator.context, 0) == expected


def test_no_summary_is_a_share_of_the_rows(tokenizer: tokenizer_lib.Tokenizer, cfg: ConfigDict) -> None:
    cfg.warmup.no_summary = 0.5
    prefix = len(templates.generator_prefix(tokenizer, cfg))
    without = np.concatenate([b.generator.context.lengths for b in warm(tokenizer, cfg, USERS)]) == prefix
    assert 0.3 < without.mean() < 0.7  # 80 rows


def test_warmup_of_the_inference_model(tokenizer: tokenizer_lib.Tokenizer, cfg: ConfigDict) -> None:
    cfg.warmup.guess = 0.0
    batches = list(warm(tokenizer, cfg, USERS, items=ITEMS))
    d = batches[0].inference
    assert d.context.ids.shape == (2, 90) and d.turns.ids.shape == (2, 3, 16) and d.answers.ids.shape == (2, 3, 12)
    questions = set()
    for d in (b.inference for b in batches):
        assert d.mask.all()
        for row in range(2):
            (n,) = (n for n in range(11) if f"number {n} ." in text(tokenizer, d.context, row))
            turn = d.turns.ids[row, 0][: d.turns.lengths[row, 0]].tolist()
            assert turn == templates.summary_turn(tokenizer)
            assert d.answers.ids[row, 0][: d.answers.lengths[row, 0]].tolist() == templates.answer(
                tokenizer, USERS[n].stated
            )
            numbers = [text(tokenizer, d.turns, row, k).split()[2] for k in (1, 2)]
            assert len(set(numbers)) == 2
            assert [text(tokenizer, d.answers, row, k) for k in (1, 2)] == [ITEMS[int(k)] for k in numbers]
            questions.update(numbers)
    assert questions == {"0", "1", "2"}


def test_guess_noise(tokenizer: tokenizer_lib.Tokenizer, cfg: ConfigDict) -> None:
    cfg.warmup.guess, cfg.data.summary_len = 0.1, 40
    users = [dataclasses.replace(USERS[0], stated="plain words")]

    def summaries(items: tuple[str, ...], some: list[User] = users) -> list[list[str]]:
        targets = (b.inference.answers for b in warm(tokenizer, cfg, some, items=items))
        return [text(tokenizer, t, row, 0).split(" ; ") for t in targets for row in range(2)]

    assert summaries(()) == [["plain words"]] * 40
    noisy = summaries(ITEMS)
    assert all("plain words" in s and s == sorted(set(s), key=ITEMS.index) for s in noisy)
    added = np.mean([len(s) - 1 for s in noisy])
    assert 0.4 < added < 1.2  # expected a little below 0.8; standard error 0.13
    nothing = summaries(ITEMS, [dataclasses.replace(USERS[0], stated="no strong preference")])
    assert ["no strong preference"] in nothing  # the words go when something is named
    assert all(s == ["no strong preference"] or set(s) <= set(ITEMS) for s in nothing)


def test_data_that_states_nothing_is_summarised_by_its_profile(
    tokenizer: tokenizer_lib.Tokenizer, cfg: ConfigDict
) -> None:
    cfg.data.summary_len = 4
    user = dataclasses.replace(USERS[0], stated="", readings=())
    d = next(warm(tokenizer, cfg, [user], items=ITEMS)).inference
    length = d.answers.lengths[0, 0]
    assert d.answers.ids[0, 0][:length].tolist() == [*tokenizer.encode("i am number"), tokenizer.eos_id]
    assert d.mask.tolist() == [[True, False, False]] * 2
    d = next(warm(tokenizer, cfg, [dataclasses.replace(user, profile="")], items=ITEMS)).inference
    assert not d.mask.any()


def test_eval_batches(tokenizer: tokenizer_lib.Tokenizer, cfg: ConfigDict) -> None:
    cfg.data.num_pairs = 5
    batches = list(pipeline.eval_batches(USERS, tokenizer, cfg))
    assert [b.user_mask.tolist() for b in batches] == [[True] * 4, [True] * 4, [True] * 3 + [False]]
    assert [i for b in batches for i in b.user_ids] == [u.user_id for u in USERS] + [""]
    assert np.concatenate([b.batch.index for b in batches]).tolist() == list(range(12))
    masks = np.concatenate([b.batch.pair_mask for b in batches])
    assert masks.sum(1).tolist() == [min(5, len(u.pairs)) for u in USERS] + [0]
    assert (np.concatenate([b.batch.context.lengths for b in batches]) > 0).all()
    for n, user in enumerate(USERS):
        b, row = batches[n // 4], n % 4
        assert text(tokenizer, b.oracle, row) == user.oracle
        turns = [text(tokenizer, b.batch.turns, row, k) for k in np.flatnonzero(b.batch.pair_mask[row])]
        assert turns == [f"pair {n} {k} ?" for k in range(min(5, len(user.pairs)))]
