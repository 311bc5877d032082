"""FLOPs of a function from its jaxpr: matrix products alone, each loop as often as it runs.

XLA's own count takes the body of a loop once, so it is of no use for a model whose layers are one
scan. What nothing depends on is not counted, as XLA removes it; what the backward pass computes
again is counted again."""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import Jaxpr, jaxprs_in_params
from jax.interpreters import partial_eval

# A function under jit of such a name holds kernels that skip steps of their grids: over m rows of
# blocks they run n. A Pallas call says of none of its steps whether it runs, as a table among its
# inputs decides.
RUNS = re.compile(r"_runs_(\d+)_of_(\d+)_rows$")


class _Rules(NamedTuple):
    while_trips: int
    scopes: Sequence[str]
    branch: int | None  # of the outermost cond; None: the most expensive


def count_flops(fn: Callable[..., Any], *args: Any, while_trips: int = 1) -> int:
    """2 M N K for each product of matrices in one call of `fn`; elementwise arithmetic is not
    counted.

    Arguments may be arrays or shapes (`jax.ShapeDtypeStruct`). A `while_loop` is taken to run
    `while_trips` times: the jaxpr does not say how often. Of a `cond` the most expensive branch
    counts; under `shard_map` the products of all devices along its axes count. A kernel in Pallas
    counts each step of its grid or, where `RUNS` says so, each that runs. Other kernels written by
    hand (cuDNN) and convolutions are not counted."""
    return count_jaxpr_flops(jax.make_jaxpr(fn)(*args).jaxpr, while_trips=while_trips)


def count_jaxpr_flops(jaxpr: Jaxpr, *, while_trips: int = 1) -> int:
    """The FLOPs of a jaxpr whose outputs are all needed."""
    return sum(count_scope_flops(jaxpr, (), while_trips=while_trips).values())


def count_scope_flops(
    jaxpr: Jaxpr, scopes: Sequence[str], *, while_trips: int = 1, branch: int | None = None
) -> dict[str, int]:
    """The same for each `jax.named_scope` of these names, the outermost where they lie in one
    another; "": the rest. `branch` is the number of the branch that the outermost `cond` takes."""
    return dict(_count(_prune(jaxpr), _Rules(while_trips, scopes, branch), "", None))


def _prune(jaxpr: Jaxpr) -> Jaxpr:
    return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]


def _count(jaxpr: Jaxpr, rules: _Rules, scope: str, runs: tuple[int, int] | None) -> Counter[str]:
    total: Counter[str] = Counter()
    for eqn in jaxpr.eqns:
        total.update(_count_equation(eqn, rules, scope, runs))
    return total


def _count_equation(
    eqn: Any, rules: _Rules, scope: str, runs: tuple[int, int] | None
) -> Counter[str]:
    name, params = eqn.primitive.name, eqn.params
    if not scope:
        inside = str(eqn.source_info.name_stack).split("/")
        scope = next((word for word in inside if word in rules.scopes), "")
    if name == "dot_general":
        return Counter({scope: _count_product(eqn)})
    if found := RUNS.search(str(params.get("name", ""))):
        runs = int(found[1]), int(found[2])
    within = rules._replace(branch=None) if name == "cond" else rules
    counts = [_count(_prune(inner), within, scope, runs) for inner in jaxprs_in_params(params)]
    if not counts:
        return Counter()
    if name == "cond":
        if rules.branch is not None:
            return counts[rules.branch]
        return max(counts, key=lambda count: sum(count.values()))
    times = _count_runs(name, params, rules, runs)
    total: Counter[str] = Counter()
    for count in counts:
        total.update({word: times * value for word, value in count.items()})
    return total


def _count_runs(name: str, params: Any, rules: _Rules, runs: tuple[int, int] | None) -> int:
    """How often an equation runs the jaxprs that it holds."""
    if name == "scan":
        return params["length"]
    if name == "while":
        return rules.while_trips
    if name == "shard_map":
        # shapes inside are of one device along the axes that are mapped here, of all along the
        # others
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    if name == "pallas_call":
        return _count_grid_steps(params["grid_mapping"].grid, runs)
    return 1


def _count_grid_steps(grid: tuple[int, ...], runs: tuple[int, int] | None) -> int:
    """Steps of a grid that run: its last axis goes along a row of blocks, another over the rows."""
    if runs is None:
        return math.prod(grid)
    some, rows = runs
    return math.prod(grid) // (rows * grid[-1]) * some


def _count_product(eqn: Any) -> int:
    """Every number of the output is a sum over the contracted axes: a product and an addition
    each."""
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
