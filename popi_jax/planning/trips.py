"""How often the body of a `while` runs, read from its condition: the text of programs for TPUs does
not say it."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from popi_jax.planning.hlo import Computation, Instruction, Module


class _Element(NamedTuple):
    """An entry of the tuple that a loop carries."""

    place: int


class _Scope(NamedTuple):
    """A computation and, of a fusion, where its parameters come from."""

    computation: Computation
    outer: "_Scope | None" = None
    operands: tuple[str, ...] = ()


_Value = int | _Element | None
_SAME = {"copy", "bitcast", "convert", "reshape"}


def count_trips(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """Trips of a loop that counts up or down to a constant; with more conditions, such as "and not
    all are done", the most that there can be. None where it counts otherwise."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    condition = module.computations[loop.find_computation("condition")]
    found = []
    for left, right, direction in _find_comparisons(module, _Scope(condition), condition.root.name):
        if not isinstance(left, _Element) and isinstance(right, _Element):
            left, right = right, left
            direction = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}.get(direction, direction)
        if isinstance(left, _Element):
            number = _count_to_bound(module, computation, loop, left, right, direction)
            found += [number] if number is not None else []
    return min(found, default=None)


def _count_to_bound(
    module: Module,
    computation: Computation,
    loop: Instruction,
    counter: _Element,
    bound: _Value,
    direction: str,
) -> int | None:
    start, step = _find_start(module, computation, loop, counter), _find_step(module, loop, counter)
    if isinstance(bound, _Element):
        bound = (
            _find_start(module, computation, loop, bound)
            if _find_step(module, loop, bound) == 0
            else None
        )
    if not isinstance(bound, int) or not step:
        return None
    distance = bound - (start if isinstance(start, int) else 0)
    distance += {"LE": 1, "GE": -1}.get(direction, 0)
    if direction in ("LT", "LE", "GT", "GE", "NE"):
        return max(0, -(-distance // step))
    return None


def _find_comparisons(
    module: Module, scope: _Scope, name: str
) -> Iterator[tuple[_Value, _Value, str]]:
    """Those that all must hold for the loop to go on."""
    x = scope.computation.instructions[name]
    if x.opcode == "compare":
        left, right = (_find_value(module, scope, operand) for operand in x.operands)
        yield left, right, _read_direction(x)
    elif x.opcode == "fusion":
        inner = module.computations[x.find_computation("calls")]
        yield from _find_comparisons(module, _Scope(inner, scope, x.operands), inner.root.name)
    elif x.opcode in ("and", *_SAME):
        for operand in x.operands:
            yield from _find_comparisons(module, scope, operand)
    elif x.opcode == "parameter" and scope.outer is not None:
        yield from _find_comparisons(module, scope.outer, scope.operands[int(x.inner)])


def _read_direction(x: Instruction) -> str:
    found = re.search(r"direction=(\w+)", x.attributes)
    return found[1] if found else ""


def _find_value(module: Module, scope: _Scope, name: str) -> _Value:
    """A constant, an entry of the carried tuple, or None for anything else."""
    x = scope.computation.instructions[name]
    if x.opcode == "constant" and re.fullmatch(r"-?\d+", x.inner):
        return int(x.inner)
    if x.opcode in _SAME:
        return _find_value(module, scope, x.operands[0])
    if x.opcode == "parameter" and scope.outer is not None:
        return _find_value(module, scope.outer, scope.operands[int(x.inner)])
    if x.opcode == "get-tuple-element":
        of = scope.computation.instructions[x.operands[0]]
        if of.opcode == "parameter" and scope.outer is None:
            return _Element(_read_index(x))
    return None


def _read_index(x: Instruction) -> int:
    found = re.search(r"index=(\d+)", x.attributes)
    assert found is not None, x.name
    return int(found[1])


def _find_start(
    module: Module, computation: Computation, loop: Instruction, element: _Element
) -> _Value:
    """Its first value, where it is a constant."""
    carried = computation.instructions[loop.operands[0]]
    if carried.opcode != "tuple":
        return None
    value = _find_value(module, _Scope(computation), carried.operands[element.place])
    return value if isinstance(value, int) else None


def _find_step(module: Module, loop: Instruction, element: _Element) -> int | None:
    """What each trip adds to it: 0 for a constant of the loop, None where it is no constant."""
    body = module.computations[loop.find_computation("body")]
    if body.root.opcode != "tuple":
        return None
    return _sum_steps(module, _Scope(body), body.root.operands[element.place], element)


def _sum_steps(module: Module, scope: _Scope, name: str, element: _Element) -> int | None:
    if _find_value(module, scope, name) == element:
        return 0
    x = scope.computation.instructions[name]
    if x.opcode == "fusion" or x.opcode == "get-tuple-element":
        fusion = x if x.opcode == "fusion" else scope.computation.instructions[x.operands[0]]
        if fusion.opcode != "fusion":
            return None
        inner = module.computations[fusion.find_computation("calls")]
        result = inner.root.name if x is fusion else inner.root.operands[_read_index(x)]
        return _sum_steps(module, _Scope(inner, scope, fusion.operands), result, element)
    if x.opcode in _SAME:
        return _sum_steps(module, scope, x.operands[0], element)
    if x.opcode in ("add", "subtract"):
        for place, (first, second) in enumerate((x.operands, x.operands[::-1])):
            before, constant = (
                _sum_steps(module, scope, first, element),
                _find_value(module, scope, second),
            )
            if (
                before is not None
                and isinstance(constant, int)
                and (x.opcode == "add" or place == 0)
            ):
                return before + (constant if x.opcode == "add" else -constant)
    if x.opcode == "parameter" and scope.outer is not None:
        return _sum_steps(module, scope.outer, scope.operands[int(x.inner)], element)
    return None
