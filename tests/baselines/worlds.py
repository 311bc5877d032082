"""Made features of replies, in which rewards are linear: the optimum is known."""

from collections.abc import Iterator

import jax
import numpy as np
import pytest

from popi_jax.baselines.features import Features, PairStates
from popi_jax.sharding import make_mesh

DIM = 8


@pytest.fixture(scope="module", autouse=True)
def on_one_device() -> Iterator[None]:
    """A mesh is set, as in every run."""
    with jax.set_mesh(make_mesh(1, 1, 1, devices=jax.devices()[:1])):
        yield


def make_linear_world(
    num_users: int, *, num_shots: int, num_pairs: int, seed: int, kinds: np.ndarray
) -> tuple[Features, np.ndarray]:
    """Features of users, each of one kind, whose reward is kinds[kind] . phi, without noise; and
    the kind of each."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(len(kinds), size=num_users)

    def draw(count: int) -> PairStates:
        states = rng.normal(size=(num_users, count, 2, DIM)).astype(np.float32)
        rewards = np.einsum("upce,ue->upc", states, kinds[kind])
        better = np.argmax(rewards, axis=-1)
        order = np.stack([better, 1 - better], axis=-1)
        states = np.take_along_axis(states, order[..., None], axis=2)
        return PairStates(states, np.ones((num_users, count), bool))

    index = np.arange(num_users, dtype=np.int32)
    return Features(index, draw(num_pairs), draw(num_shots)), kind


def measure_accuracy(rewards: np.ndarray) -> float:
    """Of rewards [users pairs 2], chosen first."""
    rewards = np.asarray(rewards)
    return float(np.mean(rewards[..., 0] > rewards[..., 1]))
