"""What one GPU does: the fused attention against the chunks, whole updates, and scoring, each with
random weights and tokens, in bfloat16.

Every line is printed, and kept in --out, as soon as it is known. Seconds are of the wall clock; MFU
is the FLOPs of the products of matrices as the chunks compute them, over the peak that --peak
names."""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import options
from benchmarks.workloads import GEOMETRIES, WORKLOADS, Geometry, Workload

STEPS = ("peak", "attention", "update", "score")
# (nodes, slots of each) of each level: a text; a user's signals, the turn and 8 summaries; a
# summary, 3 prompts and both replies to each
TREES = {
    "row": ((1, 768),),
    "summaries": ((1, 512), (1, 8), (8, 48)),
    "pairs": ((1, 52), (3, 128), (6, 64)),
}
HEADS = (9, 3, 64)  # query heads, key heads, head_dim: those of SmolLM2-135M


def make_workloads(sizes: Sequence[str]) -> list[Workload]:
    """The lengths of long_popi with other numbers of users and samples, each "users x samples"."""
    made = []
    for size in sizes:
        users, group = map(int, size.split("x"))
        made.append(WORKLOADS["long_popi"]._replace(name=size, users=users, group=group))
    return made


def parse_steps(text: str) -> list[str]:
    """Raises: argparse.ArgumentTypeError for a name that is none."""
    for name in (names := text.split(",")):
        if name not in STEPS:
            raise argparse.ArgumentTypeError(f'"{name}": must be one of {", ".join(STEPS)}')
    return names


def report(out: Path, **line: Any) -> None:
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in line.items()))
    sys.stdout.flush()


def time_call(call: Callable[[], Any], repeats: int) -> float:
    """Median seconds of a call that is compiled already."""
    import jax

    seconds = []
    jax.block_until_ready(call())
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure_peak(size: int) -> float:
    """FLOP/s of a product of bfloat16 matrices with random elements."""
    import jax
    import jax.numpy as jnp

    a = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    product = jax.jit(lambda x: x @ x)
    return 2 * size**3 / time_call(lambda: [product(a) for _ in range(20)], 5) * 20


