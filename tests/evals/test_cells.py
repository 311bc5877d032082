import dataclasses
import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from popi_jax.popi.roles import pair_logps

from popi_jax.arrays import Tokens
from popi_jax.data import batches, prompts
from popi_jax.evals import cells
from popi_jax.evals.cells import Evaluation, Models
from tests.tiny_run import Run, shared_run


def evaluate(run: Run, trained: Models, users: list, calls: list) -> Evaluation:
    built = run.built
    with jax.set_mesh(built.mesh):
        return cells.evaluate(
            trained,
            Models(run.frozen.inference, run.frozen.generator),
            users,
            tokenizer=built.tokenizer,
            glue=built.glue,
            model=built.model,
            sampling=built.sampling,
            config=built.config,
            mesh=built.mesh,
            advance=lambda: calls.append(1),
        )


@pytest.fixture(scope="module")
def run() -> Run:
    return shared_run(8)


@pytest.fixture(scope="module")
def users(run) -> list:
    found = list(run.built.dataset.splits["test"])
    assert len(found) % run.built.config.evaluation.batch_users  # the last batch is padded
    return found


@pytest.fixture(scope="module")
def evaluated(run, users) -> tuple[Evaluation, int]:
    calls: list = []
    trained = Models(run.now.inference.params, run.now.generator.params)
    return evaluate(run, trained, users, calls), len(calls)


def test_conditions_and_decodings(evaluated, users):
    found = [(row.condition, row.decoding) for row in evaluated[0].rows]
    both = ["summary_before_rl", "summary", "other_user_summary"]
    assert found == [
        ("no_signals", "none"),
        ("raw_signals", "none"),
        *itertools.product(both, ["greedy", "sampled"]),
        ("oracle", "none"),
    ]
    assert {row.n for row in evaluated[0].rows} == {sum(len(user.pairs) for user in users)}


def test_the_bar_ends_full(evaluated, run, users):
    assert evaluated[1] == cells.num_passes(users, run.built.config) * math.ceil(
        len(users) / run.built.config.evaluation.batch_users
    )


def test_margins_are_those_of_each_user_behind_the_user_s_text(evaluated, run, users):
    """Nats of each condition, from contexts made here by hand, all users in one batch, on one
    device."""
    built, evaluation = run.built, evaluated[0]
    cfg, words = built.config, built.tokenizer
    whole = dataclasses.replace(
        cfg, evaluation=dataclasses.replace(cfg.evaluation, batch_users=len(users))
    )
    (batch,) = batches.make_eval_batches(users, words, whole)
    program = jax.jit(partial(pair_logps, model=built.model))
    now, before = jax.device_get((run.now.generator.params, run.frozen.generator))

    def margins(params, texts: list[list[int]]) -> np.ndarray:
        rows = [[*prompts.render_generator_prefix(words, cfg), *text] for text in texts]
        ids = np.zeros((len(rows), 1, cfg.data.context_len + 20), np.int32)
        for row, tokens in zip(ids, rows, strict=True):
            row[0, : len(tokens)] = tokens
        lengths = np.array([[len(tokens)] for tokens in rows], np.int32)
        logps = program(params, jax.tree.map(jnp.asarray, Tokens(ids, lengths)), batch.batch)
        return np.asarray(logps.chosen - logps.rejected, np.float64)[:, 0]

    nothing = [[] for _ in users]
    summaries = [list(ids[:length]) for ids, length in zip(*evaluation.summaries, strict=True)]
    raw = [
        words.encode(prompts.render_signals(user, "grouped"))[: cfg.data.context_len]
        for user in users
    ]
    oracle = [words.encode(user.oracle)[: cfg.data.summary_len] for user in users]
    reference = margins(before, nothing)

    def nats(params, texts: list[list[int]]) -> float:
        values = cfg.generator.beta * (margins(params, texts) - reference)
        return float(np.logaddexp(0, -values)[batch.batch.pair_mask].mean())

    rows = {(row.condition, row.decoding): row for row in evaluation.rows}
    close = partial(pytest.approx, rel=1e-4)
    assert rows["no_signals", "none"].nats == close(nats(now, nothing))
    assert rows["raw_signals", "none"].nats == close(nats(now, raw))
    assert rows["summary", "greedy"].nats == close(nats(now, summaries))
    assert rows["other_user_summary", "greedy"].nats == close(
        nats(now, [*summaries[1:], summaries[0]])
    )
    assert rows["oracle", "none"].nats == close(nats(now, oracle))
    assert evaluation.before_rl["oracle"].nats == close(nats(before, oracle))
    assert len({round(row.nats, 3) for row in evaluation.rows}) == len(
        rows
    )  # or the comparison would say little
    assert rows["no_signals", "none"].context_tokens == 0
    assert rows["raw_signals", "none"].context_tokens == pytest.approx(
        np.mean([len(text) for text in raw])
    )
    assert rows["summary", "greedy"].context_tokens == pytest.approx(
        np.mean([len(text) for text in summaries])
    )
    assert rows["oracle", "none"].context_tokens == pytest.approx(
        np.mean([len(text) for text in oracle])
    )


