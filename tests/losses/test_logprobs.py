"""Log-probs of tokens: the equation, and that chunks change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from popi_jax.losses import logprobs
from tests.oracles import losses as oracle

RNG = np.random.default_rng(0)
HIDDEN = RNG.normal(size=(3, 7, 8)).astype(np.float32)
HEAD = (3 * RNG.normal(size=(8, 20))).astype(np.float32)
IDS = RNG.integers(0, 20, (3, 7))


def value_and_grad(temperature: float) -> tuple[np.ndarray, list[np.ndarray]]:
    weights = jnp.asarray(np.random.default_rng(1).normal(size=IDS.shape), jnp.float32)

    def total(hidden: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
        logps = logprobs.score_tokens(hidden, head, jnp.asarray(IDS), temperature=temperature)[0]
        return jnp.sum(weights * logps), logps

    grads, logps = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(
        jnp.asarray(HIDDEN), jnp.asarray(HEAD)
    )
    return np.asarray(logps), [np.asarray(g) for g in grads]


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_equals_the_equation(temperature: float) -> None:
    logps, _ = value_and_grad(temperature)
    assert logps.dtype == np.float32
    np.testing.assert_allclose(logps, oracle.token_logps(HIDDEN, HEAD, IDS, temperature), atol=2e-5)


@pytest.mark.parametrize("chunk", [4, 7, 20])  # with a rest, without, and a rest of one token
def test_chunks_change_neither_value_nor_gradient(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, whole_grads = value_and_grad(1.0)
    monkeypatch.setattr(logprobs, "CHUNK", chunk)
    text = str(
        jax.make_jaxpr(
            lambda: logprobs.score_tokens(jnp.asarray(HIDDEN), jnp.asarray(HEAD), jnp.asarray(IDS))[
                0
            ]
        )()
    )
    assert "f32[21,20]" not in text  # logits of all tokens at once
    chunked, chunked_grads = value_and_grad(1.0)
    np.testing.assert_allclose(chunked, whole, atol=1e-5)
    for a, b in zip(chunked_grads, whole_grads, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_gradient_is_that_of_finite_differences() -> None:
    def total(hidden: jax.Array, head: jax.Array) -> jax.Array:
        logps = logprobs.score_tokens(
            jnp.asarray(hidden), jnp.asarray(head), jnp.asarray(IDS), temperature=0.7
        )[0]
        return jnp.mean(logps)

    check_grads(total, (jnp.asarray(HIDDEN), jnp.asarray(HEAD)), order=1, modes=["rev"], rtol=2e-2)


def test_large_logits_stay_finite() -> None:
    logps = logprobs.score_tokens(1e4 * jnp.asarray(HIDDEN), jnp.asarray(HEAD), jnp.asarray(IDS))[0]
    assert np.isfinite(logps).all()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_entropy_equals_the_equation(temperature: float) -> None:
    found, entropy = logprobs.score_tokens(
        jnp.asarray(HIDDEN),
        jnp.asarray(HEAD),
        jnp.asarray(IDS),
        temperature=temperature,
        entropies=True,
    )
    alone = logprobs.score_tokens(
        jnp.asarray(HIDDEN), jnp.asarray(HEAD), jnp.asarray(IDS), temperature=temperature
    )[0]
    np.testing.assert_array_equal(found, alone)
    logps = oracle.log_softmax(HIDDEN.astype(np.float64) @ HEAD.astype(np.float64) / temperature)
    np.testing.assert_allclose(entropy, -(np.exp(logps) * logps).sum(-1), atol=2e-5)


def test_chunks_change_neither_entropy_nor_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = jnp.asarray(np.random.default_rng(1).normal(size=IDS.shape), jnp.float32)

    def total(hidden: jax.Array, head: jax.Array) -> jax.Array:
        states, matrix = jnp.asarray(hidden), jnp.asarray(head)  # of check_grads: numpy
        logps, entropy = logprobs.score_tokens(
            states, matrix, jnp.asarray(IDS), temperature=0.7, entropies=True
        )
        return jnp.mean(weights * entropy) + 0.1 * jnp.mean(logps)

    arrays = (jnp.asarray(HIDDEN), jnp.asarray(HEAD))
    check_grads(total, arrays, order=1, modes=["rev"], rtol=2e-2)
    whole = jax.value_and_grad(total, argnums=(0, 1))(*arrays)
    monkeypatch.setattr(logprobs, "CHUNK", 4)
    program = str(jax.make_jaxpr(lambda: total(*arrays))())
    assert "f32[21,20]" not in program  # logits of all tokens at once
    assert program.count("dot_general") == 1
    chunked = jax.value_and_grad(total, argnums=(0, 1))(*arrays)
    for a, b in zip(jax.tree.leaves(chunked), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
