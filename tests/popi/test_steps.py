"""Gradients of both roles against those of plain sequences with hand-written derivatives; the
warm-up."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from popi_jax.arrays import PairLogps, RoleState, Rollouts, Tokens, UserBatch
from popi_jax.popi.plan import RolePlan
from popi_jax.popi.rollout import splice
from popi_jax.popi.warmup_step import warmup_step
from popi_jax.training import optim, setup
from tests.oracles import losses as oracle
from tests.oracles import plain
from tests.oracles.plain import MODEL
from tests.training import small

CFG = small.make_config()
SGD = optax.sgd(1.0)
BETA = CFG.generator.beta


def on_device(batch: UserBatch) -> UserBatch:
    return jax.tree.map(jnp.asarray, batch)


def gradient(before: RoleState, after: RoleState) -> dict:
    return jax.tree.map(lambda a, b: a - b, before.params, after.params)


def role(params: dict) -> RoleState:
    return RoleState(jnp.int32(0), params, SGD.init(params))


def assert_close(found: dict, expected: dict) -> None:
    def check(path: tuple, x: jax.Array, y: jax.Array) -> None:
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4, err_msg=jax.tree_util.keystr(path))
        assert np.abs(y).max() > 1e-3, jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(check, found, expected)


def random_rollouts(seed: int, group: int) -> Rollouts:
    rng = np.random.default_rng(seed)
    summaries = small.random_tokens(rng, (8, group), 4, ended=True)
    finished = rng.random((8, group)) < 0.7
    return jax.tree.map(
        jnp.asarray, Rollouts(summaries, finished, np.zeros((8, group, 4), np.float32))
    )


def reference_pairs(seed: int) -> PairLogps:
    rng = np.random.default_rng(seed)
    return PairLogps(*(jnp.asarray(rng.uniform(-20, -5, (8, 1, 2)), jnp.float32) for _ in range(2)))


def test_generator_step_is_dpo_behind_the_summary() -> None:
    params, users, reference = (
        plain.random_params(0),
        on_device(small.user_batch(0)),
        reference_pairs(1),
    )
    rollouts = random_rollouts(2, 1)
    contexts = splice(small.GLUE.generator_prefix, rollouts.summaries, rollouts.finished)
    step = jax.jit(small.generator_program(small.make_update(CFG, SGD)))
    after, metrics, margins = step(role(params), params, reference, contexts, users)

    places = [(u, k) for u, k in np.ndindex(8, 2) if users.pair_mask[u, k]]
    sequences = []
    for u, k in places:
        summary = plain.row(rollouts.summaries, u, 0)[: -1 if rollouts.finished[u, 0] else None]
        prefix = [*small.GLUE.generator_prefix, *summary, *plain.row(users.turns, u, k)]
        sequences += [
            plain.Scored(prefix, plain.row(replies, u, k))
            for replies in (users.chosen, users.rejected)
        ]
    logps, _ = plain.logps_and_pullback(params, sequences)
    sums = np.array([x.sum() for x in logps]).reshape(-1, 2)
    at = tuple(np.array([(u, 0, k) for u, k in places]).T)
    losses, slopes = oracle.dpo(
        sums[:, 0], sums[:, 1], reference.chosen[at], reference.rejected[at], BETA
    )
    weights = [
        s * np.ones(len(q.answer))
        for s, q in zip(np.stack([slopes, -slopes], 1).ravel(), sequences, strict=True)
    ]
    _, grads = plain.logps_and_pullback(params, sequences, [w / len(places) for w in weights])
    assert_close(gradient(role(params), after), grads)

    np.testing.assert_allclose(np.logaddexp(0, -np.asarray(margins)[at]), losses, atol=1e-4)
    assert metrics["generator/loss"].weight == len(places) == 15
    np.testing.assert_allclose(metrics["generator/loss"].total, losses.sum(), rtol=1e-4)
    np.testing.assert_allclose(metrics["generator/accuracy"].total, (losses < np.log(2)).sum())
    np.testing.assert_allclose(
        metrics["generator/grad_norm"].total, optax.tree.norm(grads), rtol=1e-3
    )
    assert after.step == 1


@pytest.fixture(scope="module")
def inference_program():
    return jax.jit(small.inference_program(small.make_update(CFG, SGD)))


@pytest.mark.parametrize("same_reference", [True, False])
def test_inference_step_is_reinforce_with_group_advantages(
    same_reference: bool, inference_program
) -> None:
    """And, where the reference differs, the derivative of the KL estimate."""
    c, group = CFG.inference, 3
    params, users, rollouts = (
        plain.random_params(0),
        on_device(small.user_batch(0)),
        random_rollouts(3, group),
    )
    reference = params
    if not same_reference:
        reference = jax.tree.map(lambda x, y: x + 0.1 * y, params, plain.random_params(5))
    margins = np.random.default_rng(4).normal(size=(8, group, 2)).astype(np.float32)
    after, metrics = inference_program(
        role(params), reference, jnp.asarray(margins), None, rollouts, users
    )

    lengths = np.asarray(rollouts.summaries.lengths)
    rewards = oracle.rewards(margins, np.asarray(users.pair_mask), lengths, c.length_penalty)
    advantages = oracle.advantages(rewards, c.advantage_scale)
    places = list(np.ndindex(8, group))
    sequences = [
        plain.Scored(
            [*plain.row(users.context, u), *small.GLUE.summary_turn],
            plain.row(rollouts.summaries, u, g),
        )
        for u, g in places
    ]
    logps, _ = plain.logps_and_pullback(params, sequences, temperature=c.temperature)
    of_reference, _ = plain.logps_and_pullback(reference, sequences, temperature=c.temperature)
    weights = [
        (-advantages[place] + c.kl_coef * (1 - np.exp(ref - own))) / len(places)
        for place, own, ref in zip(places, logps, of_reference, strict=True)
    ]
    _, grads = plain.logps_and_pullback(params, sequences, weights, temperature=c.temperature)
    assert_close(gradient(role(params), after), grads)

    kl = [np.sum(np.exp(r - p) - (r - p) - 1) for r, p in zip(of_reference, logps, strict=True)]
    np.testing.assert_allclose(
        metrics["inference/kl"].total / 24, np.mean(kl), rtol=1e-3, atol=1e-4
    )
    np.testing.assert_allclose(metrics["inference/reward"].total / 24, rewards.mean(), rtol=1e-4)
    entropy = metrics["inference/entropy"]
    np.testing.assert_allclose(
        entropy.total / entropy.weight, -np.concatenate(logps).mean(), rtol=1e-4
    )
    np.testing.assert_allclose(metrics["inference/finished"].total, rollouts.finished.sum())


def test_what_follows_the_end_of_a_summary_is_not_trained(inference_program) -> None:
    params, users, rollouts = (
        plain.random_params(0),
        on_device(small.user_batch(0)),
        random_rollouts(3, 3),
    )
    margins = jnp.asarray(np.random.default_rng(4).normal(size=(8, 3, 2)), jnp.float32)
    after, _ = inference_program(role(params), params, margins, None, rollouts, users)
    ids, lengths = np.array(rollouts.summaries.ids), np.asarray(rollouts.summaries.lengths)
    beyond = np.arange(4) >= lengths[..., None]
    assert beyond.any()
    changed = rollouts._replace(
        summaries=Tokens(jnp.asarray(np.where(beyond, 60, ids)), rollouts.summaries.lengths)
    )
    again, _ = inference_program(role(params), params, margins, None, changed, users)
    for x, y in zip(
        jax.tree.leaves(gradient(role(params), after)),
        jax.tree.leaves(gradient(role(params), again)),
        strict=True,
    ):
        np.testing.assert_allclose(x, y, atol=1e-6)


def test_warmup_lowers_the_loss_of_a_batch() -> None:
    role = RolePlan(optim.optimizer(CFG.optimizer, 3e-3, 0, 20))
    mesh = small.make_mesh(1, 1, 1)
    with jax.set_mesh(mesh):
        state, _ = small.make_state(CFG, setup.Roles(role, role), mesh)
        layouts = jax.tree.map(lambda x: x.sharding, state)
        update = partial(warmup_step, model=MODEL, role=role)
        step = jax.jit(update, donate_argnums=0, out_shardings=(layouts, None))
        batch = jax.tree.map(jnp.asarray, small.warmup_batch(0))
        seen = []
        for _ in range(20):
            state, metrics = step(state, batch)
            seen.append({name: float(m.total / m.weight) for name, m in metrics.items()})
    assert step._cache_size() == 1
    for name in ("warmup/summary_nll", "warmup/reading_nll", "warmup/generator_nll"):
        assert 3.0 < seen[0][name] < 8.0  # about log 64
        assert seen[-1][name] < seen[0][name] - 0.5
    assert (int(state.step), int(state.inference.step), int(state.generator.step)) == (20, 20, 20)
