"""Times the programs of popi_jax. Runs with the Python of .venv: `python -m
benchmarks.peers.popi_worker`.

A step is one call of one jitted program: a preference step, samples with their policy-gradient
step, or the fused update of both roles. What happens inside such a program cannot be timed from
outside, so "parts" are programs of their own that run after the step and do not count towards it.
"""

import os
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

from benchmarks.peers import protocol
from benchmarks.peers.protocol import Cost, Running
from benchmarks.programs import Program, make_programs
from benchmarks.workloads import STORED_REFERENCE, Geometry

STEP = {"dpo": "generator_step", "grpo": "inference_step", "popi": "fused_update"}
PARTS = {
    "dpo": {},
    "grpo": {"rollout": "rollout"},
    "popi": {"rollout": "rollout", "reward": "reward"},
}


class _Timed:
    """A compiled program and the carry that its calls hand on."""

    def __init__(self, program: Program) -> None:
        step: Any = program.step
        self._step = step.lower(program.carry, *program.inputs).compile()
        self._carry, self._inputs = program.carry, program.inputs
        self.first = self.run()

    def run(self) -> Cost:
        start = protocol.read_clock()
        self._carry, results = self._step(self._carry, *self._inputs)
        jax.block_until_ready((self._carry, results))
        return protocol.measure_since(start)


def open_workload(name: str, geometry: Geometry) -> Running:
    """A workload with its programs compiled and run once."""
    work, stored = protocol.find_workload(name)
    step_name = f"{STEP[work.kind]}{STORED_REFERENCE if stored else ''}"
    names = {step_name, *PARTS[work.kind].values()}
    made = {p.name.partition("/")[2]: p for p in make_programs(work, geometry, names)}
    step = _Timed(made.pop(step_name))
    parts: dict[str, _Timed] = {}

    def run_step() -> Cost:
        cost = step.run()
        for part, of in PARTS[work.kind].items():  # compiled when the first step is timed
            parts[part] = parts.get(part) or _Timed(made.pop(of))
        return {**cost, "parts": {part: timed.run() for part, timed in parts.items()}}

    counts: dict[str, Any] = {"distinct_tokens": work.tokens}
    return Running(
        run_step,
        counts,
        [f"the step is {work.name}/{step_name}; parts are timed apart and are not in it"],
        {**step.first, "parts": {}},
    )


if __name__ == "__main__":
    protocol.serve(
        "popi_jax", open_workload, {"jax": jax.__version__, "jaxlib": jax.lib.__version__}
    )
