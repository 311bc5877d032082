"""Cells of several models in one row."""

from typing import Any

import numpy as np
import pytest

from popi_jax.evals import report, statistics
from popi_jax.evals.pooled import pool
from popi_jax.evals.records import CellRecord

SHIFTS = {"work/a": 0.5, "work/b": 1.0, "work/c": 1.5}
CONDITIONS = {"no_signals": 0.0, "summary": 1.0, "oracle": 3.0}


def make_cell(model: str, condition: str, persons: int = 30, **changes: Any) -> CellRecord:
    # of a person alone, so that models differ in what is added
    rng = np.random.default_rng(7)
    effect = rng.normal(0, 1, persons)
    own = np.random.default_rng(len(model + condition) + ord(model[-1]))
    items = []
    for g in range(persons):
        for k in range(g % 4 + 1):
            margin = float(effect[g] + CONDITIONS[condition] * SHIFTS[model] + own.normal())
            numbers = {"chosen": margin - 9, "rejected": -9.0, "margin": margin}
            tokens = {"context_tokens": ord(model[-1]) - ord("a"), "signal_tokens": 240}
            names = {"user": f"u{g}", "person": f"u{g}", "pair": f"{k}"}
            items.append({**names, **numbers, **tokens, "groups": {}})
    labels = {"model": model, "step": 180, "data": "own", "split": "test", "signals": "none"}
    labels |= {"condition": condition, "decoding": "none", "generator": "trained"}
    coverage = {"users": persons, "attempted": len(items) + 1, "scored": len(items)}
    header = {"key": f"{model}-{condition}", "labels": labels, "status": "done", "reason": ""}
    header |= {"coverage": coverage | {"left_out": {"too_long": 1}}, "data_kind": "sample"}
    header |= {"objective": {"name": "dpo"}, "identity": {"data": {"prepared": "1", "users": 3}}}
    return CellRecord(header | changes, items)


def pool_all(cells: list[CellRecord]) -> list[CellRecord]:
    return pool(cells, [cell.header["labels"]["model"] for cell in cells])


def make_cells(condition: str = "summary") -> list[CellRecord]:
    return [make_cell(model, condition) for model in SHIFTS]


def test_all_pairs_of_all_models_count():
    cells = [cell for condition in CONDITIONS for cell in make_cells(condition)]
    pooled = pool_all(cells)
    assert [p.header["labels"]["condition"] for p in pooled] == list(CONDITIONS)
    assert {p.header["labels"]["model"] for p in pooled} == {"all 3 models"}
    assert pooled[1].header["coverage"]["left_out"] == {"too_long": 3}
    lines = {line.labels["condition"]: line for line in report.make_lines([*cells, *pooled][9:])}
    line, margins = lines["summary"], [[i["margin"] for i in c.items] for c in cells]
    assert line.row is not None and line.row.attempted == line.row.n + 3
    right = [np.mean(np.array(found) > 0) for found in margins]
    assert line.row.acc_half.value == pytest.approx(np.mean(right[3:6]))
    assert line.row.context_tokens == 1.0  # 0, 1 and 2
    # a person is one person: the error is that of the means over models
    assert (line.row.persons, line.row.users) == (30, 90)
    averaged = np.mean(np.array(margins[3:6]) > 0, axis=0)
    persons = [item["person"] for item in cells[0].items]
    sums = np.array([[sum(averaged[[p == f"u{g}" for p in persons]])] for g in range(30)])
    counts = np.array([persons.count(f"u{g}") for g in range(30)], float)
    rest = sums[:, 0] - np.mean(averaged) * counts
    error = np.sqrt(30 / 29 * np.sum(rest**2)) / counts.sum()
    assert line.row.acc_half.stderr == pytest.approx(error)
    # differences are those between cells of one model
    assert line.gap_recovered is not None and line.gap_recovered.n == line.row.n
    way = (np.mean(right[3:6]) - np.mean(right[:3])) / (np.mean(right[6:]) - np.mean(right[:3]))
    assert line.gap_recovered.estimate.value == pytest.approx(way)


def test_what_a_model_lacks_is_told():
    cells = make_cells()
    cells[1] = cells[1]._replace(header=cells[1].header | {"status": "failed"}, items=[])
    (found,) = pool_all(cells)
    assert (found.header["status"], found.header["reason"]) == ("missing", "2 of 3 models have it")
    (line,) = report.make_lines([found])
    assert line.row is None and "2 of 3 models" in report.render_cells([line])
    # a model that was not even asked for this condition
    found = pool_all([*make_cells(), make_cell("work/a", "oracle")])[1]
    assert found.header["reason"] == "1 of 3 models have it"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"identity": {"data": {"prepared": "2", "users": 3}}}, "different data"),
        ({"objective": {"name": "ipo"}}, "different objectives"),
    ],
)
def test_what_differs_is_not_pooled(change: dict[str, Any], reason: str) -> None:
    cells = make_cells()
    cells[2].header.update(change)
    (found,) = pool_all(cells)
    assert not found.items and found.header["reason"] == f"the models have {reason}"


def test_steps_are_told_where_they_agree():
    cells = make_cells()
    assert pool_all(cells)[0].header["labels"]["step"] == 180
    cells[2].header["labels"]["step"] = 600
    (found,) = pool_all(cells)
    assert found.header["labels"]["step"] == ""
    assert statistics.make_items(found.items)


def test_two_steps_of_a_run_are_two_models():
    cells = [make_cell("work/a", "summary"), make_cell("work/a", "summary")]
    cells[1].header["labels"]["step"] = 100
    (found,) = pool(cells, ["work/a@180", "work/a@100"])
    assert len(found.items) == 2 * len(cells[0].items)
    assert statistics.make_items(found.items)  # no pair occurs twice
