"""What `make fit` prints, and the numbers of it as JSON."""

import math
from typing import Any

import jax

from popi_jax.planning.fits import GIB, DoesNotFit, Fit, Turn
from popi_jax.planning.plan import Plan
from popi_jax.planning.roofline import Seconds

ASSUMED = (
    "times are estimates at the chip's published rates (docs/tpu.md): "
    '"serial" adds the four up, "overlapped" is\n'
    "the longest of them; texts and summaries have their longest lengths"
)
TITLES = {
    "joint": "both roles",
    "inference": "the inference model",
    "generator": "the generator",
    "supervised": "the inference model by likelihood",
}


def render_heading(plan: Plan, target: str) -> str:
    c, mesh = plan.config, dict(plan.mesh.shape)
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(plan.trained))
    what = "adapters of" if c.inference.lora.rank else "parameters of"
    model = c.model.checkpoint.rpartition("/")[2] or "random weights"
    read = f"{c.inference.group_size} summaries" if plan.samples else "1 text"
    return (
        f"{c.name}, {model}: {count / 1e9:.2f} billion {what} each role, {plan.model.dtype}, "
        f"remat {c.model.remat}\n"
        f"an update: {c.batch.users} users x {read} x "
        f"{c.batch.pairs} pairs, {c.batch.microbatches} microbatches; "
        f"signals {c.data.context_len}, summary {c.data.summary_len}, prompt {c.data.turn_len}, "
        f"reply {c.data.answer_len} tokens\n"
        f"{target}: mesh {', '.join(f'{axis} {size}' for axis, size in mesh.items())}"
    )


def render(plan: Plan, fit: Fit) -> str:
    cost = f"{fit.cpu_seconds:.0f} CPU s, {fit.peak_rss / GIB:.1f} GiB"
    lines = [
        render_heading(plan, fit.target),
        f"compiled in {fit.compile_seconds:.0f} s ({cost})",
        "",
        *_render_memory(fit),
    ]
    for turn in fit.turns:
        lines += ["", *_render_turn(plan, turn), *_render_collectives(turn)]
    lines += ["", "structure"]
    lines += [f"  {'ok    ' if check.holds else 'FAILED'} {check.text}" for check in fit.checks]
    if any(turn.seconds for turn in fit.turns):
        lines += ["", ASSUMED]
    return "\n".join(lines)


def _render_memory(fit: Fit) -> list[str]:
    m = fit.memory
    unit, one = ("GiB", GIB) if m.total >= GIB else ("MiB", 2**20)
    lines = [f"{'memory per device':<34}{unit}"]
    sizes = [*m.state.items(), ("temporaries", m.temporaries)]
    lines += [f"  {name:<28}{size / one:>9.2f}" for name, size in sizes]
    if m.cache:
        lines[-1] += f"   among them at times {m.cache / one:.2f} of keys and values while sampling"
    if m.results > 0.005 * one:
        lines.append(f"  {'results beside arguments':<28}{m.results / one:>9.2f}")
    lines.append(f"  {'total':<28}{m.total / one:>9.2f}")
    if m.available:
        left = 100 * (1 - m.total / m.available)
        lines[-1] += f"   of {m.available / one:.2f}: {left:.0f} % are left"
    return lines


def _render_turn(plan: Plan, turn: Turn) -> list[str]:
    large = turn.flops >= 1e11
    amount = f"{turn.flops / 1e12:.1f} TFLOP" if large else f"{turn.flops / 1e9:.1f} GFLOP"
    moved = f"{turn.traffic.hbm_bytes / 1e9:.0f} GB of its memory moved"
    lines = [f"update that trains {TITLES[turn.name]}", f"  {amount} per device, {moved}"]
    if turn.seconds is None:
        return lines
    s = turn.seconds
    columns = "".join(f"{name:>9}" for name in ("compute", "HBM", "links", "slices", "share"))
    lines += [
        f"  seconds: compute {s.compute:.2f}, HBM {s.hbm:.2f}, interconnect {s.interconnect:.2f}, "
        f"cross-slice {s.cross_slice:.2f}; serial {s.serial:.2f}, overlapped {s.best:.2f}; "
        f"bound by {s.bound}",
        f"  share of the peak FLOP/s, serial: {s.serial_fraction:.2f}",
        f"  {'seconds of its scopes':<24}{columns}",
    ]
    for name, inside in turn.scopes.items():
        if inside is not None and inside.serial > 0.0005:
            numbers = "".join(f"{value:>9.3f}" for value in inside)
            title = name.replace("_", " ") or "the rest"
            lines.append(f"    {title:<22}{numbers}{inside.serial_fraction:>9.2f}")
    return [*lines, f"  {_render_daily(plan, s)} of theirs a day"]


