"""Evaluation without padding: the log-probs and the draws of a padded computation, whatever the
batches, the devices and the order."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popi_jax import dealt
from popi_jax.arrays import Tokens, UserBatch
from popi_jax.data import dealing
from popi_jax.generators import Generator, Summarizer
from popi_jax.models import decode
from popi_jax.models.layout import Rules
from popi_jax.popi import evaluation
from popi_jax.popi.rollout import splice
from popi_jax.popi.scorer import Scorer, repeat_ids
from popi_jax.run import RoleParts
from popi_jax.sharding import make_mesh
from tests.oracles import plain
from tests.oracles.plain import MODEL

USERS, PAIRS, END = 13, 3, 5
PREFIX, ASKING = (1, 2, 3), (4, 6)
RNG = np.random.default_rng(0)


def random_texts(*rows: int, most: int, least: int = 1) -> Tokens:
    lengths = RNG.integers(least, most + 1, rows)
    return Tokens(RNG.integers(0, 64, (*rows, most)).astype(np.int32), lengths.astype(np.int32))


def drop(texts: Tokens, gone: np.ndarray) -> Tokens:
    return texts._replace(lengths=np.where(gone, 0, texts.lengths))


GONE = np.arange(PAIRS)[None, :] >= RNG.integers(0, PAIRS + 1, (USERS, 1))  # some have no pair
BATCH = UserBatch(
    index=np.arange(USERS, dtype=np.int32),
    context=random_texts(USERS, most=40),
    turns=drop(random_texts(USERS, PAIRS, most=7), GONE),
    chosen=drop(random_texts(USERS, PAIRS, most=12), GONE),
    rejected=drop(random_texts(USERS, PAIRS, most=12), GONE),
    pair_mask=~GONE,
    pair_number=np.arange(USERS * PAIRS, dtype=np.int32).reshape(USERS, PAIRS),
)
TEXTS = [RNG.integers(0, 64, n).tolist() for n in RNG.integers(0, 9, USERS)]


def make_role(devices: int) -> RoleParts:
    rules = Rules(batch=("fsdp",)) if devices > 1 else MODEL.rules
    model = dataclasses.replace(MODEL, rules=rules, rollout_rules=rules)
    sampling = decode.Sampling(1.0, 6, END)
    return RoleParts(model, None, PREFIX, sampling)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def params() -> dict:
    made = plain.random_params(0)
    kernel = made["lm_head"]["kernel"]
    made["lm_head"]["kernel"] = kernel.at[:, END].multiply(2.5)  # samples end at many lengths
    return made


@pytest.fixture(scope="module")
def padded(params: dict) -> np.ndarray:
    """The log-probs of a computation with all its padding, in one batch: [users pairs 2]."""
    ids = np.zeros((USERS, 1, 16), np.int32)
    for row, text in zip(ids, TEXTS, strict=True):
        row[0, : len(text)] = text
    texts = Tokens(jnp.asarray(ids), jnp.asarray([[len(text)] for text in TEXTS]))
    contexts = splice(PREFIX, texts, jnp.zeros((USERS, 1), bool))
    found = jax.jit(Scorer(MODEL).score_pairs)(params, contexts, BATCH)
    return np.stack((found.chosen[:, 0], found.rejected[:, 0]), axis=-1)


def score(params: dict, devices: int, rows: int) -> np.ndarray:
    role, mesh = make_role(devices), make_mesh(1, devices, 1, 1, jax.devices()[:devices])
    with jax.set_mesh(mesh):
        pairs = dealt.deal_pairs(BATCH, role.model, mesh, rows)
        parts: list[float] = []
        found = Generator(role, params, mesh).score(TEXTS, pairs, 8, parts.append)
    assert parts == sorted(parts) and parts[-1] == 1.0
    return np.stack((found.chosen, found.rejected), axis=-1)


@pytest.mark.parametrize(("devices", "rows"), [(1, 4), (1, 5), (1, 32), (8, 8), (8, 16)])
def test_logps_are_those_of_a_padded_computation(params, padded, devices: int, rows: int) -> None:
    np.testing.assert_allclose(score(params, devices, rows), padded, rtol=1e-6, atol=1e-5)
    assert np.count_nonzero(padded) == 2 * (~GONE).sum()


def test_nothing_is_padded_outside_of_attention(params, monkeypatch) -> None:
    """Most places hold a token: the budgets are those of the batches."""
    budgets = []
    score_answers = evaluation.score_answers

    def see(params, tree, *, model, budget):
        slots = sum(part.ids[0].size for part in tree) * tree.context.ids.shape[0]
        budgets.append((budget.tokens, slots))
        return score_answers(params, tree, model=model, budget=budget)

    monkeypatch.setattr(evaluation, "score_answers", see)
    jax.clear_caches()
    score(params, 1, 6)
    lengths = (BATCH.chosen.lengths, BATCH.rejected.lengths)
    tokens = BATCH.turns.lengths.sum() + sum(np.maximum(x - 1, 0).sum() for x in lengths)
    tokens += sum(map(len, TEXTS)) + len(PREFIX) * USERS
    (budget, slots), *_ = budgets
    assert tokens / 3 <= budget < 0.5 * slots  # three batches


def write(
    params: dict, devices: int, rows: int, heats: list[float], order: np.ndarray | None = None
) -> list[list[list[int]]]:
    role = make_role(devices)._replace(prompt=ASKING)
    mesh = make_mesh(1, devices, 1, 1, jax.devices()[:devices])
    order = np.arange(USERS) if order is None else order
    users = jax.tree.map(lambda x: x[order], BATCH)
    with jax.set_mesh(mesh):
        signals = dealt.deal_signals(users, role.model, role.prompt, mesh, rows)
        return Summarizer(role, params, 3).write(signals, heats, lambda part: None)


@pytest.fixture(scope="module")
def drawn(params: dict) -> list[list[list[int]]]:
    """Greedy, sampled and hotter summaries, each drawn alone with all its padding."""
    key = jax.random.fold_in(jax.random.key(3), evaluation.SUMMARY_KEY)
    keys = decode.sample_keys(key, jnp.asarray(BATCH.index), 1)
    found = []
    for heat in (0.0, 1.0, 1.4):
        sampling = decode.Sampling(heat, 6, END)
        program = jax.jit(lambda *x, s=sampling: decode.sample(*x, model=MODEL, sampling=s))
        made = program(params, BATCH.context, repeat_ids(ASKING, (USERS,)), keys)
        lengths = made.summaries.lengths - made.finished
        ids = np.asarray(made.summaries.ids)
        found.append([ids[u, 0, : lengths[u, 0]].tolist() for u in range(USERS)])
    return found


@pytest.mark.parametrize(("devices", "rows"), [(1, 4), (1, 32), (8, 8)])
def test_summaries_of_several_temperatures_are_those_drawn_alone(
    params, drawn, devices: int, rows: int
) -> None:
    assert write(params, devices, rows, [0.0, 1.0, 1.4]) == drawn
    assert drawn[0] != drawn[1] != drawn[2]


def test_draws_depend_on_the_user_alone(params, drawn) -> None:
    order = RNG.permutation(USERS)
    (found,) = write(params, 1, 4, [1.4], order)
    assert found == [drawn[2][user] for user in order]


def test_a_batch_that_users_do_not_fill() -> None:
    mesh = make_mesh(1, 1, 1, 1, jax.devices()[:1])
    with jax.set_mesh(mesh):
        (group,) = dealt.deal_signals(BATCH, MODEL, ASKING, mesh, 7).groups
    assert group.dealt.shape == (2, 7) and (group.dealt < 0).sum() == 1
    for users, (context, index) in zip(group.dealt, group.placed, strict=True):
        assert set(np.asarray(index).tolist()) == set(users[users >= 0].tolist())
        assert context.lengths.sum() + 7 * len(ASKING) <= group.budget.tokens
    assert dealing.find_heaviest(BATCH.context.lengths, group.dealt, 1) <= group.budget.tokens
