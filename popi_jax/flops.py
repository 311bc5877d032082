"""FLOPs of a function from its jaxpr: matrix products alone, each loop as often as it runs.

XLA's own count takes the body of a loop once, so it is of no use for a model whose layers are one
scan. What nothing depends on is not counted, as XLA removes it; what is computed again in the
backward pass is, as it is computed."""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Jaxpr, jaxprs_in_params
from jax.interpreters import partial_eval

# A function under jit of such a name holds kernels that skip steps of their grids: over m rows of
# blocks they run n. A Pallas call says of none of its steps whether it runs, as a table among its
# inputs decides.
RUNS = re.compile(r"_runs_(\d+)_of_(\d+)_rows$")


def flops(fn: Callable[..., Any], *args: Any, while_trips: int = 1, **kwargs: Any) -> int:
    """2 M N K for each product of matrices in one call of `fn`; what goes element by element is not
    counted.

    Arguments may be arrays or shapes (`jax.ShapeDtypeStruct`). A `while_loop` is taken to run
    `while_trips` times: the jaxpr does not say how often. Of a `cond` the most expensive branch
    counts; under `shard_map` the products of all devices along its axes count. A kernel in Pallas
    counts each step of its grid or, where `RUNS` says so, each that runs. Other kernels written by
    hand (cuDNN) and convolutions are not counted."""
    return of_jaxpr(jax.make_jaxpr(fn)(*args, **kwargs).jaxpr, while_trips=while_trips)


def flops_by_scope(
    fn: Callable[..., Any], *args: Any, scopes: Sequence[str], while_trips: int = 1, **kwargs: Any
) -> dict[str, int]:
    """The same for each `jax.named_scope` of these names, the outermost where they lie in one
    another; "": the rest."""
    jaxpr = jax.make_jaxpr(fn)(*args, **kwargs).jaxpr
    return dict(_count(_live(jaxpr), while_trips, None, tuple(scopes), ""))


def of_jaxpr(jaxpr: Jaxpr, *, while_trips: int = 1) -> int:
    """The FLOPs of a jaxpr whose outputs are all needed."""
    return sum(_count(_live(jaxpr), while_trips, None, (), "").values())


def _live(jaxpr: Jaxpr) -> Jaxpr:
    return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]


def _count(
    jaxpr: Jaxpr,
    while_trips: int,
    runs: tuple[int, int] | None,
    scopes: tuple[str, ...],
    scope: str,
) -> Counter[str]:
    total: Counter[str] = Counter()
    for eqn in jaxpr.eqns:
        total.update(_of_equation(eqn, while_trips, runs, scopes, scope))
    return total


def _of_equation(
    eqn: Any, while_trips: int, runs: tuple[int, int] | None, scopes: tuple[str, ...], scope: str
) -> Counter[str]:
    name, params = eqn.primitive.name, eqn.params
    if not scope and scopes:
        inside = str(eqn.source_info.name_stack).split("/")
        scope = next((part for part in inside if part in scopes), "")
    if name == "dot_general":
        return Counter({scope: _dot(eqn)})
    if found := RUNS.search(str(params.get("name", ""))):
        runs = int(found[1]), int(found[2])
    counts = [
        _count(_live(inner), while_trips, runs, scopes, scope) for inner in jaxprs_in_params(params)
    ]
    if not counts:
        return Counter()
    if name == "cond":
        return max(counts, key=lambda count: sum(count.values()))
    times = {
        "scan": lambda: params["length"],
        "while": lambda: while_trips,
        # shapes inside are of one device along the axes that are mapped here, of all along the
        # others
        "shard_map": lambda: math.prod(
            params["mesh"].shape[axis] for axis in params["newly_manual_axes"]
        ),
        "pallas_call": lambda: _steps(params["grid_mapping"].grid, runs),
    }
    number = times.get(name, lambda: 1)()
    total: Counter[str] = Counter()
    for count in counts:
        total.update({part: number * value for part, value in count.items()})
    return total


def _steps(grid: tuple[int, ...], runs: tuple[int, int] | None) -> int:
    """Steps of a grid that run: its last axis goes along a row of blocks, another over the rows."""
    if runs is None:
        return math.prod(grid)
    some, rows = runs
    return math.prod(grid) // (rows * grid[-1]) * some


def _dot(eqn: Any) -> int:
    """Every number of the output is a sum over the contracted axes: a product and an addition
    each."""
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
