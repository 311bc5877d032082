"""What a compiled program moves: bytes of its memory and over its interconnect, each loop as often
as it runs.

Read from the text alone (`compiled.as_text()`), so no device is needed: a program compiled ahead of
time will do. All numbers are of one device and one execution. What the compiler decides at run time
is not seen: how often a product reads an operand again whose tiles do not fit on the chip, and what
overlaps."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from popi_jax.planning.groups import axes_of_groups, groups_of, pairs_of, ring_hops
from popi_jax.planning.hlo import Array, Computation, Instruction, Module, parse
from popi_jax.planning.memory import accessed, in_place_update
from popi_jax.planning.trips import trips_of

COLLECTIVES = {
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
}
COLLECTIVES |= {"collective-broadcast"}
_FREE = {
    "bitcast",
    "tuple",
    "get-tuple-element",
    "parameter",
    "constant",
    "partition-id",
    "replica-id",
    "after-all",
}
_FREE |= {"add-dependency", "optimization-barrier", "get-dimension-size"}
_GIB = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def innermost(stack: tuple[str, ...]) -> str:
    """The first line of a stack (file:line, callers behind) that is no library's, or ""."""
    return next((line for line in stack if "site-packages" not in line), stack[0] if stack else "")


class Loop(NamedTuple):
    name: str
    op_name: str
    stack: tuple[str, ...]  # file:line of the traced program, the innermost first
    trips: float
    known: bool  # whether `trips` was read; else the text does not say and it is 1, or as the caller says

    def says(self, part: str) -> bool:
        """Whether the path of names or the innermost line that is no library's holds `part`."""
        return part in self.op_name or part in innermost(self.stack)


class Collective(NamedTuple):
    """Traffic between devices. Bytes are of one device and one execution."""

    kind: str  # of COLLECTIVES; what crosses slices is "cross-slice all-reduce" and so on
    axes: tuple[str, ...]  # of the mesh, along which its groups run
    group: int  # devices of a group; of cross-slice traffic slices
    bytes: int  # the result of an all-gather, else the operand
    wire_bytes: (
        float  # that leave a device for its neighbours by ring algorithms, those passed on included
    )
    executions: float
    name: str
    op_name: str
    stack: tuple[str, ...]  # file:line of the traced program, the innermost first
    loops: tuple[Loop, ...]  # that it runs in, the outermost first
    cross_slice: bool = False


class Access(NamedTuple):
    """An instruction that reads or writes the main memory. Bytes are of one execution."""

    name: str
    opcode: str
    shape: str
    bytes: float
    executions: float
    op_name: str
    stack: tuple[str, ...]
    loops: tuple[Loop, ...]

    @property
    def total(self) -> float:
        return self.bytes * self.executions


class Buffer(NamedTuple):
    bytes: int
    shape: str
    op_name: str
    stack: tuple[str, ...]


class Traffic(NamedTuple):
    accesses: tuple[Access, ...]
    collectives: tuple[Collective, ...]
    loops: tuple[Loop, ...]  # every loop once, in the order of the text
    buffers: tuple[
        Buffer, ...
    ]  # distinct results in the main memory, the largest first; not all live at a time

    @property
    def hbm_bytes(self) -> float:
        return sum(access.total for access in self.accesses)

    def wire_bytes(self, *, cross_slice: bool = False) -> float:
        """What a device sends within its slice, or what leaves it for other slices."""
        return sum(
            c.wire_bytes * c.executions for c in self.collectives if c.cross_slice == cross_slice
        )

    def top(self, count: int = 10) -> list[Access]:
        """The instructions that move most bytes of the main memory over all of their executions."""
        return sorted(self.accesses, key=lambda access: -access.total)[:count]

    def by_kind_and_axes(self) -> dict[tuple[str, tuple[str, ...]], tuple[float, float, float]]:
        """(kind, axes) -> (executions, payload bytes, wire bytes), summed, most wire bytes
        first."""
        sums: dict[tuple[str, tuple[str, ...]], list[float]] = {}
        for c in self.collectives:
            row = sums.setdefault((c.kind, c.axes), [0.0, 0.0, 0.0])
            for place, value in enumerate((1, c.bytes, c.wire_bytes)):
                row[place] += value * c.executions
        return {
            key: (row[0], row[1], row[2])
            for key, row in sorted(sums.items(), key=lambda item: -item[1][2])
        }


