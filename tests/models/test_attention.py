"""Attention in chunks against softmax attention written out in float64, with grouped heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popi_jax.models import transformer
from popi_jax.models.rope import frequencies, rope

B, T, HEADS, KV_HEADS, HEAD_DIM = 2, 11, 4, 2, 6


def oracle(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray) -> np.ndarray:
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(q.shape[:3]):
        seen, group = mask[b, t], n // (HEADS // KV_HEADS)
        scores = k[b, seen, group].astype(np.float64) @ q[b, t, n] / np.sqrt(HEAD_DIM)
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights @ v[b, seen, group] / weights.sum()
    return out


@pytest.mark.parametrize(("chunk", "slots"), [(96, T), (4, T), (4, T + 5)])
def test_equals_the_equation_in_any_chunks(chunk: int, slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer, "QUERY_CHUNK", chunk)
    rng = np.random.default_rng(0)
    q = rng.normal(size=(B, T, HEADS, HEAD_DIM)).astype(np.float32)
    k, v = (rng.normal(size=(B, slots, KV_HEADS, HEAD_DIM)).astype(np.float32) for _ in range(2))
    mask = rng.random((B, T, slots)) < 0.5
    causal = slots == T
    if causal:
        mask &= np.tri(T, dtype=bool)
    mask[:, :, 0] = True
    arrays = [jnp.asarray(x) for x in (q, k, v, mask)]

    @jax.jit
    def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> tuple:
        def total(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
            y = transformer.attend(q, k, v, mask, causal_slots=causal)
            return jnp.sum(jnp.sin(y)), y

        return jax.grad(total, argnums=(0, 1, 2), has_aux=True)(q, k, v)

    grads, found = attend(*arrays)
    np.testing.assert_allclose(found, oracle(q, k, v, mask), atol=1e-5)
    direction = [rng.normal(size=x.shape) for x in (q, k, v)]

    def value(step: float) -> float:
        return np.sin(oracle(*(x + step * d for x, d in zip((q, k, v), direction, strict=True)), mask)).sum()

    slope = (value(1e-4) - value(-1e-4)) / 2e-4
    np.testing.assert_allclose(sum(np.sum(g * d) for g, d in zip(grads, direction, strict=True)), slope, rtol=1e-3)


def test_a_row_that_sees_nothing_is_finite() -> None:
    x = jnp.ones((1, 2, 2, 4))
    grad = jax.grad(lambda q: jnp.sum(transformer.attend(q, x, x, jnp.zeros((1, 2, 2), bool), causal_slots=True)))(x)
    assert np.isfinite(grad).all()


def test_rotary_positions_count_differences_alone() -> None:
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, HEAD_DIM)), jnp.float32) for _ in range(2))

    freqs = jnp.asarray(frequencies(HEAD_DIM // 2, 100.0, None))

    def score(i: int, j: int) -> float:
        a, b = (rope(x, jnp.array([[p]]), freqs) for x, p in ((q, i), (k, j)))
        return float(jnp.sum(a * b))

    np.testing.assert_allclose(score(9, 4), score(105, 100), rtol=1e-4)
    np.testing.assert_allclose(score(7, 7), float(jnp.sum(q * k)), rtol=1e-5)
    assert abs(score(9, 4) - score(4, 9)) > 1e-3
