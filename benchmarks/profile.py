"""Traces steps of one program, for TensorBoard or Perfetto, and sums up on one page where their
time goes."""

import argparse
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import options, tables
from benchmarks.operations import Operation, read_operations
from benchmarks.workloads import GEOMETRIES, TINY, WORKLOADS, Geometry

ROOT = Path(__file__).parents[1]


class Event(NamedTuple):
    name: str
    seconds: float


def read_events(folder: Path) -> list[Event]:
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


def sum_by_operation(
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
    return {name: (seconds[name], runs[name]) for name, _ in _sort_by_size(seconds)}


def render_page(
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
    kind_rows = [
        (kind, 1e3 * s / steps, f"{100 * s / whole:.1f} %") for kind, s in _sort_by_size(kinds)
    ]
    rows = []
    for operation, (seconds, runs) in list(totals.items())[:longest]:
        kind, asked_by, source = known[operation]
        times = 1e3 * seconds / steps, f"{100 * seconds / whole:.1f} %", runs / steps
        place = f"{_shorten(asked_by)} {_make_relative(source)}".strip()
        rows.append((f"`{operation}`", kind, *times, place))
    head = ("operation", "kind", "ms per step", "share", "runs", "asked for by")
    lines = [f"- {key}: {value}" for key, value in facts]
    return "\n".join(
        (
            f"# Profile of {name}\n",
            *lines,
            "- times are those of single operations, several of which ran at once on many cores\n",
            tables.render_table(("kind of operation", "ms per step", "share"), kind_rows),
            "",
            tables.render_table(head, rows),
            "",
        )
    )


def profile_program(
    name: str, steps: int, out: Path, geometry: Geometry = TINY, remat: str = "dots"
) -> str:
    """Raises: LookupError for a name that no program has."""
    import jax

    from benchmarks import measure
    from benchmarks.programs import Compute, make_programs

    work = WORKLOADS[name.partition("/")[0]]
    made = make_programs(work, geometry, {name.partition("/")[2]}, how=Compute(remat=remat))
    if not made:
        known_names = (program.name for program in make_programs(work, TINY))
        raise LookupError(f'"{name}": must be one of {", ".join(known_names)}')
    case = measure.prepare_case(made.pop(), work)
    shutil.rmtree(out, ignore_errors=True)
    with jax.profiler.trace(str(out)):
        case.steps += [case.step() for _ in range(steps)]
    known = read_operations(case.run.as_text())
    cpu = tables.compute_spread([step.cpu for step in case.steps])["median"]
    wall = tables.compute_spread([step.wall for step in case.steps])["median"]
    facts = [
        ("steps traced", str(steps)),
        ("seconds per step, traced", f"{cpu:.3g} CPU, {wall:.3g} wall"),
        (
            "products of matrices",
            f"{case.flops / 1e9:.1f} GFLOP per step, {case.flops / cpu / 1e9:.1f} per CPU second",
        ),
        ("memory", ", ".join(f"{key} {size / 1e6:.0f} MB" for key, size in case.memory.items())),
    ]
    return render_page(
        name, sum_by_operation(read_events(out), known), known, steps=steps, facts=facts
    )


def _sort_by_size(numbers: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(numbers.items(), key=lambda item: -item[1])


def _shorten(path: str) -> str:
    """The last parts of a path of names."""
    return "/".join(path.split("/")[-4:])


def _make_relative(source: str) -> str:
    return source.removeprefix(f"{ROOT}/").rpartition("site-packages/")[2]


def _parse_program(text: str) -> str:
    if text.partition("/")[0] not in WORKLOADS:
        raise argparse.ArgumentTypeError(
            f'"{text}": must begin with one of {", ".join(f"{n}/" for n in WORKLOADS)}'
        )
    return text


def main(argv: Sequence[str] | None = None) -> int:
    flags = options.make_parser(__doc__, rounds=2, workloads=False)
    flags.add_argument(
        "--program",
        type=_parse_program,
        default="popi/fused_update",
        metavar="NAME",
        help="workload/program",
    )
    flags.add_argument("--geometry", choices=GEOMETRIES, default="tiny", help="of the model")
    flags.add_argument("--remat", choices=("none", "dots", "full"), default="dots")
    flags.add_argument(
        "--out",
        type=Path,
        default=Path("work/profile"),
        metavar="FOLDER",
        help="where the trace goes",
    )
    args = flags.parse_args(argv)
    try:
        text = profile_program(
            args.program, args.rounds, args.out, GEOMETRIES[args.geometry], args.remat
        )
    except LookupError as e:
        print(f"error: --program = {e.args[0]}", file=sys.stderr)
        return 2
    tables.write_text(args.out / "summary.md", text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