class _Found(NamedTuple):
    accesses: list[Access]
    collectives: list[Collective]
    loops: list[Loop]

    def cost(self) -> float:
        moved = sum(access.total for access in self.accesses)
        return moved + sum(c.wire_bytes * c.executions for c in self.collectives)

    def add(self, other: "_Found", weight: float = 1.0) -> None:
        self.accesses.extend(x._replace(executions=x.executions * weight) for x in other.accesses)
        self.collectives.extend(
            x._replace(executions=x.executions * weight) for x in other.collectives
        )
        self.loops.extend(other.loops)


Branches = Callable[[str, int], Sequence[float] | None]
Trips = Callable[[str, int | None], float | None]


def read(
    text: str,
    mesh_shape: Mapping[str, int],
    *,
    branches: Branches | None = None,
    trips: Trips | None = None,
) -> Traffic:
    """The traffic of one device in one execution of the program.

    text: `compiled.as_text()`. mesh_shape: axis -> size in the order of the mesh that the program
    was compiled for; the numbers in the program's groups are positions in that mesh, whatever the
    ids of its devices. On several slices the program is that of one slice and numbers its devices
    alone, so axes across slices must come first.

    branches: (op_name, number of branches) -> how often each branch runs; None, or without it: the
    most expensive one. trips: (op_name of a loop, trips that were read or None) -> trips; None, or
    without it: those read, else 1. A loop that may end early, as that of sampling, is read with its
    largest number of trips.

    Raises ValueError if a group of the program does not fit the mesh.
    """
    module = parse(text)
    reader = _Reader(module, mesh_shape, branches or (lambda *_: None), trips or (lambda *_: None))
    found = reader.walk(module.computations[module.entry], ())
    loops = {loop.name: loop for loop in found.loops}
    return Traffic(
        tuple(found.accesses), tuple(found.collectives), tuple(loops.values()), reader.buffers()
    )


def gathers_in_loops(traffic: Traffic, part: str, *, at_least: float = 0.0) -> list[Collective]:
    """The collectives in any loop whose path of names or whose own source line holds `part`, as
    "decode.py".

    Loops within such a loop count as well; those of functions that decode.py only calls before its
    loop do not.

    at_least: bytes of one execution, so that what is small does not count. All kinds are listed: an
    all-gather may be emitted as an all-reduce, or as a loop of collective-permutes each of which
    moves a part."""
    found = [c for c in traffic.collectives if any(loop.says(part) for loop in c.loops)]
    return [c for c in found if c.bytes >= at_least]


