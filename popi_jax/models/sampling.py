"""Which token comes next: temperature, cuts of the distribution, tokens that are never drawn, where
to stop."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


class Sampling(NamedTuple):
    """How to draw tokens. The cuts apply in the order of the fields, each on what the ones before
    it left.

    They change what is drawn, never the log-probs that are reported: those are of the whole
    distribution at `temperature`, as the scoring pass computes them."""

    temperature: float  # 0 is greedy; log-probs are then those at temperature 1
    max_len: int  # tokens, end token included
    end_id: int
    banned: tuple[int, ...] = ()  # never drawn: control tokens and the padding of the vocabulary
    top_k: int = 0  # only the k likeliest; 0 = all
    top_p: float = (
        1.0  # only the likeliest whose probability sums to p at least (nucleus, arXiv 1904.09751)
    )
    min_p: float = (
        0.0  # only those at least this part of the likeliest's probability (arXiv 2407.01082)
    )
    stop: tuple[
        tuple[int, ...], ...
    ] = ()  # an answer ends where it has one of these, which stays in it


def cut(logits: Float[Array, "*rows vocab"], sampling: Sampling) -> Float[Array, "*rows vocab"]:
    """Logits over the temperature, -inf where a token is not to be drawn. The likeliest token is
    always kept."""
    z = logits if sampling.temperature == 0.0 else logits / sampling.temperature
    if sampling.banned:
        z = z.at[..., jnp.asarray(sampling.banned)].set(-jnp.inf)
    if 0 < sampling.top_k < z.shape[-1]:
        z = jnp.where(z < jax.lax.top_k(z, sampling.top_k)[0][..., -1:], -jnp.inf, z)
    if sampling.top_p < 1.0:
        order = jnp.argsort(z, axis=-1, descending=True)
        p = jax.nn.softmax(jnp.take_along_axis(z, order, axis=-1), axis=-1)
        before = jnp.cumsum(p, axis=-1) - p  # probability of the likelier tokens
        keep = (before < sampling.top_p).at[..., 0].set(True)
        z = jnp.where(jnp.take_along_axis(keep, jnp.argsort(order, axis=-1), axis=-1), z, -jnp.inf)
    if sampling.min_p > 0.0:
        z = jnp.where(z < jnp.max(z, axis=-1, keepdims=True) + jnp.log(sampling.min_p), -jnp.inf, z)
    return z


def draw(
    logits: Float[Array, "batch group vocab"], keys: Key[Array, "batch group"], sampling: Sampling
) -> tuple[Int[Array, "batch group"], Float[Array, "batch group"]]:
    """One token per row, and its log-prob (nats) in the whole distribution at the temperature."""
    z = cut(logits, sampling)
    greedy = sampling.temperature == 0.0
    token = (
        jnp.argmax(z, axis=-1) if greedy else jax.vmap(jax.vmap(jax.random.categorical))(keys, z)
    )
    whole = logits if greedy else logits / sampling.temperature
    logp = jnp.take_along_axis(jax.nn.log_softmax(whole, axis=-1), token[..., None], axis=-1)[
        ..., 0
    ]
    return token.astype(jnp.int32), logp


def stops(
    ids: Int[Array, "batch group seq"], t: Int[Array, ""], sampling: Sampling
) -> Bool[Array, "batch group"]:
    """Whether the tokens up to index `t` end with a stop sequence."""
    found = jnp.zeros(ids.shape[:2], bool)
    for words in sampling.stop:
        if len(words) <= ids.shape[2]:
            last = jax.lax.dynamic_slice_in_dim(
                ids, jnp.maximum(t + 1 - len(words), 0), len(words), axis=2
            )
            found |= jnp.all(last == jnp.asarray(words, jnp.int32)[None, None, :], axis=-1) & (
                t + 1 >= len(words)
            )
    return found
