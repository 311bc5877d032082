"""The fused kernels against attention in chunks: values and gradients, with padding, on one device and on a mesh.

Splash runs as plain operations here, cuDNN's call by its XLA counterpart.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popi_jax.models import attention, kernels
from popi_jax.models.attention import Level, num_slots
from popi_jax.sharding import make_mesh

# a single text; a context and its replies; context, K prompts, 2K replies, of lengths that fill no block
ROW = (Level(1, 300),)
GROUP = Level(1, 150), Level(1, 7), Level(5, 20)
PAIRS = Level(1, 50), Level(2, 30), Level(4, 61)
TREES = {"row": ROW, "group": GROUP, "pairs": PAIRS}
SPLASH = partial(kernels.splash, interpret=True)


def cudnn(*args: jax.Array, levels: tuple, softcap: float | None) -> jax.Array:
    assert softcap is None
    return kernels.cudnn(*args, levels=levels, implementation="xla")


def of_padded_nodes(rng: np.random.Generator, levels: tuple[Level, ...], batch: int) -> np.ndarray:
    """bool[batch slots]: each node is filled up to a length of its own, of at least one token."""
    parts = [
        (np.arange(length) < rng.integers(1, length + 1, (batch, nodes, 1))).reshape(batch, -1)
        for nodes, length in levels
    ]
    return np.concatenate(parts, axis=1)


def inputs(levels: tuple[Level, ...], *, batch: int, heads: int, kv_heads: int, head_dim: int = 8) -> tuple:
    rng = np.random.default_rng(num_slots(levels))

    def random(heads: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=(batch, num_slots(levels), heads, head_dim)) * 1.5, jnp.float32)

    return random(heads), random(kv_heads), random(kv_heads), jnp.asarray(of_padded_nodes(rng, levels, batch))


def both(fn: Callable[..., jax.Array], levels: tuple[Level, ...], softcap: float | None, args: tuple) -> tuple:
    """Results of valid tokens, and the gradients of what depends on them alone."""

    def total(q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = fn(q, k, v, valid, levels=levels, softcap=softcap)
        y = jnp.where(valid[:, :, None, None], y, 0.0)
        return jnp.sum(jnp.sin(3 * y)), y

    return jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(*args)


def chunked(*args: jax.Array, levels: tuple[Level, ...], softcap: float | None) -> jax.Array:
    positions = jnp.zeros(args[0].shape[:2], jnp.int32)
    settings = {"score_dim": 1, "implementation": "chunked"}
    return attention.attend(*args, positions, levels=levels, softcap=softcap, **settings)


def assert_same(found: tuple, wanted: tuple) -> None:
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5 * float(jnp.max(jnp.abs(y))))


@pytest.mark.parametrize(
    ("kernel", "tree", "heads", "kv_heads", "softcap"),
    [
        (SPLASH, "row", 2, 2, None),
        (SPLASH, "group", 4, 2, 2.0),
        (SPLASH, "pairs", 4, 1, None),
        (cudnn, "row", 2, 2, None),
        (cudnn, "group", 4, 2, None),
        (cudnn, "pairs", 4, 1, None),
    ],
)
def test_a_kernel_equals_the_chunks(
    kernel: Callable[..., jax.Array], tree: str, heads: int, kv_heads: int, softcap: float | None
) -> None:
    levels = TREES[tree]
    args = inputs(levels, batch=2, heads=heads, kv_heads=kv_heads)
    assert_same(both(kernel, levels, softcap, args), both(chunked, levels, softcap, args))


@pytest.mark.parametrize("kernel", [SPLASH, cudnn])
@pytest.mark.parametrize(("batch", "kv_heads"), [(4, 2), (2, 1)])  # of axes that divide, and of some that do not
def test_a_kernel_on_a_mesh_equals_the_chunks_without(
    kernel: Callable[..., jax.Array], batch: int, kv_heads: int
) -> None:
    args = inputs(PAIRS, batch=batch, heads=4, kv_heads=kv_heads)
    wanted = both(chunked, PAIRS, None, args)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        found = both(kernel, PAIRS, None, args)
    assert_same(found, wanted)


def test_padding_is_finite() -> None:
    q, k, v, valid = inputs(GROUP, batch=2, heads=2, kv_heads=2)
    nothing = jnp.zeros_like(valid)
    for kernel in (SPLASH, cudnn):
        y = kernel(q, k, v, nothing, levels=GROUP, softcap=None)
        assert np.isfinite(y).all()


@pytest.mark.parametrize("levels", [*TREES.values(), (Level(1, 700), Level(3, 129), Level(6, 400))])
def test_blocks_that_hold_a_pair_are_computed_and_no_others(levels: tuple[Level, ...]) -> None:
    layout = kernels.lay_out(levels)
    mask = kernels._Mask(layout)[:, :]
    number = layout.slots // layout.block
    by_hand = mask.reshape(number, layout.block, number, layout.block).any(axis=(1, 3))
    np.testing.assert_array_equal(kernels.blocks(layout), by_hand)
    assert mask.diagonal().all()  # padding sees itself, so no row of scores is empty


def test_what_attend_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel where it computes what is asked for and the row is long, the chunks elsewhere."""
    chosen = []

    def called(name: str) -> Callable[..., jax.Array]:
        return lambda q, *_, **__: chosen.append(name) or q

    for name in ("splash", "cudnn"):
        monkeypatch.setattr(kernels, name, called(name))
    monkeypatch.setattr(attention, "_in_chunks", called("chunked"))

    def choice(on: str, implementation: str = "auto", slots: int = 512, dtype: str = "bfloat16", **settings) -> str:
        monkeypatch.setattr(attention, "platform", lambda: on)
        x, valid = jnp.zeros((1, slots, 1, 8), dtype), jnp.ones((1, slots), bool)
        at = jnp.zeros((1, slots), jnp.int32)
        attention.attend(
            x, x, x, valid, at, **{"levels": (Level(1, slots),), "implementation": implementation, **settings}
        )
        return chosen.pop()

    assert [choice(on) for on in ("tpu", "gpu", "cpu")] == ["splash", "cudnn", "chunked"]
    assert choice("tpu", slots=511) == choice("gpu", slots=511) == "chunked"
    assert choice("tpu", dtype="float32", softcap=2.0) == "splash"
    assert choice("gpu", dtype="float32") == choice("gpu", softcap=2.0) == "chunked"
    assert choice("tpu", window=jnp.asarray(4)) == choice("gpu", window=jnp.asarray(4)) == "chunked"
    assert choice("cpu", "splash") == "splash"
    assert choice("tpu", "chunked") == "chunked"
    of_nothing = jnp.zeros((1, 1, 1, 0, 8)), jnp.zeros((1, 1, 0), bool), jnp.zeros((1, 1, 0), jnp.int32)
    past = (attention.KeysValues(of_nothing[0], *of_nothing),)
    assert choice("tpu", past=past) == "chunked"