class _Reader:
    """The walk over one module; it holds what every step of it needs."""

    def __init__(
        self, module: Module, mesh_shape: Mapping[str, int], branches: Branches, trips: Trips
    ) -> None:
        self.module, self.mesh_shape, self.branches, self.trips = (
            module,
            dict(mesh_shape),
            branches,
            trips,
        )

    def walk(self, computation: Computation, loops: tuple[Loop, ...], times: float = 1.0) -> _Found:
        found = _Found([], [], [])
        for x in computation.instructions.values():
            if x.opcode in _FREE or x.opcode.endswith("-done"):
                continue
            if x.opcode == "while":
                found.add(self._while(computation, x, loops, times))
            elif x.opcode == "conditional":
                found.add(self._conditional(x, loops, times))
            elif x.opcode in ("call", "async-start"):
                for name in x.called():
                    found.add(self.walk(self.module.computations[name], loops, times))
            else:
                self._instruction(computation, x, loops, times, found)
        return found

    def _while(
        self, computation: Computation, x: Instruction, loops: tuple[Loop, ...], times: float
    ) -> _Found:
        seen = trips_of(self.module, computation, x)
        wanted = self.trips(x.op_name, seen)
        number = float(wanted if wanted is not None else 1 if seen is None else seen)
        loop = Loop(x.name, x.op_name, self.module.stack(x), number, seen is not None)
        found = _Found([], [], [loop])
        inside = (*loops, loop)
        found.add(self.walk(self.module.computations[x.attribute("body")], inside, times * number))
        # the condition is asked once more than the body runs
        found.add(
            self.walk(
                self.module.computations[x.attribute("condition")], inside, times * (number + 1)
            )
        )
        return found

    def _conditional(self, x: Instruction, loops: tuple[Loop, ...], times: float) -> _Found:
        bodies = [self.walk(self.module.computations[name], loops, times) for name in x.called()]
        weights = self.branches(x.op_name, len(bodies))
        if weights is None:
            most = max(range(len(bodies)), key=lambda place: bodies[place].cost())
            weights = [float(place == most) for place in range(len(bodies))]
        found = _Found([], [], [])
        for body, weight in zip(bodies, weights, strict=True):
            found.add(body, weight)
        return found

    def _instruction(
        self,
        computation: Computation,
        x: Instruction,
        loops: tuple[Loop, ...],
        times: float,
        found: _Found,
    ) -> None:
        moved = accessed(self.module, computation, x)
        stack = self.module.stack(x)
        if moved:
            shape = ", ".join(map(str, x.arrays[:3]))
            found.accesses.append(
                Access(x.name, x.opcode, shape, moved, times, x.op_name, stack, loops)
            )
        for inside, c in self._collectives_of(computation, x):
            found.collectives.append(self._collective(inside, c, x, stack, loops, times))

    def _collectives_of(
        self, computation: Computation, x: Instruction
    ) -> Iterable[tuple[Computation, Instruction]]:
        """The instruction itself, or those in the computation that it runs as one."""
        if x.opcode.removesuffix("-start") in COLLECTIVES or (x.opcode == "send" and _transfer(x)):
            yield computation, x
        if x.opcode == "fusion":
            inner = self.module.computations[x.attribute("calls")]
            for y in inner.instructions.values():
                yield from self._collectives_of(inner, y)

    def _collective(
        self,
        computation: Computation,
        c: Instruction,
        outer: Instruction,
        stack: tuple[str, ...],
        loops: tuple[Loop, ...],
        times: float,
    ) -> Collective:
        kind = c.opcode.removesuffix("-start")
        operand = sum(
            array.bytes for name in c.operands for array in computation.instructions[name].arrays
        )
        names = outer.name, c.op_name or outer.op_name, stack, loops
        if kind == "send":
            return self._cross_slice(c, times, names)
        if kind == "collective-permute":
            axes, hops = pairs_of(c.attributes, self.mesh_shape)
            return Collective(
                kind, axes, _size(self.mesh_shape, axes), operand, operand * hops, times, *names
            )
        groups = groups_of(c.attributes, self.module.num_devices)
        axes, n = axes_of_groups(groups, self.mesh_shape), len(groups[0])
        if kind == "all-reduce" and outer is not c and _is_scattered(computation, c):
            kind = "reduce-scatter"
        payload = operand * n if kind == "all-gather" else operand
        part = (n - 1) / n
        by_ring = {
            "all-reduce": 2 * part,
            "all-to-all": ring_hops(n),
            "ragged-all-to-all": ring_hops(n),
        }
        wire = payload * by_ring.get(kind, part)
        return Collective(kind, axes, n, payload, wire, times, *names)

    def _cross_slice(
        self,
        c: Instruction,
        times: float,
        names: tuple[str, str, tuple[str, ...], tuple[Loop, ...]],
    ) -> Collective:
        """A transfer by the hosts' network: of the payload that a device hands to its host."""
        kind = _transfer(c).lower().replace("_", "-")
        slices = _listed(c.attributes)
        axes, devices = [], 1
        for axis, size in self.mesh_shape.items():
            if devices * self.module.num_devices >= math.prod(self.mesh_shape.values()):
                break
            axes.append(axis)
            devices *= size
        n = slices or devices
        payload = c.arrays[0].bytes
        part = (n - 1) / n if n else 1.0
        by_ring = {
            "all-reduce": 2 * part,
            "reduce-scatter": part,
            "all-to-all": part,
            "all-gather": n - 1.0,
        }
        wire = payload * by_ring.get(kind, 1.0)
        return Collective(f"cross-slice {kind}", tuple(axes), n, payload, wire, times, *names, True)

    def buffers(self) -> tuple[Buffer, ...]:
        """Results of all computations that are run, arguments of the program included; in-place
        updates are none."""
        applied = {
            x.attribute("to_apply")
            for computation in self.module.computations.values()
            for x in computation.instructions.values()
            if x.opcode not in ("call", "fusion")
        }
        fused = {
            x.attribute("calls")
            for computation in self.module.computations.values()
            for x in computation.instructions.values()
            if x.opcode == "fusion"
        }
        made: dict[tuple[str, str], Buffer] = {}
        for computation in self.module.computations.values():
            if computation.name in applied | fused:
                continue
            for x in computation.instructions.values():
                is_argument = x.opcode == "parameter" and computation.name == self.module.entry
                if (x.opcode in _FREE and not is_argument) or x.opcode in (
                    "while",
                    "conditional",
                    "call",
                ):
                    continue
                operands = [computation.instructions[name] for name in x.operands]
                if (
                    x.opcode.endswith("-done")
                    or in_place_update(self.module, x, operands) is not None
                ):
                    continue
                for array in _results(x):
                    if array.space == 0 and array.bytes:
                        buffer = Buffer(array.bytes, str(array), x.op_name, self.module.stack(x))
                        made.setdefault((buffer.shape, buffer.op_name), buffer)
        return tuple(sorted(made.values(), key=lambda buffer: -buffer.bytes))


