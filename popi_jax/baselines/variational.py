"""VPL: a reward model given a latent of the user, variational (arXiv 2408.10075).

An encoder reads some pairs of a user and gives q(z | pairs), a Gaussian with a diagonal covariance;
a decoder gives rewards r(x, y, z). Both are trained together on

    mean over pairs of -log sigmoid(r(chosen, z) - r(rejected, z)) + kl_weight * KL(q || N(0, 1)),

z drawn from q of other pairs of the same user. Of a new user z is the mean of q given the shots.

The parts are those of the paper's code for language (WEIRDLabUW/vpl_llm): the features of both
replies of a pair go through an MLP, the pairs through self-attention and a mean over them, then
linear layers to mean and log variance; the decoder is an MLP of features and z. Departures: phi are
fixed hidden states of the run's generator, standardised; sizes are smaller; no scaling of rewards
by likelihoods (VPL-SPO), no annealing of the KL and no clipping of mean and variance; weight of the
KL and epochs are chosen on the validation users."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Key

from popi_jax.arrays import PairLogps, Params
from popi_jax.baselines.features import Features, PairStates, measure_scale, place_features
from popi_jax.baselines.pairs import FITTED, GENERIC, Fit, make_items, measure_nats
from popi_jax.data.records import User
from popi_jax.distributed import is_main_process
from popi_jax.popi.scorer import split_microbatches
from popi_jax.progress import Progress
from popi_jax.run import Run

MINIBATCHES = 16  # of the training users in an epoch; each holds users of every shard


class Settings(NamedTuple):
    kl_weights: tuple[float, ...] = (0.001, 0.01, 0.1)  # the best on the validation users is taken
    epochs: int = 30
    check_every: int = 5  # epochs; those after which the validation users are best are taken
    latent: int = 16  # numbers in z
    hidden: int = 64  # width of the MLPs
    learning_rate: float = 2e-3  # peak of Adam's, which falls to 0 by a cosine
    weight_decay: float = 1e-3


class Posterior(NamedTuple):
    mean: Float[Array, "users latent"]
    log_var: Float[Array, "users latent"]


def init(key: Key[Array, ""], embed: int, settings: Settings) -> Params:
    """Kernels are normal with standard deviation 1/sqrt(inputs), biases 0."""
    h, z = settings.hidden, settings.latent
    shapes = {
        **{"pair_0": (2 * embed, h), "pair_1": (h, h), "pair_2": (h, z)},
        **{"query": (z, z), "key": (z, z), "value": (z, z), "mean": (z, z), "log_var": (z, z)},
        **{"reward_0": (embed + z, h), "reward_1": (h, h), "reward_2": (h, 1)},
    }
    keys = jax.random.split(key, len(shapes))
    return {
        name: {
            "kernel": jax.random.normal(k, shape) / jnp.sqrt(jnp.float32(shape[0])),
            "bias": jnp.zeros(shape[1]),
        }
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def _linear(params: Params, name: str, x: Float[Array, "*rows n"]) -> Float[Array, "*rows m"]:
    bias = params[name]["bias"]
    return x @ params[name]["kernel"] + bias.reshape((1,) * (x.ndim - 1) + bias.shape)


def _mlp(params: Params, name: str, x: Float[Array, "*rows n"]) -> Float[Array, "*rows m"]:
    for layer in range(2):
        x = jax.nn.leaky_relu(_linear(params, f"{name}_{layer}", x), 0.2)
    return _linear(params, f"{name}_2", x)


def encode(
    params: Params, states: Float[Array, "users pairs 2 embed"], mask: Bool[Array, "users pairs"]
) -> Posterior:
    """q(z | the pairs that `mask` counts); the prior where it counts none."""
    pairs = _mlp(params, "pair", states.reshape(*mask.shape, -1))
    query, key, value = (_linear(params, name, pairs) for name in ("query", "key", "value"))
    scores = jnp.einsum("uqz,ukz->uqk", query, key) / jnp.sqrt(jnp.float32(query.shape[-1]))
    scores = jnp.where(mask[:, None], scores, -1e9)
    read = jnp.einsum("uqk,ukz->uqz", jax.nn.softmax(scores, axis=-1), value)
    count = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
    read = jnp.sum(jnp.where(mask[..., None], read, 0.0), axis=1) / count
    known = jnp.any(mask, axis=1, keepdims=True)
    heads = (_linear(params, name, read) for name in ("mean", "log_var"))
    return Posterior(*(jnp.where(known, x, 0.0) for x in heads))


def decode(
    params: Params,
    states: Float[Array, "users pairs 2 embed"],
    latent: Float[Array, "users latent"],
) -> Float[Array, "users pairs 2"]:
    """r(x, y, z) of both replies of each pair."""
    shape = (*states.shape[:3], latent.shape[-1])
    told = jnp.broadcast_to(latent[:, None, None], shape)
    return _mlp(params, "reward", jnp.concatenate([states, told], axis=-1))[..., 0]


def kl_to_prior(posterior: Posterior) -> Float[Array, " users"]:
    """KL(q || N(0, 1)), nats."""
    mean, log_var = posterior
    return 0.5 * jnp.sum(jnp.exp(log_var) + mean**2 - 1.0 - log_var, axis=-1)


def loss(
    params: Params, batch: Features, key: Key[Array, ""], kl_weight: Float[Array, ""]
) -> Float[Array, ""]:
    """Negative evidence lower bound of a draw: of all pairs of each user, as many as the user has
    shots are given to the encoder, the others are judged. The draw of a user depends on the key and
    the number of the user alone."""
    both = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), batch.shots, batch.pairs)
    keys = jax.vmap(partial(jax.random.fold_in, key))(batch.index)
    draws = jax.vmap(lambda k: jax.random.uniform(k, both.mask.shape[1:]))(keys)
    rank = jnp.argsort(jnp.argsort(jnp.where(both.mask, draws, 2.0), axis=1), axis=1)
    given = both.mask & (rank < jnp.sum(batch.shots.mask, axis=1, keepdims=True))
    posterior = encode(params, both.states, given)
    shape = posterior.mean.shape[1:]
    noise = jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, 1), shape))(keys)
    latent = posterior.mean + jnp.exp(0.5 * posterior.log_var) * noise
    rewards = decode(params, both.states, latent)
    losses, judged = -jax.nn.log_sigmoid(rewards[..., 0] - rewards[..., 1]), both.mask & ~given
    fit = jnp.sum(jnp.where(judged, losses, 0.0)) / jnp.maximum(jnp.sum(judged), 1)
    real = jnp.any(both.mask, axis=1)
    kl = jnp.sum(jnp.where(real, kl_to_prior(posterior), 0.0)) / jnp.maximum(jnp.sum(real), 1)
    return fit + kl_weight * kl


def _make_optimizer(settings: Settings) -> optax.GradientTransformation:
    rates = optax.cosine_decay_schedule(settings.learning_rate, settings.epochs * MINIBATCHES)
    adam = optax.adamw(rates, weight_decay=settings.weight_decay)
    return optax.chain(optax.clip_by_global_norm(1.0), adam)


@partial(jax.jit, static_argnames=("settings",), out_shardings=P())
def train(
    carry: tuple[Params, Any],
    features: Features,
    key: Key[Array, ""],
    kl_weight: Float[Array, ""],
    *,
    settings: Settings,
) -> tuple[Params, Any]:
    """`settings.check_every` epochs on the training users, whose number MINIBATCHES divides.

    carry: parameters and the state of the optimizer. Minibatch j holds the users j, j + 16, ..., so
    that each device keeps the users that it has."""
    parts, tx = split_microbatches(features, MINIBATCHES), _make_optimizer(settings)
    numbers = jnp.arange(settings.check_every * MINIBATCHES)

    def step(carry: Any, number: Array) -> tuple[Any, None]:
        params, state = carry
        batch = jax.tree.map(lambda x: x[number % MINIBATCHES], parts)
        grads = jax.grad(loss)(params, batch, jax.random.fold_in(key, number), kl_weight)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, carry, numbers)[0]


@partial(jax.jit, out_shardings=P())
def score(
    params: Params, pairs: PairStates, shots: PairStates
) -> tuple[Float[Array, "users pairs 2"], Float[Array, "users pairs 2"]]:
    """Rewards with z = the mean of q given the shots, and with that of the prior, 0."""
    latent = encode(params, *shots).mean
    return decode(params, pairs.states, latent), decode(params, pairs.states, 0.0 * latent)


def fit_features(
    run: Run,
    found: dict[str, Features],
    test_users: Sequence[User],
    seed: int,
    settings: Settings = Settings(),  # noqa: B008
) -> Fit:
    """From the features of each split: trains on the training users, chooses the weight of the KL
    and the epochs on the validation users, and scores the test users: generic, z = 0, and with z
    given their shots."""
    scale = measure_scale(found["train"])
    placed = {name: place_features(part, scale, run, MINIBATCHES) for name, part in found.items()}
    valid = placed["validation"]
    mask = found["validation"].pairs.mask
    rounds = settings.epochs // settings.check_every
    best: tuple[float, float, int, Params] | None = None
    tried, done, total = {}, 0, rounds * len(settings.kl_weights)
    with Progress(total, label="variational", enabled=is_main_process()) as progress:
        for kl_weight in settings.kl_weights:
            key = jax.random.key(seed)
            params = init(key, scale.mean.shape[0], settings)
            carry = (params, _make_optimizer(settings).init(params))
            for number in range(rounds):
                own, weight = jax.random.fold_in(key, number + 1), jnp.float32(kl_weight)
                carry = train(carry, placed["train"], own, weight, settings=settings)
                rewards = np.asarray(score(carry[0], valid.pairs, valid.shots)[0])[: len(mask)]
                nats = measure_nats(rewards[..., 0] - rewards[..., 1], mask)
                epochs = (number + 1) * settings.check_every
                tried[f"kl_weight {kl_weight}, {epochs} epochs"] = nats
                if best is None or nats < best[0]:
                    best = (nats, kl_weight, epochs, carry[0])
                done += 1
                progress.update(done, {"nats": nats, "best": best[0]})
    assert best is not None
    rewards = score(best[3], placed["test"].pairs, placed["test"].shots)
    items = {}
    for condition, found_rewards in zip((FITTED, GENERIC), map(np.asarray, rewards), strict=True):
        scores = PairLogps(found_rewards[..., 0], found_rewards[..., 1])
        items[condition] = make_items(run, test_users, scores, scores.chosen - scores.rejected)
    chosen = {"kl_weight": best[1], "chosen_epochs": best[2], "validation_nats": tried}
    return Fit(items, settings._asdict() | chosen | {"seed": seed})
