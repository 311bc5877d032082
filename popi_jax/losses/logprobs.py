"""Log-probs of tokens from hidden states, chunked so that [tokens, vocabulary] is never stored."""

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


def token_logps(
    hidden: Float[Array, "*rows embed"],
    head: Float[Array, "embed vocab"],
    ids: Int[Array, "*rows"],
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Float[Array, "*rows"]:
    """log softmax(logits / temperature)[ids], in nats and float32; the backward pass recomputes the logits."""
    shape, dim = ids.shape, hidden.shape[-1]
    hidden, flat = hidden.reshape(-1, dim), ids.reshape(-1)
    num = flat.shape[0]
    chunks = -(-num // CHUNK)
    size = -(-num // chunks)
    pad = chunks * size - num
    hidden = jnp.pad(hidden, ((0, pad), (0, 0))).reshape(chunks, size, dim)
    flat = jnp.pad(flat, (0, pad)).reshape(chunks, size)

    @jax.checkpoint
    def chunk_logps(args: tuple[Array, Array]) -> Array:
        states, targets = args
        logits = token_logits(states, head, softcap=softcap) / temperature
        chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1)

    logps = chunk_logps((hidden[0], flat[0])) if chunks == 1 else jax.lax.map(chunk_logps, (hidden, flat)).reshape(-1)
    return logps[:num].reshape(shape)
