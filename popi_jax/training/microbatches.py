"""An update in parts, to save memory: what is computed for each user, and gradients that are sums
over users.

Part j of n holds the users j, n + j, 2n + j, ... so that each device keeps the users that it has.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from popi_jax.arrays import Metrics, Params
from popi_jax.models.packing import Budget

Choice = Callable[
    [Any, Callable[[Budget | None], PyTree]], PyTree
]  # (part, compute) -> compute(its budget)


def split(batch: PyTree, num: int) -> PyTree:
    """[users ...] -> [num users/num ...]; num divides users."""
    return jax.tree.map(
        lambda x: x.reshape(x.shape[0] // num, num, *x.shape[1:]).swapaxes(0, 1), batch
    )


def join(parts: PyTree) -> PyTree:
    """Inverse of `split`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), parts)


def by_parts(function: Callable[[Any], PyTree], batch: PyTree, num: int) -> PyTree:
    """function(batch), which has a row for each user, from one part after the other."""
    return function(batch) if num == 1 else join(jax.lax.map(function, split(batch, num)))


def summed_gradients(
    loss_fn: Callable[
        [Params, Any, Budget | None], tuple[Float[Array, ""], tuple[Metrics, PyTree]]
    ],
    params: Params,
    batch: PyTree,
    num: int,
    choose: Choice,
) -> tuple[Params, Metrics, PyTree]:
    """Gradient of the sum of loss_fn(params, part, budget) over the parts, the sums of their
    metrics, and what has a row for each user. `choose` says by which budget a part is computed
    (dense.within).

    loss_fn returns its loss and (metrics, rows of users). The loss of a part is its sum over users
    divided by a weight of the whole batch, so the losses of the parts add up to that of the batch:
    means of means never occur."""

    def gradient(params: Params, part: Any) -> tuple[Params, tuple[Metrics, PyTree]]:
        return choose(part, lambda budget: jax.grad(loss_fn, has_aux=True)(params, part, budget))

    if num == 1:
        grads, (metrics, rows) = gradient(params, batch)
        return grads, metrics, rows

    def add(total: tuple[Params, Metrics], part: Any) -> tuple[tuple[Params, Metrics], PyTree]:
        grads, (metrics, rows) = gradient(params, part)
        return jax.tree.map(jnp.add, total, (grads, metrics)), rows

    parts = split(batch, num)
    grads, (metrics, _) = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (grads, metrics))
    (grads, metrics), rows = jax.lax.scan(add, zeros, parts)
    return grads, metrics, join(rows)
