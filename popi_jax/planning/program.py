"""What a compiled program moves: bytes of its memory and over its interconnect, each loop as often
as it runs.

Read from the text alone (`compiled.as_text()`), so no device is needed: a program compiled ahead of
time will do. All numbers are of one device and one execution. What the compiler decides at run time
is not seen: how often a product reads an operand again whose tiles do not fit on the chip, and what
overlaps."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from popi_jax.planning import groups, hlo
from popi_jax.planning.hlo import Computation, Instruction, Module
from popi_jax.planning.memory import count_accessed_bytes
from popi_jax.planning.trips import count_trips

COLLECTIVES = {
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
}
_FREE = {
    *("bitcast", "tuple", "get-tuple-element", "parameter", "constant", "partition-id"),
    *("replica-id", "after-all", "add-dependency", "optimization-barrier", "get-dimension-size"),
}


class Loop(NamedTuple):
    name: str
    op_name: str  # path of names in the traced program
    line: str  # file:line of the traced program
    trips: float
    known: bool  # whether the text says `trips`; else it is 1

    def is_in(self, scope: str) -> bool:
        """Whether the path of names or the line of the program holds `scope`."""
        return scope in self.op_name or scope in self.line


class Collective(NamedTuple):
    """Traffic between devices. Bytes are of one device and one execution."""

    kind: str  # of COLLECTIVES; what crosses slices is "cross-slice all-reduce" and so on
    axes: tuple[str, ...]  # of the mesh, along which its groups run
    group: int  # devices of a group; of cross-slice traffic slices
    bytes: int  # the result of an all-gather, else the operand
    wire_bytes: float  # that leave a device by ring algorithms, those passed on included
    executions: float
    name: str
    op_name: str
    loops: tuple[Loop, ...]  # that it runs in, the outermost first
    cross_slice: bool = False


class Access(NamedTuple):
    """An instruction that reads or writes the main memory. Bytes are of one execution."""

    name: str
    bytes: float
    executions: float
    op_name: str
    loops: tuple[Loop, ...]


class Traffic(NamedTuple):
    accesses: tuple[Access, ...]
    collectives: tuple[Collective, ...]
    loops: tuple[Loop, ...]  # every loop once, in the order of the text

    @property
    def hbm_bytes(self) -> float:
        return sum(access.bytes * access.executions for access in self.accesses)

    def sum_wire_bytes(self, *, cross_slice: bool = False) -> float:
        """What a device sends within its slice, or what leaves it for other slices."""
        return sum(
            c.wire_bytes * c.executions for c in self.collectives if c.cross_slice == cross_slice
        )

    def sum_by_kind_and_axes(self) -> dict[tuple[str, tuple[str, ...]], tuple[float, float, float]]:
        """(kind, axes) -> (executions, payload bytes, wire bytes), most wire bytes first."""
        sums: dict[tuple[str, tuple[str, ...]], tuple[float, float, float]] = {}
        for c in self.collectives:
            times, payload, wire = sums.get((c.kind, c.axes), (0.0, 0.0, 0.0))
            times, payload = times + c.executions, payload + c.bytes * c.executions
            sums[c.kind, c.axes] = times, payload, wire + c.wire_bytes * c.executions
        return dict(sorted(sums.items(), key=lambda item: -item[1][2]))


def read(text: str, mesh_shape: Mapping[str, int]) -> Traffic:
    """`read_module` of `compiled.as_text()`."""
    return read_module(hlo.parse(text), mesh_shape)


def read_module(
    module: Module, mesh_shape: Mapping[str, int], *, branch: int | None = None
) -> Traffic:
    """The traffic of one device in one execution of the program.

    mesh_shape: axis -> size in the order of the mesh that the program
    was compiled for; the numbers in the program's groups are positions in that mesh, whatever the
    ids of its devices. On several slices the program is that of one slice and numbers its devices
    alone, so axes across slices must come first. branch: which one the outermost conditional takes;
    of all others, and without it, the most expensive branch counts. A loop that may end early, as
    that of sampling, is read with its largest number of trips.

    Raises ValueError if a group of the program does not fit the mesh."""
    reader = _Reader(module, dict(mesh_shape))
    return reader.walk(module.computations[module.entry], (), 1.0, branch)


class _Reader(NamedTuple):
    """The walk over one module; it holds what every step of it needs."""

    module: Module
    mesh_shape: dict[str, int]

    def walk(
        self, computation: Computation, loops: tuple[Loop, ...], times: float, branch: int | None
    ) -> Traffic:
        found = []
        for x in computation.instructions.values():
            if x.opcode in _FREE or x.opcode.endswith("-done"):
                continue
            if x.opcode == "while":
                found.append(self.walk_loop(computation, x, loops, times))
            elif x.opcode == "conditional":
                found.append(self.walk_branches(x, loops, times, branch))
            elif x.opcode in ("call", "async-start"):
                called = [self.module.computations[name] for name in x.find_called()]
                found += [self.walk(inner, loops, times, branch) for inner in called]
            else:
                found.append(self.measure(computation, x, loops, times))
        return _join(found)

    def walk_loop(
        self, computation: Computation, x: Instruction, loops: tuple[Loop, ...], times: float
    ) -> Traffic:
        trips = count_trips(self.module, computation, x)
        number = 1.0 if trips is None else float(trips)
        line = find_own_line(self.module.find_lines(x))
        loop = Loop(x.name, x.op_name, line, number, trips is not None)
        body, condition = (
            self.module.computations[x.find_computation(name)] for name in ("body", "condition")
        )
        inside = self.walk(body, (*loops, loop), times * number, None)
        # the condition is asked once more than the body runs
        asked = self.walk(condition, (*loops, loop), times * (number + 1), None)
        return _join([Traffic((), (), (loop,)), inside, asked])

    def walk_branches(
        self, x: Instruction, loops: tuple[Loop, ...], times: float, branch: int | None
    ) -> Traffic:
        bodies = [self.module.computations[name] for name in x.find_called()]
        found = [self.walk(body, loops, times, None) for body in bodies]
        if branch is not None:
            return found[branch]
        return max(found, key=lambda body: body.hbm_bytes + _sum_all_wire_bytes(body))

    def measure(
        self, computation: Computation, x: Instruction, loops: tuple[Loop, ...], times: float
    ) -> Traffic:
        moved = count_accessed_bytes(self.module, computation, x)
        access = Access(x.name, moved, times, x.op_name, loops)
        collectives = [
            self.measure_collective(inside, c, x, loops)._replace(executions=times)
            for inside, c in self.find_collectives(computation, x)
        ]
        return Traffic((access,) if moved else (), tuple(collectives), ())

    def find_collectives(
        self, computation: Computation, x: Instruction
    ) -> Iterable[tuple[Computation, Instruction]]:
        """The instruction itself, or those in the computation that it runs as one."""
        is_transfer = x.opcode == "send" and bool(_read_transfer_kind(x))
        if x.opcode.removesuffix("-start") in COLLECTIVES or is_transfer:
            yield computation, x
        if x.opcode == "fusion":
            inner = self.module.computations[x.find_computation("calls")]
            for y in inner.instructions.values():
                yield from self.find_collectives(inner, y)

    def measure_collective(
        self, computation: Computation, c: Instruction, outer: Instruction, loops: tuple[Loop, ...]
    ) -> Collective:
        """One execution of `c`, which lies in `computation` and may be a part of `outer`."""
        kind = c.opcode.removesuffix("-start")
        operands = [computation.instructions[name] for name in c.operands]
        operand = sum(array.bytes for x in operands for array in x.arrays)
        names = outer.name, c.op_name or outer.op_name, loops
        if kind == "send":
            return self.measure_transfer(c, names)
        if kind == "collective-permute":
            axes, hops = groups.parse_permute(c.attributes, self.mesh_shape)
            size = math.prod(self.mesh_shape[axis] for axis in axes)
            return Collective(kind, axes, size, operand, operand * hops, 1.0, *names)
        members = groups.parse_groups(c.attributes, self.module.num_devices)
        axes, n = groups.find_axes(members, self.mesh_shape), len(members[0])
        if kind == "all-reduce" and outer is not c and _is_scattered(computation, c):
            kind = "reduce-scatter"
        payload = operand * n if kind == "all-gather" else operand
        share = (n - 1) / n
        if kind == "all-reduce":
            share *= 2
        elif kind in ("all-to-all", "ragged-all-to-all"):
            share = groups.count_ring_hops(n)
        return Collective(kind, axes, n, payload, payload * share, 1.0, *names)

    def measure_transfer(
        self, c: Instruction, names: tuple[str, str, tuple[Loop, ...]]
    ) -> Collective:
        """A transfer by the hosts' network: of the payload that a device hands to its host."""
        kind = _read_transfer_kind(c).lower().replace("_", "-")
        axes, devices = [], 1
        for axis, size in self.mesh_shape.items():
            if devices * self.module.num_devices >= math.prod(self.mesh_shape.values()):
                break
            axes.append(axis)
            devices *= size
        n = _count_slices(c) or devices
        payload = c.arrays[0].bytes
        share = (n - 1) / n if n else 1.0
        by_ring = {"all-reduce": 2 * share, "reduce-scatter": share, "all-to-all": share}
        by_ring["all-gather"] = n - 1.0
        wire = payload * by_ring.get(kind, 1.0)
        return Collective(f"cross-slice {kind}", tuple(axes), n, payload, wire, 1.0, *names, True)