def _results(x: Instruction) -> tuple[Array, ...]:
    """Without the operands that the halves of asynchronous instructions hand through."""
    if x.opcode == "copy-start":
        return x.arrays[:1]
    if x.opcode.endswith("-start"):
        return x.arrays[len(x.operands) : 2 * len(x.operands)]
    return x.arrays[:1] if x.opcode in ("send", "recv") else x.arrays


def _is_scattered(computation: Computation, c: Instruction) -> bool:
    """Whether of an all-reduce, within an instruction, each device keeps a slice alone."""
    users = computation.users.get(c.name, [])
    return bool(users) and all(
        x.opcode == "dynamic-slice"
        or (x.opcode in ("bitcast", "reshape") and _is_scattered(computation, x))
        for x in users
    )


def _transfer(x: Instruction) -> str:
    found = re.search(r'_xla_megascale_transfer_type="(\w+)"', x.attributes)
    return found[1] if found else ""


def _listed(attributes: str) -> int:
    """How many slices a transfer between slices names, 0 where it does not."""
    found = re.search(r'_xla_megascale_target="\{([\d,:]+)\}', attributes)
    return len(found[1].split(",")) if found else 0


def _size(mesh_shape: Mapping[str, int], axes: Iterable[str]) -> int:
    return math.prod(mesh_shape[axis] for axis in axes)


class Allocation(NamedTuple):
    bytes: int
    shape: str
    op_name: str


class Exhausted(NamedTuple):
    needed: int  # bytes; 0 where the message does not say
    available: int
    allocations: tuple[Allocation, ...]  # the largest, where the message lists them


def parse_exhausted(message: str) -> Exhausted | None:
    """What a program that does not fit needs, from the compiler's RESOURCE_EXHAUSTED; None: another
    error.

    Ahead-of-time compilers for TPUs say two numbers alone ("(33.08G) exceeds available HBM
    (15.75G)"); those on a TPU may say "Used 41.74G of 16.00G hbm" and list the largest allocations.
    """
    if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
        return None
    size = r"([\d.]+)([KMGT]?)i?B?"
    found = re.search(rf"\({size}\) exceeds available \w+ \({size}\)", message) or re.search(
        rf"Used {size} of {size} \w+", message
    )
    needed, available = (
        (_bytes(*found.group(1, 2)), _bytes(*found.group(3, 4))) if found else (0, 0)
    )
    listed = []
    for part in re.split(r"\n\s*\d+\. Size: ", message)[1:]:
        amount = re.match(size, part)
        shape, name = (
            re.search(r"Shape: (\w+\[[\d,]*\])", part),
            re.search(r'op_name="([^"]*)"', part),
        )
        if amount:
            listed.append(
                Allocation(
                    _bytes(*amount.group(1, 2)), shape[1] if shape else "", name[1] if name else ""
                )
            )
    return Exhausted(needed, available, tuple(listed))


def _bytes(number: str, unit: str) -> int:
    return round(float(number) * _GIB[unit])
