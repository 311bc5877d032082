"""The fused kernels against attention in chunks: values and gradients, with padding, on one device
and on a mesh.

Splash runs as plain operations here, cuDNN's call by its XLA counterpart.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from popi_jax.arrays import Tokens
from popi_jax.flops import count_flops
from popi_jax.models import attention, fused_attention
from popi_jax.models.attention import Attention, NewTokens
from popi_jax.models.packing import Level, Tree
from popi_jax.models.transformer import TransformerConfig, init_boxed, unbox
from popi_jax.popi.scorer import score_answers
from popi_jax.sharding import make_mesh
from tests.oracles.plain import RULES

# a single text; a context and its replies; context, K prompts, 2K replies, of lengths that fill no
# block
ROW = (Level(1, 300),)
GROUP = Level(1, 150), Level(1, 7), Level(5, 20)
PAIRS = Level(1, 50), Level(2, 30), Level(4, 61)
TREES = {"row": ROW, "group": GROUP, "pairs": PAIRS}
SPLASH = partial(fused_attention.splash, rules=RULES, interpret=True)


def cudnn(*args: jax.Array, levels: tuple, softcap: float | None) -> jax.Array:
    settings = {"softcap": softcap, "rules": RULES, "implementation": "xla"}
    return fused_attention.cudnn(*args, levels=levels, **settings)


def num_slots(levels: tuple[Level, ...]) -> int:
    return sum(level.nodes * level.length for level in levels)


def pad_nodes(rng: np.random.Generator, levels: tuple[Level, ...], batch: int) -> np.ndarray:
    """bool[batch slots]: each node is filled up to a length of its own, of at least one token."""
    parts = [
        (np.arange(length) < rng.integers(1, length + 1, (batch, nodes, 1))).reshape(batch, -1)
        for nodes, length in levels
    ]
    return np.concatenate(parts, axis=1)


def inputs(
    levels: tuple[Level, ...], *, batch: int, heads: int, kv_heads: int, head_dim: int = 8
) -> tuple:
    rng = np.random.default_rng(num_slots(levels))

    def random(heads: int) -> jax.Array:
        return jnp.asarray(
            rng.normal(size=(batch, num_slots(levels), heads, head_dim)) * 1.5, jnp.float32
        )

    return (
        random(heads),
        random(kv_heads),
        random(kv_heads),
        jnp.asarray(pad_nodes(rng, levels, batch)),
    )


def both(
    fn: Callable[..., jax.Array], levels: tuple[Level, ...], softcap: float | None, args: tuple
) -> tuple:
    """Results of valid tokens, and the gradients of what depends on them alone."""

    def total(
        q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        y = fn(q, k, v, valid, levels=levels, softcap=softcap)
        y = jnp.where(valid[:, :, None, None], y, 0.0)
        return jnp.sum(jnp.sin(3 * y)), y

    return jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(*args)


def chunked(*args: jax.Array, levels: tuple[Level, ...], softcap: float | None) -> jax.Array:
    positions = jnp.zeros(args[0].shape[:2], jnp.int32)
    how = Attention(score_dim=1, softcap=softcap, rules=RULES)
    return attention.attend(NewTokens(*args, positions), levels=levels, how=how)


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
@pytest.mark.parametrize(
    ("batch", "kv_heads"), [(4, 2), (2, 1)]
)  # of axes that divide, and of some that do not
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
        y = jax.jit(partial(kernel, levels=GROUP, softcap=None))(q, k, v, nothing)
        assert np.isfinite(y).all()


def test_a_model_scores_with_splash_as_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probs of replies and their gradient, through scanned and rematerialised layers on a
    mesh."""
    monkeypatch.setattr(attention, "KERNEL_SLOTS", 1)
    sizes = {"vocab_size": 64, "num_layers": 2, "embed_dim": 16, "mlp_dim": 24}
    heads = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "attn_logit_softcap": 5.0}
    model = TransformerConfig(
        **sizes, **heads, remat="full", kernel=fused_attention.choose_kernel("splash", "cpu")
    )
    rng = np.random.default_rng(0)

    def tokens(*shape: int) -> Tokens:
        ids, lengths = rng.integers(0, 64, shape), rng.integers(1, shape[-1] + 1, shape[:-1])
        return Tokens(jnp.asarray(ids, jnp.int32), jnp.asarray(lengths, jnp.int32))

    tree = Tree(tokens(4, 12), tokens(4, 2, 5), tokens(4, 2, 2, 9))
    params = unbox(init_boxed(jax.random.key(0), model))

    def gradient(model: TransformerConfig) -> tuple[jax.Array, dict]:
        return jax.jit(
            jax.value_and_grad(lambda p: jnp.sum(score_answers(p, tree, model=model).sums()))
        )(params)

    with jax.set_mesh(make_mesh(2, 2, 2)):
        found = gradient(model)
    assert_same(found, gradient(dataclasses.replace(model, kernel=None)))


