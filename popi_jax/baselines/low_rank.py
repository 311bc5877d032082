"""LoRe: a reward model of low rank (arXiv 2504.14439).

The reward of user u is r_u(x, y) = w_u . B phi(x, y): K basic rewards B, the same for all, of fixed
features phi, and weights w_u = softmax(l_u) of the user. B and the l_u of the training users are
fitted together to their pairs by Bradley-Terry; of a new user l_u alone, to the few pairs that are
known.

Departures from the paper and its code (facebookresearch/LoRe): phi are hidden states of the run's
generator, standardised, not those of a trained reward model, so there is no reward head that B is
drawn to (their `alpha`); l_u of a new user starts at equal weights; rank and steps are chosen on
the validation users."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from popi_jax.arrays import PairLogps, Params
from popi_jax.baselines.features import (
    Features,
    PairStates,
    compute_features,
    measure_scale,
    place_features,
)
from popi_jax.baselines.pairs import FITTED, GENERIC, Fit, check_users, make_items, measure_nats
from popi_jax.data.records import User
from popi_jax.distributed import is_main_process
from popi_jax.progress import Progress
from popi_jax.run import Run


class Settings(NamedTuple):
    ranks: tuple[int, ...] = (1, 4, 8, 16, 32)  # K; the best on the validation users is taken
    steps: int = 400  # of Adam, each on all training users
    learning_rate: float = 0.05
    # of Adam on a new user's weights; the best on the validation users is taken
    fit_steps: tuple[int, ...] = (5, 10, 20, 40, 80, 160)
    fit_learning_rate: float = 0.1


class Model(NamedTuple):
    basis: Float[Array, "embed rank"]
    logits: Float[Array, "users rank"]  # of the weights of the training users


def score(
    basis: Float[Array, "embed rank"], logits: Float[Array, "users rank"], pairs: PairStates
) -> Float[Array, "users pairs 2"]:
    """Rewards of both replies of each pair."""
    return jnp.einsum("upce,ek,uk->upc", pairs.states, basis, jax.nn.softmax(logits, axis=-1))


def _losses(
    basis: Array, logits: Array, differences: Float[Array, "users pairs embed"]
) -> Float[Array, "users pairs"]:
    """-log sigmoid of the margins (nats)."""
    basic = differences @ basis
    return -jax.nn.log_sigmoid(jnp.einsum("upk,uk->up", basic, jax.nn.softmax(logits, axis=-1)))


@partial(jax.jit, static_argnames=("rank", "settings", "seed"), out_shardings=P())
def train(features: Features, *, rank: int, settings: Settings, seed: int) -> Model:
    """Fits the basis, and weights of the training users, to their pairs and shots."""
    joined = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *features[1:])
    differences = joined.states[:, :, 0] - joined.states[:, :, 1]
    num_users, _, embed = differences.shape
    key = jax.random.fold_in(jax.random.key(seed), rank)
    start = Model(
        jax.random.normal(key, (embed, rank)) / jnp.sqrt(jnp.float32(embed)),
        jnp.zeros((num_users, rank)),
    )
    count = jnp.maximum(jnp.sum(joined.mask), 1)

    def loss(model: Model) -> Array:
        return jnp.sum(jnp.where(joined.mask, _losses(*model, differences), 0.0)) / count

    rates = optax.cosine_decay_schedule(settings.learning_rate, settings.steps)
    return _descend(loss, start, optax.adam(rates), (settings.steps,))[-1]


@partial(jax.jit, static_argnames=("settings",), out_shardings=P())
def fit_users(
    basis: Float[Array, "embed rank"], shots: PairStates, *, settings: Settings
) -> tuple[Float[Array, "users rank"], ...]:
    """The logits of new users after each of `settings.fit_steps`, fitted to their shots; of a user
    without shots all weights stay equal."""
    differences = shots.states[:, :, 0] - shots.states[:, :, 1]
    count = jnp.maximum(jnp.sum(shots.mask, axis=1, keepdims=True), 1)

    def loss(logits: Array) -> Array:  # a sum over users, of whom each has their own parameters
        return jnp.sum(jnp.where(shots.mask, _losses(basis, logits, differences), 0.0) / count)

    start = jnp.zeros((differences.shape[0], basis.shape[1]))
    tx = optax.adam(settings.fit_learning_rate)
    return tuple(_descend(loss, start, tx, settings.fit_steps))


def _descend(loss: Any, start: Any, tx: optax.GradientTransformation, stops: Any) -> list[Any]:
    """The parameters after each of the numbers of steps `stops`, which ascend."""

    def step(carry: Any, _: None) -> tuple[Any, None]:
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    carry, found = (start, tx.init(start)), []
    for steps in np.diff([0, *stops]):
        carry, _ = jax.lax.scan(step, carry, None, length=int(steps))
        found.append(carry[0])
    return found


def fit_and_score(
    run: Run,
    frozen_generator_params: Params,
    train_users: Sequence[User],
    validation_users: Sequence[User],
    test_users: Sequence[User],
    seed: int,
    settings: Settings = Settings(),  # noqa: B008
) -> Fit:
    """Trains on the training users, chooses rank and steps on the validation users, and scores the
    test users: generic, with equal weights, and with weights fitted to their shots."""
    check_users(train_users, validation_users, test_users)
    users = {"train": train_users, "validation": validation_users, "test": test_users}
    found = {
        name: compute_features(run, frozen_generator_params, some, name)
        for name, some in users.items()
    }
    return fit_features(run, found, test_users, seed, settings)


def fit_features(
    run: Run,
    found: dict[str, Features],
    test_users: Sequence[User],
    seed: int,
    settings: Settings = Settings(),  # noqa: B008
) -> Fit:
    """The same from the features of each split."""
    scale = measure_scale(found["train"])
    placed = {name: place_features(part, scale, run) for name, part in found.items()}
    best: tuple[float, int, int, Model] | None = None
    shown, tried = is_main_process(), {}
    with Progress(len(settings.ranks), label="low rank", enabled=shown) as progress:
        for number, rank in enumerate(settings.ranks):
            model = train(placed["train"], rank=rank, settings=settings, seed=seed)
            fitted = fit_users(model.basis, placed["validation"].shots, settings=settings)
            for steps, logits in zip(settings.fit_steps, fitted, strict=True):
                nats = _measure(model.basis, logits, placed["validation"].pairs)
                tried[f"rank {rank}, {steps} steps"] = nats
                if best is None or nats < best[0]:
                    best = (nats, rank, steps, model)
            progress.update(number + 1, {"nats": best[0] if best else 0.0})
    assert best is not None
    _, rank, steps, model = best
    test = placed["test"]
    fitted = fit_users(model.basis, test.shots, settings=settings)
    by = {GENERIC: jnp.zeros_like(fitted[0]), FITTED: fitted[settings.fit_steps.index(steps)]}
    items = {}
    for condition, logits in by.items():
        rewards = np.asarray(jax.jit(score, out_shardings=P())(model.basis, logits, test.pairs))
        scores = PairLogps(rewards[..., 0], rewards[..., 1])
        items[condition] = make_items(run, test_users, scores, rewards[..., 0] - rewards[..., 1])
    chosen = {"rank": rank, "chosen_fit_steps": steps, "validation_nats": tried, "seed": seed}
    return Fit(items, settings._asdict() | chosen)


def _measure(basis: Array, logits: Array, pairs: PairStates) -> float:
    rewards = jax.jit(score, out_shardings=P())(basis, logits, pairs)
    mask = np.asarray(jax.jit(lambda x: x, out_shardings=P())(pairs.mask))
    return measure_nats(rewards[..., 0] - rewards[..., 1], mask)
