"""Runs a sweep: finds which cells are there, computes the others, one file each.

All processes go through the same cells in the same order; process 0 decides which are to be
computed, reads and writes the files."""

import dataclasses
import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from absl import logging
from etils import epath
from jax.sharding import Mesh

from popi_jax import distributed, files
from popi_jax.checkpoints.content import Hashes
from popi_jax.config import Config, DataConfig
from popi_jax.data.examples import Examples, list_examples
from popi_jax.data.prepared import prepare
from popi_jax.data.selection import Selected
from popi_jax.errors import UserError
from popi_jax.evals import records
from popi_jax.evals.cells import Split, Unit
from popi_jax.evals.conditions import BEFORE_RL, TRAINED, list_reads
from popi_jax.evals.subjects import Reader, Subject, open_reader, open_subject
from popi_jax.evals.sweep_plan import BASE, OWN, Cell, Sweep, list_cells, split_name, take_share
from popi_jax.progress import Progress

DONE, TO_COMPUTE, FAILED = "done", "todo", "failed"


class Place(NamedTuple):
    """Where a sweep is computed and kept."""

    out: str
    command: Config  # of this machine: mesh, batches, prepared data
    released: Config  # the settings of base models
    mesh: Mesh
    # the settings of a data set, by the name of its configuration
    load_data: Callable[[str], DataConfig]
    allow_sample: bool  # whether made data may stand in for missing files


class Found(NamedTuple):
    """A cell and what is known of it before anything is computed."""

    cell: Cell
    key: str  # "" where it cannot be known
    status: str  # done, todo or failed
    reason: str = ""  # why it failed


class Outcome(NamedTuple):
    cell: Cell
    labels: dict[str, Any]
    key: str
    status: str  # done; failed; missing: not computed, such as one of another share
    reason: str = ""


def run_sweep(
    sweep: Sweep, place: Place, *, share: str = "1/1", dry_run: bool = False
) -> list[Outcome]:
    """Computes the cells of a share that are not there yet; returns how it stands with all cells.

    Raises: UserError for a share that is none."""
    cells = list_cells(sweep, list_reads())
    own = take_share(cells, share)
    hashes = Hashes(epath.Path(place.out) / "hashes.json", files.write_whole)
    decodings = list(dict.fromkeys(cell.decoding for cell in cells if cell.decoding != "none"))
    opened = Opened(place, sweep.max_users, decodings, hashes)
    units = {cell: opened.find_unit(cell) for cell in cells}
    return compute_cells(units, place.out, own=own, dry_run=dry_run)


def compute_cells(
    units: Mapping[Cell, Unit | UserError],
    out: str,
    *,
    own: Collection[Cell],
    dry_run: bool = False,
) -> list[Outcome]:
    """Computes those of the cells `own` that are not there yet, each in its unit; returns how it
    stands with all.

    A cell that fails is told and recorded with its reason, and the others go on."""
    found = _look(units, out)
    todo = [f for f in found if f.cell in own and f.status == TO_COMPUTE]
    shown = distributed.is_main_process()
    if shown and (todo or dry_run):
        have = sum(f.status == DONE for f in found)
        part = f" ({len(own)} of them in this share)" if len(own) < len(found) else ""
        logging.info("%d cells%s: %d there, %d to compute", len(found), part, have, len(todo))
    if dry_run:
        if shown:
            print("".join(f"{f.status:<7} {_tell(f.cell)}\n" for f in found), end="")
        return [_conclude(f, units[f.cell]) for f in found]
    outcomes = {}
    _record_failures(out, [f for f in found if f.status == FAILED and f.cell in own])
    with Progress(len(todo), label="evaluation", enabled=shown and bool(todo)) as progress:
        for number, each in enumerate(todo):
            unit = units[each.cell]
            assert isinstance(unit, Unit)
            advance = lambda part, n=number: progress.update(n, {"of a cell": part})  # noqa: E731
            outcomes[each.cell] = _compute(each, unit, out, advance)
            progress.update(number + 1)
            following = todo[number + 1].cell if number + 1 < len(todo) else None
            if following is None or units[following] is not unit:
                unit.forget()
    return [outcomes.get(f.cell, _conclude(f, units[f.cell])) for f in found]


def read_records(outcomes: Sequence[Outcome], out: str) -> list[records.CellRecord]:
    """The files of all cells, in order; one without items for each that failed or is missing. What
    another share has computed meanwhile is there."""
    found = []
    for each in outcomes:
        record = None
        if each.status != FAILED:
            record = records.read_done(records.find_file(out, records.CELLS, each.key))
        header = {"kind": "cell", "key": each.key, "labels": each.labels}
        reason = each.reason or "not computed yet"
        if record is None:
            header |= {"status": each.status, "reason": reason, "coverage": {}}
            record = records.CellRecord({}, [])
        found.append(record._replace(header=record.header | header))
    return found


