"""Compiles a plan and reads from the program what a device needs: memory, time at the rates of its
chip, structure."""

import resource
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from popi_jax.config import Mode, Phase
from popi_jax.errors import UserError
from popi_jax.flops import flops_by_scope
from popi_jax.planning.plan import Kind, Plan, bytes_per_device, cache_bytes, state_bytes, update_of
from popi_jax.planning.program import Access, Collective, Traffic, parse_exhausted, read
from popi_jax.planning.roofline import CHIPS, Chip, Seconds, estimate
from popi_jax.planning.target import Target

NAMES: dict[Kind, Mode] = {
    (True, False): "inference",
    (False, True): "generator",
    (True, True): "joint",
}
SCOPES = (
    "sampling",
    "rewards",
    "reference",
    "generator_step",
    "inference_step",
)  # of schedule.popi_update
GIB = 2**30


class DoesNotFit(Exception):
    """The program needs more memory than a device has. Bytes; `needed` is 0 where the compiler does
    not say."""

    def __init__(self, needed: float, available: float, state: dict[str, int]) -> None:
        super().__init__(f"{needed / GIB:.1f} of {available / GIB:.1f} GiB")
        self.needed, self.available, self.state = needed, available, state


class Memory(NamedTuple):
    """Bytes per device. The total is what the program holds at its fullest."""

    state: dict[str, int]  # of the arguments, by what they are
    arguments: int
    temporaries: int
    results: int  # that are not written over arguments
    cache: int  # of the temporaries: keys and values while sampling
    available: float  # 0: not known

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries + self.results


class Turn(NamedTuple):
    """One update of a kind."""

    name: str
    flops: float  # of products, per device
    traffic: Traffic
    seconds: Seconds | None  # None: the rates of the device are not known
    parts: dict[str, Seconds]  # of SCOPES, and of the rest ("")


class Check(NamedTuple):
    holds: bool
    text: str


class Fit(NamedTuple):
    target: str
    num_devices: int
    memory: Memory
    turns: list[Turn]
    checks: list[Check]
    compile_seconds: float  # wall time
    cpu_seconds: float  # of this process until the program was compiled
    peak_rss: int  # bytes of this process


def fit(plan: Plan, target: Target) -> Fit:
    """Raises: DoesNotFit: when the compiler finds that memory does not suffice, or the arguments
    alone are too many."""
    chip = CHIPS.get(target.chip)
    state, available = state_bytes(plan), _available(target, chip)
    if available and sum(state.values()) > available:
        raise DoesNotFit(sum(state.values()), available, state)
    began = time.monotonic()
    program = update_of(plan, plan.phases).lower(plan.state, plan.frozen, plan.users)
    try:
        compiled = program.compile()
    except Exception as e:  # of a type that differs by platform
        found = parse_exhausted(str(e))
        if found is None:
            raise UserError(
                f"the program does not compile: {' '.join(str(e).split())[:400]}"
            ) from e
        raise DoesNotFit(found.needed, found.available, state) from None
    del program  # its text is as long as that of the compiled one
    seconds, cpu = time.monotonic() - began, time.process_time()
    found = compiled.memory_analysis()
    memory = Memory(
        state,
        found.argument_size_in_bytes,
        found.temp_size_in_bytes,
        found.output_size_in_bytes - found.alias_size_in_bytes,
        cache_bytes(plan),
        available,
    )
    if available and memory.total > available:
        raise DoesNotFit(memory.total, available, state)
    text = compiled.as_text()
    turns = [_turn(plan, kind, text, target, chip) for kind in plan.kinds]
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Fit(
        target.name, len(target.devices), memory, turns, checks(plan, turns), seconds, cpu, rss
    )


def _available(target: Target, chip: Chip | None) -> float:
    if chip is not None:
        return chip.usable_bytes
    stats = target.devices[0].memory_stats() or {}
    return stats.get("bytes_limit", 0)


def _turn(plan: Plan, kind: Kind, text: str, target: Target, chip: Chip | None) -> Turn:
    number, kinds = plan.kinds.index(kind), plan.kinds

    def branches(op_name: str, count: int) -> list[float] | None:
        del op_name
        return [float(i == number) for i in range(count)] if count == len(kinds) > 1 else None

    sizes = dict(plan.mesh.shape)
    traffic = read(text, sizes, branches=branches)
    counted = {part: count / len(target.devices) for part, count in flops_of(plan, kind).items()}
    total = sum(counted.values())
    if chip is None:
        return Turn(NAMES[kind], total, traffic, None, {})
    rates: Any = {"chip": chip, "torus_axes": torus_axes(plan.mesh)}
    parts = {
        part: estimate(counted.get(part, 0), of_part, **rates)
        for part in (*SCOPES, "")
        if (of_part := _of_part(traffic, part)).accesses
    }
    return Turn(NAMES[kind], total, traffic, estimate(total, traffic, **rates), parts)


