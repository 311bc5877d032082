"""How the driver and its workers talk, and how a worker times a trainer that owns its loop.
Standard library only.

A worker is a process that answers each line of JSON on its standard input by one on its standard
output:

    worker                {"ready": {"name": "trl", "versions": {"trl": "1.16.0", ...}}} driver
    {"workload": "dpo", "steps": 3} worker                {"workload": "dpo", "steps": [{"cpu": 1.9,
    "wall": 1.1, "parts": {}}, ...],
                           "counts": {...}, "notes": [...], "peak_bytes": 123,
                           "first": {"cpu": 2.5, ...}}
    worker, on a failure  {"workload": "dpo", "error": "ValueError: ..."}

The first request for a workload builds it and makes its first step, which is not among the timed
ones; "steps": 0 does that alone. "cpu" is what all threads of the process used, in seconds. "parts"
holds shares of the step under "rollout", "reward", "grpo" and "dpo", each with its "cpu" and
"wall", where the trainer allows to tell them apart. "counts" says what the models were given in the
first step, "peak_bytes" how much memory the process has had at most, "first" what the first step
cost, which with Tunix includes what is compiled in it. What libraries print goes to the standard
error. A worker ends when its standard input does."""

import argparse
import functools
import json
import os
import resource
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.workloads import GEOMETRIES, STORED_REFERENCE, WORKLOADS, Geometry, Workload

# of the objectives and the optimizer, the same for all
LEARNING_RATE = 1e-5
MAX_GRAD_NORM = 1.0
DPO_BETA = 0.1
KL_BETA = 0.04

Pause = Callable[[], None]  # blocks until the next step is asked for
Cost = dict[str, Any]  # "cpu" and "wall" in seconds, of a step also "parts"


class Running(NamedTuple):
    """A workload after its first step."""

    step: Callable[[], Cost]
    counts: dict[str, Any]
    notes: list[str]
    first: Cost  # of the first step


def read_clock() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


def read_peak_memory() -> int:
    """Bytes of memory that this process had at most."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure_since(start: tuple[float, float]) -> Cost:
    return {"cpu": time.process_time() - start[0], "wall": time.perf_counter() - start[1]}


def add_costs(*costs: Cost) -> Cost:
    return {key: sum(cost[key] for cost in costs) for key in ("cpu", "wall")}


class Parts:
    """Adds up what wrapped functions cost within a step."""

    def __init__(self) -> None:
        self._costs: dict[str, Cost] = {}

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function; what it costs is put down under `name`."""

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            start = read_clock()
            result = function(*args, **kwargs)
            self._costs[name] = add_costs(
                self._costs.get(name, {"cpu": 0.0, "wall": 0.0}), measure_since(start)
            )
            return result

        return wrapped

    def take(self) -> dict[str, Cost]:
        """What was put down since the last call."""
        costs, self._costs = self._costs, {}
        return costs


class Paused:
    """A loop that someone else owns, run in a thread of its own and let go one step at a time.

    `loop` is called with a function that it must call before the first step and after each: that
    blocks until the next step is asked for. The times are taken where it is called."""

    def __init__(self, loop: Callable[[Pause], None], parts: Parts | None = None) -> None:
        self._parts = parts or Parts()
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._start: tuple[float, float] | None = None
        self._cost: Cost = {}
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(loop,), daemon=True)

    def _run(self, loop: Callable[[Pause], None]) -> None:
        try:
            loop(self._pause)
            raise RuntimeError("the trainer's loop ended by itself")
        except BaseException as error:  # handed to whoever waits for the step
            self._error = error
            self._done.release()

    def _pause(self) -> None:
        if self._start is not None:
            self._cost = {**measure_since(self._start), "parts": self._parts.take()}
            self._done.release()
        self._go.acquire()
        self._start = read_clock()

    def step(self) -> Cost:
        """Lets the loop make one step. Raises what the loop raised."""
        if not self._thread.is_alive() and self._error is None:
            self._thread.start()
        self._go.release()
        self._done.acquire()
        if self._error is not None:
            raise self._error
        return self._cost


def step_loops(loops: dict[str, Paused]) -> Cost:
    """One step of each loop, the policy's first. With two of them "parts" holds each as well."""
    costs = {kind: loops[kind].step() for kind in ("grpo", "dpo") if kind in loops}
    parts = {name: cost for each in costs.values() for name, cost in each.pop("parts").items()}
    return {**add_costs(*costs.values()), "parts": parts | (costs if len(costs) > 1 else {})}


def make_first_step(
    step: Callable[[], Cost], trained: dict[str, Any], checksum: Callable[[Any], float]
) -> Cost:
    """Raises: ValueError if the step leaves the parameters of one of the models as they were."""
    before = {kind: checksum(model) for kind, model in trained.items()}
    cost = step()
    unchanged = [kind for kind, model in trained.items() if checksum(model) == before[kind]]
    if unchanged:
        raise ValueError(f"a step changed no parameter of {unchanged}")
    return cost


def find_workload(name: str) -> tuple[Workload, bool]:
    """The workload of that name, and whether its reference log-probs are stored."""
    return WORKLOADS[name.removesuffix(STORED_REFERENCE)], name.endswith(STORED_REFERENCE)


def serve(
    name: str, open_workload: Callable[[str, Geometry], Running], versions: dict[str, str]
) -> None:
    """Answers requests until the standard input ends. `open_workload` builds a workload and makes
    its first step."""
    parser = argparse.ArgumentParser(description=f"A worker of benchmarks.peers.run: times {name}.")
    parser.add_argument(
        "--geometry", choices=GEOMETRIES, default="tiny", help="of the model (tiny)"
    )
    geometry = GEOMETRIES[parser.parse_args().geometry]

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # so that nothing else is printed between the answers
    sys.stdout = sys.stderr

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    answer({"ready": {"name": name, "versions": versions}})
    opened: dict[str, Running] = {}
    for line in sys.stdin:
        request = json.loads(line)
        workload = request["workload"]
        try:
            if workload not in opened:
                opened[workload] = open_workload(workload, geometry)
            running = opened[workload]
            steps = [running.step() for _ in range(request["steps"])]
            counted: dict[str, Any] = {"counts": running.counts, "notes": running.notes}
            counted |= {"peak_bytes": read_peak_memory(), "first": running.first}
            answer({"workload": workload, "steps": steps, **counted})
        except Exception as error:
            traceback.print_exc()
            text = str(error).strip().splitlines()
            why = f"{type(error).__name__}: {text[0] if text else ''}"
            answer({"workload": workload, "error": why})
    answers.close()
    os._exit(0)  # the loops of the trainers still wait in their threads
