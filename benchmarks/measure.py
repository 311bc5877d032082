"""Compiles programs, runs their steps in turns, and counts seconds, FLOPs, memory and
compilations."""

import dataclasses
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.programs import Program
from benchmarks.tables import compute_spread
from benchmarks.workloads import Workload
from popi_jax.flops import count_flops
from popi_jax.progress import Progress

ROOT = Path(__file__).parents[1]
# event of JAX: one program was compiled, or read from a cache
COMPILED = "/jax/core/compile/backend_compile_duration"
SQUARE = (512, 1024, 2048)
TALL = ((4096, 256, 1024), (4096, 1024, 256), (2048, 1024, 4096))


class Seconds(NamedTuple):
    cpu: float  # of all threads of the process
    wall: float


@dataclasses.dataclass
class Case:
    """A program that is compiled, and what was measured of it. Each step goes on from the state of
    the one before."""

    name: str
    tokens: int  # distinct tokens of the work
    run: Any
    carry: Any
    inputs: tuple[Any, ...]
    flops: int
    memory: dict[str, int]
    trace: Seconds
    compile: Seconds
    first: Seconds
    steps: list[Seconds] = dataclasses.field(default_factory=list)

    def step(self) -> Seconds:
        start = _read_clock()
        self.carry, results = self.run(self.carry, *self.inputs)
        jax.block_until_ready((self.carry, results))
        return _measure_since(start)


def prepare_case(program: Program, work: Workload) -> Case:
    """Compiles a program and runs its first step. The rollout of a workload writes `summary_len`
    tokens."""
    arguments = (program.carry, *program.inputs)
    start = _read_clock()
    lowered = program.step.lower(*arguments)  # type: ignore[attr-defined]
    traced, start = _measure_since(start), _read_clock()
    compiled = lowered.compile()
    seconds = _measure_since(start)
    counted = count_flops(program.step, *arguments, while_trips=max(work.summary_len, 1))
    zero = Seconds(0.0, 0.0)
    case = Case(
        program.name,
        work.tokens,
        compiled,
        *(program.carry, program.inputs, counted),
        {},
        traced,
        seconds,
        zero,
    )
    case.memory = read_memory(compiled)
    case.first = case.step()
    return case


def read_memory(compiled: Any) -> dict[str, int]:
    """Bytes that a compiled program needs at once; a donated argument, in which an output lies,
    counts once."""
    stats = compiled.memory_analysis()
    sizes = {
        "arguments": stats.argument_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "alias": stats.alias_size_in_bytes,
    }
    return sizes | {
        "total": sizes["arguments"] + sizes["temporaries"] + sizes["outputs"] - sizes["alias"]
    }


def run_rounds(
    cases: Sequence[Case], rounds: int, *, label: str = "steps", interval: float = 10.0
) -> int:
    """Runs one step of each case per round, so that drift of the machine hits all alike; returns
    the compilations."""
    with (
        count_compilations() as count,
        Progress(rounds * len(cases), label=label, interval=interval) as progress,
    ):
        for step in range(rounds * len(cases)):
            case = cases[step % len(cases)]
            case.steps.append(case.step())
            progress.update(step + 1)
    return count[0]


@contextmanager
def count_compilations() -> Iterator[list[int]]:
    """Counts in a list of one number the programs that are compiled meanwhile."""
    count = [0]

    def listen(event: str, seconds: float, **_: Any) -> None:
        count[0] += event == COMPILED

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield count
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def measure_matmul_peak(
    shapes: Iterable[tuple[int, int, int]] = (*((n, n, n) for n in SQUARE), *TALL), repeats: int = 5
) -> float:
    """FLOP per CPU second of the fastest float32 product of matrices: what a program could reach
    here and now."""
    product, best = jax.jit(jnp.matmul), 0.0
    for m, k, n in shapes:
        a, b = jnp.ones((m, k)), jnp.ones((k, n))
        times = max(1, int(4e9 / (2 * m * k * n)))  # some 50 ms at least, as clocks are coarse
        jax.block_until_ready(product(a, b))
        for _ in range(repeats):
            start = _read_clock()
            for _ in range(times):
                out = product(a, b)
            jax.block_until_ready(out)
            best = max(best, 2 * m * k * n * times / max(_measure_since(start).cpu, 1e-9))
    return best


def summarize_case(case: Case, peak: float) -> dict[str, Any]:
    """What is reported of a case; `mfu` is the share of the matrix products' peak in the CPU
    seconds of a step."""
    cpu = compute_spread([step.cpu for step in case.steps])
    return {
        "program": case.name,
        "tokens": case.tokens,
        "trace_cpu_s": case.trace.cpu,
        "compile_cpu_s": case.compile.cpu,
        "first_call_wall_s": case.first.wall,
        "cpu_s": cpu,
        "wall_s": compute_spread([step.wall for step in case.steps]),
        "tokens_per_cpu_s": case.tokens / max(cpu["median"], 1e-9),
        "flops": case.flops,
        "mfu": case.flops / max(cpu["median"], 1e-9) / peak,
        "memory_bytes": case.memory,
    }


def read_peak_rss() -> int:
    """Bytes of memory that this process had at most."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def describe_machine() -> dict[str, Any]:
    """What figures depend on beside the code."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": len(names) or jax.device_count(),
        "backend": jax.default_backend(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "revision": run_git("rev-parse", "--short", "HEAD"),
        "dirty": bool(run_git("status", "--porcelain")),
    }


def run_git(*args: str) -> str:
    """What git says of this tree; "" where there is none."""
    try:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _read_clock() -> Seconds:
    return Seconds(time.process_time(), time.perf_counter())


def _measure_since(start: Seconds) -> Seconds:
    now = _read_clock()
    return Seconds(now.cpu - start.cpu, now.wall - start.wall)
