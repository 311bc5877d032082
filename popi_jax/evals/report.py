"""Tables of evaluation cells: one row a cell, and one a group of people; as JSON lines, CSV and
Markdown.

A cell that failed or is missing is a row with the reason. The baseline of a cell is the cell of the
same model, step, data, split and generator, of the same objective, and of the same signals unless
it reads none, whose condition is the named one. Differences and bits are paired on the pairs that
both have."""

import csv
import io
import json
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

from etils import epath

from popi_jax import files
from popi_jax.evals import statistics
from popi_jax.evals.bootstrap import RESAMPLES, Estimate
from popi_jax.evals.render import MADE_DATA, align_table
from popi_jax.evals.statistics import Items, Row

BASELINE = "no_signals"
HOME = "trained"  # the generator that summaries are made for
CONTROL, ORACLE = "other_user_summary", "oracle"  # what tells nothing of the user, and all
LABELS = ("model", "step", "data", "split", "signals", "condition", "decoding", "generator")
SAME = ("model", "step", "data", "split", "generator")  # of a cell and its baseline
NONE = "none"  # signals and decoding of a cell that they do not change
_DASH = "–"
MAIN = "acc_half"
_NOTES = f"""\
Estimate [95 % interval], by a bootstrap over persons ({RESAMPLES} resamples); {_DASH} where fewer
than 10 persons, or nothing, can tell. acc_half: share of pairs whose margin against the reference
is above 0, a tie counts one half; acc_likelihood: share whose chosen reply has the higher log-prob.
Differences are of acc_half. bits: (nats of the baseline - nats) / ln 2 a pair; bits over other: the
same over another user's summary. gap recovered: (acc_half - that of the baseline) / (that of the
oracle - that of the baseline)."""
_MORE = """\
acc: as acc_half, but a tie is wrong. ece: calibration error of sigmoid(margin). compression: tokens
of the signals / tokens that the generator saw of the user."""


@runtime_checkable
class Cell(Protocol):
    """As records.CellRecord."""

    @property
    def header(self) -> dict[str, Any]: ...

    @property
    def items(self) -> Sequence[dict[str, Any]]: ...


class Line(NamedTuple):
    """What a table says of a cell."""

    labels: dict[str, Any]
    key: str
    status: str  # done | failed | missing
    reason: str
    made: bool  # made sample data
    items: Items | None
    row: Row | None
    difference: statistics.Difference | None  # acc_half beyond the baseline
    bits: statistics.Difference | None
    bits_over_other: statistics.Difference | None
    gap_recovered: statistics.Difference | None  # from the baseline to the oracle


def write(out: str, records: Sequence[Cell], *, baseline: str = BASELINE, seed: int = 0) -> str:
    """Writes the tables of cells, of groups and of transfer to other generators into a folder:
    table, groups and transfer, each as .jsonl, .csv and .md. Returns the first part of table.md."""
    lines = make_lines(records, baseline=baseline, seed=seed)
    cells = [list_line(line) for line in lines]
    groups = [row for line in lines for row in list_groups(line, seed=seed)]
    transfers = list_transfers(lines, baseline=baseline, seed=seed)
    worth = render_cells(lines, baseline)
    texts = {
        "table.jsonl": _write_jsonl(cells),
        "table.csv": _write_csv(cells),
        "table.md": f"{worth}\n{render_more(lines)}",
        "groups.jsonl": _write_jsonl(groups),
        "groups.csv": _write_csv(groups),
        "groups.md": render_groups(lines, groups),
        "transfer.jsonl": _write_jsonl(transfers),
        "transfer.csv": _write_csv(transfers),
        "transfer.md": render_transfers(lines, transfers, baseline),
    }
    for name, text in texts.items():
        files.write_whole(epath.Path(out) / name, text)
    return worth


