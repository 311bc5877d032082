"""What `make fit` prints, and the numbers of it as JSON."""

import math
from typing import Any

import jax

from popi_jax.planning.fits import GIB, DoesNotFit, Fit, Turn
from popi_jax.planning.plan import Plan

ASSUMED = """times are estimates at the chip's published rates (docs/tpu.md): "serial" adds the four up, "overlapped" is
the longest of them; texts and summaries have their longest lengths"""


def heading(plan: Plan, name: str) -> str:
    c, mesh = plan.config, dict(plan.mesh.shape)
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(plan.state.inference.params))
    what = "adapters of" if c.inference.lora.rank else "parameters of"
    model = c.model.checkpoint.rpartition("/")[2] or "random weights"
    return (
        f"{c.name}, {model}: {count / 1e9:.2f} billion {what} each role, {plan.parts.model.dtype}, "
        f"remat {c.model.remat}\n"
        f"an update: {c.batch.users} users x {c.inference.group_size} summaries x {c.batch.pairs} pairs, "
        f"{c.batch.microbatches} microbatches; signals {c.data.context_len}, summary {c.data.summary_len}, prompt "
        f"{c.data.turn_len}, reply {c.data.answer_len} tokens\n"
        f"{name}: mesh {', '.join(f'{axis} {size}' for axis, size in mesh.items())}"
    )


def render(plan: Plan, fit: Fit) -> str:
    lines = [heading(plan, fit.target)]
    lines += [
        f"compiled in {fit.compile_seconds:.0f} s ({fit.cpu_seconds:.0f} CPU s, {fit.peak_rss / GIB:.1f} GiB)",
        "",
    ]
    lines += _memory(fit)
    for turn in fit.turns:
        lines += ["", *_turn(plan, turn, fit.num_devices)]
    lines += ["", "structure"] if fit.checks else []
    lines += [f"  {'ok    ' if check.holds else 'FAILED'} {check.text}" for check in fit.checks]
    if any(turn.seconds for turn in fit.turns):
        lines += ["", ASSUMED]
    return "\n".join(lines)


def _memory(fit: Fit) -> list[str]:
    m = fit.memory
    rows = [*m.state.items(), ("temporaries", m.temporaries)]
    unit, one = ("GiB", GIB) if m.total >= GIB else ("MiB", 2**20)
    lines = [f"{'memory per device':<34}{unit}"]
    lines += [f"  {name:<28}{size / one:>9.2f}" for name, size in rows]
    lines[-1] += f"   among them at times {m.cache / one:.2f} of keys and values while sampling"
    lines += (
        [f"  {'results beside arguments':<28}{m.results / one:>9.2f}"]
        if m.results > 0.005 * one
        else []
    )
    lines += [f"  {'total':<28}{m.total / one:>9.2f}"]
    if m.available:
        lines[-1] += (
            f"   of {m.available / one:.2f}: {100 * (1 - m.total / m.available):.0f} % are left"
        )
    return lines