def _of_part(traffic: Traffic, part: str) -> Traffic:
    """What runs in a scope, by its own name or that of a loop around it."""

    def scope(found: Access | Collective) -> str:
        names = (
            word
            for name in (found.op_name, *(loop.op_name for loop in found.loops))
            for word in name.split("/")
        )
        return next((word for word in names if word in SCOPES), "")

    return traffic._replace(
        accesses=tuple(x for x in traffic.accesses if scope(x) == part),
        collectives=tuple(x for x in traffic.collectives if scope(x) == part),
    )


def torus_axes(mesh: Mesh) -> dict[str, int]:
    """Over how many axes of the torus of chips each axis of the mesh lies."""

    def lies_over(number: int) -> int:
        line = np.moveaxis(mesh.devices, number, 0).reshape(mesh.devices.shape[number], -1)[:, 0]
        return sum(
            len(set(places)) > 1 for places in zip(*(device.coords for device in line), strict=True)
        )

    return {axis: max(lies_over(number), 1) for number, axis in enumerate(mesh.axis_names)}


def flops_of(plan: Plan, kind: Kind) -> dict[str, int]:
    """Of the parts of one update of a kind over all devices, with all summaries of full length."""
    phase = Phase(NAMES[kind], int(kind[0]), int(kind[1]), 1)
    update: Any = update_of(plan, (phase,)).__wrapped__
    trips = plan.config.data.summary_len
    return flops_by_scope(
        update, plan.state, plan.frozen, plan.users, scopes=SCOPES, while_trips=trips
    )


def checks(plan: Plan, turns: list[Turn]) -> list[Check]:
    """What the layout promises, looked for in the compiled program."""
    model, found = plan.parts.model, []
    weights = (
        plan.frozen.inference if plan.config.inference.lora.rank else plan.state.inference.params
    )
    matrices = [
        x
        for path, x in jax.tree.leaves_with_path(weights)
        if path[-1].key in ("kernel", "embedding")
    ]
    if len(plan.mesh.devices.flat) > 1:
        moved = [
            c
            for turn in turns
            for c in turn.traffic.collectives
            if any(loop.says("decode") for loop in c.loops) and c.kind != "all-reduce"
        ]
        number = 2 if model.dtype == "bfloat16" else 4
        kv = (
            model.embed_dim
            * model.num_kv_heads
            * model.head_dim
            * number
            // plan.split(model.rollout_rules.kv_heads)
        )
        users = plan.config.batch.users // plan.split(model.rollout_rules.batch)
        states = (
            users * plan.config.inference.group_size * model.embed_dim * number
        )  # that a step works on
        of_weights = [c for c in moved if c.bytes >= max(kv, 4 * states)]
        text = f"collectives of weights in a step of sampling: {len(of_weights)}"
        found.append(Check(not of_weights, text))
        head = model.embed_dim * model.vocab_size * number // plan.split(model.rules.vocab)
        for turn in turns if plan.split(model.rules.vocab_embed) > 1 else []:
            heads = [
                c
                for c in turn.traffic.collectives
                if "/head/all_gather" in c.op_name and c.bytes >= head
            ]
            inside = sum(any(loop.says("/head/") for loop in c.loops) for c in heads)
            times = sum(c.executions for c in heads) / plan.config.batch.microbatches
            text = f"gathers of the LM head for a microbatch, {turn.name} turn: {times:.0f}, each before a pass over its "
            found.append(Check(not inside, f"{text}tokens; inside of one: {inside}"))
    if _splits(plan):
        whole = [x for x in matrices if bytes_per_device(x) == x.size * x.dtype.itemsize]
        found.append(Check(not whole, f"matrices that are whole on every device: {len(whole)}"))
    return found


def _splits(plan: Plan) -> bool:
    rules = plan.parts.model.rules
    return any(plan.split(getattr(rules, name)) > 1 for name in ("embed", "heads", "mlp", "vocab"))
