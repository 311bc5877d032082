"""Times popi_jax and the trainers of TRL and Tunix on the same work, each in a process of its own
environment.

    python -m benchmarks.peers.run --workloads=dpo,grpo --rounds=5

For each workload the workers are started, make their first step one after the other (this is where
compilers work), and then take turns: one step each, round after round, so that what else the
machine does falls on all of them alike. A worker that waits uses no processor. Results go to
OUT/results.json and OUT/results.md, what the workers print to OUT/logs.

All workers run with an allocator that keeps freed memory instead of giving it back to the system:
this takes about a third off the processor time of large steps of TRL and of Tunix. The three
workers together need up to 20 GB: Tunix takes 13 for "popi_dpo". With less memory give one peer at
a time, --workers=popi_jax,tunix, or have one worker end before the next starts: --apart."""

import argparse
import json
import os
import pathlib
import platform
import queue
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

from benchmarks.peers import comparison
from benchmarks.workloads import GEOMETRIES, STORED_REFERENCE, WORKLOADS

ROOT = pathlib.Path(__file__).parents[2]
PEERS = pathlib.Path(".venv-peers")
WORKERS = {"popi_jax": "popi_worker", "trl": "trl_worker", "tunix": "tunix_worker"}
NAMES = [
    *WORKLOADS,
    *(
        f"{name}{STORED_REFERENCE}"
        for name, workload in WORKLOADS.items()
        if workload.kind == "dpo"
    ),
]
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**26),
}


class Failed(Exception):
    """A worker could not do what was asked of it."""


class Worker:
    """The process of a worker. Each method waits at most `timeout` seconds for an answer."""

    def __init__(self, name: str, geometry: str, log: pathlib.Path, timeout: float) -> None:
        self.name, self._log, self._timeout = name, log, timeout
        self._answers: queue.Queue[str] = queue.Queue()
        self._scratch = tempfile.TemporaryDirectory(
            prefix=f"peers-{name}-"
        )  # a killed process leaves its files
        with log.open("w") as stream:
            self._process = subprocess.Popen(
                [
                    find_interpreter(name),
                    "-m",
                    f"benchmarks.peers.{WORKERS[name]}",
                    f"--geometry={geometry}",
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
                cwd=ROOT,
                env=os.environ | ALLOCATOR | {"TMPDIR": self._scratch.name},
            )
        threading.Thread(target=self._read, daemon=True).start()
        self.versions: dict[str, str] = {}

    def start(self) -> None:
        """Waits until it is ready."""
        self.versions = self._read_answer()["ready"]["versions"]

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def _read_answer(self) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=self._timeout)
        except queue.Empty:
            raise Failed(
                f"no answer within {self._timeout:.0f} s; see logs/{self._log.name}"
            ) from None
        if not line:
            code = self._process.wait()
            why = (
                "killed, as the system does when memory runs out"
                if code == -9
                else f"ended with {code}"
            )
            raise Failed(f"{why}: {read_last_line(self._log)}; see logs/{self._log.name}")
        return json.loads(line)

    def run(self, workload: str, steps: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"workload": workload, "steps": steps}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer says why
        answer = self._read_answer()
        if "error" in answer:
            raise Failed(f"{answer['error']}; see logs/{self._log.name}")
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._scratch.cleanup()


def find_interpreter(name: str) -> str:
    """The Python that a worker runs with."""
    return sys.executable if name == "popi_jax" else str(ROOT / PEERS / name / "bin" / "python")


def read_last_line(log: pathlib.Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it printed nothing"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def open_worker(
    worker_name: str, workload: str, args: argparse.Namespace
) -> tuple[Worker, dict[str, Any]]:
    """A worker after its first step, and its answer to that."""
    log = args.out / "logs" / f"{workload}.{worker_name}.txt"
    worker = Worker(worker_name, args.geometry, log, args.timeout)
    try:
        worker.start()
        return worker, worker.run(workload, 0)
    except BaseException:
        worker.close()
        raise


