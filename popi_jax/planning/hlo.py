"""The text of a compiled program as computations and instructions: syntax alone, no costs.

`compiled.as_text()` has one instruction a line, but kernels written by hand put newlines into
theirs: what starts neither an instruction nor a computation belongs to the instruction before."""

import math
import re
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = ")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"\b(?:calls|body|condition|to_apply|(?:true|false)_computation)=%?([\w.\-]+)")
_LOCATION = re.compile(r"^(\d+) \{file_name_id=(\d+) function_name_id=\d+ line=(\d+)")
_FRAME = re.compile(r"^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?")
_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "c64": 64, "c128": 128}


class Array(NamedTuple):
    """One array of a result. `bytes` are those of the layout, where tiles fill up the last axes."""

    dtype: str
    dims: tuple[int, ...]
    bytes: int
    space: int  # 0: the main memory of the device (HBM); others: of the chip, or of the host

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


class Instruction(NamedTuple):
    name: str
    opcode: str
    arrays: tuple[Array, ...]  # of the result, tuples flattened
    operands: tuple[str, ...]
    inner: str  # what stands between the brackets
    attributes: str
    is_root: bool

    @property
    def op_name(self) -> str:
        """The path of names in the traced program."""
        return _search(r'op_name="([^"]*)"', self.attributes)

    @property
    def elements(self) -> int:
        return sum(array.elements for array in self.arrays)

    def find_called(self) -> tuple[str, ...]:
        """The names of the computations that it runs, or applies to pairs of numbers."""
        branches = _search(r"branch_computations=\{([^}]*)\}", self.attributes)
        return (*_CALLED.findall(self.attributes), *_NAME.findall(branches))

    def find_computation(self, name: str) -> str:
        """The name of a computation given as `name=%...`, or ""."""
        return _search(rf"\b{name}=%?([\w.\-]+)", self.attributes)


class Computation(NamedTuple):
    name: str
    instructions: dict[str, Instruction]  # in their order
    root: Instruction
    parameters: tuple[Instruction, ...]  # by number
    users: dict[str, list[Instruction]]


class Module(NamedTuple):
    computations: dict[str, Computation]
    entry: str
    num_devices: int  # that the program runs on: those of one slice, where there are several
    frames: dict[str, tuple[str, ...]]  # number of a stack frame -> file:line of it, of its callers

    def find_lines(self, instruction: Instruction) -> tuple[str, ...]:
        """The lines of the traced program behind it as file:line, the innermost first; () where
        unknown."""
        return self.frames.get(_search(r"stack_frame_id=(\d+)", instruction.attributes), ())


def parse(text: str) -> Module:
    """Raises ValueError if there is no entry computation in the text."""
    lines = text.splitlines()
    made: dict[str, list[Instruction]] = {}
    body: list[Instruction] = []
    entry = ""
    pending: list[str] = []

    def finish() -> None:
        if pending:
            body.append(_parse_instruction("\n".join(pending)))
            pending.clear()

    for line in lines:
        if _INSTRUCTION.match(line):
            finish()
            pending.append(line)
        elif line[:1] in ("%", "E") and (found := _COMPUTATION.match(line)):
            finish()
            body = made.setdefault(found[2], [])
            entry = found[2] if found[1] else entry
        elif pending:
            pending.append(line)
    finish()
    if not entry:
        raise ValueError("the text holds no ENTRY computation: is it compiled.as_text()?")
    header = lines[0] if lines else ""
    devices = int(_search(r"num_partitions=(\d+)", header) or 1) * int(
        _search(r"replica_count=(\d+)", header) or 1
    )
    return Module(
        {name: _make_computation(name, body) for name, body in made.items()},
        entry,
        devices,
        _parse_frames(lines),
    )


def parse_arrays(shape: str) -> tuple[Array, ...]:
    """The arrays in the text of a shape, those of tuples one after the other."""
    return tuple(_parse_array(*found.groups(default="")) for found in _ARRAY.finditer(shape))


def _parse_array(dtype: str, sizes: str, layout: str) -> Array:
    dims = tuple(int(size.strip("<=")) for size in sizes.split(",") if size)
    order, _, rest = layout.partition(":")
    axes = [int(axis) for axis in order.split(",") if axis]  # the minor one first
    padded = [dims[axis] for axis in axes] if len(axes) == len(dims) else list(dims)
    tile = [int(size) for size in _search(r"^T\(([\d,]+)\)", rest).split(",") if size][::-1]
    for place, size in enumerate(tile[: len(padded)]):
        padded[place] = -(-padded[place] // size) * size
    bits = _BITS.get(dtype) if dtype in _BITS else int(_search(r"^[a-z]+(\d+)", dtype) or 32)
    space = int(_search(r"S\((\d+)\)", rest) or 0)
    return Array(dtype, dims, math.prod(padded) * (bits or 0) // 8, space)


def _parse_instruction(text: str) -> Instruction:
    found = _INSTRUCTION.match(text)
    assert found is not None
    start = found.end()
    end = _find_closing(text, start) + 1 if text[start] == "(" else text.index(" ", start)
    opened = text.index("(", end)
    closed = _find_closing(text, opened)
    inner = text[opened + 1 : closed]
    opcode, operands = text[end:opened].strip(), tuple(_NAME.findall(inner))
    return Instruction(
        found[2],
        opcode,
        parse_arrays(text[start:end]),
        operands,
        inner,
        text[closed + 1 :],
        bool(found[1]),
    )


def _find_closing(text: str, opened: int) -> int:
    """Where the bracket that opens at `opened` closes."""
    depth = 0
    for found in re.finditer(r"[()]", text[opened:]):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return opened + found.start()
    return len(text)


def _make_computation(name: str, body: list[Instruction]) -> Computation:
    users: dict[str, list[Instruction]] = {}
    for instruction in body:
        for operand in dict.fromkeys(instruction.operands):
            users.setdefault(operand, []).append(instruction)
    parameters = sorted((x for x in body if x.opcode == "parameter"), key=lambda x: int(x.inner))
    root = next((x for x in body if x.is_root), body[-1])
    return Computation(name, {x.name: x for x in body}, root, tuple(parameters), users)


def _parse_frames(lines: list[str]) -> dict[str, tuple[str, ...]]:
    """The tables before the first computation: files, places in them, frames that name a place and
    their caller."""
    files: dict[str, str] = {}
    places: dict[str, str] = {}
    frames: dict[str, tuple[str, ...]] = {}
    section = ""
    for line in lines:
        if line.startswith(("%", "ENTRY")):
            break
        if not line[:1].isdigit():
            section = line.strip() or section
        elif section == "FileNames":
            number, _, name = line.partition(" ")
            files[number] = name.strip('"')
        elif section == "FileLocations" and (found := _LOCATION.match(line)):
            places[found[1]] = f"{files.get(found[2], '')}:{found[3]}"
        elif section == "StackFrames" and (found := _FRAME.match(line)):
            # the number of the caller is one less than the text says, 0 where there is none;
            # callers come first
            caller = str(int(found[3] or 1) - 1)
            frames[found[1]] = (places.get(found[2], ""), *frames.get(caller, ()))
    return frames


def _search(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found[1] if found else ""
