"""How seconds per step grow with the users, with the pairs of each (K) and with the samples of each
(G).

Straight lines are fitted to CPU seconds by least squares. Samples are measured for signals and
summaries of two lengths: the signals of a user are read once for all samples, so what one more
sample costs should depend on the length of the summary and hardly on that of the signals."""

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks import options, tables
from benchmarks.growth_chart import Line, Panel, draw
from benchmarks.workloads import TINY, Workload

# heads of 64, as in small released models: with smaller ones a softmax costs a CPU as much as the
# products around it
GEOMETRY = TINY._replace(num_layers=2, vocab_size=1024, embed_dim=512, head_dim=64, mlp_dim=2048)
# small works of the three kinds; one number of each is varied
PAIRS = Workload("pairs", "dpo", users=2, pairs=2, signals_len=64, prompt_len=32, answer_len=32)
SAMPLES = Workload("samples", "grpo", users=2, group=4, signals_len=256, summary_len=16)
BOTH = Workload(
    *("both", "popi"),
    users=2,
    pairs=2,
    group=4,
    signals_len=128,
    prompt_len=32,
    answer_len=32,
    summary_len=16,
)
STEPS = {
    "pairs": "generator_step+stored_reference",
    "samples": "inference_step",
    "both": "fused_update",
}
LABELS = {"pairs": "preference step", "samples": "policy-gradient step", "both": "fused update"}


class Series(NamedTuple):
    panel: str  # users | pairs | samples
    label: str
    works: list[tuple[int, Workload]]  # the number that is varied, and the work with it


class Fit(NamedTuple):
    slope: float  # seconds for one more
    intercept: float
    r2: float  # share of the variance that the line explains


def fit_line(points: Sequence[tuple[float, float]]) -> Fit:
    """The least-squares line through points (x, y), of at least two different x."""
    n = len(points)
    mean_x, mean_y = sum(x for x, _ in points) / n, sum(y for _, y in points) / n
    xx = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / xx
    intercept = mean_y - slope * mean_x
    total = sum((y - mean_y) ** 2 for _, y in points)
    rest = sum((y - intercept - slope * x) ** 2 for x, y in points)
    return Fit(slope, intercept, 1 - rest / total if total else 1.0)


def plan_series(panels: Sequence[str]) -> list[Series]:
    found = [
        Series("users", LABELS[w.name], [(n, w._replace(users=n)) for n in (1, 2, 4, 8)])
        for w in (PAIRS, SAMPLES, BOTH)
    ]
    found += [
        Series("pairs", LABELS[w.name], [(n, w._replace(pairs=n)) for n in (1, 2, 4, 8)])
        for w in (PAIRS, BOTH)
    ]
    for summary_len in (16, 32):
        for signals_len in (256, 512):
            work = SAMPLES._replace(summary_len=summary_len, signals_len=signals_len)
            works = [(n, work._replace(group=n)) for n in (2, 4, 8, 16)]
            found.append(Series("samples", f"signals {signals_len}, summary {summary_len}", works))
    return [series for series in found if series.panel in panels]


def measure_growth(series: Sequence[Series], rounds: int) -> dict[str, Any]:
    """Compiles one program for each point, then times all of them in turns."""
    from benchmarks import measure
    from benchmarks.programs import make_programs
    from popi_jax.progress import Progress

    works = dict.fromkeys(work for one in series for _, work in one.works)
    cases: dict[Workload, measure.Case] = {}
    with Progress(len(works), label="programs compiled", interval=10.0) as progress:
        for work in works:
            name = f"{work.name}/{STEPS[work.name]}"
            (program,) = (p for p in make_programs(work, GEOMETRY) if p.name == name)
            cases[work] = measure.prepare_case(program, work)
            progress.update(len(cases))
    compiled = measure.run_rounds([*cases.values()], rounds)
    lines = []
    for one in series:
        points = [
            (n, tables.compute_spread([s.cpu for s in cases[work].steps])["median"])
            for n, work in one.works
        ]
        flops = [(n, cases[work].flops) for n, work in one.works]
        memory = [(n, cases[work].memory["total"]) for n, work in one.works]
        lines.append(
            {
                **{
                    "panel": one.panel,
                    "label": one.label,
                    "cpu_s": points,
                    "fit": fit_line(points)._asdict(),
                },
                **{"flops": flops, "flops_fit": fit_line(flops)._asdict(), "memory_bytes": memory},
            }
        )
    return {
        "machine": measure.describe_machine(),
        "rounds": rounds,
        "compilations_in_timed_rounds": compiled,
        "lines": lines,
    }


def render(result: dict[str, Any]) -> str:
    rows = [
        (
            *(line["panel"], line["label"], ", ".join(f"{n}: {s:.3g}" for n, s in line["cpu_s"])),
            *(
                1e3 * line["fit"]["slope"],
                1e3 * line["fit"]["intercept"],
                f"{line['fit']['r2']:.4f}",
            ),
            *(line["flops_fit"]["slope"] / 1e9, f"{line['flops_fit']['r2']:.4f}"),
        )
        for line in result["lines"]
    ]
    head = (
        "against",
        "step",
        "CPU s",
        "ms for one more",
        "ms at none",
        "R²",
        "GFLOP for one more",
        "R² of FLOP",
    )
    return tables.render_table(head, rows)


def draw_chart(result: dict[str, Any]) -> str:
    titles = {"users": "users", "pairs": "pairs of a user (K)", "samples": "samples of a user (G)"}
    panels = []
    for name, title in titles.items():
        lines = [
            Line(line["label"], line["cpu_s"], line["fit"]["slope"], line["fit"]["intercept"])
            for line in result["lines"]
            if line["panel"] == name
        ]
        if lines:
            panels.append(Panel(f"Cost against {title}", title, lines))
    return draw(panels, "CPU seconds per step")


def main(argv: Sequence[str] | None = None) -> int:
    flags = options.make_parser(__doc__, rounds=5, workloads=False)
    names = ("users", "pairs", "samples")
    flags.add_argument("--only", choices=names, nargs="+", default=names, help="what is varied")
    options.add_out(flags, "work/bench/growth.json")
    flags.add_argument(
        "--chart",
        default="docs/performance/growth.svg",
        metavar="FILE",
        help="where the chart goes",
    )
    args = flags.parse_args(argv)
    result = measure_growth(plan_series(args.only), args.rounds)
    tables.write_json(args.out, result)
    tables.write_text(args.chart, draw_chart(result))
    print(render(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