def _render_daily(plan: Plan, seconds: Seconds) -> str:
    amounts = {"users and": plan.config.batch.users, "tokens": count_tokens(plan)}
    updates = [86400 / each for each in (seconds.serial, seconds.best)]
    return " ".join(
        f"{_format_large(updates[0] * amount)} to {_format_large(updates[1] * amount)} {name}"
        for name, amount in amounts.items()
    )


def _render_collectives(turn: Turn) -> list[str]:
    sums = turn.traffic.sum_by_kind_and_axes()
    if not sums:
        return []
    lines = [f"  {'between devices':<28}{'over':<24}{'times':>9}{'GB':>9}{'GB sent':>9}"]
    for (kind, axes), (times, payload, sent) in sums.items():
        numbers = f"{times:>9.0f}{payload / 1e9:>9.2f}{sent / 1e9:>9.2f}"
        lines.append(f"    {kind:<26}{', '.join(axes) or '-':<24}{numbers}")
    return lines


def count_tokens(plan: Plan) -> int:
    """Of the users' texts in an update: signals, prompts, both replies and what is sampled."""
    c = plan.config
    pairs = c.batch.pairs * (c.data.turn_len + 2 * c.data.answer_len)
    summaries = c.inference.group_size * c.data.summary_len if plan.samples else plan.told_len
    return c.batch.users * (c.data.context_len + pairs + summaries)


def render_misfit(plan: Plan, target: str, failure: DoesNotFit) -> str:
    needed = f"{failure.needed / GIB:.1f} GiB per device" if failure.needed else "more memory"
    rest = failure.needed - sum(failure.state.values())
    sizes = failure.state | ({"temporaries": int(rest)} if rest > 0 else {})
    largest = sorted(sizes.items(), key=lambda item: -item[1])
    return "\n".join(
        (
            render_heading(plan, target),
            "",
            f"does not fit: the update needs {needed}, {failure.available / GIB:.2f} GiB are there",
            "the largest buffers, GiB per device",
            *(f"  {name:<28}{size / GIB:>9.2f}" for name, size in largest),
        )
    )


def to_json(plan: Plan, fit: Fit) -> dict[str, Any]:
    m = fit.memory
    sizes = {"arguments": m.arguments, "temporaries": m.temporaries, "cache": m.cache}
    return {
        "target": fit.target,
        "devices": fit.num_devices,
        "mesh": dict(plan.mesh.shape),
        "users": plan.config.batch.users,
        "memory": {**m.state, **sizes, "total": m.total},
        "available": m.available,
        "turns": {turn.name: _turn_to_json(turn) for turn in fit.turns},
        "checks": [check._asdict() for check in fit.checks],
        "compile_seconds": fit.compile_seconds,
        "cpu_seconds": fit.cpu_seconds,
        "peak_rss": fit.peak_rss,
    }


def _turn_to_json(turn: Turn) -> dict[str, Any]:
    return {
        "flops": turn.flops,
        "hbm_bytes": turn.traffic.hbm_bytes,
        "sent_bytes": turn.traffic.sum_wire_bytes(),
        "cross_slice_bytes": turn.traffic.sum_wire_bytes(cross_slice=True),
        "seconds": turn.seconds and turn.seconds._asdict(),
        "scopes": {name: inside and inside._asdict() for name, inside in turn.scopes.items()},
        "serial_fraction": turn.seconds and turn.seconds.serial_fraction,
    }


def _format_large(value: float) -> str:
    for unit, size in (("billion", 1e9), ("million", 1e6), ("thousand", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"
