"""Prompt-aware summaries: users as examples of one pair, whose prompt stands behind the signals."""

import dataclasses
from pathlib import Path

import pytest

from popi_jax.data import encode, examples, prompts
from popi_jax.data.persons import find_others, have_others
from popi_jax.data.prepared import Dataset
from popi_jax.data.sources import made_people
from popi_jax.errors import UserError
from tests.data.people import USERS, decode_at, make_config, make_tokenizer, take, user_batches

WORDS = make_tokenizer()
CFG = make_config(data__prompt_aware=True, batch__pairs=1)


def test_an_example_for_each_pair() -> None:
    found = examples.list_examples(USERS, 3)
    expected = [(n, k) for n, user in enumerate(USERS) for k in range(min(len(user.pairs), 3))]
    assert [user.user_id for user in found] == [f"u{n}#pair{k + 1}" for n, k in expected]
    assert [user.pairs for user in found] == [(USERS[n].pairs[k],) for n, k in expected]
    assert found[1:3] == [found[1], found[2]] and len(found) == len(expected)
    # a person is no other person, whatever the pair
    assert all(have_others(found))
    assert all(
        found[a].user_id.split("#")[0] != found[b].user_id.split("#")[0]
        for a, b in enumerate(find_others(found))
    )


def test_a_run_reads_its_users_as_examples() -> None:
    folder = Path("nowhere")
    dataset = Dataset(made_people.SOURCE, folder, folder, {"train": USERS, "test": ()}, {})
    assert examples.split_pairs(dataset, make_config()) == (dataset, make_config())
    found, cfg = examples.split_pairs(dataset, CFG)
    assert cfg.data.num_pairs == 1 and len(found.splits["test"]) == 0
    for batch in take(user_batches(found.splits["train"], WORDS, cfg, seed=0), 3):
        assert batch.pair_mask.all() and batch.turns.ids.shape[1] == 1
        for row in range(4):
            # the context ends with the prompt that the turn asks
            told = decode_at(WORDS, batch.context, row)
            asked = " ".join(decode_at(WORDS, batch.turns, row, 0).split()[:3])
            assert told.split("asks now:")[1].strip().startswith(asked)
            assert int(batch.pair_number[row, 0]) < len(found.splits["train"])


def test_the_prompt_stays_where_signals_are_cut() -> None:
    user = examples.ask(USERS[0], "why do bees sing ?")
    tight = make_config(data__prompt_aware=True, batch__pairs=1, data__context_len=50)
    signals = encode.fit_signals(user, WORDS, tight)
    assert signals.shortened and len(signals.context) <= 50
    assert "asks now: why do bees sing ?" in WORDS.decode(signals.context)
    assert "asks now" not in signals.text  # what raw signals are
    header = prompts.render_inference_context(WORDS, "")
    assert signals.context[: len(header)] == header
    many = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert prompts.render_asked(many) == "\nasks now:\nuser: a\nassistant: b"
    long = examples.ask(USERS[0], "why " * 60)
    assert len(encode.fit_signals(long, WORDS, tight).context) <= 50


def test_other_runs_read_the_signals_alone() -> None:
    user = USERS[1]
    plain = encode.encode_user(user, WORDS, make_config())
    asked = encode.encode_user(dataclasses.replace(user, pairs=user.pairs[:1]), WORDS, CFG)
    assert asked.context[: len(plain.context) - 1] == plain.context[:-1]
    assert len(asked.context) > len(plain.context)


def test_one_pair_for_each_summary() -> None:
    with pytest.raises(
        UserError, match=r"config.batch.pairs = 3: must be 1 with data.prompt_aware"
    ):
        make_config(data__prompt_aware=True)
