"""The programs of an evaluation that need not be run: what each needs of a device, and how long it
takes for a thousand users.

As of updates, texts have their longest lengths and rows are computed with their padding."""

import math
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from popi_jax.arrays import Tokens
from popi_jax.errors import UserError
from popi_jax.flops import count_jaxpr_flops
from popi_jax.models.layout import spec
from popi_jax.models.packing import Tree
from popi_jax.planning import hlo, plan
from popi_jax.planning.fits import (
    GIB,
    DoesNotFit,
    count_torus_axes,
    parse_exhausted,
    read_available,
)
from popi_jax.planning.program import Traffic, read_module
from popi_jax.planning.roofline import CHIPS, Seconds, estimate
from popi_jax.planning.target import Target
from popi_jax.popi import evaluation
from popi_jax.training import setup


class Program(NamedTuple):
    """Of one batch: evaluation.batch_users users with data.num_pairs pairs each."""

    name: str
    function: Any  # jitted
    arguments: tuple[Any, ...]  # shapes and layouts; the first are the weights
    fixed: dict[str, Any]


class Needs(NamedTuple):
    """What a program needs of a device."""

    name: str
    weights: int  # bytes, of one role
    memory: int  # bytes at its fullest, weights included
    flops: float
    traffic: Traffic
    seconds: Seconds | None  # of a batch; None: the rates of the device are not known
    compile_seconds: float


class Evaluation(NamedTuple):
    planned: plan.Plan
    needs: list[Needs]
    available: float  # bytes of a device; 0: not known
    target: str


def list_programs(planned: plan.Plan) -> list[Program]:
    """Sampling of summaries, scoring behind a summary and behind the raw signals."""
    config, model, mesh = planned.config, planned.model, planned.mesh
    d, users = config.data, config.evaluation.batch_users
    adapters = config.inference.lora.rank or config.generator.lora.rank
    weights = setup.abstract_params(model, mesh, config.model.dtype if adapters else "float32")
    split = NamedSharding(mesh, spec(("batch",), model.rules))

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=split)

    def tokens(*shape: int) -> Tokens:
        return Tokens(array(*shape), array(*shape[:-1]))

    def score(name: str, length: int) -> Program:
        context = tokens(users, plan.TEMPLATE + length)
        turns, answers = (users, d.num_pairs, d.turn_len), (users, d.num_pairs, 2, d.answer_len)
        tree = Tree(context, tokens(*turns), tokens(*answers))
        fixed = {"model": model, "budget": None}
        return Program(name, evaluation.score_tree, (weights, tree), fixed)

    seed = jax.ShapeDtypeStruct((), jnp.uint32)
    decodings = (0.0, config.inference.temperature)  # greedy and sampled, drawn together
    drawing = {"model": model, "turn": planned.prompt, "budget": None}
    drawing["sampling"] = planned.sampling._replace(temperatures=decodings)
    drawn = (weights, tokens(users, d.context_len), array(users), seed)
    return [
        Program("sampling of summaries", evaluation.draw_summaries, drawn, drawing),
        score("scores behind summaries", d.summary_len),
        score("scores behind raw signals", d.context_len),
    ]


def fit(planned: plan.Plan, target: Target) -> Evaluation:
    """Compiles the programs one after the other. Raises: DoesNotFit for the first that does not."""
    available = read_available(target)
    needs = [measure(planned, program, target) for program in list_programs(planned)]
    return Evaluation(planned, needs, available, target.name)


def measure(planned: plan.Plan, program: Program, target: Target) -> Needs:
    """Raises: DoesNotFit."""
    weights, available = plan.count_bytes_per_device(program.arguments[0]), read_available(target)
    state = {program.name: weights}
    if available and weights > available:
        raise DoesNotFit(weights, available, state)
    began = time.monotonic()
    traced = program.function.trace(*program.arguments, **program.fixed)
    try:
        compiled = traced.lower().compile()
    except Exception as e:  # of a type that differs by platform
        if (found := parse_exhausted(str(e))) is None:
            told = " ".join(str(e).split())[:400]
            raise UserError(f"the program does not compile: {told}") from e
        raise DoesNotFit(*found, state) from None
    seconds, sizes = time.monotonic() - began, compiled.memory_analysis()
    memory = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes
    memory += sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    if available and memory > available:
        raise DoesNotFit(memory, available, state)
    traffic = read_module(hlo.parse(compiled.as_text()), dict(planned.mesh.shape))
    steps = planned.config.data.summary_len
    flops = count_jaxpr_flops(traced.jaxpr.jaxpr, while_trips=steps) / planned.mesh.size
    times = None
    if chip := CHIPS.get(target.chip):
        times = estimate(flops, traffic, chip, torus_axes=count_torus_axes(planned.mesh))
    return Needs(program.name, weights, memory, flops, traffic, times, seconds)