class Opened:
    """What cells name, each opened once. What cannot be opened is a UserError in its place."""

    def __init__(
        self, place: Place, max_users: int, decodings: Sequence[str], hashes: Hashes
    ) -> None:
        self._place, self._max_users = place, max_users
        self._decodings, self._hashes = decodings, hashes
        self._kept: dict[tuple[str, ...], Any] = {}

    def find_unit(self, cell: Cell) -> Unit | UserError:
        foreign = "" if cell.generator in (TRAINED, BEFORE_RL) else cell.generator
        return self._once(self._open_unit, cell.model, cell.data, foreign)

    def _open_unit(self, model: str, data: str, foreign: str) -> Unit:
        subject: Subject = self._get(self._open_subject, model)
        split: Split = self._get(self._open_split, model, data)
        readers: dict[str, Reader] = dict(subject.readers)
        if foreign:
            readers[foreign] = self._get(self._open_reader, foreign)
        return Unit(subject, split, readers, self._decodings, self._place.out, self._hashes)

    def _open_subject(self, model: str) -> Subject:
        base = model.startswith(BASE)
        command = self._place.released if base else self._place.command
        return open_subject(model, command, self._place.mesh)

    def _open_reader(self, place: str) -> Reader:
        return open_reader(place, self._place.released, self._place.mesh)

    def _open_split(self, model: str, data: str) -> Split:
        name, split = split_name(data)
        subject: Subject = self._get(self._open_subject, model)
        config = subject.roles.config.data
        if name != OWN:
            found = self._place.load_data(name)
            config = dataclasses.replace(
                found,
                summary_len=config.summary_len,
                prompt_aware=config.prompt_aware,
                signals=found.signals if config.signals == "all" else config.signals,
            )
        trained_on = subject.trained_on if name == OWN else ""
        dataset = prepare(config, allow_sample=self._place.allow_sample, trained_on=trained_on)
        if split not in dataset.splits:
            raise UserError(
                f'data "{data}": there is no split "{split}", allowed are '
                f"{', '.join(dataset.splits)}"
            )
        return make_split(dataset, split, config, self._max_users)

    def _get(self, make: Callable[..., Any], *names: str) -> Any:
        found = self._once(make, *names)
        if isinstance(found, UserError):
            raise found
        return found

    def _once(self, make: Callable[..., Any], *names: str) -> Any:
        key = (make.__name__, *names)
        if key not in self._kept:
            try:
                self._kept[key] = make(*names)
            except UserError as e:
                self._kept[key] = e
        return self._kept[key]


def make_split(dataset: Any, split: str, config: DataConfig, max_users: int) -> Split:
    """The first users of a split of a prepared data set, as `config` asks for them, with all their
    signals. Raises: UserError when there is none."""
    people = dataset.splits[split]
    while isinstance(people, Examples | Selected):
        people = people.users
    users = list(people[: max_users or len(people)])
    if not users:
        raise UserError(
            f"data.{split}_fraction: the {split} split holds no user; take another --split"
        )
    identity = {"prepared": dataset.prepared.name, "split": split, "users": len(users)}
    if config.prompt_aware:
        users = list(list_examples(users, config.num_pairs))
        identity["examples"] = config.num_pairs
        config = dataclasses.replace(config, num_pairs=1)
    return Split(users, config, identity, dataset.data)


def _look(units: Mapping[Cell, Unit | UserError], out: str) -> list[Found]:
    """How it stands with each cell, as process 0 sees it."""
    told = ""
    if distributed.is_main_process():
        told = json.dumps([_look_at(cell, unit, out)[1:] for cell, unit in units.items()])
    rows = json.loads(distributed.tell_all(told))
    return [Found(cell, *row) for cell, row in zip(units, rows, strict=True)]


def _look_at(cell: Cell, unit: Unit | UserError, out: str) -> Found:
    if isinstance(unit, UserError):
        return Found(cell, "", FAILED, str(unit))
    try:
        key = records.make_key(unit.identify(cell))
        there = records.read_done(records.find_file(out, records.CELLS, key))
    except UserError as e:
        return Found(cell, "", FAILED, str(e))
    return Found(cell, key, DONE if there else TO_COMPUTE)


def _compute(each: Found, unit: Unit, out: str, advance: Callable[[float], None]) -> Outcome:
    try:
        scored = unit.score(each.cell, advance)
    except Exception as e:
        reason = " ".join(str(e).split())
        if not isinstance(e, UserError):
            logging.exception("%s", _tell(each.cell))
            reason = f"{type(e).__name__}: {reason[:500]}"
        _record_failures(out, [each._replace(reason=reason)])
        return _conclude(each._replace(status=FAILED, reason=reason), unit)
    if distributed.is_main_process():
        labels = each.cell.labels(unit.subject.step)
        header = {"kind": "cell", "key": each.key, "status": DONE, "labels": labels}
        made = {"date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "jax": jax.__version__}
        made["devices"] = f"{jax.device_count()} {jax.devices()[0].device_kind}"
        identity = {"identity": unit.identify(each.cell), "made": made}
        path = records.find_file(out, records.CELLS, each.key)
        records.write(path, header | scored.header | identity, scored.items)
        records.find_failure(out, each.cell.labels()).unlink(missing_ok=True)
    return _conclude(each._replace(status=DONE), unit)


def _record_failures(out: str, failed: Sequence[Found]) -> None:
    """Writes the reason of each, and tells each reason once."""
    if not distributed.is_main_process():
        return
    reasons: dict[str, list[Cell]] = {}
    for each in failed:
        records.write_failure(out, each.cell.labels(), each.reason)
        reasons.setdefault(each.reason, []).append(each.cell)
    for reason, cells in reasons.items():
        more = f" (and {len(cells) - 1} more)" if len(cells) > 1 else ""
        logging.error("failed: %s%s: %s", _tell(cells[0]), more, reason)


def _conclude(found: Found, unit: Unit | UserError) -> Outcome:
    step = unit.subject.step if isinstance(unit, Unit) else None
    status = "missing" if found.status == TO_COMPUTE else found.status
    return Outcome(found.cell, found.cell.labels(step), found.key, status, found.reason)


def _tell(cell: Cell) -> str:
    parts = [cell.model, cell.data, cell.signals, cell.condition, cell.decoding, cell.generator]
    return ", ".join(part for part in parts if part != "none")
