"""Writes streams of recorded_runs.json anew, which test_health.py replays, from work directories:

    python -m tests.diagnostics.record_runs default=work/prism no_kl=work/no_kl ...

Each is the run of a failure (docs/diagnostics.md, Provoked failures); streams that are not named
stay, and so does the command that is told of each."""

import json
import sys
from pathlib import Path
from typing import Any

from popi_jax.diagnostics.health import WATCHED
from tests.tiny_run import read_jsonl

RECORDED = Path(__file__).with_name("recorded_runs.json")
# fields of Facts, and the settings that they are
SETTINGS = {
    "beta": ("generator", "beta"),
    "kl_coef": ("inference", "kl_coef"),
    "temperature": ("inference", "temperature"),
    "learning_rate": ("inference", "learning_rate"),
    "generator_learning_rate": ("generator", "learning_rate"),
    "length_penalty": ("inference", "length_penalty"),
    "pairs": ("batch", "pairs"),
}


def record(workdir: Path) -> dict[str, Any]:
    """Returns what the main stage of a run measured, three digits of it, from the first look on."""
    config = json.loads((workdir / "results.json").read_text())["config"]
    seen: dict[int, dict[str, float]] = {}
    for row in read_jsonl(workdir / "metrics.jsonl"):
        values = {name: float(f"{row[name]:.3g}") for name in sorted(WATCHED & row.keys())}
        if values:
            seen.setdefault(row["step"], {}).update(values)
    steps = sorted(seen)
    each_update = sorted(name for name in WATCHED if not name.startswith("probe/"))
    looks = {s: {k: v for k, v in seen[s].items() if k.startswith("probe/")} for s in steps}
    columns = {name: [seen[step].get(name) for step in steps] for name in each_update}
    return {
        "facts": {name: config[part][field] for name, (part, field) in SETTINGS.items()},
        "start": steps[0],
        "steps": steps,
        "values": {name: x for name, x in columns.items() if set(x) != {None}},
        "probe": [[step, values] for step, values in looks.items() if values],
    }


def main(args: list[str]) -> None:
    streams = json.loads(RECORDED.read_text())
    for name, _, workdir in (arg.partition("=") for arg in args):
        streams[name] = {"command": streams[name]["command"], **record(Path(workdir))}
    lines = (
        f"{json.dumps(name)}:{json.dumps(stream, separators=(',', ':'))}"
        for name, stream in streams.items()
    )
    RECORDED.write_text("{" + ",\n".join(lines) + "}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
