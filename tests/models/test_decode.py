"""Sampling with the shared cache: the same tokens and log-probs as plain forward passes, in any
layout of the batch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popi_jax.arrays import Rollouts, Tokens
from popi_jax.models import decode
from popi_jax.models.decode import Sampling, sample_keys
from popi_jax.models.packing import Budget, Tree
from popi_jax.popi.scorer import score_answers
from tests.oracles import losses as oracle
from tests.oracles import plain
from tests.oracles.plain import MODEL

USERS, CONTEXT_LEN, TURN_LEN, MAX_LEN = 4, 8, 5, 6
END = 5
RNG = np.random.default_rng(0)
INDEX = jnp.array([7, 0, 3, 12])


def random_tokens(length: int) -> Tokens:
    lengths = RNG.integers(1, length + 1, USERS)
    return Tokens(jnp.asarray(RNG.integers(0, 64, (USERS, length))), jnp.asarray(lengths))


CONTEXT, TURN = random_tokens(CONTEXT_LEN), random_tokens(TURN_LEN)


@pytest.fixture(scope="module")
def params() -> dict:
    """The end token is made likely, so that samples of many lengths occur."""
    params = plain.random_params(0)
    kernel = params["lm_head"]["kernel"]
    params["lm_head"]["kernel"] = kernel.at[:, END].multiply(2.5)
    return params


def draw(
    params: dict,
    temperature: float,
    order: list[int] | None = None,
    *,
    group: int = 3,
    key: int = 0,
) -> Rollouts:
    order = order or list(range(USERS))
    context, turn, index = jax.tree.map(lambda x: x[jnp.array(order)], (CONTEXT, TURN, INDEX))
    keys = sample_keys(jax.random.key(key), index, group)
    return program(temperature)(params, context, turn, keys)


PROGRAMS: dict = {}


def program(temperature: float):
    if temperature not in PROGRAMS:
        sampling = Sampling(temperature, MAX_LEN, END)
        PROGRAMS[temperature] = jax.jit(partial(decode.sample, model=MODEL, sampling=sampling))
    return PROGRAMS[temperature]


def test_prefixes_without_padding_give_the_same_samples(params: dict) -> None:
    tokens = int(CONTEXT.lengths.sum() + TURN.lengths.sum())
    assert tokens < 0.95 * USERS * (CONTEXT_LEN + TURN_LEN)
    settings = {
        "model": MODEL,
        "sampling": Sampling(1.0, MAX_LEN, END),
        "budget": Budget(tokens, 0),
    }
    keys = sample_keys(jax.random.key(0), INDEX, 3)
    program = jax.jit(partial(decode.sample, **settings))
    assert "cond[" in str(
        jax.make_jaxpr(partial(decode.sample, **settings))(params, CONTEXT, TURN, keys)
    )
    found, expected = program(params, CONTEXT, TURN, keys), draw(params, 1.0)
    np.testing.assert_array_equal(found.summaries.ids, expected.summaries.ids)
    np.testing.assert_array_equal(found.summaries.lengths, expected.summaries.lengths)
    np.testing.assert_allclose(found.logps, expected.logps, atol=1e-5)


def prefixes() -> list[list[int]]:
    return [plain.row(CONTEXT, u) + plain.row(TURN, u) for u in range(USERS)]


def assert_same(a: Rollouts, b: Rollouts) -> None:
    np.testing.assert_array_equal(a.summaries.ids, b.summaries.ids)
    np.testing.assert_array_equal(a.summaries.lengths, b.summaries.lengths)
    np.testing.assert_array_equal(a.finished, b.finished)
    np.testing.assert_allclose(a.logps, b.logps, atol=1e-5)


def test_greedy_equals_repeated_full_forward(params: dict) -> None:
    drawn = draw(params, 0.0)
    lengths = set()
    for u, prefix in enumerate(prefixes()):
        ids: list[int] = []
        logps = []
        while len(ids) < MAX_LEN and END not in ids:
            step = oracle.log_softmax(plain.logits(params, MODEL, prefix + ids)[-1])
            ids.append(int(step.argmax()))
            logps.append(step.max())
        lengths.add(len(ids))
        for g in range(3):
            assert plain.row(drawn.summaries, u, g) == ids
            assert bool(drawn.finished[u, g]) == (ids[-1] == END)
            np.testing.assert_allclose(np.asarray(drawn.logps)[u, g, : len(ids)], logps, atol=1e-4)
    assert len(lengths) > 1  # or this test would say nothing about ends


def test_reported_logps_equal_those_of_scoring(params: dict) -> None:
    drawn = draw(params, 0.6)
    turns = jax.tree.map(lambda x: x[:, None], TURN)
    answers = jax.tree.map(lambda x: x[:, None], drawn.summaries)
    score = jax.jit(partial(score_answers, model=MODEL, temperature=0.6))
    scores = score(params, Tree(CONTEXT, turns, answers))
    mask = np.asarray(scores.mask)[:, 0]
    np.testing.assert_allclose(
        np.asarray(drawn.logps)[mask], np.asarray(scores.logps)[:, 0][mask], atol=1e-4
    )
    np.testing.assert_array_equal(np.asarray(drawn.logps)[~mask], 0.0)


@pytest.mark.parametrize("temperature", [0.6, 1.4])
def test_reported_logps_are_those_at_the_temperature(temperature: float, params: dict) -> None:
    drawn = draw(params, temperature)
    for u, g in np.ndindex(USERS, 3):
        ids, n = plain.row(drawn.summaries, u, g), len(prefixes()[u])
        logps = oracle.log_softmax(
            plain.logits(params, MODEL, prefixes()[u] + ids)[n - 1 : -1] / temperature
        )
        expected = np.take_along_axis(logps, np.array(ids)[:, None], 1)[:, 0]
        np.testing.assert_allclose(np.asarray(drawn.logps)[u, g, : len(ids)], expected, atol=1e-4)


def test_lengths_count_the_end_token_and_finished_tells_of_it(params: dict) -> None:
    drawn = draw(params, 1.4)
    kinds = set()
    for u, g in np.ndindex(USERS, 3):
        ids, finished = plain.row(drawn.summaries, u, g), bool(drawn.finished[u, g])
        assert (END in ids) == finished
        assert ids.index(END) == len(ids) - 1 if finished else len(ids) == MAX_LEN
        assert set(np.asarray(drawn.summaries.ids)[u, g, len(ids) :].tolist()) <= {END}
        kinds.add((finished, len(ids) == MAX_LEN))
    assert {(True, False), (False, True)} <= kinds


def test_a_sample_depends_on_its_key_and_not_on_its_place(params: dict) -> None:
    drawn = draw(params, 1.4)
    order = [2, 0, 3, 1]
    assert_same(draw(params, 1.4, order), jax.tree.map(lambda x: x[jnp.array(order)], drawn))
    # with neighbours that are other users, who end elsewhere
    assert_same(
        jax.tree.map(lambda x: x[:1], draw(params, 1.4, [0, 0, 0, 0])),
        jax.tree.map(lambda x: x[:1], drawn),
    )
    assert np.any(draw(params, 1.4, key=1).summaries.ids != drawn.summaries.ids)
    rows = np.asarray(drawn.summaries.ids)
    assert max(len({tuple(ids) for ids in rows[u]}) for u in range(USERS)) == 3


def test_frequencies_of_the_first_token_are_the_models(params: dict) -> None:
    """600 samples behind one context; a chi-square statistic over the tokens that are expected at
    least 5 times."""
    first = [draw(params, 1.4, [0, 0, 0, 0], key=key).summaries.ids[:1, :, 0] for key in range(200)]
    seen = np.bincount(np.concatenate(first, axis=None), minlength=64)
    p = np.exp(oracle.log_softmax(plain.logits(params, MODEL, prefixes()[0])[-1] / 1.4))
    often = p * seen.sum() >= 5
    expected = np.append(p[often], p[~often].sum()) * seen.sum()
    found = np.append(seen[often], seen[~often].sum())
    degrees = len(expected) - 1
    assert degrees > 3
    assert ((found - expected) ** 2 / expected).sum() < degrees + 5 * np.sqrt(2 * degrees)


def test_stops_as_soon_as_all_have_ended(params: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """One user and two samples: a batch and a group of another size, too."""
    steps = 0

    def loop(going, body, state):
        nonlocal steps
        body = jax.jit(body)
        while going(state):
            state, steps = body(state), steps + 1
        return state

    expected = draw(params, 1.4)
    monkeypatch.setattr(jax.lax, "while_loop", loop)
    context, turn, keys = jax.tree.map(
        lambda x: x[:1], (CONTEXT, TURN, sample_keys(jax.random.key(0), INDEX, 3)[:, :2])
    )
    drawn = decode.sample(
        params, context, turn, keys, model=MODEL, sampling=Sampling(1.4, MAX_LEN, END)
    )
    assert_same(drawn, jax.tree.map(lambda x: x[:1, :2], expected))
    assert steps == int(np.max(drawn.summaries.lengths)) < MAX_LEN
