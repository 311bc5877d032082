"""Reads the text of a compiled program: the kind of work of each operation, and the line of the
source behind it."""

from typing import NamedTuple

from popi_jax.planning import hlo

PRODUCTS = {"dot", "convolution"}
MOVES = {
    *("copy", "slice", "dynamic-slice", "dynamic-update-slice", "concatenate", "transpose"),
    *("reverse", "pad"),
}
LOOKUPS = {"gather", "scatter"}
CONTAINERS = {"while", "call", "conditional"}  # the time of what they run is counted there
_NOTHING = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element"}  # never run
_FREE = _NOTHING | {"reshape", "broadcast", "iota", "convert"}


class Operation(NamedTuple):
    kind: str
    asked_by: str  # path of names in the program, as JAX gave them
    source: str  # file:line, where known


def name_kind(opcodes: set[str], asked_by: str = "") -> str:
    """The kind of an operation made of these opcodes: the costliest of them names it."""
    if opcodes & PRODUCTS:
        return "matrix products"
    if opcodes & LOOKUPS:
        return "lookups"
    if "sort" in opcodes or "top-k" in opcodes:
        return "sorting"
    if "rng-bit-generator" in opcodes or "random" in asked_by or "threefry" in asked_by:
        return "random numbers"
    working = opcodes - _FREE
    if working <= MOVES:
        return "copies and slices" if working else "fills and conversions"
    if "attention" in asked_by and "norm" not in asked_by:
        return "attention, element by element"
    if "reduce" in opcodes or "reduce-window" in opcodes:
        return "sums and maxima"
    return "other, element by element"


def read_operations(text: str) -> dict[str, Operation]:
    """Operation name -> what it is, containers left out. `text` is `compiled.as_text()`."""
    module = hlo.parse(text)
    found = {}
    for computation in module.computations.values():
        for x in computation.instructions.values():
            if x.opcode in CONTAINERS or x.opcode in _NOTHING:
                continue
            fused = module.computations.get(x.find_computation("calls"))
            opcodes = {y.opcode for y in fused.instructions.values()} if fused else {x.opcode}
            source = next(iter(module.find_lines(x)), "")
            found[x.name] = Operation(name_kind(opcodes, x.op_name), x.op_name, source)
    return found
