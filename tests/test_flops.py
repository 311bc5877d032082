"""The count of FLOPs against counts by hand, and against XLA's on a program without loops."""

import jax
import jax.numpy as jnp
import pytest

from popi_jax.flops import flops

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
    assert flops(jnp.matmul, X, W) == ONE
    assert flops(jax.jit(jnp.matmul), X, W) == ONE
    shape = jax.ShapeDtypeStruct
    batched = flops(lambda a, b: jnp.einsum("bij,bkj->bik", a, b), shape((3, 4, 8), "float32"), shape((3, 5, 8), "f4"))
    assert batched == 3 * 2 * 4 * 5 * 8
    assert flops(jnp.tanh, X) == 0


def test_loops_count_as_often_as_they_run() -> None:
    assert flops(chain, X, W) == 5 * ONE
    assert flops(lambda x, w: jax.lax.scan(lambda x, _: (chain(x, w), None), x, None, length=3)[0], X, W) == 15 * ONE
    assert flops(loop, X, W) == ONE
    assert flops(loop, X, W, while_trips=7) == 7 * ONE


def test_a_gradient_costs_three_times_the_function() -> None:
    both = jax.value_and_grad(total, argnums=(0, 1))
    assert flops(both, X, W) == 3 * ONE
    assert flops(jax.grad(total, argnums=1), X, W) == 2 * ONE  # nothing needs the gradient of x
    deep = jax.grad(lambda x, w: jnp.sum(chain(x, w)), argnums=(0, 1))
    assert flops(deep, X, W) == 15 * ONE


def test_what_is_computed_again_counts_again() -> None:
    """Of two layers, each kept by nothing but its input, the backward pass computes both anew."""
    layer = jax.checkpoint(lambda x, w: jnp.tanh(jnp.tanh(x @ w) @ w))
    both = jax.value_and_grad(lambda x, w: jnp.sum(layer(x, w)), argnums=(0, 1))
    assert flops(both, X, W) == 8 * ONE


def test_the_most_expensive_branch_counts() -> None:
    assert flops(branches, X, W) == 2 * ONE


def test_what_nothing_needs_does_not_count() -> None:
    def unused(x: jax.Array, w: jax.Array) -> jax.Array:
        _ = x @ w
        return x

    assert flops(unused, X, W) == 0
    assert flops(jax.jit(unused), X, W) == 0


def test_custom_gradients() -> None:
    @jax.custom_vjp
    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))
    assert flops(product, X, W) == ONE
    assert flops(jax.value_and_grad(lambda x, w: jnp.sum(product(x, w)), argnums=(0, 1)), X, W) == 3 * ONE


def test_all_devices_of_a_mesh_count() -> None:
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = jax.sharding.PartitionSpec("rows"), jax.sharding.PartitionSpec()
    spread = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(rows, whole), out_specs=rows)
    assert flops(spread, X, W) == ONE


def test_agrees_with_xla_where_nothing_loops() -> None:
    def network(x: jax.Array, w: jax.Array) -> jax.Array:
        for _ in range(3):
            x = x @ w
        return jnp.sum(x)

    x, w = jnp.ones((64, 128)), jnp.ones((128, 128))
    program = jax.jit(jax.value_and_grad(network, argnums=(0, 1)))
    counted = program.lower(x, w).compile().cost_analysis()["flops"]
    assert flops(program, x, w) == pytest.approx(counted, rel=0.02)
