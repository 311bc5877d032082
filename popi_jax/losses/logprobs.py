"""Log-probs and entropies of tokens, in chunks: [tokens vocabulary] is never stored."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

CHUNK = 1024  # tokens whose logits exist at a time


def token_logits(
    hidden: Float[Array, "*rows embed"],
    head: Float[Array, "embed vocab"],
    *,
    softcap: float | None = None,
) -> Float[Array, "*rows vocab"]:
    """hidden @ head in float32, bounded to +-softcap by c tanh(x / c) when there is one."""
    logits = jnp.dot(hidden, head, preferred_element_type=jnp.float32)
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def _over_chunks(
    score: Callable[[Array, Array, Array], Any],
    hidden: Float[Array, "*rows embed"],
    head: Float[Array, "embed vocab"],
    ids: Int[Array, "*rows"],
) -> Any:
    """score(states, targets, head) -> numbers per token, a chunk at a time, and again in the
    backward pass.

    The gradient of the head is added up over the chunks in float32; neither a copy of the head nor
    what a chunk computes on the way is kept."""
    shape, dim = ids.shape, hidden.shape[-1]
    hidden, flat = hidden.reshape(-1, dim), ids.reshape(-1)
    num = flat.shape[0]
    chunks = -(-num // CHUNK)
    size = -(-num // chunks)
    pad = chunks * size - num
    hidden = jnp.pad(hidden, ((0, pad), (0, 0))).reshape(chunks, size, dim)
    flat = jnp.pad(flat, (0, pad)).reshape(chunks, size)

    @jax.custom_vjp
    def scored(hidden: Array, head: Array, flat: Array) -> Any:
        return jax.lax.map(lambda chunk: score(chunk[0], chunk[1], head), (hidden, flat))

    def backward(kept: tuple[Array, Array, Array], grads: Any) -> tuple[Array, Array, None]:
        hidden, head, flat = kept

        def add(total: Array, chunk: tuple[Array, Array, Any]) -> tuple[Array, Array]:
            states, targets, grad = chunk
            _, pull = jax.vjp(lambda states, head: score(states, targets, head), states, head)
            of_states, of_head = pull(grad)
            return total + of_head.astype(jnp.float32), of_states

        # zeros that differ along the mesh axes that the head differs along, as jax.shard_map asks
        start = jnp.zeros(head.shape, jnp.float32) + 0.0 * head[:1, :1].astype(jnp.float32)
        of_head, of_hidden = jax.lax.scan(add, start, (hidden, flat, grads))
        return of_hidden, of_head.astype(head.dtype), None

    scored.defvjp(lambda *args: (scored(*args), args), backward)
    return jax.tree.map(lambda x: x.reshape(-1)[:num].reshape(shape), scored(hidden, head, flat))


def token_logps(
    hidden: Float[Array, "*rows embed"],
    head: Float[Array, "embed vocab"],
    ids: Int[Array, "*rows"],
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_axes: tuple[str, ...] = (),
) -> Float[Array, "*rows"]:
    """log softmax(logits / temperature)[ids], in nats and float32; the backward pass recomputes the
    logits.

    vocab_axes: inside `jax.shard_map`, the mesh axes that split the vocabulary; `head` is then the
    device's part."""

    def score(states: Array, targets: Array, head: Array) -> Array:
        logits = token_logits(states, head, softcap=softcap) / temperature
        return _chosen(logits, targets, vocab_axes) - _logsumexp(logits, vocab_axes)

    return _over_chunks(score, hidden, head, ids)


def token_logps_and_entropy(
    hidden: Float[Array, "*rows embed"],
    head: Float[Array, "embed vocab"],
    ids: Int[Array, "*rows"],
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_axes: tuple[str, ...] = (),
) -> tuple[Float[Array, "*rows"], Float[Array, "*rows"]]:
    """`token_logps` and the entropy of the distribution that each token was drawn from, of one
    product with the head.

    H = -sum_v p_v log p_v, p = softmax(logits / temperature): nats, from 0 to log vocab, with its
    own gradient."""

    def score(states: Array, targets: Array, head: Array) -> tuple[Array, Array]:
        logits = token_logits(states, head, softcap=softcap) / temperature
        total = _logsumexp(logits, vocab_axes)
        logps = logits - total[:, None]
        entropy = -_over_vocab(jnp.sum(jnp.exp(logps) * logps, axis=-1), vocab_axes)
        return _chosen(logits, targets, vocab_axes) - total, entropy

    return _over_chunks(score, hidden, head, ids)


def _over_vocab(x: Array, vocab_axes: tuple[str, ...]) -> Array:
    return jax.lax.psum(x, vocab_axes) if vocab_axes else x


def _chosen(
    logits: Float[Array, "tokens part"], targets: Int[Array, " tokens"], vocab_axes: tuple[str, ...]
) -> Float[Array, " tokens"]:
    """The target's logit, which one of the devices that split the vocabulary has."""
    if not vocab_axes:
        return jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    part = logits.shape[-1]
    own = targets - jax.lax.axis_index(vocab_axes) * part
    here = jnp.take_along_axis(logits, jnp.clip(own, 0, part - 1)[:, None], axis=-1)[:, 0]
    return _over_vocab(jnp.where((own >= 0) & (own < part), here, 0.0), vocab_axes)


def _logsumexp(
    logits: Float[Array, "tokens part"], vocab_axes: tuple[str, ...]
) -> Float[Array, " tokens"]:
    if not vocab_axes:
        return jax.nn.logsumexp(logits, axis=-1)
    top = jax.lax.pmax(jnp.max(jax.lax.stop_gradient(logits), axis=-1), vocab_axes)
    return top + jnp.log(_over_vocab(jnp.sum(jnp.exp(logits - top[:, None]), axis=-1), vocab_axes))