def make_lines(records: Sequence[Cell], *, baseline: str = BASELINE, seed: int = 0) -> list[Line]:
    """A line for each record, sorted by labels whatever the order of the records."""
    records = sorted(records, key=lambda record: _sort_labels(record.header))
    read = [_read_items(record) for record in records]
    lines = []
    for record, items in zip(records, read, strict=True):
        header = record.header
        status, reason = header["status"], header.get("reason", "")
        if items is None and status == "done":
            status, reason = "failed", "no pair was scored"
        row = None
        pairs: list[statistics.Difference | None] = [None] * 4
        if items is not None:
            row = statistics.compute_row(items, header.get("coverage"), seed=seed)
            base = _find_partner(header, baseline, records, read)
            other = _find_partner(header, CONTROL, records, read)
            oracle = _find_partner(header, ORACLE, records, read)
            pairs = [
                _compare(statistics.compute_difference, seed, items, base),
                _compare(statistics.compute_information_gain, seed, items, base),
                _compare(statistics.compute_information_gain, seed, items, other),
                _compare(statistics.compute_gap_recovered, seed, items, base, oracle),
            ]
        made = header.get("data_kind") == "sample"
        labels, key = _list_labels(header), header.get("key", "")
        lines.append(Line(labels, key, status, reason, made, items, row, *pairs))
    return lines


def list_line(line: Line) -> dict[str, Any]:
    """A cell as the fields of table.jsonl and table.csv: unknown is None."""
    fields = {"key": line.key, **line.labels, "status": line.status, "reason": line.reason}
    fields["made_data"] = line.made
    fields |= statistics.list_fields(line.row) if line.row else _list_blank()
    for name in ("difference", "bits", "bits_over_other", "gap_recovered"):
        found: statistics.Difference | None = getattr(line, name)
        blank = Estimate(*[float("nan")] * 4)
        fields |= statistics.list_estimate(name, found.estimate if found else blank)
        fields[f"{name}_n"] = found.n if found else None
        fields[f"{name}_only_here"] = found.only_first if found else None
        fields[f"{name}_only_there"] = found.only_second if found else None
    return fields


def list_groups(line: Line, *, seed: int = 0) -> list[dict[str, Any]]:
    """A row of each group of people of a cell: the fields of groups.jsonl and groups.csv."""
    if line.items is None:
        return []
    rows = []
    for grouping in statistics.compute_groups(line.items, seed=seed):
        for group, row in grouping.rows.items():
            fields = {"key": line.key, **line.labels, "grouping": grouping.name, "group": group}
            fields |= {"worst": group == grouping.worst, "worst_note": grouping.note}
            known = statistics.list_fields(row)
            del known["attempted"], known["left_out"]
            rows.append(fields | known)
    return rows


def list_transfers(
    lines: Sequence[Line], *, baseline: str = BASELINE, seed: int = 0
) -> list[dict[str, Any]]:
    """Of each cell on another generator than HOME, the share of the gain over the baseline that
    survives there: the fields of transfer.jsonl and transfer.csv."""
    known = {tuple(line.labels.values()): line for line in lines if line.items}
    rows = []
    for line in known.values():
        at_home = known.get(tuple((line.labels | {"generator": HOME}).values()))
        if at_home is None or at_home is line or line.labels["condition"] == baseline:
            continue
        bases = [
            next((b for b in known.values() if _is_partner(b.labels, each.labels, baseline)), None)
            for each in (at_home, line)
        ]
        cells = [at_home, bases[0], line, bases[1]]
        items = [cell.items for cell in cells if cell and cell.items]
        if len(items) < 4 or not set(items[0].keys).intersection(*(i.keys for i in items[1:])):
            continue
        found = statistics.compute_transfer(*items, seed=seed)
        fields = {"key": line.key, **line.labels, "defined": found.defined}
        for name in ("share", "here", "there"):
            fields |= statistics.list_estimate(name, getattr(found, name))
        rows.append(fields | {"n": found.n, "dropped": found.dropped})
    return rows


def render_cells(lines: Sequence[Line], baseline: str = BASELINE) -> str:
    """The first part of table.md, which fits a terminal: what the texts are worth."""
    heads = {MAIN: MAIN, "difference": f"difference to {baseline}"}
    if any(line.gap_recovered for line in lines):
        heads["gap_recovered"] = "gap recovered"
    heads |= {name: name for name in ("acc_likelihood", "nats", "bits")}
    heads["bits_over_other"] = "bits over other"
    names = [*heads.values(), "pairs", "users", "context tokens"]
    table = _make_table(lines, names, partial(_show_worth, names=list(heads)))
    shown = _pick_labels(lines)
    parts = ["# Evaluation cells", *_announce_made(lines), _name_fixed(lines, shown)]
    parts += [align_table(table), f"Baseline: {baseline}. {_NOTES}"]
    return "\n\n".join(part for part in parts if part) + "\n"


