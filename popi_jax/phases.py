"""The phases of a schedule: which role is trained for how many updates."""

import itertools
import re
import typing
from typing import Any, Literal, NamedTuple

from popi_jax.errors import check_field, did_you_mean

Mode = Literal["inference", "generator", "joint", "alternate", "supervised", "stored"]


class Phase(NamedTuple):
    """A stretch of updates; (num_inference, num_generator) is (1, 0) in "inference" and
    "supervised", (0, 1) in "generator" and "stored", (1, 1) in "joint", and (n, m) in "alternate
    n:m": n updates, then m."""

    mode: Mode
    num_inference: int
    num_generator: int
    steps: int


def parse_phases(phases: tuple[str, ...]) -> tuple[Phase, ...]:
    """Parses the phases of a schedule, e.g. ("inference 240", "alternate 2:1 60").

    Raises:
        UserError: for anything that is not one of the six forms with whole numbers of at least 1.
    """
    return tuple(_parse_phase(phase, f"schedule.phases[{i}]") for i, phase in enumerate(phases))


def list_updates(phases: tuple[Phase, ...]) -> list[Mode]:
    """What each update trains, in order: inference, generator, joint, supervised or stored."""
    inference: list[Mode] = ["inference"]
    generator: list[Mode] = ["generator"]
    found: list[Mode] = []
    for phase in phases:
        cycle = [phase.mode]
        if phase.mode == "alternate":
            cycle = inference * phase.num_inference + generator * phase.num_generator
        found += [cycle[number % len(cycle)] for number in range(phase.steps)]
    return found


def list_writes(phases: tuple[Phase, ...]) -> list[int]:
    """The numbers of the updates, from 0, before which summaries are written and stored: the first
    of each phase "stored"."""
    starts = itertools.accumulate((phase.steps for phase in phases), initial=0)
    return [start for start, phase in zip(starts, phases, strict=False) if phase.mode == "stored"]


def find_change(before: tuple[str, ...], now: tuple[str, ...]) -> str:
    """Why a run that was begun with the phases `before` cannot go on with `now`; "" if it can: when
    the updates are the same, and perhaps more. Raises: UserError as `parse_phases`."""
    parsed = [parse_phases(phases) for phases in (before, now)]
    old, new = map(list_updates, parsed)
    for number, (a, b) in enumerate(zip(old, new, strict=False), 1):
        if a != b:
            return f"update {number} was {a}, is {b}; more may follow, but none may change"
    writes = [set(list_writes(phases)) for phases in parsed]
    for at in sorted(writes[0] ^ writes[1]):
        if at < min(len(old), len(new)):
            was, becomes = ("new", "earlier") if at in writes[0] else ("earlier", "new")
            told = f"update {at + 1} was behind {was} summaries, is behind {becomes} ones"
            return f"{told}; more may follow, but none may change"
    if len(new) < len(old):
        return f"it was begun with {len(old)} updates and may go on with more, not with {len(new)}"
    return ""


def _parse_phase(phase: str, name: str) -> Phase:
    modes = typing.get_args(Mode)
    mode: Any = (phase.split() or [""])[0]
    rule = f"must begin with one of {', '.join(modes)}.{did_you_mean(mode, modes)}"
    check_field(mode in (*modes, ""), name, phase, rule)
    form = r"(?:inference|generator|joint|supervised|stored|alternate\s+(\d+):(\d+))\s+(\d+)"
    match = re.fullmatch(form, phase.strip())
    rule = 'must be like "inference 240", "generator 60", "joint 60", "alternate 2:1 60", '
    rule += '"stored 60" or "supervised 60"'
    check_field(match is not None, name, phase, rule)
    n, m, steps = (int(number or 1) for number in typing.cast(re.Match, match).groups())
    check_field(min(n, m, steps) >= 1, name, phase, f"{rule}, with numbers of at least 1")
    alone = mode in ("inference", "supervised")
    return Phase(mode, n if mode not in ("generator", "stored") else 0, 0 if alone else m, steps)
