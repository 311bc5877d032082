"""The tables of a few made cells."""

import csv
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from popi_jax.evals import render, report, statistics

OBJECTIVE = {"name": "dpo", "beta": 0.1}


class Record(NamedTuple):
    header: dict[str, Any]
    items: list[dict[str, Any]]


def make_items(shift: float, persons: int = 24, skip: int = 0) -> list[dict[str, Any]]:
    """`shift` 0: all margins are 0."""
    rng, items = np.random.default_rng(5), []
    for g in range(persons):
        for k in range(g % 5 + 1):
            margin = float(rng.normal() + shift) if shift else 0.0
            numbers = {"chosen": margin - 9.0, "rejected": -9.5, "margin": margin}
            tokens = {"context_tokens": 6 if shift else 0, "signal_tokens": 240}
            user = {"user": f"u{g}", "person": f"u{g}", "pair": f"{g}/{k}"}
            groups = {"topic": "travel" if g < 20 else "food"}
            items.append({**user, **numbers, **tokens, "groups": groups})
    return items[skip:]


def make_record(condition: str, items: list[dict[str, Any]], **changes: Any) -> Record:
    labels = {"model": "tiny", "data": "prism", "split": "test"}
    labels |= {"signals": "none" if condition == "no_signals" else "all"}
    labels |= {"condition": condition, "decoding": "greedy", "generator": "trained"}
    labels |= {name: changes.pop(name) for name in list(changes) if name in labels}
    header = {"key": "-".join(map(str, labels.values())), "labels": labels, "status": "done"}
    header |= {"reason": "", "data_kind": "sample", "objective": OBJECTIVE, "step": 800}
    left_out = {"too_long": 2} if condition == "summary" else {}
    n = len(items)
    header["coverage"] = {"users": 24, "attempted": n + sum(left_out.values()), "scored": n}
    header["coverage"]["left_out"] = left_out
    return Record(header | changes, items)


def make_records() -> list[Record]:
    return [
        make_record("summary", make_items(1.5, skip=1)),
        make_record("summary", make_items(1.1), generator="before_rl"),
        make_record("other_user_summary", make_items(0.2)),
        make_record("no_signals", make_items(0.0), decoding="none"),
        make_record("no_signals", make_items(-1.0), decoding="none", generator="before_rl"),
        make_record("raw_signals", [], status="failed", reason="out of | memory\nat users 0 to 7"),
        make_record("oracle", [], status="missing", reason="not scored yet"),
        make_record("oracle", [], decoding="none"),
    ]


def find(lines: list[report.Line], condition: str, generator: str = "trained") -> report.Line:
    wanted = condition, generator
    return next(x for x in lines if (x.labels["condition"], x.labels["generator"]) == wanted)


