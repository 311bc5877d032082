"""Compiles a plan and reads from the program what a device needs: memory, time at the rates of its
chip, structure."""

import re
import resource
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from popi_jax.errors import UserError
from popi_jax.flops import count_scope_flops
from popi_jax.phases import Mode
from popi_jax.planning import hlo, plan
from popi_jax.planning.plan import Plan
from popi_jax.planning.program import Access, Collective, Traffic, read_module
from popi_jax.planning.roofline import CHIPS, Chip, Seconds, estimate
from popi_jax.planning.target import Target

GIB = 2**30
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


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
    """One update that trains one role or both."""

    name: Mode
    flops: float  # of products, per device
    traffic: Traffic
    seconds: Seconds | None  # None: the rates of the device are not known
    scopes: dict[str, Seconds | None]  # of the scopes that were found, and of the rest ("")


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


class Program(NamedTuple):
    """An update that was compiled."""

    jaxpr: Any
    text: str
    sizes: Any  # what JAX says of its memory
    seconds: float
    cpu_seconds: float


def fit(planned: Plan, target: Target) -> Fit:
    """Raises: DoesNotFit: when the compiler finds that memory does not suffice, or the arguments
    alone are too many."""
    state, available = plan.count_state_bytes(planned), read_available(target)
    if available and sum(state.values()) > available:
        raise DoesNotFit(sum(state.values()), available, state)
    return read_fit(planned, target, compile_plan(planned))


def compile_plan(planned: Plan) -> Program:
    """Raises: DoesNotFit."""
    began = time.monotonic()
    traced = planned.update.trace(planned.state, planned.frozen, planned.users)
    try:
        compiled = traced.lower().compile()
    except Exception as e:  # of a type that differs by platform
        message = " ".join(str(e).split())[:400]
        found = parse_exhausted(str(e))
        if found is None:
            raise UserError(f"the program does not compile: {message}") from e
        raise DoesNotFit(*found, plan.count_state_bytes(planned)) from None
    seconds, cpu = time.monotonic() - began, time.process_time()
    sizes = compiled.memory_analysis()
    return Program(traced.jaxpr.jaxpr, compiled.as_text(), sizes, seconds, cpu)