def test_a_generator_that_did_not_change_cannot_tell_without_a_summary(run, users):
    """Exactly: the reference is scored by the same program. And what was trained is read in the
    right place."""
    evaluation = evaluate(run, Models(run.frozen.inference, run.frozen.generator), users[:8], [])
    rows = {(row.condition, row.decoding): row for row in evaluation.rows}
    assert rows["no_signals", "none"][2:4] == (0.5, 0.0)
    assert rows["no_signals", "none"].nats == pytest.approx(math.log(2), rel=1e-12)
    for decoding in ("greedy", "sampled"):
        assert rows["summary", decoding][2:] == rows["summary_before_rl", decoding][2:]
    assert rows["summary", "sampled"].nats != rows["summary", "greedy"].nats
    assert evaluation.before_rl["oracle"] == rows["oracle", "none"]
    assert rows["oracle", "none"].nats != rows["no_signals", "none"].nats


def test_what_cannot_be_asked_is_left_out(run, users):
    """A single user has no other one; a user without a persona has no oracle."""
    calls: list = []
    alone = [dataclasses.replace(users[0], oracle="")]
    evaluation = evaluate(run, Models(run.frozen.inference, run.frozen.generator), alone, calls)
    assert {row.condition for row in evaluation.rows} == {
        "no_signals",
        "raw_signals",
        "summary_before_rl",
        "summary",
    }
    assert evaluation.before_rl == {}
    assert all(math.isnan(row.stderr) for row in evaluation.rows)
    assert len(calls) == cells.num_passes(alone, run.built.config) - 2  # nobody else's summary


def test_oracle_counts_only_users_who_have_one(run, users):
    some = [
        dataclasses.replace(user, oracle="" if i % 2 else user.oracle)
        for i, user in enumerate(users[:8])
    ]
    evaluation = evaluate(run, Models(run.frozen.inference, run.frozen.generator), some, [])
    (oracle,) = [row for row in evaluation.rows if row.condition == "oracle"]
    assert oracle.n == sum(len(user.pairs) for user in some[::2])
    limit = run.built.config.data.summary_len
    lengths = [len(run.built.tokenizer.encode(user.oracle)) for user in some[::2]]
    assert oracle.context_tokens == pytest.approx(np.mean([min(n, limit) for n in lengths]))


@pytest.mark.parametrize(
    ("ids", "other", "differs"),
    [
        (["a", "b", "c"], [1, 2, 0], [True, True, True]),
        (["a"], [0], [False]),
        (["a", "a#2", "b", "b#2"], [2, 3, 0, 1], [True] * 4),
        (["a", "a#2", "a#3", "b"], [1, 2, 3, 0], [False, False, True, True]),
    ],
)
def test_another_person_is_never_oneself(ids, other, differs):
    found, mask = cells.other_persons(ids)
    assert found.tolist() == other
    assert mask.tolist() == differs


def test_two_personas_in_a_sorted_file():
    ids = [f"friendly#{i}" for i in range(30)] + [f"unfriendly#{i}" for i in range(30)]
    other, differs = cells.other_persons(ids)
    assert sorted(other.tolist()) == list(range(60))
    assert differs.all()
