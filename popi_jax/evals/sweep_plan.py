"""A sweep file -> the cells of a sweep, in order. Knows names alone: what they stand for is opened
by subjects.py. Imports no jax."""

import itertools
import re
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from popi_jax.errors import UserError, did_you_mean

DECODINGS = ("greedy", "sampled")  # of summaries; sampled: at `inference.temperature`
OWN = "own"  # the data that a run was trained on
# how a base model (a folder, a bucket or org/name) is told from a WORKDIR, as both roles
BASE = "hf:"
_FIELDS = ("models", "data", "signals", "conditions", "decodings", "generators")
_OPTIONS = ("grids", "baseline", "max_users", *_FIELDS)


class Grid(NamedTuple):
    """A product of names: each of its fields is a list in the sweep file."""

    models: tuple[str, ...]  # WORKDIR, WORKDIR@STEP or hf:BASE
    data: tuple[str, ...]  # own or CONFIG[:options], each with @SPLIT if it is not test
    signals: tuple[str, ...]
    conditions: tuple[str, ...]
    decodings: tuple[str, ...]
    generators: tuple[str, ...]  # trained, before_rl or a base model


class Sweep(NamedTuple):
    grids: tuple[Grid, ...]
    baseline: str  # the condition that others are compared with
    max_users: int  # of each split, the first ones; 0: all


class Cell(NamedTuple):
    """What one file answers. `signals` and `decoding` are "none" where they change nothing."""

    model: str
    data: str
    signals: str
    condition: str
    decoding: str
    generator: str

    @property
    def split(self) -> str:
        return split_name(self.data)[1]

    def labels(self, step: int | None = None) -> dict[str, Any]:
        """How tables and files name the cell. step: that the newest one is, where it is known."""
        model, asked = parse_model(self.model)
        data, split = split_name(self.data)
        step = asked if step is None else step
        first = {"model": model, "step": "" if step is None else step, "data": data, "split": split}
        return first | {name: getattr(self, name) for name in self._fields[2:]}


class Reads(NamedTuple):
    """What a condition asks for: raw signals, and summaries that are decoded."""

    signals: bool
    summaries: bool


DEFAULT = Grid(
    models=(),
    data=(OWN,),
    signals=("all",),
    conditions=(
        *("no_signals", "raw_signals", "summary_before_rl", "summary", "other_user_summary"),
        "oracle",
    ),
    decodings=("greedy",),
    generators=("trained",),
)


def split_name(data: str) -> tuple[str, str]:
    """ "prism:schedule=short@validation" -> (its configuration, its split)."""
    name, _, split = data.partition("@")
    return name, split or "test"


def parse_model(model: str) -> tuple[str, int | None]:
    """ "work/prism@750" -> (its WORKDIR, its step or None for the newest)."""
    match = re.fullmatch(r"(.+)@(\d+)", model)
    return (match[1], int(match[2])) if match else (model, None)


def read_sweep(
    spec: str,
    changed: Mapping[str, Sequence[str]],
    max_users: int | None = None,
    *,
    workdir: str = "",
) -> Sweep:
    """Returns the sweep of FILE or FILE:ARGUMENT, whose `get_sweep(argument)` returns a dict.

    workdir: of the run that is meant where the file names no models. changed: fields of all its
    grids that are given on the command line. Raises: UserError of one line that names file, field,
    what was found and what is allowed."""
    name, _, arg = spec.partition(":")
    path = Path(name)
    if not path.is_file():
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*.py")])
        raise UserError(f"--sweep={spec}: there is no file {name}.{near}")
    try:
        get_sweep = runpy.run_path(str(path)).get("get_sweep")
        found = get_sweep(arg) if get_sweep else None
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"{path}: {type(e).__name__}: {' '.join(str(e).split())}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: must define get_sweep(argument) that returns a dict")
    _check_names(found, _OPTIONS, str(path))
    common = {name: found[name] for name in _FIELDS if name in found}
    grids = []
    for number, own in enumerate(found.get("grids", [{}])):
        where = f"{path}, grids[{number}]" if "grids" in found else str(path)
        _check_names(own, _FIELDS, where)
        values = {"models": [workdir] if workdir else [], **common, **own, **changed}
        grids.append(_make_grid(values, where))
    baseline = found.get("baseline", "no_signals")
    limit = found.get("max_users", 0) if max_users is None else max_users
    if not isinstance(limit, int) or limit < 0:
        raise UserError(f"{path}: max_users = {limit!r}: must be a whole number of at least 0")
    return Sweep(tuple(grids), baseline, limit)


def list_cells(sweep: Sweep, reads: Mapping[str, Reads]) -> list[Cell]:
    """The cells in the order in which they are computed, each once: what shares weights and data
    stands together, base models as generators come last.

    reads: of each condition that is known. A condition that is not is a cell too: one that will
    fail."""
    cells: dict[Cell, None] = {}
    for grid in sweep.grids:
        product = itertools.product(grid.models, grid.data, grid.generators, grid.conditions)
        for model, data, generator, condition in product:
            needs = reads.get(condition, Reads(True, True))
            signals = grid.signals if needs.signals else ("none",)
            decodings = grid.decodings if needs.summaries else ("none",)
            for pair in itertools.product(signals, decodings):
                cells[Cell(model, data, pair[0], condition, pair[1], generator)] = None
    foreign = {cell: cell.generator not in ("trained", "before_rl") for cell in cells}
    order = {name: number for number, name in enumerate(dict.fromkeys(c.generator for c in cells))}
    return sorted(cells, key=lambda cell: order[cell.generator] if foreign[cell] else -1)


def take_share(cells: Sequence[Cell], share: str) -> list[Cell]:
    """The cells of part I of N ("I/N") of a sweep: whole models on whole data where there are as
    many, so that nothing that they have in common is computed twice.

    Raises: UserError."""
    match = re.fullmatch(r"(\d+)/(\d+)", share)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--share={share}: must be I/N with I from 1 to N, like 2/8")
    number, count = int(match[1]) - 1, int(match[2])
    groups = list(dict.fromkeys((cell.model, cell.data) for cell in cells))
    if len(groups) >= count:
        return [c for c in cells if groups.index((c.model, c.data)) % count == number]
    return [cell for position, cell in enumerate(cells) if position % count == number]


def _make_grid(values: Mapping[str, Any], where: str) -> Grid:
    for field, value in values.items():
        if not isinstance(value, (list, tuple)) or not all(isinstance(x, str) for x in value):
            raise UserError(f"{where}: {field} = {value!r}: must be a list of names")
        if twice := [x for x in value if value.count(x) > 1]:
            raise UserError(f'{where}: {field} has "{twice[0]}" twice')
        if not value:
            named = f": name the WORKDIR of a run, or {BASE}FOLDER" if field == "models" else ""
            raise UserError(f"{where}: {field} is empty{named}")
    grid = DEFAULT._replace(**{field: tuple(value) for field, value in values.items()})
    for decoding in grid.decodings:
        if decoding not in DECODINGS:
            allowed = f"{', '.join(DECODINGS)}.{did_you_mean(decoding, DECODINGS)}"
            raise UserError(f'{where}: decodings has "{decoding}": must be one of {allowed}')
    return grid


def _check_names(found: Any, allowed: Sequence[str], where: str) -> None:
    if not isinstance(found, dict):
        raise UserError(f"{where}: found {type(found).__name__}, must be a dict")
    for name in found:
        if name not in allowed:
            raise UserError(
                f'{where}: there is no field "{name}", allowed are {", ".join(allowed)}.'
                f"{did_you_mean(str(name), allowed)}"
            )
