"""Medians, ratios and tables of what benchmarks.peers.run has measured."""

from typing import Any

from benchmarks.tables import compute_spread, render_table
from benchmarks.workloads import WORKLOADS

OURS = "popi_jax"
WITHOUT_REWARD = "step without reward"

Result = dict[str, Any]  # of one workload, as run.time_workload makes it


def read_seconds(step: dict[str, Any], what: str, unit: str) -> float | None:
    """CPU or wall seconds of a step or of a part of it; None where the worker does not tell them
    apart."""
    parts = step["parts"]
    if what == "step":
        return step[unit]
    if what == WITHOUT_REWARD:
        return step[unit] - parts["reward"][unit] if "reward" in parts else None
    return parts[what][unit] if what in parts else None


def compare_steps(
    peer: list[Any], ours: list[Any], what: str, our_what: str, unit: str
) -> dict[str, float] | None:
    """What the peer took over what popi_jax took, round by round: above 1 popi_jax took less."""
    ratios = []
    for theirs, our in zip(peer, ours, strict=True):
        above, below = read_seconds(theirs, what, unit), read_seconds(our, our_what, unit)
        if not above or not below:
            return None
        ratios.append(above / below)
    return compute_spread(ratios) if ratios else None


def compute_ratios(name: str, result: Result) -> dict[str, dict[str, Any]]:
    """Peer -> what is compared -> unit -> spread of the ratios."""
    ours = result["steps"].get(OURS)
    if not ours:
        return {}
    compared = {"step": "step", "rollout": "rollout"}
    if rewards_matter(name):
        compared[WITHOUT_REWARD] = "step"  # the peer without its reward against all of ours
    found: dict[str, dict[str, Any]] = {}
    for peer, steps in result["steps"].items():
        if peer == OURS or len(steps) != len(ours):
            continue
        for what, our_what in compared.items():
            units = {
                unit: compare_steps(steps, ours, what, our_what, unit) for unit in ("cpu", "wall")
            }
            if all(units.values()):
                found.setdefault(peer, {})[what] = units
    return found


def rewards_matter(name: str) -> bool:
    """Whether the rewards of a workload are more than a mean."""
    return name in WORKLOADS and WORKLOADS[name].kind == "popi"


def compute_all_ratios(workloads: dict[str, Result]) -> dict[str, Any]:
    return {name: compute_ratios(name, result) for name, result in workloads.items()}


def render_medians(workloads: dict[str, Result]) -> str:
    rows = []
    for name, result in workloads.items():
        for worker, steps in result["steps"].items():
            for what in ("step", "rollout", "reward", "grpo", "dpo", WITHOUT_REWARD):
                costs = {
                    unit: [read_seconds(step, what, unit) for step in steps]
                    for unit in ("cpu", "wall")
                }
                if not steps or None in costs["cpu"]:
                    continue
                if not rewards_matter(name) and what in ("reward", WITHOUT_REWARD):
                    continue  # the reward is nothing but a mean there
                row = [name, worker, what]
                for unit in ("cpu", "wall"):
                    of = compute_spread([cost for cost in costs[unit] if cost is not None])
                    row += [f"{of['median']:.3f}", f"{of['min']:.3f} to {of['max']:.3f}"]
                rows.append(row)
    return render_table(["workload", "by", "what", "CPU s", "range", "wall s", "range"], rows)


def render_memory(workloads: dict[str, Result]) -> str:
    """What each process had at most, its libraries and what it loads and compiles included."""
    rows = [
        [name, worker, f"{peak / 1e9:.2f}"]
        for name, result in workloads.items()
        for worker, peak in result.get("peak_bytes", {}).items()
    ]
    return render_table(["workload", "by", "peak GB"], rows) if rows else ""


def list_ratios(workloads: dict[str, Result]) -> list[list[str]]:
    return [
        [
            name,
            peer,
            what,
            *(f"{units[u][k]:.2f}" for u in ("cpu", "wall") for k in ("min", "median", "max")),
        ]
        for name, peers in compute_all_ratios(workloads).items()
        for peer, parts in peers.items()
        for what, units in parts.items()
    ]


def render(results: dict[str, Any]) -> str:
    machine, workloads = results["machine"], results["workloads"]
    versions: dict[str, dict[str, str]] = {}
    for result in workloads.values():
        versions |= result["versions"]
    geometry = ", ".join(f"{key} {value}" for key, value in results["geometry"].items())
    text = [
        "# Cost of a step: popi_jax, TRL and Tunix",
        f"{machine['processor']}, {machine['cores']} cores, {machine['system']};"
        f" load {machine['load_before']:.1f} before"
        f" and {machine['load_after']:.1f} after; commit {machine['commit']}, {machine['date']}.",
        "\n".join(
            f"- {worker}: "
            + ", ".join(f"{package} {version}" for package, version in packages.items())
            for worker, packages in versions.items()
        ),
        f"Model: {geometry}; float32.",
        "## Median of the steps\n\n" + render_medians(workloads),
    ]
    memory = render_memory(workloads)
    if memory:
        text.append("## Peak memory of each process\n\n" + memory)
    rows = list_ratios(workloads)
    if rows:
        header = [
            "workload",
            "peer",
            "what",
            *(f"{u} {k}" for u in ("CPU", "wall") for k in ("min", "median", "max")),
        ]
        text.append(
            "## Ratios, round by round\n\nThe peer's cost over that of popi_jax: above 1 popi_jax "
            "took less. A step without reward is held against the whole step of popi_jax.\n\n"
            + render_table(header, rows)
        )
    notes = [
        f"- {name}, {worker}: {note}"
        for name, result in workloads.items()
        for worker, all_notes in result["notes"].items()
        for note in all_notes
    ]
    if notes:
        text.append("## Notes\n\n" + "\n".join(notes))
    failures = [
        f"- {name}, {worker}: {why}"
        for name, result in workloads.items()
        for worker, why in result["failures"].items()
    ]
    if failures:
        text.append("## Not measured\n\n" + "\n".join(failures))
    return "\n\n".join(text) + "\n"
