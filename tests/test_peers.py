"""The parts of the comparison with other trainers that need none of them."""

import argparse
import json
import pathlib
import subprocess
import sys
import threading
import time

import pytest

from benchmarks.peers import comparison, protocol, run
from benchmarks.peers.run import NAMES

ROOT = pathlib.Path(__file__).parents[1]

WORKER = """
from benchmarks.peers import protocol

def open_workload(name, geometry):
    print("this goes elsewhere")
    work, stored = protocol.find_workload(name)
    if work.kind == "grpo":
        raise ValueError("cannot\\nat all")
    def step():
        print("and this")
        return {"cpu": 1.0, "wall": 2.0, "parts": {}}
    notes = ["stored"] if stored else []
    return protocol.Running(step, {"pairs": work.users * work.pairs}, notes, {"cpu": 3.0})

protocol.serve("fake", open_workload, {"fake": "1"})
"""


def test_worker_answers_line_by_line_and_goes_on_after_a_failure() -> None:
    requests = [
        {"workload": "dpo", "steps": 2},
        {"workload": "grpo", "steps": 1},
        {"workload": "dpo+stored_reference", "steps": 0},
    ]
    done = subprocess.run(
        [sys.executable, "-c", WORKER],
        input="".join(json.dumps(request) + "\n" for request in requests),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    ready, dpo, grpo, stored = map(json.loads, done.stdout.splitlines())
    assert ready == {"ready": {"name": "fake", "versions": {"fake": "1"}}}
    assert dpo["steps"] == [{"cpu": 1.0, "wall": 2.0, "parts": {}}] * 2 and dpo["counts"] == {
        "pairs": 8
    }
    assert grpo == {"workload": "grpo", "error": "ValueError: cannot"}
    assert stored["steps"] == [] and stored["notes"] == ["stored"]
    assert stored["first"] == {"cpu": 3.0} and stored["peak_bytes"] > 1e6


def test_a_paused_loop_makes_one_step_at_a_time_and_times_it_alone() -> None:
    made: list[int] = []
    parts = protocol.Parts()
    rollout = parts.wrap("rollout", lambda: time.sleep(0.02))

    def loop(pause: protocol.Pause) -> None:
        for number in range(3):
            pause()
            rollout()
            time.sleep(0.03)
            made.append(number)

    paused = protocol.Paused(loop, parts)
    threading.Event().wait(0.02)
    assert made == []
    cost = paused.step()
    assert made == [0]
    assert 0.02 <= cost["parts"]["rollout"]["wall"] < 0.05 <= cost["wall"] < 1
    time.sleep(0.2)  # the driver is elsewhere
    assert paused.step()["wall"] < 0.2
    with pytest.raises(RuntimeError, match="ended by itself"):
        paused.step()


def test_a_failure_inside_the_loop_reaches_the_caller() -> None:
    def loop(pause: protocol.Pause) -> None:
        pause()
        raise ValueError("no memory")

    with pytest.raises(ValueError, match="no memory"):
        protocol.Paused(loop).step()


def steps(*cpu: float, **parts: float) -> list[dict]:
    shares = {name: {"cpu": value, "wall": value} for name, value in parts.items()}
    return [{"cpu": value, "wall": 2 * value, "parts": shares} for value in cpu]


def test_ratios_are_taken_round_by_round() -> None:
    result = {
        "steps": {
            "popi_jax": steps(1.0, 2.0, 4.0),
            "trl": steps(3.0, 4.0, 4.0, reward=1.0, rollout=1.0),
            "tunix": steps(1.0),
        }
    }
    assert comparison.compute_ratios("dpo", result) == {
        "trl": {"step": {unit: {"min": 1.0, "median": 2.0, "max": 3.0} for unit in ("cpu", "wall")}}
    }
    without = comparison.compute_ratios("popi", result)["trl"][comparison.WITHOUT_REWARD]
    assert without["cpu"] == {"min": 0.75, "median": 1.5, "max": 2.0}


def test_the_report_names_what_was_not_measured() -> None:
    results = {
        "machine": {
            "processor": "P",
            "cores": 2,
            "system": "S",
            "load_before": 0.0,
            "load_after": 0.0,
            "commit": "c",
            "date": "d",
        },
        "geometry": {"num_layers": 4},
        "workloads": {
            "grpo": {
                "steps": {"trl": steps(1.0, 3.0, rollout=0.5)},
                "peak_bytes": {"trl": 2_500_000_000},
                "failures": {"tunix": "ValueError: cannot"},
                "notes": {"trl": ["a remark"]},
                "versions": {"trl": {"trl": "1"}},
            }
        },
    }
    text = comparison.render(results)
    assert "| grpo | trl | step | 2.000 | 1.000 to 3.000 |" in text
    assert "| grpo | trl | rollout | 0.500 |" in text
    assert "- grpo, tunix: ValueError: cannot" in text and "- grpo, trl: a remark" in text
    assert "Ratios" not in text and "| grpo | trl | 2.50 |" in text


def test_workers_apart_end_before_the_next_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Fake:
        versions: dict[str, str] = {}

        def __init__(self, name: str) -> None:
            self._name = name

        def run(self, workload: str, steps: int) -> dict:
            seen.append(f"{self._name} steps")
            return {"steps": steps_of_one_second, "peak_bytes": 7}

        def close(self) -> None:
            seen.append(f"{self._name} ends")

    steps_of_one_second = steps(1.0)
    opened = {"counts": {}, "notes": [], "peak_bytes": 5, "first": steps(9.0)[0]}
    monkeypatch.setattr(run, "open_worker", lambda name, *_: (Fake(name), opened))
    args = argparse.Namespace(workers=["popi_jax", "trl"], rounds=2, apart=True, first=False)
    result = run.time_workload("dpo", args)
    assert seen == [
        f"{name} {what}" for name in args.workers for what in ("steps", "steps", "ends")
    ]
    assert result["peak_bytes"] == {"popi_jax": 7, "trl": 7} and len(result["steps"]["trl"]) == 2
    args.rounds, args.first = 0, True
    assert run.time_workload("dpo", args)["steps"]["popi_jax"] == steps(9.0)


def test_every_workload_has_a_name_for_the_driver() -> None:
    assert {protocol.find_workload(name)[0].kind for name in NAMES} == {"dpo", "grpo", "popi"}