def compare_attention(out: Path, batch: int, implementation: str, repeats: int) -> None:
    """Distances ||x - y|| / ||y|| from float32 chunks on the CPU, and seconds forward and
    backward."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from popi_jax.models import fused_attention
    from popi_jax.models.attention import Attention, NewTokens, attend
    from popi_jax.models.layout import UNSPLIT

    def chunked(q: Any, k: Any, v: Any, valid: Any, levels: Any) -> Any:
        new = NewTokens(q, k, v, valid, jnp.zeros(valid.shape, jnp.int32))
        return attend(new, levels=levels, how=Attention(score_dim=1))

    def fused(q: Any, k: Any, v: Any, valid: Any, levels: Any) -> Any:
        settings: Any = {"softcap": None, "rules": UNSPLIT, "implementation": implementation}
        return fused_attention.cudnn(q, k, v, valid, levels=levels, **settings)

    def gradient(fn: Any, levels: Any) -> Any:
        def total(q: Any, k: Any, v: Any, valid: Any) -> Any:
            y = fn(q, k, v, valid, levels).astype(jnp.float32)
            y = jnp.where(valid[:, :, None, None], y, 0.0)
            return jnp.sum(jnp.sin(3 * y)), y

        return jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))

    def make_inputs(levels: Any) -> tuple[Any, ...]:
        heads, kv_heads, dim = HEADS
        slots = sum(nodes * length for nodes, length in levels)
        keys = jax.random.split(jax.random.key(slots), 4)
        q, k, v = (
            jax.random.normal(key, (batch, slots, n, dim), jnp.bfloat16)
            for key, n in zip(keys, (heads, kv_heads, kv_heads), strict=False)
        )
        return q * dim**-0.5 * 3, k, v, make_valid(keys[3], levels, batch)

    cpu, wanted = jax.devices("cpu")[0], {}
    ways: tuple[Any, ...] = (
        ("cudnn bfloat16", fused, jnp.bfloat16),
        ("chunked bfloat16", chunked, jnp.bfloat16),
        ("chunked float32", chunked, jnp.float32),
    )
    for (way, fn, dtype), (name, levels) in itertools.product(ways, TREES.items()):
        *args, valid = make_inputs(levels)
        if name not in wanted:  # no products of rounded numbers there
            wide = jax.device_put([x.astype(jnp.float32) for x in args], cpu)
            with jax.default_device(cpu):
                exact = gradient(chunked, levels)(*wide, jax.device_put(valid, cpu))
            wanted[name] = jax.device_get(jax.tree.leaves(exact))
        try:
            run = partial(gradient(fn, levels), *(x.astype(dtype) for x in args), valid)
            found = jax.device_get(jax.tree.leaves(run()))
            far = [
                float(np.linalg.norm(x.astype(np.float32) - y) / np.linalg.norm(y))
                for x, y in zip(found, wanted[name], strict=True)
            ]
            distances = dict(zip(("dq", "dk", "dv", "y"), far, strict=True))
            report(out, tree=name, way=way, **distances, seconds=time_call(run, repeats))
        except Exception as e:  # the other ways are still told
            report(out, tree=name, way=way, error=f"{type(e).__name__}: {str(e)[:600]}")


def make_valid(key: Any, levels: Any, batch: int) -> Any:
    """bool[batch slots]: each node is filled up to a random length."""
    import jax
    import jax.numpy as jnp

    parts = []
    for number, (nodes, length) in enumerate(levels):
        own = jax.random.fold_in(key, number)
        lengths = jax.random.randint(own, (batch, nodes, 1), length // 2, length + 1)
        parts.append((jnp.arange(length)[None, None, :] < lengths).reshape(batch, -1))
    return jnp.concatenate(parts, axis=1)


def time_programs(out: Path, name: str, works: Sequence[Workload], args: Any) -> None:
    """One program of each workload with each attention; all are compiled at once, in threads."""
    import jax

    from benchmarks.measure import read_memory
    from benchmarks.programs import Compute, make_programs
    from popi_jax.flops import count_flops

    geometry: Geometry = GEOMETRIES[args.geometry]
    platform = jax.default_backend()
    cases = []
    with ThreadPoolExecutor() as pool:
        for work in works:
            flops = 0
            for attention in ("chunked", *args.attention):  # the FLOPs are those of the first
                how = Compute(dtype=args.dtype, attention=attention, platform=platform)
                (program,) = make_programs(work, geometry, {name}, how=how)
                given = (program.carry, *program.inputs)
                flops = flops or count_flops(program.step, *given, while_trips=work.summary_len)
                lowered = program.step.lower(*given)  # type: ignore[attr-defined]
                cases.append((work, attention, program, flops, pool.submit(lowered.compile)))
        report(out, program=name, lowered=len(cases))
    for work, attention, program, flops, compiling in cases:
        line: dict[str, Any] = {"program": name, "work": work.name, "attention": attention}
        try:
            run, seconds, carry = compiling.result(), [], program.carry
            for _ in range(args.rounds + 1):
                start = time.perf_counter()
                carry, results = run(carry, *program.inputs)
                jax.block_until_ready((carry, results))
                seconds.append(time.perf_counter() - start)
            median = statistics.median(seconds[1:])
            line |= {"seconds": median, "least": min(seconds[1:]), "most": max(seconds[1:])}
            line |= {"tokens_per_s": work.tokens / median, "pairs": work.users * work.pairs}
            line |= {"tflop": flops / 1e12, "mfu": flops / median / args.peak}
            line |= {"memory_gb": read_memory(run)["total"] / 1e9}
        except Exception as e:
            line |= {"error": f"{type(e).__name__}: {str(e)[:600]}"}
        report(out, **line)
        del carry, program
    stats = jax.devices()[0].memory_stats() or {}
    report(out, program=name, peak_gb=stats.get("peak_bytes_in_use", 0) / 1e9)


def main(argv: Sequence[str] | None = None) -> int:
    flags = options.make_parser(__doc__, rounds=5, workloads=False)
    flags.add_argument(
        "--steps", default=",".join(STEPS), type=parse_steps, metavar="A,B", help="what is measured"
    )
    flags.add_argument("--sizes", default="4x4,32x8", metavar="UxG", help="users x samples")
    flags.add_argument("--score_sizes", default="64x1", metavar="UxG", help="of the scoring")
    flags.add_argument("--attention", default="cudnn", metavar="A,B", help="beside chunked")
    flags.add_argument("--geometry", choices=[*GEOMETRIES], default="smollm2")
    flags.add_argument("--dtype", default="bfloat16")
    flags.add_argument("--implementation", default="cudnn", help="xla: the kernel's counterpart")
    flags.add_argument("--batch", type=options.parse_positive, default=32, help="rows of attention")
    flags.add_argument("--peak", type=float, default=989.4e12, help="FLOP/s (default: an H100 SXM)")
    options.add_out(flags, "work/bench/accelerator.jsonl")
    args: argparse.Namespace = flags.parse_args(argv)
    args.attention = [name for name in args.attention.split(",") if name]
    import jax

    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    report(out, device=str(jax.devices()[0].device_kind), jax=jax.__version__)
    if "peak" in args.steps:
        report(out, matmul_tflop_per_s=measure_peak(8192) / 1e12)
    if "attention" in args.steps:
        compare_attention(out, args.batch, args.implementation, 4 * args.rounds)
    if "update" in args.steps:
        time_programs(out, "fused_update", make_workloads(args.sizes.split(",")), args)
    if "score" in args.steps:
        works = [w._replace(pairs=8) for w in make_workloads(args.score_sizes.split(","))]
        time_programs(out, "reward", works, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
