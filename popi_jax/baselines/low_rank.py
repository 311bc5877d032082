"""LoRe: a reward model of low rank (arXiv 2504.14439).

The reward of user u is r_u(x, y) = w_u . B phi(x, y): K basic rewards B, the same for all, of fixed
features phi, and weights w_u = softmax(l_u) of the user. B and the l_u of the training users are
fitted together to their pairs by Bradley-Terry; of a new user l_u alone, to the few pairs that are
known.

Departures from the paper and its code (facebookresearch/LoRe): phi are hidden states of the run's
generator, standardised, not those of a trained reward model, so there is no reward head that B is
drawn to (their `alpha`); instead prior * |l_u|^2 and decay * |B|^2 are added, without which few
pairs are fitted too closely; l_u starts at equal weights; rank, prior and decay are chosen on the
validation users."""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from popi_jax.arrays import PairLogps
from popi_jax.baselines.features import Features, PairStates, measure_scale, place_features
from popi_jax.baselines.pairs import FITTED, GENERIC, Fit, make_items, measure_nats
from popi_jax.data.records import User
from popi_jax.distributed import is_main_process
from popi_jax.progress import Progress
from popi_jax.run import Run


class Settings(NamedTuple):
    """Of what has several values, the best on the validation users is taken."""

    ranks: tuple[int, ...] = (1, 8, 32)  # K
    priors: tuple[float, ...] = (0.3, 1.0)  # nats, of a squared logit of a user's weights
    decays: tuple[float, ...] = (1e-4, 1e-3)  # nats per pair, of a squared number of the basis
    steps: int = 200  # of Adam, each on all training users
    learning_rate: float = 0.05  # at the start; it falls to 0 by a cosine
    fit_steps: int = 100  # of Adam, on a new user's weights
    fit_learning_rate: float = 0.1


class Penalty(NamedTuple):
    prior: Float[Array, ""]
    decay: Float[Array, ""]


class Model(NamedTuple):
    basis: Float[Array, "embed rank"]
    logits: Float[Array, "users rank"]  # of the weights of the training users


@partial(jax.jit, out_shardings=P())
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
def train(
    features: Features, penalty: Penalty, *, rank: int, settings: Settings, seed: int
) -> Model:
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
        total = jnp.sum(jnp.where(joined.mask, _losses(*model, differences), 0.0))
        total += penalty.prior * jnp.sum(model.logits**2)
        return total / count + penalty.decay * jnp.sum(model.basis**2)

    rates = optax.cosine_decay_schedule(settings.learning_rate, settings.steps)
    return _descend(loss, start, optax.adam(rates), settings.steps)


@partial(jax.jit, static_argnames=("settings",), out_shardings=P())
def fit_users(
    basis: Float[Array, "embed rank"],
    shots: PairStates,
    prior: Float[Array, ""],
    *,
    settings: Settings,
) -> Float[Array, "users rank"]:
    """The logits of new users, fitted to their shots; of a user without shots all weights stay
    equal. Users do not influence each other: the loss is a sum over them, and Adam works number by
    number."""
    differences = shots.states[:, :, 0] - shots.states[:, :, 1]

    def loss(logits: Array) -> Array:
        fit = jnp.sum(jnp.where(shots.mask, _losses(basis, logits, differences), 0.0))
        return fit + prior * jnp.sum(logits**2)

    start = jnp.zeros((differences.shape[0], basis.shape[1]))
    return _descend(loss, start, optax.adam(settings.fit_learning_rate), settings.fit_steps)


def _descend(loss: Any, start: Any, tx: optax.GradientTransformation, steps: int) -> Any:
    def step(carry: Any, _: None) -> tuple[Any, None]:
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (start, tx.init(start)), None, length=steps)[0][0]


def fit_features(
    run: Run,
    found: dict[str, Features],
    test_users: Sequence[User],
    seed: int,
    settings: Settings = Settings(),  # noqa: B008
) -> Fit:
    """From the features of each split: trains on the training users, chooses rank and penalties on
    the validation users, and scores the test users: generic, with equal weights, and with weights
    fitted to their shots."""
    scale = measure_scale(found["train"])
    placed = {name: place_features(part, scale, run) for name, part in found.items()}
    valid, mask = placed["validation"], found["validation"].pairs.mask
    choices = list(itertools.product(settings.ranks, settings.priors, settings.decays))
    best: tuple[float, tuple[int, float, float], Model] | None = None
    tried: dict[str, float] = {}
    with Progress(len(choices), label="low rank", enabled=is_main_process()) as progress:
        for number, (rank, prior, decay) in enumerate(choices):
            penalty = Penalty(jnp.float32(prior), jnp.float32(decay))
            by = {"rank": rank, "settings": settings, "seed": seed}
            model = train(placed["train"], penalty, **by)
            logits = fit_users(model.basis, valid.shots, penalty.prior, settings=settings)
            rewards = np.asarray(score(model.basis, logits, valid.pairs))[: len(mask)]
            nats = measure_nats(rewards[..., 0] - rewards[..., 1], mask)
            tried[f"rank {rank}, prior {prior}, decay {decay}"] = nats
            if best is None or nats < best[0]:
                best = (nats, (rank, prior, decay), model)
            progress.update(number + 1, {"nats": nats, "best": best[0]})
    assert best is not None
    _, (rank, prior, decay), model = best
    shots, pairs = placed["test"].shots, placed["test"].pairs
    fitted = fit_users(model.basis, shots, jnp.float32(prior), settings=settings)
    items = {}
    for condition, logits in ((GENERIC, jnp.zeros_like(fitted)), (FITTED, fitted)):
        rewards = np.asarray(score(model.basis, logits, pairs))
        scores = PairLogps(rewards[..., 0], rewards[..., 1])
        items[condition] = make_items(run, test_users, scores, scores.chosen - scores.rejected)
    chosen = {"rank": rank, "prior": prior, "decay": decay, "validation_nats": tried}
    return Fit(items, settings._asdict() | chosen | {"seed": seed})
