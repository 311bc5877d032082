"""Times every program of the workloads on this machine: seconds per step, tokens, FLOPs, memory,
compilations.

Writes JSON and prints a table in Markdown. Figures of one run compare with one another; for two
revisions use `make bench-compare`, which runs them side by side."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import options, padding
from benchmarks.report import table, write_json
from benchmarks.workloads import TINY, WIDE, WORKLOADS, Geometry, Workload

HEAD = (
    *(
        "program",
        "CPU s",
        "min",
        "max",
        "wall s",
        "tokens / CPU s",
        "GFLOP",
        "MFU %",
        "compile CPU s",
    ),
    *("first call s", "memory MB", "temporaries MB"),
)


def chosen_programs(
    workloads: Sequence[Workload], geometry: str
) -> list[tuple[Workload, Geometry, bool]]:
    """(workload, geometry, whether the preference step alone): wide models are timed on the first
    workload of pairs."""
    tiny = [(work, TINY, False) for work in workloads] if geometry in ("tiny", "both") else []
    pairs = WORKLOADS["dpo"]._replace(name="wide")
    return tiny + ([(pairs, WIDE, True)] if geometry in ("wide", "both") else [])


def bench(plan: Sequence[tuple[Workload, Geometry, bool]], rounds: int) -> dict[str, Any]:
    """Compiles all programs of the plan, then times their steps in turns."""
    from benchmarks import measure
    from benchmarks.programs import programs
    from popi_jax.progress import Progress

    peak = measure.matmul_peak()
    cases = []
    with Progress(len(plan), label="workloads compiled", interval=0.0) as progress:
        for number, (work, geometry, one) in enumerate(plan):
            made = programs(work, geometry)
            cases += [measure.prepare(program, work) for program in (made[:1] if one else made)]
            progress.update(number + 1)
    count = measure.run_rounds(cases, rounds)
    peak = max(peak, measure.matmul_peak())  # the machine may have been slower at the start
    return {
        "machine": measure.machine(),
        "rounds": rounds,
        "matmul_flops_per_cpu_s": peak,
        "peak_rss_bytes": measure.peak_rss(),
        "compilations_in_timed_rounds": count,
        "programs": [measure.summary(case, peak) for case in cases],
    }


def markdown(result: dict[str, Any]) -> str:
    m = result["machine"]
    rows = [
        (
            *(
                p["program"],
                p["cpu_s"]["median"],
                p["cpu_s"]["min"],
                p["cpu_s"]["max"],
                p["wall_s"]["median"],
            ),
            *(
                p["tokens_per_cpu_s"],
                p["flops"] / 1e9,
                100 * p["mfu"],
                p["compile_cpu_s"],
                p["first_call_wall_s"],
            ),
            *(p["memory_bytes"]["total"] / 1e6, p["memory_bytes"]["temporaries"] / 1e6),
        )
        for p in result["programs"]
    ]
    return "\n".join(
        (
            f"{m['cpu']}, {m['cores']} cores, jax {m['jax']}, revision {m['revision']}{' (changed)' * m['dirty']}; "
            f"{result['rounds']} rounds, median; matrix products reach "
            f"{result['matmul_flops_per_cpu_s'] / 1e9:.1f} GFLOP per CPU second; the process had at most "
            f"{result['peak_rss_bytes'] / 1e6:.0f} MB; compiled while timed: {result['compilations_in_timed_rounds']}",
            "",
            table(HEAD, rows),
        )
    )


def main(argv: Sequence[str] | None = None) -> int:
    flags = options.parser(__doc__, rounds=5)
    flags.add_argument(
        "--geometry",
        choices=("tiny", "wide", "both"),
        default="both",
        help="tiny: all programs at width 256; wide: the preference step at width 1024",
    )
    flags.add_argument(
        "--no-padding",
        action="store_true",
        help="leave out the padding in the batches of the sample",
    )
    flags.add_argument(
        "--out", default="work/bench/bench.json", metavar="FILE", help="where the figures go"
    )
    args: argparse.Namespace = flags.parse_args(argv)
    result = bench(
        chosen_programs([WORKLOADS[name] for name in args.workloads], args.geometry), args.rounds
    )
    sample = ["--config.data.path=data/none", "--config.data.download=false"]
    shares = {} if args.no_padding else padding.of_configuration("prism:scale=laptop", sample)
    result["padding"] = {name: one._asdict() for name, one in shares.items()}
    write_json(args.out, result)
    print(markdown(result))
    if shares:
        print(f"\n{padding.markdown(shares)}")
    if result["compilations_in_timed_rounds"]:
        print("error: programs were compiled again while their steps were timed", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
