import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popi_jax.baselines import low_rank
from popi_jax.baselines.features import PairStates
from popi_jax.baselines.low_rank import Penalty, Settings
from tests.baselines.worlds import DIM, make_linear_world, measure_accuracy, on_one_device  # noqa: F401

SETTINGS = Settings()
PENALTY = Penalty(jnp.float32(0.1), jnp.float32(1e-4))
# two kinds of users that want the opposite along one axis and agree along another
KINDS = (np.array([[3.0, 1.0], [-3.0, 1.0]]) @ np.eye(2, DIM)).astype(np.float32)


def fit(basis: jax.Array, shots: PairStates, prior: float = 0.1) -> jax.Array:
    return low_rank.fit_users(basis, shots, jnp.float32(prior), settings=SETTINGS)


@pytest.fixture(scope="module")
def fitted():
    given, _ = make_linear_world(200, num_shots=4, num_pairs=4, seed=0, kinds=KINDS)
    new, _ = make_linear_world(100, num_shots=6, num_pairs=20, seed=1, kinds=KINDS)
    model = low_rank.train(given, PENALTY, rank=2, settings=SETTINGS, seed=0)
    return new, model, fit(model.basis, new.shots)


def test_rewards_are_a_mixture_of_basic_rewards():
    rng = np.random.default_rng(0)
    states, basis = rng.normal(size=(3, 4, 2, DIM)), rng.normal(size=(DIM, 2))
    logits = rng.normal(size=(3, 2))
    weights = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = np.stack([states[u] @ basis @ weights[u] for u in range(3)])
    pairs = PairStates(jnp.float32(states), jnp.ones((3, 4), bool))
    found = low_rank.score(jnp.float32(basis), jnp.float32(logits), pairs)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_new_users_are_ranked_by_their_few_pairs(fitted):
    """Without noise all pairs can be ranked; the axis on which users differ decides most pairs, so
    that equal weights rank little more than the axis on which they agree."""
    new, model, logits = fitted
    equal = low_rank.score(model.basis, jnp.zeros_like(logits), new.pairs)
    own = low_rank.score(model.basis, logits, new.pairs)
    assert measure_accuracy(equal) < 0.65
    assert measure_accuracy(own) > 0.9


def test_a_strong_prior_keeps_weights_equal(fitted):
    new, model, logits = fitted
    strict, free = fit(model.basis, new.shots, 1e3), fit(model.basis, new.shots, 0.0)
    assert np.abs(strict).max() < 0.01 < np.abs(logits).max() < np.abs(free).max()
    of_shots = (measure_accuracy(low_rank.score(model.basis, x, new.shots)) for x in (strict, free))
    assert next(of_shots) < next(of_shots)


def test_users_do_not_influence_each_other(fitted):
    """Nor do pairs that do not count; a user without any keeps equal weights."""
    new, model, logits = fitted
    shots = jax.tree.map(lambda x: x[:3].copy(), new.shots)
    shots.mask[1, 2:], shots.mask[2] = False, False
    shots.states[1, 2:] = 1e3
    found = fit(model.basis, shots)
    np.testing.assert_allclose(found[0], logits[0], rtol=1e-4, atol=1e-5)
    two = PairStates(shots.states[1:2, :2], shots.mask[1:2, :2])
    alone = fit(model.basis, two)
    np.testing.assert_allclose(found[1], alone[0], rtol=1e-4, atol=1e-5)
    assert not np.any(found[2])
