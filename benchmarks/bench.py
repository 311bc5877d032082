"""Times every program of the workloads on this machine: seconds per step, tokens, FLOPs, memory,
compilations.

Writes JSON and prints a table in Markdown. Figures of one run compare with one another; for two
revisions use `make bench-compare`, which runs them side by side."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import options, padding, tables
from benchmarks.workloads import TINY, WIDE, WORKLOADS, Geometry, Workload

HEAD = (
    *("program", "CPU s", "min", "max", "wall s", "tokens / CPU s", "GFLOP", "MFU %"),
    *("compile CPU s", "first call s", "memory MB", "temporaries MB"),
)


def choose_programs(
    workloads: Sequence[Workload], geometry: str
) -> list[tuple[Workload, Geometry, bool]]:
    """(workload, geometry, whether the preference step alone): wide models are timed on the first
    workload of pairs."""
    tiny = [(work, TINY, False) for work in workloads] if geometry in ("tiny", "both") else []
    pairs = WORKLOADS["dpo"]._replace(name="wide")
    return tiny + ([(pairs, WIDE, True)] if geometry in ("wide", "both") else [])


def time_programs(plan: Sequence[tuple[Workload, Geometry, bool]], rounds: int) -> dict[str, Any]:
    """Compiles all programs of the plan, then times their steps in turns."""
    from benchmarks import measure
    from benchmarks.programs import make_programs
    from popi_jax.progress import Progress

    peak = measure.measure_matmul_peak()
    cases = []
    with Progress(len(plan), label="workloads compiled", interval=0.0) as progress:
        for number, (work, geometry, one) in enumerate(plan):
            made = make_programs(work, geometry)
            made = made[:1] if one else made
            cases += [measure.prepare_case(program, work) for program in made]
            progress.update(number + 1)
    count = measure.run_rounds(cases, rounds)
    peak = max(peak, measure.measure_matmul_peak())  # the machine may have been slower at the start
    return {
        "machine": measure.describe_machine(),
        "rounds": rounds,
        "matmul_flops_per_cpu_s": peak,
        "peak_rss_bytes": measure.read_peak_rss(),
        "compilations_in_timed_rounds": count,
        "programs": [measure.summarize_case(case, peak) for case in cases],
    }


def render(result: dict[str, Any]) -> str:
    m, peak = result["machine"], result["matmul_flops_per_cpu_s"] / 1e9
    rows = []
    for p in result["programs"]:
        cpu, memory = p["cpu_s"], p["memory_bytes"]
        times = p["program"], cpu["median"], cpu["min"], cpu["max"], p["wall_s"]["median"]
        work = p["tokens_per_cpu_s"], p["flops"] / 1e9, 100 * p["mfu"], p["compile_cpu_s"]
        sizes = memory["total"] / 1e6, memory["temporaries"] / 1e6
        rows.append((*times, *work, p["first_call_wall_s"], *sizes))
    return (
        f"{m['cpu']}, {m['cores']} cores, jax {m['jax']}, "
        f"revision {m['revision']}{' (changed)' * m['dirty']}; "
        f"{result['rounds']} rounds, median; "
        f"matrix products reach {peak:.1f} GFLOP per CPU second; "
        f"the process had at most {result['peak_rss_bytes'] / 1e6:.0f} MB; "
        f"compiled while timed: {result['compilations_in_timed_rounds']}\n\n"
        + tables.render_table(HEAD, rows)
    )


def main(argv: Sequence[str] | None = None) -> int:
    flags = options.make_parser(__doc__, rounds=5)
    text = "tiny: all programs at width 256; wide: the preference step at width 1024"
    flags.add_argument("--geometry", choices=("tiny", "wide", "both"), default="both", help=text)
    text = "leave out the padding in the batches of the sample"
    flags.add_argument("--no-padding", action="store_true", help=text)
    options.add_out(flags, "work/bench/bench.json")
    args: argparse.Namespace = flags.parse_args(argv)
    result = time_programs(
        choose_programs([WORKLOADS[name] for name in args.workloads], args.geometry), args.rounds
    )
    sample = ["--config.data.path=data/none", "--config.data.download=false"]
    shares = [] if args.no_padding else padding.measure_configuration("prism:scale=laptop", sample)
    result["padding"] = shares
    tables.write_json(args.out, result)
    print(render(result))
    if shares:
        print(f"\n{padding.render(shares)}")
    if result["compilations_in_timed_rounds"]:
        print("error: programs were compiled again while their steps were timed", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