def read_table(text: str) -> list[list[str]]:
    """The rows of the first table; its columns are of even width."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_what_a_reader_sees():
    few = [make_record("no_signals", make_items(0.0, 12), decoding="none")]
    few += [make_record("summary", make_items(0.8, 12), decoding="sampled")]
    few += [make_record("oracle", [], status="failed", reason="out of | memory\nat users 0 to 7")]
    del few[2].header["key"], few[2].header["step"], few[2].header["data_kind"]
    few[2].header.update(coverage={}, objective=None)
    lines = report.make_lines(few)
    text = report.render_cells(lines)
    heading, made, fixed, _, notes = text.rstrip("\n").split("\n\n")
    assert heading == "# Evaluation cells" and made == f"**{render.MADE_DATA}**"
    assert fixed == (
        "All cells have model: tiny, step: 800, data: prism, split: test, signals: all, "
        "generator: trained."
    )
    rows = read_table(text)
    assert rows[0][:4] == ["condition", "decoding", "acc_half", "difference to no_signals"]
    row = find(lines, "summary").row
    assert row is not None and row.acc_half.value < 1
    value, _, low, high = (f"{x:.3f}"[1:] for x in row.acc_half)
    assert rows[4][:3] == ["summary", "sampled", f"{value} [{low}, {high}]"]
    assert rows[2][2:4] == [".500 [.500, .500]", "–"]
    assert rows[3][:4] == ["oracle", "greedy", "failed: out of / memory at users 0 to 7", "–"]
    assert rows[4][-3:] == [str(row.n), "12", "6.0"]
    assert notes.startswith("Baseline: no_signals. Estimate [95 % interval]")
    rows = read_table(report.render_more(lines))
    assert rows[0][:4] == ["condition", "decoding", "acc", "acc_likelihood_half"]
    value, _, low, high = (f"{x:.3f}"[1:] for x in row.acc)
    assert rows[3][:3] == ["summary", "sampled", f"{value} [{low}, {high}]"]
    assert rows[3][-2:] == ["2 too_long", "40.0"] and len(rows) == 4  # what failed has no numbers


@pytest.mark.parametrize(
    ("numbers", "shown"),
    [
        ((0.75, 0.731, 0.768), ".750 [.731, .768]"),
        ((-0.0001, -0.25, 1.0), ".000 [-.250, 1.000]"),
        ((10.25, None, None), "10.250"),
        ((None, None, None), "–"),
    ],
)
def test_intervals_as_they_are_shown(numbers: Any, shown: str) -> None:
    assert report.show_interval(*numbers) == shown


def test_numbers_are_those_of_the_statistics():
    records = make_records()
    lines = report.make_lines(records)
    cell, base, other = (statistics.make_items(records[i].items) for i in (0, 3, 2))
    line = find(lines, "summary")
    assert line.row == statistics.compute_row(cell, records[0].header["coverage"])
    assert line.difference == statistics.compute_difference(cell, base)
    assert line.bits == statistics.compute_information_gain(cell, base)
    assert line.bits_over_other == statistics.compute_information_gain(cell, other)
    assert line.difference and line.difference.only_second == 1
    control = find(lines, "other_user_summary")
    assert control.bits and control.bits_over_other is None
    # of another generator another baseline
    before = find(lines, "summary", "before_rl")
    assert before.difference and before.difference.estimate.value > 0.5
    fields = report.list_line(line)
    assert fields["bits"] == line.bits.estimate.value and fields["bits_n"] == len(cell.keys)


def test_gap_recovered_where_the_oracle_is_known():
    records = make_records()
    lines = report.make_lines(records)
    assert find(lines, "summary").gap_recovered is None  # both oracles lack scores
    assert "gap recovered" not in read_table(report.render_cells(lines))[0]
    assert report.list_line(find(lines, "summary"))["gap_recovered"] is None
    records[-1] = make_record("oracle", make_items(2.5), decoding="none")
    lines = report.make_lines(records)
    line = find(lines, "summary")
    cells = [statistics.make_items(records[i].items) for i in (0, 3, -1)]
    assert line.gap_recovered == statistics.compute_gap_recovered(*cells)
    # neither of another generator, nor of the ends themselves
    others = [("summary", "before_rl"), ("no_signals", "trained"), ("oracle", "trained")]
    assert not any(find(lines, *other).gap_recovered for other in others)
    heads, _, *rows = read_table(report.render_cells(lines))
    at = heads.index("gap recovered")
    shown = next(r for r in rows if r[0] == "summary" and "trained" in r)[at]
    value, _, low, high = (f"{x:.3f}".replace("0.", ".") for x in line.gap_recovered.estimate)
    assert shown == f"{value} [{low}, {high}]"
    assert {r[at] for r in rows if r[0] == "no_signals"} == {"–"}


@pytest.mark.parametrize(
    "change", [{"signals": "shots"}, {"step": 700}, {"data": "own"}, {"objective": {"name": "ipo"}}]
)
def test_other_cells_are_no_baseline(change: dict[str, Any]) -> None:
    records = [make_record("summary", make_items(1.0)), make_record("no_signals", make_items(0.0))]
    assert find(report.make_lines(records), "summary").bits
    records[1] = make_record("no_signals", make_items(0.0), **change)
    assert find(report.make_lines(records), "summary").bits is None


def test_a_named_baseline_of_the_same_decoding():
    records = [
        make_record("summary_before_rl", make_items(s), decoding=d)
        for d, s in (("greedy", 0.5), ("sampled", 0.3))
    ]
    records.append(make_record("summary", make_items(1.0), decoding="sampled"))
    (line,) = (
        x
        for x in report.make_lines(records, baseline="summary_before_rl")
        if x.labels["condition"] == "summary"
    )
    cells = [statistics.make_items(records[i].items) for i in (2, 1)]
    assert line.difference == statistics.compute_difference(*cells)


def test_all_files_in_any_order_of_cells(tmp_path: Path):
    records = make_records()
    report.write(str(tmp_path / "a"), records)
    report.write(str(tmp_path / "b"), records[::-1])
    names = [f"{n}.{kind}" for n in ("groups", "table", "transfer") for kind in ("csv", "jsonl")]
    names += ["groups.md", "table.md", "transfer.md"]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == sorted(names)
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "a" / "table.jsonl").open()]
    flat = list(csv.DictReader((tmp_path / "a" / "table.csv").open()))
    assert len(rows) == len(flat) == len(records)
    for row, line in zip(rows, flat, strict=True):
        assert list(row) == list(line) == list(rows[0])
        assert (line["acc"] == "") == (row["acc"] is None) == (row["status"] != "done")
        assert row["acc"] is None or float(line["acc"]) == row["acc"]
        assert row["made_data"] is True
    told = {row["reason"] for row in rows}
    assert told == {"", "out of | memory\nat users 0 to 7", "not scored yet", "no pair was scored"}


def test_groups_of_people(tmp_path: Path):
    report.write(str(tmp_path), make_records()[:1])
    rows = [json.loads(line) for line in (tmp_path / "groups.jsonl").open()]
    assert [(r["grouping"], r["group"], r["persons"]) for r in rows] == [
        ("topic", "food", 4),
        ("topic", "travel", 19),
    ]
    assert [r["worst"] for r in rows] == [False, True]
    text = (tmp_path / "groups.md").read_text()
    assert "## topic" in text and render.MADE_DATA in text
    assert "worst: lowest acc_half of the groups of at least 10 persons (1)." in text
    table = read_table(text)
    assert table[2][-1] == "" and table[3][-1] == "worst" and "[" not in table[2][3]
    few = [make_record("summary", make_items(1.0, 8))]
    lines = report.make_lines(few)
    groups = report.list_groups(lines[0])
    assert "worst: no group has 10 persons." in report.render_groups(lines, groups)


def test_transfer_to_another_generator(tmp_path: Path):
    records = make_records()
    lines = report.make_lines(records)
    (row,) = report.list_transfers(lines)
    cells = [statistics.make_items(records[i].items) for i in (0, 3, 1, 4)]
    found = statistics.compute_transfer(*cells)
    assert row["generator"] == "before_rl" and row["share"] == found.share.value
    assert (row["n"], row["dropped"]) == (len(cells[0].keys), 1)
    text = report.render_transfers(lines, [row])
    assert read_table(text)[2][2] == "before_rl" and "[" in read_table(text)[2][3]
    text = report.render_transfers(lines, [row | {"defined": False}])
    assert read_table(text)[2][3] == "undefined"


def test_real_data_are_not_called_made():
    records = [make_record("summary", make_items(1.0), data_kind="published")]
    assert "SAMPLE" not in report.render_cells(report.make_lines(records))
    records.append(make_record("summary", make_items(1.0), data="made"))
    text = report.render_cells(report.make_lines(records))
    assert f"**{render.MADE_DATA} Of this kind here: made.**" in text
    assert not any(math.isnan(x) for x in report.make_lines(records)[0].row.acc)  # type: ignore[union-attr]


def test_no_cell_at_all(tmp_path: Path):
    report.write(str(tmp_path), [])
    assert "No cell." in (tmp_path / "table.md").read_text()
