"""The recipe of POPI's authors (SCHEDULE=official) through the one jitted update, against float64
numpy written from its equations:

    h = [log p(y_w|x,z) - log p(y_l|x,z)] - [log ref(y_w|x) - log ref(y_l|x)], sums with end token
    loss = -log sigmoid(beta h) / beta,  reward of z = -loss on one pair,  advantage = r - mean r"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from configs.base import compose
from popi_jax.arrays import Frozen, StoredSummaries, Tokens, TrainState, UserBatch
from popi_jax.config import Config, from_config_dict
from popi_jax.models.packing import length_mask
from popi_jax.popi.rollout import splice
from popi_jax.sharding import place_batch, replicated
from popi_jax.training import setup
from tests.oracles import losses as oracle
from tests.oracles import plain
from tests.oracles.plain import RULES
from tests.popi.test_update import differs, make_program, values
from tests.training import small

USERS, GROUP, PEOPLE, PAIRS = 8, 3, 12, 5  # PEOPLE: in the training split, with PAIRS pairs each
BETA, KL = 0.01, 2e-3


def make_config() -> Config:
    """The row as it is, of the smallest size."""
    c = compose("scale=laptop,schedule=official")
    c.name = "test"
    c.warmup.steps = 0
    c.inference.group_size = GROUP
    c.data.summary_len = 4
    c.data.num_pairs = PAIRS
    c.batch.users = USERS
    c.schedule.phases = ("inference 1", "stored 2")
    return from_config_dict(c)


CFG = make_config()


def make_users() -> UserBatch:
    """User 1 has no pair that counts."""
    rng = np.random.default_rng(5)
    users = small.user_batch(0, USERS, 1)
    numbers = rng.permutation(PEOPLE)[:USERS] * PAIRS + rng.integers(0, PAIRS, USERS)
    numbers[1] = 0
    return users._replace(pair_number=numbers[:, None].astype(np.int32))


USERS_BATCH = make_users()
NUMBERS = USERS_BATCH.pair_number[:, 0] // PAIRS


def make_table() -> StoredSummaries:
    rng = np.random.default_rng(7)
    tokens = small.random_tokens(rng, (PEOPLE,), 4, ended=True)
    return StoredSummaries(tokens, tokens.lengths < 4)


TABLE = make_table()


class Made(NamedTuple):
    update: setup.UpdateSetup
    program: object
    state: TrainState
    frozen: Frozen
    mesh: Mesh

    def run(self, state: TrainState, table: StoredSummaries) -> tuple[TrainState, dict]:
        """An update on a copy of the state, which is donated."""
        placed = jax.device_put(table, replicated(self.mesh))
        batch = place_batch(USERS_BATCH, self.mesh, RULES)
        given = jax.tree.map(jnp.copy, state), self.frozen._replace(summaries=placed), batch
        after, metrics = self.program(*given)
        return after, values(metrics)


def make(*shape: int) -> Made:
    """With plain gradient steps of size 1, so that a step tells the gradient."""
    mesh = small.make_mesh(*shape)
    with jax.set_mesh(mesh):
        update = small.make_update(CFG, optax.sgd(1.0))
        state, frozen = small.make_state(CFG, small.roles_of(update), mesh)
        return Made(update, make_program(update, state), state, frozen, mesh)


@pytest.fixture(scope="module")
def made() -> Made:
    return make(1, 1, 1)


def at(state: TrainState, step: int) -> TrainState:
    return state._replace(step=jax.device_put(jnp.int32(step), state.step.sharding))


def list_replies(summaries: list[list[int]]) -> list[plain.Scored]:
    """The chosen replies of all users behind their summaries, then the rejected ones."""
    prefix, users = small.GLUE.generator_prefix, USERS_BATCH
    return [
        plain.Scored([*prefix, *summaries[u], *plain.row(users.turns, u, 0)], plain.row(y, u, 0))
        for y in (users.chosen, users.rejected)
        for u in range(USERS)
    ]


def score(params: dict, summaries: list[list[int]]) -> np.ndarray:
    """[2 users] sums over the tokens of whole replies, in float64."""
    found, _ = plain.logps_and_pullback(params, list_replies(summaries))
    return np.array([np.float64(x).sum() for x in found]).reshape(2, USERS)


def find_losses(h: np.ndarray) -> np.ndarray:
    return np.logaddexp(0.0, -BETA * h) / BETA


def gradient(before: dict, after: dict) -> dict:
    return jax.tree.map(lambda a, b: np.asarray(a - b), before, after)


def assert_close(found: dict, expected: dict, scale: float = 1e-4) -> None:
    def check(path: tuple, x: np.ndarray, y: np.ndarray) -> None:
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=scale, err_msg=jax.tree_util.keystr(path))
        assert np.abs(y).max() > 10 * scale, jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(check, found, expected)


def test_the_row_is_the_recipe() -> None:
    g, i = CFG.generator, CFG.inference
    assert (g.objective, g.beta, g.over_beta, g.reference) == ("dpo", BETA, True, "prompt")
    assert (i.temperature, i.kl_coef, i.length_penalty, i.advantage_scale) == (0.6, KL, 0.0, "none")
    assert (CFG.batch.pairs, CFG.optimizer.clip_norm) == (1, 10.0)


def test_the_inference_model_ascends_the_advantages_of_the_equations(made: Made) -> None:
    state, users = made.state, USERS_BATCH
    after, metrics = made.run(state, TABLE)
    assert not differs(after.generator.params, state.generator.params)
    draw = jax.jit(partial(made.update.sampler.sample, group_size=GROUP))
    with jax.set_mesh(made.mesh):
        key = jax.random.fold_in(state.key, 0)
        rollouts = draw(state.inference.params, jax.tree.map(jnp.asarray, users), key)
    lengths, finished = map(np.asarray, (rollouts.summaries.lengths, rollouts.finished))
    assert 0 < finished.sum() < finished.size

    reference = score(made.frozen.generator, [[]] * USERS)
    rewards = np.zeros((USERS, GROUP))
    for g in range(GROUP):
        texts = [
            plain.row(rollouts.summaries, u, g)[: -1 if finished[u, g] else None]
            for u in range(USERS)
        ]
        policy = score(state.generator.params, texts)
        rewards[:, g] = -find_losses((policy[0] - policy[1]) - (reference[0] - reference[1]))
    rewards[~users.pair_mask[:, 0]] = 0.0  # of a user without a pair
    assert metrics["inference/reward"] == pytest.approx(rewards.mean(), rel=1e-5)
    spread = rewards.std(axis=1, ddof=1)
    assert metrics["inference/reward_std"] == pytest.approx(spread.mean(), rel=1e-3)
    assert spread.mean() > 0.05  # of h / 2, not of beta h / 2
    advantages = rewards - rewards.mean(axis=1, keepdims=True)

    sequences = [
        plain.Scored(
            [*plain.row(users.context, u), *small.GLUE.summary_turn],
            plain.row(rollouts.summaries, u, g),
        )
        for u, g in np.ndindex(USERS, GROUP)
    ]
    mask = np.asarray(length_mask(rollouts.summaries))

    def find_logps(params: dict) -> np.ndarray:
        found, _ = plain.logps_and_pullback(params, sequences, temperature=0.6)
        padded = np.zeros(mask.shape)
        for (u, g), x in zip(np.ndindex(USERS, GROUP), found, strict=True):
            padded[u, g, : len(x)] = x
        return padded

    logps, start = map(find_logps, (state.inference.params, made.frozen.inference))
    loss, slopes = oracle.grpo(logps, logps, start, advantages, mask, 0.2, KL)
    assert metrics["inference/loss"] == pytest.approx(loss, rel=1e-3, abs=1e-4)
    weights = [slopes[u, g][: lengths[u, g]] for u, g in np.ndindex(USERS, GROUP)]
    _, expected = plain.logps_and_pullback(
        state.inference.params, sequences, weights, temperature=0.6
    )
    assert_close(gradient(state.inference.params, after.inference.params), expected)


def test_the_generator_descends_the_loss_behind_stored_summaries(made: Made) -> None:
    state = at(made.state, 1)
    after, metrics = made.run(state, TABLE)
    texts = [
        plain.row(TABLE.summaries, n)[: -1 if TABLE.finished[n] else None] for n in NUMBERS.tolist()
    ]
    reference = score(made.frozen.generator, [[]] * USERS)
    policy = score(state.generator.params, texts)
    h = (policy[0] - policy[1]) - (reference[0] - reference[1])
    real = USERS_BATCH.pair_mask[:, 0]
    assert metrics["generator/loss"] == pytest.approx(find_losses(h)[real].mean(), rel=1e-5)
    assert metrics["generator/margin"] == pytest.approx(BETA * h[real].mean(), rel=1e-3)
    assert metrics["generator/accuracy"] == pytest.approx((h > 0)[real].mean())
    slopes = np.where(real, -1 / (1 + np.exp(BETA * h)), 0.0) / real.sum()  # of h
    sequences = list_replies(texts)
    both = np.concatenate([slopes, -slopes])
    weights = [[w] * len(s.answer) for w, s in zip(both, sequences, strict=True)]
    _, expected = plain.logps_and_pullback(state.generator.params, sequences, weights)
    assert_close(gradient(state.generator.params, after.generator.params), expected)
    # the same step on contexts that are given
    tokens = Tokens(
        TABLE.summaries.ids[NUMBERS][:, None], TABLE.summaries.lengths[NUMBERS][:, None]
    )
    with jax.set_mesh(made.mesh):
        contexts = splice(
            small.GLUE.generator_prefix, tokens, jnp.asarray(TABLE.finished[NUMBERS][:, None])
        )
        scoring = jax.jit(made.update.scorer.score_pairs)
        users = jax.tree.map(jnp.asarray, USERS_BATCH)
        empty = jnp.broadcast_to(jnp.asarray(small.GLUE.generator_prefix), (USERS, 1, 3))
        none = Tokens(empty, jnp.full((USERS, 1), 3, jnp.int32))
        logps = scoring(made.frozen.generator, none, users)
        step = jax.jit(small.generator_program(made.update))
        given, _, _ = step(state.generator, made.frozen.generator, logps, contexts, users)
    close = partial(np.testing.assert_allclose, atol=1e-5)
    jax.tree.map(close, given.params, after.generator.params)


def test_the_summaries_of_the_users_are_read_and_no_others(made: Made) -> None:
    """By one program, before and behind the first that are written."""
    state, before = at(made.state, 1), made.program._cache_size()
    _, found = made.run(state, TABLE)
    ids = TABLE.summaries.ids
    others = np.setdiff1d(np.arange(PEOPLE), NUMBERS)
    assert len(others) >= PEOPLE - USERS
    changed = ids.copy()
    changed[others] += 1
    _, same = made.run(state, TABLE._replace(summaries=TABLE.summaries._replace(ids=changed)))
    assert same == found
    changed[NUMBERS[3], 0] = (changed[NUMBERS[3], 0] + 1) % 64
    _, other = made.run(state, TABLE._replace(summaries=TABLE.summaries._replace(ids=changed)))
    assert other["generator/loss"] != found["generator/loss"]
    # a summary that was cut at the limit keeps its last token
    cut = TABLE.finished.copy()
    cut[NUMBERS[3]] = ~cut[NUMBERS[3]]
    _, longer = made.run(state, TABLE._replace(finished=cut))
    assert longer["generator/loss"] != found["generator/loss"]
    made.run(made.state, jax.tree.map(np.zeros_like, TABLE))
    assert made.program._cache_size() == max(before, 1) == 1


def test_the_mesh_does_not_matter(made: Made) -> None:
    state, found = made.run(at(made.state, 1), TABLE)
    many = make(2, 2, 2)
    other, metrics = many.run(at(many.state, 1), TABLE)
    assert metrics == pytest.approx(found, rel=1e-4, abs=1e-5)
    close = partial(np.testing.assert_allclose, atol=1e-4)
    jax.tree.map(close, *(jax.tree.map(np.asarray, x.generator.params) for x in (state, other)))
