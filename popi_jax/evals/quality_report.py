"""The table of the summaries that the cells of a sweep read: summaries.jsonl, .csv and .md."""

import csv
import io
import json
import math
from collections.abc import Sequence
from typing import Any

from etils import epath

from popi_jax import files
from popi_jax.evals import records
from popi_jax.evals.records import CellRecord
from popi_jax.evals.render import align_table
from popi_jax.evals.summary_quality import compute_quality

_SHARES = ("finished", "distinct", "copied", "with_names", "with_contacts")
_NOTES = """\
finished: share that ended before data.summary_len. distinct: different texts / users. copied: share
of the word 5-grams that the user's signals hold too. names, contacts: share of summaries with one
(evals/summary_quality.py says what is found and what is not). reading ease: Flesch, an estimate."""


def write_quality(cells: Sequence[CellRecord], out: str) -> None:
    """Measures each file of summaries once."""
    rows: dict[str, dict[str, Any]] = {}
    for cell in cells:
        told = cell.header.get("identity", {}).get("text", {}).get("summaries")
        key = records.make_key(told) if told else ""
        if not key or key in rows:
            continue
        found = records.read_done(records.find_file(out, records.SUMMARIES, key))
        if found is None:
            continue
        labels = {name: cell.header["labels"][name] for name in ("model", "step", "data", "split")}
        labels |= {name: found.header["labels"][name] for name in ("writer", "signals", "decoding")}
        quality = compute_quality(found.items)._asdict()
        numbers = {name: None if math.isnan(value) else value for name, value in quality.items()}
        rows[key] = {"key": key, **labels, **numbers}
    table = list(rows.values())
    text = io.StringIO()
    writer = csv.DictWriter(text, list(table[0]) if table else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table)
    texts = {"summaries.jsonl": lines, "summaries.csv": text.getvalue()}
    texts["summaries.md"] = render_quality(table)
    for name, content in texts.items():
        files.write_whole(epath.Path(out) / name, content)


def render_quality(table: Sequence[dict[str, Any]]) -> str:
    heads = ["writer", "decoding", "model", "step", "data", "split", "signals", "users", "empty"]
    names = [*heads, "tokens", "p90", *(n.removeprefix("with_") for n in _SHARES), "reading ease"]
    rows = [names]
    for row in table:
        shown = [str(row[name]) for name in heads]
        shown += [_show(row[name], 1) for name in ("tokens_mean", "tokens_p90")]
        shown += [_show(row[name], 3) for name in _SHARES]
        rows.append([*shown, _show(row["flesch"], 0)])
    body = [align_table(rows), _NOTES] if table else ["No cell reads summaries."]
    return "\n\n".join(["# Summaries", *body]) + "\n"


def _show(value: float | None, places: int) -> str:
    return "–" if value is None else f"{value:.{places}f}"