def count_seconds(planned: plan.Plan, seconds: Seconds, users: int = 1000) -> tuple[float, float]:
    """For so many users in batches, the last one filled: (serial, overlapped)."""
    batches = math.ceil(users / planned.config.evaluation.batch_users)
    return batches * seconds.serial, batches * seconds.best


def render_heading(planned: plan.Plan, target: str) -> str:
    config, mesh = planned.config, dict(planned.mesh.shape)
    d, model = config.data, config.model.checkpoint.rpartition("/")[2] or "random weights"
    return (
        f"{config.name}, {model}: the evaluation, {planned.model.dtype}\n"
        f"a batch: {config.evaluation.batch_users} users x {d.num_pairs} pairs; signals "
        f"{d.context_len}, summary {d.summary_len}, prompt {d.turn_len}, reply {d.answer_len} "
        f"tokens\n{target}: mesh {', '.join(f'{axis} {size}' for axis, size in mesh.items())}"
    )


def render_misfit(planned: plan.Plan, target: str, failure: DoesNotFit) -> str:
    needed = f"{failure.needed / GIB:.1f} GiB per device" if failure.needed else "more memory"
    ((name, weights),) = failure.state.items()
    shards = planned.count_shards(planned.model.rules.batch)
    change = "take a slice of more chips, or of chips with more memory"
    if planned.config.evaluation.batch_users > shards and failure.needed > weights:
        change = f"take fewer users at a time: --config.evaluation.batch_users={shards}"
    return (
        f"{render_heading(planned, target)}\n\ndoes not fit: {name} needs {needed}, "
        f"{failure.available / GIB:.2f} GiB are there; {change}"
    )


def render(found: Evaluation) -> str:
    lines, gib = [render_heading(found.planned, found.target)], GIB
    for needs in found.needs:
        left = ""
        if found.available:
            left = f" of {found.available / gib:.2f}: "
            left += f"{100 * (1 - needs.memory / found.available):.0f} % are left"
        lines += [
            "",
            f"{needs.name}, compiled in {needs.compile_seconds:.0f} s",
            f"  {needs.memory / gib:.2f} GiB per device{left}; weights {needs.weights / gib:.2f}",
            f"  a batch: {needs.flops / 1e12:.2f} TFLOP per device, "
            f"{needs.traffic.hbm_bytes / 1e9:.0f} GB of its memory moved",
        ]
        if needs.seconds:
            s = needs.seconds
            serial, best = count_seconds(found.planned, s)
            lines += [
                f"  seconds: compute {s.compute:.3f}, HBM {s.hbm:.3f}, interconnect "
                f"{s.interconnect:.3f}, cross-slice {s.cross_slice:.3f}; bound by {s.bound}",
                f"  1,000 users: {serial:.1f} s serial, {best:.1f} overlapped",
            ]
    return "\n".join(lines)


def to_json(found: Evaluation) -> dict[str, Any]:
    def describe(needs: Needs) -> dict[str, Any]:
        times = needs.seconds and count_seconds(found.planned, needs.seconds)
        return {
            "memory": needs.memory,
            "weights": needs.weights,
            "flops": needs.flops,
            "hbm_bytes": needs.traffic.hbm_bytes,
            "seconds": needs.seconds and needs.seconds._asdict(),
            "seconds_per_1000_users": times and {"serial": times[0], "overlapped": times[1]},
            "compile_seconds": needs.compile_seconds,
        }

    return {
        "target": found.target,
        "mesh": dict(found.planned.mesh.shape),
        "users": found.planned.config.evaluation.batch_users,
        "available": found.available,
        "programs": {needs.name: describe(needs) for needs in found.needs},
    }
