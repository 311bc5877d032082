"""One start of training up to the end of its first step, for restart.py: prints where the time went
as a line of JSON.

`python -m benchmarks.start SECONDS FLAG...` runs what `python -m popi_jax.train FLAG...` does;
SECONDS is `time.time()` at which the process was asked for."""

import json
import sys
import time
from typing import Any


class _Done(Exception):
    """The first step has ended."""


def main(asked: float, flags: list[str]) -> dict[str, Any]:
    began = time.time()
    from popi_jax import cli

    config = cli.parse(["train", *flags])
    import jax

    from popi_jax import run as builds
    from popi_jax.config import to_json
    from popi_jax.programs import LOADING, STORING
    from popi_jax.training import loop

    spent: dict[str, float] = {}
    seen: dict[str, int] = {}
    first: dict[str, float] = {}

    def add(event: str, seconds: float, **_: Any) -> None:
        spent[event] = spent.get(event, 0.0) + seconds
        seen[event] = seen.get(event, 0) + 1

    def count(event: str, **_: Any) -> None:
        seen[event] = seen.get(event, 0) + 1

    jax.monitoring.register_event_duration_secs_listener(add)
    jax.monitoring.register_event_listener(count)
    run = loop._run

    def until_first_step(program: Any, *args: Any, **kwargs: Any) -> Any:
        first["ready"] = time.time()

        def once(state: Any, batch: Any) -> Any:
            first["called"] = time.time()
            jax.block_until_ready(program(state, batch))
            first["done"] = time.time()
            raise _Done

        return run(once, *args, **kwargs)

    loop._run = until_first_step
    imported = time.time()
    built = builds.build(config, to_json(config))
    has_data = time.time()
    try:
        loop.train(built)
    except _Done:
        pass
    backend, hits = (
        "/jax/core/compile/backend_compile_duration",
        "/jax/compilation_cache/cache_hits",
    )
    return {
        "seconds": first["done"] - asked,
        "parts": {
            "start of Python": began - asked,
            "imports": imported - began,
            "devices, data and tokenizer": has_data - imported,
            "first state": first["ready"] - has_data,
            "first batch": first["called"] - first["ready"],
            "first step": first["done"] - first["called"],
        },
        "within": {
            "loading stored programs": spent.get(LOADING, 0.0),
            "storing programs": spent.get(STORING, 0.0),
            "tracing": spent.get("/jax/core/compile/jaxpr_trace_duration", 0.0),
            "lowering": spent.get("/jax/core/compile/jaxpr_to_mlir_module_duration", 0.0),
            "compiling, or reading what was compiled": spent.get(backend, 0.0),
            "reading what was compiled": spent.get(
                "/jax/compilation_cache/cache_retrieval_time_sec", 0.0
            ),
        },
        "programs": seen.get(backend, 0),
        "compiled": seen.get(backend, 0) - seen.get(hits, 0),
    }


if __name__ == "__main__":
    answer = json.dumps(main(float(sys.argv[1]), sys.argv[2:]))
    print(answer, flush=True)
