"""Runs steps of the programs of one tree on demand, for compare.py: one line of JSON per answer on
the standard output.

The modules of this folder are taken from the first folder of PYTHONPATH that has them, so that a
tree without benchmarks is timed with those of another. Uses only programs.py and workloads.py
beside the tree itself."""

import json
import os
import sys
import time
from typing import Any


def main(names: list[str]) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is no answer

    def answer(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    try:
        import jax

        from benchmarks import programs
        from benchmarks.workloads import TINY, WORKLOADS

        # trees from before this name have another
        make: Any = getattr(programs, "make_programs", getattr(programs, "programs", None))
        works = [WORKLOADS[name] for name in names if name in WORKLOADS]
        cases: dict[str, Any] = {}
        shapes: dict[str, Any] = {}
        for work in works:
            for program in make(work, TINY):
                compiled = program.step.lower(program.carry, *program.inputs).compile()
                cases[program.name] = [compiled, program.carry, program.inputs]
                shapes[program.name] = [work, TINY]
    except Exception as e:  # whatever the other tree raises, the parent process tells in one line
        lines = str(e).strip().splitlines()
        answer({"error": f"{type(e).__name__}: {lines[0] if lines else ''}"})
        return
    answer({"programs": shapes})
    for line in sys.stdin:
        case = cases[line.strip()]
        run, carry, inputs = case
        cpu, wall = time.process_time(), time.perf_counter()
        case[1], results = run(carry, *inputs)
        jax.block_until_ready((case[1], results))
        answer({"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall})


if __name__ == "__main__":
    main(sys.argv[1:])
