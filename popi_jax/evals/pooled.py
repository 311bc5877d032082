"""Several models as one row of a table: what runs that differ in their seed alone reach together.

Each pair counts once for each model, and a person is the same person for all of them, so intervals
are those of the mean over these models for other people. What another seed would change they do not
hold; the rows of the models show it."""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from popi_jax.evals import records
from popi_jax.evals.records import CellRecord
from popi_jax.evals.report import LABELS

SAME = [name for name in LABELS if name not in ("model", "step")]


def pool(cells: Sequence[CellRecord], models: Sequence[str]) -> list[CellRecord]:
    """A record for each kind of cell, with the pairs of all models; without pairs, and with the
    reason, where a model lacks it, or has it of other data or by another objective.

    models: the name of the model of each cell; names that differ are different models."""
    kinds: dict[tuple[Any, ...], dict[str, CellRecord]] = {}
    for cell, model in zip(cells, models, strict=True):
        kind = tuple(cell.header["labels"][name] for name in SAME)
        kinds.setdefault(kind, {})[model] = cell
    return [_join(each, len(set(models))) for each in kinds.values()]


def _join(cells: dict[str, CellRecord], number: int) -> CellRecord:
    done = {model: cell for model, cell in cells.items() if cell.header["status"] == "done"}
    headers = [cell.header for cell in done.values()]
    labels = next(iter(cells.values())).header["labels"] | {"model": f"all {number} models"}
    steps = {header["labels"].get("step") for header in headers}
    labels["step"] = steps.pop() if len(steps) == 1 else ""
    key = records.make_key({"pooled": sorted(cell.header["key"] for cell in cells.values())})
    header: dict[str, Any] = {"kind": "cell", "key": key, "labels": labels}
    reason = _find_difference(headers)
    if len(done) < number:
        reason = f"{len(done)} of {number} models have it"
    if reason:
        return CellRecord(header | {"coverage": {}, "status": "missing", "reason": reason}, [])
    left_out: Counter[str] = Counter()
    for each in headers:
        left_out.update(each["coverage"]["left_out"])
    attempted = sum(each["coverage"]["attempted"] for each in headers)
    header["coverage"] = {"attempted": attempted, "left_out": dict(left_out)}
    header |= {"status": "done", "reason": ""}
    header |= {name: headers[0][name] for name in ("data_kind", "objective")}
    items = [
        {**item, "user": f"{model}/{item['user']}"}
        for model, cell in done.items()
        for item in cell.items
    ]
    return CellRecord(header, items)


def _find_difference(headers: Sequence[dict[str, Any]]) -> str:
    """Why cells say nothing together; "" if they do."""
    values = {
        "data": [header["identity"]["data"] for header in headers],
        "objectives": [header["objective"] for header in headers],
    }
    for told, found in values.items():
        if len({json.dumps(value, sort_keys=True) for value in found}) > 1:
            return f"the models have different {told}"
    return ""
