"""FLOPs of a function from its jaxpr: matrix products alone, each loop as often as it runs.

XLA's own count takes the body of a loop once, so it is of no use for a model whose layers are one scan. What nothing
depends on is not counted, as XLA removes it; what is computed again in the backward pass is, as it is computed.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Jaxpr, jaxprs_in_params
from jax.interpreters import partial_eval


def flops(fn: Callable[..., Any], *args: Any, while_trips: int = 1, **kwargs: Any) -> int:
    """2 M N K for each product of matrices in one call of `fn`; what goes element by element is not counted.

    Arguments may be arrays or shapes (`jax.ShapeDtypeStruct`). A `while_loop` is taken to run `while_trips` times: the
    jaxpr does not say how often. Of a `cond` the most expensive branch counts; under `shard_map` the products of all
    devices along its axes count. Kernels written by hand (Pallas) and convolutions are not counted.
    """
    return of_jaxpr(jax.make_jaxpr(fn)(*args, **kwargs).jaxpr, while_trips=while_trips)


def of_jaxpr(jaxpr: Jaxpr, *, while_trips: int = 1) -> int:
    """The FLOPs of a jaxpr whose outputs are all needed."""
    live, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _count(live, while_trips)


def _count(jaxpr: Jaxpr, while_trips: int) -> int:
    return sum(_of_equation(eqn, while_trips) for eqn in jaxpr.eqns)


def _of_equation(eqn: Any, while_trips: int) -> int:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        return _dot(eqn)
    counts = [of_jaxpr(inner, while_trips=while_trips) for inner in jaxprs_in_params(params)]
    if not counts:
        return 0
    if name == "cond":
        return max(counts)
    times = {
        "scan": lambda: params["length"],
        "while": lambda: while_trips,
        # shapes inside are of one device along the axes that are mapped here, of all along the others
        "shard_map": lambda: math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"]),
    }
    return times.get(name, lambda: 1)() * sum(counts)


def _dot(eqn: Any) -> int:
    """Every number of the output is a sum over the contracted axes: a product and an addition each."""
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
