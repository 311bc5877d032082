"""Bytes of the main memory that one instruction of a compiled program reads and writes.

An instruction reads its operands and writes its result, where they lie in the main memory (space 0)
and not in one of the chip's. Of an operand that it only slices it reads the slice, of a result that
it only updates it writes the update: so a loop over stacked layers reads one layer each time,
whether the slice stands alone or inside of a fusion."""

from popi_jax.planning.hlo import Array, Computation, Instruction, Module

_SLICES = {"slice", "dynamic-slice", "gather"}
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # place of the update among the operands
_RENAMES = {"bitcast", "reshape"}
_NOTHING = {"parameter", "constant", "iota", "partition-id", "rng-get-and-update-state"}
# a part of their result needs all of their operands; everything else goes element by element
_WHOLE = {
    *("convolution", "dot", "reduce", "reduce-window", "sort", "custom-call", "fft", "topk"),
    *("select-and-scatter", "scatter", "cholesky", "all-reduce", "all-gather", "all-to-all"),
    *("reduce-scatter", "collective-permute"),
}


def count_accessed_bytes(module: Module, computation: Computation, x: Instruction) -> float:
    """Bytes of one execution of `x`, which is no container (`while`, `conditional`, `call`)."""
    operands = [computation.instructions[name] for name in x.operands]
    if x.opcode == "custom-call" and '"AllocateBuffer"' in x.attributes:
        return 0.0
    if x.opcode in ("copy-start", "send", "recv"):
        written, operands = x.arrays[: 1 if x.opcode != "send" else 0], operands[:1]
        return _sum_bytes(written) + sum(
            _sum_bytes(operand.arrays) for operand in operands if x.opcode != "recv"
        )
    if x.opcode.endswith("-start"):
        written = x.arrays[len(operands) : 2 * len(operands)]
        return _sum_bytes(written) + sum(_sum_bytes(operand.arrays) for operand in operands)
    read = 0.0
    for operand, needed in zip(operands, _count_needed(module, x, operands), strict=True):
        read += _sum_bytes(operand.arrays) * min(needed / max(operand.elements, 1), 1.0)
    return read + _count_written_bytes(module, x, operands)


def _find_update(module: Module, x: Instruction, operands: list[Instruction]) -> int | None:
    """The elements that `x` changes of an array that it takes and gives back; None if it makes its
    result anew."""
    if x.opcode in _UPDATES:  # what must not be changed was copied before
        return operands[_UPDATES[x.opcode]].elements
    if x.opcode == "fusion":
        inner = module.computations[x.find_computation("calls")]
        return _find_fused_update(module, inner, inner.root)
    return None


def _find_fused_update(module: Module, fused: Computation, x: Instruction) -> int | None:
    """The same of a value inside of a fusion: it must lie where an operand of the fusion does."""
    operands = [fused.instructions[name] for name in x.operands]
    if x.opcode in _RENAMES:
        return _find_fused_update(module, fused, operands[0])
    if x.opcode in _UPDATES and not _is_handed_in(module, fused, operands[0]):
        return None
    return _find_update(module, x, operands)


def _is_handed_in(module: Module, fused: Computation, x: Instruction) -> bool:
    """Whether it is an operand of the fusion, perhaps in another shape."""
    if x.opcode in _RENAMES:
        return _is_handed_in(module, fused, fused.instructions[x.operands[0]])
    if x.opcode == "fusion":
        inner = module.computations[x.find_computation("calls")]
        return _is_handed_in(module, inner, inner.root) and _is_handed_in(
            module, fused, fused.instructions[x.operands[0]]
        )
    return x.opcode == "parameter"


def _count_written_bytes(module: Module, x: Instruction, operands: list[Instruction]) -> float:
    """Of a fusion with several results each may be an update."""
    if x.opcode == "fusion":
        inner = module.computations[x.find_computation("calls")]
        if inner.root.opcode == "tuple" and len(inner.root.operands) == len(x.arrays):
            results = [inner.instructions[name] for name in inner.root.operands]
            updates = [_find_fused_update(module, inner, result) for result in results]
            return sum(
                _count_changed_bytes(array, update)
                for array, update in zip(x.arrays, updates, strict=True)
            )
    update = _find_update(module, x, operands)
    return sum(_count_changed_bytes(array, update) for array in x.arrays)


def _count_changed_bytes(array: Array, update: int | None) -> float:
    whole = _sum_bytes((array,))
    return whole if update is None else whole * min(update / max(array.elements, 1), 1.0)


def _count_needed(module: Module, x: Instruction, operands: list[Instruction]) -> list[float]:
    """Elements of each operand that all of `x`'s result needs."""
    if x.opcode == "fusion":
        return _count_needed_by_fusion(module, x, float(x.elements), in_place=True)
    return _count_needed_by_operation(x, operands, float(x.elements), in_place=x.opcode in _UPDATES)


def _count_needed_by_fusion(
    module: Module, x: Instruction, needed: float, *, in_place: bool
) -> list[float]:
    """From the result backwards: how many elements of each value inside are needed, as a sum over
    its uses.

    in_place: whether the result may be written where an operand lies, so that what it does not
    change is not read."""
    inner = module.computations[x.find_computation("calls")]
    share = min(needed / max(x.elements, 1), 1.0)
    wanted = {inner.root.name: inner.root.elements * share}
    updating = {inner.root.name} if in_place else set()
    for y in reversed(inner.instructions.values()):
        amount = wanted.get(y.name, 0.0)
        if y.opcode != "tuple":
            amount = min(amount, y.elements)
        if not amount or y.opcode in _NOTHING:
            continue
        operands = [inner.instructions[name] for name in y.operands]
        if y.opcode == "tuple":
            needs = [operand.elements * amount / max(y.elements, 1) for operand in operands]
            updating |= {operand.name for operand in operands} if y.name in updating else set()
        elif y.opcode == "fusion":
            needs = _count_needed_by_fusion(module, y, amount, in_place=y.name in updating)
        else:
            last = y.name in updating
            changes = last and y.opcode in _UPDATES
            changes = changes and _find_fused_update(module, inner, y) is not None
            needs = _count_needed_by_operation(y, operands, amount, in_place=changes)
            if last and y.opcode in _RENAMES:
                updating.add(operands[0].name)
        for operand, need in zip(operands, needs, strict=True):
            wanted[operand.name] = wanted.get(operand.name, 0.0) + need
    return [
        min(wanted.get(parameter.name, 0.0), parameter.elements) for parameter in inner.parameters
    ]


def _count_needed_by_operation(
    x: Instruction, operands: list[Instruction], needed: float, *, in_place: bool
) -> list[float]:
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


def _sum_bytes(arrays: tuple[Array, ...]) -> float:
    return float(sum(array.bytes for array in arrays if array.space == 0))