def render_more(lines: Sequence[Line]) -> str:
    """The rest of table.md."""
    names = ["acc", "acc_likelihood_half", "ece", "brier", "left out", "compression"]
    done = [line for line in lines if line.row]
    if not done:
        return ""
    table = _make_table(done, names, _show_rest, _pick_labels(lines))
    return "\n\n".join(["## Strict ties, calibration, cost", align_table(table), _MORE]) + "\n"


def _make_table(
    lines: Sequence[Line], names: list[str], show: Any, labels: Sequence[str] = ()
) -> list[list[str]]:
    shown = labels or _pick_labels(lines)
    table = [[*shown, *names]]
    for line in lines:
        cells = show(line) if line.row else _show_reason(line, len(names) - 1)
        table.append([str(line.labels[name]) for name in shown] + cells)
    return table


def render_groups(lines: Sequence[Line], groups: Sequence[dict[str, Any]]) -> str:
    """groups.md: a table for each grouping."""
    shown = _pick_labels(lines)
    parts = ["# Groups of people", *_announce_made(lines), _name_fixed(lines, shown)]
    for name in sorted({row["grouping"] for row in groups}):
        table = [
            [*shown, "group", "acc_half", "acc_likelihood", "nats", "pairs", "persons", "mark"]
        ]
        for row in groups:
            if row["grouping"] == name:
                numbers = [_show(row, metric) for metric in ("acc_half", "acc_likelihood", "nats")]
                mark = "worst" if row["worst"] else ""
                cells = [str(row[label]) for label in shown] + [row["group"], *numbers]
                table.append([*cells, str(row["n"]), str(row["persons"]), mark])
        notes = sorted({row["worst_note"] for row in groups if row["grouping"] == name})
        parts += [f"## {name}", align_table(table), f"worst: {'; '.join(notes)}."]
    if not groups:
        parts.append("No grouping is known of these users.")
    return "\n\n".join(part for part in parts if part) + "\n"


def render_transfers(
    lines: Sequence[Line], transfers: Sequence[dict[str, Any]], baseline: str = BASELINE
) -> str:
    """transfer.md."""
    shown = sorted({*_pick_labels(lines), "generator"}, key=LABELS.index)
    table = [[*shown, "share that survives", f"gain on {HOME}", "gain here", "pairs", "dropped"]]
    for row in transfers:
        share = _show(row, "share") if row["defined"] else "undefined"
        cells = [str(row[label]) for label in shown] + [share, _show(row, "here")]
        table.append([*cells, _show(row, "there"), str(row["n"]), str(row["dropped"])])
    parts = ["# Transfer to other generators", *_announce_made(lines), _name_fixed(lines, shown)]
    if transfers:
        told = f"Gains of acc_half over {baseline}; share: gain here / gain on {HOME}, undefined"
        told += " where the interval of the gain there holds 0 or persons are too few."
        parts += [align_table(table), told]
    else:
        parts.append(f"No cell was scored on {HOME} and on another generator.")
    return "\n\n".join(part for part in parts if part) + "\n"


def show_interval(value: float | None, low: float | None, high: float | None) -> str:
    """ ".750 [.731, .768]"."""
    if value is None:
        return _DASH
    if low is None or high is None:
        return _shorten(value)
    return f"{_shorten(value)} [{_shorten(low)}, {_shorten(high)}]"


def _shorten(value: float) -> str:
    """Three places, without the 0 before the point, and without a minus before zero."""
    text = f"{value:.3f}"
    text = text.removeprefix("-") if float(text) == 0 else text
    return text.replace("0.", ".", 1) if abs(float(text)) < 1 else text


def _show(fields: dict[str, Any], name: str) -> str:
    return show_interval(fields[name], fields[f"{name}_low"], fields[f"{name}_high"])


def _show_worth(line: Line, names: Sequence[str]) -> list[str]:
    f = list_line(line)
    found = [_show(f, name) for name in names]
    return [*found, str(f["n"]), str(f["users"]), f"{f['context_tokens']:.1f}"]


