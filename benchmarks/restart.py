"""Seconds from the start of a process that continues a run to the metrics of its first step, with
JAX's cache of compiled programs and without.

The run is started beforehand and stopped after its first checkpoint; each start continues a copy
of it. Cold and warm starts take turns; before a cold one the cache is deleted."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import options, tables

ROOT = Path(__file__).parents[1]
RUNS = {
    "smoke": ("--config=configs/smoke.py",),
    "prism": ("--config=configs/prism.py", "--config.warmup.steps=0"),
}


class StartError(Exception):
    """Told in one line."""


def train_until_step(name: str, folder: Path, step: int) -> float:
    """Trains in a process of its own and ends it when the metrics of a step are there.

    Returns the seconds until then. Raises: StartError.
    """
    places = {"workdir": "run", "data.prepared": "prepared", "data.path": "published"}
    command = [
        *(sys.executable, "-m", "popi_jax.train", *RUNS[name]),
        *(f"--config.{field}={folder / place}" for field, place in places.items()),
        # metrics of a step are written when it is saved
        *("--config.data.download=false", "--config.schedule.save_every=1"),
    ]
    # without a cache that earlier runs may have filled
    env = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    pipes: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    began = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, env=env, **pipes)
    while process.poll() is None and read_last_step(folder / "run") < step:
        time.sleep(0.01)
    seconds = time.monotonic() - began
    process.terminate()  # it saves, then ends
    _, errors = process.communicate()
    if read_last_step(folder / "run") < step:
        raise StartError(f"{name}: {(errors.strip().splitlines() or ['no message'])[-1]}")
    return seconds


def read_last_step(workdir: Path) -> int:
    """The last step of which the metrics are written, 0 if there is none."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    return json.loads(whole[-1])["step"] if whole else 0


def measure_starts(name: str, rounds: int, folder: Path) -> dict[str, list[float]]:
    """Seconds of the cold and of the warm starts of a run. Raises: StartError."""
    run, begun = folder / "run", folder / "begun"
    for old in (run, begun):
        shutil.rmtree(old, ignore_errors=True)
    train_until_step(name, folder, 1)
    run.rename(begun)
    seconds: dict[str, list[float]] = {"cold": [], "warm": []}
    for number in range(rounds):
        shutil.rmtree(folder / "compiled", ignore_errors=True)
        for kind in seconds:
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(begun, run)
            seconds[kind].append(train_until_step(name, folder, read_last_step(run) + 1))
        print(f"{name}: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    return seconds


def render(starts: dict[str, dict[str, list[float]]]) -> str:
    rows = []
    for name, seconds in starts.items():
        middle = {kind: statistics.median(values) for kind, values in seconds.items()}
        ratios = [cold / warm for cold, warm in zip(seconds["cold"], seconds["warm"], strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        rows.append((name, middle["cold"], middle["warm"], statistics.median(ratios), spread))
    return tables.render_table(("seconds", "cold", "warm", "cold / warm", "in one round"), rows)


def main(argv: Sequence[str] | None = None) -> int:
    flags = options.make_parser(__doc__, rounds=3, workloads=False)
    allowed: Any = {"nargs": "+", "choices": [*RUNS], "default": [*RUNS]}
    flags.add_argument("--runs", **allowed, help="configurations that are started")
    place: Any = {"type": Path, "default": Path("work/restart")}
    flags.add_argument("--folder", **place, help="where data and programs are kept")
    options.add_out(flags, "work/bench/restart.json")
    args = flags.parse_args(argv)
    starts: dict[str, dict[str, list[float]]] = {}
    try:
        for name in args.runs:
            folder = args.folder.resolve() / name
            folder.mkdir(parents=True, exist_ok=True)
            starts[name] = measure_starts(name, args.rounds, folder)
    except StartError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    tables.write_json(args.out, starts)
    print(render(starts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