def _turn(plan: Plan, turn: Turn, num_devices: int) -> list[str]:
    lines = [
        f"update that trains {'both roles' if turn.name == 'joint' else f'the {turn.name} alone'}"
    ]
    if turn.name != "joint":
        lines[0] = lines[0].replace(" alone", " model" if turn.name == "inference" else "")
    amount = (
        f"{turn.flops / 1e12:.1f} TFLOP" if turn.flops >= 1e11 else f"{turn.flops / 1e9:.1f} GFLOP"
    )
    lines += [f"  {amount} per device, {turn.traffic.hbm_bytes / 1e9:.0f} GB of its memory moved"]
    if turn.seconds is not None:
        s = turn.seconds
        lines += [
            f"  seconds: compute {s.compute:.2f}, HBM {s.hbm:.2f}, interconnect {s.interconnect:.2f}, cross-slice "
            f"{s.cross_slice:.2f}; serial {s.serial:.2f}, overlapped {s.best:.2f}; bound by {s.bound}",
            f"  share of the peak FLOP/s, serial: {s.serial_fraction:.2f}",
        ]
        lines += [
            f"  {'seconds of its parts':<24}{'compute':>9}{'HBM':>9}{'links':>9}{'slices':>9}{'share':>9}"
        ]
        for name, part in (
            (name, part) for name, part in turn.parts.items() if part.serial > 0.0005
        ):
            numbers = "".join(f"{value:>9.3f}" for value in part)
            lines += [
                f"    {name.replace('_', ' ') or 'the rest':<22}{numbers}{part.serial_fraction:>9.2f}"
            ]
        users, tokens = plan.config.batch.users, tokens_of(plan)
        per_day = [86400 / seconds for seconds in (s.serial, s.best)]
        lines += [
            f"  {_big(per_day[0] * users)} to {_big(per_day[1] * users)} users and {_big(per_day[0] * tokens)} to "
            f"{_big(per_day[1] * tokens)} tokens of theirs a day"
        ]
    table = turn.traffic.by_kind_and_axes()
    if table:
        lines += [f"  {'between devices':<28}{'over':<24}{'times':>9}{'GB':>9}{'GB sent':>9}"]
        for (kind, axes), (times, payload, sent) in table.items():
            over = ", ".join(axes) or "-"
            lines += [
                f"    {kind:<26}{over:<24}{times:>9.0f}{payload / 1e9:>9.2f}{sent / 1e9:>9.2f}"
            ]
    return lines


def tokens_of(plan: Plan) -> int:
    """Of the users' texts in an update: signals, prompts, both replies and what is sampled."""
    c = plan.config
    pairs = c.batch.pairs * (c.data.turn_len + 2 * c.data.answer_len)
    return c.batch.users * (
        c.data.context_len + pairs + c.inference.group_size * c.data.summary_len
    )


def render_misfit(plan: Plan, name: str, failure: DoesNotFit) -> str:
    lines = [heading(plan, name), ""]
    needed = (
        f"needs {failure.needed / GIB:.1f} GiB per device"
        if failure.needed
        else "needs more memory"
    )
    lines += [
        f"does not fit: the update {needed}, {failure.available / GIB:.2f} GiB are there",
        "the largest buffers, GiB per device",
    ]
    rest = failure.needed - sum(failure.state.values())
    rows = [*failure.state.items()]
    rows += [("temporaries", int(rest))] if rest > 0 else []
    lines += [
        f"  {name:<28}{size / GIB:>9.2f}" for name, size in sorted(rows, key=lambda row: -row[1])
    ]
    return "\n".join(lines)


def to_json(plan: Plan, fit: Fit) -> dict[str, Any]:
    m = fit.memory
    return {
        "target": fit.target,
        "devices": fit.num_devices,
        "mesh": dict(plan.mesh.shape),
        "users": plan.config.batch.users,
        "memory": {
            **m.state,
            "arguments": m.arguments,
            "temporaries": m.temporaries,
            "cache": m.cache,
            "total": m.total,
        },
        "available": m.available,
        "turns": {
            turn.name: {
                "flops": turn.flops,
                "hbm_bytes": turn.traffic.hbm_bytes,
                "sent_bytes": turn.traffic.wire_bytes(),
                "cross_slice_bytes": turn.traffic.wire_bytes(cross_slice=True),
                "seconds": None if turn.seconds is None else turn.seconds._asdict(),
                "parts": {name: part._asdict() for name, part in turn.parts.items()},
                "serial_fraction": None if turn.seconds is None else turn.seconds.serial_fraction,
            }
            for turn in fit.turns
        },
        "checks": [check._asdict() for check in fit.checks],
        "compile_seconds": fit.compile_seconds,
        "cpu_seconds": fit.cpu_seconds,
        "peak_rss": fit.peak_rss,
    }


def _big(value: float) -> str:
    for unit, size in (("billion", 1e9), ("million", 1e6), ("thousand", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"