def read_fit(planned: Plan, target: Target, program: Program) -> Fit:
    """Raises: DoesNotFit."""
    state, sizes, available = (
        plan.count_state_bytes(planned),
        program.sizes,
        read_available(target),
    )
    memory = Memory(
        state,
        sizes.argument_size_in_bytes,
        sizes.temp_size_in_bytes,
        sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
        plan.count_cache_bytes(planned),
        available,
    )
    if available and memory.total > available:
        raise DoesNotFit(memory.total, available, state)
    turns = read_turns(planned, program, CHIPS.get(target.chip))
    return Fit(
        target.name,
        len(target.devices),
        memory,
        turns,
        check_layout(planned, turns),
        program.seconds,
        program.cpu_seconds,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def read_available(target: Target) -> float:
    """Bytes that a program may take of a device; 0: not known."""
    if target.chip in CHIPS:
        return CHIPS[target.chip].usable_bytes
    stats = target.devices[0].memory_stats() or {}
    return stats.get("bytes_limit", 0)


def parse_exhausted(message: str) -> tuple[int, int] | None:
    """(needed, available) bytes by the compiler's RESOURCE_EXHAUSTED, 0 where it does not say;
    None: another error.

    Ahead-of-time compilers for TPUs say "(33.08G) exceeds available HBM (15.75G)"; those on a TPU
    may say "Used 41.74G of 16.00G hbm"."""
    if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
        return None
    size = r"([\d.]+)([KMGT]?)i?B?"
    found = re.search(rf"\({size}\) exceeds available \w+ \({size}\)", message)
    found = found or re.search(rf"Used {size} of {size} \w+", message)
    if found is None:
        return 0, 0
    needed, unit, available, other = found.groups()
    return round(float(needed) * _UNITS[unit]), round(float(available) * _UNITS[other])


def read_turns(planned: Plan, program: Program, chip: Chip | None) -> list[Turn]:
    """Each turn of the schedule, with summaries of full length."""
    module = hlo.parse(program.text)
    sizes = dict(planned.mesh.shape)
    rates: Any = {"chip": chip, "torus_axes": count_torus_axes(planned.mesh)} if chip else {}
    trips: Any = {"while_trips": planned.config.data.summary_len}
    turns = []
    for number, name in enumerate(planned.turns):
        branch = number if len(planned.turns) > 1 else None
        traffic = read_module(module, sizes, branch=branch)
        flops = count_scope_flops(program.jaxpr, plan.SCOPES, branch=branch, **trips)
        flops = {scope: count / planned.mesh.size for scope, count in flops.items()}
        total = sum(flops.values())
        found = {scope: _select_scope(traffic, scope) for scope in (*plan.SCOPES, "")}
        scopes = {
            scope: estimate(flops.get(scope, 0), inside, **rates) if chip else None
            for scope, inside in found.items()
            if inside.accesses
        }
        seconds = estimate(total, traffic, **rates) if chip else None
        turns.append(Turn(name, total, traffic, seconds, scopes))
    return turns


def _select_scope(traffic: Traffic, scope: str) -> Traffic:
    """What runs in a scope, by its own name or that of a loop around it."""

    def is_inside(found: Access | Collective) -> bool:
        paths = (found.op_name, *(loop.op_name for loop in found.loops))
        words = (word for path in paths for word in path.split("/"))
        return next((word for word in words if word in plan.SCOPES), "") == scope

    return traffic._replace(
        accesses=tuple(filter(is_inside, traffic.accesses)),
        collectives=tuple(filter(is_inside, traffic.collectives)),
    )


def count_torus_axes(mesh: Mesh) -> dict[str, int]:
    """Over how many axes of the torus of chips each axis of the mesh lies."""

    def count(number: int) -> int:
        line = np.moveaxis(mesh.devices, number, 0).reshape(mesh.devices.shape[number], -1)[:, 0]
        places = zip(*(device.coords for device in line), strict=True)
        return sum(len(set(along)) > 1 for along in places)

    return {axis: max(count(number), 1) for number, axis in enumerate(mesh.axis_names)}


def check_layout(planned: Plan, turns: list[Turn]) -> list[Check]:
    """What the layout promises, looked for in the compiled program. A check that does not find the
    scopes that it looks at does not hold."""
    found = [_check_scopes(planned, turn) for turn in turns]
    if planned.mesh.size > 1:
        if sampling := [x for x in turns if "sampling" in planned.list_scopes(x.name)]:
            found.append(_check_sampling(planned, sampling))
        if planned.count_shards(planned.model.rules.vocab_embed) > 1:
            found += [_check_head(planned, turn) for turn in turns]
    rules = planned.model.rules
    split = [planned.count_shards(x) for x in (rules.embed, rules.heads, rules.mlp, rules.vocab)]
    if max(split) > 1:
        found.append(_check_matrices(planned))
    return found


def _check_scopes(planned: Plan, turn: Turn) -> Check:
    missing = [name for name in planned.list_scopes(turn.name) if name not in turn.scopes]
    text = f"scopes of the {turn.name} turn that the program does not name"
    return Check(not missing, f"{text}: {', '.join(missing) or 'none'}")


def _check_sampling(planned: Plan, turns: list[Turn]) -> Check:
    """No step of sampling moves weights."""
    model, batch, text = planned.model, planned.config.batch, "in a step of sampling"
    if not all(any(_is_decoding(loop) for loop in turn.traffic.loops) for turn in turns):
        return Check(False, f"collectives of weights {text}: no loop is named {plan.DECODE}")
    moved = [
        c
        for turn in turns
        for c in turn.traffic.collectives
        if c.kind != "all-reduce" and any(map(_is_decoding, c.loops))
    ]
    row = model.embed_dim * planned.number_bytes
    heads = model.num_kv_heads * model.head_dim
    kernel = heads * row // planned.count_shards(model.rollout_rules.kv_heads)
    users = batch.users // planned.count_shards(model.rollout_rules.batch)
    states = users * planned.config.inference.group_size * row  # that a step works on
    weights = [c for c in moved if c.bytes >= max(kernel, 4 * states)]
    return Check(not weights, f"collectives of weights {text}: {len(weights)}")


def _is_decoding(loop: Any) -> bool:
    return loop.is_in(plan.DECODE)


def _check_head(planned: Plan, turn: Turn) -> Check:
    """The LM head is gathered before each pass over tokens, in none of its chunks."""
    model = planned.model
    shards = planned.count_shards(model.rules.vocab)
    size = model.embed_dim * model.vocab_size * planned.number_bytes // shards
    gathers = [
        c
        for c in turn.traffic.collectives
        if f"/{plan.HEAD}/all_gather" in c.op_name and c.bytes >= size
    ]
    text = f"gathers of the LM head for a microbatch, {turn.name} turn"
    if not gathers:
        return Check(False, f"{text}: none is named {plan.HEAD}")
    inside = sum(any(loop.is_in(f"/{plan.HEAD}/") for loop in c.loops) for c in gathers)
    times = sum(c.executions for c in gathers) / planned.config.batch.microbatches
    text = f"{text}: {times:.0f}, each before a pass over its tokens; inside of one: {inside}"
    return Check(not inside, text)


def _check_matrices(planned: Plan) -> Check:
    matrices = [
        x
        for path, x in jax.tree.leaves_with_path(planned.weights)
        if path[-1].key in ("kernel", "embedding")
    ]
    whole = [x for x in matrices if plan.count_bytes_per_device(x) == x.size * x.dtype.itemsize]
    return Check(not whole, f"matrices that are whole on every device: {len(whole)}")