def _show_rest(line: Line) -> list[str]:
    f = list_line(line)
    found = [_show(f, name) for name in ("acc", "acc_likelihood_half", "ece", "brier")]
    reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(f["left_out"].items())) or "0"
    compression = _DASH if f["compression"] is None else f"{f['compression']:.1f}"
    return [*found, reasons, compression]


def _show_reason(line: Line, count: int) -> list[str]:
    # a bar would end the column
    told = " ".join(f"{line.status}: {line.reason or 'no reason given'}".split())
    return [told.replace("|", "/"), *[_DASH] * count]


def _announce_made(lines: Sequence[Line]) -> list[str]:
    made = sorted({str(line.labels["data"]) for line in lines if line.made})
    if not made:
        return []
    known = {line.made for line in lines if line.status == "done"}
    some = f" Of this kind here: {', '.join(made)}." if len(known) > 1 else ""
    return [f"**{MADE_DATA}{some}**"]


def _pick_labels(lines: Sequence[Line]) -> list[str]:
    """The labels that tell the cells apart, and the condition."""
    several = {name for name in LABELS if len(_list_values(lines, name)) > 1}
    return [name for name in LABELS if name in several | {"condition", "decoding"}]


def _list_values(lines: Sequence[Line], name: str) -> list[str]:
    """What a label says, without that it says nothing."""
    return sorted({str(line.labels[name]) for line in lines} - {"", NONE})


def _name_fixed(lines: Sequence[Line], shown: Sequence[str]) -> str:
    if not lines:
        return "No cell."
    rest = [f"{n}: {v}" for n in LABELS if n not in shown for v in _list_values(lines, n)]
    return f"All cells have {', '.join(rest)}." if rest else ""


def _read_items(record: Cell) -> Items | None:
    if record.header["status"] != "done" or not record.items:
        return None
    return statistics.make_items(record.items)


def _find_partner(
    header: dict[str, Any], condition: str, records: Sequence[Cell], read: Sequence[Items | None]
) -> Items | None:
    """The pairs of the cell of another condition that is like this one; of several those of the
    same decoding, else of the first."""
    labels = _list_labels(header)
    if labels["condition"] == condition:
        return None
    found = []
    for number, record in enumerate(records):
        other = _list_labels(record.header)
        same = record.header.get("objective") == header.get("objective")
        if same and read[number] is not None and _is_partner(other, labels, condition):
            found.append((other["decoding"] != labels["decoding"], number))
    return read[min(found)[1]] if found else None


def _is_partner(labels: dict[str, Any], other: dict[str, Any], condition: str) -> bool:
    """Whether labels are those of the cell of a condition that is like another cell."""
    like = all(labels[name] == other[name] for name in SAME)
    return (
        labels["condition"] == condition and like and labels["signals"] in (other["signals"], NONE)
    )


def _compare(compute: Any, seed: int, items: Items, *partners: Items | None) -> Any:
    known = [partner for partner in partners if partner is not None]
    if len(known) < len(partners) or not set(items.keys).intersection(*(p.keys for p in known)):
        return None
    return compute(items, *known, seed=seed)


def _sort_labels(header: dict[str, Any]) -> tuple[Any, ...]:
    labels = _list_labels(header)
    first = ("model", "data", "split", "condition", "signals", "decoding", "generator")
    texts = (str(labels[name]) for name in first)
    return *texts, float(labels["step"] or 0), header.get("key", "")


def _list_labels(header: dict[str, Any]) -> dict[str, Any]:
    """The labels of a cell, "" where there is none; the step is that of the header, if there."""
    labels = {"step": header.get("step")} | header["labels"]
    return {name: "" if labels.get(name) is None else labels[name] for name in LABELS}


def _list_blank() -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name in Row._fields:
        kind = Row.__annotations__[name]
        fields |= dict.fromkeys(_list_names(name)) if kind is Estimate else {name: None}
    return fields


def _list_names(name: str) -> list[str]:
    return [name, *(f"{name}_{part}" for part in ("stderr", "low", "high"))]


def _write_jsonl(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def _write_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Unknown is an empty field; an object is written as JSON."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        flat = {n: json.dumps(v) if isinstance(v, dict) else v for n, v in row.items()}
        writer.writerow(flat)
    return out.getvalue()
