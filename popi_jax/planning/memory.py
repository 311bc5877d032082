"""Bytes of the main memory that one instruction of a compiled program reads and writes.

An instruction reads its operands and writes its result, where they lie in the main memory (space 0) and not in one of
the chip's. Of an operand that it only slices it reads the slice, of a result that it only updates it writes the update:
so a loop over stacked layers reads one layer each time, whether the slice stands alone or inside of a fusion.
"""

from popi_jax.planning.hlo import Array, Computation, Instruction, Module

_SLICES = {"slice", "dynamic-slice", "gather"}
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # place of the update among the operands
_RENAMES = {"bitcast", "reshape"}
_NOTHING = {"parameter", "constant", "iota", "partition-id", "rng-get-and-update-state"}
# a part of their result needs all of their operands; everything else goes element by element
_WHOLE = {
    "convolution",
    "dot",
    "reduce",
    "reduce-window",
    "sort",
    "custom-call",
    "fft",
    "select-and-scatter",
    "scatter",
}
_WHOLE |= {"all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute", "topk", "cholesky"}


def accessed(module: Module, computation: Computation, x: Instruction) -> float:
    """Bytes of one execution of `x`, which is no container (`while`, `conditional`, `call`)."""
    operands = [computation.instructions[name] for name in x.operands]
    if x.opcode == "custom-call" and '"AllocateBuffer"' in x.attributes:
        return 0.0
    if x.opcode in ("copy-start", "send", "recv"):
        written, operands = x.arrays[: 1 if x.opcode != "send" else 0], operands[:1]
        return _bytes(written) + sum(_bytes(operand.arrays) for operand in operands if x.opcode != "recv")
    if x.opcode.endswith("-start"):
        written = x.arrays[len(operands) : 2 * len(operands)]
        return _bytes(written) + sum(_bytes(operand.arrays) for operand in operands)
    read = 0.0
    for operand, needed in zip(operands, _needs(module, computation, x), strict=True):
        read += _bytes(operand.arrays) * min(needed / max(operand.elements, 1), 1.0)
    return read + _written(module, computation, x)


def in_place_update(module: Module, computation: Computation, x: Instruction) -> int | None:
    """The elements that `x` changes of an array that it takes and gives back; None if it makes its result anew."""
    if x.opcode == "fusion":
        inner = module.computations[x.attribute("calls")]
        return _update(module, inner, inner.root)
    return _update(module, computation, x) if x.opcode in _UPDATES else None


def _update(module: Module, computation: Computation, x: Instruction) -> int | None:
    """The same of a value inside of a fusion, where a change of shape moves nothing."""
    if x.opcode in _RENAMES:
        return _update(module, computation, computation.instructions[x.operands[0]])
    if x.opcode in _UPDATES and _is_handed_in(module, computation, computation.instructions[x.operands[0]]):
        return computation.instructions[x.operands[_UPDATES[x.opcode]]].elements
    return in_place_update(module, computation, x) if x.opcode == "fusion" else None


def _is_handed_in(module: Module, computation: Computation, x: Instruction) -> bool:
    """Whether it is an operand of the fusion, or at the top level whatever was made before."""
    if x.opcode in _RENAMES:
        return _is_handed_in(module, computation, computation.instructions[x.operands[0]])
    if x.opcode == "fusion":
        inner = module.computations[x.attribute("calls")]
        if not _is_handed_in(module, inner, inner.root):
            return False
        return all(_is_handed_in(module, computation, computation.instructions[name]) for name in x.operands[:1])
    return x.opcode in ("parameter", "get-tuple-element") or computation.name == module.entry


def _written(module: Module, computation: Computation, x: Instruction) -> float:
    results = [(computation, x)]
    if x.opcode == "fusion":
        inner = module.computations[x.attribute("calls")]
        if inner.root.opcode == "tuple":
            results = [(inner, inner.instructions[name]) for name in inner.root.operands]
        else:
            results = [(inner, inner.root)]
    if len(results) == 1:
        results = [(computation, x)]
    elif len(results) != len(x.arrays):
        return _bytes(x.arrays)
    total, place = 0.0, 0
    for owner, result in results:
        arrays = x.arrays if len(results) == 1 else x.arrays[place : place + 1]
        place += 1
        update = _update(module, owner, result) if owner is not computation else in_place_update(module, owner, result)
        part = 1.0 if update is None else min(update / max(result.elements, 1), 1.0)
        total += _bytes(arrays) * part
    return total


def _needs(module: Module, computation: Computation, x: Instruction) -> list[float]:
    """Elements of each operand that all of `x`'s result needs."""
    operands = [computation.instructions[name] for name in x.operands]
    if x.opcode == "fusion":
        return _of_fusion(module, x, float(x.elements), in_place=True)
    in_place = in_place_update(module, computation, x) is not None
    return _of_operands(x, operands, float(x.elements), in_place=in_place)


def _of_fusion(module: Module, x: Instruction, needed: float, *, in_place: bool) -> list[float]:
    """From the result backwards: how many elements of each value inside are needed, as a sum over its uses.

    in_place: whether the result may be written where an operand lies, so that what it does not change is not read."""
    inner = module.computations[x.attribute("calls")]
    share = min(needed / max(x.elements, 1), 1.0)
    wanted = {inner.root.name: inner.root.elements * share}
    updating = {inner.root.name} if in_place else set()
    for y in reversed(inner.instructions.values()):
        amount = min(wanted.get(y.name, 0.0), y.elements) if y.opcode != "tuple" else wanted.get(y.name, 0.0)
        if not amount or y.opcode in _NOTHING:
            continue
        operands = [inner.instructions[name] for name in y.operands]
        if y.opcode == "tuple":
            parts = [operand.elements * amount / max(y.elements, 1) for operand in operands]
            updating |= {operand.name for operand in operands} if y.name in updating else set()
        elif y.opcode == "fusion":
            parts = _of_fusion(module, y, amount, in_place=y.name in updating)
        else:
            last = y.name in updating
            changes = last and y.opcode in _UPDATES and in_place_update(module, inner, y) is not None
            parts = _of_operands(y, operands, amount, in_place=changes)
            if last and y.opcode in _RENAMES:
                updating.add(operands[0].name)
        for operand, part in zip(operands, parts, strict=True):
            wanted[operand.name] = wanted.get(operand.name, 0.0) + part
    return [min(wanted.get(parameter.name, 0.0), parameter.elements) for parameter in inner.parameters]


def _of_operands(x: Instruction, operands: list[Instruction], needed: float, *, in_place: bool) -> list[float]:
    """Elements of each operand for `needed` elements of a result that is no fusion."""
    sizes = [float(operand.elements) for operand in operands]
    if in_place:
        update = _UPDATES[x.opcode]
        # a scatter adds to what is there, so it reads as much of it as it writes
        first = sizes[update] if x.opcode == "scatter" else 0.0
        return [first, *sizes[1:]]
    if x.opcode in _SLICES:
        return [min(needed, sizes[0]), *sizes[1:]]
    if x.opcode in _WHOLE:
        return sizes
    return [min(size, needed) for size in sizes]


def _bytes(arrays: tuple[Array, ...]) -> float:
    return float(sum(array.bytes for array in arrays if array.space == 0))
