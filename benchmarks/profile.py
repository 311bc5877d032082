"""Traces steps of one program, for TensorBoard or Perfetto, and sums up on one page where their
time goes."""

import argparse
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import options
from benchmarks.hlo import Operation, operations
from benchmarks.report import table, write_text
from benchmarks.workloads import TINY, WORKLOADS

ROOT = Path(__file__).parents[1]


class Event(NamedTuple):
    name: str
    seconds: float


def events_of(folder: Path) -> list[Event]:
    """The runs of single operations in the newest trace below a folder; of the waiting around them
    none."""
    from jax.profiler import ProfileData

    newest = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    found = []
    for plane in ProfileData.from_file(str(newest)).planes:
        for line in plane.lines:
            for event in line.events:
                if any(key == "hlo_op" for key, _ in event.stats) or line.name.startswith("tf_XLA"):
                    found.append(Event(event.name, event.duration_ns / 1e9))
    return found


def by_operation(
    events: Iterable[Event], known: Mapping[str, Operation]
) -> dict[str, tuple[float, int]]:
    """Operation -> (seconds, runs); what is no operation of the program is left out, as are loops
    around others."""
    seconds: defaultdict[str, float] = defaultdict(float)
    runs: Counter[str] = Counter()
    for event in events:
        if event.name in known:
            seconds[event.name] += event.seconds
            runs[event.name] += 1
    return {name: (seconds[name], runs[name]) for name, _ in _largest(seconds)}


def page(
    name: str,
    totals: Mapping[str, tuple[float, int]],
    known: Mapping[str, Operation],
    *,
    steps: int,
    facts: Sequence[tuple[str, str]],
    longest: int = 20,
) -> str:
    whole = sum(seconds for seconds, _ in totals.values()) or 1.0
    kinds: defaultdict[str, float] = defaultdict(float)
    for operation, (seconds, _) in totals.items():
        kinds[known[operation].kind] += seconds
    of_kinds = [(kind, 1e3 * s / steps, f"{100 * s / whole:.1f} %") for kind, s in _largest(kinds)]
    of_operations = [
        (
            f"`{operation}`",
            *(
                known[operation].kind,
                1e3 * seconds / steps,
                f"{100 * seconds / whole:.1f} %",
                runs / steps,
            ),
            f"{_short(known[operation].asked_by)} {_relative(known[operation].source)}".strip(),
        )
        for operation, (seconds, runs) in list(totals.items())[:longest]
    ]
    return "\n".join(
        (
            f"# Profile of {name}",
            "",
            *(f"- {key}: {value}" for key, value in facts),
            "- times are those of single operations as they ran, several of them at once on several cores",
            "",
            table(("kind of operation", "ms per step", "share"), of_kinds),
            "",
            table(
                ("operation", "kind", "ms per step", "share", "runs", "asked for by"), of_operations
            ),
            "",
        )
    )


def profile(name: str, steps: int, out: Path) -> str:
    """Raises: LookupError for a name that no program has."""
    import jax

    from benchmarks import measure
    from benchmarks.programs import programs

    work = WORKLOADS[name.partition("/")[0]]
    made = {program.name: program for program in programs(work, TINY)}
    if name not in made:
        raise LookupError(f'"{name}": must be one of {", ".join(made)}')
    case = measure.prepare(made[name], work)
    shutil.rmtree(out, ignore_errors=True)
    with jax.profiler.trace(str(out)):
        case.steps += [case.step() for _ in range(steps)]
    known = operations(case.run.as_text())
    cpu = measure.spread([step.cpu for step in case.steps])["median"]
    wall = measure.spread([step.wall for step in case.steps])["median"]
    facts = [
        ("steps traced", str(steps)),
        ("seconds per step, traced", f"{cpu:.3g} CPU, {wall:.3g} wall"),
        (
            "products of matrices",
            f"{case.flops / 1e9:.1f} GFLOP per step, {case.flops / cpu / 1e9:.1f} per CPU second",
        ),
        ("memory", ", ".join(f"{key} {size / 1e6:.0f} MB" for key, size in case.memory.items())),
    ]
    return page(name, by_operation(events_of(out), known), known, steps=steps, facts=facts)


def _largest(numbers: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(numbers.items(), key=lambda item: -item[1])


def _short(path: str) -> str:
    """The last parts of a path of names."""
    return "/".join(path.split("/")[-4:])


def _relative(source: str) -> str:
    return source.removeprefix(f"{ROOT}/").rpartition("site-packages/")[2]


def _workload_of(text: str) -> str:
    if text.partition("/")[0] not in WORKLOADS:
        raise argparse.ArgumentTypeError(
            f'"{text}": must begin with one of {", ".join(f"{n}/" for n in WORKLOADS)}'
        )
    return text


def main(argv: Sequence[str] | None = None) -> int:
    flags = options.parser(__doc__, rounds=2, workloads=False)
    flags.add_argument(
        "--program",
        type=_workload_of,
        default="popi/fused_update",
        metavar="NAME",
        help="workload/program",
    )
    flags.add_argument(
        "--out",
        type=Path,
        default=Path("work/profile"),
        metavar="FOLDER",
        help="where the trace goes",
    )
    args = flags.parse_args(argv)
    try:
        text = profile(args.program, args.rounds, args.out)
    except LookupError as e:
        print(f"error: --program = {e.args[0]}", file=sys.stderr)
        return 2
    write_text(args.out / "summary.md", text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
