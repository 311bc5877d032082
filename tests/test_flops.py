"""The count of FLOPs against counts by hand, and against XLA's on a program without loops."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from popi_jax.arrays import Frozen, Tokens, UserBatch
from popi_jax.flops import count_flops, count_jaxpr_flops, count_scope_flops
from popi_jax.models.decode import Sampling
from popi_jax.models.presets import PRESETS
from popi_jax.models.transformer import init_boxed, unbox
from popi_jax.popi.rollout import PromptTokens
from popi_jax.popi.update import popi_update
from popi_jax.training import setup
from tests.training.small import make_config, replace, roles_of

X, W = jnp.ones((4, 8)), jnp.ones((8, 8))
ONE = 2 * 4 * 8 * 8  # X @ W


def chain(x: jax.Array, w: jax.Array, times: int = 5) -> jax.Array:
    return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=times)[0]


def loop(x: jax.Array, w: jax.Array) -> jax.Array:
    return jax.lax.while_loop(lambda s: s[0] < 7, lambda s: (s[0] + 1, s[1] @ w), (0, x))[1]


def branches(x: jax.Array, w: jax.Array) -> jax.Array:
    return jax.lax.cond(x[0, 0] > 0, lambda x: x @ w, lambda x: x @ w @ w, x)


def total(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.sum(jnp.tanh(x @ w))


def test_products() -> None:
    assert count_flops(jnp.matmul, X, W) == ONE
    assert count_flops(jax.jit(jnp.matmul), X, W) == ONE
    shape = jax.ShapeDtypeStruct
    batched = count_flops(
        lambda a, b: jnp.einsum("bij,bkj->bik", a, b),
        shape((3, 4, 8), "float32"),
        shape((3, 5, 8), "f4"),
    )
    assert batched == 3 * 2 * 4 * 5 * 8
    assert count_flops(jnp.tanh, X) == 0


def test_loops_count_as_often_as_they_run() -> None:
    assert count_flops(chain, X, W) == 5 * ONE
    assert (
        count_flops(
            lambda x, w: jax.lax.scan(lambda x, _: (chain(x, w), None), x, None, length=3)[0], X, W
        )
        == 15 * ONE
    )
    assert count_flops(loop, X, W) == ONE
    assert count_flops(loop, X, W, while_trips=7) == 7 * ONE


def test_a_gradient_costs_three_times_the_function() -> None:
    both = jax.value_and_grad(total, argnums=(0, 1))
    assert count_flops(both, X, W) == 3 * ONE
    assert (
        count_flops(jax.grad(total, argnums=1), X, W) == 2 * ONE
    )  # nothing needs the gradient of x
    deep = jax.grad(lambda x, w: jnp.sum(chain(x, w)), argnums=(0, 1))
    assert count_flops(deep, X, W) == 15 * ONE


def test_what_is_computed_again_counts_again() -> None:
    """Of two layers, each kept by nothing but its input, the backward pass computes both anew."""
    layer = jax.checkpoint(lambda x, w: jnp.tanh(jnp.tanh(x @ w) @ w))
    both = jax.value_and_grad(lambda x, w: jnp.sum(layer(x, w)), argnums=(0, 1))
    assert count_flops(both, X, W) == 8 * ONE


def test_the_most_expensive_branch_counts() -> None:
    assert count_flops(branches, X, W) == 2 * ONE


def test_what_nothing_needs_does_not_count() -> None:
    def unused(x: jax.Array, w: jax.Array) -> jax.Array:
        _ = x @ w
        return x

    assert count_flops(unused, X, W) == 0
    assert count_flops(jax.jit(unused), X, W) == 0


def test_custom_gradients() -> None:
    @jax.custom_vjp
    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))
    assert count_flops(product, X, W) == ONE
    assert (
        count_flops(jax.value_and_grad(lambda x, w: jnp.sum(product(x, w)), argnums=(0, 1)), X, W)
        == 3 * ONE
    )


def test_all_devices_of_a_mesh_count() -> None:
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = jax.sharding.PartitionSpec("rows"), jax.sharding.PartitionSpec()
    spread = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(rows, whole), out_specs=rows)
    assert count_flops(spread, X, W) == ONE


def test_axes_that_are_not_mapped_are_not_counted_again() -> None:
    mesh = jax.make_mesh((4, 2), ("rows", "rest"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rows, whole = jax.sharding.PartitionSpec("rows"), jax.sharding.PartitionSpec()
    spread = jax.shard_map(
        jnp.matmul, mesh=mesh, in_specs=(rows, whole), out_specs=rows, axis_names={"rows"}
    )
    assert count_flops(spread, X, W) == ONE


def test_agrees_with_xla_where_nothing_loops() -> None:
    def network(x: jax.Array, w: jax.Array) -> jax.Array:
        for _ in range(3):
            x = x @ w
        return jnp.sum(x)

    x, w = jnp.ones((64, 128)), jnp.ones((128, 128))
    program = jax.jit(jax.value_and_grad(network, argnums=(0, 1)))
    counted = program.lower(x, w).compile().cost_analysis()["flops"]
    assert count_flops(program, x, w) == pytest.approx(counted, rel=0.02)


# The update of a released model by hand. Letters as in models/transformer.py; C, T, A, Z: slots of
# a context, a turn, an answer, a summary.
LLAMA = dataclasses.replace(PRESETS["llama-3.1-8b"], dtype="bfloat16", remat="full")
L, D, N, KV, H, F, V = 32, 4096, 32, 8, 128, 14336, 128256
USERS, PAIRS, GROUP, C, T, A, Z, PREFIX, INSTRUCTION = 4, 4, 8, 512, 128, 512, 128, 8, 16
MATRICES = D * (N + 2 * KV) * H + N * H * D + 3 * D * F  # weights of a layer that a token meets
OF_HEAD = 2 * D * V  # for the logits of one token


def seen(levels: list[tuple[int, int, int]]) -> int:
    """Pairs of a query and a key whose score is computed. levels: (nodes, slots of each, slots
    above each).

    Of its own node a chunk of queries scores the slots up to its own end: of a node up to 128 slots
    long all of them, of a longer one those before the end of each part of 128 queries, or of 1/16
    of the level where that is more."""
    total = 0
    for nodes, length, above in levels:
        part = max(128, -(-nodes * length // 16))
        parts = -(-length // part)
        size = -(-length // parts)
        ends = [min(size * (i + 1), length) for i in range(parts)]
        own = sum((end - start) * end for start, end in zip([0, *ends], ends, strict=False))
        total += nodes * (own + length * above)
    return total


def tree(context: int, turns: int, turn: int, answers: int, answer: int) -> tuple[int, int]:
    """(tokens, pairs that see each other) of answers to turns behind one context; the last token is
    not read."""
    read, below = answer - 1, turns * answers
    levels = [(1, context, 0), (turns, turn, context), (below, read, context + turn)]
    return context + turns * turn + below * read, seen(levels)


def forward(tokens: int, pairs: int) -> int:
    """Of all layers: 2 for each weight and token; scores and values, 2 N H each, for each pair."""
    return L * (2 * tokens * MATRICES + 4 * N * H * pairs)


def backward(tokens: int, pairs: int) -> int:
    """Two products for each of the forward pass; before that all of the forward pass again but the
    last product, whose result no gradient needs, and within it attention once more, as the scores
    of a chunk are not kept either."""
    return L * (2 * tokens * (3 * MATRICES - D * F) + 4 * 4 * N * H * pairs)


def pairs_of_users(context: int, *, trained: bool) -> int:
    """Log-probs of the replies behind one context per user; with a gradient the head computes its
    logits twice."""
    packed, logits = tree(context, PAIRS, T, 2, A), PAIRS * 2 * A * OF_HEAD
    return USERS * (forward(*packed) + logits + (backward(*packed) + 3 * logits if trained else 0))


def drawn(group: int) -> int:
    """Summaries of full length: one pass over the signals, then a token of every sample at a
    time."""
    step = L * (2 * MATRICES + 4 * N * H * (C + INSTRUCTION + Z + 1)) + OF_HEAD
    prefill = forward(C + INSTRUCTION, seen([(1, C, 0), (1, INSTRUCTION, C)])) + OF_HEAD
    return USERS * (prefill + group * Z * step)


def summaries_trained() -> int:
    packed, logits = tree(C, 1, INSTRUCTION, GROUP, Z), GROUP * Z * OF_HEAD
    return USERS * (2 * forward(*packed) + backward(*packed) + (1 + 4) * logits)


@pytest.fixture(scope="module")
def both_turns() -> jax.extend.core.Jaxpr:
    """The update of Llama 3.1 8B, of one role or the other, from shapes alone."""
    cfg = replace(replace(make_config(), "batch", users=USERS, pairs=PAIRS), "data", summary_len=Z)
    cfg = replace(cfg, "inference", group_size=GROUP)
    cfg = replace(cfg, "schedule", phases=("alternate 1:1 2",))
    prompts, sampling = PromptTokens((1,) * PREFIX, (2,) * INSTRUCTION), Sampling(1.0, Z, 10)
    made = setup.plan_update(cfg, LLAMA, prompts, sampling, num_users=10**9)

    def shape(*dims: int, dtype: str = "int32") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype)

    def tokens(length: int, *rows: int) -> Tokens:
        return Tokens(shape(*rows, length), shape(*rows))

    both = USERS, PAIRS
    replies = tokens(A, *both), tokens(A, *both), shape(*both, dtype="bool"), shape(*both)
    users = UserBatch(shape(USERS), tokens(C, USERS), tokens(T, *both), *replies)
    params = unbox(jax.eval_shape(functools.partial(init_boxed, cfg=LLAMA), jax.random.key(0)))
    start = functools.partial(setup.new_state, roles=roles_of(made))
    state = jax.eval_shape(start, params, params, jax.random.key(0))
    update = functools.partial(popi_update, **made._asdict())
    return jax.make_jaxpr(update)(state, Frozen(params, params), users).jaxpr


def test_the_generators_turn_by_hand(both_turns: jax.extend.core.Jaxpr) -> None:
    """A summary of each user, the reference behind no summary, and the preference step."""
    step = pairs_of_users(PREFIX + Z, trained=True)
    expected = drawn(1) + pairs_of_users(PREFIX, trained=False) + step
    scopes = ("sampling", "reference", "generator_step")
    found = count_scope_flops(both_turns, scopes, while_trips=Z, branch=0)
    assert sum(found.values()) == pytest.approx(expected, rel=0.01)
    assert found["generator_step"] == pytest.approx(step, rel=0.01)
    assert set(found) == set(scopes)


def test_of_both_turns_the_dearer_counts(both_turns: jax.extend.core.Jaxpr) -> None:
    """That of the inference model: behind each summary the generator scores the replies without a
    gradient."""
    rewards = GROUP * pairs_of_users(PREFIX + Z, trained=False)
    expected = drawn(GROUP) + pairs_of_users(PREFIX, trained=False) + rewards + summaries_trained()
    found = count_jaxpr_flops(both_turns, while_trips=Z)
    assert found == pytest.approx(expected, rel=0.01)
    assert found == sum(count_scope_flops(both_turns, (), while_trips=Z, branch=1).values())
