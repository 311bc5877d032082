"""Seconds from the start of a process that continues a run to the end of its first step, compiled
programs kept or not.

The run is started beforehand and stopped after its first checkpoint. Cold and warm starts take
turns; before a cold one the folder of compiled programs is deleted."""

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

from benchmarks import options
from benchmarks.report import table, write_json

ROOT = Path(__file__).parents[1]
RUNS = {
    "smoke": ("--config=configs/smoke.py",),
    "prism": ("--config=configs/prism.py", "--config.warmup.steps=0"),
}


class StartError(Exception):
    """Told in one line."""


def flags_of(name: str, folder: Path) -> list[str]:
    places = {
        "workdir": folder / "run",
        "data.prepared": folder / "prepared",
        "data.path": folder / "published",
    }
    return [
        *RUNS[name],
        *(f"--config.{field}={path}" for field, path in places.items()),
        "--config.data.download=false",
    ]


def begin(name: str, folder: Path) -> None:
    """Trains until the first checkpoint is there, then stops the run as a user would. Raises:
    StartError."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    command = [
        sys.executable,
        "-m",
        "popi_jax.train",
        *flags_of(name, folder),
        "--config.schedule.save_every=1",
    ]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=_own_cache(),
    )
    checkpoints = folder / "run" / "checkpoints"
    while process.poll() is None and not (checkpoints / "1").exists():
        time.sleep(0.1)
    process.terminate()
    _, errors = process.communicate()
    if not any(path.name.isdigit() for path in checkpoints.glob("*")):
        raise StartError(f"{name}: {(errors.strip().splitlines() or ['no message'])[-1]}")


def start(name: str, folder: Path) -> dict[str, Any]:
    """One start of the run in a process of its own. Raises: StartError."""
    command = [sys.executable, "-m", "benchmarks.start", repr(time.time()), *flags_of(name, folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=_own_cache(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise StartError(f"{name}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def _own_cache() -> dict[str, str]:
    """The environment, without a cache that earlier runs may have filled."""
    return {
        name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"
    }


def restart(names: Sequence[str], rounds: int, folder: Path) -> dict[str, Any]:
    """Raises: StartError."""
    results = {}
    for name in names:
        own = folder / name
        own.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        begin(name, own)
        found: dict[str, list[dict[str, Any]]] = {"cold": [], "warm": []}
        for number in range(rounds):
            shutil.rmtree(own / "compiled", ignore_errors=True)
            for kind in found:
                found[kind].append(start(name, own))
            left = (time.monotonic() - began) / (number + 1) * (rounds - number - 1)
            print(
                f"{name}: round {number + 1} of {rounds}, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )
        results[name] = found
    return results


def middle(starts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The start whose seconds are the median (of two in the middle the lower)."""
    number = statistics.median_low([one["seconds"] for one in starts])
    return next(one for one in starts if one["seconds"] == number)


def markdown(results: dict[str, Any]) -> str:
    text = []
    for name, found in results.items():
        cold, warm = middle(found["cold"]), middle(found["warm"])
        rows: list[tuple[Any, ...]] = [("all", cold["seconds"], warm["seconds"])]
        rows += [(part, cold["parts"][part], warm["parts"][part]) for part in cold["parts"]]
        rows += [
            (f"of these: {part}", cold["within"][part], warm["within"][part])
            for part in cold["within"]
        ]
        rows += [("programs compiled", cold["compiled"], warm["compiled"])]
        rounds = [
            a["seconds"] / b["seconds"] for a, b in zip(found["cold"], found["warm"], strict=True)
        ]
        ratio = f"{cold['seconds'] / warm['seconds']:.2f} (in one round {min(rounds):.2f} to {max(rounds):.2f})"
        text += [f"{name}: cold / warm = {ratio}", "", table(("seconds", "cold", "warm"), rows), ""]
    return "\n".join(text)


def main(argv: Sequence[str] | None = None) -> int:
    flags = options.parser(__doc__, rounds=3, workloads=False)
    flags.add_argument(
        "--runs",
        nargs="+",
        choices=[*RUNS],
        default=[*RUNS],
        help="configurations that are started",
    )
    flags.add_argument(
        "--folder", type=Path, default=Path("work/restart"), help="where data and programs are kept"
    )
    flags.add_argument(
        "--out", default="work/bench/restart.json", metavar="FILE", help="where the figures go"
    )
    args = flags.parse_args(argv)
    try:
        results = restart(args.runs, args.rounds, args.folder.resolve())
    except StartError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    write_json(args.out, results)
    print(markdown(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
