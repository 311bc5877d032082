"""Log-probs and entropies of tokens from hidden states, chunked so that [tokens, vocabulary] is never stored."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

CHUNK = 1024  # tokens whose logits exist at a time


def token_logits(
    hidden: Float[Array, "*rows embed"], head: Float[Array, "embed vocab"], *, softcap: float | None = None
) -> Float[Array, "*rows vocab"]:
    """hidden @ head in float32, bounded to +-softcap by c tanh(x / c) when there is one."""
    logits = jnp.dot(hidden, head, preferred_element_type=jnp.float32)
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def _over_chunks(
    score: Callable[[Array, Array], Any], hidden: Float[Array, "*rows embed"], ids: Int[Array, "*rows"]
) -> Any:
    """score(states, targets) -> numbers per token, a chunk at a time; the backward pass computes a chunk again."""
    shape, dim = ids.shape, hidden.shape[-1]
    hidden, flat = hidden.reshape(-1, dim), ids.reshape(-1)
    num = flat.shape[0]
    chunks = -(-num // CHUNK)
    size = -(-num // chunks)
    pad = chunks * size - num
    hidden = jnp.pad(hidden, ((0, pad), (0, 0))).reshape(chunks, size, dim)
    flat = jnp.pad(flat, (0, pad)).reshape(chunks, size)

    @jax.checkpoint
    def of_chunk(args: tuple[Array, Array]) -> Any:
        return score(*args)

    found = of_chunk((hidden[0], flat[0])) if chunks == 1 else jax.lax.map(of_chunk, (hidden, flat))
    return jax.tree.map(lambda x: x.reshape(-1)[:num].reshape(shape), found)


def token_logps(
    hidden: Float[Array, "*rows embed"],
    head: Float[Array, "embed vocab"],
    ids: Int[Array, "*rows"],
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Float[Array, "*rows"]:
    """log softmax(logits / temperature)[ids], in nats and float32; the backward pass recomputes the logits."""

    def score(states: Array, targets: Array) -> Array:
        logits = token_logits(states, head, softcap=softcap) / temperature
        chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1)

    return _over_chunks(score, hidden, ids)


def token_logps_and_entropy(
    hidden: Float[Array, "*rows embed"],
    head: Float[Array, "embed vocab"],
    ids: Int[Array, "*rows"],
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> tuple[Float[Array, "*rows"], Float[Array, "*rows"]]:
    """`token_logps` and the entropy of the distribution that each token was drawn from, of one product with the head.

    H = -sum_v p_v log p_v, p = softmax(logits / temperature): nats, from 0 to log vocab, with its own gradient.
    """

    def score(states: Array, targets: Array) -> tuple[Array, Array]:
        logits = token_logits(states, head, softcap=softcap) / temperature
        chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        total = jax.nn.logsumexp(logits, axis=-1)
        logps = logits - total[:, None]
        return chosen - total, -jnp.sum(jnp.exp(logps) * logps, axis=-1)

    return _over_chunks(score, hidden, ids)