@pytest.mark.parametrize("levels", [*TREES.values(), (Level(1, 700), Level(3, 129), Level(6, 400))])
def test_blocks_that_hold_a_pair_are_computed_and_no_others(levels: tuple[Level, ...]) -> None:
    layout = fused_attention.lay_out(levels)
    mask = fused_attention._Mask(layout)[:, :]
    number = layout.slots // layout.block
    by_hand = mask.reshape(number, layout.block, number, layout.block).any(axis=(1, 3))
    np.testing.assert_array_equal(fused_attention.blocks(layout), by_hand)
    assert mask.diagonal().all()  # padding sees itself, so no row of scores is empty


def test_what_attend_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel where it computes what is asked for and the row is long, the chunks elsewhere."""
    chosen = []

    def called(name: str) -> Callable[..., jax.Array]:
        return lambda q, *_, **__: chosen.append(name) or q

    for name in ("splash", "cudnn"):
        monkeypatch.setattr(fused_attention, name, called(name))
    monkeypatch.setattr(fused_attention, "INTERPRETED", called("splash"))
    chunks = called("chunked")
    monkeypatch.setattr(attention, "_attend_in_chunks", lambda new, *_: chunks(new.q))

    def choice(
        on: str,
        name: str = "auto",
        slots: int = 512,
        dtype: str = "bfloat16",
        softcap: float | None = None,
        **seen,
    ) -> str:
        x, valid = jnp.zeros((1, slots, 1, 8), dtype), jnp.ones((1, slots), bool)
        new = NewTokens(x, x, x, valid, jnp.zeros((1, slots), jnp.int32))
        how = Attention(softcap=softcap, kernel=fused_attention.choose_kernel(name, on))
        attention.attend(new, levels=(Level(1, slots),), how=how, **seen)
        return chosen.pop()

    assert [choice(on) for on in ("tpu", "gpu", "cpu")] == ["splash", "cudnn", "chunked"]
    assert choice("tpu", slots=511) == choice("gpu", slots=511) == "chunked"
    assert choice("tpu", dtype="float32", softcap=2.0) == "splash"
    assert choice("gpu", dtype="float32") == choice("gpu", softcap=2.0) == "chunked"
    assert choice("tpu", window=jnp.asarray(4)) == choice("gpu", window=jnp.asarray(4)) == "chunked"
    assert choice("cpu", "splash") == "splash"
    assert choice("tpu", "chunked") == choice("cpu", "cudnn") == "chunked"
    with pytest.raises(ValueError, match="must be one of auto, chunked, splash, cudnn"):
        choice("tpu", "flash")
    of_nothing = (
        jnp.zeros((1, 1, 1, 0, 8)),
        jnp.zeros((1, 1, 0), bool),
        jnp.zeros((1, 1, 0), jnp.int32),
    )
    past = (attention.KeysValues(of_nothing[0], *of_nothing),)
    assert choice("tpu", past=past) == "chunked"


def test_flops_of_the_kernels_are_counted() -> None:
    """Of each block of scores that is computed two products forward and seven backward, of which
    two go over the scores again; against the chunks, which compute six backward and hold their own
    tree's rectangles, not blocks."""
    levels = Level(1, 1024), Level(2, 512), Level(4, 512)
    args = inputs(levels, batch=2, heads=4, kv_heads=2, head_dim=128)
    layout = fused_attention.lay_out(levels)
    of_a_block = 2 * 2 * 4 * layout.block**2 * 128  # 2 M N K, rows, heads
    once = fused_attention.blocks(layout).sum() * of_a_block

    def total(fn: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(fn(q, k, v, args[3], levels=levels, softcap=None))

    one = partial(total, SPLASH)
    gradient = partial(jax.value_and_grad, argnums=(0, 1, 2))
    forward, with_gradient = count_flops(one, *args[:3]), count_flops(gradient(one), *args[:3])
    assert forward == 2 * once
    # beside the kernels the backward pass has a product of each query's result with its gradient
    assert with_gradient == pytest.approx(9 * once, rel=1e-3)
    assert count_flops(gradient(jax.checkpoint(one)), *args[:3]) == pytest.approx(
        11 * once, rel=1e-3
    )
    with jax.set_mesh(make_mesh(2, 1, 4)):  # heads that do not divide are on each device whole
        assert count_flops(one, *args[:3]) == 4 * forward
    # here nodes fill blocks: a block on the diagonal is computed as a whole, by the chunks in
    # quarters
    by_chunks = partial(total, chunked)
    assert forward == pytest.approx(count_flops(by_chunks, *args[:3]), rel=0.25)
    assert with_gradient == pytest.approx(count_flops(gradient(by_chunks), *args[:3]), rel=0.35)