def find_own_line(lines: tuple[str, ...]) -> str:
    """The first line of a stack (file:line, callers behind) that is no library's, else the first
    of all, or ""."""
    own = (line for line in lines if "site-packages" not in line)
    return next(own, lines[0] if lines else "")


def _join(found: list[Traffic]) -> Traffic:
    return Traffic(
        tuple(access for traffic in found for access in traffic.accesses),
        tuple(collective for traffic in found for collective in traffic.collectives),
        tuple({loop.name: loop for traffic in found for loop in traffic.loops}.values()),
    )


def _sum_all_wire_bytes(traffic: Traffic) -> float:
    return traffic.sum_wire_bytes() + traffic.sum_wire_bytes(cross_slice=True)


def _is_scattered(computation: Computation, c: Instruction) -> bool:
    """Whether of an all-reduce, within an instruction, each device keeps a slice alone."""
    users = computation.users.get(c.name, [])
    return bool(users) and all(
        x.opcode == "dynamic-slice"
        or (x.opcode in ("bitcast", "reshape") and _is_scattered(computation, x))
        for x in users
    )


def _read_transfer_kind(x: Instruction) -> str:
    found = re.search(r'_xla_megascale_transfer_type="(\w+)"', x.attributes)
    return found[1] if found else ""


def _count_slices(x: Instruction) -> int:
    """How many slices a transfer between slices names, 0 where it does not."""
    found = re.search(r'_xla_megascale_target="\{([\d,:]+)\}', x.attributes)
    return len(found[1].split(",")) if found else 0
