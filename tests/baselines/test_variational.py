import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popi_jax.baselines import variational
from popi_jax.baselines.variational import MINIBATCHES, Posterior, Settings
from tests.baselines.worlds import DIM, make_linear_world, measure_accuracy, on_one_device  # noqa: F401

SETTINGS = Settings(latent=4, hidden=32, epochs=20, check_every=20, learning_rate=1e-2)
KINDS = 3.0 * np.stack([np.eye(DIM)[0], -np.eye(DIM)[0]]).astype(np.float32)


@pytest.fixture(scope="module")
def params() -> dict:
    return variational.init(jax.random.key(0), DIM, SETTINGS)


def draw_pairs(seed: int, num: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(2, num, 2, DIM)).astype(np.float32)


def test_kl_to_the_prior_is_that_of_its_definition():
    """Against an integral over a fine grid, one number of z at a time."""
    mean, log_var = np.array([[0.5, -1.0]]), np.array([[0.3, -0.7]])
    z = np.linspace(-12, 12, 200_001)

    def log_density(mean: float, var: float) -> np.ndarray:
        return -0.5 * (np.log(2 * np.pi * var) + (z - mean) ** 2 / var)

    expected = 0.0
    for m, v in zip(mean[0], np.exp(log_var[0]), strict=True):
        q = log_density(m, v)
        expected += np.sum(np.exp(q) * (q - log_density(0.0, 1.0))) * (z[1] - z[0])
    found = variational.kl_to_prior(Posterior(jnp.float32(mean), jnp.float32(log_var)))
    np.testing.assert_allclose(found, [expected], rtol=1e-5)


def test_posterior_is_of_a_set_of_pairs(params):
    """Neither their order nor what does not count matters; which reply was chosen does."""
    states = draw_pairs(0, 5)
    mask = np.array([[True] * 3 + [False] * 2] * 2)
    whole = variational.encode(params, jnp.asarray(states), jnp.asarray(mask))
    other = states[:, [2, 0, 1, 4, 3]]
    other[:, 3:] = 1e3
    again = variational.encode(params, jnp.asarray(other), jnp.asarray(mask))
    np.testing.assert_allclose(again.mean, whole.mean, rtol=1e-4, atol=1e-5)
    swapped = variational.encode(params, jnp.asarray(states[:, :, ::-1]), jnp.asarray(mask))
    assert np.abs(swapped.mean - whole.mean).max() > 0.01


def test_without_pairs_the_posterior_is_the_prior(params):
    params = {name: {**part, "bias": part["bias"] + 1.0} for name, part in params.items()}
    found = variational.encode(params, jnp.asarray(draw_pairs(0, 3)), jnp.zeros((2, 3), bool))
    assert not np.any(found.mean) and not np.any(found.log_var)


def test_new_users_are_ranked_by_their_few_pairs():
    """Two kinds of users who want the opposite: knowing nothing one can only guess; without noise,
    the shots tell all."""
    given, _ = make_linear_world(24 * MINIBATCHES, num_shots=4, num_pairs=4, seed=0, kinds=KINDS)
    new, _ = make_linear_world(100, num_shots=4, num_pairs=10, seed=1, kinds=KINDS)
    start = variational.init(jax.random.key(1), DIM, SETTINGS)
    carry = (start, variational._make_optimizer(SETTINGS).init(start))
    weight = jnp.float32(0.001)
    params, _ = variational.train(carry, given, jax.random.key(2), weight, settings=SETTINGS)
    own, generic = variational.score(params, new.pairs, new.shots)
    assert measure_accuracy(own) > 0.93
    assert abs(measure_accuracy(generic) - 0.5) < 0.1


def test_loss_judges_no_pair_that_the_encoder_read(params):
    """With as many shots as pairs in all, nothing is judged and the KL alone is left."""
    features, _ = make_linear_world(3, num_shots=4, num_pairs=2, seed=0, kinds=KINDS)
    none = features._replace(pairs=features.pairs._replace(mask=np.zeros((3, 2), bool)))
    key = jax.random.key(0)
    found = variational.loss(params, none, key, jnp.float32(1.0))
    shots = jax.tree.map(jnp.asarray, features.shots)
    expected = jnp.mean(variational.kl_to_prior(variational.encode(params, *shots)))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert variational.loss(params, features, key, jnp.float32(0.0)) > 0.1
