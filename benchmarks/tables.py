"""Tables in Markdown of what was measured, and the files that it is written to."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from popi_jax.progress import format_number


def render_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """The first column is text, the others are numbers."""
    cells = [
        [value if isinstance(value, str) else format_number(value) for value in row] for row in rows
    ]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def compute_spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def write_json(path: str | Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: str | Path, text: str) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
