"""Attention over trees in chunks against softmax attention written out in float64, with grouped
heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popi_jax.models import attention
from popi_jax.models.attention import frequencies, rope
from popi_jax.models.packing import Level

B, HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 6


def oracle(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray) -> np.ndarray:
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(q.shape[:3]):
        seen, group = mask[b, t], n // (HEADS // KV_HEADS)
        scores = k[b, seen, group].astype(np.float64) @ q[b, t, n] / np.sqrt(HEAD_DIM)
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights @ v[b, seen, group] / weights.sum()
    return out


def sees(levels: tuple[Level, ...]) -> np.ndarray:
    """bool[slots, slots], slot by slot: the earlier slots of the same node and all of its
    ancestors."""
    places = [
        (depth, node, i)
        for depth, (nodes, length) in enumerate(levels)
        for node, i in np.ndindex(nodes, length)
    ]

    def seen(query: tuple[int, int, int], key: tuple[int, int, int]) -> bool:
        if key[0] == query[0]:
            return key[1] == query[1] and key[2] <= query[2]
        each = levels[query[0]].nodes // max(levels[key[0]].nodes, 1)
        return key[0] < query[0] and query[1] // each == key[1]

    return np.array([[seen(query, key) for key in places] for query in places])


def test_what_a_tree_sees_by_hand() -> None:
    """Context 1 token; turns p, q of 1 token; answers pa, pb, qa, qb of 1 token."""
    assert sees((Level(1, 1), Level(2, 1), Level(4, 1))).astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0, 0],  # context
        [1, 1, 0, 0, 0, 0, 0],  # p
        [1, 0, 1, 0, 0, 0, 0],  # q
        [1, 1, 0, 1, 0, 0, 0],  # pa
        [1, 1, 0, 0, 1, 0, 0],  # pb
        [1, 0, 1, 0, 0, 1, 0],  # qa
        [1, 0, 1, 0, 0, 0, 1],  # qb
    ]


@pytest.mark.parametrize("chunk", [1, 4, 7, 128])
@pytest.mark.parametrize(
    "shape",
    [((1, 11),), ((1, 5), (2, 3), (6, 2)), ((1, 3), (3, 1), (3, 4)), ((1, 4), (2, 0), (4, 2))],
)
def test_equals_the_equation_in_any_chunks(
    shape: tuple[tuple[int, int], ...], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "QUERY_CHUNK", chunk)
    monkeypatch.setattr(attention, "MOST_CHUNKS", 100)
    levels = tuple(Level(*level) for level in shape)
    slots = sum(level.nodes * level.length for level in levels)
    rng = np.random.default_rng(chunk)
    q = rng.normal(size=(B, slots, HEADS, HEAD_DIM)).astype(np.float32)
    k, v = (rng.normal(size=(B, slots, KV_HEADS, HEAD_DIM)).astype(np.float32) for _ in range(2))
    valid = rng.random((B, slots)) < 0.7
    valid[:, 0] = True
    positions = jnp.zeros((B, slots), jnp.int32)
    mask = sees(levels)[None] & valid[:, None, :]

    @jax.jit
    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
        def total(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
            new = attention.NewTokens(q, k, v, jnp.asarray(valid), positions)
            y = attention.attend(new, levels=levels)
            return jnp.sum(jnp.sin(y)), y

        return jax.grad(total, argnums=(0, 1, 2), has_aux=True)(q, k, v)

    grads, found = attend(*map(jnp.asarray, (q, k, v)))
    np.testing.assert_allclose(found, oracle(q, k, v, mask), atol=1e-5)
    direction = [rng.normal(size=x.shape) for x in (q, k, v)]

    def value(step: float) -> float:
        return np.sin(
            oracle(*(x + step * d for x, d in zip((q, k, v), direction, strict=True)), mask)
        ).sum()

    slope = (value(1e-4) - value(-1e-4)) / 2e-4
    np.testing.assert_allclose(
        sum(np.sum(g * d) for g, d in zip(grads, direction, strict=True)), slope, rtol=1e-3
    )


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_a_cache_is_as_good_as_a_level(nodes: int) -> None:
    """What lies in the past, seen by all or by one branch each, counts as if it were computed with
    the rest."""
    levels = Level(1, 5), Level(nodes, 3), Level(4, 2)
    slots, behind = sum(level.nodes * level.length for level in levels), 5 + nodes * 3
    rng = np.random.default_rng(nodes)
    q = jnp.asarray(rng.normal(size=(B, slots, HEADS, HEAD_DIM)), jnp.float32)
    k, v = (
        jnp.asarray(rng.normal(size=(B, slots, KV_HEADS, HEAD_DIM)), jnp.float32) for _ in range(2)
    )
    valid, positions = jnp.asarray(rng.random((B, slots)) < 0.8), jnp.zeros((B, slots), jnp.int32)
    whole = attention.attend(attention.NewTokens(q, k, v, valid, positions), levels=levels)

    def kept(start: int, nodes: int, length: int) -> attention.KeysValues:
        def rows(x: jax.Array) -> jax.Array:
            return x[:, start : start + nodes * length].reshape(B, nodes, length, *x.shape[2:])

        return attention.KeysValues(
            *(rows(x).transpose(0, 3, 1, 2, 4) for x in (k, v)), rows(valid), rows(positions)
        )

    past = kept(0, 1, 5), kept(5, nodes, 3)
    new = attention.NewTokens(*(x[:, behind:] for x in (q, k, v, valid, positions)))
    np.testing.assert_allclose(
        attention.attend(new, past, levels=levels[2:]), whole[:, behind:], atol=1e-6
    )


def test_a_row_that_sees_nothing_is_finite() -> None:
    x, none, at = jnp.ones((1, 2, 2, 4)), jnp.zeros((1, 2), bool), jnp.zeros((1, 2), jnp.int32)
    levels = (Level(1, 2),)

    def total(q: jax.Array) -> jax.Array:
        return jnp.sum(attention.attend(attention.NewTokens(q, x, x, none, at), levels=levels))

    grad = jax.grad(total)(x)
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