class Timing:
    """What is found about one workload: steps of each worker, and why a worker has none."""

    def __init__(self, workload: str, args: argparse.Namespace) -> None:
        self.workload, self._args = workload, args
        self._workers: dict[str, Worker] = {}
        names = ("steps", "failures", "counts", "notes", "versions", "first_step", "peak_bytes")
        self.result: dict[str, Any] = {name: {} for name in names}

    def _fail(self, worker_name: str, failure: Failed) -> None:
        say(f"{self.workload}: {worker_name} failed: {failure}")
        self.result["failures"][worker_name] = str(failure)
        self.result["steps"].pop(worker_name, None)
        if worker_name in self._workers:
            self._workers.pop(worker_name).close()

    def open(self, worker_name: str) -> None:
        """Starts a worker, which makes its first step."""
        say(f"{self.workload}: {worker_name} starts")
        began = time.perf_counter()
        try:
            worker, answer = open_worker(worker_name, self.workload, self._args)
        except Failed as failure:
            self._fail(worker_name, failure)
            return
        self._workers[worker_name] = worker
        of = {"first_step": time.perf_counter() - began, "versions": worker.versions}
        of["steps"] = [answer["first"]] if self._args.first else []
        of |= {name: answer[name] for name in ("counts", "notes", "peak_bytes")}
        for name, value in of.items():
            self.result[name][worker_name] = value

    def step(self, round_number: int) -> None:
        """One step of each worker that is open."""
        shown = []
        for worker_name, worker in list(self._workers.items()):
            try:
                answer = worker.run(self.workload, 1)
            except Failed as failure:
                self._fail(worker_name, failure)
                continue
            step = answer["steps"][0]
            self.result["peak_bytes"][worker_name] = answer["peak_bytes"]
            self.result["steps"][worker_name].append(step)
            shown.append(f"{worker_name} {step['cpu']:.2f} s")
        steps = ", ".join(shown) or "none"
        rounds = f"round {round_number} of {self._args.rounds}"
        say(f"{self.workload}: {rounds}, processor time: {steps}")

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()
        self._workers = {}


def time_workload(workload: str, args: argparse.Namespace) -> dict[str, Any]:
    """Steps of each worker, one of each per round; or with --apart all of one after the other."""
    timing = Timing(workload, args)
    groups = [[name] for name in args.workers] if args.apart else [args.workers]
    try:
        for group in groups:
            for worker_name in group:
                timing.open(worker_name)
            for number in range(1, args.rounds + 1):
                timing.step(number)
            timing.close()
    finally:
        timing.close()
    return timing.result


def describe_machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    model = platform.processor() or platform.machine()
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        models = [
            line.split(":", 1)[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        model = models[0] if models else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "processor": model,
        "cores": cores,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
        "commit": commit or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }


def make_list_parser(allowed: list[str]) -> Any:
    """A parser of lists with commas."""

    def parse(text: str) -> list[str]:
        names = [name for name in text.split(",") if name]
        unknown = [name for name in names if name not in allowed]
        if unknown or not names:
            raise argparse.ArgumentTypeError(
                f"{', '.join(unknown) or 'nothing'}: must be of {', '.join(allowed)}"
            )
        return names

    return parse


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers.run",
        description=(__doc__ or "").replace("%", "%%"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--workloads",
        type=make_list_parser(NAMES),
        default=NAMES,
        help=f"of {', '.join(NAMES)} (all)",
    )
    parser.add_argument(
        "--workers",
        type=make_list_parser([*WORKERS]),
        default=[*WORKERS],
        help=f"of {', '.join(WORKERS)} (all)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each worker (5)")
    parser.add_argument(
        "--first",
        action="store_true",
        help="count the first step too (popi_jax has compiled before it, TRL compiles nothing, "
        "Tunix compiles in it); --rounds may then be 0",
    )
    parser.add_argument(
        "--apart",
        action="store_true",
        help="one worker at a time, where memory does not hold them together",
    )
    parser.add_argument(
        "--geometry", choices=GEOMETRIES, default="tiny", help="of the model (tiny)"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=900,
        help="seconds that a worker may take for an answer (900)",
    )
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("work/peers"), help="folder (work/peers)"
    )
    args = parser.parse_args()
    if args.rounds < 1 - args.first:
        parser.error("--rounds: must be at least 1, or 0 with --first")
    missing = [name for name in args.workers if not pathlib.Path(find_interpreter(name)).exists()]
    if missing:
        names = " and ".join(missing)
        parser.exit(
            1, f"error: no environment for {names} in {PEERS}: run make bench-peers-setup\n"
        )
    return args


def main() -> None:
    args = parse_arguments()
    args.out = args.out.absolute()
    (args.out / "logs").mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "machine": describe_machine(),
        "geometry": GEOMETRIES[args.geometry]._asdict(),
        "allocator": ALLOCATOR,
        "workloads": {},
    }
    try:
        for name in args.workloads:
            results["workloads"][name] = time_workload(name, args)
            # written after each workload: an interrupted run keeps what it has
            results["machine"]["load_after"] = os.getloadavg()[0]
            results["ratios"] = comparison.compute_all_ratios(results["workloads"])
            (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
            (args.out / "results.md").write_text(comparison.render(results))
    except KeyboardInterrupt:
        say("stopped")
        sys.exit(130)
    print(comparison.render(results))
    say(f"written to {args.out}")
    if any(result["failures"] for result in results["workloads"].values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
